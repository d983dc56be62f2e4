"""The six axes along which a network is expanded, and the factors that give a cost. Imports no TensorFlow.

The layers of a network are quantised: widths are multiples of 8, depths and frames are integers, and the crop has an
even number of pixels. An axis therefore has a sequence of settings, whose cost ascends. The paper only prints nominal
factors (appendix A.3; "the exact expansion factors vary slightly", footnote 3), so the factors are solved for.
"""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from x3d_tf.errors import UserError, require
from x3d_tf.modeling.architecture import (
    BASE_DEPTHS,
    BASE_WIDTHS,
    MAX_BLOCKS,
    MAX_CHANNELS,
    ModelOptions,
    StagePlan,
    plan,
)
from x3d_tf.modeling.expansion import BASE_CROP, BASE_SCALE, MAX_FRAMES, MAX_SIDE, Expansion

RATE = 2  # ĉ, the factor by which a step increases the cost (paper, section 3.3)
FIRST_STRIDE = 16.0  # stride of the first two frames; not printed, but X3D-XS has 12 = 0.75 * 16

Count = Callable[[Expansion], int]  # multiply-adds of a network


@dataclass(frozen=True)
class Axis:
    """An axis of the expansion.

    Attributes:
        name: name of the axis in settings and files.
        symbol: symbol of the paper.
        title: name of the operation in the paper.
        factor: field of `Expansion` that the operation multiplies.
        printed: the multiplier printed in the paper, where the solver starts.
        source: section of the paper that prints it.
        stride: factor of the temporal stride when the number of frames doubles; None for the other axes.
    """

    name: str
    symbol: str
    title: str
    factor: str
    printed: float
    source: str
    stride: float | None = None

    def value(self, network: Expansion) -> float:
        """Returns the factor of a network that this axis changes."""
        return float(getattr(network, self.factor))

    def applied(self, network: Expansion, value: float, first_stride: float = FIRST_STRIDE) -> Expansion:
        """Returns a network with another value of the factor; the axes of time change the temporal stride with it.

        Args:
            network: the network to change.
            value: new value of `factor`.
            first_stride: temporal stride, in source frames, of two frames if the network has one frame. One frame has
                no stride, so X-Fast and X-Temporal coincide there (paper, section 4.1).
        """
        if self.stride is None:
            return replace(network, **{self.factor: value})  # type: ignore[arg-type]
        frames, before = int(value), network.gamma_t
        if frames == before:
            return network
        if before == 1:
            stride = first_stride * 2 / frames
        elif self.stride == 0.5:
            stride = network.gamma_tau * before / frames
        else:
            stride = network.gamma_tau * self.stride ** math.log2(frames / before)
        return replace(network, gamma_t=frames, gamma_tau=stride)


AXES: dict[str, Axis] = {
    row.name: row
    for row in (
        Axis("fast", "γτ", "X-Fast", "gamma_t", 2.0, "appendix A.3", stride=0.5),
        Axis("temporal", "γt", "X-Temporal", "gamma_t", 2.0, "appendix A.3", stride=0.75),
        Axis("spatial", "γs", "X-Spatial", "gamma_s", math.sqrt(2), "appendix A.3"),
        Axis("depth", "γd", "X-Depth", "gamma_d", 2.2, "appendix A.3"),
        Axis("width", "γw", "X-Width", "gamma_w", 2.0, "appendix A.3"),
        Axis("bottleneck", "γb", "X-Bottleneck", "gamma_b", 2.25, "appendix A.3"),
    )
}


def require_x3d(options: ModelOptions) -> None:
    """Raises `UserError` unless the options are those of an X3D, whose stages the settings of the axes follow."""
    rule = 'be "x3d" for a search: the axes expand X2D'
    require(options.family == "x3d", "ModelOptions.family", rule, options.family)


def expanded(
    axis: Axis, network: Expansion, count: Count, target: float, first_stride: float = FIRST_STRIDE
) -> Expansion | None:
    """Returns the network, expanded along one axis, whose multiply-adds are closest to a target.

    Args:
        axis: the axis.
        network: the network to expand.
        count: function that counts the multiply-adds of a network.
        target: multiply-adds wanted.
        first_stride: see `Axis.applied`.

    Returns:
        The network with the closest larger setting of the axis, the smaller one of two that are equally close. None if
        the limits of the factors allow no larger setting.
    """

    def macs(value: float) -> int:
        return count(axis.applied(network, value, first_stride))

    largest = _largest(axis, network)
    limit = min(axis.value(network) * axis.printed, largest)
    values = settings(axis, network, limit)
    while limit < largest and (not values or macs(values[-1]) < target):
        limit = min(limit * axis.printed, largest)
        values = settings(axis, network, limit)
    first = bisect_right(values, count(network), key=macs)
    above = bisect_left(values, target, lo=first, key=macs)
    closest = values[max(first, above - 1) : above + 1]
    if not closest:
        return None
    best = min(closest, key=lambda value: abs(macs(value) - target))
    return axis.applied(network, _shortest(axis, network, best), first_stride)


