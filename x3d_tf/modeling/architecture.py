"""Computes the widths and depths of all layers from the expansion factors. Imports no TensorFlow.

This module does all rounding of the package.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, NamedTuple

from x3d_tf.errors import SettingTypeError, check_field_types, require
from x3d_tf.modeling.expansion import EFFICIENTNETS, VARIANTS, Expansion, Family, as_expansion

HeadPool = Literal["global", "fixed_probabilities", "fixed_logits"]

BASE_WIDTHS = (24, 48, 96, 192)  # res2..res5 of X2D, paper Table 1; conv1 has the width of res2
BASE_DEPTHS = (1, 2, 5, 3)
FC1_WIDTH = 2048
NORM_EPSILON = 1e-5  # added to the variance in batch norms
MAP_STRIDE = 32  # pixels of a clip per cell of the last feature maps, even if the last cell extends beyond the clip
REGION_BINS = 7  # bins along each axis of a box (PySlowFast `DETECTION.ROI_XFORM_RESOLUTION`)
STAGE_NAMES = tuple(f"res{number}" for number in range(2, 9))  # X3D has the first four, EfficientNet3D all


class _MBConvStage(NamedTuple):
    depth: int
    width: int
    side: int  # of the kernel
    stride: int


_MBCONV_STAGES = (  # EfficientNet-B0: Tan and Le 2019, Table 1
    _MBConvStage(1, 16, 3, 1),
    _MBConvStage(2, 24, 3, 2),
    _MBConvStage(2, 40, 5, 2),
    _MBConvStage(3, 80, 3, 2),
    _MBConvStage(3, 112, 5, 1),
    _MBConvStage(4, 192, 5, 2),
    _MBConvStage(1, 320, 3, 1),
)
_MBCONV_STEM, _MBCONV_HEAD = 32, 1280

# Settings may come from an untrusted file, so they have limits, far above the published networks.
MAX_BLOCKS = 1000
MAX_CHANNELS = 16_384
MAX_CLASSES = 100_000
_MAX_STEM_KERNEL = 99
_MAX_BN_GROUP = 65_536


@dataclass(frozen=True)
class ModelOptions:
    """Options of the network that the six factors do not determine.

    The defaults are those of PySlowFast, the code of the paper's authors, except for `head_pool`: PySlowFast uses
    `fixed_probabilities` for clips larger than the training crop. At the training crop all poolings agree.

    Attributes:
        family: "x3d", or EfficientNet3D, which the paper compares X3D with in Table 7. The paper's text does not
            determine that network, so there are two. "efficientnet3d" is faithful to its name: the stages of
            EfficientNet-B0, with 3xkxk kernels and a last convolution of 1280 channels times γw. With γb = 4,
            "efficientnet3d_matched" is nearer to the printed parameters: kxkxk kernels, and a last convolution as wide
            as the inside of the last block. Both have X3D's stem, squeeze-excitation and activations, neither
            projection shortcuts nor fc1.
        input: "rgb", or "difference": the network sees the differences between consecutive frames, one fewer than the
            clip has, and no still image. "difference" is not from the paper. It suits small datasets whose classes
            differ by motion alone: the network cannot overfit to the backgrounds.
        stem_kernel: temporal kernel size of conv1 in frames, odd. The paper prints 3, but its counts imply 5.
        se: blocks with squeeze-excitation: every other block, starting with the first of each stage (`alternate`),
            `all` or `none`.
        swish: swish after the 3x3x3 convolution; False uses ReLU (paper, appendix B).
        swish_before: swish also before it, the literal reading of the paper's appendix A.3; False uses ReLU.
        separable: channel-wise 3x3x3 convolution; False is the paper's ablation, a dense 3x1x1 before a dense 1x3x3.
        shortcut_norm: batch norm on the projection shortcuts: `always` (PySlowFast) or `on_width_change`
            (pytorchvideo, which has none in res2).
        head_pool: pooling of clips larger than the training crop. `global` averages over all positions.
            `fixed_probabilities` (PySlowFast, and pytorchvideo by default) and `fixed_logits` (pytorchvideo built
            without its final softmax) average over windows of the training size and all frames, classify each window,
            and average the probabilities (softmax, or sigmoid for multi-label models) or the logits. They reject clips
            smaller than the training crop, which contain no complete window.
        bn_group: number of clips that share batch-norm statistics in training.
        drop_connect: rate at which the last stage drops a residual branch in training; earlier stages use linearly
            lower rates.
        dropout: dropout rate before the classifier.

    Raises:
        TypeError, ValueError: an option is invalid. Names the option, the rule and the value received.
    """

    family: Family = "x3d"
    input: Literal["rgb", "difference"] = "rgb"
    stem_kernel: int = 5
    se: Literal["alternate", "all", "none"] = "alternate"
    swish: bool = True
    swish_before: bool = False
    separable: bool = True
    shortcut_norm: Literal["always", "on_width_change"] = "always"
    head_pool: HeadPool = "global"
    bn_group: int = 8
    drop_connect: float = 0.0
    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_field_types(self)
        odd = 1 <= self.stem_kernel <= _MAX_STEM_KERNEL and self.stem_kernel % 2 == 1
        rule = f"be odd and in [1, {_MAX_STEM_KERNEL}]"
        require(odd, "ModelOptions.stem_kernel", rule, self.stem_kernel)
        within = 1 <= self.bn_group <= _MAX_BN_GROUP
        require(within, "ModelOptions.bn_group", f"be in [1, {_MAX_BN_GROUP}]", self.bn_group)
        require(0 <= self.drop_connect < 1, "ModelOptions.drop_connect", "be in [0, 1)", self.drop_connect)
        require(0 <= self.dropout < 1, "ModelOptions.dropout", "be in [0, 1)", self.dropout)
        if self.family != "x3d":
            where = f'if ModelOptions.family is "{self.family}"'
            rule = f"be True {where}: EfficientNet3D has no dense form"
            require(self.separable, "ModelOptions.separable", rule, self.separable)
            rule = f'be "always" {where}: EfficientNet3D has no projection shortcuts'
            require(self.shortcut_norm == "always", "ModelOptions.shortcut_norm", rule, self.shortcut_norm)


@dataclass(frozen=True)
class StagePlan:
    """A stage of blocks.

    Attributes:
        depth: number of blocks.
        width, inner_width: outer and inner channels.
        stride: spatial stride of the first block.
        kernel: kernel of the channel-wise convolutions: frames, rows, columns.
        first_inner_width: inner channels of the first block if they differ from those of the others.
    """

    depth: int
    width: int
    inner_width: int
    stride: int = 2
    kernel: tuple[int, int, int] = (3, 3, 3)
    first_inner_width: int | None = None


@dataclass(frozen=True)
class BlockPlan:
    """A block of a stage.

    Attributes:
        stage, index: number of its stage, and its number in the stage, counted from 0.
        width, inner_width: outer and inner channels.
        stride: spatial stride.
        kernel: kernel of the channel-wise convolution.
        expands: whether a convolution to the inner channels comes first.
        shortcut: "identity"; or, if the block changes the width or the size, "projection" (X3D) or None
            (EfficientNet3D, where such blocks are not residual).
        shortcut_norm: whether a projection has a batch norm.
        se: whether the block has squeeze-excitation.
        drop_rate: rate at which training drops the residual branch.
        is_last: whether it is the last block of its stage.
    """

    stage: int
    index: int
    width: int
    inner_width: int
    stride: int
    kernel: tuple[int, int, int]
    expands: bool
    shortcut: Literal["identity", "projection"] | None
    shortcut_norm: bool
    se: bool
    drop_rate: float
    is_last: bool

    @property
    def name(self) -> str:
        """Prefix of the names of its layers, such as res2_0."""
        return f"{STAGE_NAMES[self.stage]}_{self.index}"

    @property
    def end(self) -> str:
        """Name of its last layer. The output of a stage has the name of the stage."""
        return STAGE_NAMES[self.stage] if self.is_last else self.name


@dataclass(frozen=True)
class Architecture:
    """Integer widths and depths of a network, from which it is built and its cost is counted.

    Attributes:
        stem_width: channels of conv1.
        stages: res2 to res5, or to res8 in EfficientNet3D.
        head_width: channels of conv5.
        options: the options that the factors do not determine.
    """

    stem_width: int
    stages: tuple[StagePlan, ...]
    head_width: int
    options: ModelOptions

    def blocks(self) -> Iterator[BlockPlan]:
        """Yields the blocks in execution order."""
        inputs = self.stem_width
        for number, stage in enumerate(self.stages):
            for index in range(stage.depth):
                stride, widens = stage.stride if index == 0 else 1, inputs != stage.width
                inner = stage.inner_width if index else stage.first_inner_width or stage.inner_width
                yield BlockPlan(
                    number,
                    index,
                    stage.width,
                    inner,
                    stride,
                    stage.kernel,
                    expands=self.is_x3d or inner != inputs,
                    shortcut=self.shortcut(stride > 1 or widens),
                    shortcut_norm=self.has_shortcut_norm(widens),
                    se=self.has_se(index),
                    drop_rate=self.drop_connect(number),
                    is_last=index == stage.depth - 1,
                )
                inputs = stage.width

    @property
    def is_x3d(self) -> bool:
        """Returns True for an X3D, which has projection shortcuts and fc1."""
        return self.options.family == "x3d"

    @property
    def last_stage(self) -> str:
        """Name of the last stage."""
        return STAGE_NAMES[len(self.stages) - 1]

    def shortcut(self, changes_shape: bool) -> Literal["identity", "projection"] | None:
        """Returns the shortcut of a block (see `BlockPlan`), which may change the width or the size."""
        if not changes_shape:
            return "identity"
        return "projection" if self.is_x3d else None

    def has_se(self, block: int) -> bool:
        """Returns whether block number `block` of a stage, counted from 0, has squeeze-excitation."""
        return self.options.se == "all" or (self.options.se == "alternate" and block % 2 == 0)

    def has_shortcut_norm(self, widens: bool) -> bool:
        """Returns whether a projection shortcut has a batch norm. `widens`: whether it changes the width."""
        return widens or self.options.shortcut_norm == "always"

    def drop_connect(self, stage: int) -> float:
        """Returns the drop rate of a stage, counted from 0: 0.4, 0.6, 0.8 and 1.0 of the option (as in PySlowFast).

        In EfficientNet3D the rates increase linearly over its seven stages, from 0.25 to 1.0 of the option.
        """
        return self.options.drop_connect * (stage + 2) / (len(self.stages) + 1)


def resolve(network: str | Expansion, options: ModelOptions | None = None) -> tuple[Expansion, ModelOptions]:
    """Returns the factors and the options of a network. The name of a variant determines `ModelOptions.family`.

    Args:
        network: a variant of X3D or EfficientNet3D, or any `Expansion`, whose family is that of the options.
        options: what the factors do not determine. Defaults to `ModelOptions()`.

    Raises:
        ValueError: unknown name, or options of another family than the name's.
        TypeError: neither a name nor an `Expansion`.
    """
    options, variants = options or ModelOptions(), VARIANTS | EFFICIENTNETS
    expansion = as_expansion(network, variants)
    if isinstance(network, str):
        family = variants[network].family
        rule = f'be "{family}" for the network {network}'
        require(options.family in ("x3d", family), "ModelOptions.family", rule, options.family)
        options = replace(options, family=family)
    return expansion, options


def plan(expansion: Expansion, options: ModelOptions | None = None) -> Architecture:
    """Returns the architecture of an expansion.

    It is paper Table 1, or EfficientNet-B0, times the factors, rounded as in the published networks.

    Raises:
        UserError: more than 1,000 blocks or 16,384 channels, or too few frames. Names the factor.
    """
    options = options or ModelOptions()
    has_enough_frames = options.input == "rgb" or expansion.gamma_t >= 2
    rule = 'be at least 2 if ModelOptions.input is "difference"'
    require(has_enough_frames, "Expansion.gamma_t", rule, expansion.gamma_t)
    return _plan_x3d(expansion, options) if options.family == "x3d" else _plan_efficientnet3d(expansion, options)


def _plan_x3d(expansion: Expansion, options: ModelOptions) -> Architecture:
    _require_bounds(expansion, BASE_WIDTHS[-1], BASE_WIDTHS[-1], sum(BASE_DEPTHS))
    widths = [round_width(width, expansion.gamma_w) for width in BASE_WIDTHS]
    stages = tuple(
        StagePlan(_depth(depth, expansion.gamma_d), width, _inner_width(width, expansion.gamma_b))
        for depth, width in zip(BASE_DEPTHS, widths)
    )
    return Architecture(widths[0], stages, stages[-1].inner_width, options)


def _plan_efficientnet3d(expansion: Expansion, options: ModelOptions) -> Architecture:
    """A block is γb times as wide inside as its input, or as wide in the first stage, as in EfficientNet."""
    _require_bounds(expansion, _MBCONV_HEAD, _MBCONV_STAGES[-1].width, sum(stage.depth for stage in _MBCONV_STAGES))
    matched = options.family == "efficientnet3d_matched"
    stem = inputs = round_width(_MBCONV_STEM, expansion.gamma_w)
    stages, ratio = [], 1.0
    for base in _MBCONV_STAGES:
        depth, width = _depth(base.depth, expansion.gamma_d), round_width(base.width, expansion.gamma_w)
        inner, first_inner = _inner_width(width, ratio), _inner_width(inputs, ratio)
        kernel = (base.side if matched else 3, base.side, base.side)
        stages.append(StagePlan(depth, width, inner, base.stride, kernel, first_inner))
        inputs, ratio = width, expansion.gamma_b
    last_inner = inner if depth > 1 else first_inner
    head = last_inner if matched else round_width(_MBCONV_HEAD, expansion.gamma_w)
    return Architecture(stem, tuple(stages), head, options)


def _require_bounds(expansion: Expansion, widest: int, widest_block: int, blocks: int) -> None:
    """Checks the limits of the factors before anything is rounded or counted with them.

    Args:
        expansion: the factors.
        widest: largest number of channels of a layer before the factors.
        widest_block: largest number of outer channels of a block before the factors.
        blocks: number of blocks before the factors.
    """
    rule = f"give at most {MAX_CHANNELS} channels"
    require(widest * expansion.gamma_w <= MAX_CHANNELS, "Expansion.gamma_w", rule, expansion.gamma_w)
    inner = widest_block * expansion.gamma_w * expansion.gamma_b
    require(inner <= MAX_CHANNELS, "Expansion.gamma_b", rule, expansion.gamma_b)
    rule = f"give at most {MAX_BLOCKS} blocks"
    require(blocks * expansion.gamma_d <= MAX_BLOCKS, "Expansion.gamma_d", rule, expansion.gamma_d)


def require_classes(num_classes: object) -> None:
    """Raises `UserError` unless `num_classes` is an integer within the limits."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise SettingTypeError(f"num_classes must be an integer, got {num_classes!r}")
    within = 1 <= int(num_classes) <= MAX_CLASSES
    require(within, "num_classes", f"be in [1, {MAX_CLASSES}]", num_classes)


