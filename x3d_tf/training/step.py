"""One training step on all devices: forward pass, loss, gradients, update."""

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
from x3d_tf.training.schedule import build_schedule

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


@contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Sets the precision of the layers created in the block: "float32", "bfloat16" or "float16"."""
    before = keras.config.dtype_policy()
    if precision != "float32":  # the default keeps the caller's own policy, such as float64
        keras.config.set_dtype_policy(_POLICIES[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


class TrainStep:
    """The training step of a run, with its optimiser, EMA and loss scale. Create it in the strategy's scope.

    Args:
        model: the network, built in the precision of the configuration.
        config: the configuration of the run.
        strategy: the distribution strategy.
        class_weights: loss factor of each class, float32 [classes], for single-label tasks only.
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
        self._micro_batches = execution.accumulation
        self._loss = Loss(model.task, recipe.batch, self._micro_batches, class_weights)
        self._gradient_sums: list[tf.Variable] = []
        if self._micro_batches > 1 or self._scale is not None:
            # one sum per replica; the optimiser adds them up
            per_replica: dict[str, Any] = {"synchronization": tf.VariableSynchronization.ON_READ, "trainable": False}
            per_replica["aggregation"] = tf.VariableAggregation.SUM
            zeros = (tf.zeros(variable.shape, variable.dtype) for variable in model.trainable_variables)
            self._gradient_sums = [tf.Variable(zero, **per_replica) for zero in zeros]
        self._run_steps = tf.function(self._single_step if execution.steps_per_execution == 1 else self._step_loop)

    @property
    def variables(self) -> dict[str, list[Any]]:
        """The variables to save besides the network's, by role: optimiser, EMA and loss scale."""
        roles = {"optimizer": [variable.value for variable in self.optimizer.variables]}
        if self.average is not None:
            roles["average"] = self.average.variables
        if self._scale is not None:
            roles["loss_scale"] = self._scale.variables
        return roles

    @property
    def completed_steps(self) -> int:
        """Number of steps taken since the start of the run."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def __call__(self, batches: Any, steps: int) -> dict[str, Any]:
        """Takes one or several training steps.

        Args:
            batches: iterator of the strategy over (clips, labels), or ({"clip": clips, "boxes": boxes}, labels) for a
                detector. Each element is one micro-batch.
            steps: number of steps to take; must be 1 if `Execution.steps_per_execution` is 1.

        Returns:
            "loss" and "accuracy" of each step, float32 [steps]. The accuracy is the share of clips, or of boxes, whose
            top-scoring class is among their labels. For a detector also "boxes_left_out", the number of boxes outside
            their crops.
        """
        return self._run_steps(batches, tf.constant(steps))

    def trace(self, batches: Any) -> None:
        """Traces the step into a graph ahead of the first call, without taking a step. Takes the same `batches`."""
        self._run_steps.get_concrete_function(batches, tf.constant(1))

    def _step_loop(self, batches: Any, steps: Any) -> dict[str, Any]:
        rows = tf.TensorArray(tf.float32, steps)
        for index in tf.range(steps):
            rows = rows.write(index, self._train_step(batches))
        return self._by_name(rows.stack())

    def _single_step(self, batches: Any, steps: Any) -> dict[str, Any]:
        return self._by_name(self._train_step(batches)[None])

    def _by_name(self, rows: Any) -> dict[str, Any]:
        """Splits the metrics of several steps, [steps, metrics], into one tensor per metric."""
        names = self._loss.metric_names
        return dict(zip(names, tf.unstack(rows, num=len(names), axis=1)))

    def _train_step(self, batches: Any) -> Any:
        """Takes one step and returns its metrics, float32 [metrics]."""
        if self._gradient_sums:
            metrics = self._accumulation_step(batches)
        else:
            metrics = self._run_on_replicas(self._replica_step, next(batches))
        if self.average is not None:
            self.average.update(self._strategy, self.optimizer.iterations.value)
        return metrics

    def _accumulation_step(self, batches: Any) -> Any:
        """Takes one step with summed gradients: for micro-batches, and to detect float16 overflow before the update."""
        self._strategy.run(self._clear_gradients)
        metrics = tf.zeros(len(self._loss.metric_names))
        for _ in tf.range(self._micro_batches):
            metrics += self._run_on_replicas(self._add_gradients, next(batches))
        if self._scale is None:
            self._strategy.run(self._apply_gradients)
        else:
            overflows = self._strategy.reduce(tf.distribute.ReduceOp.SUM, self._strategy.run(self._has_overflow), None)
            if overflows > 0:
                self.optimizer.iterations.assign_add(1)  # a skipped update still counts as a step
            else:
                self._strategy.run(self._apply_gradients)
            self._scale.update(overflows > 0)
        return metrics

    def _run_on_replicas(self, function: Any, batch: Any) -> Any:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, self._strategy.run(function, args=batch), axis=None)

    # The methods below run in replica context.

    def _replica_step(self, inputs: Any, labels: Any) -> Any:
        metrics, gradients = self._gradients(inputs, labels)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return metrics

    def _clear_gradients(self) -> None:
        for total in self._gradient_sums:
            total.assign(tf.zeros_like(total))

    def _add_gradients(self, inputs: Any, labels: Any) -> Any:
        metrics, gradients = self._gradients(inputs, labels)
        for total, gradient in zip(self._gradient_sums, gradients):
            total.assign_add(gradient)
        return metrics

    def _apply_gradients(self) -> None:
        factor = 1.0 if self._scale is None else 1.0 / self._scale.value
        gradients = [total.read_value() * factor for total in self._gradient_sums]
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def _has_overflow(self) -> Any:
        finite = [tf.reduce_all(tf.math.is_finite(total.read_value())) for total in self._gradient_sums]
        return 1.0 - tf.cast(tf.reduce_all(finite), tf.float32)

    def _gradients(self, inputs: Any, labels: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            metrics = self._loss(self._forward(inputs), labels, inputs)
            loss = metrics[0]
            scaled = loss if self._scale is None else loss * self._scale.value
        gradients = tape.gradient(scaled, self.model.trainable_variables)  # the optimiser sums over replicas
        return tf.stack([tf.cast(metric, tf.float32) for metric in metrics]), gradients


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


def freeze(model: Network, recipe: Recipe) -> None:
    """Marks the layers that the recipe freezes as not trainable: the backbone, or batch norm."""
    for layer in model.layers:
        frozen_norm = recipe.frozen_norms and isinstance(layer, GhostBatchNorm)
        if frozen_norm or (recipe.backbone_lr_factor == 0 and in_backbone(layer)):
            layer.trainable = False


def in_backbone(layer: keras.Layer) -> bool:
    """Returns True for layers before fc1, those of a network built with `include_top=False`."""
    return layer.name not in ("fc1", "fc2")


def _optimizer(model: Network, recipe: Recipe) -> SGD:
    optimizer = SGD(build_schedule(recipe), recipe.momentum, l2=recipe.weight_decay)
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
    """Returns loss factors that give all classes equal weight, with mean 1 over the clips; float32 [classes].

    Args:
        labels: the class of each training video, integers.
        classes: number of classes. A class without videos gets the factor 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = int(np.count_nonzero(counts))
    weights = np.divide(len(labels), counts * present, out=np.zeros(classes), where=counts > 0)
    return weights.astype(np.float32)
