"""Layers that Keras lacks: channel-wise and symmetrically padded 3-D convolution, strided pointwise convolution, ghost
batch norm, swish with a fast gradient, dropout that differs between devices, RoIAlign, and a check of the clip's size.

The convolutions map (N, T, H, W, C) to (N, T, H, W, C), pad by half the kernel on every side (TensorFlow's "same"
padding differs for even sizes at stride 2) and have no bias. The layers are written in `keras.ops`; `kernels` contains
faster implementations for one backend, with the same results.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from x3d_tf.modeling.architecture import NORM_EPSILON, REGION_BINS, ModelOptions, require_window, window_rule
from x3d_tf.modeling.kernels import active_kernels
from x3d_tf.modeling.roi_align import regions


def conv_initializer(filters: int, kernel: Sequence[int] = (1, 1, 1)) -> keras.initializers.Initializer:
    """Returns He normal over fan-out, not truncated and not divided by groups, as in PySlowFast."""
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / (filters * math.prod(kernel))))


@keras.saving.register_keras_serializable("x3d_tf")
class PointwiseConv3D(keras.layers.Layer):
    """A 1x1x1 convolution, computed as a matrix product.

    Args:
        filters: number of output channels.
        stride: stride of both spatial axes.
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
    """Multiplies every `stride`-th row and column of (N, T, H, W, C) by a kernel (C, filters)."""
    return ops.matmul(x[:, :, ::stride, ::stride], kernel)


@keras.saving.register_keras_serializable("x3d_tf")
class Conv3D(keras.layers.Layer):
    """A dense 3-D convolution over time or over space, with a kernel of (kt, 1, 1) or (1, kh, kw), all odd.

    Args:
        filters: number of output channels.
        kernel_size: kernel size in frames, rows, columns.
        stride: stride of both spatial axes.
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
        if self.kernel_size[0] == 1:  # TensorFlow's 2-D convolution is faster than its 3-D one
            n, t, h, w, c = ops.shape(x)
            y = ops.conv(_pad(ops.reshape(x, (-1, h, w, c)), self.kernel_size[1:]), self.kernel[0], self.stride)
            return ops.reshape(y, (n, t, *ops.shape(y)[1:]))
        return ops.conv(_pad(x, self.kernel_size), self.kernel, (1, self.stride, self.stride))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return _output_shape(input_shape, self.stride, self.filters)

    def get_config(self) -> dict[str, Any]:
        config = {"filters": self.filters, "kernel_size": self.kernel_size, "stride": self.stride}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("x3d_tf")
class ChannelwiseConv3D(keras.layers.Layer):
    """A channel-wise (depthwise) 3-D convolution with a kernel (kt, kh, kw, C).

    Args:
        kernel_size: kernel size in frames, rows, columns, all odd.
        stride: stride of both spatial axes.
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
    """Convolves (N, T, H, W, C) with (kt, kh, kw, C), in the form that suits the backend."""
    return (multiply_adds if _compiles_for_cpu() else depthwise_taps)(x, kernel, stride)


