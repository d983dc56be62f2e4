"""The layers that Keras lacks: channel-wise and symmetric 3-D convolution, strided pointwise convolution, ghost batch
norm, swish with a fast gradient, dropout that differs between devices.

All but the last two take and give (N, T, H, W, C) in the channels-last order, pad by half the kernel on every side
(TensorFlow's "same" padding differs on even sizes at stride 2) and have no bias. Written in `keras.ops`; a faster form
of one backend, in `kernels`, computes the same.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from x3d_tf.modeling.architecture import ModelOptions, require_window, window_rule
from x3d_tf.modeling.kernels import active_kernels
from x3d_tf.modeling.roi_align import REGION_BINS, regions


def conv_initializer(filters: int, kernel: Sequence[int] = (1, 1, 1)) -> keras.initializers.Initializer:
    """He normal over fan-out, not truncated and not divided by groups: the initialisation of the authors' code."""
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / (filters * math.prod(kernel))))


@keras.saving.register_keras_serializable("x3d_tf")
class PointwiseConv3D(keras.layers.Layer):
    """A 1x1x1 convolution, as a matrix product.

    Args:
        filters: output channels.
        stride: of both spatial axes.
    """

    def __init__(self, filters: int, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters, self.stride = filters, stride

    def build(self, input_shape: Sequence[int]) -> None:
        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1], self.filters), initializer=conv_initializer(self.filters)
        )

    def call(self, x: Any) -> Any:
        if self.stride == 1:
            return ops.matmul(x, self.kernel)
        return _implementation().pointwise_conv3d(x, ops.convert_to_tensor(self.kernel), self.stride)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return _output_shape(input_shape, self.stride, self.filters)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "stride": self.stride}


def pointwise_conv3d(x: Any, kernel: Any, stride: int) -> Any:
    """(N, T, H, W, C) with (C, filters): the product of every `stride`-th row and column."""
    return ops.matmul(x[:, :, ::stride, ::stride], kernel)


@keras.saving.register_keras_serializable("x3d_tf")
class Conv3D(keras.layers.Layer):
    """A dense 3-D convolution over time or over space: a kernel of (kt, 1, 1) or (1, kh, kw), odd.

    Args:
        filters: output channels.
        kernel_size: frames, rows, columns.
        stride: of both spatial axes.
    """

    def __init__(self, filters: int, kernel_size: Sequence[int], stride: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.stride = filters, tuple(kernel_size), stride

    def build(self, input_shape: Sequence[int]) -> None:
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*self.kernel_size, input_shape[-1], self.filters),
            initializer=conv_initializer(self.filters, self.kernel_size),
        )

    def call(self, x: Any) -> Any:
        if self.kernel_size[0] == 1:  # TensorFlow's 2-D convolution is the faster one
            n, t, h, w, c = ops.shape(x)
            y = ops.conv(_pad(ops.reshape(x, (-1, h, w, c)), self.kernel_size[1:]), self.kernel[0], self.stride)
            return ops.reshape(y, (n, t, *ops.shape(y)[1:]))
        return ops.conv(_pad(x, self.kernel_size), self.kernel, (1, self.stride, self.stride))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return _output_shape(input_shape, self.stride, self.filters)

    def get_config(self) -> dict[str, Any]:
        own = {"filters": self.filters, "kernel_size": self.kernel_size, "stride": self.stride}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("x3d_tf")
