"""Tests of the table of weight names: complete, one-to-one, and equal to the PyTorch implementations' names."""

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest

from x3d_tf import X3D, Expansion, build_x3d
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.pytorch.weight_names import (
    NAMINGS,
    Naming,
    WeightName,
    names,
    source_shape,
    to_ours,
    to_source,
)

SMALL = Expansion(gamma_t=2, gamma_b=2.25, gamma_d=0.4)  # one or two blocks a stage
pytestmark = pytest.mark.usefixtures("uncompiled_module")
every_naming = pytest.mark.parametrize("naming", NAMINGS)


def named_weights(model: X3D, naming: Naming) -> list[tuple[WeightName, keras.Variable]]:
    table = names(plan(model.expansion, model.options), naming)
    return [(name, getattr(model.get_layer(name.layer), name.weight)) for name in table]


def shapes(model: X3D, naming: Naming) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the network's weights in a state dict."""
    options = model.options
    if naming == "pytorchvideo":  # has fewer weights, so that the same network has all of them
        options = replace(options, shortcut_norm="on_width_change")
    table = names(plan(model.expansion, options), naming)
    weights = ((name, getattr(model.get_layer(name.layer), name.weight)) for name in table)
    return {name.source: source_shape(tuple(weight.shape), name.kind) for name, weight in weights}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"se": "all"},
        {"se": "none"},
        {"separable": False},
        {"shortcut_norm": "on_width_change"},
        {"shortcut_norm": "on_width_change", "se": "all", "separable": False},
        {"input": "difference", "stem_kernel": 3},
    ],
    ids=str,
)
def test_the_table_names_every_weight_once(options: dict[str, Any]) -> None:
    model = build_x3d(SMALL, num_classes=7, options=ModelOptions(**options))
    weights = [weight for weight in model.weights if "seed_generator" not in weight.path]
    for naming in NAMINGS:
        named = named_weights(model, naming)
        assert {id(variable) for _, variable in named} == {id(weight) for weight in weights}
        assert len({name.target for name, _ in named}) == len(named) == len(weights)
        assert len({name.source for name, _ in named}) == len(named)


def test_number_of_weights_for_each_option() -> None:
    def count(**options: Any) -> int:
        return len(list(names(plan(Expansion(), ModelOptions(**options)), "slowfast")))

    norm, reduce_and_expand = 4, 2 * 2
    assert count(se="none") + 7 * reduce_and_expand == count()  # blocks 0, 2 and 4 of stages with 1, 2, 5 and 3 blocks
    assert count() + 4 * reduce_and_expand == count(se="all")
    assert count(shortcut_norm="on_width_change") + norm == count()
    assert count(separable=False) == count()


