"""Compares the network that a search found with other networks of the same cost.

  python benchmarks/search_comparison.py --search=runs/motion --gin_file=gin/searches/motion.gin --workdir=runs/compared

The networks are trained as the candidates of the search, with as many seeds. All but X2D have the multiply-adds of the
found network, up to 10 %:

  found         the network of the search, with its trainings; trained again if the folder has the trace alone
  paper's path  the start network of the search, expanded along the axes of the paper's first steps
  X2D           the paper's start network, which sees one frame of 112 pixels
  random NN     the start network, expanded along random axes, as many as steps of the search

All random networks together cost half of the multiply-adds of the search. The one with the highest validation score is
marked. Validation is the split that chose the networks, which therefore overestimates the best of many. Test is the
split of the final evaluation, which chose nothing. ± is the standard error, from the number of videos and the spread of
the seeds. Run the same command again to continue after an interruption.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import run

from x3d_tf import gin_config
from x3d_tf.errors import require
from x3d_tf.files import atomic_write
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import Expansion, name_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.search.axes import AXES, RATE, expanded
from x3d_tf.search.candidates import Candidate, Network, Phase, Result, Score
from x3d_tf.search.executor import ProcessExecutor
from x3d_tf.search.loop import search_of
from x3d_tf.search.outputs import SearchFolder, found
from x3d_tf.search.replay import PATH
from x3d_tf.search.search import Search
from x3d_tf.search.trace import read_trace
from x3d_tf.search.training import CandidateTraining, SearchSetup, candidate_run, check_settings, measured, open_setup

PAPER_AXES = [step.axis for step in PATH if step.axis and not step.label.endswith("c")]
LARGEST_DIFFERENCE = 0.1  # of multiply-adds, relative to the found network
_DRAWS = 1000


@dataclass(frozen=True)
class Compared:
    """A network with the validation scores of its trainings and, if none failed, their scores on the test split."""

    name: str
    result: Result
    test: tuple[Score, ...]


def main() -> None:
    """Trains the networks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=Path, required=True, help="work folder of a finished search")
    parser.add_argument("--gin_file", action="append", required=True, help="as for the search")
    parser.add_argument("--gin_bindings", action="append", default=[], help="as for the search")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the trainings and of comparison.json")
    parser.add_argument("--parallel", type=int, default=1, help="as for the search. Defaults to 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random networks. Defaults to 0")
    settings = parser.parse_args()
    config, _ = gin_config.parse_expand(settings.gin_file, settings.gin_bindings)
    check_settings(config)
    setup, (searched, trace) = open_setup(config), read_trace(settings.search)
    search = search_of(searched, trace)
    require(not search.pending(), "--search", "name the folder of a finished search", settings.search)
    require_same_trainings(setup, searched)
    best = found(search)
    networks = dict(draw_networks(search, setup.num_classes, config.model, settings.seed))
    phase = next(step.phase for step in search.steps if best in step.results)
    runs, results = {"found": _found_runs(settings.search, setup, best, phase)}, {"found": best}
    if not all(run.model.is_file() for run in runs["found"]):
        networks = {"found": best.network, **networks}
    results |= train(networks, setup, phase, len(best.scores), settings.workdir, settings.parallel)
    for name, network in networks.items():
        trained = trainings_of(network, phase, len(best.scores))
        runs[name] = [candidate_run(settings.workdir, setup.training, candidate) for candidate in trained]
    rows = [
        Compared(name, result, () if result.reason else tuple(_test_score(run, setup) for run in runs[name]))
        for name, result in results.items()
    ]
    print("\n".join(table(rows, setup.metric.label)))
    content = [{"name": row.name, "network": name_of(row.result.network.expansion), **_figures(row)} for row in rows]
    atomic_write(settings.workdir / "comparison.json", json.dumps(content, indent=1).encode())


def require_same_trainings(setup: SearchSetup, searched: Mapping[str, Any]) -> None:
    """Raises `UserError` unless the trainings have the settings of the search, as its trace states them."""
    for name, value in json.loads(json.dumps(setup.identity)).items():
        require(value == searched.get(name), name, f"be {searched.get(name)!r}, as in the search", value)