def _compiles_for_cpu() -> bool:
    """Returns whether the backend is JAX on a CPU. Other devices have not been measured."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return bool(jax.default_backend() == "cpu")


def depthwise_taps(x: Any, kernel: Any, stride: int) -> Any:
    """Convolves (N, T, H, W, C) with (kt, kh, kw, C) by one depthwise 2-D convolution per temporal tap."""
    n, t, h, w, c = ops.shape(x)
    taps = kernel.shape[0]
    padded = ops.pad(x, [[0, 0], [taps // 2] * 2, [0, 0], [0, 0], [0, 0]])
    total = 0.0
    for tap in range(taps):
        frames = _pad(ops.reshape(padded[:, tap : tap + t], (-1, h, w, c)), kernel.shape[1:3])
        total = total + ops.depthwise_conv(frames, kernel[tap][..., None], strides=stride)
    return ops.reshape(total, (n, t, *ops.shape(total)[1:]))


def multiply_adds(x: Any, kernel: Any, stride: int) -> Any:
    """Convolves (N, T, H, W, C) with (kt, kh, kw, C) by one shifted multiply-add per element of the kernel.

    XLA compiles them into one pass over memory. Sums of inputs in half precision are taken in float32.
    """
    _, t, h, w, _ = ops.shape(x)
    padded = _pad(x, kernel.shape[:3])
    total = 0.0
    for frame, row, column in np.ndindex(*kernel.shape[:3]):
        shifted = padded[:, frame : frame + t, row : row + h : stride, column : column + w : stride]
        total = total + ops.cast(shifted, "float32") * ops.cast(kernel[frame, row, column], "float32")
    return ops.cast(total, x.dtype)


@keras.saving.register_keras_serializable("x3d_tf")
class GhostBatchNorm(keras.layers.Layer):
    """Batch norm with separate statistics for each group of consecutive clips in the batch.

    The statistics keep the batch size that a recipe was tuned for (paper, appendix A.3: 8 clips), independently of the
    batch size per device. All groups share one scale and shift. In training, each group is normalized with its biased
    variance. The moving statistics are updated with the mean, over groups and devices, of the means and of the unbiased
    variances, as in PyTorch.

    The input may be a list of equal slices of a batch; the output is then a list too. A group may span several slices,
    or a slice may contain several groups.

    Args:
        group: number of clips per group. A smaller batch is one group.
        momentum: decay of the moving statistics: the fraction that remains after a step.
        epsilon: small constant added to the variance.
        gamma_initializer: initializer of the scale; zeros make a residual branch start at zero.

    Raises:
        ValueError: in training, a static batch is larger than `group` but not a multiple of it.
    """

    def __init__(
        self,
        group: int = 8,
        momentum: float = 0.9,
        epsilon: float = NORM_EPSILON,
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
        # Without aggregation each device would have its own statistics, and only the first's would be saved.
        moving: dict[str, Any] = {**full, "trainable": False, "aggregation": "mean"}
        self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", **moving)
        self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", **moving)

    def call(self, x: Any, training: bool = False) -> Any:
        gamma, beta = ops.convert_to_tensor(self.gamma), ops.convert_to_tensor(self.beta)
        slices = x if isinstance(x, list) else [x]
        if training and self.trainable:
            outputs = self._normalize_by_groups(slices, gamma, beta)
        else:
            scale = gamma * ops.rsqrt(self.moving_variance + self.epsilon)
            shift = beta - self.moving_mean * scale
            outputs = [y * ops.cast(scale, y.dtype) + ops.cast(shift, y.dtype) for y in slices]
        return outputs if isinstance(x, list) else outputs[0]

    def _normalize_by_groups(self, slices: list[Any], gamma: Any, beta: Any) -> list[Any]:
        shape = ops.shape(slices[0])
        groups = self.groups(shape[0] * len(slices))  # a tensor if the batch size is dynamic; then one slice
        groups_per_slice = groups if len(slices) == 1 else max(groups // len(slices), 1)
        slices_per_group = len(slices) if len(slices) == 1 else max(len(slices) // groups, 1)
        rows_shape = (groups_per_slice, shape[0] // groups_per_slice * shape[1], shape[2] * shape[3], shape[4])
        # Statistics of half-precision inputs are summed in full precision.
        rows = [ops.cast(ops.reshape(x, rows_shape), self.variable_dtype) for x in slices]
        results = [
            _implementation().normalize(rows[first : first + slices_per_group], gamma, beta, self.epsilon)
            for first in range(0, len(rows), slices_per_group)
        ]
        mean = sum(mean for _, mean, _ in results) / len(results)
        variance = sum(variance for _, _, variance in results) / len(results)
        self._update_moving_statistics(mean, variance, rows_shape[1] * rows_shape[2] * slices_per_group)
        return [ops.cast(ops.reshape(y, shape), slices[0].dtype) for ys, _, _ in results for y in ys]

    def groups(self, batch: Any) -> Any:
        """Returns the number of groups in a batch: an int, or a tensor if `batch` is a tensor."""
        if not isinstance(batch, int):
            return ops.maximum(batch // self.group, 1)
        if batch > self.group and batch % self.group:
            raise ValueError(
                f"the batch per device must be a multiple of bn_group, or at most bn_group, got {batch} clips and "
                f"bn_group {self.group}"
            )
        return max(batch // self.group, 1)

    def _update_moving_statistics(self, mean: Any, variance: Any, samples: Any) -> None:
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
    """Swish activation, x * sigmoid(x), for tensors of any shape."""

    def call(self, x: Any) -> Any:
        return _implementation().swish(x)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)


@keras.saving.register_keras_serializable("x3d_tf")
class Dropout(keras.layers.Dropout):
    """Keras' dropout with a different random state on each device of a distribution strategy.

    With Keras' own layer all replicas share one seed and drop the same elements. The input may be a list of equal
    slices of a batch; they are dropped as the complete batch would be.
    """

    def call(self, x: Any, training: bool = False) -> Any:
        if not training or self.rate == 0:
            return x
        seed = _seeds(self.seed_generator)
        if not isinstance(x, list):
            return keras.random.dropout(x, self.rate, noise_shape=self.noise_shape, seed=seed)
        shape = [noise or size for noise, size in zip(self.noise_shape, ops.shape(x[0]))]
        mask = keras.random.dropout(ops.ones((shape[0] * len(x), *shape[1:]), x[0].dtype), self.rate, seed=seed)
        return [y * y_mask for y, y_mask in zip(x, ops.split(mask, len(x)))]


def _seeds(generator: keras.random.SeedGenerator) -> keras.random.SeedGenerator:
    """Returns a generator whose seeds differ between replicas; itself on other backends, which run on one device."""
    return _PerReplicaSeeds(generator) if keras.backend.backend() == "tensorflow" else generator


class _PerReplicaSeeds(keras.random.SeedGenerator):
    """Wraps a seed generator so that its seeds differ between the replicas of TensorFlow."""

    def __init__(self, source: keras.random.SeedGenerator) -> None:  # creates no state
        self.source = source

    def next(self, ordered: bool = True) -> Any:
        from x3d_tf.modeling.kernels.tensorflow import per_replica_seed

        return per_replica_seed(self.source.next(ordered))


@keras.saving.register_keras_serializable("x3d_tf")
class Regions(keras.layers.Layer):
    """Layer that computes `roi_align.regions` from [maps, boxes, clips] of any size."""

    def call(self, inputs: Any) -> Any:
        maps, boxes, clips = inputs
        height, width = ops.shape(clips)[2:4]
        return regions(maps, boxes, height, width)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        maps, boxes, _ = input_shape
        return (*boxes[:2], REGION_BINS, REGION_BINS, maps[-1])


@keras.saving.register_keras_serializable("x3d_tf")
class RequireWindow(keras.layers.Layer):
    """Identity that rejects clips (N, T, H, W, C) too small for the head's fixed poolings.

    Args:
        head_pool: see `ModelOptions`.
        train_size: side of the training crop in pixels.

    Raises:
        UserError: a static size is too small.
        tf.errors.InvalidArgumentError: a dynamic size is too small when the graph runs.
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


