"""The inference form of a network, from stock Keras layers for exports, or from operations for predictions.

It has the graph of the trainable network, a fixed clip size, and probabilities as its output. Three optimizations make
it faster and change no probability by more than 1e-5:

- Each batch norm is folded into the convolution before it, by scaling the kernel and adding a bias.
- The normalization of the pixels by mean and standard deviation is folded into the first convolution.
- Between the clip and the head all tensors are 4-D, (T N, H, W, C): the first frames of all clips, then the second
  ones, and so on. Backends can then fuse convolution, bias and ReLU, and a shift in time is a slice of complete rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import NORM_EPSILON, ModelOptions, pool_window, require_window
from x3d_tf.modeling.graph import norm_of, probabilities_graph
from x3d_tf.modeling.keras_parts import MEAN, STD, KerasParts
from x3d_tf.modeling.metadata import Metadata
from x3d_tf.modeling.parts import Function
from x3d_tf.modeling.x3d import Network, require_classifier


def fold(model: Network, *, size: int | None = None, batch: int | None = None) -> keras.Model:
    """Converts a trained network to its inference form.

    Args:
        model: the trainable network, with its classifier, or a detector.
        size: side of the clip in pixels. Defaults to the training crop, or for a detector to the short side of the
            frame, 128γs.
        batch: fixed batch size. Defaults to any batch size.

    Returns:
        A model that maps clips (batch, T, size, size, 3), RGB in 0..255, uint8 or float, to probabilities (batch,
        num_classes), float32. For a detector, it maps {"clip": clips, "boxes": (batch, B, 4)} of any B to scores
        (batch, B, num_classes). The model cannot be trained, because its batch norms are folded.

    Raises:
        ValueError: the model is not a trainable network or has no classifier, `batch` is below 1, or `size` is smaller
            than the windows of the head's pooling.
    """
    require_classifier(model)
    require_batch(batch)
    size, options = size_and_options(model, size)
    clip = keras.Input((model.clip.frames, size, size, 3), batch_size=batch, name="clip")
    weights = FoldedWeights.of(model)
    app = model.with_parts(clip, FoldedParts(weights, model.clip.frames, batch), options)
    for layer in app.layers:
        if isinstance(layer, layers.Dense):  # squeeze-excitation and head; the parts set the others
            layer.set_weights(weights[layer.name][: len(layer.weights)])
    return app


def folded_function(
    weights: "FoldedWeights", metadata: Metadata, size: int, batch: int | None = None
) -> Callable[[Any], Any]:
    """Returns a classifier as a function for tensors of Keras' backend; it has the operations of `fold`, but no layers.

    Args:
        weights: weights of the network.
        metadata: metadata of the network.
        size: side of the clip in pixels.
        batch: fixed batch size. Defaults to any batch size.

    Returns:
        The function from clips (batch, T, size, size, 3), RGB in 0..255, float32, to probabilities (batch,
        num_classes), float32. To be compiled by the backend.

    Raises:
        UserError: `size` is smaller than the windows of the head's pooling.
    """
    expansion = metadata.expansion
    options = options_for(metadata.options, size, expansion.clip.size)

    def probabilities(clips: Any) -> Any:
        parts = FoldedOperations(weights, expansion.clip.frames, batch)
        return probabilities_graph(
            clips, expansion, options, parts, num_classes=metadata.num_classes, activation=metadata.activation
        )

    return probabilities


def require_batch(batch: int | None) -> None:
    """Raises `UserError` unless the batch size is at least 1, or None."""
    require(batch is None or batch >= 1, "batch", "be at least 1", batch)


def size_and_options(model: Network, size: int | None) -> tuple[int, ModelOptions]:
    """Returns the side of an inference form's clip, see `fold`, and the options of its network, see `options_for`."""
    size = size or model.eval_size
    return size, options_for(model.options, size, model.clip.size)


