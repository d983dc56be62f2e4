"""Counts the multiply-adds, parameters and activations of a network: a set of parts. Imports no TensorFlow."""

import math
from dataclasses import dataclass, replace

from x3d_tf.modeling.architecture import REGION_BINS, ModelOptions, plan, require_classes, resolve
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.modeling.graph import DetectionHead, detection_graph, graph, norm_of, require_head
from x3d_tf.modeling.parts import Function
from x3d_tf.types import ClipSpec

Shape = tuple[int, ...]


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
    """A row of the per-layer table: name, output shape (T, H, W, C) and cost of a layer.

    The row of a convolution includes its batch norm.

    Attributes:
        kernel: shape of the kernel in the trainable network.
        bias: whether the layer has a bias.
        norm: whether a batch norm follows.
    """

    name: str
    shape: tuple[int, int, int, int]
    cost: Cost
    kernel: Shape
    bias: bool = False
    norm: bool = False


def cost(
    network: str | Expansion,
    clip: ClipSpec | None = None,
    *,
    num_classes: int = 400,
    options: ModelOptions | None = None,
    head: DetectionHead | None = None,
) -> Cost:
    """Returns the cost of a network for one clip.

    Args:
        network: name of a variant of X3D or EfficientNet3D, or an expansion.
        clip: input clip, of which only frames and size matter. Defaults to the training clip.
        num_classes: number of outputs of the classifier or the detector.
        options: options of the network. Defaults to `ModelOptions()`.
        head: head of a detector, see `build_detector`, whose cost is that of one box. Defaults to a classifier.

    Raises:
        ValueError: an unknown variant, or a value out of range.
    """
    rows = layer_costs(network, clip, num_classes=num_classes, options=options, head=head)
    return sum((row.cost for row in rows), Cost())


def layer_costs(
    network: str | Expansion,
    clip: ClipSpec | None = None,
    *,
    num_classes: int = 400,
    options: ModelOptions | None = None,
    head: DetectionHead | None = None,
) -> list[LayerCost]:
    """Returns the cost of each layer in execution order. The arguments are those of `cost`."""
    require_classes(num_classes)
    if head is not None:
        require_head(head)
    expansion, options = resolve(network, options)
    return _rows(expansion, clip, num_classes, options, head)


def parameters(
    expansion: Expansion, num_classes: int | None, options: ModelOptions, head: DetectionHead | None = None
) -> list[tuple[str, int]]:
    """Returns the name and the number of trainable parameters of each layer; `num_classes` is None without classifier.

    Counting is cheap even if the settings are untrusted, because `plan` limits the number of blocks.
    """
    return [(row.name, row.cost.params) for row in _rows(expansion, None, num_classes, options, head)]


def weight_shapes(
    expansion: Expansion, num_classes: int | None, options: ModelOptions, head: DetectionHead | None = None
) -> dict[str, list[Shape]]:
    """Returns the shapes of the arrays of each layer with weights, in the order of `Layer.get_weights`, by its name.

    The arguments are those of `parameters`.
    """
    shapes: dict[str, list[Shape]] = {}
    for row in _rows(expansion, None, num_classes, options, head):
        channels = row.kernel[-1:]
        shapes[row.name] = [row.kernel, channels] if row.bias else [row.kernel]
        if row.norm:
            shapes[norm_of(row.name)] = [channels] * 4  # scale, shift, moving mean and variance
    return shapes


def _rows(
    expansion: Expansion,
    clip: ClipSpec | None,
    num_classes: int | None,
    options: ModelOptions,
    head: DetectionHead | None,
) -> list[LayerCost]:
    architecture, parts, clip = plan(expansion, options), CountingParts(), clip or expansion.clip
    pixels = (clip.frames, clip.size, clip.size, 3)
    if head is None:
        train_size = expansion.clip.size
        graph(pixels, architecture, parts, train_size=train_size, num_classes=num_classes, activation="softmax")
    else:
        assert num_classes is not None  # a detector has a classifier
        detection_graph(pixels, (1, 4), architecture, parts, head=head, num_classes=num_classes)
    return parts.rows


