"""TensorFlow kernels for the layers' math: faster than the `keras.ops` implementations, with the same results.

TensorFlow has no channel-wise 3-D convolution, and the gradient of its batch norm makes many passes over memory. Both
dominate the speed of X3D, so this module implements them. `layers` chooses between these kernels and the portable ones.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from x3d_tf.modeling.kernels import active_kernels

_SAFE_CHANNELS = 16  # smallest width for which oneDNN's gradient of a strided 1x1 convolution stays within its memory


def _traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a function once for all layers of equal shapes.

    The function is not inlined, so it is optimized only once: the graph is smaller and builds in half the time.
    """

    @functools.cache
    def traced(kernels: str, signature: str) -> Callable[..., Any]:
        # TensorFlow warns about code that it traces for many shapes; a partial has none
        copy = functools.partial(function)
        return tf.function(copy, autograph=False, experimental_attributes={"_noinline": True})

    return lambda *arguments: traced(active_kernels(), _signature(arguments))(*arguments)


def _signature(arguments: Any) -> str:
    """Returns the shapes and dtypes of tensors, and the values of other arguments, as text."""
    tensors = tf.nest.map_structure(
        lambda value: (str(value.shape), str(value.dtype)) if hasattr(value, "shape") else value, arguments
    )
    return repr(tensors)


