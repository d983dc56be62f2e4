"""Evaluation of a run or a model file, and its report."""

from pathlib import Path
from typing import Any

from x3d_tf.evaluation.comparison import describe
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.interfaces import Evaluator, Report
from x3d_tf.evaluation.reports import RESULTS_NAME, refuse_to_replace
from x3d_tf.modeling.archive import describe_any, weights_of
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.saving import load_detector
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.runtimes.classifier_file import ClassifierFile
from x3d_tf.runtimes.opening import open_classifier


def evaluate_run(
    run: RunFolder, task: Evaluator, *, output: str | None = None, overwrite: bool = False, **settings: Any
) -> Report:
    """Evaluates the model of a finished run and writes a report.

    Args:
        run: the run folder.
        task: the task of the run.
        output: folder of the report. Defaults to a folder in the run folder, such as
            `evaluation/RECORDS_SPLIT_Kcenter`.
        overwrite: whether to replace an existing report.
        **settings: the fields of `EvalConfig`: records, split, temporal_views, spatial_crops, clip_starts,
            frame_sampling, combine, head_pool.

    Raises:
        UserError: the run has no model yet; the records are missing, damaged or have other classes; a report exists; a
            setting is out of range or does not fit the task.
    """
    eval_config = EvalConfig(**settings)
    folder = task.report_folder(run, eval_config)
    return _evaluate(run.root, task, Path(output) if output else folder, eval_config, run, overwrite)


def load_any(path: Path) -> Detector | ClassifierFile:
    """Loads a detector, or opens a classifier in a file."""
    return load_detector(path) if describe_any(path).detection_head else open_classifier(path)


def weights_of_run(run: RunFolder) -> dict[str, Any]:
    """Returns the origin of the weights of a finished run, for its reports: the file, its hash, and the training."""
    return {**weights_of(run.root), "training": run.training_record()}


def evaluate_file(
    file: str | Path, task: Evaluator, *, output: str, overwrite: bool = False, **settings: Any
) -> Report:
    """Evaluates a `.keras` file of this package, or a file that it exported, and writes a report.

    Args:
        file: the model file.
        task: the task of the model.
        output: folder of the report.
        overwrite: whether to replace an existing report.
        **settings: the fields of `EvalConfig`, including records and split. The others default to those stored in the
            file.

    Raises:
        UserError: the file does not exist or was not saved by this package; otherwise as `evaluate_run`.
    """
    return _evaluate(Path(file), task, Path(output), EvalConfig(**settings), None, overwrite)


def _evaluate(
    path: Path, task: Evaluator, folder: Path, settings: EvalConfig, run: RunFolder | None, overwrite: bool
) -> Report:
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    weights = weights_of_run(run) if run else weights_of(path)
    report = task.evaluation(load_any(path), weights, settings, run).report(folder)
    print(describe(report))
    return report
