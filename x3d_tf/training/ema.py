"""Exponential moving average (EMA) of the weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf


class MovingAverage:
    """Exponential moving average of all variables of a network, batch-norm statistics included.

    Create it in the strategy's scope.

    Args:
        model: the network, built.
        decay: decay per step, in (0, 1). In the first steps a lower one applies, so that the initial weights fade
            quickly.
    """

    def __init__(self, model: keras.Model, decay: float) -> None:
        self._decay = decay
        self._sources = [weight.value for weight in model.weights]
        self._trained = [weight.trainable for weight in model.weights]
        self.variables = [tf.Variable(source.read_value(), trainable=False) for source in self._sources]

    def reset(self) -> None:
        """Resets the average to the current weights."""
        for average, source in zip(self.variables, self._sources):
            average.assign(source.read_value())

    def update(self, strategy: tf.distribute.Strategy, step: Any) -> None:
        """Updates the average after step `step` (an integer tensor). Call it in cross-replica context."""
        step = tf.cast(step, tf.float32)
        decay = tf.minimum(self._decay, (1 + step) / (10 + step))

        def blend(average: Any, source: Any) -> None:
            average.assign_sub(tf.cast(1 - decay, average.dtype) * (average - source))

        for average, source in zip(self.variables, self._sources):
            strategy.extended.update(average, blend, args=(source,))

    def copy_statistics(self) -> None:
        """Copies the current values of variables that are not trained, such as batch-norm statistics."""
        for average, source, trained in zip(self.variables, self._sources, self._trained):
            if not trained:
                average.assign(source.read_value())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averaged weights into the network for the duration of the block."""
        original = [source.numpy() for source in self._sources]
        try:
            for source, average in zip(self._sources, self.variables):
                source.assign(average.read_value())
            yield
        finally:
            try:
                self._assign(original)
            except KeyboardInterrupt:  # finish: the network would have a mixture of both weights
                self._assign(original)
                raise

    def _assign(self, values: list[Any]) -> None:
        for source, value in zip(self._sources, values):
            source.assign(value)
