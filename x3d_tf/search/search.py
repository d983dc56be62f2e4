"""The expansion search as a state machine: asks for the scores of candidates, and chooses. Imports no TensorFlow.

The search trains nothing. Its state follows from its settings and from the scores recorded so far, so that a trace of
the scores is all that is needed to continue it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from x3d_tf.errors import UserError, require
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.axes import AXES, RATE, contracted, expanded, require_x3d
from x3d_tf.search.candidates import PHASE_STEPS, PHASES, Candidate, Network, Phase, Result, Score, are_tied, ranked
from x3d_tf.search.config import ExpandConfig

Latency = Callable[[Expansion], float]  # milliseconds of a network

_cost = functools.lru_cache(10_000)(cost)  # the solver compares the same networks several times


@dataclass(frozen=True)
class Step:
    """A finished step of the search: an expansion, or a contraction to a budget.

    Attributes:
        number: number of the step, from 1. A contraction has that of the expansion that exceeded the budget.
        contracts: True for a contraction.
        phase: regularisation of the trainings.
        results: the scored networks, in the order of the axes. With halving, those of the second round.
        dropped: with halving, the networks that only the first round scored.
        kept: the best networks, best first, which the next step expands.
        tied: True if the best two differ by at most the standard error of their difference.
    """

    number: int
    contracts: bool
    phase: Phase
    results: tuple[Result, ...]
    dropped: tuple[Result, ...]
    kept: tuple[Result, ...]
    tied: bool

    @property
    def best(self) -> Result:
        """The network with the highest score."""
        return self.kept[0]


@dataclass(frozen=True)
class Member:
    """A network of the family.

    Attributes:
        budget: the budget that the network was found for.
        result: the network with its scores; None if it is the start network, which is not scored.
    """

    budget: float
    result: Result | None


class Search:
    """Progressive expansion with backward contraction (paper, section 3.3).

    Each step expands the best network of the last one along each axis, to twice its multiply-adds, and keeps the
    candidate with the highest score. A network whose cost exceeds 1.01 of a budget is contracted to it. A network with
    more than 1/√2 of a budget is taken for it: on a logarithmic scale it is nearer to the budget than the next step
    would be. The published networks have 90 to 101 % of their budgets.

    Args:
        config: settings of the search.
        start: network to start from. Defaults to X2D.
        options: options of the networks. Defaults to `ModelOptions()`.
        num_classes: number of classes, for the cost.
        latency: measures the latency of a network in milliseconds; required by the cost "latency".

    Attributes:
        latency: the same function.
        steps: the finished steps.
        family: a network for each budget met so far.
        failures: reason for each axis if all networks of a round failed. Their candidates are pending again.

    Raises:
        UserError: the first budget does not exceed the cost of the start network or is too near to it for an expansion,
            or the cost is the latency and there is no function that measures it, or the networks are not X3D.
    """

    def __init__(
        self,
        config: ExpandConfig,
        start: Expansion | None = None,
        *,
        options: ModelOptions | None = None,
        num_classes: int = 400,
        latency: Latency | None = None,
    ) -> None:
        require_x3d(options or ModelOptions())
        self.config, self.start = config, start or Expansion()
        self.latency = latency
        self._cost = functools.partial(_cost, num_classes=num_classes, options=options)
        self.steps: list[Step] = []
        self.family: list[Member] = []
        self.failures: dict[str, str] = {}
        self._dropped: tuple[Result, ...] = ()
        self._phase = 0
        self._round: dict[Candidate, Score | None] = {}
        self._check_first_budget()
        self._expand()
        networks = [candidate.network for candidate in self._round]
        meets = any(self._fits(network.expansion) or self._contractions(network) for network in networks)
        rule = f"leave room for an expansion of the start network, which has {config.text(self.budgeted(self.start))}"
        require(meets or not networks, config.first_budget_setting, rule, self._budget)

    def pending(self) -> tuple[Candidate, ...]:
        """Returns the candidates to score now, in any order; none if the search is finished."""
        return tuple(candidate for candidate, score in self._round.items() if score is None)

    def check(self, score: Score) -> None:
        """Raises `UserError` if a score lacks the training score that `ExpandConfig.regularisation` needs."""
        complete = self.config.regularisation == "fixed" or score.reason is not None or score.training is not None
        require(complete, "Score.training", 'be measured if ExpandConfig.regularisation is "rule"')

    def record(self, candidate: Candidate, score: Score) -> None:
        """Records the score of a pending candidate. The last score of a round ends it."""
        self.check(score)
        assert self._round[candidate] is None
        self._round[candidate], self.failures = score, {}
        if not self.pending():
            self._end_round()

    def winners(self) -> list[Result]:
        """Returns the best network of each expansion step."""
        return [step.best for step in self.steps if not step.contracts]

    def lineage(self, result: Result) -> list[Result]:
        """Returns the networks through which one was expanded from the start network, which is not among them."""
        line = [result]
        for step in reversed([step for step in self.steps if not step.contracts]):
            line += [kept for kept in step.kept if kept.network.expansion == line[-1].network.parent]
        return line[::-1]

    def budgeted(self, expansion: Expansion) -> float:
        """Returns the cost of a network that the budgets limit, in the unit in which it is counted."""
        if self.config.cost != "latency":
            return float(getattr(self._cost(expansion), self.config.cost))
        if self.latency is None:
            raise UserError('ExpandConfig.cost must not be "latency" where no function measures it')
        return self.latency(expansion)

    def _check_first_budget(self) -> None:
        cost, first = self.budgeted(self.start), self._budget
        rule = f"exceed the cost of the start network, {self.config.text(cost)}"
        require(not self.config.exceeds(cost, first), self.config.first_budget_setting, rule, first)

    def _end_round(self) -> None:
        """Chooses among the networks of a round, or has the better half scored with the complete schedule."""
        results = self._results()
        best = ranked(results)
        if not best:
            self.failures = {result.network.axis: result.reason or "" for result in results}
            self._round = dict.fromkeys(self._round)
            return
        first = next(iter(self._round))
        if first.share < 1:
            better = best[: max(self.config.keep, math.ceil(len(results) / 2))]
            self._dropped = tuple(result for result in results if result not in better)
            self._ask([result.network for result in results if result in better])
            return
        network, tied = results[0].network, len(best) > 1 and are_tied(*best[:2])
        kept = tuple(best[: 1 if network.contracts else self.config.keep])
        self.steps.append(Step(network.step, network.contracts, first.phase, tuple(results), self._dropped, kept, tied))
        self._dropped = ()
        if network.contracts:
            self.family.append(Member(self._budget, kept[0]))
        self._continue()

    def _results(self) -> list[Result]:
        scores: dict[Network, list[Score]] = {}
        for candidate, score in self._round.items():
            assert score is not None
            scores.setdefault(candidate.network, []).append(score)
        return [Result(network, tuple(values)) for network, values in scores.items()]

    @property
    def _budget(self) -> float:
        """The first budget without a network."""
        return self.config.budgets[len(self.family)]

    def _continue(self) -> None:
        """Takes the last winner for the budgets that it is near to, contracts it, or expands it further."""
        winner = self.winners()[-1]
        while len(self.family) < len(self.config.budgets):
            if self.config.exceeds(winner.network.budgeted, self._budget):
                contractions = self._contractions(winner.network)
                if contractions:
                    self._ask(contractions)
                    return
                before = self.lineage(winner)[:-1]
                self.family.append(Member(self._budget, before[-1] if before else None))
            elif self.config.is_near(winner.network.budgeted, self._budget):
                self.family.append(Member(self._budget, winner))
            else:
                break
        self._round = {}
        if len(self.family) < len(self.config.budgets) and winner.network.step < self.config.max_steps:
            self._expand()

    def _expand(self) -> None:
        """Asks for the scores of the next expansions, if the limits of the factors allow any."""
        winners = [step for step in self.steps if not step.contracts]
        parents = [result.network.expansion for result in winners[-1].kept] if winners else [self.start]
        self._phase = self._next_phase(len(winners) + 1, winners[-1].best if winners else None)
        networks: dict[Expansion, Network] = {}
        for parent in parents:
            for name in self.config.axes:
                target, stride = RATE * self._macs(parent), self.config.first_stride
                expansion = expanded(AXES[name], parent, self._macs, target, stride)
                if expansion is not None and expansion not in networks:
                    networks[expansion] = self._network(len(winners) + 1, name, parent, expansion, contracts=False)
        self._ask(list(networks.values()), self.config.halving or 1.0)

    def _contractions(self, network: Network) -> list[Network]:
        """Returns the contractions of a network to the next budget that are still larger than its parent."""
        axes = self.config.axes if self.config.contraction == "all" else (network.axis,)
        networks: dict[Expansion, Network] = {}
        for name in axes:
            expansion = contracted(AXES[name], network.expansion, self._macs, self._fits)
            if expansion is not None and self._macs(expansion) > self._macs(network.parent):
                contraction = self._network(network.step, name, network.expansion, expansion, contracts=True)
                networks.setdefault(expansion, contraction)
        return list(networks.values())

    def _fits(self, expansion: Expansion) -> bool:
        return not self.config.exceeds(self.budgeted(expansion), self._budget)

    def _ask(self, networks: Sequence[Network], share: float = 1.0) -> None:
        """Begins a round: asks for the scores of networks with a share of the training schedule."""
        phase, seeds = PHASES[self._phase], range(self.config.seeds)
        self._round = {Candidate(network, seed, share, phase): None for network in networks for seed in seeds}

    def _next_phase(self, step: int, before: Result | None) -> int:
        """Returns the index of the regularisation of a step; `before` is the winner of the step before it."""
        if self.config.regularisation == "fixed":
            return sum(step >= first for first in PHASE_STEPS) - 1
        if before is None or before.training is None:
            return 0
        return min(self._phase + (before.training - before.value > self.config.deviation), len(PHASES) - 1)

    def _network(self, step: int, axis: str, parent: Expansion, expansion: Expansion, *, contracts: bool) -> Network:
        ratio = self._macs(expansion) / self._macs(parent)
        count, budgeted = self._cost(expansion), self.budgeted(expansion)
        return Network(step, axis, parent, expansion, contracts, count, ratio, budgeted)

    def _macs(self, expansion: Expansion) -> int:
        return self._cost(expansion).macs


@dataclass(frozen=True)
class Plan:
    """Extent of a search.

    Attributes:
        steps: number of expansion steps.
        trainings: number of trainings, those of contractions and both rounds of halving included.
        gmacs: sum over the trainings of the multiply-adds per clip times the share of the schedule, in units of 1e9.
        first: the candidates of the first step.
    """

    steps: int
    trainings: int
    gmacs: float
    first: tuple[Candidate, ...]


def estimate(search: Search) -> Plan:
    """Returns the extent of a new search, assuming that each step chooses the candidate closest to twice its cost.

    Other choices change the number of candidates a little: at one frame, X-Fast and X-Temporal coincide.

    Args:
        search: a search without scores, which this function uses up.
    """
    first, asked = search.pending(), list[Candidate]()
    while pending := search.pending():
        asked += pending
        for candidate in pending:
            before = search.budgeted(candidate.network.parent)
            value = -abs(candidate.network.budgeted / before - RATE)
            search.record(candidate, Score(value, training=value))
    gmacs = sum(candidate.network.cost.macs * candidate.share for candidate in asked) / 1e9
    return Plan(len(search.winners()), len(asked), gmacs, first)
