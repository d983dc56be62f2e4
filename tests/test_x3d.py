from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import x3d_tf
from x3d_tf import VARIANTS, X3D, Expansion, ModelOptions, build_x3d, cost
from x3d_tf.errors import UserError
from x3d_tf.modeling.folded import fold
from x3d_tf.modeling.layers import ChannelwiseConv3D
from x3d_tf.modeling.portable import portable

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.2)  # one block per stage


def clips(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# Building a deep network takes seconds, and all follow from the factors in the same way: two in the default run.
_BUILT = [pytest.param(name, marks=() if name in ("x2d", "x3d_s") else pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("name", _BUILT)
def test_parameters_and_shapes_of_the_variants(name: str) -> None:
    model = build_x3d(name)
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == cost(name).params
    clip = VARIANTS[name].expansion.clip
    sides = {
        112: [56, 28, 14, 7, 4, 4],
        160: [80, 40, 20, 10, 5, 5],
        224: [112, 56, 28, 14, 7, 7],
        312: [156, 78, 39, 20, 10, 10],
    }[clip.size]
    stages = ["conv1", "res2", "res3", "res4", "res5", "conv5"]
    features = keras.Model(model.input, [model.get_layer(stage).output for stage in stages])
    shapes = features.compute_output_shape((1, clip.frames, clip.size, clip.size, 3))
    assert [shape[1:4] for shape in shapes] == [(clip.frames, side, side) for side in sides]


def test_keras_counts_moving_statistics_too() -> None:
    assert build_x3d("x3d_m").count_params() == 3_825_786


@pytest.mark.parametrize(
    "options",
    [
        {"stem_kernel": 3},
        {"se": "all"},
        {"input": "difference"},
        {"se": "none"},
        {"separable": False},
        {"shortcut_norm": "on_width_change"},
        {"swish": False, "swish_before": True},
    ],
    ids=str,
)
def test_cost_matches_the_network_for_every_option(options: dict[str, Any]) -> None:
    expansion = Expansion(gamma_t=2, gamma_w=1.5, gamma_b=2.25, gamma_d=0.4)
    model = build_x3d(expansion, num_classes=5, options=ModelOptions(**options))
    count = cost(expansion, num_classes=5, options=ModelOptions(**options))
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == count.params
    assert model(clips(1, 2, 33, 40)).shape == (1, 5)


def test_difference_input_subtracts_consecutive_frames() -> None:
    """Differences are in units of the normalized input, and zero for a still image."""
    options = ModelOptions(input="difference")
    model = build_x3d(Expansion(gamma_t=3, gamma_d=0.2), num_classes=2, options=options)
    differences = keras.Model(model.input, model.get_layer("conv1_xy").input)
    clip = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(differences(clip), (clip[:, 1:] - clip[:, :-1]) / (0.225 * 255), atol=1e-5)
    assert not np.asarray(differences(np.repeat(clip[:, :1], 3, axis=1))).any()
    with pytest.raises(ValueError, match="gamma_t must be at least 2 if ModelOptions"):
        build_x3d(Expansion(gamma_t=1), options=options)


def test_a_new_block_equals_its_shortcut() -> None:
    model = build_x3d(Expansion(gamma_d=2 / 5), num_classes=3)  # two blocks in res4
    shortcut = model.get_layer("res4_0_shortcut_bn").output
    outputs = [shortcut, *(model.get_layer(name).output for name in ("res4_0", "res4"))]
    projected, first, second = keras.Model(model.input, outputs)(clips(1, 2, 64, 64))
    np.testing.assert_array_equal(first, np.maximum(projected, 0))
    np.testing.assert_array_equal(second, first)


def test_initial_weights_have_the_published_standard_deviation() -> None:
    model = build_x3d("x3d_s", num_classes=400)
    spread = {
        "conv1_xy": np.sqrt(2 / (24 * 9)),
        "res4_1_conv_a": np.sqrt(2 / 216),
        "res4_1_conv_b": np.sqrt(2 / (216 * 27)),
        "fc1": 0.03125,
        "fc2": 0.01,
    }
    for name, expected in spread.items():
        kernel = np.asarray(model.get_layer(name).kernel)
        assert np.std(kernel) == pytest.approx(expected, rel=0.12), name
    assert not np.asarray(model.get_layer("fc2").bias).any()
    assert not np.asarray(model.get_layer("res4_1_conv_c_bn").gamma).any()
    assert np.asarray(model.get_layer("res4_0_shortcut_bn").gamma).all()


def test_integer_and_float_inputs_are_equivalent() -> None:
    model = build_x3d(TINY, num_classes=3)
    batch = clips(2, 4, 64, 64)
    np.testing.assert_array_equal(model(batch), model(batch.astype("float32")))
    assert np.abs(np.asarray(model(batch + 0.5)) - np.asarray(model(batch))).max() > 0  # fractions are kept


def test_without_top_the_output_is_pool5() -> None:
    model = build_x3d(TINY, num_classes=3, include_top=False)
    assert model(clips(2, 4, 64, 64)).shape == (2, 432)
    assert [layer.name for layer in model.layers if layer.name in ("fc1", "fc2")] == []


def test_poolings_agree_at_the_training_crop() -> None:
    batch, outputs = clips(1, 4, 64, 64), []
    pools: tuple[Any, ...] = ("global", "fixed_probabilities", "fixed_logits")
    models = [build_x3d(TINY, 3, options=ModelOptions(head_pool=pool)) for pool in pools]
    for model in models:
        model.set_weights(models[0].get_weights())
        outputs.append(keras.ops.softmax(model(batch)))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-6)


def _naive_head(model: X3D, maps: np.ndarray, window: int, pool: str) -> np.ndarray:
    """Computes logits from conv5's maps (N, T, H, W, C) by a loop over clips and windows, in double precision."""
    fc1, fc2 = ([np.asarray(weight, np.float64) for weight in model.get_layer(name).weights] for name in ("fc1", "fc2"))
    rows = []
    for clip in maps.astype(np.float64):
        outputs = []
        for top in range(clip.shape[1] - window + 1):
            for left in range(clip.shape[2] - window + 1):
                pooled = clip[:, top : top + window, left : left + window].mean((0, 1, 2))
                logits = np.maximum(pooled @ fc1[0], 0) @ fc2[0] + fc2[1]
                if pool == "fixed_logits":
                    outputs.append(logits)
                elif model.activation == "sigmoid":
                    outputs.append(1 / (1 + np.exp(-logits)))
                else:
                    outputs.append(np.exp(logits) / np.exp(logits).sum())
        mean = np.mean(outputs, axis=0)
        if pool == "fixed_probabilities":
            mean = np.log(mean / (1 - mean)) if model.activation == "sigmoid" else np.log(mean)
        rows.append(mean)
    return np.array(rows)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pool", ["fixed_probabilities", "fixed_logits"])
def test_fixed_poolings_equal_a_loop_over_windows(pool: Any, activation: Any) -> None:
    model = build_x3d(TINY, 4, activation=activation, options=ModelOptions(head_pool=pool))
    fc2 = model.get_layer("fc2")
    fc2.kernel.assign(np.random.default_rng(0).normal(0, 0.5, fc2.kernel.shape))  # large enough for windows to disagree
    fc2.bias.assign([20.0, 1.0, -1.0, -30.0])  # classes near probability 1 and 0
    batch = clips(2, 4, 128, 96)
    maps = keras.Model(model.input, model.get_layer("conv5").output)(batch)
    assert maps.shape[2:4] == (4, 3)
    expected = _naive_head(model, np.asarray(maps), 2, pool)
    np.testing.assert_allclose(model(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("single_label", "softmax")),
        ({"task": "multi_label"}, ("multi_label", "sigmoid")),
        ({"activation": "sigmoid"}, ("multi_label", "sigmoid")),
        ({"task": "my_task"}, ("my_task", "softmax")),
        ({"task": "my_task", "activation": "sigmoid"}, ("my_task", "sigmoid")),
    ],
)
def test_task_and_activation_imply_each_other(given: dict[str, Any], expected: tuple[str, str]) -> None:
    model = build_x3d(TINY, 4, **given)
    assert (model.task, model.activation) == expected
    again = X3D.from_config(model.get_config())
    assert (again.task, again.activation) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "multi_label", "activation": "softmax"}, "activation must be 'sigmoid' for the task multi_label"),
        ({"task": "single_label", "activation": "sigmoid"}, "activation must be 'softmax' for the task single_label"),
        ({"task": "detection"}, "task must fit a network that classifies clips, got 'detection'"),
        ({"activation": ""}, "activation must be one of softmax, sigmoid, got ''"),
    ],
)
def test_contradictions_of_task_and_activation_are_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_x3d(TINY, 4, **given)


