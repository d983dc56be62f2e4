"""The published expansion path, and the tables and the picture of a search. No TensorFlow."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from x3d_tf import plots
from x3d_tf.evaluation.paper_points import FIGURE_2_POINTS
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import VARIANTS, Expansion
from x3d_tf.search import reports
from x3d_tf.search.axes import AXES
from x3d_tf.search.candidates import Candidate, Result, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.replay import PATH, path_table
from x3d_tf.search.search import Search

TINY = Expansion(gamma_tau=1.0, gamma_t=1, gamma_s=32 / 112, gamma_d=0.2)

# Label, axis, T, τ, S, γw, γb, γd, GMACs, printed GMACs, ratio and network: the figures of the specification, typed in.
EXPECTED = """
0   -              1   -   112 1    1    1    0.0207 0.02067   -     x2d
1   γb bottleneck  1   -   112 1    2.25 1    0.0410 0.0414   1.984
2   γτ fast        2   16  112 1    2.25 1    0.0802 0.08   1.957
3   γs spatial     2   16  160 1    2.25 1    0.1534 0.15   1.913
4   γd depth       2   16  160 1    2.25 2.2  0.3036 0.3   1.979
5   γt temporal    4   12  160 1    2.25 2.2  0.6053 0.6   1.994 x3d_xs
6   γτ fast        8   6   160 1    2.25 2.2  1.2087 -   1.997
7   γt temporal    16  5   160 1    2.25 2.2  2.4154 -   1.998
7c  γt temporal    13  6   160 1    2.25 2.2  1.9629 1.96   0.813 x3d_s
8   γs spatial     16  5   224 1    2.25 2.2  4.7325 4.73   1.959 x3d_m
9   γs spatial     16  5   312 1    2.25 2.2  9.4516 -   1.997
10  γd depth       16  5   312 1    2.25 5    18.3677 18.37  1.943 x3d_l
11  γw width       16  5   312 1.45 2.25 5    35.8376 35.84  1.951 x3d_xl
12  γτ fast        32  2.5 312 1.45 2.25 5    71.6725 -  2.000
13  γd depth       32  2.5 312 1.45 2.25 10.1 143.5416 143.5 2.003 x3d_xxl
"""


def test_the_published_path_has_the_published_costs() -> None:
    header, *rows = path_table()
    assert header.split() == ["step", "axis", "T", "τ", "S", "γw", "γb", "γd", "GMACs", "paper", "ratio", "network"]
    assert [row.split() for row in rows[:15]] == [line.split() for line in EXPECTED.split("\n")[1:-1]]


def test_the_published_networks_on_the_path_have_their_exact_costs() -> None:
    counted = {step.label: cost(step.expansion).macs for step in PATH}
    exact = {"0": 20_662_304, "5": 605_256_512, "7c": 1_962_892_112, "8": 4_732_468_736}
    exact |= {"10": 18_367_710_176, "11": 35_837_627_616, "13": 143_541_630_016}
    assert {label: counted[label] for label in exact} == exact
    assert {step.expansion for step in PATH} >= {variant.expansion for variant in VARIANTS.values()}
    printed = [0.04, 0.08, 0.15, 0.30, 0.60]  # section 4.1; the last one is 0.605
    assert [round(counted[str(step)] / 1e9 - 0.0005 * (step == 5), 2) for step in range(1, 6)] == printed


@pytest.fixture(scope="module")
def search() -> Search:
    """A search whose widest candidates fail, with a tie in step 2 and a contraction."""
    found = Search(ExpandConfig(budget_gmacs=0.0125, contraction="all", halving=0.5), TINY, num_classes=4)
    while pending := found.pending():
        for candidate in pending:
            found.record(candidate, score(candidate))
    return found


def score(candidate: Candidate) -> Score:
    if candidate.axis == "width":
        return Score(None, reason="out of memory")
    best = {1: "fast", 2: "spatial", 3: "fast"}.get(candidate.step)
    value = 0.2 * candidate.step - (0.05 if candidate.axis != best else 0) - 0.3 * candidate.network.contracts
    return Score(value, 0.1 if candidate.step == 2 else 0.001)


def test_a_step_is_printed_best_first(search: Search) -> None:
    lines = reports.step_table(search.steps[1])
    assert lines[0] == "step 2"
    assert lines[2].startswith("* X-Spatial") and "0.4000 ± 0.1000" in lines[2] and "s=" in lines[2]
    assert lines[-1] == "  tied: the best two differ by at most the standard error of their difference"
    text = "\n".join(lines)
    assert text.count("(part of the schedule)") == 2 and "failed" in text and ": out of memory" in text
    assert not any("tied" in line for line in reports.step_table(search.steps[0]))
    assert reports.step_table(search.steps[-1])[0] == f"contraction of step {search.steps[-1].number}"


def test_the_family_lists_the_winners_and_the_contraction(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "latency", lambda network: 1.25 * network.gamma_t)
    header, *rows = reports.family_table(search)
    assert header.split() == ["step", "axis", "score", "GMACs", "M", "params", "ms", "network", "note"]
    steps = [row.split()[0] for row in rows]
    assert steps == [*map(str, range(1, len(rows))), f"{len(rows) - 1}c"]
    assert " 2.50 " in rows[0] and rows[-1].endswith("for 0.0125 GMACs")


def test_the_pareto_table_has_no_dominated_network(search: Search) -> None:
    results = reports.all_results(search)
    front = reports.pareto(results)

    def figures(result: Result) -> tuple[float, int, int]:
        return (-result.value, result.network.cost.macs, result.network.cost.params)

    for result in results:  # the naive definition
        dominated = False
        for other in results:
            pairs = list(zip(figures(other), figures(result)))
            dominated |= all(low <= high for low, high in pairs) and any(low < high for low, high in pairs)
        assert (result in front) != dominated
    assert [result.network.cost.macs for result in front] == sorted(result.network.cost.macs for result in front)
    assert len(reports.pareto_table(search)) == len(front) + 1
    assert 1 < len(front) < len(results)


def test_a_latency_keeps_networks_on_the_front(search: Search) -> None:
    """A network that is slower than none is not dominated, whatever its score."""
    results = reports.all_results(search)
    slowest = min(results, key=lambda result: result.value)
    front = reports.pareto(results, latency=lambda network: 1.0 if network == slowest.network.expansion else 2.0)
    assert slowest in front
    assert len(front) >= len(reports.pareto(results))


def test_the_plan_lists_the_candidates(search: Search) -> None:
    start = Search(search.config, TINY, num_classes=4)
    header, *rows = reports.candidate_table(start.pending())
    assert [row.split()[0] for row in rows] == ["X-Fast", "X-Spatial", "X-Depth", "X-Width", "X-Bottleneck"]
    assert header.split()[:3] == ["axis", "GMACs", "ratio"]


def test_the_picture_shows_every_score_and_the_path(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    save = plots.save_staircase

    def spy(*arguments: Any) -> None:
        drawn.extend(arguments)
        save(*arguments)

    monkeypatch.setattr(plots, "save_staircase", spy)
    reports.save_staircase(search, tmp_path / "a.png", "top-1", FIGURE_2_POINTS)
    points, winners, contractions = drawn[:3]
    scores = [point[:2] for rows in points.values() for point in rows]
    assert len(scores) == len(reports.all_results(search)) and len(winners) == len(search.winners())
    assert set(winners) <= set(scores)
    axes = [axis.title for axis in AXES.values()]
    assert [*points] == [
        *axes,
        "contraction",
    ]  # also the axes without networks, so that all pictures have equal colours
    assert [name for name, rows in points.items() if not rows] == ["X-Width"]
    (contracted,) = [step.best for step in search.steps if step.contracts]
    assert contractions == [(winners[-1], (contracted.network.cost.macs / 1e9, contracted.value))]
    assert drawn[-1] == FIGURE_2_POINTS
    assert Image.open(tmp_path / "a.png").size[0] > 500
