"""The names that PyTorch implementations give to X3D's weights, beside ours: one table, to be read either way."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from x3d_tf.modeling.architecture import Architecture

Kind = Literal["conv", "pointwise", "channelwise", "dense", "vector"]


@dataclass(frozen=True)
class WeightName:
    """One weight under two names.

    Attributes:
        source: its name in the PyTorch state dict.
        layer: our layer's name.
        weight: its name in our layer.
        kind: how the arrays differ. PyTorch's are (out, in / groups, T, H, W); ours are (T, H, W, in, out) for a
            `conv`, (in, out) for a `pointwise` one or a `dense` layer, (T, H, W, C) for a `channelwise` one; a `vector`
            is the same.
    """

    source: str
    layer: str
    weight: str
    kind: Kind


def slowfast_names(architecture: Architecture) -> Iterator[WeightName]:
    """All weights of a network as PySlowFast names them, in execution order."""
    separable = architecture.options.separable
    yield WeightName("s1.pathway0_stem.conv_xy.weight", "conv1_xy", "kernel", "conv")
    yield WeightName("s1.pathway0_stem.conv.weight", "conv1_t", "kernel", "channelwise")
    yield from _norm("s1.pathway0_stem.bn", "conv1_bn")
    width = architecture.stem_width
    for number, stage in enumerate(architecture.stages, start=2):
        for index in range(stage.depth):
            source, ours = f"s{number}.pathway0_res{index}", f"res{number}_{index}"
            if index == 0:
                yield WeightName(f"{source}.branch1.weight", f"{ours}_shortcut", "kernel", "pointwise")
                if architecture.has_shortcut_norm(width != stage.width):
                    yield from _norm(f"{source}.branch1_bn", f"{ours}_shortcut_bn")
            branch = f"{source}.branch2"
            kinds: tuple[Kind, Kind] = ("pointwise", "channelwise") if separable else ("conv", "conv")
            yield WeightName(f"{branch}.a.weight", f"{ours}_conv_a", "kernel", kinds[0])
            yield from _norm(f"{branch}.a_bn", f"{ours}_conv_a_bn")
            yield WeightName(f"{branch}.b.weight", f"{ours}_conv_b", "kernel", kinds[1])
            yield from _norm(f"{branch}.b_bn", f"{ours}_conv_b_bn")
            if architecture.has_se(index):
                yield from _dense(f"{branch}.se.fc1", f"{ours}_se_reduce")
                yield from _dense(f"{branch}.se.fc2", f"{ours}_se_expand")
            yield WeightName(f"{branch}.c.weight", f"{ours}_conv_c", "kernel", "pointwise")
            yield from _norm(f"{branch}.c_bn", f"{ours}_conv_c_bn")
        width = stage.width
    yield WeightName("head.conv_5.weight", "conv5_conv", "kernel", "pointwise")
    yield from _norm("head.conv_5_bn", "conv5_bn")
    yield WeightName("head.lin_5.weight", "fc1", "kernel", "dense")
    yield from _dense("head.projection", "fc2")


def _norm(source: str, layer: str) -> Iterator[WeightName]:
    yield WeightName(f"{source}.weight", layer, "gamma", "vector")
    yield WeightName(f"{source}.bias", layer, "beta", "vector")
    yield WeightName(f"{source}.running_mean", layer, "moving_mean", "vector")
    yield WeightName(f"{source}.running_var", layer, "moving_variance", "vector")


def _dense(source: str, layer: str) -> Iterator[WeightName]:
    yield WeightName(f"{source}.weight", layer, "kernel", "dense")
    yield WeightName(f"{source}.bias", layer, "bias", "vector")


def to_ours(array: np.ndarray, kind: Kind) -> np.ndarray:
    """A PyTorch array in our layout."""
    if kind == "conv":
        return array.transpose(2, 3, 4, 1, 0)
    if kind == "channelwise":
        return array[:, 0].transpose(1, 2, 3, 0)
    if kind in ("pointwise", "dense"):
        return array.reshape(array.shape[:2]).T
    return array


def to_source(array: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """Our array in PyTorch's layout. The classifier of PySlowFast is a linear layer, without spatial axes."""
    if kind == "conv":
        return array.transpose(4, 3, 0, 1, 2)
    if kind == "channelwise":
        return array.transpose(3, 0, 1, 2)[:, None]
    if kind in ("pointwise", "dense"):
        matrix = array.T
        return matrix if name == "head.projection.weight" else matrix[:, :, None, None, None]
    return array
