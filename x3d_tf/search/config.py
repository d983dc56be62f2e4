"""Settings of the expansion search. Imports no TensorFlow."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from x3d_tf.errors import check_field_types, require
from x3d_tf.search.axes import AXES, FIRST_STRIDE
from x3d_tf.text import did_you_mean

CostName = Literal["macs", "params", "activations", "latency"]
# Unit of the budgets, and the factor to it from the unit in which the cost is counted.
UNITS: dict[str, tuple[str, float]] = {
    "macs": ("GMACs", 1e-9),
    "params": ("M parameters", 1e-6),
    "activations": ("M activations", 1e-6),
    "latency": ("ms", 1.0),
}
TOLERANCE = 1.01  # a budget is met up to 1 % more: X3D-XS has 0.605 GMACs for 0.6

_MAX_SEEDS = 100
_MAX_STEPS = 100
_MAX_KEEP = 100


@dataclass(frozen=True)
class ExpandConfig:
    """Settings of the expansion search (paper, section 3.3 and appendix A.3).

    Attributes:
        budget_gmacs: the cost at which the search ends, for the cost "macs": GMACs per training clip.
        budget: the cost at which the search ends, for the other costs: millions of parameters or activations, or
            milliseconds per clip.
        intermediate_budgets: further costs, ascending and below the final one, in its unit. A network of the family is
            found for each of them, and the expansion continues from the network before its contraction, as for the
            paper's X3D-S.
        cost: the cost that budgets limit and that decides between equal scores. "params" counts all trainable
            parameters, "latency" is measured. Factors are always solved for multiply-adds.
        axes: names of the axes, from fast, temporal, spatial, depth, width and bottleneck. Of candidates with equal
            score and cost the first axis wins.
        seeds: number of trainings per candidate, whose scores are averaged.
        halving: fraction of the training schedule, in (0, 1), with which all candidates of a step are scored before the
            better half is scored with all of it; 0 scores all candidates with all of it.
        keep: number of the best networks of a step that the next one expands (beam search).
        max_steps: largest number of expansion steps.
        contraction: "last" reduces the last expansion of a network that exceeds a budget, "all" scores one contraction
            along each axis and takes the best, as for the paper's X3D-S.
        regularisation: "fixed" increases the regularisation at steps 8, 11 and 13, as in the paper; "rule" after each
            step whose training score exceeds the validation score by more than `deviation`.
        deviation: difference of the scores for "rule". The paper prints none.
        first_stride: temporal stride, in source frames, of the first network with two frames. The paper prints none; 16
            leads to that of X3D-XS.

    Raises:
        SettingTypeError, UserError: names the field, the rule and the value received.
    """

    budget_gmacs: float | None = None
    budget: float | None = None
    intermediate_budgets: tuple[float, ...] = ()
    cost: CostName = "macs"
    axes: tuple[str, ...] = tuple(AXES)
    seeds: int = 1
    halving: float = 0.0
    keep: int = 1
    max_steps: int = 20
    contraction: Literal["last", "all"] = "last"
    regularisation: Literal["fixed", "rule"] = "fixed"
    deviation: float = 0.05
    first_stride: float = FIRST_STRIDE

    def __post_init__(self) -> None:
        check_field_types(self)
        unused = "budget" if self.cost == "macs" else "budget_gmacs"
        rule = f'not be set for the cost "{self.cost}": {self.budget_setting} states its budget'
        require(getattr(self, unused) is None, f"ExpandConfig.{unused}", rule, getattr(self, unused))
        final = self.budget_gmacs if self.cost == "macs" else self.budget
        require(final is not None, self.budget_setting, f"be given, in {UNITS[self.cost][0]}")
        require(0 < (final or 0) < math.inf, self.budget_setting, "be positive", final)
        ascending = all(low < high for low, high in itertools.pairwise((0.0, *self.budgets)))
        rule = f"be positive, ascending and below {self.budget_setting} = {final:g}"
        require(ascending, "ExpandConfig.intermediate_budgets", rule, self.intermediate_budgets)
        require(len(self.axes) > 0, "ExpandConfig.axes", "name at least one axis", self.axes)
        for name in self.axes:
            question = did_you_mean(name, AXES)
            rule = f"have names from {', '.join(AXES)}" + (f" ({question})" if question else "")
            require(name in AXES, "ExpandConfig.axes", rule, name)
        require(len(set(self.axes)) == len(self.axes), "ExpandConfig.axes", "have distinct names", self.axes)
        for field, most in (("seeds", _MAX_SEEDS), ("keep", _MAX_KEEP), ("max_steps", _MAX_STEPS)):
            value = getattr(self, field)
            require(1 <= value <= most, f"ExpandConfig.{field}", f"be in [1, {most}]", value)
        require(0 <= self.halving < 1, "ExpandConfig.halving", "be in [0, 1)", self.halving)
        require(0 <= self.deviation < math.inf, "ExpandConfig.deviation", "be at least 0", self.deviation)
        require(0 < self.first_stride < math.inf, "ExpandConfig.first_stride", "be positive", self.first_stride)

    @property
    def budget_setting(self) -> str:
        """Name of the setting that states the final budget."""
        return "ExpandConfig.budget_gmacs" if self.cost == "macs" else "ExpandConfig.budget"

    @property
    def budgets(self) -> tuple[float, ...]:
        """All budgets in ascending order, in the unit of the cost."""
        final = self.budget_gmacs if self.cost == "macs" else self.budget
        assert final is not None
        return (*self.intermediate_budgets, final)

    @property
    def first_budget_setting(self) -> str:
        """Name of the setting that states the first budget."""
        return "ExpandConfig.intermediate_budgets" if self.intermediate_budgets else self.budget_setting

    def exceeds(self, cost: float, budget: float) -> bool:
        """Returns True if a cost, in the unit in which it is counted, exceeds a budget by more than 1 %."""
        return cost * UNITS[self.cost][1] > TOLERANCE * budget

    def is_near(self, cost: float, budget: float) -> bool:
        """Returns True if a cost within a budget is nearer to it, on a logarithmic scale, than twice the cost."""
        return cost * UNITS[self.cost][1] > budget / math.sqrt(2)

    def text(self, cost: float) -> str:
        """Returns a cost, as it is counted, in the unit of the budgets."""
        unit, factor = UNITS[self.cost]
        return f"{cost * factor:.4g} {unit}"