def contracted(axis: Axis, network: Expansion, count: Count, fits: Callable[[Expansion], bool]) -> Expansion | None:
    """Returns the network with the largest smaller setting of one axis that fits a budget (paper, section 3.3).

    Fewer frames keep the duration of the clip: the temporal stride increases.

    Args:
        axis: the axis to contract.
        network: the network, which exceeds the budget.
        count: function that counts the multiply-adds of a network.
        fits: function that tells whether a network is within the budget.

    Returns:
        The contracted network; None if no smaller setting of the axis fits.
    """
    axis = AXES["fast"] if axis.stride else axis

    def exceeds(value: float) -> bool:
        return not fits(axis.applied(network, value))

    values = settings(axis, network, axis.value(network))
    smaller = bisect_left(values, count(network), key=lambda value: count(axis.applied(network, value)))
    fitting = bisect_left(values, True, hi=smaller, key=exceeds)
    return axis.applied(network, _shortest(axis, network, values[fitting - 1])) if fitting else None


def settings(axis: Axis, network: Expansion, limit: float) -> Sequence[float]:
    """Returns a value of the factor for each setting of an axis, in ascending order, up to a limit of the factor.

    Several values may stand for one setting; none of them is at the border between two.
    """
    limit = min(limit, _largest(axis, network))
    if axis.factor == "gamma_t":
        return range(min(2, network.gamma_t), int(limit) + 1)  # a network of clips does not become one of images
    if axis.factor == "gamma_s":
        return [side / BASE_CROP for side in range(2, int(limit * BASE_CROP + 1e-6) + 1, 2)]
    if axis.factor == "gamma_d":
        borders = [index / math.lcm(*BASE_DEPTHS) for index in range(int(limit * math.lcm(*BASE_DEPTHS) + 1e-6) + 1)]
    elif axis.factor == "gamma_w":
        # Rounding to 8 changes at multiples of 1/48, its limit of 0.9 at multiples of 5/108: 9/432 and 20/432.
        borders = [index / 432 for index in range(int(limit * 432) + 2)]
    else:
        widths = [stage.width for stage in plan(network).stages]
        borders = sorted({index / width for width in widths for index in range(1, int(limit * width) + 2)})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(borders)]
    last = bisect_right(middles, limit)
    first = bisect_left(middles, True, hi=last, key=lambda value: _stages(axis, network, value) is not None)
    return middles[first:last]


def _largest(axis: Axis, network: Expansion) -> float:
    """Returns the largest value of the factor within the limits of the package."""
    return {
        "gamma_t": MAX_FRAMES,
        "gamma_s": MAX_SIDE / BASE_SCALE[0],
        "gamma_d": MAX_BLOCKS / sum(BASE_DEPTHS),
        "gamma_w": MAX_CHANNELS / BASE_WIDTHS[-1] / max(1.0, network.gamma_b),
        "gamma_b": MAX_CHANNELS / BASE_WIDTHS[-1] / network.gamma_w,
    }[axis.factor]


def _shortest(axis: Axis, network: Expansion, value: float) -> float:
    """Returns the value of a setting with the fewest decimals: the largest for depths, which are rounded up.

    The smallest for widths, which are rounded down.
    """
    if axis.factor in ("gamma_t", "gamma_s"):
        return value
    layers = _stages(axis, network, value)
    for digits in range(9):
        scale = 10**digits
        near = range(max(1, int(value * scale) - 10), int(value * scale) + 12)
        same = [index / scale for index in near if _stages(axis, network, index / scale) == layers]
        if same:
            return max(same) if axis.factor == "gamma_d" else min(same)
    return value


def _stages(axis: Axis, network: Expansion, value: float) -> tuple[StagePlan, ...] | None:
    """Returns the stages of the network with another value of the factor; None if a limit forbids it."""
    try:
        return plan(axis.applied(network, value)).stages
    except UserError:
        return None