def normalize(slices: Sequence[Any], gamma: Any, beta: Any, epsilon: float) -> tuple[list[Any], Any, Any]:
    """Normalizes rows (groups, frames, positions, C), given as slices along the frames.

    Returns:
        The normalized slices, and the mean and biased variance of each group, (groups, 1, 1, C).
    """
    rows = ops.concatenate(slices, axis=1)
    mean = ops.mean(rows, axis=(1, 2), keepdims=True)
    variance = ops.mean(ops.square(rows - mean), axis=(1, 2), keepdims=True)
    y = (rows - mean) * (gamma * ops.rsqrt(variance + epsilon)) + beta
    return ops.split(y, len(slices), axis=1), ops.stop_gradient(mean), ops.stop_gradient(variance)


def swish(x: Any) -> Any:
    """Computes x * sigmoid(x)."""
    return ops.silu(x)


def _implementation() -> Any:
    """Returns the module that implements the layers' math: the backend-specific one, or this one."""
    if active_kernels() == "ops":
        return sys.modules[__name__]
    from x3d_tf.modeling.kernels import tensorflow

    return tensorflow


def _pad(x: Any, kernel: Sequence[int]) -> Any:
    """Pads by half the kernel on both sides of each axis between the first and the last."""
    return ops.pad(x, [[0, 0], *([size // 2] * 2 for size in kernel), [0, 0]])


def _output_shape(shape: Sequence[int | None], stride: int, channels: int | None) -> tuple[int | None, ...]:
    n, t, *sides, _ = shape
    return (n, t, *(None if side is None else math.ceil(side / stride) for side in sides), channels)