@every_naming
def test_the_four_statistics_of_a_batch_norm(naming: Naming) -> None:
    ours = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    norms = [name for name in names(plan(Expansion()), naming) if name.layer.endswith("_bn")]
    assert len(norms) % 4 == 0
    assert all(ours[name.source.rpartition(".")[2]] == name.weight for name in norms)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("conv", (4, 3, 1, 5, 7), (1, 5, 7, 3, 4)),
        ("channelwise", (4, 1, 5, 3, 7), (5, 3, 7, 4)),
        ("pointwise", (4, 3, 1, 1, 1), (3, 4)),
        ("linear", (4, 3), (3, 4)),
        ("vector", (4,), (4,)),
    ],
)
def test_layout_round_trip(kind: Any, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(theirs)
    assert to_ours(array, kind).shape == ours
    assert source_shape(ours, kind) == theirs
    np.testing.assert_array_equal(to_source(to_ours(array, kind), kind), array)


def test_layouts_move_entries_correctly() -> None:
    draw = np.random.default_rng(0)
    conv, channelwise = draw.standard_normal((4, 3, 2, 5, 7)), draw.standard_normal((4, 1, 5, 3, 7))
    assert to_ours(conv, "conv")[1, 4, 6, 2, 3] == conv[3, 2, 1, 4, 6]
    assert to_ours(channelwise, "channelwise")[4, 2, 6, 3] == channelwise[3, 0, 4, 2, 6]
    assert to_ours(conv[:, :, :1, :1, :1], "pointwise")[2, 3] == conv[3, 2, 0, 0, 0]
    assert to_ours(conv[:, :, 0, 0, 0], "linear")[2, 3] == conv[3, 2, 0, 0, 0]


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


# Names and shapes of some of X3D-M's weights in the four implementations.
FACTS: dict[Naming, dict[str, tuple[int, ...]]] = {
    "slowfast": {
        "s1.pathway0_stem.conv_xy.weight": (24, 3, 1, 3, 3),
        "s1.pathway0_stem.conv.weight": (24, 1, 5, 1, 1),
        **norm("s1.pathway0_stem.bn", 24),
        "s2.pathway0_res0.branch1.weight": (24, 24, 1, 1, 1),
        **norm("s2.pathway0_res0.branch1_bn", 24),
        "s2.pathway0_res0.branch2.a.weight": (54, 24, 1, 1, 1),
        **norm("s2.pathway0_res0.branch2.a_bn", 54),
        "s3.pathway0_res4.branch2.b.weight": (108, 1, 3, 3, 3),
        **norm("s3.pathway0_res4.branch2.b_bn", 108),
        "s5.pathway0_res0.branch1.weight": (192, 96, 1, 1, 1),
        "s5.pathway0_res0.branch2.se.fc1.weight": (32, 432, 1, 1, 1),
        "s5.pathway0_res0.branch2.se.fc1.bias": (32,),
        "s5.pathway0_res0.branch2.se.fc2.weight": (432, 32, 1, 1, 1),
        "s5.pathway0_res0.branch2.se.fc2.bias": (432,),
        "s5.pathway0_res6.branch2.c.weight": (192, 432, 1, 1, 1),
        **norm("s5.pathway0_res6.branch2.c_bn", 192),
        "head.conv_5.weight": (432, 192, 1, 1, 1),
        **norm("head.conv_5_bn", 432),
        "head.lin_5.weight": (2048, 432, 1, 1, 1),
        "head.projection.weight": (400, 2048),
        "head.projection.bias": (400,),
    },
    "pytorchvideo": {
        "blocks.0.conv.conv_t.weight": (24, 3, 1, 3, 3),  # the spatial convolution: the two names are swapped
        "blocks.0.conv.conv_xy.weight": (24, 1, 5, 1, 1),
        **norm("blocks.0.norm", 24),
        "blocks.1.res_blocks.0.branch1_conv.weight": (24, 24, 1, 1, 1),
        "blocks.2.res_blocks.0.branch1_conv.weight": (48, 24, 1, 1, 1),
        **norm("blocks.2.res_blocks.0.branch1_norm", 48),
        "blocks.1.res_blocks.0.branch2.conv_a.weight": (54, 24, 1, 1, 1),
        **norm("blocks.1.res_blocks.0.branch2.norm_a", 54),
        "blocks.1.res_blocks.0.branch2.conv_b.weight": (54, 1, 3, 3, 3),
        **norm("blocks.1.res_blocks.0.branch2.norm_b.0", 54),
        "blocks.1.res_blocks.0.branch2.norm_b.1.block.0.weight": (8, 54, 1, 1, 1),
        "blocks.1.res_blocks.0.branch2.norm_b.1.block.0.bias": (8,),
        "blocks.1.res_blocks.0.branch2.norm_b.1.block.2.weight": (54, 8, 1, 1, 1),
        "blocks.1.res_blocks.0.branch2.norm_b.1.block.2.bias": (54,),
        "blocks.4.res_blocks.6.branch2.conv_c.weight": (192, 432, 1, 1, 1),
        **norm("blocks.4.res_blocks.6.branch2.norm_c", 192),
        "blocks.5.pool.pre_conv.weight": (432, 192, 1, 1, 1),
        **norm("blocks.5.pool.pre_norm", 432),
        "blocks.5.pool.post_conv.weight": (2048, 432, 1, 1, 1),
        "blocks.5.proj.weight": (400, 2048),
        "blocks.5.proj.bias": (400,),
    },
    "pytorchvideo_mobile": {
        "s1.pathway0_stem_conv_xy.kernel.conv.weight": (24, 3, 1, 3, 3),
        "s1.pathway0_stem_conv.kernel.conv.weight": (24, 1, 5, 1, 1),
        **norm("s1.pathway0_stem_conv.kernel.bn", 24),
        "s2.pathway0_res0._res_proj.kernel.conv.weight": (24, 24, 1, 1, 1),
        **norm("s2.pathway0_res0._res_proj.kernel.bn", 24),
        "s2.pathway0_res0.layers.conv_0.kernel.conv.weight": (54, 24, 1, 1, 1),
        **norm("s2.pathway0_res0.layers.conv_0.kernel.bn", 54),
        "s2.pathway0_res0.layers.conv_1.kernel.conv.weight": (54, 1, 3, 3, 3),
        **norm("s2.pathway0_res0.layers.conv_1.kernel.bn", 54),
        "s2.pathway0_res0.layers.se.se.block.0.weight": (8, 54, 1, 1, 1),
        "s2.pathway0_res0.layers.se.se.block.0.bias": (8,),
        "s2.pathway0_res0.layers.se.se.block.2.weight": (54, 8, 1, 1, 1),
        "s2.pathway0_res0.layers.se.se.block.2.bias": (54,),
        "s5.pathway0_res6.layers.conv_2.kernel.conv.weight": (192, 432, 1, 1, 1),
        **norm("s5.pathway0_res6.layers.conv_2.kernel.bn", 192),
        "head.conv_5.kernel.conv.weight": (432, 192, 1, 1, 1),
        **norm("head.conv_5.kernel.bn", 432),
        "head.lin_5.kernel.conv.weight": (2048, 432, 1, 1, 1),
        "projection.model.weight": (400, 2048),
        "projection.model.bias": (400,),
    },
    "mmaction2": {
        "backbone.conv1_s.conv.weight": (24, 3, 1, 3, 3),
        "backbone.conv1_t.conv.weight": (24, 1, 5, 1, 1),
        **norm("backbone.conv1_t.bn", 24),
        "backbone.layer1.0.downsample.conv.weight": (24, 24, 1, 1, 1),
        **norm("backbone.layer1.0.downsample.bn", 24),
        "backbone.layer1.0.conv1.conv.weight": (54, 24, 1, 1, 1),
        **norm("backbone.layer1.0.conv1.bn", 54),
        "backbone.layer2.4.conv2.conv.weight": (108, 1, 3, 3, 3),
        **norm("backbone.layer2.4.conv2.bn", 108),
        "backbone.layer1.2.se_module.fc1.weight": (8, 54, 1, 1, 1),
        "backbone.layer1.2.se_module.fc1.bias": (8,),
        "backbone.layer1.2.se_module.fc2.weight": (54, 8, 1, 1, 1),
        "backbone.layer1.2.se_module.fc2.bias": (54,),
        "backbone.layer4.6.conv3.conv.weight": (192, 432, 1, 1, 1),
        **norm("backbone.layer4.6.conv3.bn", 192),
        "backbone.conv5.conv.weight": (432, 192, 1, 1, 1),
        **norm("backbone.conv5.bn", 432),
        "cls_head.fc1.weight": (2048, 432),
        "cls_head.fc2.weight": (400, 2048),
        "cls_head.fc2.bias": (400,),
    },
}


@pytest.fixture(scope="module")
def x3d_m() -> X3D:
    return build_x3d("x3d_m")


@every_naming
def test_names_and_shapes_of_x3d_m(naming: Naming, x3d_m: X3D) -> None:
    table = shapes(x3d_m, naming)
    assert {name: table.get(name) for name in FACTS[naming]} == FACTS[naming]


def test_a_batch_norm_that_pytorchvideo_lacks(x3d_m: X3D) -> None:
    table = shapes(x3d_m, "pytorchvideo")
    assert not [name for name in table if name.startswith("blocks.1.res_blocks.0.branch1_norm")]


def test_blocks_with_squeeze_excitation(x3d_m: X3D) -> None:
    blocks = {name.split(".se_module")[0] for name in shapes(x3d_m, "mmaction2") if "se_module" in name}
    depths = {1: 3, 2: 5, 3: 11, 4: 7}
    assert blocks == {f"backbone.layer{k}.{block}" for k, depth in depths.items() for block in range(0, depth, 2)}


def test_shapes_of_the_dense_ablation() -> None:
    narrow = Expansion(gamma_w=0.3, gamma_b=1.5, gamma_d=0.2)
    table = shapes(build_x3d(narrow, num_classes=7, options=ModelOptions(separable=False)), "slowfast")
    assert table["s2.pathway0_res0.branch2.a.weight"] == (12, 8, 3, 1, 1)
    assert table["s2.pathway0_res0.branch2.b.weight"] == (12, 12, 1, 3, 3)
    assert table["s2.pathway0_res0.branch2.c.weight"] == (8, 12, 1, 1, 1)
