"""Evaluates the new checkpoints of a run while another process trains it."""

import sys
import time
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.interfaces import Evaluator
from x3d_tf.evaluation.reports import (
    differing_settings,
    locked_report_folder,
    read_results,
    results_of,
    settings_of,
    write_csv,
    write_json,
)
from x3d_tf.modeling.x3d import Network
from x3d_tf.runs import checkpoints
from x3d_tf.runs.event_files import EventFile
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.terminal import tell
from x3d_tf.text import counted, whole


def watch_run(
    run: RunFolder, task: Evaluator, *, poll_seconds: float = 30.0, overwrite: bool = False, **settings: Any
) -> dict[int, dict[str, Any]]:
    """Evaluates all existing and new checkpoints of a run, and returns once the run is finished.

    Each evaluation writes STEP.json, with the content of results.json and the step, to
    `evaluation/RECORDS_SPLIT_Kcenter_steps` in the run folder, a row to steps.csv in that folder, and its metrics, such
    as `eval/top1`, to TensorBoard. Steps that already have results are skipped. A run keeps only its newest
    checkpoints; those deleted before they could be evaluated are skipped.

    Args:
        run: the run folder. It need not have a checkpoint yet.
        task: the task of the run.
        poll_seconds: interval between two checks for new checkpoints, in seconds.
        overwrite: whether to delete the results of earlier evaluations first.
        **settings: the fields of `EvalConfig`.

    Returns:
        The content of each STEP.json, by step.

    Raises:
        UserError: as `evaluate_run`; the folder has steps that were evaluated with other settings; another process
            watches the run with the same settings.
    """
    require(poll_seconds > 0, "poll_seconds", "be positive", poll_seconds)
    eval_config = EvalConfig(**settings)
    report_folder = task.report_folder(run, eval_config)
    folder = report_folder.with_name(f"{report_folder.name}_steps")
    with locked_report_folder(folder):
        watch = _Watch(run, task, eval_config, folder, overwrite)
        print(f"watching {run.checkpoints} until {run.model} exists; Ctrl-C stops, the same command resumes")
        while True:
            finished = run.model.is_file()  # checked first: the last checkpoint is written before the model
            watch.evaluate_new()
            if finished:
                watch.print_failures()
                print(f"{run.root} is finished ({run.model} exists). results: {watch.folder}/")
                return watch.results
            time.sleep(poll_seconds)


class _Watch:
    """Results of the evaluated steps, and failures of the others."""

    def __init__(self, run: RunFolder, task: Evaluator, eval_config: EvalConfig, folder: Path, overwrite: bool) -> None:
        self.run, self.task, self.eval_config, self.folder = run, task, eval_config, folder
        if overwrite:
            for file in _step_files(self.folder):
                file.unlink()
        self.results = {int(file.stem): read_results(file) for file in _step_files(self.folder)}
        self.failures: dict[int, str] = {}
        # in its own folder, because TensorBoard reads one event file per folder at a time
        self.writer = EventFile(run.tensorboard / self.folder.name)

    def evaluate_new(self) -> None:
        """Evaluates all checkpoints without results, the oldest first, because it is deleted first."""
        tried: set[int] = set()  # one attempt per poll: a checkpoint still being written is complete at the next
        while True:
            steps = checkpoints.checkpoint_steps(self.run.checkpoints)
            new = [step for step in steps if step not in self.results and step not in tried]
            if not new:
                return
            tried.add(new[0])
            tell(f"loading the checkpoint of step {new[0]}")
            try:
                model = checkpoints.load_checkpoint(self.run, new[0])
            except UserError as error:
                self.failures[new[0]] = str(error)
                continue
            self.failures.pop(new[0], None)
            self._evaluate(new[0], model)

    def _evaluate(self, step: int, model: Network) -> None:
        weights = {
            "weights": str(self.run.checkpoints / f"ckpt-{step}"),
            "step": step,
            "training": self.run.training_record(),
        }
        evaluation = self.task.evaluation(model, weights, self.eval_config, self.run)
        settings = settings_of(evaluation)
        for earlier, results in self.results.items():
            differing = set(differing_settings(results, settings)) - {"step"}
            if differing:
                raise UserError(
                    f"{_path(self.folder, earlier)} was evaluated with other settings "
                    f"({', '.join(sorted(differing))}); evaluate all steps again with --overwrite"
                )
        results = results_of(settings, evaluation.measure())
        write_json(_path(self.folder, step), results)
        self.results[step] = results
        values = {metric.name: results[metric.name] for metric in evaluation.metrics}
        self._write_csv([*values])
        self.writer.add(step, {f"eval/{name}": value for name, value in values.items()})
        self.writer.flush()
        text = ", ".join(metric.text(results[metric.name]) for metric in evaluation.metrics)
        count = counted(results["samples"], evaluation.sample)
        print(f"step {step}: {text} ({count}, {results['views']})", flush=True)

    def _write_csv(self, names: list[str]) -> None:
        rows = [[step, *(row[name] for name in names)] for step, row in sorted(self.results.items())]
        write_csv(self.folder / "steps.csv", [["step", *names], *rows])

    def print_failures(self) -> None:
        """Prints a warning for each checkpoint that could not be read."""
        for step, reason in sorted(self.failures.items()):
            print(f"warning: the checkpoint of step {step} was not evaluated: {reason}", file=sys.stderr)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def _step_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if whole(path.stem) is not None]
