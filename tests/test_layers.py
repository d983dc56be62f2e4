"""Tests of the layers against naive loops, and of the TensorFlow kernels against the portable ones."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import x3d_tf
from x3d_tf import parallel
from x3d_tf.modeling import layers
from x3d_tf.modeling.kernels import tensorflow as kernels

TOLERANCE = 1e-5


def naive_channelwise(x: np.ndarray, kernel: np.ndarray, stride: int, upstream: np.ndarray | None = None) -> Any:
    """Computes the convolution, and with `upstream` the gradients of sum(upstream * convolution), by naive loops."""
    kt, kh, kw, _ = kernel.shape
    padded = np.pad(x, [(0, 0), (kt // 2,) * 2, (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)])
    n, t, h, w, c = x.shape
    y = np.zeros((n, t, -(-h // stride), -(-w // stride), c))
    x_gradient, kernel_gradient = np.zeros_like(padded), np.zeros_like(kernel)
    for i, ti, hi, wi in np.ndindex(y.shape[:4]):
        for a, b, d in np.ndindex(kt, kh, kw):
            position = (i, ti + a, hi * stride + b, wi * stride + d)
            y[i, ti, hi, wi] += padded[position] * kernel[a, b, d]
            if upstream is not None:
                x_gradient[position] += upstream[i, ti, hi, wi] * kernel[a, b, d]
                kernel_gradient[a, b, d] += upstream[i, ti, hi, wi] * padded[position]
    if upstream is None:
        return y
    x_gradient = x_gradient[:, kt // 2 : kt // 2 + t, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w]
    return y, x_gradient, kernel_gradient


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


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
]


@pytest.mark.parametrize(("t", "h", "w", "kernel_size", "stride"), CASES)
@pytest.mark.parametrize("shapes", ["static", "open"])
@pytest.mark.parametrize(
    "form", [kernels.channelwise_conv3d, layers.channelwise_conv3d], ids=["tensorflow", "keras.ops"]
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


@pytest.mark.parametrize(("kernel_size", "stride"), [((1, 3, 3), 2), ((1, 3, 3), 1), ((3, 1, 1), 1)])
@pytest.mark.parametrize("side", [6, 7])
def test_dense_convolution(kernel_size: tuple[int, int, int], stride: int, side: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, side, side + 1, 3)).astype("float32")
    layer = layers.Conv3D(5, kernel_size, stride)
    actual = layer(x)
    kernel = np.asarray(layer.kernel)
    # A dense convolution is the sum of channel-wise ones over the input channels.
    expected = np.stack(
        [naive_channelwise(x, kernel[..., output], stride).sum(axis=-1) for output in range(5)],
        axis=-1,
    )
    assert_close(actual, expected)
    assert layer.compute_output_shape(x.shape) == expected.shape


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("shapes", ["static", "open"])
@pytest.mark.parametrize("form", [kernels.pointwise_conv3d, layers.pointwise_conv3d], ids=["tensorflow", "keras.ops"])
def test_strided_pointwise_convolution(side: int, shapes: str, form: Any) -> None:
    draw = np.random.default_rng(0)
    x, kernel = draw.standard_normal((2, 3, side, side, 4)), draw.standard_normal((4, 5))
    picked = x[:, :, ::2, ::2]
    upstream = draw.standard_normal((*picked.shape[:4], 5))
    x_gradient = np.zeros_like(x)
    x_gradient[:, :, ::2, ::2] = upstream @ kernel.T
    signature = tf.TensorSpec(x.shape if shapes == "static" else (None, None, None, None, 4), tf.float32)

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


@pytest.mark.parametrize("side", [6, 7])
def test_pointwise_layer(side: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, side, side, 4)).astype("float32")
    layer = layers.PointwiseConv3D(5, stride=2)
    assert_close(layer(x), x[:, :, ::2, ::2] @ np.asarray(layer.kernel))
    assert layer.compute_output_shape(x.shape) == (2, 3, -(-side // 2), -(-side // 2), 5)


def test_swish_and_its_gradient() -> None:
    x, upstream = np.random.default_rng(0).normal(0, 4, (2, 3, 50))
    gate = 1 / (1 + np.exp(-x))
    with tf.GradientTape() as tape:
        inputs = tf.constant(x, tf.float32)
        tape.watch(inputs)
        y = layers.Swish()(inputs)
    assert_close(y, x * gate)
    assert_close(tape.gradient(y, inputs, tf.constant(upstream, tf.float32)), upstream * (gate + x * gate * (1 - gate)))


def test_initialization_uses_the_full_fan_out() -> None:
    layer = layers.ChannelwiseConv3D((3, 3, 3))
    layer.build((None, None, None, None, 54))
    many = layers.ChannelwiseConv3D((5, 1, 1))
    many.build((None, None, None, None, 24 * 100))
    assert np.std(np.asarray(layer.kernel)) == pytest.approx(np.sqrt(2 / (54 * 27)), rel=0.1)  # 0.0370
    assert np.std(np.asarray(many.kernel)) == pytest.approx(np.sqrt(2 / (2400 * 5)), rel=0.05)
    assert np.abs(np.asarray(many.kernel)).max() > 2.5 * np.sqrt(2 / (2400 * 5))  # not truncated


def naive_batch_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns output, mean and unbiased variance of one group."""
    mean, variance = x.mean(axis=(0, 1, 2, 3)), x.var(axis=(0, 1, 2, 3))
    samples = x.size // x.shape[-1]
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta, mean, variance * samples / (samples - 1)


