"""Tests of the layers against naive loops."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_checks import assert_close, naive_channelwise

from x3d_tf.modeling import layers


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