class ChannelwiseConv3D(keras.layers.Layer):
    """A 3-D convolution that keeps each channel to itself. Its kernel is (kt, kh, kw, C).

    Args:
        kernel_size: frames, rows, columns, all odd.
        stride: of both spatial axes.
    """

    def __init__(self, kernel_size: Sequence[int], stride: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel_size, self.stride = tuple(kernel_size), stride

    def build(self, input_shape: Sequence[int]) -> None:
        channels = input_shape[-1]
        self.kernel = self.add_weight(
            name="kernel", shape=(*self.kernel_size, channels), initializer=conv_initializer(channels, self.kernel_size)
        )

    def call(self, x: Any) -> Any:
        return _implementation().channelwise_conv3d(x, ops.convert_to_tensor(self.kernel), self.stride)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return _output_shape(input_shape, self.stride, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kernel_size": self.kernel_size, "stride": self.stride}


def channelwise_conv3d(x: Any, kernel: Any, stride: int) -> Any:
    """(N, T, H, W, C) with (kt, kh, kw, C): a depthwise 2-D convolution for each temporal tap, shifted and added."""
    n, t, h, w, c = ops.shape(x)
    taps = kernel.shape[0]
    padded = ops.pad(x, [[0, 0], [taps // 2] * 2, [0, 0], [0, 0], [0, 0]])
    total = 0.0
    for tap in range(taps):
        frames = _pad(ops.reshape(padded[:, tap : tap + t], (-1, h, w, c)), kernel.shape[1:3])
        total = total + ops.depthwise_conv(frames, kernel[tap][..., None], strides=stride)
    return ops.reshape(total, (n, t, *ops.shape(total)[1:]))


@keras.saving.register_keras_serializable("x3d_tf")
class GhostBatchNorm(keras.layers.Layer):
    """Batch norm whose statistics are of groups of clips, contiguous in the batch.

    The batch size that a recipe was tuned for stays that of its statistics, whatever a device holds (paper, appendix
    A.3: 8 clips). One scale and shift serve all groups. In training a group is normalised by its biased variance; the
    moving statistics take the mean over groups (and devices) of the means and of the unbiased variances, as PyTorch
    does.

    A batch may come as a list of its parts, equal in size, several to a group or several groups to each; so do the
    outputs.

    Args:
        group: clips of a group. A smaller batch is one group.
        momentum: share of the moving statistics that a step keeps.
        epsilon: added to the variance.
        gamma_initializer: of the scale; zeros make a residual branch start as nothing.

    Raises:
        ValueError: in training, a static batch larger than `group` that is not a multiple of it.
    """

    def __init__(
        self,
        group: int = 8,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        gamma_initializer: Any = "ones",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.group, self.momentum, self.epsilon = group, momentum, epsilon
        self.gamma_initializer = keras.initializers.get(gamma_initializer)

    def build(self, input_shape: Sequence[int]) -> None:
        shape = (input_shape[-1],)
        full: dict[str, Any] = {"shape": shape, "autocast": False}
        self.gamma = self.add_weight(name="gamma", initializer=self.gamma_initializer, **full)
        self.beta = self.add_weight(name="beta", initializer="zeros", **full)
        # aggregation: without it each device would keep its own, and only the first's would be saved
        moving: dict[str, Any] = {**full, "trainable": False, "aggregation": "mean"}
        self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", **moving)
        self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", **moving)

    def call(self, x: Any, training: bool = False) -> Any:
        gamma, beta = ops.convert_to_tensor(self.gamma), ops.convert_to_tensor(self.beta)
        parts = x if isinstance(x, list) else [x]
        if training and self.trainable:
            outputs = self._by_batch(parts, gamma, beta)
        else:
            scale = gamma * ops.rsqrt(self.moving_variance + self.epsilon)
            shift = beta - self.moving_mean * scale
            outputs = [part * ops.cast(scale, part.dtype) + ops.cast(shift, part.dtype) for part in parts]
        return outputs if isinstance(x, list) else outputs[0]

    def _by_batch(self, parts: list[Any], gamma: Any, beta: Any) -> list[Any]:
        shape = ops.shape(parts[0])
        groups = self.groups(shape[0] * len(parts))  # a tensor where the batch is open, which comes in one part
        each = groups if len(parts) == 1 else max(groups // len(parts), 1)  # groups within a part
        joined = len(parts) if len(parts) == 1 else max(len(parts) // groups, 1)  # parts of a group
        rows_shape = (each, shape[0] // each * shape[1], shape[2] * shape[3], shape[4])
        # Statistics of half-precision numbers are summed in full precision.
        rows = [ops.cast(ops.reshape(part, rows_shape), self.variable_dtype) for part in parts]
        found = [
            _implementation().normalize(rows[first : first + joined], gamma, beta, self.epsilon)
            for first in range(0, len(rows), joined)
        ]
        mean = sum(mean for _, mean, _ in found) / len(found)
        variance = sum(variance for _, _, variance in found) / len(found)
        self._update(mean, variance, rows_shape[1] * rows_shape[2] * joined)
        return [ops.cast(ops.reshape(y, shape), parts[0].dtype) for ys, _, _ in found for y in ys]

    def groups(self, batch: Any) -> Any:
        """How many groups a batch makes: an int, or a tensor where the batch is one."""
        if not isinstance(batch, int):
            return ops.maximum(batch // self.group, 1)
        if batch > self.group and batch % self.group:
            raise ValueError(
                f"the clips on a device must be at most the batch-norm group, or a multiple of it: got {batch} clips "
                f"and groups of {self.group} (bn_group)"
            )
        return max(batch // self.group, 1)

    def _update(self, mean: Any, variance: Any, samples: Any) -> None:
        samples = ops.cast(samples, variance.dtype)
        unbiased = variance * (samples / ops.maximum(samples - 1, 1))
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, unbiased)):
            moving.assign(self.momentum * moving + (1 - self.momentum) * ops.mean(new, axis=(0, 1, 2)))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "group": self.group,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
        }


@keras.saving.register_keras_serializable("x3d_tf")
class Swish(keras.layers.Layer):
    """x * sigmoid(x), in any shape."""

    def call(self, x: Any) -> Any:
        return _implementation().swish(x)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)


@keras.saving.register_keras_serializable("x3d_tf")
class Dropout(keras.layers.Dropout):
    """Keras' dropout, but each device of a distribution strategy drops other elements.

    By itself every device draws from the same state, so that a clip on one loses what its neighbour on another does.
    A batch may come as a list of its parts, equal in size, which lose what they would lose as a whole.
    """

    def call(self, x: Any, training: bool = False) -> Any:
        if not training or self.rate == 0:
            return x
        seed = _DeviceSeeds(self.seed_generator)
        if not isinstance(x, list):
            return keras.random.dropout(x, self.rate, noise_shape=self.noise_shape, seed=seed)
        shape = [own or size for own, size in zip(self.noise_shape, ops.shape(x[0]))]
        kept = keras.random.dropout(ops.ones((shape[0] * len(x), *shape[1:]), x[0].dtype), self.rate, seed=seed)
        return [part * own for part, own in zip(x, ops.split(kept, len(x)))]


class _DeviceSeeds(keras.random.SeedGenerator):
    """The seeds of another generator, made other ones on each device."""

    def __init__(self, source: keras.random.SeedGenerator) -> None:  # no state of its own
        self.source = source

    def next(self, ordered: bool = True) -> Any:
        seed = self.source.next(ordered)
        if keras.backend.backend() != "tensorflow":
            return seed  # one device
        from x3d_tf.modeling.kernels.tensorflow import per_replica_seed

        return per_replica_seed(seed)


@keras.saving.register_keras_serializable("x3d_tf")
class Regions(keras.layers.Layer):
    """What `roi_align.regions` computes, of [maps, boxes, clips] of any size."""

    def call(self, inputs: Any) -> Any:
        maps, boxes, clips = inputs
        height, width = ops.shape(clips)[2:4]
        return regions(maps, boxes, height, width)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        maps, boxes, _ = input_shape
        return (*boxes[:2], REGION_BINS, REGION_BINS, maps[-1])


@keras.saving.register_keras_serializable("x3d_tf")
class RequireWindow(keras.layers.Layer):
    """Refuses clips (N, T, H, W, C) that are too small for the head's fixed poolings, and changes nothing.

    Args:
        head_pool: see `ModelOptions`.
        train_size: side of the training crop in pixels.

    Raises:
        UserError: a static size that is too small; where TensorFlow knows it only when a graph runs,
            tf.errors.InvalidArgumentError.
    """

    def __init__(self, head_pool: Any, train_size: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.options, self.train_size = ModelOptions(head_pool=head_pool), train_size

    def call(self, clips: Any) -> Any:
        sides = ops.shape(clips)[2:4]
        if all(isinstance(side, int) for side in sides):
            require_window(self.options, min(sides), self.train_size)
            return clips
        from x3d_tf.modeling.kernels.tensorflow import require_sides

        return require_sides(clips, *window_rule(self.options, self.train_size))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "head_pool": self.options.head_pool, "train_size": self.train_size}


def normalize(parts: Sequence[Any], gamma: Any, beta: Any, epsilon: float) -> tuple[list[Any], Any, Any]:
    """Rows (groups, frames, positions, C) normalised, whose frames come in several parts.

    Returns:
        The parts, and each group's mean and biased variance, (groups, 1, 1, C).
    """
    rows = ops.concatenate(parts, axis=1)
    mean = ops.mean(rows, axis=(1, 2), keepdims=True)
    variance = ops.mean(ops.square(rows - mean), axis=(1, 2), keepdims=True)
    y = (rows - mean) * (gamma * ops.rsqrt(variance + epsilon)) + beta
    return ops.split(y, len(parts), axis=1), ops.stop_gradient(mean), ops.stop_gradient(variance)


def swish(x: Any) -> Any:
    """x * sigmoid(x)."""
    return ops.silu(x)


def _implementation() -> Any:
    """The module with the functions that do the layers' work: the backend's kernels, or this one."""
    if active_kernels() == "ops":
        return sys.modules[__name__]
    from x3d_tf.modeling.kernels import tensorflow

    return tensorflow


def _pad(x: Any, kernel: Sequence[int]) -> Any:
    """Half the kernel on both sides of each axis between the first and the last."""
    return ops.pad(x, [[0, 0], *([size // 2] * 2 for size in kernel), [0, 0]])


def _output_shape(shape: Sequence[int | None], stride: int, channels: int | None) -> tuple[int | None, ...]:
    n, t, *sides, _ = shape
    return (n, t, *(None if side is None else math.ceil(side / stride) for side in sides), channels)
