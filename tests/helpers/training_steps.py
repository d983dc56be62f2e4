"""A small network, and training steps of it on batches in memory."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import x3d_tf
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.losses import SoftmaxLoss
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.training.step import TrainStep, precision_scope

TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
CLASSES = 3


def config_of(
    recipe: dict[str, Any] | None = None, group: int = 4, dropout: float = 0.0, **changes: Any
) -> TrainConfig:
    plain: dict[str, Any] = {
        "batch": 8,
        "reference_batch": 8,
        "learning_rate": 0.05,
        "steps": 100,
        "warmup_fraction": 0,
    }
    fields: dict[str, Any] = {
        "expansion": TINY,
        "model": x3d_tf.ModelOptions(dropout=dropout, bn_group=group),
        "dataset": DatasetSpec(records="unused"),
        "recipe": Recipe(**(plain | (recipe or {}))),
    }
    return TrainConfig(**(fields | changes))


def make(
    config: TrainConfig,
    *,
    activation: Any = "softmax",
    strategy: tf.distribute.Strategy | None = None,
    loss: Any = None,
) -> tuple[x3d_tf.X3D, TrainStep]:
    keras.utils.set_random_seed(0)
    with precision_scope(config.execution.precision):
        model = x3d_tf.X3D(config.expansion, CLASSES, config.model, activation=activation)
    for layer in model.layers:  # a new residual block is the identity, which would hide most of the network
        if isinstance(layer, GhostBatchNorm):
            layer.gamma.assign(np.ones(layer.gamma.shape))
    loss = loss or SoftmaxLoss(config.recipe.batch)
    return model, TrainStep(model, config, strategy or tf.distribute.get_strategy(), loss)


def dataset(part: int = 8, labels: Any = None) -> tf.data.Dataset:
    """Repeats the same 24 clips in batches of the given size."""
    random = np.random.default_rng(0)
    clips = random.integers(0, 256, (24, 2, 32, 32, 3)).astype("float32")
    labels = random.integers(0, CLASSES, 24).astype("int32") if labels is None else labels
    return tf.data.Dataset.from_tensor_slices((clips, labels)).repeat().batch(part, drop_remainder=True)


def batches(part: int = 8, labels: Any = None) -> Iterator[tuple[Any, Any]]:
    return iter(dataset(part, labels))


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], bound: float = 1e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1, np.abs(b).max()))
