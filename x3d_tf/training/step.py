"""One training step over all devices: forward, backward, update."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.x3d import Network
from x3d_tf.training.ema import MovingAverage
from x3d_tf.training.forward import forward_of
from x3d_tf.training.losses import Loss
from x3d_tf.training.optimizer import SGD
from x3d_tf.training.schedule import schedule_of

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


@contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Layers made within the block compute in this precision ("float32", "bfloat16", "float16")."""
    before = keras.config.dtype_policy()
    if precision != "float32":  # which leaves what the program has chosen, such as float64
        keras.config.set_dtype_policy(_POLICIES[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


class TrainStep:
    """The step function of a run, and what it keeps between steps. To be made under the strategy's scope.

    Args:
        model: in the precision that the configuration names.
        config: of the run.
        strategy: where to train.
        class_weights: factor of the loss of each class's clips, float32 [classes]; of single-label tasks only.
    """

    def __init__(
        self,
        model: Network,
        config: TrainConfig,
        strategy: tf.distribute.Strategy,
        class_weights: np.ndarray | None = None,
    ) -> None:
        recipe, execution = config.recipe, config.execution
        self.model, self._strategy = model, strategy
        freeze(model, recipe)
        self._forward = forward_of(model, execution.recompute)
        self.optimizer = _optimizer(model, recipe)
        self.average = MovingAverage(model, recipe.ema) if recipe.ema else None
        self._scale = LossScale() if execution.precision == "float16" else None
        self._parts = execution.accumulation
        self._loss = Loss(model.task, recipe.batch, self._parts, class_weights)
        self._sums: list[tf.Variable] = []
        if self._parts > 1 or self._scale is not None:
            # each device its own, which the optimiser adds up
            own: dict[str, Any] = {"synchronization": tf.VariableSynchronization.ON_READ, "trainable": False}
            own["aggregation"] = tf.VariableAggregation.SUM
            self._sums = [tf.Variable(tf.zeros(v.shape, v.dtype), **own) for v in model.trainable_variables]
        self._steps = tf.function(self._single if execution.steps_per_execution == 1 else self._many)

    @property
    def variables(self) -> dict[str, list[Any]]:
        """What the next step depends on besides the network, by its role."""
        roles = {"optimizer": [variable.value for variable in self.optimizer.variables]}
        if self.average is not None:
            roles["average"] = self.average.variables
        if self._scale is not None:
            roles["loss_scale"] = self._scale.variables
        return roles

    @property
    def done(self) -> int:
        """Steps taken."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def __call__(self, batches: Any, steps: int) -> dict[str, Any]:
        """Takes steps.

        Args:
            batches: iterator of the strategy over (clips, labels), one element for each part of a step; of a detector
                ({"clip": clips, "boxes": boxes}, labels).
            steps: how many; 1 unless the configuration executes several at once.

        Returns:
            "loss" and "accuracy" of each step, float32 [steps]; the accuracy is the share of clips, or boxes, whose
            highest score is of one of their classes. Of a detector also "boxes_left_out", how many its crops do not
            show.
        """
        return self._steps(batches, tf.constant(steps))

    def trace(self, batches: Any) -> None:
        """Turns the step into a graph, which its first call would do; takes no step. Argument as of a call."""
        self._steps.get_concrete_function(batches, tf.constant(1))

    def _many(self, batches: Any, steps: Any) -> dict[str, Any]:
        rows = tf.TensorArray(tf.float32, steps)
        for index in tf.range(steps):
            rows = rows.write(index, self._one(batches))
        return self._named(rows.stack())

    def _single(self, batches: Any, steps: Any) -> dict[str, Any]:
        return self._named(self._one(batches)[None])

    def _named(self, rows: Any) -> dict[str, Any]:
        """What was measured, [steps, measures], by its name."""
        names = self._loss.metric_names
        return dict(zip(names, tf.unstack(rows, num=len(names), axis=1)))

    def _one(self, batches: Any) -> Any:
        """Takes a step; what was measured, float32 [measures]."""
        measured = self._accumulated(batches) if self._sums else self._over_devices(self._update, next(batches))
        if self.average is not None:
            self.average.update(self._strategy, self.optimizer.iterations.value)
        return measured

    def _accumulated(self, batches: Any) -> Any:
        """A step whose gradients are added up before they are used: its parts', or to see whether they overflow."""
        self._strategy.run(self._clear)
        measured = tf.zeros(len(self._loss.metric_names))
        for _ in tf.range(self._parts):
            measured += self._over_devices(self._add, next(batches))
        if self._scale is None:
            self._strategy.run(self._apply)
        else:
            overflows = self._strategy.reduce(tf.distribute.ReduceOp.SUM, self._strategy.run(self._overflows), None)
            if overflows > 0:
                self.optimizer.iterations.assign_add(1)  # the step is left out, but it is one
            else:
                self._strategy.run(self._apply)
            self._scale.update(overflows > 0)
        return measured

    def _over_devices(self, function: Any, batch: Any) -> Any:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, self._strategy.run(function, args=batch), axis=None)

    # What one device does.

    def _update(self, given: Any, labels: Any) -> Any:
        measured, gradients = self._gradients(given, labels)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return measured

    def _clear(self) -> None:
        for total in self._sums:
            total.assign(tf.zeros_like(total))

    def _add(self, given: Any, labels: Any) -> Any:
        measured, gradients = self._gradients(given, labels)
        for total, gradient in zip(self._sums, gradients):
            total.assign_add(gradient)
        return measured

    def _apply(self) -> None:
        factor = 1.0 if self._scale is None else 1.0 / self._scale.value
        gradients = [total.read_value() * factor for total in self._sums]
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def _overflows(self) -> Any:
        finite = [tf.reduce_all(tf.math.is_finite(total.read_value())) for total in self._sums]
        return 1.0 - tf.cast(tf.reduce_all(finite), tf.float32)

    def _gradients(self, given: Any, labels: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            measured = self._loss(self._forward(given), labels, given)
            loss = measured[0]
            scaled = loss if self._scale is None else loss * self._scale.value
        gradients = tape.gradient(scaled, self.model.trainable_variables)  # the optimiser adds the devices' up
        return tf.stack([tf.cast(part, tf.float32) for part in measured]), gradients


class LossScale:
    """The factor that keeps small float16 gradients from vanishing: as large as does not overflow.

    It is halved when gradients overflow, whose step is left out, and doubled after 2000 steps in which none did.
    """

    _PATIENCE = 2000

    def __init__(self) -> None:
        self.value = tf.Variable(2.0**15, trainable=False)
        self._good_steps = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.variables = [self.value, self._good_steps]

    def update(self, overflowed: Any) -> None:
        """Takes note of a step; bool scalar, outside of the devices' own code."""
        good = tf.where(overflowed, tf.constant(0, tf.int64), self._good_steps.read_value() + 1)
        grown = good >= self._PATIENCE
        value = self.value.read_value()
        self.value.assign(tf.where(overflowed, tf.maximum(value / 2, 1.0), tf.where(grown, value * 2, value)))
        self._good_steps.assign(tf.where(grown, tf.zeros_like(good), good))


def freeze(model: Network, recipe: Recipe) -> None:
    """Marks as not trainable what the recipe freezes: the backbone, or batch norm."""
    for layer in model.layers:
        frozen_norm = recipe.frozen_norms and isinstance(layer, GhostBatchNorm)
        if frozen_norm or (recipe.backbone_lr_factor == 0 and in_backbone(layer)):
            layer.trainable = False


def in_backbone(layer: keras.Layer) -> bool:
    """Whether a layer comes before fc1: what `include_top=False` leaves."""
    return layer.name not in ("fc1", "fc2")


def _optimizer(model: Network, recipe: Recipe) -> SGD:
    optimizer = SGD(schedule_of(recipe), recipe.momentum, l2=recipe.weight_decay)
    norms = [layer for layer in model.layers if isinstance(layer, GhostBatchNorm)]
    optimizer.exclude(weight for norm in norms for weight in norm.trainable_weights)
    if recipe.backbone_lr_factor != 1:
        backbone = [layer for layer in model.layers if in_backbone(layer)]
        optimizer.scale_learning_rate(
            (weight for layer in backbone for weight in layer.trainable_weights), recipe.backbone_lr_factor
        )
    optimizer.build(model.trainable_variables)
    return optimizer


def balancing_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Factors that make all classes count the same, with mean 1 over the clips; float32 [classes].

    Args:
        labels: class of each training video, integers.
        classes: how many; one without a video gets 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = int(np.count_nonzero(counts))
    weights = np.divide(len(labels), counts * present, out=np.zeros(classes), where=counts > 0)
    return weights.astype(np.float32)
