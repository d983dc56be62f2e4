"""Files of a search in its work folder, besides the trace: gin files, the found run, the report and the picture.

All of them follow from the trace and the settings, and are written again if they are missing. Imports no TensorFlow.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.files import atomic_write, os_errors_as_write_error
from x3d_tf.modeling.expansion import name_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.search.candidates import Candidate, Result
from x3d_tf.search.config import UNITS
from x3d_tf.search.reports import family_table, pareto_table, save_staircase, step_table
from x3d_tf.search.search import Search, Step
from x3d_tf.search.training import SearchSetup, candidate_config, candidate_run
from x3d_tf.text import counted

STAIRCASE_NAME = "staircase.png"


class SearchFolder:
    """Paths of a search besides its trace, and the functions that write them.

    After each step: `family/step03.gin` (the network that step 3 chose; `step07c.gin` is a contraction),
    `staircase.png` and `candidates/` (the run folders of the trainings and their output). Checkpoints are deleted when
    a candidate is scored, and the models of the candidates that were not chosen when the step ends.

    At the end: `found.gin` and `found/` (the found network and its run folder), and `report.md`, which is last.

    Args:
        root: the work folder.
        setup: the settings of the trainings.
    """

    def __init__(self, root: Path, setup: SearchSetup) -> None:
        self.root, self._setup = root, setup
        self.candidates = root / "candidates"
        self.family = root / "family"
        self.found_gin = root / "found.gin"
        self.found = RunFolder(root / "found")
        self.report = root / "report.md"
        self.staircase = root / STAIRCASE_NAME

    def write_steps(self, search: Search) -> None:
        """Writes the files of the steps so far and deletes the weights of the candidates that were not chosen.

        Raises:
            WriteError: a file cannot be written.
        """
        with os_errors_as_write_error(self.family):
            self.family.mkdir(exist_ok=True)
        for step in search.steps:
            path = self.family / f"step{step.number:02}{'c' if step.contracts else ''}.gin"
            if not path.is_file():
                atomic_write(path, self._gin_text(path, step, step.best).encode())
        save_staircase(search, self.staircase, self._setup.metric.label)
        self._delete_weights(search.steps)

    def write_end(self, search: Search) -> Result:
        """Writes the files of a finished search and returns the network that it found.

        Raises:
            UserError: no network meets the last budget.
            WriteError: a file cannot be written.
        """
        self.write_steps(search)
        result = found(search)
        step = next(step for step in search.steps if result in step.results)
        run = candidate_run(self.root, self._setup.training, self._candidate(step, result))
        if run.root.is_dir() and not self.found.root.exists():
            with os_errors_as_write_error(self.found.root):
                run.root.rename(self.found.root)
        atomic_write(self.found_gin, self._gin_text(self.found_gin, step, result).encode())
        atomic_write(self.report, "\n".join(self._report_lines(search, result)).encode())
        return result

    def _candidate(self, step: Step, result: Result, seed: int = 0) -> Candidate:
        """Returns a training of a network with the complete schedule."""
        return Candidate(result.network, seed, 1.0, step.phase)

    def _delete_weights(self, steps: Sequence[Step]) -> None:
        kept = {
            candidate_run(self.root, self._setup.training, self._candidate(step, step.best, seed)).root
            for step in steps
            for seed in range(len(step.best.scores))
        }
        # Other processes may already train candidates of the next step.
        finished = tuple(f"step{step.number:02}{'c' if step.contracts else ''}_" for step in steps)
        for folder in self.candidates.iterdir() if self.candidates.is_dir() else ():
            if folder.name.startswith(finished) and folder.is_dir() and not folder.is_symlink() and folder not in kept:
                run = RunFolder(folder)
                for path in (run.model, run.best):
                    path.unlink(missing_ok=True)
                shutil.rmtree(run.checkpoints, ignore_errors=True)

    def _gin_text(self, path: Path, step: Step, result: Result) -> str:
        """Returns a gin file that trains a network with the data set and the recipe of the search."""
        network, metric = result.network, self._setup.metric
        score = f"{result.value:.4f} ± {result.standard_error:.4f}"
        title = f"{'Contraction' if step.contracts else 'Choice'} of step {step.number}"
        header = (
            f"{title} of an expansion search: {name_of(network.expansion)}",
            f"  python -m x3d_tf.train --gin_file={path} --workdir=runs/{path.stem}",
            f"Network: {network.cost.macs / 1e9:.4g} GMACs per clip and {network.cost.params / 1e6:.4g} M parameters.",
            f"Measured: {metric.label} {score} on the split {self._setup.split}, which chose the network.",
        )
        return "".join(f"# {line}\n" for line in header) + gin_text(
            candidate_config(self._setup.config, self._candidate(step, result))
        )

    def _report_lines(self, search: Search, result: Result) -> list[str]:
        setup, config = self._setup, search.config
        unit, split = UNITS[config.cost][0], setup.records.splits[setup.split]
        trained = [row for step in search.steps for row in (*step.results, *step.dropped)]
        seconds, trainings = sum(row.seconds for row in trained), sum(len(row.scores) for row in trained)
        network = result.network
        lines = [
            "# Expansion search",
            "",
            f"Start: {name_of(search.start)}. Budget: {config.budgets[-1]:g} {unit}. Data set: {setup.records.dataset} "
            f"({setup.records.folder}). Score: {setup.metric.label} on the split {setup.split}, "
            f"{counted(len(split.records), setup.task.sample)}; ± is the standard error.",
            "",
            f"Found: {name_of(network.expansion)}, {network.cost.macs / 1e9:.4g} GMACs per clip, "
            f"{network.cost.params / 1e6:.4g} M parameters, {setup.metric.label} {result.value:.4f} ± "
            f"{result.standard_error:.4f}. The split that chose the networks overestimates them; evaluate "
            f"{self.found.root} on another split.",
            "",
            f"{counted(len(search.winners()), 'step')}, {counted(trainings, 'training')}, {seconds / 3600:.2f} hours "
            "of training and validation in total.",
        ]
        if len(search.family) < len(config.budgets):
            reason = f"at ExpandConfig.max_steps = {config.max_steps}, or at the limits of the factors"
            lines += ["", f"The search ended before the budget, {reason}."]
        sections = [
            ("Family: the network that each step chose", family_table(search)),
            ("Networks that no other one dominates", pareto_table(search)),
            *((f"Step {step.number}{', contraction' * step.contracts}", step_table(step)) for step in search.steps),
        ]
        for title, table in sections:
            lines += ["", f"## {title}", "", "```text", *table, "```"]
        return [*lines, ""]


def found(search: Search) -> Result:
    """Returns the network that a finished search found: that of the last budget, or else the last one chosen.

    Raises:
        UserError: no candidate meets the last budget, or the start network cannot be expanded.
    """
    winners, members = search.winners(), search.family
    if not winners:
        raise UserError("the limits of the factors allow no expansion of the start network along ExpandConfig.axes")
    if len(members) < len(search.config.budgets):
        return winners[-1]
    result = members[-1].result
    if result is None:
        raise UserError(
            f"{search.config.budget_setting} must leave room for an expansion of the start network: no contraction of "
            f"step 1 along ExpandConfig.axes meets {search.config.budgets[-1]:g} {UNITS[search.config.cost][0]}"
        )
    return result


def gin_text(config: TrainConfig) -> str:
    """Returns all settings of a configuration as the text of a gin file."""
    lines: list[str] = []
    group = ""
    for name, value in config.settings().items():
        if name.partition(".")[0] != group:
            group = name.partition(".")[0]
            lines.append("")
        lines.append(f"{name} = {value!r}")
    return "\n".join(lines) + "\n"
