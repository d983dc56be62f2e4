"""Tables of a search: the candidates of a step, the family, and the networks that no other one dominates.

Imports no TensorFlow.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from x3d_tf import plots
from x3d_tf.modeling.expansion import name_of
from x3d_tf.search.axes import AXES
from x3d_tf.search.candidates import Candidate, Result, ranked
from x3d_tf.search.config import UNITS
from x3d_tf.search.search import Latency, Search, Step

_HEADER = f"{'GMACs':>9} {'ratio':>6} {'M params':>9}"


def candidate_table(candidates: Sequence[Candidate]) -> list[str]:
    """Returns the lines of a table with one row per network of some candidates, for the plan of a search."""
    networks = dict.fromkeys(candidate.network for candidate in candidates)
    rows = [
        f"{AXES[network.axis].title:13} {network.cost.macs / 1e9:9.4f} {network.ratio:6.3f}"
        f" {network.cost.params / 1e6:9.3f}  {name_of(network.expansion)}"
        for network in networks
    ]
    return [f"{'axis':13} {_HEADER}  network", *rows]


def step_table(step: Step) -> list[str]:
    """Returns the lines of a table with one row per network of a step, best first, and of how it was chosen."""
    kind = "contraction of step" if step.contracts else "step"
    lines = [f"{kind} {step.number}", f"  {'axis':13} {_HEADER} {'score':>16}  network"]
    failed = [result for result in step.results if result.reason]
    for result in (*ranked(step.results), *failed, *step.dropped):
        network = result.network
        score = "failed" if result.reason else f"{result.value:.4f}" + _error(result)
        mark = "*" if result in step.kept else " "
        note = f": {result.reason}" if result.reason else " (part of the schedule)" * (result in step.dropped)
        lines.append(
            f"{mark} {AXES[network.axis].title:13} {network.cost.macs / 1e9:9.4f} {network.ratio:6.3f}"
            f" {network.cost.params / 1e6:9.3f} {score:>16}  {name_of(network.expansion)}{note}"
        )
    if step.tied:
        lines.append("  tied: the best two differ by at most the standard error of their difference")
    return lines


def _error(result: Result) -> str:
    return f" ± {result.standard_error:.4f}" if result.standard_error else ""


def save_staircase(search: Search, path: Path, metric: str, paper: Sequence[plots.PaperPoint] = ()) -> None:
    """Saves a picture of the search as the paper's Figure 2: scores over costs, and the path.

    Args:
        search: a search with at least one finished step.
        path: PNG file to write; an existing file is replaced.
        metric: name of the score, such as "top-1".
        paper: the paper's points.
    """
    titles = [axis.title for axis in AXES.values()] + ["contraction"]
    points: dict[str, list[tuple[float, float, float]]] = {name: [] for name in titles}
    for row in all_results(search):
        name = "contraction" if row.network.contracts else AXES[row.network.axis].title
        points[name].append((*_place(row), row.standard_error))
    winners = {step.number: _place(step.best) for step in search.steps if not step.contracts}
    contractions = [(winners[step.number], _place(step.best)) for step in search.steps if step.contracts]
    title = f"expansion of {name_of(search.start)}"
    plots.save_staircase(points, [*winners.values()], contractions, path, title, metric, paper)


def _place(result: Result) -> tuple[float, float]:
    return result.network.cost.macs / 1e9, result.value


def all_results(search: Search) -> list[Result]:
    """Returns all networks that were scored with the complete schedule, without failures."""
    return [result for step in search.steps for result in step.results if result.reason is None]


def pareto(results: Sequence[Result], latency: Latency | None = None) -> list[Result]:
    """Returns the results that no other one dominates, by ascending multiply-adds.

    A network dominates another if its score is at least as high and none of multiply-adds, parameters and latency is
    higher, and if one of these differs.
    """
    figures: dict[Result, tuple[float, ...]] = {}
    for result in results:
        network = result.network
        measured = (latency(network.expansion),) if latency else ()
        figures[result] = (-result.value, network.cost.macs, network.cost.params, *measured)
    front = [result for result in figures if not any(_dominates(other, figures[result]) for other in figures.values())]
    return sorted(front, key=lambda result: result.network.cost.macs)


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return tuple(first) != tuple(second) and all(low <= high for low, high in zip(first, second))


def reported(search: Search) -> list[Result]:
    """Returns the results whose networks are in the tables of the family and of the networks that none dominates."""
    return [step.best for step in search.steps] + _front(search)


def _front(search: Search) -> list[Result]:
    # Where the latency is not the cost, it is not worth the time to measure all networks.
    return pareto(all_results(search), search.latency if search.config.cost == "latency" else None)


def pareto_table(search: Search) -> list[str]:
    """Returns the lines of a table of the networks that no other one dominates; notes those of the family."""
    chosen = {member.result for member in search.family}
    return _result_rows(_front(search), search.latency, lambda result: "family" if result in chosen else "")


def family_table(search: Search) -> list[str]:
    """Returns the lines of a table with the winner of each step and the contracted networks, in their order."""
    budgets: dict[Result, list[str]] = {}
    for member in search.family:
        if member.result:
            budgets.setdefault(member.result, []).append(f"for {member.budget:g} {UNITS[search.config.cost][0]}")
    rows = [step.best for step in search.steps]
    return _result_rows(rows, search.latency, lambda result: ", ".join(budgets.get(result, [])))


def _result_rows(results: Sequence[Result], latency: Latency | None, note: Callable[[Result], str]) -> list[str]:
    timed = f" {'ms':>8}" if latency else ""
    lines = [f"{'step':>4}  {'axis':13} {'score':>16} {'GMACs':>9} {'M params':>9}{timed}  {'network':42}  note"]
    for result in results:
        network = result.network
        label = f"{network.step}{'c' if network.contracts else ''}"
        figures = f"{network.cost.macs / 1e9:9.4f} {network.cost.params / 1e6:9.3f}"
        timed = f" {latency(network.expansion):8.2f}" if latency else ""
        lines.append(
            f"{label:>4}  {AXES[network.axis].title:13} {f'{result.value:.4f}' + _error(result):>16} {figures}{timed}"
            f"  {name_of(network.expansion):42}  {note(result)}".rstrip()
        )
    return lines
