"""Single layers in TensorFlow: ours, their `keras.ops` implementation, and Keras' own."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from measuring import Case
from tensorflow_networks import limit_threads

import x3d_tf
from x3d_tf.modeling import layers


def _build_layer(layer: Any, implementation: str) -> keras.Layer:
    """Creates the Keras layer for an implementation: "ours", "ops" or "keras"."""
    if layer.kind == "norm":
        if implementation == "keras":
            return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
        return layers.GhostBatchNorm()
    if implementation == "keras":
        groups = layer.filters if layer.kind == "channelwise" else 1
        strides = (1, layer.stride, layer.stride)
        return keras.Sequential(
            [
                keras.layers.ZeroPadding3D([size // 2 for size in layer.kernel]),
                keras.layers.Conv3D(layer.filters, layer.kernel, strides=strides, groups=groups, use_bias=False),
            ]
        )
    if layer.kind == "pointwise":
        return layers.PointwiseConv3D(layer.filters, layer.stride)
    return layers.ChannelwiseConv3D(layer.kernel, layer.stride)


def make(case: Case, implementation: str) -> Callable[[], None]:
    """Returns the call of a layer: the forward pass, with the gradients of input and weights if the case asks for them.

    Args:
        case: computation to perform; its layer is a `layers.Layer`.
        implementation: "ours", "ops" or "keras".
    """
    limit_threads(case.threads)
    keras.utils.set_random_seed(0)
    x3d_tf.set_kernels("ops" if implementation == "ops" else "auto")  # affects the tracing below
    layer = _build_layer(case.layer, implementation)
    x = tf.random.normal((case.batch, *case.layer.shape), seed=0)
    layer.build(x.shape)
    training = {"training": True} if case.layer.kind == "norm" else {}
    if not case.layer.gradients:
        forward = tf.function(lambda x: layer(x, **training)).get_concrete_function(x)
        return lambda: _wait(forward(x))
    upstream = tf.random.normal(layer.compute_output_shape(x.shape), seed=1)

    @tf.function
    def with_gradients(x: Any, upstream: Any) -> Any:
        weights = [variable.value for variable in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **training)
        return y, tape.gradient(y, [x, *weights], output_gradients=upstream)

    call = with_gradients.get_concrete_function(x, upstream)
    return lambda: _wait(call(x, upstream))


def _wait(outputs: Any) -> None:
    """Waits for the device, by accessing the memory of the outputs without copying it."""
    for tensor in tf.nest.flatten(outputs):
        tensor.numpy()