def options_for(options: ModelOptions, size: int, train_size: int) -> ModelOptions:
    """Returns the options of an inference form for clips of `size` pixels, given those of the network.

    Clips that are no larger than the training crop have one window, for which all poolings of the head agree: the
    options then state the simplest.

    Raises:
        UserError: `size` is smaller than the windows of the head's pooling.
    """
    require_window(options, size, train_size)
    if pool_window(size) == pool_window(train_size):
        options = dataclasses.replace(options, head_pool="global")
    return options


class FoldedWeights:
    """Kernel and bias, in double precision, of each convolution and dense layer of a network, by layer name.

    The batch norm after a convolution is folded into it, and the normalization of the pixels into conv1_xy. Layers
    without bias get zeros.

    Args:
        layers: the arrays of each layer, by layer name, in the order of `Layer.get_weights`.
        options: options of the network.
    """

    def __init__(self, layers: Mapping[str, Sequence[np.ndarray]], options: ModelOptions) -> None:
        self._layers = layers
        self._zero_pixel = 0.0 if options.input == "difference" else MEAN

    @classmethod
    def of(cls, model: Network) -> "FoldedWeights":
        """Returns the weights of a network."""
        return cls({layer.name: layer.get_weights() for layer in model.layers}, model.options)

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns kernel (..., inputs, outputs) and bias (outputs,) of a layer.

        Raises:
            UserError: the layer is missing, or its arrays have other shapes than each other.
        """
        kernel, *rest = self._arrays(name)
        outputs = kernel.shape[-1:]
        bias = rest[0] if rest else np.zeros(outputs)
        norm = norm_of(name)
        if norm in self._layers:
            gamma, beta, mean, variance = self._arrays(norm)
            for array in (gamma, beta, mean, variance):
                require(array.shape == outputs, norm, f"have arrays of shape {outputs}", array.shape)
            with np.errstate(all="ignore"):  # predictions report values that are not finite
                scale = gamma / np.sqrt(variance + NORM_EPSILON)
                kernel, bias = kernel * scale, beta - mean * scale
        require(bias.shape == outputs, name, f"have a bias of shape {outputs}", bias.shape)
        if name == "conv1_xy":
            kernel = kernel / STD
            bias = bias - self._zero_pixel * kernel.sum(tuple(range(kernel.ndim - 1)))
        return kernel, bias

    def _arrays(self, name: str) -> list[np.ndarray]:
        require(name in self._layers and len(self._layers[name]) > 0, f"layer {name}", "have weights")
        return [np.asarray(array, np.float64) for array in self._layers[name]]

    def padding(self, name: str) -> float:
        """Returns the value that a convolution pads with: that of its input that is zero in the trainable network."""
        return self._zero_pixel if name == "conv1_xy" else 0.0


class FoldedParts(KerasParts):
    """Creates stock Keras layers with folded weights, for feature maps (T N, H, W, C); see `parts.Parts`.

    Args:
        weights: kernels and biases of the layers.
        frames: number of frames of the clips, T.
        batch: batch size N; None for any.
    """

    def __init__(self, weights: FoldedWeights, frames: int, batch: int | None) -> None:
        self.weights, self.frames, self.batch = weights, frames, batch

    def normalize(self, x: Any, name: str) -> Any:
        return _to_time_major(x)  # the normalization is folded into the first convolution

    def difference(self, x: Any, name: str) -> Any:
        rows = self._to_rows(x)
        self.frames -= 1
        return self._to_images(layers.Subtract(name=name)([rows[1:, :], rows[:-1, :]]), x)

    def pointwise(self, x: Any, filters: int, name: str, stride: int = 1) -> Any:
        kernel, bias = self.weights[name]
        return self._conv(x, kernel[None, None], bias, name, stride)

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        weights, bias = self.weights[name]
        if kernel[0] > 1:
            y = self._conv(self._to_time_rows(x), weights[:, :, 0], bias, name, padding="same")
            return self._to_images(y, x, filters)
        x = _pad(x, kernel[1:], self.weights.padding(name))
        return self._conv(x, weights[0], bias, name, stride)

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        weights, bias = self.weights[name]
        if kernel[1:] == (1, 1):
            y = self._depthwise_conv(self._to_time_rows(x), weights[:, :, 0], bias, name, padding="same")
            return self._to_images(y, x)
        frames, padding = (x, "same") if stride == 1 else (_pad(x, kernel[1:], 0.0), "valid")
        terms = []
        for tap in range(kernel[0]):
            shift = kernel[0] // 2 - tap
            if abs(shift) >= self.frames:
                continue  # this tap sees only padding
            y = self._depthwise_conv(
                frames, weights[tap], bias if shift == 0 else None, f"{name}_{tap}", stride, padding
            )
            terms.append(self._shift_frames(y, shift))
        return self._sum(terms, f"{name}_sum")

    def norm(self, x: Any, name: str, *, ends_branch: bool = False) -> Any:
        return x  # folded into the convolution before it

    def mean(self, x: Any, name: str) -> Any:
        frames = layers.GlobalAveragePooling2D(name=name)(x)
        return ops.mean(ops.reshape(frames, (self.frames, self._batch_times(), x.shape[-1])), axis=0)

    def scale(self, x: Any, factors: Any, name: str) -> Any:
        _, h, w, c = x.shape
        if self.batch == 1:
            return ops.multiply(x, ops.reshape(factors, (1, 1, 1, c)))
        rows = ops.reshape(x, (self.frames, self._batch_times(), h * w, c))
        factors = ops.reshape(factors, (1, self._batch_times(), 1, c))
        return self._to_images(ops.multiply(rows, factors), x)

    def head_input(self, x: Any) -> Any:
        return super().head_input(self._to_clips(x))

    def _to_clips(self, x: Any) -> Any:
        """Reorders (T N, H, W, C) to (N, T, H, W, C)."""
        x = ops.reshape(x, (self.frames, self._batch_times(), *x.shape[1:]))
        return ops.transpose(x, (1, 0, 2, 3, 4))

    def _conv(
        self, x: Any, kernel: np.ndarray, bias: np.ndarray, name: str, stride: int = 1, padding: str = "valid"
    ) -> Any:
        """Applies a 2-D convolution with kernel (rows, columns, inputs, filters)."""
        layer = layers.Conv2D(kernel.shape[-1], kernel.shape[:2], strides=stride, padding=padding, name=name)
        return _apply_with_weights(layer, x, kernel, bias)

    def _depthwise_conv(
        self, x: Any, kernel: np.ndarray, bias: np.ndarray | None, name: str, stride: int = 1, padding: str = "valid"
    ) -> Any:
        """Applies a depthwise 2-D convolution with kernel (rows, columns, channels)."""
        has_bias = bias is not None
        layer = layers.DepthwiseConv2D(kernel.shape[:2], strides=stride, padding=padding, use_bias=has_bias, name=name)
        return _apply_with_weights(layer, x, kernel[..., None], bias)

    def _sum(self, terms: list[Any], name: str) -> Any:
        return layers.Add(name=name)(terms) if len(terms) > 1 else terms[0]

    def _to_rows(self, x: Any) -> Any:
        """Reshapes (T N, H, W, C) to (T, N H W C)."""
        return ops.reshape(x, (self.frames, self._batch_times(*x.shape[1:])))

    def _to_time_rows(self, x: Any) -> Any:
        """Reshapes (T N, H, W, C) to (1, T, N H W, C), an image with one row per frame."""
        _, h, w, c = x.shape
        return ops.reshape(x, (1, self.frames, self._batch_times(h, w), c))

    def _to_images(self, x: Any, like: Any, channels: int | None = None) -> Any:
        """Reshapes to (T N, H, W, C), with the height and width of the tensor `like`."""
        _, h, w, c = like.shape
        return ops.reshape(x, (self._batch_times(self.frames), h, w, channels or c))

    def _batch_times(self, *sizes: int) -> int:
        """Returns N times the product of the sizes, or -1 for any batch size."""
        return math.prod(sizes) * self.batch if self.batch else -1

    def _shift_frames(self, x: Any, shift: int) -> Any:
        """Shifts the tensor forward in time by `shift` frames and pads with zeros."""
        if shift == 0:
            return x
        rows = self._to_rows(x)
        if shift > 0:
            return self._to_images(ops.pad(rows[:-shift, :], ((shift, 0), (0, 0))), x)
        return self._to_images(ops.pad(rows[-shift:, :], ((0, -shift), (0, 0))), x)


class FoldedOperations(FoldedParts):
    """Computes with the folded weights, for tensors of Keras' backend: builds no Keras layers, which takes seconds."""

    def activation(self, x: Any, function: Function, name: str) -> Any:
        return getattr(ops, function)(x)

    def add(self, x: Any, y: Any, name: str) -> Any:
        return ops.add(x, y)

    def mean(self, x: Any, name: str) -> Any:
        frames = ops.mean(x, axis=(1, 2))
        return ops.mean(ops.reshape(frames, (self.frames, self._batch_times(), x.shape[-1])), axis=0)

    def difference(self, x: Any, name: str) -> Any:
        rows = self._to_rows(x)
        self.frames -= 1
        return self._to_images(ops.subtract(rows[1:, :], rows[:-1, :]), x)

    def head_input(self, x: Any) -> Any:
        return self._to_clips(x)

    def global_pool(self, x: Any, name: str) -> Any:
        return ops.mean(x, axis=(1, 2, 3))

    def window_pool(self, x: Any, window: int, name: str) -> Any:
        return ops.average_pool(x, window, strides=1, padding="valid")

    def excitation(self, x: Any, units: int, function: Function, name: str) -> Any:
        return self.dense(x, units, name, function=function)

    def dense(self, x: Any, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Any:
        kernel, offset = map(_single, self.weights[name])
        y = ops.matmul(x, kernel)
        y = ops.add(y, offset) if bias else y
        return self.activation(y, function, name) if function else y

    def probabilities(self, x: Any, function: Function, name: str) -> Any:
        return self.activation(x, function, name)

    def _conv(
        self, x: Any, kernel: np.ndarray, bias: np.ndarray, name: str, stride: int = 1, padding: str = "valid"
    ) -> Any:
        return ops.add(ops.conv(x, _single(kernel), stride, padding), _single(bias))

    def _depthwise_conv(
        self, x: Any, kernel: np.ndarray, bias: np.ndarray | None, name: str, stride: int = 1, padding: str = "valid"
    ) -> Any:
        y = ops.depthwise_conv(x, _single(kernel[..., None]), stride, padding)
        return y if bias is None else ops.add(y, _single(bias))

    def _sum(self, terms: list[Any], name: str) -> Any:
        return functools.reduce(ops.add, terms)


def _single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _to_time_major(clips: Any) -> Any:
    """Reorders (N, T, H, W, C) to (T N, H, W, C)."""
    n, t, *image = clips.shape
    return ops.reshape(clips if n == 1 else ops.transpose(clips, (1, 0, 2, 3, 4)), (n * t if n else -1, *image))


def _pad(x: Any, kernel: tuple[int, ...], value: float) -> Any:
    """Pads rows and columns by half the kernel on both sides, as in PyTorch; Keras' "same" differs at stride 2."""
    return ops.pad(x, ((0, 0), *((size // 2, size // 2) for size in kernel), (0, 0)), constant_values=value)


def _apply_with_weights(layer: keras.Layer, x: Any, kernel: np.ndarray, bias: np.ndarray | None) -> Any:
    """Applies a new layer to `x`, then sets its weights."""
    y = layer(x)
    layer.set_weights([kernel] if bias is None else [kernel, bias])
    return y
