"""Accuracy over the number of clips of a video, K, and so over its cost (paper, Figure 3)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from x3d_tf import plots
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.classification import Evaluation, evaluation_of_file, evaluation_of_run
from x3d_tf.evaluation.comparison import describe
from x3d_tf.evaluation.eval_config import EvalConfig, folder_of
from x3d_tf.evaluation.reports import (
    RESULTS_NAME,
    Report,
    other_settings,
    read_report,
    write_csv,
)
from x3d_tf.modeling.archive import weights_of
from x3d_tf.modeling.saving import load_classifier
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.text import counted

CLIPS = (1, 3, 5, 7, 10)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        folder: holds sweep.csv and sweep.png.
        reports: one for each of `CLIPS`.
    """

    folder: Path
    reports: tuple[Report, ...]


def sweep_run(run: RunFolder, *, output: str | None = None, overwrite: bool = False, **procedure: Any) -> Sweep:
    """Tests the model of a finished run with 1, 3, 5, 7 and 10 clips of each video.

    Each number of clips is a test of its own, for clips start elsewhere, and leaves the report that `evaluate_run`
    leaves. Reports that are there are taken as they are, so that a sweep which was stopped goes on where it was.

    Args:
        run: the run.
        output: folder of all the reports and of sweep.csv and sweep.png; the places within the run folder unless given.
        overwrite: whether all tests are made anew.
        **procedure: the fields of `EvalConfig` but temporal_views.

    Raises:
        UserError: as `evaluate_run`; a report of another test is where one of these should go.
    """
    asked = _without_views(procedure)
    folders = {k: Path(output) / f"{k}clips" if output else folder_of(run, asked, k) for k in CLIPS}
    folder = Path(output) if output else folder_of(run, asked, "sweep_")
    return _sweep(
        evaluation_of_run(run, asked, load_classifier(run.root), weights_of(run.root)), folder, folders, overwrite
    )


def sweep_file(file: str | Path, *, output: str, overwrite: bool = False, **procedure: Any) -> Sweep:
    """As `sweep_run` for a `.keras` file; the procedure has to name records and split."""
    measurement = evaluation_of_file(Path(file), _without_views(procedure))
    return _sweep(measurement, Path(output), {k: Path(output) / f"{k}clips" for k in CLIPS}, overwrite)


def _without_views(procedure: dict[str, Any]) -> EvalConfig:
    asked = EvalConfig(**procedure)
    require(
        asked.temporal_views is None, "temporal_views", f"not be given: a sweep takes {CLIPS}", asked.temporal_views
    )
    return replace(asked, temporal_views=1)


def _sweep(measurement: Evaluation, folder: Path, folders: dict[int, Path], overwrite: bool) -> Sweep:
    measurements = {k: measurement.with_views(k) for k in CLIPS}
    there = {} if overwrite else {k: _finished(measurements[k], folders[k]) for k in CLIPS}  # all, before hours of work
    reports = []
    for k in CLIPS:
        report = there.get(k)
        print(f"{'already there' if report else 'testing with'}: {counted(k, 'clip')} of each video", flush=True)
        reports.append(report or measurements[k].report(folders[k]))
        print(describe(reports[-1]).partition("\n")[0], flush=True)
    sweep = Sweep(folder, tuple(reports))
    _write(sweep)
    return sweep


def _finished(measurement: Evaluation, folder: Path) -> Report | None:
    """The report of the same test, if there is one."""
    if not (folder / RESULTS_NAME).is_file():
        return None
    report = read_report(folder)
    other = other_settings(report.results, measurement.settings())
    if other:
        raise UserError(
            f"{folder} holds the report of another test (other {', '.join(other)}); choose another --output, or make "
            "all anew with --overwrite"
        )
    return report


def _write(sweep: Sweep) -> None:
    rows = [report.results for report in sweep.reports]
    metrics = ("map",) if "map" in rows[0] else ("top1", "top5")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    header = ["clips", "views", "gmacs_per_video", *metrics]
    table = [
        [k, row["views"], f"{row['gmacs_per_video']:.6g}", *(f"{row[m]:.6g}" for m in metrics)]
        for k, row in zip(CLIPS, rows)
    ]
    name = "mAP" if metrics == ("map",) else "top-1"
    title = f"{rows[0]['network']} on {rows[0]['records']}, {rows[0]['split']}, {rows[0]['videos']} videos"
    points = [(row["gmacs_per_video"], row[metrics[0]]) for row in rows]
    plots.save_sweep(points, CLIPS, sweep.folder / "sweep.png", title, name)
    write_csv(sweep.folder / "sweep.csv", [header, *table])
