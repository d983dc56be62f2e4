"""A moving average of the weights, which often tests better than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf


class MovingAverage:
    """Average of all weights and moving statistics of a network, recent steps counting most.

    To be made under the strategy's scope.

    Args:
        model: built.
        decay: share of the average that a step keeps, in (0, 1); less in the first steps, which would else stay.
    """

    def __init__(self, model: keras.Model, decay: float) -> None:
        self._decay = decay
        self._sources = [weight.value for weight in model.weights]
        self._trained = [weight.trainable for weight in model.weights]
        self.variables = [tf.Variable(source.read_value(), trainable=False) for source in self._sources]

    def reset(self) -> None:
        """Starts anew from the weights as they are."""
        for average, source in zip(self.variables, self._sources):
            average.assign(source.read_value())

    def update(self, strategy: tf.distribute.Strategy, step: Any) -> None:
        """Takes the weights in, after step `step` (an integer tensor); outside of the devices' own code."""
        step = tf.cast(step, tf.float32)
        decay = tf.minimum(self._decay, (1 + step) / (10 + step))

        def move(average: Any, source: Any) -> None:
            average.assign_sub(tf.cast(1 - decay, average.dtype) * (average - source))

        for average, source in zip(self.variables, self._sources):
            strategy.extended.update(average, move, args=(source,))

    def keep_statistics(self) -> None:
        """Takes what is not trained, such as the statistics of batch norm, as the network has it now."""
        for average, source, trained in zip(self.variables, self._sources, self._trained):
            if not trained:
                average.assign(source.read_value())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The network has the averaged weights within the block, and then its own again."""
        own = [source.numpy() for source in self._sources]
        try:
            for source, average in zip(self._sources, self.variables):
                source.assign(average.read_value())
            yield
        finally:
            try:
                self._assign(own)
            except KeyboardInterrupt:  # neither weights would be whole
                self._assign(own)
                raise

    def _assign(self, values: list[Any]) -> None:
        for source, value in zip(self._sources, values):
            source.assign(value)
