"""An evaluation with metrics and samples of its own, through reports, tables, sweeps and watched runs. No networks."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from report_settings import predictions, settings, write

from x3d_tf import plots
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.evaluation import running, sweep, watch
from x3d_tf.evaluation.comparison import compare, describe, table
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.interfaces import Evaluation, Report
from x3d_tf.evaluation.reports import (
    differing_settings,
    locked_report_folder,
    metrics_to_json,
    read_report,
    read_results,
    settings_of,
    writing_report,
)
from x3d_tf.runs import checkpoints
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.types import Metric

DRIFT = Metric("drift", "number", label="=drift|s")  # a spreadsheet would run it, and Markdown end the cell
HALVES = Metric("halves", "share", label="balanced halves")


@dataclass
class Lengths:
    """Evaluates how long recordings are, by metrics whose names this package does not know."""

    views: int = 10
    drift: float = -0.0315
    longest: Any = 12
    metrics = (DRIFT, HALVES)
    sample = "body part"

    def with_views(self, temporal_views: int) -> "Lengths":
        return replace(self, views=temporal_views, drift=self.drift * temporal_views)

    def settings(self) -> dict[str, Any]:
        others = settings(dataset="folder", views=f"{self.views}-Center", gmacs_per_clip=2.0)
        kept = {name: value for name, value in others.items() if name not in ("sample", "metrics")}
        return kept | {"samples": 7, "gmacs_per_sample": 2.0 * self.views}

    def measure(self) -> dict[str, Any]:
        return {"drift": self.drift, "halves": 0.25, "longest": self.longest, "detections": 3}

    def report(self, folder: Path) -> Report:
        stated = settings_of(self)
        with locked_report_folder(folder), writing_report(folder, stated, self.measure()) as report:
            (folder / "lengths.txt").write_text("12")
        return report


class Task:
    """Stands in for a task, whose evaluation needs no network."""

    def report_folder(self, run: RunFolder, settings: EvalConfig, views: int | str | None = None) -> Path:
        return run.evaluations / f"lengths{views or ''}"

    def evaluation(
        self, model: Any, weights: dict[str, Any], settings: EvalConfig, run: RunFolder | None
    ) -> Evaluation:
        return Lengths() if settings.temporal_views is None else Lengths().with_views(settings.temporal_views)


@pytest.fixture(autouse=True)
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (running, sweep):
        monkeypatch.setattr(module, "load_any", lambda _: SimpleNamespace())
        monkeypatch.setattr(module, "weights_of", lambda _: {})


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_report_states_and_prints_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = running.evaluate_file("model.keras", Task(), output=str(tmp_path / "report"))
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["metrics"] == [
        {"name": "drift", "kind": "number", "label": "=drift|s"},
        {"name": "halves", "kind": "share", "label": "balanced halves"},
    ]
    values = {name: results[name] for name in ("sample", "samples", "drift", "longest")}
    assert values == {"sample": "body part", "samples": 7, "drift": -0.0315, "longest": 12}
    assert read_report(tmp_path / "report").results == results == report.results
    assert capsys.readouterr().out == (
        "x3d_s on data/mine, split val: =drift|s -0.0315, balanced halves 25.0 % (7 body parts, 400 classes, "
        "10-Center, 2 x 10 GMACs per body part, 3.794 M parameters)\n"
    )


def test_reports_of_other_metrics_share_a_table(tmp_path: Path) -> None:
    Lengths().report(tmp_path / "own")
    write(tmp_path / "top1", settings(), predictions())
    own, top1 = compare([str(tmp_path / "own"), str(tmp_path / "top1")], output=str(tmp_path))
    assert (own["=drift|s"], own["balanced halves"], own["top-1"], own["paper's top-1"]) == (
        "-0.0315",
        "25.0",
        "-",
        "-",
    )
    assert (top1["=drift|s"], top1["balanced halves"], top1["paper's top-1"]) == ("-", "-", "72.9")
    assert (own["body parts"], own["videos"], own["GMACs a body part"]) == ("7", "-", "2 x 10")
    header, first, _ = rows_of(tmp_path / "comparison.csv")
    assert "'=drift|s" in header and "=drift|s" not in header
    assert first[header.index("'=drift|s")] == "-0.0315"  # a number, not a formula
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert "| =drift\\|s | balanced halves | top-1 | top-5 |" in lines[0]
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(header) + 1}


@pytest.mark.parametrize("label", ["network", "paper", "M parameters", "GMACs a video"])
def test_a_label_that_is_another_column_gets_a_column_of_its_own(label: str) -> None:
    report = reported("a", "halves", label=label)
    (row,), (other,) = table([report]), table([reported("a", "halves")])
    assert row.pop(f"{label} (halves, share)") == other.pop("accuracy") == "50.0"
    assert row == other
    assert f"{label} 50.0 %" in describe(report)


def reported(folder: str, name: str, kind: Any = "share", label: str = "accuracy", **changes: Any) -> Report:
    """Returns a report with one metric, whose value is 0.5."""
    return Report(
        Path(folder), settings(metrics=metrics_to_json([Metric(name, kind, label=label)]), **changes) | {name: 0.5}
    )


def test_metrics_with_the_same_label_have_columns_of_their_own() -> None:
    """Otherwise a column would mix two measures, or percentages and other numbers."""
    rows = table(
        [reported("a", "top1"), reported("b", "balanced"), reported("c", "top1", "number"), reported("d", "top1")]
    )
    columns = ("accuracy (top1, share)", "accuracy (balanced, share)", "accuracy (top1, number)")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("50.0", "-", "-"),
        ("-", "50.0", "-"),
        ("-", "-", "0.5"),
        ("50.0", "-", "-"),
    ]
    assert "accuracy" not in rows[0]
    assert table([reported("a", "top1"), reported("b", "top1")])[1]["accuracy"] == "50.0"


@pytest.mark.parametrize(("noun", "column"), [("view", "views"), ("record", "records")])
def test_samples_and_settings_have_columns_of_their_own(noun: str, column: str) -> None:
    (row,) = table([reported("a", "top1", sample=noun)])
    expected = {"views": "10-Center", "records": "data/mine"}
    assert (row[column], row[f"{column} (samples)"], row[f"GMACs a {noun}"]) == (expected[column], "40", "1.963 x 10")
    (row,) = table([reported("a", "top1", label="videos")])
    assert (row["videos (samples)"], row["videos (top1, share)"]) == ("40", "50.0")


def test_columns_that_cannot_be_told_apart_are_an_error() -> None:
    found = [reported("a", "x", label="x"), reported("b", "y", label="x"), reported("c", "z", label="x (y, share)")]
    with pytest.raises(UserError, match=r"columns of the table must have distinct names, got \['x \(y, share\)'\]"):
        table(found)


def test_a_sweep_tabulates_and_plots_the_main_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plots.save_inference_cost
    monkeypatch.setattr(plots, "save_inference_cost", lambda *arguments: (drawn.append(arguments), save(*arguments)))
    found = sweep.sweep_file("model.keras", Task(), output=str(tmp_path))
    header, first, *_, last = rows_of(tmp_path / "sweep.csv")
    assert header == ["clips", "views", "gmacs_per_sample", "drift", "halves"]
    assert (first, last) == (["1", "1-Center", "2", "-0.0315", "0.25"], ["10", "10-Center", "20", "-0.315", "0.25"])
    (((panels,), path, title),) = drawn
    (curve,) = panels.curves
    assert curve.points == [(2.0 * k, pytest.approx(-0.0315 * k), k) for k in sweep.CLIPS]
    assert (title, panels.metric, panels.sample) == ("x3d_s on data/mine, val, 7 body parts", DRIFT, "body part")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [report.results for report in sweep.sweep_file("m", Task(), output=str(tmp_path)).reports] == [
        report.results for report in found.reports
    ]  # reused
    results = read_results(tmp_path / "3clips" / "results.json")
    others = metrics_to_json([HALVES])
    (tmp_path / "3clips" / "results.json").write_text(json.dumps(results | {"metrics": others}))
    with pytest.raises(UserError, match=r"3clips has a report with other settings \(metrics\)"):
        sweep.sweep_file("model.keras", Task(), output=str(tmp_path))


def test_watched_steps_tabulate_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(TrainConfig(), {})
    steps: Iterator[list[int]] = iter([[5], [5, 10], [5, 10]])

    def find(_: Path) -> list[int]:
        found = next(steps, [5, 10])
        if found == [5, 10]:
            run.model.touch()
        return found

    monkeypatch.setattr(checkpoints, "checkpoint_steps", find)
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *_: SimpleNamespace())
    results = watch.watch_run(run, Task(), poll_seconds=0.01)
    assert sorted(results) == [5, 10] and results[5] == read_results(run.evaluations / "lengths_steps" / "5.json")
    assert rows_of(run.evaluations / "lengths_steps" / "steps.csv") == [
        ["step", "drift", "halves"],
        ["5", "-0.0315", "0.25"],
        ["10", "-0.0315", "0.25"],
    ]
    assert "step 5: drift -0.0315, halves 25.0% (7 body parts, 10-Center)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ()}, r"metrics must be a list of 1 to 20, got \[\]"),
        ({"metrics": (DRIFT,) * 2}, r"the names of metrics must be distinct, got \['drift', 'drift'\]"),
        ({"metrics": (DRIFT, Metric("mean", "share"))}, r"mean must be in \[0, 1\], got None"),
        ({"metrics": (Metric("longest", "share"),)}, r"longest must be in \[0, 1\], got 12"),
        ({"drift": float("nan")}, r"drift must be a finite number in \[-1e15, 1e15\], got nan"),
        ({"drift": 2e15}, r"drift must be a finite number in \[-1e15, 1e15\], got 2000000000000000\.0"),
        ({"longest": float("nan")}, "longest must be a value for JSON with finite numbers, got nan"),
        ({"longest": {"parts": [1, np.float32("inf")]}}, r"longest must be a value for JSON .*, got {'parts': \[1, "),
        ({"longest": {1, 2}}, r"longest must be a value for JSON with finite numbers, got {1, 2}"),
        ({"sample": "Körperteil"}, "sample must be a noun of .*, got 'Körperteil'"),
        ({"settings": lambda: settings(longest=1)}, r"not be .*, got \['longest'\]"),
    ],
)
def test_an_evaluation_that_states_its_results_wrongly_writes_no_report(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    evaluation = Lengths()
    evaluation.report(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    for name, value in changes.items():
        setattr(evaluation, name, value)
    with pytest.raises(UserError, match=message):
        evaluation.report(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": lambda: settings(drift=1)}, r"names of metrics must not be names of settings, got \['drift'\]"),
        ({"metrics": (Metric("metrics", "number"),)}, r"must not be names of settings, got \['metrics'\]"),
        ({"settings": lambda: settings(own=float("nan"))}, "own must be a value for JSON with finite numbers, got nan"),
        ({"settings": lambda: settings(own=object())}, "own must be a value for JSON with finite numbers, got <object"),
    ],
)
def test_settings_that_cannot_be_reported_are_rejected_before_the_evaluation(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    evaluation = Lengths()
    for name, value in changes.items():
        setattr(evaluation, name, value)
    with pytest.raises(UserError, match=message):
        settings_of(evaluation)


def test_numpy_values_are_reported_as_numbers(tmp_path: Path) -> None:
    """Of metrics, of further results, and of settings."""
    evaluation = Lengths(drift=cast(float, np.float32(0.25)))
    evaluation.longest = {"parts": np.arange(3, dtype=np.int32), "first": [np.float32(0.5)], "all": np.bool_(True)}
    others = Lengths().settings() | {"samples": np.int64(7), "own": (np.float64(0.5), 2)}
    evaluation.settings = lambda: others  # type: ignore[method-assign]
    report = evaluation.report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["longest"] == {"parts": [0, 1, 2], "first": [0.5], "all": True}
    assert (results["drift"], results["samples"], results["own"]) == (0.25, 7, [0.5, 2])
    assert results == report.results == read_report(tmp_path).results
    assert differing_settings(results, settings_of(evaluation)) == []


def test_metrics_have_names_and_labels() -> None:
    assert Metric("loss", "loss").label == "loss"
    with pytest.raises(UserError, match=r"Metric\.name must be a name of at most 64 .*, got 'top-1'"):
        Metric("top-1", "share")
