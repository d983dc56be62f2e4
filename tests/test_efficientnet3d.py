"""EfficientNet3D: its layers and costs against independent counts, one block against naive loops, and all its forms."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_checks import assert_close, naive_channelwise
from training_steps import batches, config_of, make

import x3d_tf
from x3d_tf import Expansion, ModelOptions, gin_config
from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.cost import layer_costs
from x3d_tf.modeling.expansion import EFFICIENTNETS, name_of
from x3d_tf.modeling.folded import fold
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.metadata import Metadata
from x3d_tf.modeling.pytorch.convert import export_checkpoint
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.training.transfer import load_pretrained

pytestmark = pytest.mark.usefixtures("uncompiled_module")

ROOT = Path(__file__).parents[1]
FAMILIES = ("efficientnet3d", "efficientnet3d_matched")
# Stages of one to two blocks: all kinds of blocks occur. Only conv5 of the first family is wide, 256 channels.
TINY = Expansion(gamma_tau=2, gamma_t=3, gamma_s=40 / 112, gamma_w=0.2, gamma_b=2.0, gamma_d=0.5)
NAMES = ("hug", "kick", "wave")


def options(family: str, **others: Any) -> ModelOptions:
    return ModelOptions(family=family, **others)  # type: ignore[arg-type]


@functools.cache
def network(family: str, **others: Any) -> x3d_tf.X3D:
    """Returns a tiny network with random weights, and the statistics of a batch: its outputs differ between clips."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(TINY, num_classes=3, options=options(family, **others))
    draw = np.random.default_rng(0)
    norms = [layer for layer in model.layers if isinstance(layer, GhostBatchNorm)]
    for norm in norms:
        norm.gamma.assign(draw.random(norm.gamma.shape) + 0.5)
        norm.beta.assign(draw.normal(0, 0.3, norm.beta.shape))
        norm.momentum = 0.0
    model(clips(4).astype("float32"), training=True)
    for norm in norms:
        norm.momentum = 0.9
    kernel = model.get_layer("fc2").kernel
    kernel.assign(draw.normal(0, 0.5, kernel.shape))
    return model


def clips(count: int) -> np.ndarray:
    squares = np.random.default_rng(1).integers(0, 256, (count, 3, 5, 5, 3), dtype=np.uint8)
    return squares.repeat(8, axis=2).repeat(8, axis=3)


