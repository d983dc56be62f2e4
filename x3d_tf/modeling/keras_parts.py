"""Sets of parts made of Keras layers: what they share, and the trainable one. See `parts.Parts`."""

from typing import Any

import keras
from keras import layers, ops

from x3d_tf.modeling.layers import (
    ChannelwiseConv3D,
    Conv3D,
    Dropout,
    GhostBatchNorm,
    PointwiseConv3D,
    Regions,
    Swish,
    conv_initializer,
)
from x3d_tf.modeling.parts import Function
from x3d_tf.modeling.roi_align import regions

MEAN, STD = 0.45 * 255, 0.225 * 255  # for RGB in 0..255, one value for all channels (PySlowFast)


class KerasParts:
    """Parts that do not depend on the memory layout of the feature maps. They do not train."""

    def activation(self, x: Any, function: Function, name: str) -> Any:
        return layers.Activation(function, name=name)(x)

    def add(self, x: Any, y: Any, name: str) -> Any:
        return layers.Add(name=name)([x, y])

    def drop_branch(self, x: Any, rate: float, name: str) -> Any:
        return x

    def excitation(self, x: Any, units: int, function: Function, name: str) -> Any:
        return layers.Dense(units, function, kernel_initializer=conv_initializer(units), name=name)(x)

    def head_input(self, x: Any) -> Any:
        return x if x.dtype == full_precision() else ops.cast(x, full_precision())

    def global_pool(self, x: Any, name: str) -> Any:
        return layers.GlobalAveragePooling3D(name=name, dtype=full_precision())(x)

    def time_mean(self, x: Any) -> Any:
        return ops.mean(x, axis=1)

    def window_pool(self, x: Any, window: int, name: str) -> Any:
        return layers.AveragePooling2D(window, strides=1, name=name, dtype=full_precision())(x)

    def spatial_mean(self, x: Any) -> Any:
        return ops.mean(x, axis=(1, 2))

    def spatial_max(self, x: Any) -> Any:
        return ops.max(x, axis=(-3, -2))

    def regions(self, x: Any, boxes: Any, clips: Any, name: str) -> Any:
        return regions(x, boxes, clips.shape[2], clips.shape[3])

    def per_box(self, x: Any, boxes: Any) -> Any:
        return ops.add(ops.expand_dims(x, 1), ops.zeros_like(boxes[..., :1]))

    def dense(self, x: Any, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Any:
        is_hidden = function == "relu"
        initializer = conv_initializer(units) if is_hidden else keras.initializers.RandomNormal(stddev=0.01)
        return layers.Dense(
            units, function, use_bias=bias, kernel_initializer=initializer, name=name, dtype=full_precision()
        )(x)

    def dropout(self, x: Any, rate: float, name: str) -> Any:
        return x

    def mean_probability(self, x: Any, function: Function) -> Any:
        if function == "sigmoid":  # logit of the mean probability: log p - log(1 - p)
            return _log_mean(_log_sigmoid(x)) - _log_mean(_log_sigmoid(-x))
        return _log_mean(ops.log_softmax(x))

    def probabilities(self, x: Any, function: Function, name: str) -> Any:
        return layers.Activation(function, name=name, dtype="float32")(x)


class ClipParts(KerasParts):
    """Adds the parts that depend on the memory layout, for feature maps (N, T, H, W, C)."""

    def normalize(self, x: Any, name: str) -> Any:
        return layers.Normalization(axis=None, mean=MEAN, variance=STD**2, name=name)(x)

    def mean(self, x: Any, name: str) -> Any:
        return layers.GlobalAveragePooling3D(keepdims=True, name=name)(x)

    def scale(self, x: Any, factors: Any, name: str) -> Any:
        return layers.Multiply(name=name)([x, factors])


class TrainableParts(ClipParts):
    """Creates the layers of the trainable network, for any sizes.

    Args:
        bn_group: number of clips that share batch-norm statistics in training.
    """

    def __init__(self, bn_group: int) -> None:
        self.bn_group = bn_group

    def difference(self, x: Any, name: str) -> Any:
        neighbors = [
            layers.Cropping3D((frames, (0, 0), (0, 0)), "channels_last", name=f"{name}_{which}")(x)
            for which, frames in (("next", (1, 0)), ("this", (0, 1)))
        ]
        return layers.Subtract(name=name)(neighbors)

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        return Conv3D(filters, kernel, stride, name=name)(x)

    def pointwise(self, x: Any, filters: int, name: str, stride: int = 1) -> Any:
        return PointwiseConv3D(filters, stride, name=name)(x)

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        return ChannelwiseConv3D(kernel, stride, name=name)(x)

    def norm(self, x: Any, name: str, *, ends_branch: bool = False) -> Any:
        gamma = "zeros" if ends_branch else "ones"
        return GhostBatchNorm(self.bn_group, gamma_initializer=gamma, name=name)(x)

    def activation(self, x: Any, function: Function, name: str) -> Any:
        return Swish(name=name)(x) if function == "silu" else super().activation(x, function, name)

    def drop_branch(self, x: Any, rate: float, name: str) -> Any:
        return Dropout(rate, noise_shape=(None, 1, 1, 1, 1), name=name)(x) if rate else x

    def regions(self, x: Any, boxes: Any, clips: Any, name: str) -> Any:
        return Regions(name=name, dtype=x.dtype)([x, boxes, clips])

    def dropout(self, x: Any, rate: float, name: str) -> Any:
        return Dropout(rate, dtype=x.dtype, name=name)(x) if rate else x


def full_precision() -> str:
    """Returns the dtype of the weights, in which the head computes under mixed precision, too."""
    return str(keras.config.dtype_policy().variable_dtype)


def _log_mean(x: Any) -> Any:
    """Returns the logarithm of the mean over all positions, (N, C), given logarithms (N, H, W, C)."""
    peak = ops.max(x, axis=(1, 2), keepdims=True)  # subtracted so that no class underflows in all windows
    return ops.log(ops.mean(ops.exp(x - peak), axis=(1, 2))) + ops.squeeze(peak, axis=(1, 2))


def _log_sigmoid(x: Any) -> Any:
    """Computes log(sigmoid(x)) without overflow, from operations that all export formats support."""
    return ops.minimum(x, 0.0) - ops.log(1.0 + ops.exp(-ops.abs(x)))