def channelwise_conv3d(x: Any, kernel: Any, stride: int) -> Any:
    """Convolves each channel separately over time and space, padded by half the kernel on every side.

    Runs one depthwise 2-D convolution per temporal tap of the kernel, then shifts the results in time and adds them in
    one pass over memory. The gradients are explicit, because TensorFlow's automatic ones copy the shifted tensors and
    store padded ones.

    Args:
        x: (N, T, H, W, C); the first four may be dynamic.
        kernel: (kt, kh, kw, C), odd sizes.
        stride: stride of both spatial axes.

    Returns:
        (N, T, ceil(H / stride), ceil(W / stride), C).
    """
    if kernel.shape[1] == kernel.shape[2] == 1 and stride == 1:
        return _temporal_conv(x, kernel)

    @tf.custom_gradient
    def run(x: Any, kernel: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        return _channelwise(x, kernel, stride), lambda upstream: _channelwise_gradients(x, kernel, upstream, stride)

    output = run(x, tf.convert_to_tensor(kernel))  # custom gradients do not accept variables
    sides = [None if side is None else -(-side // stride) for side in x.shape[2:4]]
    return tf.ensure_shape(output, [*x.shape[:2], *sides, x.shape[4]])


@_traced_once
def _channelwise(x: Any, kernel: Any, stride: int) -> Any:
    n, t, *image = _shape(x)
    shifts = _shifts(kernel, t)
    frames = tf.reshape(x, [n * t, *image])
    results = [_depthwise(frames, kernel[tap], stride) for tap in shifts]
    _, *out_image = _shape(results[0])
    rows = [tf.reshape(result, [n, t, math.prod(out_image)]) for result in results]
    return tf.reshape(_shift_and_add(tuple(shifts.values()), *rows), [n, t, *out_image])


@_traced_once
def _channelwise_gradients(x: Any, kernel: Any, upstream: Any, stride: int) -> tuple[Any, Any]:
    n, t, *image = _shape(x)
    shifts = _shifts(kernel, t)
    frames = tf.reshape(x, [n * t, *image])
    upstream = tf.reshape(upstream, [n * t, *_shape(upstream)[2:]])
    tap_gradients = [_depthwise_input_gradient(frames, kernel[tap], upstream, stride) for tap in shifts]
    rows = [tf.reshape(gradient, [n, t, math.prod(image)]) for gradient in tap_gradients]
    x_gradient = _shift_and_add(tuple(-shift for shift in shifts.values()), *rows)
    kernel_gradients = [tf.zeros_like(kernel[0])] * kernel.shape[0]
    for tap, shift in shifts.items():
        kernel_gradients[tap] = _tap_gradient(frames, kernel[tap], upstream, stride, t, shift)
    return tf.reshape(x_gradient, [n, t, *image]), tf.stack(kernel_gradients)


def _shifts(kernel: Any, t: Any) -> dict[int, int]:
    """Maps each temporal tap to the forward shift of its result in frames. Omits taps that shift out all frames."""
    shifts = {tap: kernel.shape[0] // 2 - tap for tap in range(kernel.shape[0])}
    return {tap: shift for tap, shift in shifts.items() if not (isinstance(t, int) and abs(shift) >= t)}


def _tap_gradient(frames: Any, kernel: Any, upstream: Any, stride: int, t: Any, shift: int) -> Any:
    """Computes the gradient of one temporal tap, (kh, kw, C), whose result is shifted forward by `shift` frames.

    Frame f of the input is paired with frame f + shift of the upstream gradient. Slices of the leading axis copy
    nothing, so one call handles all frames of all clips; pairs that cross from one clip into the next are subtracted.
    """
    if not isinstance(t, int):
        rows = tf.reshape(upstream, [-1, t, math.prod(_shape(upstream)[1:])])
        upstream, shift = tf.reshape(_shift_frames(rows, -shift), tf.shape(upstream)), 0
    if shift == 0:
        return _depthwise_kernel_gradient(frames, kernel, upstream, stride)
    starts = tf.range(1, tf.shape(frames)[0] // t) * t  # of all clips except the first
    ends = tf.reshape(starts[:, None] + tf.range(-abs(shift), 0), [-1])  # frames paired with the next clip's
    if shift > 0:
        pairs = [(frames[:-shift], upstream[shift:]), (tf.gather(frames, ends), tf.gather(upstream, ends + shift))]
    else:
        pairs = [(frames[-shift:], upstream[:shift]), (tf.gather(frames, ends - shift), tf.gather(upstream, ends))]
    total, crossing = (_depthwise_kernel_gradient(inputs, kernel, paired, stride) for inputs, paired in pairs)
    # Without frames TensorFlow returns uninitialized memory.
    return total - tf.where(tf.size(ends) > 0, crossing, 0)


def _depthwise(frames: Any, kernel: Any, stride: int) -> Any:
    """Convolves (frames, H, W, C) depthwise with (kh, kw, C), padded by half the kernel on every side."""
    return tf.nn.depthwise_conv2d(frames, kernel[..., None], [1, stride, stride, 1], _padding(kernel, stride))


def _depthwise_input_gradient(frames: Any, kernel: Any, upstream: Any, stride: int) -> Any:
    padding = _padding(kernel, stride)
    if stride == 2 and None not in frames.shape[1:3]:
        # "SAME" padding is faster here, but pads even sides unequally. At stride 2, a further last row and column of
        # zeros in the kernel corrects that.
        kernel = tf.pad(kernel, [*([0, 1 - side % 2] for side in frames.shape[1:3]), [0, 0]])
        padding = "SAME"
    strides = [1, stride, stride, 1]
    return tf.nn.depthwise_conv2d_backprop_input(tf.shape(frames), kernel[..., None], upstream, strides, padding)


def _depthwise_kernel_gradient(frames: Any, kernel: Any, upstream: Any, stride: int) -> Any:
    shape, strides = [*kernel.shape, 1], [1, stride, stride, 1]
    padding = _padding(kernel, stride)
    return tf.nn.depthwise_conv2d_backprop_filter(frames, shape, upstream, strides, padding)[..., 0]


def _padding(kernel: Any, stride: int) -> Any:
    """Returns padding by half the kernel on every side, in TensorFlow's format."""
    if stride == 1:
        return "SAME"
    return [[0, 0], *([size // 2] * 2 for size in kernel.shape[:2]), [0, 0]]


def pointwise_conv3d(x: Any, kernel: Any, stride: int) -> Any:
    """Applies a 1x1x1 convolution to every `stride`-th row and column.

    It is computed as a 2-D convolution, because strided slices take 4 times as long. Narrow inputs are sliced
    nevertheless: for them, oneDNN's gradient of the strided convolution (TensorFlow 2.21, AVX-512) corrupts the heap.

    Args:
        x: (N, T, H, W, C); the first four may be dynamic.
        kernel: (C, filters).
        stride: stride of both spatial axes.

    Returns:
        (N, T, ceil(H / stride), ceil(W / stride), filters).
    """
    if stride > 1 and kernel.shape[0] < _SAFE_CHANNELS:
        x, stride = x[:, :, ::stride, ::stride], 1
    n, t, *image = _shape(x)
    y = tf.nn.conv2d(tf.reshape(x, [n * t, *image]), kernel[None, None], stride, "VALID")
    return tf.reshape(y, [n, t, *_shape(y)[1:]])


def swish(x: Any) -> Any:
    """Computes x * sigmoid(x), with a gradient that makes one pass over memory."""

    @tf.custom_gradient
    def run(x: Any) -> tuple[Any, Callable[[Any], Any]]:
        return tf.nn.silu(x), lambda upstream: _swish_gradient(upstream, x)

    return run(x)


def _temporal_conv(x: Any, kernel: Any) -> Any:
    n, t, h, w, c = _shape(x)
    y = tf.nn.depthwise_conv2d(tf.reshape(x, [n, t, h * w, c]), kernel[:, 0, :, :, None], [1, 1, 1, 1], "SAME")
    return tf.ensure_shape(tf.reshape(y, [n, t, h, w, c]), x.shape)


def _shift_frames(rows: Any, shift: int) -> Any:
    """Shifts rows (N, T, ...) forward in time by `shift` frames and pads with zeros."""
    if shift == 0:
        return rows
    frames = _shape(rows)[1]
    remaining = frames - abs(shift) if isinstance(frames, int) else tf.maximum(frames - abs(shift), 0)
    missing = frames - remaining
    begin, pad = (0, [missing, 0]) if shift > 0 else (missing, [0, missing])
    return tf.pad(tf.slice(rows, [0, begin, 0], [-1, remaining, -1]), [[0, 0], pad, [0, 0]])


def _shape(x: Any) -> list[Any]:
    dynamic = tf.shape(x)
    return [size if size is not None else dynamic[axis] for axis, size in enumerate(x.shape)]


def normalize(slices: Sequence[Any], gamma: Any, beta: Any, epsilon: float) -> tuple[list[Any], Any, Any]:
    """Normalizes each group with its own statistics.

    Args:
        slices: rows (groups, frames, positions, C), sliced along the frames; all slices have equal shapes.
        gamma, beta: scale and shift, (C,).
        epsilon: small constant added to the variance.

    Returns:
        The normalized slices, and the mean and biased variance of each group, (groups, 1, 1, C), with stopped
        gradients.
    """

    @tf.custom_gradient
    def run(gamma: Any, beta: Any, *slices: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        outputs, mean, variance = _normalize(slices, gamma, beta, epsilon)

        def gradient(*upstreams: Any) -> tuple[Any, ...]:
            upstreams = upstreams[: len(slices)]  # without those of the statistics
            return _normalize_gradients(upstreams, slices, gamma, mean, variance, epsilon)

        return (*outputs, mean, variance), gradient

    # Custom gradients do not accept variables.
    *outputs, mean, variance = run(tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta), *slices)
    return outputs, tf.stop_gradient(mean), tf.stop_gradient(variance)


@_traced_once
def _normalize(slices: Sequence[Any], gamma: Any, beta: Any, epsilon: float) -> tuple[list[Any], Any, Any]:
    mean = _average(_mean(rows) for rows in slices)
    variance = _average(_mean(_centred_square(rows, mean)) for rows in slices)
    scale = tf.math.rsqrt(variance + epsilon) * gamma
    shift = beta - mean * scale
    return [_affine(rows, scale, shift) for rows in slices], mean, variance


@_traced_once
def _normalize_gradients(
    upstreams: Sequence[Any], slices: Sequence[Any], gamma: Any, mean: Any, variance: Any, epsilon: float
) -> tuple[Any, ...]:
    inverse = tf.math.rsqrt(variance + epsilon)
    scale = inverse * gamma
    mean_upstream = _average(_mean(upstream) for upstream in upstreams)
    # The normalized value is recomputed as (rows - mean) * inverse to save memory.
    products = (_product(upstream, rows, mean) for upstream, rows in zip(upstreams, slices))
    mean_product = _average(_mean(product) for product in products) * inverse
    samples = tf.cast(tf.shape(slices[0])[1] * tf.shape(slices[0])[2] * len(slices), gamma.dtype)
    slope = -scale * inverse * mean_product
    shift = -scale * mean_upstream - slope * mean
    gradients = [_affine2(upstream, rows, scale, slope, shift) for upstream, rows in zip(upstreams, slices)]
    sums = [tf.reduce_sum(average, [0, 1, 2]) * samples for average in (mean_product, mean_upstream)]
    return (*sums, *gradients)


def _average(values: Iterable[Any]) -> Any:
    values = list(values)
    return values[0] if len(values) == 1 else tf.add_n(values) / len(values)


def require_sides(clips: Any, smallest: int, rule: str) -> Any:
    """Returns the clips (N, T, H, W, C); at run time, the graph fails with `rule` if a side is below `smallest`."""
    sides = tf.shape(clips)[2:4]
    fits = tf.debugging.Assert(tf.reduce_all(sides >= smallest), ["the sides of a clip must", rule, "got", sides])
    with tf.control_dependencies([fits]):
        return tf.identity(clips)


def _mean(rows: Any) -> Any:
    """Averages over axes 1 and 2 and keeps them. On CPUs it uses average pooling, which is faster than a reduction."""
    groups, frames, positions, channels = _shape(rows)
    if isinstance(positions, int) and active_kernels() == "cpu":
        images = tf.reshape(rows, [groups * frames, positions, 1, channels])
        rows = tf.reshape(tf.nn.avg_pool2d(images, [positions, 1], 1, "VALID"), [groups, frames, 1, channels])
    return tf.reduce_mean(rows, axis=[1, 2], keepdims=True)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function on CPUs into one pass over memory instead of one per operation."""
    compiled = tf.function(function, jit_compile=True)

    def call(*arguments: Any) -> Any:
        return (compiled if active_kernels() == "cpu" else function)(*arguments)

    return call


@_fused
def _shift_and_add(shifts: tuple[int, ...], *results: Any) -> Any:
    """Adds rows (N, T, ...), each shifted forward in time by its number of frames and padded with zeros."""
    return sum(_shift_frames(rows, shift) for rows, shift in zip(results, shifts))


@_fused
def _swish_gradient(upstream: Any, x: Any) -> Any:
    gate = tf.sigmoid(x)
    return upstream * gate * (1 + x * (1 - gate))


@_fused
def _centred_square(rows: Any, mean: Any) -> Any:
    return tf.square(rows - mean)


@_fused
def _affine(rows: Any, scale: Any, shift: Any) -> Any:
    return rows * scale + shift


@_fused
def _product(upstream: Any, rows: Any, mean: Any) -> Any:
    return upstream * (rows - mean)


@_fused
def _affine2(upstream: Any, rows: Any, scale: Any, slope: Any, shift: Any) -> Any:
    return upstream * scale + rows * slope + shift


def per_replica_seed(seed: Any) -> Any:
    """Returns a different seed, integers [2], on each replica of a distribution strategy; the first keeps `seed`."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return seed
    replica = tf.cast(context.replica_id_in_sync_group, seed.dtype)
    return seed + tf.stack([replica * 0x3C6EF372, tf.zeros_like(replica)])  # far from the seeds that users choose
