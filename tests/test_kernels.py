"""The TensorFlow kernels against naive loops and against their `keras.ops` twins."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_checks import assert_close, naive_channelwise

import x3d_tf
from x3d_tf.modeling import layers
from x3d_tf.modeling.kernels import tensorflow as kernels

CASES = [  # T, H, W, kernel, stride
    (4, 6, 8, (3, 3, 3), 1),
    (4, 6, 8, (3, 3, 3), 2),
    (3, 5, 7, (3, 3, 3), 1),
    (3, 5, 7, (3, 3, 3), 2),
    (2, 5, 6, (3, 3, 3), 2),
    (1, 4, 5, (3, 3, 3), 1),
    (1, 7, 6, (3, 3, 3), 2),
    (6, 4, 5, (5, 1, 1), 1),
    (2, 3, 3, (5, 1, 1), 1),
    (1, 3, 2, (5, 1, 1), 1),
    (4, 4, 5, (5, 3, 3), 1),
    (2, 6, 7, (3, 3, 3), 3),
    (3, 6, 7, (5, 5, 5), 2),
    (3, 2, 1, (3, 5, 5), 2),
    (2, 4, 5, (3, 5, 5), 1),
]


@pytest.mark.parametrize(("t", "h", "w", "kernel_size", "stride"), CASES)
@pytest.mark.parametrize("shapes", ["static", "open"])
@pytest.mark.parametrize(
    "form",
    [kernels.channelwise_conv3d, layers.depthwise_taps, layers.multiply_adds],
    ids=["tensorflow", "taps", "multiply-adds"],
)
def test_channelwise_convolution(
    t: int, h: int, w: int, kernel_size: tuple[int, int, int], stride: int, shapes: str, form: Any
) -> None:
    draw = np.random.default_rng(0)
    x, kernel = draw.standard_normal((2, t, h, w, 3)), draw.standard_normal((*kernel_size, 3))
    upstream = draw.standard_normal((2, t, -(-h // stride), -(-w // stride), 3))
    expected, x_gradient, kernel_gradient = naive_channelwise(x, kernel, stride, upstream)
    signature = tf.TensorSpec(x.shape if shapes == "static" else (None, None, None, None, 3), tf.float32)

    @tf.function(input_signature=[signature, tf.TensorSpec(kernel.shape, tf.float32)])
    def run(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = form(x, kernel, stride)
            loss = tf.reduce_sum(y * upstream.astype("float32"))
        return y, *tape.gradient(loss, [x, kernel])

    for actual, reference in zip(
        run(x.astype("float32"), kernel.astype("float32")), (expected, x_gradient, kernel_gradient)
    ):
        assert_close(actual, reference)


def test_the_gradient_of_one_clip_ignores_uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At stride 2, TensorFlow's kernel gradient of zero frames is uninitialized memory."""
    original = tf.nn.depthwise_conv2d_backprop_filter

    def with_nan(frames: Any, shape: Any, *rest: Any) -> Any:
        return original(frames, shape, *rest) if frames.shape[0] else tf.fill(shape, np.nan)

    monkeypatch.setattr(tf.nn, "depthwise_conv2d_backprop_filter", with_nan)
    kernel = tf.ones((3, 3, 3, 2))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        y = kernels.channelwise_conv3d(tf.ones((1, 4, 6, 6, 2)), kernel, 2)
    assert np.isfinite(tape.gradient(y, kernel)).all()


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("shapes", ["static", "open"])
@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("form", [kernels.pointwise_conv3d, layers.pointwise_conv3d], ids=["tensorflow", "keras.ops"])
def test_strided_pointwise_convolution(side: int, shapes: str, channels: int, form: Any) -> None:
    draw = np.random.default_rng(0)
    x, kernel = draw.standard_normal((2, 3, side, side, channels)), draw.standard_normal((channels, 5))
    picked = x[:, :, ::2, ::2]
    upstream = draw.standard_normal((*picked.shape[:4], 5))
    x_gradient = np.zeros_like(x)
    x_gradient[:, :, ::2, ::2] = upstream @ kernel.T
    signature = tf.TensorSpec(x.shape if shapes == "static" else (None, None, None, None, channels), tf.float32)

    @tf.function(input_signature=[signature, tf.TensorSpec(kernel.shape, tf.float32)])
    def run(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = form(x, kernel, 2)
            loss = tf.reduce_sum(y * upstream.astype("float32"))
        return y, *tape.gradient(loss, [x, kernel])

    expected = (picked @ kernel, x_gradient, np.einsum("nthwc,nthwd->cd", picked, upstream))
    for actual, reference in zip(run(x.astype("float32"), kernel.astype("float32")), expected):
        assert_close(actual, reference)


@pytest.mark.parametrize("channels", [8, 12])
def test_the_gradient_of_a_narrow_strided_convolution_stays_within_its_memory(channels: int) -> None:
    """oneDNN's kernel crashes the process for such widths; see `kernels.pointwise_conv3d`."""
    x, kernel = tf.random.stateless_normal((32, 1, 112, 112, channels), (0, 0)), tf.ones((channels, 24))

    @tf.function
    def gradient(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = kernels.pointwise_conv3d(x, kernel, 2)
        return tape.gradient(y, kernel)

    for _ in range(3):
        actual = gradient(x, kernel)
    sums = x.numpy()[:, :, ::2, ::2].sum((0, 1, 2, 3), dtype="float64")
    np.testing.assert_allclose(actual, np.tile(sums[:, None], 24), rtol=1e-3, atol=0.5)


def test_batch_norm_gradients_equal_automatic_ones(float64: None) -> None:
    draw = np.random.default_rng(0)
    rows, upstream = (tf.constant(draw.standard_normal((2, 4, 10, 6)) * 2 + 1) for _ in range(2))
    gamma, beta = (tf.constant(draw.standard_normal(6)) for _ in range(2))
    results = []
    for form in (kernels.normalize, layers.normalize):
        with tf.GradientTape() as tape:
            tape.watch([rows, gamma, beta])
            (y,), mean, variance = form([rows], gamma, beta, 1e-5)
            loss = tf.reduce_sum(y * upstream)
        results.append([y, mean, variance, *tape.gradient(loss, [rows, gamma, beta])])
    for fast, plain in zip(*results):
        assert_close(fast, plain, 1e-12)


def test_statistics_are_exact_far_from_zero() -> None:
    rows = (1000 + np.random.default_rng(0).standard_normal((1, 16, 256, 3))).astype("float32")
    (y,), _, variance = kernels.normalize([tf.constant(rows)], tf.ones(3), tf.zeros(3), 1e-5)
    assert_close(variance[0, 0, 0], rows.astype("float64").var(axis=(0, 1, 2)), 1e-3)
    assert_close(np.std(y, axis=(1, 2)), np.ones((1, 3)), 1e-3)


@pytest.mark.parametrize("chosen", ["ops", "cpu", "gpu"], indirect=True)
def test_all_kernels_compute_the_same(chosen: None) -> None:
    keras.utils.set_random_seed(0)
    parts = [
        layers.ChannelwiseConv3D((3, 3, 3), 2),
        layers.GhostBatchNorm(2),
        layers.Swish(),
        layers.PointwiseConv3D(5),
    ]
    network = keras.Sequential(parts)
    x = tf.constant(np.random.default_rng(0).standard_normal((4, 3, 6, 6, 4)), tf.float32)
    network(x)
    for weight in network.trainable_variables:
        weight.assign(np.random.default_rng(1).standard_normal(weight.shape))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = network(x, training=True)
        loss = tf.reduce_sum(y**2)
    results = [y, *tape.gradient(loss, [x, *(weight.value for weight in network.trainable_variables)])]
    for found, expected in zip(results, _reference(network, x)):
        assert_close(found, expected)


def _reference(network: keras.Sequential, x: Any) -> list[Any]:
    """Computes the same with elementary operations and automatic gradients."""
    values = [tf.constant(weight.numpy()) for weight in network.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch([x, *values])
        kernel, gamma, beta, matrix = values
        padded = tf.pad(x, [[0, 0], *[[1, 1]] * 3, [0, 0]])
        y = sum(padded[:, a : a + 3, b : b + 5 : 2, c : c + 5 : 2] * kernel[a, b, c] for a, b, c in np.ndindex(3, 3, 3))
        groups = [
            (part - tf.reduce_mean(part, [0, 1, 2, 3])) / tf.sqrt(tf.math.reduce_variance(part, [0, 1, 2, 3]) + 1e-5)
            for part in tf.split(y, 2)
        ]
        y = tf.concat(groups, 0) * gamma + beta
        y = tf.matmul(y * tf.sigmoid(y), matrix)
        loss = tf.reduce_sum(y**2)
    return [y, *tape.gradient(loss, [x, *values])]


@pytest.mark.parametrize("name", ["tpu", "CPU", ""])
def test_unknown_kernels_are_rejected(name: Any) -> None:
    with pytest.raises(ValueError, match=f"kernels must be one of auto, ops, cpu, gpu, got '{name}'"):
        x3d_tf.set_kernels(name)


def test_many_shapes_cause_no_warning_about_retracing(caplog: pytest.LogCaptureFixture) -> None:
    """A network has a channel-wise convolution of each of ten shapes, and users call it outside of a tf.function."""
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for channels in range(1, 11):
            kernels.channelwise_conv3d(tf.zeros((1, 2, 4, 4, channels)), tf.zeros((3, 3, 3, channels)), 1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text
