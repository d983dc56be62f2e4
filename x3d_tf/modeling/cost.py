"""Counts the multiply-adds, parameters and activations of a network. Imports no TensorFlow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from x3d_tf.modeling.architecture import (
    FC1_WIDTH,
    STAGE_NAMES,
    Architecture,
    ModelOptions,
    StagePlan,
    plan,
    pool_window,
    require_classes,
    se_width,
)
from x3d_tf.modeling.expansion import Expansion, as_expansion
from x3d_tf.types import ClipSpec


@dataclass(frozen=True)
class Cost:
    """The cost of a network for one clip.

    Attributes:
        macs: multiply-adds of the convolutions, squeeze-excitations and fully connected layers, as in the paper.
        params: number of trainable parameters.
        params_paper: number of parameters as printed in the paper: without batch norm and the biases of
            squeeze-excitation, and with a bias in fc1 that the network does not have. No other convention was found
            that gives all figures of the paper.
        activations: number of output elements of the convolutions and fully connected layers.
    """

    macs: int = 0
    params: int = 0
    params_paper: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field) + getattr(other, field) for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class LayerCost:
    """A row of the per-layer table: name, output shape (T, H, W, C) and cost of a layer."""

    name: str
    shape: tuple[int, int, int, int]
    cost: Cost


def cost(
    network: str | Expansion,
    clip: ClipSpec | None = None,
    *,
    num_classes: int = 400,
    options: ModelOptions | None = None,
) -> Cost:
    """Returns the cost of a network for one clip.

    Args:
        network: name of a variant, or an expansion.
        clip: input clip, of which only frames and size matter. Defaults to the training clip.
        num_classes: number of outputs of the classifier.
        options: options of the network. Defaults to `ModelOptions()`.

    Raises:
        ValueError: an unknown variant, or a value out of range.
    """
    return sum((layer.cost for layer in layer_costs(network, clip, num_classes=num_classes, options=options)), Cost())


def layer_costs(
    network: str | Expansion,
    clip: ClipSpec | None = None,
    *,
    num_classes: int = 400,
    options: ModelOptions | None = None,
) -> list[LayerCost]:
    """Returns the cost of each layer in execution order. The arguments are those of `cost`."""
    require_classes(num_classes)
    expansion = as_expansion(network)
    return list(_layers(plan(expansion, options), clip or expansion.clip, expansion.clip.size, num_classes))


def parameters(expansion: Expansion, num_classes: int, options: ModelOptions) -> Iterator[tuple[str, int]]:
    """Yields the name and the number of trainable parameters of each layer, counted lazily."""
    for layer in _layers(plan(expansion, options), expansion.clip, expansion.clip.size, num_classes):
        yield layer.name, layer.cost.params


def _layers(architecture: Architecture, clip: ClipSpec, train_size: int, num_classes: int) -> Iterator[LayerCost]:
    *stem, last = _stem(architecture, clip)
    yield from (*stem, last)
    shape, width = last.shape, architecture.stem_width
    for name, stage_plan in zip(STAGE_NAMES, architecture.stages):
        for block in range(stage_plan.depth):
            stride, se = stage_plan.stride if block == 0 else 1, architecture.has_se(block)
            rows = list(_block(f"{name}_{block}", architecture, stage_plan, shape, width, stride, se))
            yield from rows
            shape, width = rows[-1].shape, stage_plan.width
    yield from _head(architecture, shape, train_size, num_classes)


def _stem(architecture: Architecture, clip: ClipSpec) -> Iterator[LayerCost]:
    side, width = math.ceil(clip.size / 2), architecture.stem_width
    frames = clip.frames - (architecture.options.input == "difference")
    shape = (frames, side, side, width)
    yield _conv("conv1_xy", shape, 3 * 9, norm=False)
    yield _conv("conv1_t", shape, architecture.options.stem_kernel)


def _block(
    name: str, architecture: Architecture, stage: StagePlan, shape: tuple[int, ...], width: int, stride: int, se: bool
) -> Iterator[LayerCost]:
    frames, inner, separable = shape[0], stage.inner_width, architecture.options.separable
    side = math.ceil(shape[1] / stride)
    if stride > 1 or width != stage.width:
        norm = architecture.has_shortcut_norm(width != stage.width)
        yield _conv(f"{name}_shortcut", (frames, side, side, stage.width), width, norm=norm)
    yield _conv(f"{name}_conv_a", (frames, shape[1], shape[2], inner), width * (1 if separable else 3))
    yield _conv(f"{name}_conv_b", (frames, side, side, inner), 27 if separable else inner * 9)
    if se:
        yield fully_connected(f"{name}_se_reduce", inner, se_width(inner), bias=True, paper_bias=False)
        yield fully_connected(f"{name}_se_expand", se_width(inner), inner, bias=True, paper_bias=False)
    yield _conv(f"{name}_conv_c", (frames, side, side, stage.width), inner)


def _head(architecture: Architecture, shape: tuple[int, ...], train_size: int, num_classes: int) -> Iterator[LayerCost]:
    frames, side, width = shape[0], shape[1], architecture.head_width
    yield _conv("conv5", (frames, side, side, width), architecture.stages[-1].width)
    positions = 1
    if architecture.options.head_pool != "global":
        positions = max(1, side - pool_window(train_size) + 1)  # windows of the training size along one axis
    yield fully_connected("fc1", width, FC1_WIDTH, bias=False, paper_bias=True, side=positions)
    yield fully_connected("fc2", FC1_WIDTH, num_classes, bias=True, paper_bias=True, side=positions)


def _conv(name: str, shape: tuple[int, int, int, int], inputs: int, *, norm: bool = True) -> LayerCost:
    """Counts a convolution without bias and its batch norm. `inputs`: number of weights per output channel."""
    outputs, weights = math.prod(shape), inputs * shape[-1]
    return LayerCost(name, shape, Cost(outputs * inputs, weights + 2 * shape[-1] * norm, weights, outputs))


def fully_connected(name: str, inputs: int, outputs: int, *, bias: bool, paper_bias: bool, side: int = 1) -> LayerCost:
    """Counts a dense layer at `side` x `side` positions."""
    positions, weights = side * side, inputs * outputs
    params, params_paper = weights + outputs * bias, weights + outputs * paper_bias
    return LayerCost(
        name, (1, side, side, outputs), Cost(positions * weights, params, params_paper, positions * outputs)
    )
