"""Multiply-adds, parameters and activations of a network, counted from its plan. Imports no TensorFlow."""

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
    """What one clip costs.

    Attributes:
        macs: multiply-adds of the convolutions, squeeze-excitations and fully connected layers, as the paper counts.
        params: all trainable parameters.
        params_paper: as the paper prints them: without batch norm and the biases of squeeze-excitation, and with a
            bias of fc1 that the network does not have. The only convention found to give all its figures.
        activations: elements put out by the convolutions and fully connected layers.
    """

    macs: int = 0
    params: int = 0
    params_paper: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field) + getattr(other, field) for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class LayerCost:
    """One row of the per-layer table: the layer's name, its output shape (T, H, W, C) and its cost."""

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
    """Counts a network on one clip.

    Args:
        network: a variant's name or an expansion.
        clip: what it is run on; the training clip unless given. Only frames and size matter.
        num_classes: outputs of the classifier.
        options: the builder's choices; the defaults unless given.

    Raises:
        ValueError: an unknown variant, or a value outside its range.
    """
    return sum((layer.cost for layer in layer_costs(network, clip, num_classes=num_classes, options=options)), Cost())


def layer_costs(
    network: str | Expansion,
    clip: ClipSpec | None = None,
    *,
    num_classes: int = 400,
    options: ModelOptions | None = None,
) -> list[LayerCost]:
    """The same count as `cost`, one row a layer, in execution order."""
    require_classes(num_classes)
    expansion = as_expansion(network)
    return list(_layers(plan(expansion, options), clip or expansion.clip, expansion.clip.size, num_classes))


def parameters(expansion: Expansion, num_classes: int, options: ModelOptions) -> Iterator[tuple[str, int]]:
    """The layers of a network and their trainable parameters, counted one by one as they are asked for."""
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
        positions = max(1, side - pool_window(train_size) + 1)  # windows of the training size, along one axis
    yield fully_connected("fc1", width, FC1_WIDTH, bias=False, paper_bias=True, side=positions)
    yield fully_connected("fc2", FC1_WIDTH, num_classes, bias=True, paper_bias=True, side=positions)


def _conv(name: str, shape: tuple[int, int, int, int], inputs: int, *, norm: bool = True) -> LayerCost:
    """A convolution without bias, and its batch norm: `inputs` are the weights of one output channel."""
    outputs, weights = math.prod(shape), inputs * shape[-1]
    return LayerCost(name, shape, Cost(outputs * inputs, weights + 2 * shape[-1] * norm, weights, outputs))


def fully_connected(name: str, inputs: int, outputs: int, *, bias: bool, paper_bias: bool, side: int = 1) -> LayerCost:
    """A dense layer at `side` x `side` positions."""
    positions, weights = side * side, inputs * outputs
    params, params_paper = weights + outputs * bias, weights + outputs * paper_bias
    return LayerCost(
        name, (1, side, side, outputs), Cost(positions * weights, params, params_paper, positions * outputs)
    )
