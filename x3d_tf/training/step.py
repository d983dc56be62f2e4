"""One training step on all devices: forward pass, loss, gradients, update."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.x3d import Network
from x3d_tf.tasks.base import Loss
from x3d_tf.training.ema import MovingAverage
from x3d_tf.training.forward import forward_of
from x3d_tf.training.optimizer import SGD
from x3d_tf.training.schedule import PlateauWithWarmup, Schedule, schedule_of
from x3d_tf.training.update import AccumulatedUpdate, LossScale, Update

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
    """The training step of a run, with its optimizer, EMA and loss scale. Create it in the strategy's scope.

    Args:
        model: the network, built in the precision of the configuration.
        config: the configuration of the run.
        strategy: the distribution strategy.
        loss: the loss and the metrics of the run's task.

    Attributes:
        schedule: the learning-rate schedule, a function of the number of steps taken before.
    """

    def __init__(self, model: Network, config: TrainConfig, strategy: tf.distribute.Strategy, loss: Loss) -> None:
        recipe, execution = config.recipe, config.execution
        self.model, self._strategy, self.loss = model, strategy, loss
        freeze(model, recipe)
        self._forward = forward_of(model, execution.recompute)
        self.schedule = schedule_of(config)
        self.optimizer = _optimizer(model, recipe, self.schedule)
        self.average = MovingAverage(model, recipe.ema) if recipe.ema else None
        self._update = _update(self.optimizer, model, execution)
        self._run_steps = tf.function(self._single_step if execution.steps_per_execution == 1 else self._step_loop)

    def train_step(self, inputs: Any, targets: Any) -> Any:
        """Processes a micro-batch on one device: forward pass, loss, gradients, update.

        Args:
            inputs: the input of the network.
            targets: the targets of the loss.

        Returns:
            This device's share of the loss and the metrics, float32 [metrics].
        """
        with tf.GradientTape() as tape:
            metrics = self.loss(self._forward(inputs), targets, inputs)
            loss = self._update.scaled(metrics["loss"])
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self._update.add(gradients)
        return tf.stack([tf.cast(metrics[name], tf.float32) for name in self._names])

    @property
    def variables(self) -> dict[str, list[Any]]:
        """The variables to save besides the network's, by role: optimizer, EMA, plateau and loss scale."""
        roles = {"optimizer": [variable.value for variable in self.optimizer.variables]}
        if self.average is not None:
            roles["average"] = self.average.variables
        if isinstance(self.schedule, PlateauWithWarmup):
            roles["plateau"] = self.schedule.variables
        return roles | self._update.state

    @property
    def completed_steps(self) -> int:
        """Number of steps taken since the start of the run."""
        return int(keras.ops.convert_to_numpy(self.optimizer.iterations))

    def __call__(self, batches: Any, steps: int) -> dict[str, Any]:
        """Takes one or several training steps.

        Args:
            batches: iterator of the strategy over (inputs of the network, targets of the loss). Each element is one
                micro-batch.
            steps: number of steps to take; must be 1 if `Execution.steps_per_execution` is 1.

        Returns:
            The loss and the metrics of each step by name, float32 [steps].
        """
        return self._run_steps(batches, tf.constant(steps))

    def trace(self, batches: Any) -> None:
        """Traces the step into a graph ahead of the first call, without taking a step. Takes the same `batches`."""
        self._run_steps.get_concrete_function(batches, tf.constant(1))

    @property
    def _names(self) -> tuple[str, ...]:
        return ("loss", *(metric.name for metric in self.loss.metrics))

    def _step_loop(self, batches: Any, steps: Any) -> dict[str, Any]:
        rows = tf.TensorArray(tf.float32, steps)
        for index in tf.range(steps):
            rows = rows.write(index, self._take_step(batches))
        return self._by_name(rows.stack())

    def _single_step(self, batches: Any, steps: Any) -> dict[str, Any]:
        return self._by_name(self._take_step(batches)[None])

    def _by_name(self, rows: Any) -> dict[str, Any]:
        """Splits the metrics of several steps, [steps, metrics], into one tensor per metric."""
        return dict(zip(self._names, tf.unstack(rows, num=len(self._names), axis=1)))

    def _take_step(self, batches: Any) -> Any:
        """Takes one step on all devices and returns its metrics, float32 [metrics]."""
        zeros = tf.zeros(len(self._names))
        metrics = self._update.step(self._strategy, self._on_all_devices, batches, zeros)
        if self.average is not None:
            self.average.update(self._strategy, self.optimizer.iterations.value)
        return metrics

    def _on_all_devices(self, batch: Any) -> Any:
        metrics = self._strategy.run(self.train_step, args=batch)
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, metrics, axis=None)


def freeze(model: Network, recipe: Recipe) -> None:
    """Marks the layers that the recipe freezes as not trainable: the backbone, or batch norm."""
    for layer in model.layers:
        frozen_norm = recipe.frozen_norms and isinstance(layer, GhostBatchNorm)
        if frozen_norm or (recipe.backbone_lr_factor == 0 and in_backbone(layer)):
            layer.trainable = False


def in_backbone(layer: keras.Layer) -> bool:
    """Returns True for layers before fc1, those of a network built with `include_top=False`."""
    return layer.name not in ("fc1", "fc2")


def _update(optimizer: SGD, model: Network, execution: Execution) -> Update:
    scale = LossScale() if execution.precision == "float16" else None
    if execution.accumulation == 1 and scale is None:
        return Update(optimizer, model)
    return AccumulatedUpdate(optimizer, model, execution.accumulation, scale)


def _optimizer(model: Network, recipe: Recipe, schedule: Schedule) -> SGD:
    optimizer = SGD(schedule, recipe.momentum, l2=recipe.weight_decay)
    norms = [layer for layer in model.layers if isinstance(layer, GhostBatchNorm)]
    optimizer.exclude(weight for norm in norms for weight in norm.trainable_weights)
    if recipe.backbone_lr_factor != 1:
        backbone = [layer for layer in model.layers if in_backbone(layer)]
        optimizer.scale_learning_rate(
            (weight for layer in backbone for weight in layer.trainable_weights), recipe.backbone_lr_factor
        )
    optimizer.build(model.trainable_variables)
    return optimizer