def test_confident_multi_label_windows_keep_their_probability() -> None:
    model = build_x3d(TINY, 4, activation="sigmoid", options=ModelOptions(head_pool="fixed_probabilities"))
    model.get_layer("fc2").bias.assign([4.6] * 4)
    np.testing.assert_allclose(keras.ops.sigmoid(model(clips(1, 4, 96, 96))), 0.99, atol=0.01)


@pytest.mark.parametrize("pool", ["fixed_probabilities", "fixed_logits"])
def test_clips_smaller_than_the_windows_are_rejected(pool: Any) -> None:
    rule = rf'at least 33 pixels if ModelOptions.head_pool is "{pool}", .* of the training crop of 64 pixels'
    options = ModelOptions(head_pool=pool)
    model = build_x3d(TINY, 3, options=options)
    for sides in ((32, 32), (64, 32), (16, 64)):
        with pytest.raises(ValueError, match=rf"{rule}, got {min(sides)}"):
            model(clips(1, 4, *sides))
    for size in (16, 32):
        with pytest.raises(ValueError, match=rf"{rule}, got {size}"):
            portable(model, list("abc"), size=size)
        with pytest.raises(ValueError, match=rf"{rule}, got {size}"):
            fold(model, size=size)
    open_sizes = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, None, 3))])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)at least 33 pixels .*crop of 64 pixels.*\[32 64\]"):
        open_sizes(clips(1, 4, 32, 64).astype("float32"))
    assert np.isfinite(open_sizes(clips(1, 4, 64, 33).astype("float32"))).all()
    assert np.isfinite(model(clips(1, 4, 33, 64))).all()
    build_x3d(TINY, 3, include_top=False, options=options)(clips(1, 4, 32, 32))