def softmax(model: x3d_tf.X3D, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(keras.ops.softmax(model(pixels)))


# ---- Layers and costs


def round_to_eight(channels: float) -> int:
    """EfficientNet's rounding."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def naive_count(frames: int, side: int, width: float, depth: float, expansion: int, matched: bool) -> tuple[int, ...]:
    """Counts multiply-adds, parameters, and parameters as the paper counts them, with 400 classes, by plain loops."""
    macs, params, params_paper = 0, 0, 0

    def layer(positions: int, inputs: int, outputs: int, norm: bool = True, bias: int = 0, printed: int = 0) -> None:
        nonlocal macs, params, params_paper
        macs += positions * inputs * outputs
        params += inputs * outputs + 2 * outputs * norm + bias
        params_paper += inputs * outputs + printed

    channels, side = round_to_eight(32 * width), math.ceil(side / 2)
    layer(frames * side**2, 3 * 3 * 3, channels, norm=False)
    layer(frames * side**2, 5, channels)
    depths, kernels, strides = (1, 2, 2, 3, 3, 4, 1), (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
    for stage, base in enumerate((16, 24, 40, 80, 112, 192, 320)):
        outputs, kernel = round_to_eight(base * width), kernels[stage]
        for block in range(math.ceil(depths[stage] * depth - 1e-9)):
            inner = channels * (expansion if stage else 1)
            if stage:
                layer(frames * side**2, channels, inner)
            side = math.ceil(side / strides[stage]) if block == 0 else side
            layer(frames * side**2, kernel**2 * (kernel if matched else 3), inner)
            if block % 2 == 0:
                squeezed = round_to_eight(inner / 16)
                layer(1, inner, squeezed, norm=False, bias=squeezed)
                layer(1, squeezed, inner, norm=False, bias=inner)
            layer(frames * side**2, inner, outputs)
            channels = outputs
    head = inner if matched else round_to_eight(1280 * width)
    layer(frames * side**2, channels, head)
    layer(1, head, 400, norm=False, bias=400, printed=400)
    return macs, params, params_paper


COSTS = {  # frames, side, width, depth, expansion; GMACs and millions of parameters as the paper counts them
    "efficientnet3d_b0": ((5, 128, 1.0, 1.0, 6), "0.744", "4.72"),
    "efficientnet3d_b3": ((10, 164, 1.2, 1.4, 6), "6.979", "11.24"),
    "efficientnet3d_b4": ((14, 220, 1.4, 1.8, 6), "23.737", "18.04"),
    "efficientnet3d_matched_b0": ((8, 112, 1.0, 1.0, 4), "0.741", "3.198"),
    "efficientnet3d_matched_b3": ((13, 172, 1.2, 1.4, 4), "6.939", "8.031"),
    "efficientnet3d_matched_b4": ((16, 232, 1.4, 1.8, 4), "23.746", "12.768"),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str) -> None:
    settings, gmacs, params = COSTS[name]
    count = x3d_tf.cost(name)
    assert (count.macs, count.params, count.params_paper) == naive_count(*settings, matched="matched" in name)
    for value, expected in ((count.macs / 1e9, gmacs), (count.params_paper / 1e6, params)):
        assert f"{value:.{len(expected.split('.')[1])}f}" == expected


def test_every_variant_has_a_cost_above() -> None:
    assert list(EFFICIENTNETS) == list(COSTS)
    published = [(row.published_macs, row.published_params) for row in EFFICIENTNETS.values()]
    assert published == [(0.74, 3.30), (6.91, 8.19), (23.80, 12.16)] * 2  # Table 7


def test_the_stages_of_b3() -> None:
    """Width 1.2, depth 1.4. 16 * 1.2 becomes 24, because 16 is less than 0.9 of it."""
    architecture = plan(EFFICIENTNETS["efficientnet3d_b3"].expansion, options("efficientnet3d"))
    assert (architecture.stem_width, architecture.head_width) == (40, 1536)
    assert [stage.width for stage in architecture.stages] == [24, 32, 48, 96, 136, 232, 384]
    assert [stage.depth for stage in architecture.stages] == [2, 3, 3, 5, 5, 6, 2]
    assert [stage.kernel[1] for stage in architecture.stages] == [3, 3, 5, 3, 5, 5, 3]
    blocks = list(architecture.blocks())
    assert [block.inner_width for block in blocks[:6]] == [40, 24, 144, 192, 192, 192]
    assert [block.expands for block in blocks[:4]] == [False, False, True, True]
    assert [block.shortcut for block in blocks[:6]] == [None, "identity", None, "identity", "identity", None]
    assert [block.se for block in blocks[:6]] == [True, False, True, False, True, True]
    assert [blocks[n].end for n in (0, 1, -1)] == ["res2_0", "res2", "res8"]


def test_drop_connect_increases_over_the_stages() -> None:
    architecture = plan(TINY, options("efficientnet3d", drop_connect=0.4))
    assert [architecture.drop_connect(stage) for stage in range(7)] == pytest.approx(np.linspace(0.1, 0.4, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_built_network_has_the_counted_parameters(family: str) -> None:
    for model in (
        x3d_tf.build_x3d(TINY, 3, options=options(family)),
        x3d_tf.build_detector(TINY, 3, options=options(family)),
        x3d_tf.build_detector(TINY, 3, options=options(family), head="simple"),
    ):
        count = x3d_tf.cost(TINY, num_classes=3, options=options(family), head=model.head)
        assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == count.params
        assert "fc1" not in [layer.name for layer in model.layers]


@pytest.mark.parametrize(
    "name", ["efficientnet3d_b0", pytest.param("efficientnet3d_matched_b0", marks=pytest.mark.slow)]
)
def test_a_variant_is_built_by_its_name(name: str) -> None:
    model = x3d_tf.build_x3d(name)
    assert model.name == name_of(model.expansion, model.options.family) == name
    assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == x3d_tf.cost(name).params
    shapes = {row.name: row.shape for row in layer_costs(name)}
    clip = model.clip
    maps = keras.Model(model.input, model.get_layer("conv5").output)
    assert maps.compute_output_shape((1, clip.frames, clip.size, clip.size, 3))[1:] == shapes["conv5_conv"]


# ---- Rules


def test_the_name_determines_the_family() -> None:
    changed = ModelOptions(se="none")
    expected = x3d_tf.cost(EFFICIENTNETS["efficientnet3d_b0"].expansion, options=options("efficientnet3d", se="none"))
    assert x3d_tf.cost("efficientnet3d_b0", options=changed) == expected
    rule = (
        'ModelOptions.family must be "efficientnet3d" for the network efficientnet3d_b0, got "efficientnet3d_matched"'
    )
    with pytest.raises(UserError) as error:
        x3d_tf.cost("efficientnet3d_b0", options=options("efficientnet3d_matched"))
    assert str(error.value).replace("'", '"') == rule
    with pytest.raises(UserError, match='must be "x3d" for the network x3d_m'):
        x3d_tf.build_x3d("x3d_m", options=options("efficientnet3d"))
    with pytest.raises(
        ValueError, match=r"unknown variant 'efficientnet3d_b1'; known: x2d, .*efficientnet3d_matched_b4"
    ):
        x3d_tf.cost("efficientnet3d_b1")
    assert name_of(Expansion(gamma_b=6), "efficientnet3d") == "efficientnet3d(tau=1,t=1,s=1,w=1,b=6,d=1)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separable": False}, 'separable must be True if ModelOptions.family is "efficientnet3d"'),
        ({"shortcut_norm": "on_width_change"}, 'shortcut_norm must be "always" if ModelOptions.family is'),
        ({"family": "efficientnet"}, "ModelOptions.family must be one of x3d, efficientnet3d, efficientnet3d_matched"),
    ],
)
def test_options_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions(**{"family": "efficientnet3d"} | changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("factor", "largest", "rule"),
    [  # conv5 has 1280 γw channels, the last blocks 320 γw γb; EfficientNet-B0 has 16 blocks
        ("gamma_w", 16384 / 1280, "channels"),
        ("gamma_b", 16384 / 320, "channels"),
        ("gamma_d", 1000 / 16, "blocks"),
    ],
)
def test_factors_are_limited(family: str, factor: str, largest: float, rule: str) -> None:
    plan(Expansion(**{factor: largest}), options(family))
    with pytest.raises(UserError, match=f"Expansion.{factor} must give at most .* {rule}, got"):
        plan(Expansion(**{factor: largest * 1.001}), options(family))


def test_it_is_not_written_as_a_checkpoint_of_x3d(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ModelOptions\.family must be 'x3d' for export"):
        export_checkpoint(network("efficientnet3d"), tmp_path / "a.pyth", "slowfast")


# ---- One block against naive loops


def naive_block(model: x3d_tf.X3D, name: str, x: np.ndarray, stride: int, shortcut: bool) -> np.ndarray:
    """Computes a block in evaluation from its weights."""
    layers = {layer.name.removeprefix(f"{name}_"): layer for layer in model.layers if layer.name.startswith(f"{name}_")}

    def norm(x: np.ndarray, layer: str) -> np.ndarray:
        gamma, beta, mean, variance = layers[f"{layer}_bn"].get_weights()
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def dense(x: np.ndarray, layer: str) -> np.ndarray:
        kernel, bias = layers[layer].get_weights()
        return x @ kernel + bias

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    y = x
    if "conv_a" in layers:
        y = np.maximum(norm(y @ layers["conv_a"].get_weights()[0], "conv_a"), 0)
    y = norm(naive_channelwise(y, layers["conv_b"].get_weights()[0], stride), "conv_b")
    if "se_reduce" in layers:
        means = np.maximum(dense(y.mean(axis=(1, 2, 3), keepdims=True), "se_reduce"), 0)
        y = y * sigmoid(dense(means, "se_expand"))
    y = norm((y * sigmoid(y)) @ layers["conv_c"].get_weights()[0], "conv_c")
    return np.maximum(y + x if shortcut else y, 0)


@pytest.mark.parametrize(
    ("family", "name", "before", "stride", "layers"),
    [
        ("efficientnet3d", "res2_0", "conv1", 1, {"conv_b", "conv_c", "se_reduce", "add"}),
        ("efficientnet3d_matched", "res4_0", "res3", 2, {"conv_a", "conv_b", "conv_c", "se_reduce"}),
        ("efficientnet3d", "res5_1", "res5_0", 1, {"conv_a", "conv_b", "conv_c", "add"}),
    ],
)
def test_a_block_equals_naive_loops(family: str, name: str, before: str, stride: int, layers: set[str]) -> None:
    model = network(family)
    found = {layer.name.removeprefix(f"{name}_") for layer in model.layers if layer.name.startswith(f"{name}_")}
    assert found & {"conv_a", "conv_b", "conv_c", "se_reduce", "add", "shortcut"} == layers
    end = next(layer.name for layer in model.layers if layer.name in (name, name.partition("_")[0]))
    maps, expected = keras.Model(model.input, [model.get_layer(which).output for which in (before, end)])(clips(2))
    assert_close(naive_block(model, name, np.asarray(maps, np.float64), stride, "add" in layers), expected, 1e-4)


def test_initialization_ends_only_residual_branches_in_zeros() -> None:
    """A block without a shortcut would otherwise output zeros and stop the gradient."""
    model = x3d_tf.build_x3d(TINY, num_classes=3, options=options("efficientnet3d", dropout=0.0))
    shortcuts = {block.name: block.shortcut for block in plan(TINY, model.options).blocks()}
    assert set(shortcuts.values()) == {"identity", None}
    for name, shortcut in shortcuts.items():
        gamma = np.asarray(model.get_layer(f"{name}_conv_c_bn").gamma)
        assert (gamma == (0 if shortcut else 1)).all()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(clips(2).astype("float32"), training=True) ** 2)
    gradient = tape.gradient(loss, model.get_layer("conv1_xy").kernel.value)
    assert np.abs(gradient).max() > 0


def test_training_lowers_the_loss() -> None:
    tiny = dataclasses.replace(TINY, gamma_t=2, gamma_s=32 / 112)  # the clips of `batches`
    config = config_of(expansion=tiny, model=options("efficientnet3d", dropout=0.0, drop_connect=0.1, bn_group=4))
    _, step = make(config)
    stream = itertools.repeat(next(batches()))
    losses = [float(step(stream, 1)["loss"][0]) for _ in range(12)]
    assert losses[0] > 0.8 and losses[-1] < 0.5 * losses[0], losses  # log 3 = 1.1 is chance


# ---- Forms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "others", [{}, {"se": "all", "input": "difference", "swish_before": True, "drop_connect": 0.5}]
)
def test_portable_and_folded_forms_equal_the_network(family: str, others: dict[str, Any], tmp_path: Path) -> None:
    model, pixels = network(family, **others), clips(3)
    expected = softmax(model, pixels)
    assert np.ptp(expected, axis=0).max() > 1e-3  # clips differ, so mixing them up would fail
    app = x3d_tf.portable(model, NAMES)
    np.testing.assert_allclose(app(pixels), expected, atol=1e-5)
    assert all(type(layer).__module__.startswith("keras.") for layer in app.layers)
    for batch in (1, None):
        given = pixels[:batch]
        np.testing.assert_allclose(fold(model, batch=batch)(given), softmax(model, given), atol=1e-5)
    x3d_tf.save(model, tmp_path / "a.keras", NAMES)
    stored = open_classifier(tmp_path / "a.keras").for_crop(pixels.shape[2])
    np.testing.assert_allclose(stored(np.float32(pixels)), expected, atol=1e-5)


@pytest.mark.parametrize("head", ["full", "simple"])
def test_a_detector_and_its_folded_form(head: Any) -> None:
    model = x3d_tf.build_detector(TINY, 3, head=head, options=options("efficientnet3d"))
    assert model.backbone_end == ("res8" if head == "simple" else "conv5")
    inputs = {"clip": clips(2), "boxes": np.array([[[0, 0, 1, 1], [0.2, 0.1, 0.6, 0.9]]] * 2, "float32")}
    size = inputs["clip"].shape[2]
    np.testing.assert_allclose(fold(model, size=size)(inputs), model(inputs), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_network(family: str, tmp_path: Path) -> None:
    model, pixels = network(family), clips(2)
    x3d_tf.save(model, tmp_path / "trainable.keras", NAMES)
    x3d_tf.save(x3d_tf.portable(model, NAMES), tmp_path / "portable.keras")
    for form in ("trainable", "portable"):
        loaded = x3d_tf.load(tmp_path / f"{form}.keras")
        assert (loaded.options, loaded.expansion, loaded.class_names) == (model.options, TINY, NAMES)
        np.testing.assert_array_equal(loaded(pixels), model(pixels))
    app = keras.models.load_model(tmp_path / "portable.keras")
    np.testing.assert_allclose(app(pixels), softmax(model, pixels), atol=1e-5)


@pytest.mark.parametrize(
    ("group", "setting", "value", "message"),
    [
        ("options", "family", "efficientnet", "ModelOptions.family must be one of x3d, efficientnet3d, "),
        (
            "options",
            "separable",
            False,
            'ModelOptions.separable must be True if ModelOptions.family is "efficientnet3d"',
        ),
        ("expansion", "gamma_w", 13.0, "Expansion.gamma_w must give at most 16384 channels, got 13.0"),
        ("expansion", "gamma_b", 1e6, "Expansion.gamma_b must give at most 16384 channels"),
        ("expansion", "gamma_d", 1e9, "Expansion.gamma_d must give at most 1000 blocks"),
    ],
)
def test_metadata_of_a_file_are_checked(group: str, setting: str, value: Any, message: str) -> None:
    model = x3d_tf.build_x3d(TINY, num_classes=3, options=options("efficientnet3d"))
    fields = json.loads(Metadata.from_model(model, class_names=NAMES, form="trainable").to_json())
    assert Metadata.from_json(json.dumps(fields)).options == model.options
    fields[group][setting] = value
    with pytest.raises(UserError) as error:
        Metadata.from_json(json.dumps(fields))
    assert message in str(error.value)


def test_weights_are_transferred_within_a_family(tmp_path: Path) -> None:
    source = network("efficientnet3d")
    x3d_tf.save(source, tmp_path / "source.keras", NAMES)
    target = x3d_tf.build_x3d(TINY, num_classes=3, options=options("efficientnet3d"))
    transfer = load_pretrained(target, tmp_path / "source.keras")
    assert transfer.new == ("fc2",) and "res8_0_conv_c" in transfer.loaded
    maps = [keras.Model(model.input, model.get_layer("pool5").output)(clips(2)) for model in (source, target)]
    np.testing.assert_array_equal(*maps)
    other = x3d_tf.build_x3d(TINY, num_classes=3)
    with pytest.raises(UserError, match=r"with ModelOptions\.family = 'efficientnet3d', but this run has 'x3d'"):
        load_pretrained(other, tmp_path / "source.keras")


def test_exported_files_equal_the_network(tmp_path: Path) -> None:
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    from x3d_tf.export import tflite
    from x3d_tf.export.models import open_model
    from x3d_tf.export.saved_model import export_saved_model

    model, pixels = network("efficientnet3d"), clips(1)
    x3d_tf.save(model, tmp_path / "tiny.keras", NAMES)
    source = open_model(tmp_path / "tiny.keras")
    expected = softmax(model, pixels)
    (path,) = tflite.export_tflite(source, tmp_path / "tflite", ["float32"])
    runner = litert.Interpreter(model_path=str(path)).get_signature_runner()
    np.testing.assert_allclose(runner(clips=pixels)["probabilities"], expected, atol=1e-4)
    folder = export_saved_model(source, tmp_path / "serving")
    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](clips=tf.constant(pixels))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert source.card()["network"].startswith("efficientnet3d(tau=2,t=3")


# ---- Recipes


@pytest.mark.parametrize("variant", EFFICIENTNETS.values(), ids=lambda variant: variant.name)
def test_recipes_equal_their_python(variant: Any) -> None:
    *matched, size = variant.name.removeprefix("efficientnet3d_").split("_")
    file = "gin/efficientnet3d/" + "_".join([size, *matched]) + ".gin"
    plain = gin_config.parse(["gin/x3d_s.gin"]).config
    expected = dataclasses.replace(plain, expansion=variant.expansion, model=options(variant.family))
    assert gin_config.parse([file]).config == expected
    text = (ROOT / file).read_text()
    count = x3d_tf.cost(variant.name)
    assert f"--gin_file={file}" in text and "not measured" in text
    assert f"{count.macs / 1e9:.3f} GMACs per clip and {count.params / 1e6:.3f} M parameters" in text
    assert f"has {count.params_paper / 1e6:.3f} M" in " ".join(text.replace("#", "").split())
    assert f"Table 7 prints {variant.published_params:.2f} M" in text
    kinetics = gin_config.parse([file, "gin/kinetics400/recipe.gin"]).config
    assert kinetics.expansion == variant.expansion and kinetics.dataset.name == "kinetics400"
    assert kinetics.recipe == gin_config.parse(["gin/kinetics400/x3d_m.gin"]).config.recipe


def test_the_page_states_the_counted_costs() -> None:
    page = (ROOT / "docs" / "kinetics.md").read_text(encoding="utf-8")
    for name, variant in EFFICIENTNETS.items():
        clip, count = variant.expansion.clip, x3d_tf.cost(name)
        macs, params = count.macs / 1e9, count.params_paper / 1e6
        cells = [name, f"{clip.frames} x {clip.size}²"]
        for value, printed in ((macs, variant.published_macs), (params, variant.published_params)):
            cells += [f"{value:.3f}", f"{printed:.2f}", f"{value / printed - 1:+.1%}".replace("%", " %")]
        assert f"| {' | '.join(cells)} |" in page
