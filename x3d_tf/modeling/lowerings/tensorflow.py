"""The layers' arithmetic in the TensorFlow operations that are fast: the same values as their `keras.ops` twins.

TensorFlow has no channel-wise 3-D convolution, and the gradient of its batch norm passes over memory many times. Both
decide the speed of X3D, so they are written out here; `layers` chooses between these forms and the portable ones.
"""

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from x3d_tf._checks import require


def channelwise_conv3d(x: Any, kernel: Any, stride: int) -> Any:
    """Convolves each channel on its own over time and space, padded by half the kernel on every side.

    A depthwise 2-D convolution for each temporal tap of the kernel, whose results are shifted in time and added. The
    shift works on rank 3 by slice and pad, for the gradient of strided slices is slow.

    Args:
        x: (N, T, H, W, C), any of the first four open.
        kernel: (kt, kh, kw, C), odd sizes.
        stride: of both spatial axes.

    Returns:
        (N, T, ceil(H / stride), ceil(W / stride), C).
    """
    if kernel.shape[1] == kernel.shape[2] == 1 and stride == 1:
        return _temporal_conv(x, kernel)
    n, t, h, w, c = _shape(x)
    taps = kernel.shape[0]
    frames = tf.reshape(x, [n * t, h, w, c])
    padding = "SAME"
    if stride > 1:  # TensorFlow's own padding would be unequal on even sizes
        ph, pw = kernel.shape[1] // 2, kernel.shape[2] // 2
        frames, padding = tf.pad(frames, [[0, 0], [ph, ph], [pw, pw], [0, 0]]), "VALID"
    total = None
    for tap in range(taps):
        shift = taps // 2 - tap  # frames by which this tap's result moves forward
        if isinstance(t, int) and abs(shift) >= t:
            continue
        y = tf.nn.depthwise_conv2d(frames, kernel[tap, :, :, :, None], [1, stride, stride, 1], padding)
        _, out_h, out_w, _ = _shape(y)
        y = _shifted(tf.reshape(y, [n, t, out_h * out_w * c]), shift)
        total = y if total is None else total + y
    output = tf.reshape(total, [n, t, out_h, out_w, c])
    return tf.ensure_shape(output, [*x.shape[:2], _static(out_h), _static(out_w), c])


def _temporal_conv(x: Any, kernel: Any) -> Any:
    n, t, h, w, c = _shape(x)
    y = tf.nn.depthwise_conv2d(tf.reshape(x, [n, t, h * w, c]), kernel[:, 0, :, :, None], [1, 1, 1, 1], "SAME")
    return tf.ensure_shape(tf.reshape(y, [n, t, h, w, c]), x.shape)


def _shifted(rows: Any, shift: int) -> Any:
    """Rows (N, T, ...) moved `shift` frames forward in time, zeros coming in."""
    if shift == 0:
        return rows
    frames = _shape(rows)[1]
    kept = frames - abs(shift) if isinstance(frames, int) else tf.maximum(frames - abs(shift), 0)
    missing = frames - kept
    begin, pad = (0, [missing, 0]) if shift > 0 else (missing, [0, missing])
    return tf.pad(tf.slice(rows, [0, begin, 0], [-1, kept, -1]), [[0, 0], pad, [0, 0]])


def _shape(x: Any) -> list[Any]:
    dynamic = tf.shape(x)
    return [size if size is not None else dynamic[axis] for axis, size in enumerate(x.shape)]


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def normalize(rows: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """Batch norm of each group with its own statistics.

    Args:
        rows: (groups, samples, C).
        gamma, beta: (C,).
        epsilon: added to the variance.

    Returns:
        The normalised rows, and each group's mean and biased variance, (groups, 1, C), through which no gradient flows.
    """

    @tf.custom_gradient
    def run(rows: Any, gamma: Any, beta: Any) -> tuple[tuple[Any, Any, Any], Callable[..., Any]]:
        mean = _mean(rows)
        variance = _mean(_centred_square(rows, mean))
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = inverse * gamma
        output = _affine(rows, scale, beta - mean * scale)

        def gradient(upstream: Any, *unused: Any) -> tuple[Any, Any, Any]:
            mean_upstream = _mean(upstream)
            # of upstream times the normalised value, which is not kept: it is (rows - mean) * inverse
            mean_product = (_mean(_product(upstream, rows, mean))) * inverse
            samples = tf.cast(tf.shape(rows)[1], rows.dtype)
            slope = -scale * inverse * mean_product
            rows_gradient = _affine2(upstream, rows, scale, slope, -scale * mean_upstream - slope * mean)
            gamma_gradient = tf.reduce_sum(mean_product, [0, 1]) * samples
            return rows_gradient, gamma_gradient, tf.reduce_sum(mean_upstream, [0, 1]) * samples

        return (output, mean, variance), gradient

    # not variables, which a custom gradient refuses
    output, mean, variance = run(rows, tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta))
    return output, tf.stop_gradient(mean), tf.stop_gradient(variance)


def clip_by_clip(network: Callable[[Any], Any], chains: int | None = None) -> Callable[[Any], Any]:
    """Makes a function of one clip one of many, which runs several of them side by side.

    On a CPU the operations of one clip are too small to gain from a second thread, and a whole batch does not fit its
    caches. Clips that need not wait for each other keep each core busy with data of its own. They run side by side
    inside a `tf.function` only.

    Args:
        network: from clips (1, T, H, W, 3) to float32 (1, classes).
        chains: clips that run at a time, fixed when the function is traced; as many as there are cores unless given.

    Returns:
        The function from clips (N, T, H, W, 3) to float32 (N, classes), of any N, static or open.

    Raises:
        ValueError: `chains` below 1.
    """
    require(chains is None or chains >= 1, "chains", "be at least 1", chains)

    def call(clips: Any) -> Any:
        if clips.shape[0] == 1:
            return network(clips)
        return tf.map_fn(
            lambda clip: network(clip[None])[0],
            clips,
            parallel_iterations=chains or _cores(),
            fn_output_signature=tf.float32,
        )

    return call


def for_this_device(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of any number of clips in its fast form: `clip_by_clip` on CPUs, itself on GPUs."""
    return network if _on_gpu() else clip_by_clip(network)


def _cores() -> int:
    """How many operations TensorFlow runs at a time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1


def seed_of_device(seed: Any) -> Any:
    """A seed, integers [2], made another one on each device of a distribution strategy; the first keeps it."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return seed
    device = tf.cast(context.replica_id_in_sync_group, seed.dtype)
    return seed + tf.stack([device * 0x3C6EF372, tf.zeros_like(device)])  # far from the seeds that people choose


def _on_gpu() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _mean(rows: Any) -> Any:
    """Mean over axis 1, kept: on a CPU as a product with a vector, which is faster than TensorFlow's reduction."""
    if _on_gpu():  # whose matrix products round to 10 bits
        return tf.reduce_mean(rows, axis=1, keepdims=True)
    samples = tf.shape(rows)[1]
    weights = tf.fill([tf.shape(rows)[0], 1, samples], tf.cast(1, rows.dtype) / tf.cast(samples, rows.dtype))
    return tf.matmul(weights, rows)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a CPU one compiled pass over memory instead of one for each operation."""
    compiled = tf.function(function, jit_compile=True)

    def call(*arguments: Any) -> Any:
        return (function if _on_gpu() else compiled)(*arguments)

    return call


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
