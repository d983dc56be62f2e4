"""Evaluation of runs and model files with their own tasks."""

from pathlib import Path
from typing import Any

from x3d_tf.evaluation import running, sweep, watch
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.base import task_of_model, task_of_run


def evaluate_run(run: RunFolder, **settings: Any) -> Report:
    return running.evaluate_run(run, task_of_model(run.root), **settings)


def evaluate_file(file: str | Path, **settings: Any) -> Report:
    return running.evaluate_file(file, task_of_model(file), **settings)


def sweep_run(run: RunFolder, **settings: Any) -> sweep.Sweep:
    return sweep.sweep_run(run, task_of_model(run.root), **settings)


def sweep_file(file: str | Path, **settings: Any) -> sweep.Sweep:
    return sweep.sweep_file(file, task_of_model(file), **settings)


def watch_run(run: RunFolder, **settings: Any) -> dict[int, dict[str, Any]]:
    return watch.watch_run(run, task_of_run(run), **settings)
