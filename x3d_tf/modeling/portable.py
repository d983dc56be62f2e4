"""The portable form of a network, built from stock Keras layers: its file loads in Keras without this package.

It has the same graph and layer names as the trainable network, a fixed clip size, and probabilities as its output. A
channel-wise 3-D kernel becomes depthwise 2-D kernels, `NAME_0`, `NAME_1` and so on, one per temporal tap.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import NORM_EPSILON, require_window
from x3d_tf.modeling.keras_parts import ClipParts
from x3d_tf.modeling.layers import ChannelwiseConv3D
from x3d_tf.modeling.metadata import Metadata, class_names_or_numbers
from x3d_tf.modeling.x3d import Network, require_classifier


def portable(model: Network, class_names: Sequence[str] | None = None, *, size: int | None = None) -> keras.Model:
    """Converts a trained network to its portable form, for inference in applications.

    Args:
        model: the trainable network, with its classifier, or a detector.
        class_names: class names, one per output. Defaults to numbers, with a warning.
        size: side of the clip in pixels. Defaults to the training crop, or for a detector to the short side of the
            frame, 128γs.

    Returns:
        A model that maps clips (N, T, size, size, 3), RGB in 0..255, uint8 or float, to probabilities (N, num_classes).
        For a detector, it maps {"clip": clips, "boxes": (N, B, 4)} of any B to scores (N, B, num_classes).
        `x3d_tf.save` writes it with its class names; Keras' own `save` omits them.

    Raises:
        ValueError: the network has no classifier, the number of names differs from the number of outputs, or `size` is
            smaller than the windows of the head's pooling.
    """
    require_classifier(model)
    names, size = class_names_or_numbers(class_names, model.num_classes), size or model.eval_size
    require(len(names) == model.num_classes, "class_names", f"have {model.num_classes} entries", len(names))
    app = build_portable(model, size)
    for source, targets in _matching_layers(model, app):
        arrays = _split_by_tap(source, len(targets))
        for target, weights in zip(targets, arrays):
            target.set_weights([w.reshape(t.shape) for w, t in zip(weights, target.weights)])
    # An attribute, because a subclass of keras.Model could not be loaded without this package.
    app.metadata = Metadata.from_model(  # type: ignore[attr-defined]
        model, class_names=names, form="portable", size=size
    )
    return app


def build_portable(model: Network, size: int) -> keras.Model:
    """Builds the portable form with randomly initialized weights."""
    require_window(model.options, size, model.clip.size)
    return model.with_parts(keras.Input((model.clip.frames, size, size, 3), name="clip"), PortableParts())


def copy_portable_weights(model: Network, app: keras.Model) -> None:
    """Copies the weights of the portable form into the trainable network."""
    for target, sources in _matching_layers(model, app):
        arrays = [source.get_weights() for source in sources]
        joined = [np.stack(taps) if len(sources) > 1 else taps[0] for taps in zip(*arrays)]
        target.set_weights([w.reshape(t.shape) for w, t in zip(joined, target.weights)])


def _matching_layers(model: Network, app: keras.Model) -> Iterator[tuple[keras.Layer, list[keras.Layer]]]:
    """Yields each trainable layer that has weights, with the layers that hold them in the portable form."""
    for layer in model.layers:
        if isinstance(layer, ChannelwiseConv3D) and layer.kernel_size[1:] != (1, 1):
            yield layer, [app.get_layer(f"{layer.name}_{tap}") for tap in range(layer.kernel_size[0])]
        elif layer.weights and not isinstance(layer, layers.Dropout | layers.Normalization):
            yield layer, [app.get_layer(layer.name)]


def _split_by_tap(layer: keras.Layer, count: int) -> list[list[np.ndarray]]:
    weights = layer.get_weights()
    return [weights] if count == 1 else [[tap] for tap in weights[0]]


class PortableParts(ClipParts):
    """Creates stock Keras layers, for static sizes and any batch size; see `parts.Parts`."""

    def pointwise(self, x: Any, filters: int, name: str, stride: int = 1) -> Any:
        if stride == 1:
            return layers.Dense(filters, use_bias=False, name=name)(x)
        conv = layers.Conv2D(filters, 1, strides=stride, use_bias=False, name=name)
        return _split_frames(conv(_merge_frames(x)), x.shape[1])

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        if kernel[0] > 1:
            return layers.Conv3D(filters, kernel, padding="same", use_bias=False, name=name)(x)
        frames = layers.ZeroPadding2D((kernel[1] // 2, kernel[2] // 2), name=f"{name}_pad")(_merge_frames(x))
        y = layers.Conv2D(filters, kernel[1:], strides=stride, use_bias=False, name=name)(frames)
        return _split_frames(y, x.shape[1])

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        _, t, h, w, c = x.shape
        if kernel[1:] == (1, 1):
            y = ops.reshape(x, (-1, t, h * w, c))
            y = layers.DepthwiseConv2D((kernel[0], 1), padding="same", use_bias=False, name=name)(y)
            return ops.reshape(y, (-1, t, h, w, c))
        frames, padding = _merge_frames(x), "same"
        if stride > 1:  # "same" would pad even sizes on one side only
            frames = layers.ZeroPadding2D((kernel[1] // 2, kernel[2] // 2), name=f"{name}_pad")(frames)
            padding = "valid"
        terms = []
        for tap in range(kernel[0]):
            y = layers.DepthwiseConv2D(
                kernel[1:], strides=stride, padding=padding, use_bias=False, name=f"{name}_{tap}"
            )(frames)
            _, h, w, c = y.shape
            terms.append(_shift_frames(ops.reshape(y, (-1, t, h * w * c)), kernel[0] // 2 - tap, f"{name}_{tap}"))
        return ops.reshape(layers.Add(name=f"{name}_sum")(terms), (-1, t, h, w, c))

    def difference(self, x: Any, name: str) -> Any:
        _, t, *shape = x.shape
        rows = ops.reshape(x, (-1, t, math.prod(shape)))
        later = layers.Cropping1D((1, 0), name=f"{name}_later")(rows)
        earlier = layers.Cropping1D((0, 1), name=f"{name}_earlier")(rows)
        return ops.reshape(layers.Subtract(name=name)([later, earlier]), (-1, t - 1, *shape))

    def norm(self, x: Any, name: str, *, ends_branch: bool = False) -> Any:
        gamma = "zeros" if ends_branch else "ones"
        return layers.BatchNormalization(momentum=0.9, epsilon=NORM_EPSILON, gamma_initializer=gamma, name=name)(x)


def _merge_frames(x: Any) -> Any:
    """Reshapes (N, T, H, W, C) to (N T, H, W, C)."""
    return ops.reshape(x, (-1, *x.shape[2:]))


def _split_frames(x: Any, frames: int) -> Any:
    """Reshapes (N T, H, W, C) to (N, T, H, W, C)."""
    return ops.reshape(x, (-1, frames, *x.shape[1:]))


def _shift_frames(x: Any, shift: int, name: str) -> Any:
    """Shifts rows (N, T, ...) forward in time by `shift` frames and pads with zeros."""
    distance, frames = abs(shift), x.shape[1]
    if distance == 0:
        return x
    if distance >= frames:
        return ops.zeros_like(x)
    crop, pad = ((0, distance), (distance, 0)) if shift > 0 else ((distance, 0), (0, distance))
    return layers.ZeroPadding1D(pad, name=f"{name}_in")(layers.Cropping1D(crop, name=f"{name}_out")(x))
