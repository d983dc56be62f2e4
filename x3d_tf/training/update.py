"""Updates of the network: at once, or with gradients that are summed over micro-batches and unscaled."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.training.optimizer import SGD


class Update:
    """Updates the network with the gradients of each call. Create it in the strategy's scope.

    Args:
        optimizer: the optimizer, built.
        model: the network.

    Attributes:
        state: variables to save, by role.
    """

    def __init__(self, optimizer: SGD, model: keras.Model) -> None:
        self.optimizer, self.variables = optimizer, model.trainable_variables
        self.state: dict[str, list[Any]] = {}

    def step(
        self, strategy: tf.distribute.Strategy, train_step: Callable[[Any], Any], batches: Any, metrics: Any
    ) -> Any:
        """Takes a step, in cross-replica context.

        Args:
            strategy: the distribution strategy.
            train_step: processes a micro-batch on all devices and returns its metrics.
            batches: iterator over the micro-batches.
            metrics: zeros in the shape of the metrics.

        Returns:
            The metrics of the step.
        """
        return train_step(next(batches))

    # The methods below run in replica context.

    def scaled(self, loss: Any) -> Any:
        """Returns the loss to differentiate."""
        return loss

    def add(self, gradients: list[Any]) -> None:
        """Takes the gradients of a micro-batch on this device; the optimizer sums over the devices."""
        self.optimizer.apply(gradients, self.variables)


class AccumulatedUpdate(Update):
    """Sums the gradients of a step, and updates the network once: for micro-batches, and to find float16 overflow.

    Args:
        optimizer: the optimizer, built.
        model: the network.
        micro_batches: number of micro-batches per step.
        scale: the loss scale, if any.
    """

    def __init__(
        self, optimizer: SGD, model: keras.Model, micro_batches: int, scale: "LossScale | None" = None
    ) -> None:
        super().__init__(optimizer, model)
        self._micro_batches, self._scale = micro_batches, scale
        if scale is not None:
            self.state["loss_scale"] = scale.variables
        # one sum per replica; the optimizer adds them up
        per_replica: dict[str, Any] = {"synchronization": tf.VariableSynchronization.ON_READ, "trainable": False}
        per_replica["aggregation"] = tf.VariableAggregation.SUM
        zeros = (tf.zeros(variable.shape, variable.dtype) for variable in self.variables)
        self._sums = [tf.Variable(zero, **per_replica) for zero in zeros]

    def step(
        self, strategy: tf.distribute.Strategy, train_step: Callable[[Any], Any], batches: Any, metrics: Any
    ) -> Any:
        strategy.run(self._clear)
        for _ in tf.range(self._micro_batches):
            metrics += train_step(next(batches))
        if self._scale is None:
            strategy.run(self._apply)
        else:
            overflows = strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(self._has_overflow), None)
            if overflows > 0:
                self.optimizer.iterations.assign_add(1)  # a skipped update still counts as a step
            else:
                strategy.run(self._apply)
            self._scale.update(overflows > 0)
        return metrics

    def scaled(self, loss: Any) -> Any:
        return loss if self._scale is None else loss * self._scale.value

    def add(self, gradients: list[Any]) -> None:
        for total, gradient in zip(self._sums, gradients):
            total.assign_add(gradient)

    def _clear(self) -> None:
        for total in self._sums:
            total.assign(tf.zeros_like(total))

    def _apply(self) -> None:
        factor = 1.0 if self._scale is None else 1.0 / self._scale.value
        self.optimizer.apply([total.read_value() * factor for total in self._sums], self.variables)

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