def ghost_norm(group: int, x: np.ndarray) -> layers.GhostBatchNorm:
    layer = layers.GhostBatchNorm(group)
    layer.build(x.shape)
    draw = np.random.default_rng(1)
    layer.gamma.assign(draw.random(x.shape[-1]) + 0.5)
    layer.beta.assign(draw.standard_normal(x.shape[-1]))
    return layer


@pytest.mark.parametrize(("batch", "group"), [(4, 8), (4, 4), (8, 4), (12, 4)])
def test_ghost_batch_norm_equals_batch_norm_of_each_group(batch: int, group: int) -> None:
    x = 3 + 2 * np.random.default_rng(0).standard_normal((batch, 2, 3, 4, 5)).astype("float32")
    layer = ghost_norm(group, x)
    gamma, beta = np.asarray(layer.gamma), np.asarray(layer.beta)
    parts = [naive_batch_norm(part, gamma, beta) for part in np.split(x, max(1, batch // group))]
    assert_close(layer(x, training=True), np.concatenate([part[0] for part in parts]))
    assert_close(layer.moving_mean, 0.1 * np.mean([part[1] for part in parts], axis=0))
    assert_close(layer.moving_variance, 0.9 + 0.1 * np.mean([part[2] for part in parts], axis=0))
    moved = (x - np.asarray(layer.moving_mean)) / np.sqrt(np.asarray(layer.moving_variance) + 1e-5) * gamma + beta
    assert_close(layer(x), moved)


def test_two_groups_are_the_mean_of_two_runs() -> None:
    x = np.random.default_rng(0).standard_normal((16, 2, 3, 3, 4)).astype("float32")
    both, first, second = (ghost_norm(8, x) for _ in range(3))
    halves = [first(x[:8], training=True), second(x[8:], training=True)]
    assert_close(both(x, training=True), np.concatenate(halves))
    assert_close(both.moving_variance, (first.moving_variance + second.moving_variance) / 2)


def test_a_batch_that_is_not_a_multiple_of_the_group_is_rejected() -> None:
    with pytest.raises(ValueError, match="got 12 clips and bn_group 8"):
        layers.GhostBatchNorm(8)(np.zeros((12, 1, 2, 2, 3), "float32"), training=True)


def test_a_dynamic_batch_is_grouped() -> None:
    x = np.random.default_rng(0).standard_normal((16, 2, 3, 3, 4)).astype("float32")
    static, open_ = ghost_norm(8, x), ghost_norm(8, x)
    call = tf.function(lambda x: open_(x, training=True), input_signature=[tf.TensorSpec((None, 2, 3, 3, 4))])
    assert_close(call(x), static(x, training=True))


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


@pytest.mark.parametrize(
    "layer",
    [
        layers.PointwiseConv3D(4, 2),
        layers.Conv3D(4, (1, 3, 3), 2),
        layers.ChannelwiseConv3D((3, 3, 3), 2),
        layers.GhostBatchNorm(4, gamma_initializer="zeros"),
        layers.Swish(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_config_round_trip(layer: keras.Layer) -> None:
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dynamic", [False, True])
def test_clips_are_mapped_one_at_a_time(count: int, dynamic: bool) -> None:
    """The network accepts a single clip only, so the results prove that clips are processed one at a time."""
    clips = np.arange(count * 6, dtype="float32").reshape(count, 2, 3)
    network = lambda clip: tf.reduce_sum(tf.ensure_shape(clip, (1, 2, 3)) ** 2, axis=1)  # noqa: E731
    signature = tf.TensorSpec((None if dynamic else count, 2, 3), tf.float32)
    call = tf.function(parallel.map_clips_in_parallel(network, chains=3), input_signature=[signature])
    assert_close(call(clips), (clips**2).sum(1), 1e-3)
    assert call.get_concrete_function().structured_outputs.shape.as_list() == [None if dynamic else count, 3]
    loops = [op for op in call.get_concrete_function().graph.get_operations() if op.type.endswith("While")]
    assert [op.get_attr("parallel_iterations") for op in loops] == ([3] if dynamic or count > 1 else [])


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[None]:
    """Selects the kernels by name for one test."""
    x3d_tf.set_kernels(request.param)
    yield
    x3d_tf.set_kernels("auto")


@pytest.mark.parametrize(
    ("chosen", "shapes"), [("gpu", [(5, 2)]), ("ops", [(5, 2)]), ("cpu", [(1, 2)])], indirect=["chosen"]
)
def test_gpus_process_complete_batches(chosen: None, shapes: list[tuple[int, ...]]) -> None:
    input_shapes = []

    def network(clips: tf.Tensor) -> tf.Tensor:
        input_shapes.append(tuple(clips.shape))
        return 2 * clips

    assert_close(tf.function(parallel.optimize_for_device(network))(tf.ones((5, 2))), np.full((5, 2), 2), 0)
    assert input_shapes == shapes


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


def test_chains_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chains must be at least 1, got 0"):
        parallel.map_clips_in_parallel(tf.identity, chains=0)