def test_drop_connect_keeps_the_mean_and_drops_complete_clips() -> None:
    model = build_x3d(TINY, 3, options=ModelOptions(drop_connect=0.5))
    drop = model.get_layer("res5_0_drop")
    kept = np.asarray(drop(np.ones((4000, 1, 2, 2, 3), "float32"), training=True))
    assert set(np.unique(kept)) == {0.0, 2.0}
    assert (kept.reshape(4000, -1).std(axis=1) == 0).all()
    assert kept.mean() == pytest.approx(1, abs=0.1)
    assert model.get_layer("res2_0_drop").rate == pytest.approx(0.2)
    np.testing.assert_array_equal(drop(np.ones((4, 1, 2, 2, 3))), np.ones((4, 1, 2, 2, 3)))


def test_config_round_trip() -> None:
    model = build_x3d(TINY, 3, include_top=False, options=ModelOptions(se="all", stem_kernel=3))
    again = X3D.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert [weight.shape for weight in again.weights] == [weight.shape for weight in model.weights]


def test_static_and_open_sizes_agree() -> None:
    model = build_x3d(TINY, num_classes=3)
    batch = clips(2, 4, 50, 64).astype("float32")
    open_sizes = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, None, 3))])
    np.testing.assert_allclose(open_sizes(batch), model(batch), atol=1e-6)


def test_channelwise_layers_match_the_paper() -> None:
    layers = [layer for layer in build_x3d("x3d_xs").layers if isinstance(layer, ChannelwiseConv3D)]
    assert [layer.kernel_size for layer in layers] == [(5, 1, 1)] + [(3, 3, 3)] * 26
    assert [layer.name for layer in layers if layer.stride == 2] == [f"res{stage}_0_conv_b" for stage in (2, 3, 4, 5)]


@pytest.mark.parametrize("run_eagerly", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_keras_fit_trains_the_network(run_eagerly: bool, request: pytest.FixtureRequest) -> None:
    """Runs eagerly by default, because compiling the step takes most of the time."""
    if run_eagerly:
        request.getfixturevalue("uncompiled")
    keras.utils.set_random_seed(0)
    model = build_x3d(TINY, num_classes=2, options=ModelOptions(dropout=0.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.03, momentum=0.9), loss, run_eagerly=run_eagerly)
    batch = np.stack([np.zeros((4, 32, 32, 3)), np.full((4, 32, 32, 3), 255)] * 2).astype("float32")
    history = model.fit(batch, np.array([0, 1, 0, 1]), batch_size=4, epochs=3, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("num_classes", "message"),
    [
        ("3", "num_classes must be an integer, got '3'"),
        (3.0, "num_classes must be an integer, got 3.0"),
        (None, "num_classes must be an integer, got None"),
        (True, "num_classes must be an integer, got True"),
        (0, r"num_classes must be in \[1, 100000\], got 0"),
    ],
)
def test_invalid_numbers_of_classes_are_named(num_classes: Any, message: str) -> None:
    for build in (x3d_tf.build_x3d, x3d_tf.build_detector, x3d_tf.cost):
        with pytest.raises(ValueError, match=f"^{message}$"):
            build("x3d_xs", num_classes=num_classes)