def round_width(width: int, factor: float) -> int:
    """Rounds `width * factor` to the nearest multiple of 8, but to at least 8 and to no less than 0.9 of it."""
    exact = width * factor
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def se_width(inner_width: int) -> int:
    """Returns the bottleneck width of a squeeze-excitation over `inner_width` channels."""
    return round_width(inner_width, 1 / 16)


def pool_window(train_size: int) -> int:
    """Returns the window side of the head's fixed poolings: positions of conv5 for a crop of `train_size` pixels."""
    return math.ceil(train_size / MAP_STRIDE)


def require_window(options: ModelOptions, size: int, train_size: int) -> None:
    """Checks that clips of `size` pixels contain a window of the head's fixed poolings.

    Raises:
        UserError: the clips are too small. Names the rule and both sizes.
    """
    smallest, rule = window_rule(options, train_size)
    require(size >= smallest, "the side of a clip", rule, size)


def window_rule(options: ModelOptions, train_size: int) -> tuple[int, str]:
    """Returns the smallest valid side of a clip in pixels, and the rule as text for a message."""
    smallest = 1 if options.head_pool == "global" else MAP_STRIDE * (pool_window(train_size) - 1) + 1
    rule = (
        f'be at least {smallest} pixels if ModelOptions.head_pool is "{options.head_pool}", which averages over '
        f"windows of the training crop of {train_size} pixels"
    )
    return smallest, rule


def _inner_width(width: int, gamma_b: float) -> int:
    inner = int(gamma_b * width)
    require(inner >= 1, "Expansion.gamma_b", f"give at least 1 inner channel for a width of {width}", gamma_b)
    return inner


def _depth(depth: int, gamma_d: float) -> int:
    return max(1, math.ceil(depth * gamma_d - 1e-6))  # a factor rounded to float32 must not add a block