class CountingParts:
    """Counts the cost of each layer.

    Its tensors are shapes without the axis of the clips, such as (T, H, W, C) for feature maps.

    Attributes:
        rows: the layers so far, in execution order.
    """

    def __init__(self) -> None:
        self.rows: list[LayerCost] = []

    def _count(self, name: str, shape: Shape, kernel: Shape, *, bias: bool = False, paper_bias: bool = False) -> Shape:
        """Counts a convolution or dense layer with a kernel (..., output channels), and returns its output shape."""
        outputs, channels = math.prod(shape), shape[-1]
        weights, inputs = math.prod(kernel), math.prod(kernel[:-1])
        params, params_paper = weights + bias * channels, weights + paper_bias * channels
        frames, height, width = (1, 1, 1, *shape[:-1])[-3:]
        row = LayerCost(
            name, (frames, height, width, channels), Cost(outputs * inputs, params, params_paper, outputs), kernel, bias
        )
        self.rows.append(row)
        return shape

    def normalize(self, x: Shape, name: str) -> Shape:
        return x

    def difference(self, x: Shape, name: str) -> Shape:
        return (x[0] - 1, *x[1:])

    def conv(self, x: Shape, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Shape:
        return self._count(name, _strided(x, stride, filters), (*kernel, x[-1], filters))

    def pointwise(self, x: Shape, filters: int, name: str, stride: int = 1) -> Shape:
        return self._count(name, _strided(x, stride, filters), (x[-1], filters))

    def channelwise(self, x: Shape, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Shape:
        return self._count(name, _strided(x, stride, x[-1]), (*kernel, x[-1]))

    def norm(self, x: Shape, name: str, *, ends_branch: bool = False) -> Shape:
        convolution = self.rows[-1]  # the paper does not count batch norm
        self.rows[-1] = replace(convolution, cost=convolution.cost + Cost(params=2 * x[-1]), norm=True)
        return x

    def activation(self, x: Shape, function: Function, name: str) -> Shape:
        return x

    def add(self, x: Shape, y: Shape, name: str) -> Shape:
        return x

    def drop_branch(self, x: Shape, rate: float, name: str) -> Shape:
        return x

    def mean(self, x: Shape, name: str) -> Shape:
        return (1, 1, 1, x[-1])

    def excitation(self, x: Shape, units: int, function: Function, name: str) -> Shape:
        return self._count(name, (*x[:-1], units), (x[-1], units), bias=True)

    def scale(self, x: Shape, factors: Shape, name: str) -> Shape:
        return x

    def head_input(self, x: Shape) -> Shape:
        return x

    def global_pool(self, x: Shape, name: str) -> Shape:
        return x[-1:]

    def time_mean(self, x: Shape) -> Shape:
        return x[1:]

    def window_pool(self, x: Shape, window: int, name: str) -> Shape:
        return (*(max(1, side - window + 1) for side in x[:2]), x[-1])

    def spatial_mean(self, x: Shape) -> Shape:
        return x[-1:]

    def spatial_max(self, x: Shape) -> Shape:
        return (*x[:-3], x[-1])

    def regions(self, x: Shape, boxes: Shape, clips: Shape, name: str) -> Shape:
        return (boxes[0], REGION_BINS, REGION_BINS, x[-1])

    def per_box(self, x: Shape, boxes: Shape) -> Shape:
        return (boxes[0], x[-1])

    def dense(self, x: Shape, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Shape:
        return self._count(name, (*x[:-1], units), (x[-1], units), bias=bias, paper_bias=True)

    def dropout(self, x: Shape, rate: float, name: str) -> Shape:
        return x

    def mean_probability(self, x: Shape, function: Function) -> Shape:
        return x[-1:]

    def probabilities(self, x: Shape, function: Function, name: str) -> Shape:
        return x


def _strided(shape: Shape, stride: int, channels: int) -> Shape:
    frames, height, width, _ = shape
    return (frames, math.ceil(height / stride), math.ceil(width / stride), channels)
