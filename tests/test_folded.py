"""Tests of the inference form: equal probabilities, folded batch norms, stock layers."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import x3d_tf
from x3d_tf.modeling.folded import fold
from x3d_tf.parallel import map_clips_in_parallel

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.4)  # res4 has two blocks


@functools.cache
def network(expansion: x3d_tf.Expansion = TINY, *, activation: Any = "softmax", **options: Any) -> x3d_tf.X3D:
    """Builds a network whose batch norms all differ from their initial values."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(expansion, num_classes=5, activation=activation, options=x3d_tf.ModelOptions(**options))
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if hasattr(layer, "moving_mean"):
            channels = layer.gamma.shape
            layer.set_weights(
                [draw.random(channels) + 0.5, *draw.normal(0, 0.3, (2, *channels)), draw.random(channels) + 0.5]
            )
    model.get_layer("fc2").kernel.assign(draw.normal(0, 0.1, model.get_layer("fc2").kernel.shape))
    return model


def clips(count: int, size: int = 64, frames: int = 4) -> np.ndarray:
    """Creates clips of random coloured squares of 16 pixels, different in each clip and frame."""
    squares = np.random.default_rng(1).integers(0, 256, (count, frames, 8, 8, 3), dtype=np.uint8)
    return squares.repeat(16, axis=2).repeat(16, axis=3)[:, :, :size, :size]


def probabilities(model: x3d_tf.X3D, clips: np.ndarray) -> np.ndarray:
    function = keras.ops.softmax if model.activation == "softmax" else keras.ops.sigmoid
    return np.asarray(function(model(clips)))


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, 1),
        ({}, None),
        ({"separable": False}, 2),
        ({"se": "none", "stem_kernel": 3, "activation": "sigmoid"}, None),
        ({"shortcut_norm": "on_width_change", "input": "difference"}, 1),
        ({"shortcut_norm": "on_width_change", "input": "difference"}, 2),
        ({"swish": False, "swish_before": True, "se": "all", "drop_connect": 0.5}, None),
        ({"swish": False, "swish_before": True, "se": "all", "drop_connect": 0.5}, 2),
    ],
    ids=str,
)
def test_probabilities_equal_the_trainable_networks(options: dict[str, Any], batch: int | None) -> None:
    model = network(**options)
    pixels = clips(batch or 3)
    expected = probabilities(model, pixels)
    assert batch == 1 or np.ptp(expected, axis=0).max() > 1e-4  # clips differ, so mixing them up would fail
    app = fold(model, batch=batch)
    np.testing.assert_allclose(app(pixels), expected, atol=1e-5)
    np.testing.assert_allclose(app(pixels.astype("float32")), expected, atol=1e-5)


def test_clips_in_parallel() -> None:
    model, pixels = network(), clips(8)
    expected = probabilities(model, pixels)
    signature = tf.TensorSpec((None, *pixels.shape[1:]), tf.uint8)
    call = tf.function(map_clips_in_parallel(fold(model, batch=1), chains=3), input_signature=[signature])
    for count in (1, 2, 3, 8):
        np.testing.assert_allclose(call(pixels[:count]), expected[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "activation"),
    [
        ("global", "softmax"),
        ("fixed_probabilities", "softmax"),
        ("fixed_logits", "softmax"),
        ("fixed_probabilities", "sigmoid"),
    ],
)
@pytest.mark.parametrize("size", [64, 81])
def test_all_poolings(pool: str, activation: str, size: int) -> None:
    model = network(head_pool=pool, activation=activation)
    np.testing.assert_allclose(fold(model, size=size)(clips(2, size)), probabilities(model, clips(2, size)), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames(frames: int) -> None:
    """The outer temporal taps then see mostly or only padding."""
    model = network(x3d_tf.Expansion(gamma_t=frames, gamma_s=64 / 112, gamma_d=0.2))
    pixels = clips(2, frames=frames)
    np.testing.assert_allclose(fold(model)(pixels), probabilities(model, pixels), atol=1e-5)


def test_only_stock_layers_without_batch_norm() -> None:
    app = fold(network())
    assert all(type(layer).__module__.startswith("keras.") for layer in app.layers)
    assert not any("Normalization" in type(layer).__name__ for layer in app.layers)
    assert app.input_shape == (None, 4, 64, 64, 3)
    assert fold(network(), batch=2).input_shape == (2, 4, 64, 64, 3)


def test_invalid_arguments_are_named() -> None:
    model = network()
    with pytest.raises(ValueError, match="must be a trainable network"):
        fold(x3d_tf.portable(model, list("abcde")))
    with pytest.raises(ValueError, match="must have its classifier"):
        fold(x3d_tf.build_x3d(TINY, include_top=False))
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        fold(model, batch=0)