def draw_networks(search: Search, num_classes: int, options: ModelOptions, seed: int) -> Iterator[tuple[str, Network]]:
    """Yields the networks to train by name: that of the paper's path, X2D, then random ones.

    Raises:
        UserError: no network along random axes, or not that of the paper's path, has the multiply-adds of the found
            one.
    """
    best, steps = found(search).network, len(search.winners())

    @functools.cache
    def count(expansion: Expansion) -> int:
        return cost(expansion, num_classes=num_classes, options=options).macs

    def is_equal(expansion: Expansion) -> bool:
        return abs(count(expansion) / best.cost.macs - 1) <= LARGEST_DIFFERENCE

    def along(axes: Sequence[str]) -> Expansion:
        network = search.start
        for number, name in enumerate(axes, start=1):
            target = best.cost.macs if number == len(axes) else RATE * count(network)
            network = expanded(AXES[name], network, count, target, search.config.first_stride) or network
        return network

    def described(name: str, expansion: Expansion) -> tuple[str, Network]:
        figures = cost(expansion, num_classes=num_classes, options=options)
        ratio = figures.macs / best.cost.macs
        axis = name.replace(" ", "_").replace("'", "")
        return name, Network(best.step, axis, search.start, expansion, False, figures, ratio, figures.macs)

    trained = [row for step in search.steps for row in step.results]
    spent = sum(row.network.cost.macs * len(row.scores) for row in trained)
    number = max(1, spent // 2 // (best.cost.macs * len(found(search).scores)))
    papers = along(PAPER_AXES[:steps])
    rule = f"have the multiply-adds of the found network, {best.cost.macs}, up to {LARGEST_DIFFERENCE:.0%}"
    require(is_equal(papers), "the network of the paper's path", rule, count(papers))
    yield described("paper's path", papers)
    yield described("X2D", Expansion())
    random, drawn = np.random.default_rng(seed), dict[Expansion, None]()
    for _ in range(_DRAWS):
        expansion = along(random.choice(list(search.config.axes), steps).tolist())
        if is_equal(expansion):
            drawn.setdefault(expansion)
        if len(drawn) == number:
            break
    require(len(drawn) > 0, "--search", "have a network whose cost other axes reach", name_of(best.expansion))
    for index, expansion in enumerate(drawn, start=1):
        yield described(f"random {index:02}", expansion)


def trainings_of(network: Network, phase: Phase, seeds: int) -> list[Candidate]:
    """Returns the trainings of a network with the complete schedule, one for each seed."""
    return [Candidate(network, seed, 1.0, phase) for seed in range(seeds)]


def train(
    networks: dict[str, Network], setup: SearchSetup, phase: Phase, seeds: int, folder: Path, processes: int
) -> dict[str, Result]:
    """Trains networks as the search trains its candidates, and returns their validation scores by name."""
    folder.mkdir(parents=True, exist_ok=True)
    candidates = [training for network in networks.values() for training in trainings_of(network, phase, seeds)]
    trainings = [
        CandidateTraining(setup.training, setup.num_classes, setup.metric, folder, (number, processes))
        for number in range(processes)
    ]
    scores: dict[Candidate, Score] = {}
    with ProcessExecutor(trainings) as executor:
        for candidate, score in executor.scores(candidates):
            scores[candidate] = score
            outcome = score.reason or f"{setup.metric.label} {score.value:.4f}"
            print(f"{len(scores)} of {len(candidates)}: {candidate.axis} seed {candidate.seed}: {outcome}", flush=True)
    return {
        name: Result(network, tuple(scores[training] for training in trainings_of(network, phase, seeds)))
        for name, network in networks.items()
    }


def _found_runs(folder: Path, setup: SearchSetup, best: Result, phase: Phase) -> list[RunFolder]:
    """Returns the run folders of the found network: the search moves that of the first seed."""
    _, *others = trainings_of(best.network, phase, len(best.scores))
    return [
        SearchFolder(folder, setup).found,
        *(candidate_run(folder, setup.training, candidate) for candidate in others),
    ]


def _test_score(run: RunFolder, setup: SearchSetup) -> Score:
    return Score(*measured(run, setup.task, setup.metric, setup.config.dataset.eval_split))


def table(rows: Sequence[Compared], metric: str) -> list[str]:
    """Returns the lines of a table with one row per network; marks the best random one on the validation split."""
    randoms = [row for row in rows if row.name.startswith("random") and row.result.reason is None]
    best = max(randoms, key=lambda row: row.result.value, default=None)
    lines = [f"{'network':14} {'GMACs':>8} {'M params':>8}  {f'validation {metric}':20} {f'test {metric}':20}  factors"]
    for row in rows:
        network = row.result.network
        lines.append(
            f"{row.name + ' *' * (row is best):14} {network.cost.macs / 1e9:8.4f} {network.cost.params / 1e6:8.3f}"
            f"  {_score(row.result):20} {_score(_tested(row)):20}  {name_of(network.expansion)}"
            + (f": {row.result.reason}" if row.result.reason else "")
        )
    if best is None:
        return lines
    mean = statistics.fmean(_tested(row).value for row in randoms)
    note = "* the best random network on the validation split"
    return [*lines, f"{note}; the mean of the random networks on the test split is {mean:.4f}"]


def _tested(row: Compared) -> Result:
    return Result(row.result.network, row.test or row.result.scores)


def _score(result: Result) -> str:
    return "failed" if result.reason else f"{result.value:.4f} ± {result.standard_error:.4f}"


def _figures(row: Compared) -> dict[str, object]:
    figures = row.result.network.cost
    values = {"validation": [score.value for score in row.result.scores], "test": [score.value for score in row.test]}
    return {"macs": figures.macs, "params": figures.params, **values}


if __name__ == "__main__":
    run(main)
