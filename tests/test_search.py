"""The expansion search: its choices, budgets, contractions, seeds, halving, beams and regularisation. No TensorFlow."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.axes import AXES
from x3d_tf.search.candidates import Candidate, Phase, Result, Score, are_tied
from x3d_tf.search.config import CostName, ExpandConfig
from x3d_tf.search.replay import PATH
from x3d_tf.search.search import Search, estimate

TINY = Expansion(gamma_tau=1.0, gamma_t=1, gamma_s=32 / 112, gamma_d=0.2)
PAPER = [step for step in PATH if step.label.isdigit()]
PHASES: dict[int, Phase] = {}  # by the step, of the search that follows the paper's axes
Scorer = Callable[[Candidate], Score]


def settings(budgets: tuple[float, ...], cost: CostName = "macs", **others: Any) -> ExpandConfig:
    """Returns the settings of a search with these budgets, in the unit of the cost."""
    final = {"budget_gmacs" if cost == "macs" else "budget": budgets[-1]}
    return ExpandConfig(cost=cost, intermediate_budgets=budgets[:-1], **final, **others)


def scored(search: Search, score: Scorer) -> Search:
    """Runs a search in memory."""
    while pending := search.pending():
        for candidate in pending:
            search.record(candidate, score(candidate))
        assert not search.failures
    return search


def prefers(*axes: str | None) -> Scorer:
    """Returns a score that is highest for the given axis of each step, and for its contraction."""
    return lambda candidate: Score(0.5 + 0.1 * (candidate.axis == axes[candidate.step]))


def tiny(budgets: tuple[float, ...] = (0.05,), **others: Any) -> Search:
    return Search(settings(budgets, **others), TINY, num_classes=4)


def unlimited(*axes: str | None) -> Search:
    """Returns a finished search along the given axes."""
    return scored(tiny(budgets=(9.0,), max_steps=len(axes)), prefers(None, *axes))


def axes_of(search: Search) -> list[str]:
    return [winner.network.axis for winner in search.winners()]


@pytest.fixture(scope="module")
def paper() -> Search:
    budgets = (0.61, 2.0, 5.0, 20.0, 40.0, 150.0)  # 0.61: the solver's γb is 2.28, the paper's 2.25
    PHASES.clear()
    prefer = prefers(*(step.axis for step in PAPER))

    def score(candidate: Candidate) -> Score:
        PHASES.setdefault(candidate.step, candidate.phase)
        return prefer(candidate)

    return scored(Search(settings(budgets)), score)


def test_the_search_follows_the_papers_axes(paper: Search) -> None:
    assert axes_of(paper) == [step.axis for step in PAPER[1:]]
    networks = [winner.network.expansion for winner in paper.winners()]
    assert [x.clip.size for x in networks] == [step.expansion.clip.size for step in PAPER[1:]]
    assert [x.gamma_t for x in networks] == [step.expansion.gamma_t for step in PAPER[1:]]
    assert [x.gamma_tau for x in networks[1:6]] == [16.0, 16.0, 16.0, 12.0, 6.0]
    assert [networks[step - 1].gamma_d for step in (4, 10)] == [2.2, 5.0]
    assert all(1.84 <= winner.network.ratio <= 2.14 for winner in paper.winners())


def test_the_papers_axes_lead_to_its_family(paper: Search) -> None:
    found = [(member.budget, member.result) for member in paper.family]
    labels = [(result.network.step, result.network.contracts) for _, result in found if result]
    assert labels == [(5, False), (7, True), (8, False), (10, False), (11, False), (13, False)]
    contraction = found[1][1]
    assert contraction and contraction.network.expansion.gamma_t == 13
    assert paper.winners()[7].network.parent == paper.winners()[6].network.expansion  # not the contracted one
    assert [result.network.step for result in paper.lineage(contraction)] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_the_phases_are_those_of_the_paper(paper: Search) -> None:
    expected = {1: Phase(16, 2, 0.0), 8: Phase(8, 1, 0.0), 11: Phase(8, 1, 0.1), 13: Phase(8, 1, 0.2)}
    assert len(paper.winners()) == 13
    assert {step: expected[max(first for first in expected if first <= step)] for step in range(1, 14)} == PHASES


def test_the_rule_increases_the_regularisation_after_a_deviation() -> None:
    def score(candidate: Candidate) -> Score:
        return Score(0.5, training=0.5 + (0.051 if candidate.step in (2, 3, 5) else 0.049))

    search, phases = tiny(regularisation="rule", max_steps=7, budgets=(9.0,), axes=("fast",)), {}
    while pending := search.pending():
        phases[pending[0].step] = pending[0].phase
        search.record(pending[0], score(pending[0]))
    strengths = [(phase.bn_group, phase.drop_connect) for phase in phases.values()]
    assert strengths == [(16, 0.0), (16, 0.0), (8, 0.0), (8, 0.1), (8, 0.1), (8, 0.2), (8, 0.2)]
    with pytest.raises(UserError, match=r'Score.training must be measured if ExpandConfig.regularisation is "rule"'):
        scored(tiny(regularisation="rule"), lambda _: Score(0.5))


def test_of_equal_scores_the_lower_cost_wins() -> None:
    search = scored(tiny(max_steps=1, budgets=(9.0,)), lambda _: Score(0.5))
    (step,) = search.steps
    assert step.best.network.budgeted == min(result.network.cost.macs for result in step.results)
    assert step.tied
    search = scored(tiny(max_steps=1, budgets=(9.0,), cost="params"), lambda _: Score(0.5))
    # Frames and pixels cost no parameters; the first axis wins.
    assert axes_of(search) == ["fast"]


def test_ties_are_within_the_standard_error_of_the_difference() -> None:
    values = {"depth": 0.60, "width": 0.57}
    for error, tied in ((0.0, False), (0.02, False), (0.0213, True)):  # 0.03 / √2 = 0.0212
        scores = {axis: Score(values.get(axis, 0.3), error) for axis in AXES}
        (step,) = scored(tiny(max_steps=1, budgets=(9.0,)), lambda candidate, by=scores: by[candidate.axis]).steps  # type: ignore[misc]
        assert (step.best.network.axis, step.tied) == ("depth", tied)


def test_a_network_is_scored_once_per_seed() -> None:
    values = {"depth": (0.5, 0.7, 0.6), "width": (0.61, 0.61, 0.61)}

    def score(candidate: Candidate) -> Score:
        return Score(values.get(candidate.axis, (0.1, 0.2, 0.3))[candidate.seed], 0.01, seconds=2.0)

    search = tiny(seeds=3, max_steps=1, budgets=(9.0,))
    assert [(c.axis, c.seed) for c in search.pending()][:4] == [("fast", 0), ("fast", 1), ("fast", 2), ("spatial", 0)]
    (step,) = scored(search, score).steps
    results = {result.network.axis: result for result in step.results}
    assert (step.best.network.axis, step.best.seconds) == ("width", 6.0)
    assert math.isclose(results["depth"].value, 0.6)
    assert math.isclose(results["depth"].standard_error, math.sqrt(0.1**2 / 3 + 0.01**2))
    assert math.isclose(results["width"].standard_error, 0.01)
    assert step.tied  # 0.01 apart, and depth varies by 0.06


def test_a_failed_candidate_loses() -> None:
    def score(candidate: Candidate) -> Score:
        if candidate.axis == "depth" and candidate.seed == 1:
            return Score(None, reason="out of memory")
        return Score(0.9 if candidate.axis == "depth" else 0.5)

    (step,) = scored(tiny(seeds=2, max_steps=1, budgets=(9.0,)), score).steps
    assert step.best.network.axis != "depth"
    assert {result.network.axis: result.reason for result in step.results}["depth"] == "out of memory"


def test_a_round_without_success_is_asked_for_again() -> None:
    search = tiny()
    first = search.pending()
    for candidate in first:
        search.record(candidate, Score(None, reason=f"no {candidate.axis}"))
    assert search.failures == {axis: f"no {axis}" for axis in AXES if axis != "temporal"}
    assert (search.pending(), search.steps) == (first, [])
    search.record(first[0], Score(0.5))
    assert search.failures == {}


def test_one_frame_has_one_axis_of_time() -> None:
    assert [candidate.axis for candidate in tiny().pending()] == [axis for axis in AXES if axis != "temporal"]
    assert "temporal" in [c.axis for c in tiny(axes=("temporal", "fast")).pending()]
    search = tiny()
    for candidate in search.pending():
        search.record(candidate, prefers("", "fast")(candidate))
    assert [candidate.axis for candidate in search.pending()] == list(AXES)


def test_halving_scores_the_better_half_completely() -> None:
    asked = []

    def score(candidate: Candidate) -> Score:
        asked.append((candidate.axis, candidate.share))
        values = {"fast": 0.1, "spatial": 0.5, "depth": 0.4, "width": 0.3, "bottleneck": 0.2}
        # The complete schedule reverses the order.
        return Score(values[candidate.axis] if candidate.share < 1 else 1 - values[candidate.axis])

    (step,) = scored(tiny(halving=0.25, max_steps=1, budgets=(9.0,)), score).steps
    assert asked == [
        *((axis, 0.25) for axis in ("fast", "spatial", "depth", "width", "bottleneck")),
        *((axis, 1.0) for axis in ("spatial", "depth", "width")),
    ]
    assert step.best.network.axis == "width"
    assert [result.network.axis for result in step.dropped] == ["fast", "bottleneck"]


def test_a_beam_follows_the_best_networks() -> None:
    """The second best of step 1 leads to the best of step 2, which a greedy search misses."""

    def score(candidate: Candidate) -> Score:
        if candidate.step == 1:
            return Score({"depth": 0.6, "width": 0.5}.get(candidate.axis, 0.1))
        return Score(0.9 if candidate.network.parent.gamma_w > 1 and candidate.axis == "spatial" else 0.2)

    greedy = scored(tiny(max_steps=2, budgets=(9.0,)), score)
    beam = scored(tiny(max_steps=2, budgets=(9.0,), keep=2), score)
    assert [result.value for result in greedy.winners()] == [0.6, 0.2]
    assert [result.value for result in beam.winners()] == [0.6, 0.9]
    assert [result.network.axis for result in beam.steps[0].kept] == ["depth", "width"]
    assert [result.network.axis for result in beam.lineage(beam.winners()[-1])] == ["width", "spatial"]
    expansions = [result.network.expansion for result in beam.steps[1].results]
    assert len(expansions) == len(set(expansions))


@pytest.mark.parametrize("contraction", ["last", "all"])
def test_a_contraction_meets_its_budget_and_the_expansion_continues(contraction: str) -> None:
    axes = [None, "fast", "fast", "spatial", "fast"]
    macs = [winner.network.cost.macs for winner in unlimited(*axes[1:]).winners()]
    budget = 0.8 * macs[2] / 1e9
    search = scored(tiny(budgets=(budget, macs[3] / 1e9), contraction=contraction), prefers(*axes))
    assert [winner.network.cost.macs for winner in search.winners()] == macs
    step = search.steps[3]
    assert (step.number, step.contracts, search.steps[4].number) == (3, True, 4)
    contracted = [result.network.axis for result in step.results]
    assert contracted == ["spatial"] if contraction == "last" else len(contracted) > 2
    assert all(macs[1] < result.network.cost.macs <= 1.01e9 * budget for result in step.results)
    assert all(result.network.parent == search.winners()[2].network.expansion for result in step.results)
    assert [member.result for member in search.family] == [step.best, search.winners()[3]]


def test_a_budget_near_the_network_needs_no_contraction() -> None:
    macs = [winner.network.cost.macs / 1e9 for winner in unlimited("fast", "fast", "fast").winners()]
    for factor, step, contracts in ((0.995, 2, False), (1.4, 2, False), (1.43, 3, True), (0.98, 2, True)):
        search = scored(tiny(budgets=(factor * macs[1],)), prefers(*["fast"] * 4))
        (member,) = search.family
        assert member.result is not None
        assert (member.result.network.step, member.result.network.contracts) == (step, contracts), factor


def test_the_parent_is_taken_if_no_contraction_is_larger() -> None:
    """Three frames exceed the budget, and two are the parent. A wider bottleneck would not."""
    start = replace(TINY, gamma_t=2)
    two, three, four = (cost(replace(TINY, gamma_t=frames), num_classes=4).macs / 1e9 for frames in (2, 3, 4))
    budget = 1.2 * two
    assert budget * 1.01 < three < four
    config = settings((budget,), axes=("fast", "bottleneck"))
    search = scored(Search(config, start, num_classes=4), prefers(None, "fast"))
    assert [(step.number, step.contracts) for step in search.steps] == [(1, False)]
    assert [member.result for member in search.family] == [None]  # the start network, which is not scored


def test_one_step_may_meet_several_budgets() -> None:
    macs = [winner.network.cost.macs / 1e9 for winner in unlimited("fast", "fast", "fast").winners()]
    search = scored(tiny(budgets=(0.8 * macs[1], 0.9 * macs[1], macs[1])), prefers(*["fast"] * 4))
    results = [member.result for member in search.family if member.result]
    assert [(result.network.step, result.network.contracts) for result in results] == [(2, True), (2, True), (2, False)]


@pytest.mark.parametrize("name", ["params", "activations"])
def test_other_costs_limit_the_search(name: str) -> None:
    start = getattr(cost(TINY, num_classes=4), name) / 1e6
    axes: list[str | None] = [None, "width", "width", "width", "width", "width"]
    search = scored(tiny(cost=name, budgets=(3 * start,)), prefers(*axes))
    (member,) = search.family
    assert member.result is not None
    assert 3 * start / math.sqrt(2) < member.result.network.budgeted / 1e6 <= 1.01 * 3 * start
    assert all(1.5 < winner.network.ratio < 2.5 for winner in search.winners())  # solved for multiply-adds


def test_latency_limits_the_search() -> None:
    def latency(network: Expansion) -> float:
        return 3.0 * network.gamma_t + network.gamma_s

    search = scored(
        Search(settings(cost="latency", budgets=(18.0,)), TINY, num_classes=4, latency=latency),
        prefers(None, "fast", "fast", "fast"),
    )
    (member,) = search.family
    assert member.result is not None
    assert (member.result.network.step, member.result.network.contracts) == (3, True)
    assert member.result.network.expansion.gamma_t == 5  # 15.3 ms; six frames take 18.3
    with pytest.raises(UserError, match=r'ExpandConfig.cost must not be "latency" where no function measures it'):
        Search(ExpandConfig(cost="latency", budget=9.0))


def test_steps_end_with_the_limits() -> None:
    search = scored(tiny(budgets=(9.0,), max_steps=2), prefers(*["fast"] * 3))
    assert (len(search.steps), search.family) == (2, [])
    largest = replace(TINY, gamma_s=16.0, gamma_d=0.2)
    assert Search(settings((900.0,), axes=("spatial",)), largest).pending() == ()


def test_the_plan_counts_the_trainings() -> None:
    """The paper counts 30 trainings for X3D-XS; two of them are the same at one frame."""
    plan = estimate(Search(settings((0.6,))))
    assert (plan.steps, len(plan.first)) == (5, 5)
    assert 25 <= plan.trainings - 1 <= 30  # with a contraction
    assert math.isclose(plan.gmacs, 6 * 1.17, rel_tol=0.1)
    assert estimate(Search(settings((0.6,), seeds=3))).trainings == 3 * plan.trainings
    halved = estimate(Search(settings((0.6,), halving=0.25)))
    assert plan.trainings < halved.trainings < 2 * plan.trainings
    assert halved.gmacs < plan.gmacs


def test_the_plan_follows_the_cost_that_is_limited() -> None:
    plan = estimate(Search(settings((6.0,), cost="params")))
    assert plan.steps == 2  # 1.63, 3.3, 6.5 million


def test_differences_of_frames_keep_two_frames() -> None:
    start, options = replace(TINY, gamma_t=2), ModelOptions(input="difference")
    config = settings((0.006,), contraction="all", axes=("fast", "spatial"))
    search = scored(Search(config, start, options=options, num_classes=4), prefers(None, *["fast"] * 9))
    assert search.family
    with pytest.raises(UserError, match=r"Expansion\.gamma_t must be at least 2"):
        Search(settings((2.0,)), TINY, options=options)


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match=r'ModelOptions\.family must be "x3d" for a search: the axes expand X2D, got'):
        Search(settings((2.0,)), TINY, options=ModelOptions(family="efficientnet3d"))


def test_a_budget_is_met_with_one_percent_more() -> None:
    xs = cost("x3d_xs").macs  # 0.605 GMACs for 0.6
    macs = settings((2.0,))
    assert not macs.exceeds(xs, 0.6) and macs.is_near(xs, 0.6) and macs.exceeds(xs, 0.599)
    assert settings((2.0,), "latency").exceeds(1.02, 1.0) and not settings((2.0,), "params").exceeds(1.0e6, 1.0)


def test_options_and_classes_change_the_cost() -> None:
    plain, other = tiny(), Search(settings((2.0,)), TINY, options=ModelOptions(se="none"), num_classes=9)
    assert plain.pending()[0].network.cost == cost(plain.pending()[0].expansion, num_classes=4)
    expected = cost(other.pending()[0].expansion, num_classes=9, options=ModelOptions(se="none"))
    assert other.pending()[0].network.cost == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_gmacs": None}, "ExpandConfig.budget_gmacs must be given, in GMACs"),
        ({"budget_gmacs": 0.0}, "ExpandConfig.budget_gmacs must be positive, got 0.0"),
        ({"budget_gmacs": float("nan")}, "ExpandConfig.budget_gmacs must be positive, got nan"),
        ({"budget": 2.0}, 'budget must not be set for the cost "macs": ExpandConfig.budget_gmacs states its budget'),
        (
            {"cost": "latency"},
            'budget_gmacs must not be set for the cost "latency": ExpandConfig.budget states its budget, got 2.0',
        ),
        ({"cost": "params", "budget_gmacs": None}, "ExpandConfig.budget must be given, in M parameters"),
        ({"intermediate_budgets": (2.0,)}, r"intermediate_budgets must be .* below ExpandConfig.budget_gmacs = 2, got"),
        ({"intermediate_budgets": (1.0, 0.5)}, "ExpandConfig.intermediate_budgets must be positive, ascending"),
        ({"intermediate_budgets": 1.0}, "ExpandConfig.intermediate_budgets must be tuple"),
        ({"cost": "flops"}, "ExpandConfig.cost must be one of macs, params, activations, latency, got 'flops'"),
        ({"axes": ("fast", "with")}, r"ExpandConfig.axes must have names from fast, .* \(did you mean width\?\), got"),
        ({"axes": ()}, "ExpandConfig.axes must name at least one axis"),
        ({"axes": ("fast", "fast")}, "ExpandConfig.axes must have distinct names"),
        ({"seeds": 0}, r"ExpandConfig.seeds must be in \[1, 100\], got 0"),
        ({"keep": 101}, r"ExpandConfig.keep must be in \[1, 100\], got 101"),
        ({"max_steps": 0}, "ExpandConfig.max_steps must be in"),
        ({"halving": 1.0}, r"ExpandConfig.halving must be in \[0, 1\), got 1.0"),
        ({"contraction": "none"}, "ExpandConfig.contraction must be one of last, all, got 'none'"),
        ({"regularisation": "none"}, "ExpandConfig.regularisation must be one of fixed, rule"),
        ({"deviation": -0.1}, "ExpandConfig.deviation must be at least 0, got -0.1"),
        ({"first_stride": 0.0}, "ExpandConfig.first_stride must be positive, got 0.0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpandConfig(**({"budget_gmacs": 2.0} | changes))


def test_the_budget_exceeds_the_start() -> None:
    rule = "exceed the cost of the start network, 0.02066 GMACs"
    with pytest.raises(UserError, match=rf"ExpandConfig.budget_gmacs must {rule}, got 0.02"):
        Search(settings((0.02,)))
    with pytest.raises(UserError, match=rf"ExpandConfig.intermediate_budgets must {rule}, got 0.02"):
        Search(settings((0.02, 1.0)))
    rule = "leave room for an expansion of the start network, which has 0.02066 GMACs"
    with pytest.raises(UserError, match=rf"ExpandConfig.budget_gmacs must {rule}, got 0.0208"):
        Search(settings((0.0208,), axes=("fast",)))
    assert Search(settings((0.0208,), axes=("fast", "bottleneck"))).pending()  # a few channels fit


@pytest.mark.parametrize(
    "values",
    [
        {"value": math.nan},
        {"value": math.inf},
        {"value": 10**400},
        {"value": True},
        {"value": None},
        {"value": 0.5, "reason": "a reason"},
        {"value": None, "reason": ""},
        {"value": 0.5, "standard_error": -1.0},
        {"value": 0.5, "seconds": math.inf},
        {"value": 0.5, "training": math.nan},
    ],
)
def test_scores_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Score"):
        Score(**values)


def exhaustive_choice(results: list[Result]) -> Result:
    """Returns the result that a search must choose: no other is better, or as good and cheaper, or earlier."""
    for place, result in enumerate(results):
        if result.reason is None and not any(
            other.reason is None
            and (
                other.value > result.value
                or (other.value == result.value and other.network.cost.macs < result.network.cost.macs)
                or (
                    (other.value, other.network.cost.macs) == (result.value, result.network.cost.macs)
                    and before < place
                )
            )
            for before, other in enumerate(results)
        ):
            return result
    raise AssertionError


def test_choices_agree_with_a_naive_version() -> None:
    outcomes = itertools.product((None, 0.5, 0.6), repeat=5)
    for values in itertools.islice(outcomes, 1, None, 4):
        search = tiny(max_steps=1, budgets=(9.0,))
        for candidate, value in zip(search.pending(), values, strict=True):
            search.record(candidate, Score(value) if value else Score(None, reason="failed"))
        (step,) = search.steps
        assert step.best == exhaustive_choice(list(step.results))
        best = sorted((result.value for result in step.results if result.reason is None), reverse=True)
        assert step.tied == (len(best) > 1 and best[0] == best[1])
        assert all(are_tied(result, result) for result in step.kept)
