"""Our networks with random weights, which are the same on each of Keras' backends. Imports no TensorFlow by itself."""

import math

import keras
import numpy as np
from command import CLASSES

import x3d_tf
from x3d_tf.modeling.layers import GhostBatchNorm

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def network(name: str, *, precision: str = "float32", options: x3d_tf.ModelOptions | None = None) -> x3d_tf.X3D:
    """Returns a network with random weights, batch norms and classifier.

    Args:
        name: name of the X3D variant.
        precision: key of `POLICIES`.
        options: what the factors do not determine. Defaults to `ModelOptions()`.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[precision])
    try:
        model = x3d_tf.build_x3d(name, num_classes=CLASSES, options=options)
    finally:
        keras.config.set_dtype_policy(before)
    set_random_weights(model)
    return model


def set_random_weights(model: x3d_tf.X3D) -> None:
    """Draws all weights with NumPy. Kernels have the variance of the package's initializers."""
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if not layer.trainable_weights:
            continue
        shape, *biases = [tuple(weight.shape) for weight in layer.trainable_weights]
        if isinstance(layer, GhostBatchNorm):
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
        else:
            layer.set_weights([draw.normal(0, _deviation(shape), shape), *map(np.zeros, biases)])
    model.get_layer("fc2").kernel.assign(draw.normal(0, 0.3, model.get_layer("fc2").kernel.shape))


def _deviation(shape: tuple[int, ...]) -> float:
    """Returns the standard deviation of He normal over fan-out for a kernel (..., channels out)."""
    positions = math.prod(shape[:3]) if len(shape) > 3 else 1
    return math.sqrt(2 / (shape[-1] * positions))
