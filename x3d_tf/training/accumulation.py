"""Gradient accumulation and loss scaling, which wrap the training step."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.training.optimizer import SGD


class Accumulation:
    """Sums the gradients of a step, and updates the network once: for micro-batches, and to find float16 overflow.

    Create it in the strategy's scope.

    Args:
        optimizer: the optimiser, built.
        model: the network.
        micro_batches: number of micro-batches per step.
        scale: the loss scale, if any.
    """

    def __init__(
        self, optimizer: SGD, model: keras.Model, micro_batches: int, scale: "LossScale | None" = None
    ) -> None:
        self.scale = scale
        self._optimizer, self._micro_batches = optimizer, micro_batches
        self._variables = model.trainable_variables
        # one sum per replica; the optimiser adds them up
        per_replica: dict[str, Any] = {"synchronization": tf.VariableSynchronization.ON_READ, "trainable": False}
        per_replica["aggregation"] = tf.VariableAggregation.SUM
        zeros = (tf.zeros(variable.shape, variable.dtype) for variable in self._variables)
        self._sums = [tf.Variable(zero, **per_replica) for zero in zeros]

    def step(
        self, strategy: tf.distribute.Strategy, train_step: Callable[[Any], Any], batches: Any, metrics: Any
    ) -> Any:
        """Takes a step, in cross-replica context.

        Args:
            strategy: the distribution strategy.
            train_step: processes a micro-batch on all devices and returns its metrics; it calls `add`.
            batches: iterator over the micro-batches.
            metrics: zeros in the shape of the metrics.

        Returns:
            The sums of the metrics over the micro-batches.
        """
        strategy.run(self._clear)
        for _ in tf.range(self._micro_batches):
            metrics += train_step(next(batches))
        if self.scale is None:
            strategy.run(self._update)
        else:
            overflows = strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(self._has_overflow), None)
            if overflows > 0:
                self._optimizer.iterations.assign_add(1)  # a skipped update still counts as a step
            else:
                strategy.run(self._update)
            self.scale.update(overflows > 0)
        return metrics

    # The methods below run in replica context.

    def scaled(self, loss: Any) -> Any:
        """Returns the loss to differentiate."""
        return loss if self.scale is None else loss * self.scale.value

    def add(self, gradients: list[Any]) -> None:
        """Adds the gradients of a micro-batch."""
        for total, gradient in zip(self._sums, gradients):
            total.assign_add(gradient)

    def _clear(self) -> None:
        for total in self._sums:
            total.assign(tf.zeros_like(total))

    def _update(self) -> None:
        factor = 1.0 if self.scale is None else 1.0 / self.scale.value
        self._optimizer.apply([total.read_value() * factor for total in self._sums], self._variables)

    def _has_overflow(self) -> Any:
        finite = [tf.reduce_all(tf.math.is_finite(total.read_value())) for total in self._sums]
        return 1.0 - tf.cast(tf.reduce_all(finite), tf.float32)


class LossScale:
    """Dynamic loss scale, which keeps small float16 gradients from underflowing.

    Halved when gradients overflow, in which case the update is skipped; doubled after 2000 steps without overflow.
    """

    _GROWTH_INTERVAL = 2000

    def __init__(self) -> None:
        self.value = tf.Variable(2.0**15, trainable=False)
        self._good_steps = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.variables = [self.value, self._good_steps]

    def update(self, overflowed: Any) -> None:
        """Updates the scale after a step, in cross-replica context; `overflowed` is a bool scalar."""
        good = tf.where(overflowed, tf.constant(0, tf.int64), self._good_steps.read_value() + 1)
        grown = good >= self._GROWTH_INTERVAL
        value = self.value.read_value()
        self.value.assign(tf.where(overflowed, tf.maximum(value / 2, 1.0), tf.where(grown, value * 2, value)))
        self._good_steps.assign(tf.where(grown, tf.zeros_like(good), good))
