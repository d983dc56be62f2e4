"""Reports on disk: what they count, atomic writes, and damaged files. No TensorFlow."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_settings import NAMES, precision_of, predictions, settings, write

from x3d_tf import plots
from x3d_tf.errors import UserError
from x3d_tf.evaluation import reports
from x3d_tf.evaluation.classification_reports import Predictions
from x3d_tf.evaluation.comparison import compare
from x3d_tf.evaluation.reports import differing_settings, locked_report_folder, read_report

FINITE = r"be a finite number in \[-1e15, 1e15\]"


def test_the_table_of_classes_counts_like_a_loop(tmp_path: Path) -> None:
    given = predictions()
    report = write(tmp_path, settings(), given)
    with (tmp_path / "per_class.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(NAMES)
    for number, name in enumerate(NAMES):
        of_class = [row for row, label in zip(given.probabilities, given.labels) if label == number]
        assert int(rows[name]["videos"]) == len(of_class)
        if not of_class:
            assert (rows[name]["top1"], rows[name]["most_confused_with"]) == ("", "")
            continue
        ranked = [sorted(range(7), key=lambda c: -row[c]) for row in of_class]
        assert float(rows[name]["top1"]) == pytest.approx(sum(r[0] == number for r in ranked) / len(of_class), abs=1e-5)
        assert float(rows[name]["top5"]) == pytest.approx(
            sum(number in r[:5] for r in ranked) / len(of_class), abs=1e-5
        )
        wrong = [r[0] for r in ranked if r[0] != number]
        most = max(range(7), key=lambda c: (wrong.count(c), -c))
        assert rows[name]["most_confused_with"] == NAMES[most]
        assert int(rows[name]["times"]) == wrong.count(most)
    r = report.results
    assert r["mean_of_top1_and_top5"] == pytest.approx((r["top1"] + r["top5"]) / 2)
    assert read_report(tmp_path).results == r


def test_a_class_that_was_never_missed_is_confused_with_none(tmp_path: Path) -> None:
    truth = np.eye(2, dtype=bool)
    write(tmp_path, settings(), Predictions(("x", "y"), ("a", "b"), truth * 0.8 + 0.1, truth, exclusive=True))
    assert (tmp_path / "per_class.csv").read_text().splitlines()[1:] == ["a,1,1,1,,", "b,1,1,1,,"]


def test_reports_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, settings(), predictions())

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(plots, "save_confusion", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, settings(views="3-Center"), predictions(1))
    assert not (tmp_path / reports.RESULTS_NAME).exists()  # otherwise it would not match the tables


def test_metrics_that_are_not_finite_are_errors(tmp_path: Path) -> None:
    """mAP is undefined if no class has positives; the existing report stays."""
    report = write(tmp_path, settings(), predictions())
    undefined = Predictions(("x", "y"), NAMES, np.full((2, 7), 0.5), np.zeros((2, 7), bool), exclusive=False)
    with pytest.raises(UserError, match=r"^map must be finite on the 2 videos, got nan$"):
        write(tmp_path, settings(), undefined)
    assert read_report(tmp_path).results == report.results


def metric(name: str = "top1", kind: str = "share", label: str = "a") -> dict[str, Any]:
    return {"name": name, "kind": kind, "label": label}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", r"the file must contain a JSON object, got \[1\]"),
        ({"detections": "found.csv"}, "must be the report of a network, not of a csv file of detections"),
        ({"network": 3}, "network must be one printable line, got 3"),
        ({"samples": True}, "samples must be an integer in 1..1e15, got True"),
        ({"gmacs_per_sample": float("nan")}, r"gmacs_per_sample must be a number in \[0, 1e15\], got nan"),
        ({"top1": 72.9}, r"top1 must be in \[0, 1\], got 72.9"),
        ({"dataset": 400}, "dataset must be a short string, got 400"),
        ({"dataset": "k" * 101}, "dataset must be a short string"),
        ({"videos_expected": -1}, "videos_expected must be an integer in 0..1e15, or null, got -1"),
        ({"videos_present": "40"}, "videos_present must be an integer in 0..1e15, or null, got '40'"),
        ({"key_frames_missing": True}, "key_frames_missing must be an integer in 0..1e15, or null, got True"),
        ({"classes_without_positives": "c"}, "classes_without_positives must be a list of names, got 'c'"),
        ({"classes_without_positives": [3]}, r"classes_without_positives must be a list of names, got \[3\]"),
        (
            {"official_split": 1, "official_splits": 3, "dataset": ""},
            "dataset must be given if official_splits is, got ''",
        ),
        ({"official_split": 1}, r"official_splits must be an integer in 1\.\.100, got None"),
        ({"official_splits": 3}, r"official_split must be an integer in 1\.\.3, of official_splits, got None"),
        ({"official_split": 4, "official_splits": 3}, r"official_split must be an integer in 1\.\.3, .*, got 4"),
        ({"official_split": 1, "official_splits": 10**9}, r"official_splits must be an integer in 1\.\.100, got 1000"),
        ({"training": "x"}, "training must be an object or null, got 'x'"),
        ({"training": {"settings_sha256": 1}}, r"training\.settings_sha256 must be a string, got 1"),
        ({"training": {"settings_sha256": "", "gin_files": 1}}, r"training\.gin_files must be a list .*, got 1"),
        (
            {"training": {"settings_sha256": "", "records_sha256": 1}},
            r"training\.records_sha256 must be a string or null",
        ),
        ({"training": {"settings_sha256": "", "init": []}}, r"training\.init must be a string or null, got \[\]"),
        ({"combine": "sum"}, "combine must be one of mean, max, got 'sum'"),
        ({"frame_sampling": ["exact"]}, r"frame_sampling must be one of slowfast, exact, got \['exact'\]"),
        ({"clip_starts": 1}, "clip_starts must be one of offset, slowfast, got 1"),
        ({"top5": None}, r"top5 must be in \[0, 1\], got None"),
        (precision_of("high"), r"map must be in \[0, 1\], got 'high'"),
        ({"samples": 10**400}, "samples must be an integer in 1..1e15, got 1000"),
        ({"samples": 0}, "samples must be an integer in 1..1e15, got 0"),
        ({"samples": -5}, "samples must be an integer in 1..1e15, got -5"),
        ({"classes": 0}, "classes must be an integer in 1..1e15, got 0"),
        ({"gmacs_per_clip": 10**400}, r"gmacs_per_clip must be a number in \[0, 1e15\], got 1000"),
        ({"gmacs_per_clip": 1e-300}, "gmacs_per_sample must be at most 1,000,000 times gmacs_per_clip, got "),
        ({"gmacs_per_clip": -2, "gmacs_per_sample": -20}, r"gmacs_per_clip must be a number in \[0, 1e15\], got -2"),
        ({"gmacs_per_clip": 0, "gmacs_per_sample": -1}, r"gmacs_per_sample must be a number in \[0, 1e15\], got -1"),
        ({"params_paper": "3"}, r"params_paper must be a number in \[0, 1e15\], got '3'"),
        ({"params": -1}, r"params must be a number in \[0, 1e15\], got -1"),
        ({"samples": 2 * 10**15}, r"samples must be an integer in 1\.\.1e15, got 2000000000000000"),
        ({"network": "x3d_s\n| a |"}, r"network must be one printable line, got 'x3d_s\\n\| a \|'"),
        ({"split": ""}, "split must be one printable line, got ''"),
        ({"views": " "}, "views must be one printable line, got ' '"),
        ({"records": 3}, "records must be a string, got 3"),
        ({"sample": "y "}, "sample must be a noun of .*, got 'y '"),
        ({"metrics": [metric(label="  ")]}, r"Metric\.label must have 1 to 40 printable characters, .*, got '  '"),
        ({"metrics": [metric(label="a ")]}, r"Metric\.label must .*, none of them a space at an end, got 'a '"),
        ({"params": "many"}, r"params must be a number in \[0, 1e15\], got 'many'"),
        ({"sample": None}, "sample must be a noun of 2 to 100 letters a to z and spaces, .*, got None"),
        ({"sample": "y"}, "sample must be a noun of 2 to 100 letters a to z and spaces, .*, got 'y'"),
        ({"sample": "a" * 101}, "sample must be a noun of 2 to 100 letters a to z and spaces, .*, got 'aaa"),
        ({"sample": "video\x1b[2J"}, r"sample must be a noun .*, got 'video\\x1b\[2J'"),
        ({"metrics": None}, "metrics must be a list of 1 to 20, got None"),
        ({"metrics": {"name": "a"}}, "metrics must be a list of 1 to 20, got {"),
        ({"metrics": []}, r"metrics must be a list of 1 to 20, got \[\]"),
        ({"metrics": [0] * 10**6}, r"metrics must be a list of 1 to 20, got .{500}\.\.\. \(\d+ characters\)"),
        ({"metrics": ["top1"]}, "metrics must be objects with name, kind, label, got 'top1'"),
        ({"metrics": [{"name": "top1"}]}, "metrics must be objects with name, kind, label, got {"),
        ({"metrics": [metric() | {"note": ""}]}, "metrics must be objects with name, kind, label, got {"),
        ({"metrics": [metric(name=["top1"])]}, r"Metric\.name must be str, got \['top1'\]"),
        ({"metrics": [metric(name="=1+1")]}, r"Metric\.name must be a name of at most 64 .*, got '=1\+1'"),
        ({"metrics": [metric(name="a" * 65)]}, r"Metric\.name must be a name of at most 64 "),
        ({"metrics": [metric(name="top1\n")]}, r"Metric\.name must be a name of at most 64 "),
        ({"metrics": [metric(kind="percent")]}, r"Metric\.kind must be one of share, loss, count, number, got 'per"),
        ({"metrics": [metric(label=1)]}, r"Metric\.label must be str, got 1"),
        ({"metrics": [metric(label="\x1b[2J")]}, r"Metric\.label must have 1 to 40 printable characters, .*, got "),
        ({"metrics": [metric(label="\u202eabc")]}, r"Metric\.label must have 1 to 40 printable characters, .*, got "),
        ({"metrics": [metric(label="a" * 41)]}, r"Metric\.label must have 1 to 40 printable characters, .*, got "),
        ({"metrics": [metric(), metric(label="b")]}, r"the names of metrics must be distinct, got \['top1', 'top1'\]"),
        ({"metrics": [metric(label=""), metric("top5", label="top1")]}, "the labels of metrics must be distinct, got"),
        ({"metrics": [metric("mae")]}, r"mae must be in \[0, 1\], got None"),
        ({"metrics": [metric("network")]}, r"network must be in \[0, 1\], got 'x3d_s'"),
        ({"metrics": [metric("mae", "number")], "mae": None}, rf"mae must {FINITE}, got None"),
        ({"metrics": [metric("mae", "number")], "mae": math.nan}, rf"mae must {FINITE}, got nan"),
        ({"metrics": [metric("mae", "loss")], "mae": -math.inf}, rf"mae must {FINITE}, got -inf"),
        ({"metrics": [metric("mae", "count")], "mae": True}, rf"mae must {FINITE}, got True"),
        ({"metrics": [metric("mae", "number")], "mae": 10**400}, rf"mae must {FINITE}, got 1000"),
    ],
)
def test_damaged_results_are_reported(tmp_path: Path, content: Any, message: str) -> None:
    good = settings() | {"top1": 0.5, "top5": 0.9}
    text = content if isinstance(content, str) else json.dumps(good | content)
    folder = tmp_path / "evaluation" / "x"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    with pytest.raises(UserError, match=rf"results\.json (is not a report of this version of x3d_tf: )?{message}"):
        compare([str(tmp_path)])


def test_only_settings_of_both_reports_are_compared() -> None:
    existing = settings(weights="a", records_sha256="1")
    assert (
        differing_settings(existing, settings(weights="b", records="/data/kinetics400", records_sha256="1", seed=0))
        == []
    )
    assert differing_settings(existing, settings(records_sha256="2", clip_starts="slowfast")) == [
        "clip_starts",
        "records_sha256",
    ]
    assert differing_settings(settings(), settings(records="elsewhere")) == ["records"]


def test_one_process_writes_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "report"
    with (
        locked_report_folder(folder),
        pytest.raises(UserError, match=r"another process is writing the report .*report \(process "),
        locked_report_folder(folder),
    ):
        pass
    assert list(folder.iterdir()) == []
