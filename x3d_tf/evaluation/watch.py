"""Tests the checkpoints of a run that trains elsewhere, as they come."""

import sys
import time
from pathlib import Path
from typing import Any

from x3d_tf.data.datasets.spec import open_dataset
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.classification import evaluation_of_run
from x3d_tf.evaluation.eval_config import EvalConfig, folder_of
from x3d_tf.evaluation.reports import other_settings, read_results, reporting, write_csv, write_json
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs import checkpoints
from x3d_tf.runs.event_files import EventFile
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.terminal import tell
from x3d_tf.text import counted, whole

_METRICS = ("top1", "top5", "map")


def watch_run(
    run: RunFolder, *, poll_seconds: float = 30.0, overwrite: bool = False, **procedure: Any
) -> dict[int, dict[str, Any]]:
    """Tests every checkpoint that a run has or gets, and comes back once the run is finished.

    Each leaves STEP.json, with the content of a results.json and the step, in `evaluation/RECORDS_SPLIT_Kcenter_steps`
    of the run folder, a row in steps.csv there, and a point of `eval/top1` (or `eval/map`) in TensorBoard. Steps that
    have theirs are not tested again. A run keeps its newest checkpoints only: ones that it deletes before their turn
    are passed over.

    Args:
        run: the run; it may have no checkpoint yet.
        poll_seconds: between two looks for new checkpoints.
        overwrite: whether the results of an earlier watch are deleted first.
        **procedure: the fields of `EvalConfig`.

    Returns:
        The content of each STEP.json, by step.

    Raises:
        UserError: as `evaluate_run`; the folder holds steps that were tested otherwise; another process watches the
            run with the same procedure.
    """
    require(poll_seconds > 0, "poll_seconds", "be positive", poll_seconds)
    asked = EvalConfig(**procedure)
    if open_dataset(run.read_config().dataset).task == "detection":
        raise UserError(f"{run.root} trains a detector, which cannot be watched: DatasetSpec.validation_split tests it")
    own = folder_of(run, asked)
    folder = own.with_name(f"{own.name}_steps")
    with reporting(folder):
        watch = _Watch(run, asked, folder, overwrite)
        print(f"watching {run.checkpoints} until {run.model} is there; Ctrl-C stops, the same command goes on")
        while True:
            finished = run.model.is_file()  # before looking for checkpoints: the last one was there first
            watch.test_new()
            if finished:
                watch.tell_missed()
                print(f"{run.root} is finished: {run.model} is there. results: {watch.folder}/")
                return watch.results
            time.sleep(poll_seconds)


class _Watch:
    """The steps that were tested, and those that could not be."""

    def __init__(self, run: RunFolder, procedure: EvalConfig, folder: Path, overwrite: bool) -> None:
        self.run, self.procedure, self.folder = run, procedure, folder
        if overwrite:
            for file in _step_files(self.folder):
                file.unlink()
        self.results = {int(file.stem): read_results(file) for file in _step_files(self.folder)}
        self.failures: dict[int, str] = {}
        # of its own, for TensorBoard reads one file of a folder at a time
        self.writer = EventFile(run.tensorboard / self.folder.name)

    def test_new(self) -> None:
        """Tests the checkpoints that are there and have not been tested, the oldest first: it is the next to go."""
        passed: set[int] = set()  # one try a look: a checkpoint that is being written is whole at the next
        while True:
            steps = checkpoints.checkpoint_steps(self.run.checkpoints)
            new = [step for step in steps if step not in self.results and step not in passed]
            if not new:
                return
            passed.add(new[0])
            tell(f"loading the checkpoint of step {new[0]}")
            try:
                model = checkpoints.load_checkpoint(self.run, new[0])
            except UserError as error:
                self.failures[new[0]] = str(error)
                continue
            self.failures.pop(new[0], None)
            self._test(new[0], model)

    def _test(self, step: int, model: X3D) -> None:
        weights = {"weights": str(self.run.checkpoints / f"ckpt-{step}"), "step": step}
        measurement = evaluation_of_run(self.run, self.procedure, model, weights)
        settings = measurement.settings()
        for tested, results in self.results.items():
            other = set(other_settings(results, settings)) - {"step"}
            if other:
                raise UserError(
                    f"{_path(self.folder, tested)} is of another test (other {', '.join(sorted(other))}); test all "
                    "steps anew with --overwrite"
                )
        results = settings | measurement.predict().metrics()
        write_json(_path(self.folder, step), results)
        self.results[step] = results
        self._write_csv()
        measured = {name: results[name] for name in _METRICS if name in results}
        self.writer.add(step, {f"eval/{name}": value for name, value in measured.items()})
        self.writer.flush()
        told = [name for name in measured if name != "top5" or results["classes"] > 5]  # else it says nothing
        words = ", ".join(f"{name} {measured[name]:.1%}" for name in told)
        print(f"step {step}: {words} ({counted(results['videos'], 'video')}, {results['views']})", flush=True)

    def _write_csv(self) -> None:
        metrics = [name for name in _METRICS if any(name in row for row in self.results.values())]
        rows = [[step, *(row[name] for name in metrics)] for step, row in sorted(self.results.items())]
        write_csv(self.folder / "steps.csv", [["step", *metrics], *rows])

    def tell_missed(self) -> None:
        """Says which checkpoints could not be read."""
        for step, reason in sorted(self.failures.items()):
            print(f"warning: the checkpoint of step {step} was not tested: {reason}", file=sys.stderr)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def _step_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if whole(path.stem) is not None]
