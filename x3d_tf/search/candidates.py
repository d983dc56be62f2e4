"""Networks to score in a search, their scores, and the regularisation of their training. Imports no TensorFlow."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from x3d_tf.errors import check_field_types, require
from x3d_tf.modeling.cost import Cost
from x3d_tf.modeling.expansion import Expansion


@dataclass(frozen=True)
class Phase:
    """Regularisation of the trainings of a step (paper, appendix A.3).

    Attributes:
        bn_group: number of clips that share batch-norm statistics.
        batch_factor: factor of the batch size. By linear scaling, double batches take half the steps.
        drop_connect: rate of drop-connect.
    """

    bn_group: int
    batch_factor: int
    drop_connect: float


PHASES = (Phase(16, 2, 0.0), Phase(8, 1, 0.0), Phase(8, 1, 0.1), Phase(8, 1, 0.2))
PHASE_STEPS = (1, 8, 11, 13)  # the steps at which the paper begins them


@dataclass(frozen=True)
class Network:
    """A network among which a step of the search chooses.

    Attributes:
        step: number of the step, from 1.
        axis: name of the axis along which the parent was expanded or contracted.
        parent: the network that was expanded or contracted.
        expansion: the factors of the network.
        contracts: True for a contraction, which belongs to the step before it.
        cost: cost for one training clip.
        ratio: multiply-adds, relative to the parent.
        budgeted: the cost that budgets limit: a number of `cost`, or the latency in milliseconds.
    """

    step: int
    axis: str
    parent: Expansion
    expansion: Expansion
    contracts: bool
    cost: Cost
    ratio: float
    budgeted: float


@dataclass(frozen=True)
class Candidate:
    """A training that a search asks for: a network, and how to train it.

    Attributes:
        network: the network.
        seed: number of the training of this network, from 0.
        share: fraction of the training schedule, in (0, 1].
        phase: regularisation of the training.
    """

    network: Network
    seed: int
    share: float
    phase: Phase

    @property
    def expansion(self) -> Expansion:
        """The factors of the network."""
        return self.network.expansion

    @property
    def step(self) -> int:
        """Number of the step, from 1."""
        return self.network.step

    @property
    def axis(self) -> str:
        """Name of the axis."""
        return self.network.axis


@dataclass(frozen=True)
class Score:
    """Result of training and validating a candidate.

    Attributes:
        value: validation metric, such as top-1 in [0, 1]; higher is better. None if the candidate failed.
        standard_error: standard error of `value` from the number of validation videos; 0 if unknown.
        seconds: duration.
        training: the same metric on the training data, if measured.
        reason: reason of a failure; None for a success.

    Raises:
        SettingTypeError, UserError: a number is not finite, or a failure has no reason or has a value.
    """

    value: float | None
    standard_error: float = 0.0
    seconds: float = 0.0
    training: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require((self.value is None) == bool(self.reason), "Score.reason", "be given if there is no value", self.reason)
        for name in ("value", "training"):
            number = getattr(self, name)
            require(number is None or math.isfinite(number), f"Score.{name}", "be finite", number)
        for name in ("standard_error", "seconds"):
            number = getattr(self, name)
            require(0 <= number < math.inf, f"Score.{name}", "be at least 0", number)


@dataclass(frozen=True)
class Result:
    """Scores of a network, one for each seed."""

    network: Network
    scores: tuple[Score, ...]

    @property
    def reason(self) -> str | None:
        """Reason of the first failure, if any: a mean of the other seeds would favour the network."""
        return next((score.reason for score in self.scores if score.reason), None)

    @property
    def value(self) -> float:
        """Mean of the scores; -inf if one of them failed."""
        return -math.inf if self.reason else statistics.fmean(self._values)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; 0 if a score failed.

        The spread of the seeds and the standard error of a single score are independent, so that their squares add up.
        The latter does not decrease with the number of seeds, which are validated on the same videos.
        """
        if self.reason:
            return 0.0
        values = self._values
        spread = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
        return math.sqrt(spread + statistics.fmean(score.standard_error**2 for score in self.scores))

    @property
    def training(self) -> float | None:
        """Mean of the training scores; None if one was not measured."""
        trained = [score.training for score in self.scores if score.training is not None]
        return statistics.fmean(trained) if len(trained) == len(self.scores) else None

    @property
    def seconds(self) -> float:
        """Duration of all its trainings."""
        return sum(score.seconds for score in self.scores)

    @property
    def _values(self) -> list[float]:
        return [score.value for score in self.scores if score.value is not None]


def are_tied(first: Result, second: Result) -> bool:
    """Returns True if two results differ by at most the standard error of their difference."""
    error = math.hypot(first.standard_error, second.standard_error)
    return abs(first.value - second.value) <= error


def ranked(results: Sequence[Result]) -> list[Result]:
    """Returns the results without failures, best first. Of equal scores the lower cost comes first, then the order."""
    successes = [result for result in results if result.reason is None]
    return sorted(successes, key=lambda result: (-result.value, result.network.budgeted))
