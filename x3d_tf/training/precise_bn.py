"""Precise batch norm: statistics over many batches with fixed weights instead of a moving average during training.

PySlowFast computes them before each evaluation with fvcore's `update_bn_stats`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.x3d import Network
from x3d_tf.terminal import progress_bar
from x3d_tf.training.forward import forward_of


class PreciseStatistics:
    """Recomputes the moving statistics of the batch-norm layers of a network.

    Args:
        model: the network. While the statistics are computed, its batch norm uses batch statistics, as in training.
        strategy: the distribution strategy.
    """

    def __init__(self, model: Network, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._seeds = [variable for variable in model.variables if "seed_generator" in variable.path]
        self._norms = [layer for layer in model.layers if isinstance(layer, GhostBatchNorm)]
        self._forward = forward_of(model)
        self._moments = tf.function(self._distributed_moments)

    def refresh(self, batches: Iterator[Any], count: int) -> None:
        """Sets the statistics to the mean and the population variance over `count` batches from `batches`."""
        seeds = [seed.numpy() for seed in self._seeds]
        total: Any = 0.0
        try:
            for _ in progress_bar(count, "batch", "batch norm", iterable=range(count), leave=None):
                total = total + np.stack([part.numpy() for part in self._moments(next(batches)[0])])
        finally:
            for seed, value in zip(self._seeds, seeds):
                seed.assign(value)  # the random numbers of the next training step must not change
        means, squares = total / count
        variances = np.maximum(squares - means**2, 0)
        start = 0
        for norm in self._norms:
            end = start + norm.moving_mean.shape[0]
            norm.moving_mean.assign(means[start:end].astype("float32"))
            norm.moving_variance.assign(variances[start:end].astype("float32"))
            start = end

    def _distributed_moments(self, clips: Any) -> list[Any]:
        moments = self._strategy.run(self._replica_moments, args=(clips,))
        return [self._strategy.reduce(tf.distribute.ReduceOp.MEAN, part, axis=None) for part in moments]

    def _replica_moments(self, clips: Any) -> tuple[Any, Any]:
        """Returns the mean and the mean square of each input channel, float64 [channels of all layers]."""
        seen: dict[str, tuple[Any, Any]] = {}

        def observe(norm: GhostBatchNorm, slices: list[Any]) -> None:
            seen[norm.name] = _moments(slices)

        self._forward(clips, observe)
        means, squares = zip(*(seen[norm.name] for norm in self._norms))
        return tf.concat(means, 0), tf.concat(squares, 0)


def _moments(slices: list[Any]) -> tuple[Any, Any]:
    """Returns the mean and the mean square of each channel over tensors of equal shape, float64 [channels]."""
    moments = [tf.nn.moments(tf.cast(x, tf.float32), axes=[0, 1, 2, 3]) for x in slices]
    pairs = [(tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)) for mean, variance in moments]
    squares = [variance + tf.square(mean) for mean, variance in pairs]
    return tf.add_n([mean for mean, _ in pairs]) / len(pairs), tf.add_n(squares) / len(pairs)
