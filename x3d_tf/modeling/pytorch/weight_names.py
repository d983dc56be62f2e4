"""Names of X3D's weights in PyTorch implementations and in this package, as one table for both directions.

Imports no TensorFlow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from x3d_tf.modeling.architecture import Architecture, ModelOptions, plan
from x3d_tf.modeling.cost import layer_costs
from x3d_tf.modeling.expansion import Expansion

Naming = Literal["slowfast", "pytorchvideo", "pytorchvideo_mobile", "mmaction2"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
TITLES: dict[Naming, str] = {
    "slowfast": "PySlowFast",
    "pytorchvideo": "pytorchvideo",
    "pytorchvideo_mobile": "pytorchvideo's mobile form",
    "mmaction2": "mmaction2",
}
SHORTCUT_NORM: dict[Naming, Literal["always", "on_width_change"]] = {  # `ModelOptions.shortcut_norm` by implementation
    **dict.fromkeys(NAMINGS, "always"),
    "pytorchvideo": "on_width_change",
}
COUNTER = "num_batches_tracked"  # step counter of PyTorch's batch norms; has no effect on outputs
HEAD = "fc2"
Kind = Literal["conv", "pointwise", "linear", "channelwise", "vector"]


@dataclass(frozen=True)
class WeightName:
    """The names of a weight in PyTorch and in this package.

    Attributes:
        source: name in the PyTorch state dict.
        layer: name of the Keras layer.
        weight: name of the weight in the Keras layer.
        kind: how the layouts differ. In PyTorch, shapes are (out, in / groups, T, H, W), or (out, in) for `linear`. In
            this package, they are (T, H, W, in, out) for `conv`, (in, out) for `pointwise` and `linear`, and
            (T, H, W, C) for `channelwise`. A `vector` has the same shape in both.
    """

    source: str
    layer: str
    weight: str
    kind: Kind

    @property
    def target(self) -> str:
        """Full name in this package."""
        return f"{self.layer}/{self.weight}"


@dataclass(frozen=True)
class _Row:
    """The names of a layer in all implementations. {stage} counts from 2, {number} from 1, {block} from 0."""

    layer: str
    kind: Literal["conv", "pointwise", "linear", "channelwise", "norm"]
    slowfast: str
    pytorchvideo: str
    pytorchvideo_mobile: str
    mmaction2: str
    bias: bool = False


_STEM = (
    # pytorchvideo swaps the two names: its conv_t is the spatial convolution.
    _Row(
        "conv1_xy",
        "conv",
        "s1.pathway0_stem.conv_xy",
        "blocks.0.conv.conv_t",
        "s1.pathway0_stem_conv_xy.kernel.conv",
        "backbone.conv1_s.conv",
    ),
    _Row(
        "conv1_t",
        "channelwise",
        "s1.pathway0_stem.conv",
        "blocks.0.conv.conv_xy",
        "s1.pathway0_stem_conv.kernel.conv",
        "backbone.conv1_t.conv",
    ),
    _Row(
        "conv1_bn",
        "norm",
        "s1.pathway0_stem.bn",
        "blocks.0.norm",
        "s1.pathway0_stem_conv.kernel.bn",
        "backbone.conv1_t.bn",
    ),
)
_PREFIXES = _Row(  # prefixes of the names in a block
    "res{stage}_{block}_",
    "norm",
    "s{stage}.pathway0_res{block}.",
    "blocks.{number}.res_blocks.{block}.",
    "s{stage}.pathway0_res{block}.",
    "backbone.layer{number}.{block}.",
)
_SHORTCUT = _Row("shortcut", "pointwise", "branch1", "branch1_conv", "_res_proj.kernel.conv", "downsample.conv")
_SHORTCUT_NORM = _Row("shortcut_bn", "norm", "branch1_bn", "branch1_norm", "_res_proj.kernel.bn", "downsample.bn")
_CONV_A = (
    _Row("conv_a", "pointwise", "branch2.a", "branch2.conv_a", "layers.conv_0.kernel.conv", "conv1.conv"),
    _Row("conv_a_bn", "norm", "branch2.a_bn", "branch2.norm_a", "layers.conv_0.kernel.bn", "conv1.bn"),
)
_CONV_B = (
    _Row("conv_b", "channelwise", "branch2.b", "branch2.conv_b", "layers.conv_1.kernel.conv", "conv2.conv"),
    _Row("conv_b_bn", "norm", "branch2.b_bn", "branch2.norm_b.0", "layers.conv_1.kernel.bn", "conv2.bn"),
)
_SE = (
    _Row(
        "se_reduce",
        "pointwise",
        "branch2.se.fc1",
        "branch2.norm_b.1.block.0",
        "layers.se.se.block.0",
        "se_module.fc1",
        bias=True,
    ),
    _Row(
        "se_expand",
        "pointwise",
        "branch2.se.fc2",
        "branch2.norm_b.1.block.2",
        "layers.se.se.block.2",
        "se_module.fc2",
        bias=True,
    ),
)
_CONV_C = (
    _Row("conv_c", "pointwise", "branch2.c", "branch2.conv_c", "layers.conv_2.kernel.conv", "conv3.conv"),
    _Row("conv_c_bn", "norm", "branch2.c_bn", "branch2.norm_c", "layers.conv_2.kernel.bn", "conv3.bn"),
)
_HEAD = (
    _Row(
        "conv5_conv",
        "pointwise",
        "head.conv_5",
        "blocks.5.pool.pre_conv",
        "head.conv_5.kernel.conv",
        "backbone.conv5.conv",
    ),
    _Row("conv5_bn", "norm", "head.conv_5_bn", "blocks.5.pool.pre_norm", "head.conv_5.kernel.bn", "backbone.conv5.bn"),
    _Row("fc1", "pointwise", "head.lin_5", "blocks.5.pool.post_conv", "head.lin_5.kernel.conv", "cls_head.fc1"),
    _Row("fc2", "linear", "head.projection", "blocks.5.proj", "projection.model", "cls_head.fc2", bias=True),
)
_NORM = (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance"))


def names(architecture: Architecture, naming: Naming) -> Iterator[WeightName]:
    """Yields the names of all weights of a network in an implementation, in execution order.

    The options of the architecture determine whether res2 has a batch norm on its shortcut; pytorchvideo has none.
    """
    yield from _expand(_STEM, naming)
    for block in architecture.blocks():
        indices = {"stage": block.stage + 2, "number": block.stage + 1, "block": block.index}
        shortcut = (
            (_SHORTCUT, *((_SHORTCUT_NORM,) if block.shortcut_norm else ())) if block.shortcut == "projection" else ()
        )
        rows = (*shortcut, *_CONV_A, *_CONV_B, *(_SE if block.se else ()), *_CONV_C)
        yield from _expand(rows, naming, architecture.options.separable, _PREFIXES, indices)
    yield from _expand(_HEAD, naming)


def _expand(
    rows: Iterable[_Row],
    naming: Naming,
    separable: bool = True,
    prefixes: _Row | None = None,
    indices: dict[str, int] | None = None,
) -> Iterator[WeightName]:
    layer_prefix = prefixes.layer.format(**indices or {}) if prefixes else ""
    source_prefix = getattr(prefixes, naming).format(**indices or {}) if prefixes else ""
    for row in rows:
        layer, source = layer_prefix + row.layer, source_prefix + getattr(row, naming)
        if row.kind == "norm":
            for source_weight, weight in _NORM:
                yield WeightName(f"{source}.{source_weight}", layer, weight, "vector")
            continue
        yield WeightName(f"{source}.weight", layer, "kernel", _kind(row, naming, separable))
        if row.bias:
            yield WeightName(f"{source}.bias", layer, "bias", "vector")


def _kind(row: _Row, naming: Naming, separable: bool) -> Kind:
    if row.layer == "fc1" and naming == "mmaction2":  # a convolution in all other implementations
        return "linear"
    if not separable and row.layer in ("conv_a", "conv_b"):  # the paper's ablation
        return "conv"
    assert row.kind != "norm"
    return row.kind


def source_shapes(expansion: Expansion, naming: Naming, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all weights in an implementation, by its names, in execution order."""
    options = ModelOptions(shortcut_norm=SHORTCUT_NORM[naming])
    layers = {layer.name: layer for layer in layer_costs(expansion, num_classes=num_classes, options=options)}
    shapes = {}
    for name in names(plan(expansion, options), naming):
        layer = layers[_NORMED_LAYERS.get(name.layer, name.layer.removesuffix("_bn"))]
        outputs, inputs = layer.shape[-1], layer.cost.macs // layer.cost.activations
        taps = (inputs, 1, 1) if name.layer == "conv1_t" else (3, 3, 3)
        shapes[name.source] = {
            "vector": (outputs,),
            "linear": (outputs, inputs),
            "pointwise": (outputs, inputs, 1, 1, 1),
            "channelwise": (outputs, 1, *taps),
            "conv": (outputs, inputs // 9, 1, 3, 3),
        }[name.kind]
    return shapes


_NORMED_LAYERS = {
    "conv1_bn": "conv1_t",
    "conv5_bn": "conv5_conv",
}  # others have the name of their batch norm without _bn


def to_ours(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Converts an array from PyTorch's layout to that of this package."""
    if kind == "conv":
        return array.transpose(2, 3, 4, 1, 0)
    if kind == "channelwise":
        return array[:, 0].transpose(1, 2, 3, 0)
    if kind in ("pointwise", "linear"):
        return array.reshape(array.shape[:2]).T
    return array


def to_source(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Converts an array from this package's layout to that of PyTorch."""
    if kind == "conv":
        return array.transpose(4, 3, 0, 1, 2)
    if kind == "channelwise":
        return array.transpose(3, 0, 1, 2)[:, None]
    if kind == "pointwise":
        return array.T[:, :, None, None, None]
    return array.T if kind == "linear" else array


def source_shape(shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """Converts a shape from this package's layout to that of PyTorch."""
    return to_source(np.broadcast_to(np.float32(0), shape), kind).shape
