"""The main metric as a function of the number of clips per video, K, and therefore of the cost (paper, Figure 3)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from x3d_tf import csv_files, plots
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.comparison import describe
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.interfaces import Evaluation, Evaluator, Report
from x3d_tf.evaluation.reports import RESULTS_NAME, differing_settings, read_report, settings_of, write_csv
from x3d_tf.evaluation.running import load_any, weights_of_run
from x3d_tf.modeling.archive import weights_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.text import counted

CLIPS = (1, 3, 5, 7, 10)


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes:
        folder: contains sweep.csv and sweep.png.
        reports: one report for each number of clips in `CLIPS`.
    """

    folder: Path
    reports: tuple[Report, ...]


def sweep_run(
    run: RunFolder, task: Evaluator, *, output: str | None = None, overwrite: bool = False, **settings: Any
) -> Sweep:
    """Evaluates the model of a finished run with 1, 3, 5, 7 and 10 clips per video.

    The clips start at other times for each number of clips, so each is a separate evaluation with the same report as
    that of `evaluate_run`. Existing reports are reused, so that an interrupted sweep can be resumed.

    Args:
        run: the run folder.
        task: the task of the run.
        output: folder of the reports, sweep.csv and sweep.png. Defaults to folders in the run folder.
        overwrite: whether to repeat evaluations that have a report.
        **settings: the fields of `EvalConfig` except temporal_views.

    Raises:
        UserError: as `evaluate_run`; a report folder has a report with other settings.
    """
    eval_config = _without_views(settings)
    evaluation = task.evaluation(load_any(run.root), weights_of_run(run), eval_config, run)
    folders = {k: Path(output) / f"{k}clips" if output else task.report_folder(run, eval_config, k) for k in CLIPS}
    folder = Path(output) if output else task.report_folder(run, eval_config, "sweep_")
    return _sweep(evaluation, folder, folders, overwrite)


def sweep_file(file: str | Path, task: Evaluator, *, output: str, overwrite: bool = False, **settings: Any) -> Sweep:
    """Evaluates a `.keras` or exported file as `sweep_run` does a run. Requires `records` and `split`."""
    evaluation = task.evaluation(load_any(Path(file)), weights_of(Path(file)), _without_views(settings), None)
    return _sweep(evaluation, Path(output), {k: Path(output) / f"{k}clips" for k in CLIPS}, overwrite)


def _without_views(settings: dict[str, Any]) -> EvalConfig:
    eval_config = EvalConfig(**settings)
    views = eval_config.temporal_views
    require(views is None, "temporal_views", f"not be set: a sweep uses {CLIPS} clips", views)
    return replace(eval_config, temporal_views=1)


def _sweep(evaluation: Evaluation, folder: Path, folders: dict[int, Path], overwrite: bool) -> Sweep:
    evaluations = {k: evaluation.with_views(k) for k in CLIPS}
    # all read first: a report with other settings should be found before hours of work
    existing = {} if overwrite else {k: _existing_report(evaluations[k], folders[k]) for k in CLIPS}
    reports = []
    for k in CLIPS:
        report = existing.get(k)
        action = "reusing the report of" if report else "evaluating"
        print(f"{action} {counted(k, 'clip')} per video", flush=True)
        reports.append(report or evaluations[k].report(folders[k]))
        print(describe(reports[-1]).partition("\n")[0], flush=True)
    sweep = Sweep(folder, tuple(reports))
    _write(sweep, evaluation)
    return sweep


def _existing_report(evaluation: Evaluation, folder: Path) -> Report | None:
    """Returns the report in a folder if one exists. Raises `UserError` if its settings differ."""
    if not (folder / RESULTS_NAME).is_file():
        return None
    report = read_report(folder)
    differing = differing_settings(report.results, settings_of(evaluation))
    if differing:
        raise UserError(
            f"{folder} has a report with other settings ({', '.join(differing)}); choose another --output, or repeat "
            "all evaluations with --overwrite"
        )
    return report


def _write(sweep: Sweep, evaluation: Evaluation) -> None:
    rows = [report.results for report in sweep.reports]
    metrics = evaluation.metrics
    sweep.folder.mkdir(parents=True, exist_ok=True)
    header = ["clips", "views", "gmacs_per_sample", *(metric.name for metric in metrics)]
    table = [
        [k, row["views"], *(csv_files.number(row[name], ".6g") for name in header[2:])] for k, row in zip(CLIPS, rows)
    ]
    count = counted(rows[0]["samples"], evaluation.sample)
    title = f"{rows[0]['network']} on {rows[0]['records']}, {rows[0]['split']}, {count}"
    points = [(row["gmacs_per_sample"], row[metrics[0].name], k) for k, row in zip(CLIPS, rows)]
    curve = plots.CostCurve(rows[0]["network"], points)
    panels = plots.CostPanels("", metrics[0], evaluation.sample, [curve])
    plots.save_inference_cost([panels], sweep.folder / "sweep.png", title)
    write_csv(sweep.folder / "sweep.csv", [header, *table])
