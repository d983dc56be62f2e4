"""The network for inference alone, in stock Keras layers: the form that exporters start from.

The same graph as the trainable network, of a fixed clip size and with probabilities as its output. Three things make it
faster, and change no probability by more than 1e-5:

- Each batch norm is folded into the convolution before it, whose kernel is scaled and which gets a bias.
- The subtraction of the pixels' mean and the division by their deviation are folded into the first convolution.
- Between the clip and the head all tensors are 4-D, (T N, H, W, C): first frames of all clips, then the second ones.
  Convolution, bias and ReLU stand in a row, which backends fuse, and a shift in time is a slice of whole rows.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from x3d_tf.errors import require
from x3d_tf.modeling import detection
from x3d_tf.modeling.architecture import plan, pool_window, require_window
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.roi_align import regions
from x3d_tf.modeling.x3d import MEAN, STD, Network, graph


def deployed(model: Network, *, size: int | None = None, batch: int | None = None) -> keras.Model:
    """Makes the inference form of a trained network.

    Args:
        model: the trainable network, with its classifier, or a detector.
        size: side of the clip in pixels; the training crop, of a detector all of the frame's short side, 128γs, unless
            given.
        batch: clips of a call; any number unless given.

    Returns:
        A model from clips (batch, T, size, size, 3), RGB in 0..255, uint8 or float, to probabilities (batch,
        num_classes), float32; of a detector from {"clip": such clips, "boxes": (batch, B, 4)} of any B to scores
        (batch, B, num_classes). It cannot be trained: its weights are those of folded layers.

    Raises:
        ValueError: not a trainable network, one without classifier, a batch below 1, or a size that is smaller than the
            windows of the head's pooling.
    """
    trainable = isinstance(model, Network)
    rule = "be a trainable network, from build_x3d, build_detector or load"
    require(trainable, "the model", rule, type(model).__name__)
    require(
        model.include_top, "the network of a deployed model", "have its classifier (include_top)", model.include_top
    )
    require(batch is None or batch >= 1, "batch", "be at least 1", batch)
    size = size or model.eval_size
    require_window(model.options, size, model.clip.size)
    clip = keras.Input((model.clip.frames, size, size, 3), batch_size=batch, name="clip")
    options = model.options
    if pool_window(size) == pool_window(model.clip.size):  # one window, so that all ways of pooling agree
        options = dataclasses.replace(options, head_pool="global")
    architecture, parts = plan(model.expansion, options), DeployedParts(model, batch)
    if isinstance(model, Detector):
        boxes = keras.Input((None, 4), batch_size=batch, name="boxes")
        logits = detection.graph(
            _time_major(clip),
            boxes,
            architecture=architecture,
            parts=parts,
            head=model.head,
            num_classes=model.num_classes,
        )
        app = keras.Model({"clip": clip, "boxes": boxes}, detection.scores(logits), name=model.name)
    else:
        logits = graph(
            _time_major(clip),
            architecture,
            parts,
            train_size=model.clip.size,
            num_classes=model.num_classes,
            task=model.task,
        )
        function = {"single_label": "softmax", "multi_label": "sigmoid"}[model.task]
        probabilities = layers.Activation(function, name="probabilities", dtype="float32")(logits)
        app = keras.Model(clip, probabilities, name=model.name)
    for layer in app.layers:
        if isinstance(layer, layers.Dense):  # of squeeze-excitation and head; the parts fill their own
            layer.set_weights(model.get_layer(layer.name).get_weights())
    return app


class DeployedParts:
    """Stock layers with the methods of `x3d.TrainableParts`, for tensors (T N, H, W, C); they take their weights.

    Args:
        model: the trainable network.
        batch: N; any unless given.
    """

    def __init__(self, model: Network, batch: int | None) -> None:
        self.model, self.batch, self.frames = model, batch, model.clip.frames
        self.norms = {id(layer.input): layer for layer in model.layers if isinstance(layer, GhostBatchNorm)}
        self.middle = 0.0  # what zero, of the trainable network's normalised pixels, is in the pixels of this one

    def normalize(self, x: Any, name: str) -> Any:
        self.middle = MEAN  # the first convolution does it
        return x

    def difference(self, x: Any, name: str) -> Any:
        rows = self._rows(x)
        self.frames, self.middle = self.frames - 1, 0.0
        return self._images(layers.Subtract(name=name)([rows[1:, :], rows[:-1, :]]), x)

    def pointwise(self, x: Any, filters: int, name: str, stride: int = 1) -> Any:
        kernel, bias = self._folded(name)
        return _filled(layers.Conv2D(filters, 1, strides=stride, name=name), x, kernel[None, None], bias)

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        weights, bias = self._folded(name)
        if kernel[0] > 1:
            layer = layers.Conv2D(filters, (kernel[0], 1), padding="same", name=name)
            return self._images(_filled(layer, self._times(x), weights[:, :, 0], bias), x, filters)
        zero = 0.0
        if name == "conv1_xy":
            zero, weights = self.middle, weights / STD
            bias = bias - zero * weights.sum((0, 1, 2, 3))
        x = _padded(x, kernel[1:], zero)
        return _filled(layers.Conv2D(filters, kernel[1:], strides=stride, name=name), x, weights[0], bias)

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        weights, bias = self._folded(name)
        if kernel[1:] == (1, 1):
            layer = layers.DepthwiseConv2D((kernel[0], 1), padding="same", name=name)
            return self._images(_filled(layer, self._times(x), weights[:, :, 0, :, None], bias), x)
        frames, padding = (x, "same") if stride == 1 else (_padded(x, kernel[1:], 0.0), "valid")
        terms = []
        for tap in range(kernel[0]):
            shift = kernel[0] // 2 - tap
            if abs(shift) >= self.frames:
                continue  # all that it would see is padding
            layer = layers.DepthwiseConv2D(
                kernel[1:], strides=stride, padding=padding, use_bias=shift == 0, name=f"{name}_{tap}"
            )
            y = _filled(layer, frames, weights[tap][..., None], bias if shift == 0 else None)
            terms.append(self._shifted(y, shift))
        return layers.Add(name=f"{name}_sum")(terms) if len(terms) > 1 else terms[0]

    def norm(self, x: Any, name: str, gamma: str = "ones") -> Any:
        return x  # in the convolution before it

    def activation(self, x: Any, function: str, name: str) -> Any:
        return layers.Activation(function, name=name)(x)

    def mean(self, x: Any, name: str) -> Any:
        frames = layers.GlobalAveragePooling2D(name=name)(x)
        return ops.mean(ops.reshape(frames, (self.frames, self._of_all(), x.shape[-1])), axis=0)

    def scaled(self, x: Any, scale: Any, name: str) -> Any:
        _, h, w, c = x.shape
        if self.batch == 1:
            return ops.multiply(x, ops.reshape(scale, (1, 1, 1, c)))
        rows = ops.reshape(x, (self.frames, self._of_all(), h * w, c))
        scale = ops.reshape(scale, (1, self._of_all(), 1, c))
        return self._images(ops.multiply(rows, scale), x)

    def clips(self, x: Any) -> Any:
        """The tensor as (N, T, H, W, C)."""
        x = ops.reshape(x, (self.frames, self._of_all(), *x.shape[1:]))
        return ops.transpose(x, (1, 0, 2, 3, 4))

    def regions(self, x: Any, boxes: Any, clips: Any, name: str) -> Any:
        return regions(x, boxes, *clips.shape[1:3])

    def drop_branch(self, x: Any, rate: float, name: str) -> Any:
        return x

    def dropout(self, x: Any, name: str) -> Any:
        return x

    def _folded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias of a convolution together with the batch norm that follows it, if one does; float64."""
        layer = self.model.get_layer(name)
        kernel = layer.get_weights()[0].astype(np.float64)
        norm = self.norms.get(id(layer.output))
        if norm is None:
            return kernel, np.zeros(kernel.shape[-1])
        gamma, beta, mean, variance = (weight.astype(np.float64) for weight in norm.get_weights())
        scale = gamma / np.sqrt(variance + norm.epsilon)
        return kernel * scale, beta - mean * scale

    def _rows(self, x: Any) -> Any:
        """(T N, H, W, C) -> (T, N H W C)."""
        return ops.reshape(x, (self.frames, self._of_all(*x.shape[1:])))

    def _times(self, x: Any) -> Any:
        """(T N, H, W, C) -> (1, T, N H W, C), whose rows are moments."""
        _, h, w, c = x.shape
        return ops.reshape(x, (1, self.frames, self._of_all(h, w), c))

    def _images(self, x: Any, like: Any, channels: int | None = None) -> Any:
        """Back to (T N, H, W, C), of the sides of another tensor."""
        _, h, w, c = like.shape
        return ops.reshape(x, (self._of_all(self.frames), h, w, channels or c))

    def _of_all(self, *sizes: int) -> int:
        """N times the product of the sizes; -1 where N is open."""
        return math.prod(sizes) * self.batch if self.batch else -1

    def _shifted(self, x: Any, shift: int) -> Any:
        """Moved `shift` frames forward in time, zeros coming in."""
        if shift == 0:
            return x
        rows = self._rows(x)
        if shift > 0:
            return self._images(ops.pad(rows[:-shift, :], ((shift, 0), (0, 0))), x)
        return self._images(ops.pad(rows[-shift:, :], ((0, -shift), (0, 0))), x)


def _time_major(clips: Any) -> Any:
    """(N, T, H, W, C) -> (T N, H, W, C)."""
    n, t, *image = clips.shape
    return ops.reshape(clips if n == 1 else ops.transpose(clips, (1, 0, 2, 3, 4)), (n * t if n else -1, *image))


def _padded(x: Any, kernel: tuple[int, ...], value: float) -> Any:
    """Half the kernel on both sides of rows and columns, as PyTorch pads; Keras' "same" differs at stride 2."""
    return ops.pad(x, ((0, 0), *((size // 2, size // 2) for size in kernel), (0, 0)), constant_values=value)


def _filled(layer: keras.Layer, x: Any, kernel: np.ndarray, bias: np.ndarray | None) -> Any:
    """What a new layer makes of `x`, with these weights."""
    y = layer(x)
    layer.set_weights([kernel] if bias is None else [kernel, bias])
    return y
