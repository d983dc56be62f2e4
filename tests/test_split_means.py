"""Means over the official splits of a data set in tables of reports. No TensorFlow."""

import csv
from pathlib import Path
from typing import Any

import pytest
from report_settings import settings

from x3d_tf.evaluation.comparison import compare, table
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.reports import RESULTS_NAME, read_report, write_json
from x3d_tf.evaluation.split_means import split_means

TOP1S = {1: 0.9012, 2: 0.8809, 3: 0.8945}  # as of a run on each split of UCF101


def on_split(number: int, **changes: Any) -> dict[str, Any]:
    """Returns results of X3D-S on an official split of UCF101."""
    return (
        settings(
            dataset="ucf101",
            records=f"data/ucf101_{number}",
            split="test",
            official_split=number,
            official_splits=3,
            classes=101,
            samples=3700 + number,
            weights_sha256=str(number),
            records_sha256=f"of {number}",
            training={"settings_sha256": "5e7", "init": "runs/x3d_s", "records_sha256": f"of {number}"},
            top1=TOP1S[number],
            top5=0.99,
        )
        | changes
    )


def reports(*results: dict[str, Any]) -> list[Report]:
    return [Report(Path(f"runs/{letter}"), content) for letter, content in zip("abcdefg", results)]


def test_a_row_of_means_follows_the_last_of_the_splits() -> None:
    """Values typed in: the mean of 90.12, 88.09 and 89.45 is 89.22."""
    other = settings(dataset="folder", top1=0.5, top5=0.9)
    rows = table(reports(on_split(3), on_split(1), on_split(2), other))
    assert [row["report"] for row in rows] == ["runs/a", "runs/b", "runs/c", "mean", "runs/d"]
    assert [row["official split"] for row in rows] == ["3 of 3", "1 of 3", "2 of 3", "1, 2, 3 of 3", "-"]
    mean = rows[3]
    assert (mean["top-1"], mean["top-5"], mean["top-1 on each split"]) == ("89.2", "99.0", "90.1, 88.1, 89.5")
    shared = ("network", "split", "views", "GMACs a video", "M parameters")
    assert [mean[name] for name in shared] == ["x3d_s", "test", "10-Center", "1.963 x 10", "3.794"]
    assert (mean["records"], mean["videos"]) == ("-", "-")  # they differ


def test_two_runs_on_all_splits_give_two_means() -> None:
    def other(number: int) -> dict[str, Any]:
        return {"training": {"settings_sha256": "a11", "init": "runs/x3d_s", "records_sha256": f"of {number}"}}

    mixed = [on_split(number) | (other(number) if second else {}) for number in (1, 2, 3) for second in (False, True)]
    assert [row["report"] for row in table(reports(*mixed))].count("mean") == 2
    assert [[report.folder.name for report in mean.reports] for mean in split_means(reports(*mixed)).means] == [
        ["a", "c", "e"],
        ["b", "d", "f"],
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "x3d_m"},
        {"options": {"swish": False}},
        {"training": {"settings_sha256": "other recipe", "init": "runs/x3d_s"}},
        {"training": {"settings_sha256": "5e7", "init": None}},
        {"training": None},  # a model file, whose recipe is unknown
        {"views": "1-Center"},
        {"combine": "max"},
        {"clip_starts": "slowfast"},
        {"crop": 182},
        {"dataset": "hmdb51"},
        {"split": "train"},
        {"official_splits": 4},
        {"official_split": None, "official_splits": None},
    ],
)
def test_reports_that_differ_are_not_averaged(changes: dict[str, Any]) -> None:
    found = reports(on_split(1), on_split(2), on_split(3, **changes))
    assert [row["report"] for row in table(found)] == ["runs/a", "runs/b", "runs/c"]
    assert split_means(found).notes[0] == (
        "no mean over the 3 official splits of ucf101 for runs/a: no report of the same recipe and views exists for "
        "split 3"
    )


def test_networks_are_not_averaged_on_videos_that_trained_them() -> None:
    """One run, trained on split 1 and evaluated on all: the other test lists have training videos of split 1."""
    training = {"settings_sha256": "5e7", "init": "runs/x3d_s", "records_sha256": "of 1"}
    found = split_means(reports(*(on_split(number, training=training) for number in (1, 2, 3))))
    assert found.means == ()
    assert found.notes == (
        "no mean over the 3 official splits of ucf101 for runs/a: the networks of runs/b, runs/c were trained on other "
        "records, which may hold the test videos",
    )


def test_reports_of_model_files_are_not_averaged() -> None:
    found = split_means(reports(*(on_split(number, training=None) for number in (1, 2, 3))))
    assert found.means == () and len(found.notes) == 3
    assert found.notes[1] == (
        "no mean over the 3 official splits of ucf101 for runs/b: a report of a model file does not state the recipe"
    )
    alone = split_means(reports(on_split(1, training=None, official_splits=1)))
    assert alone.means == () and len(alone.notes) == 1


def test_a_split_with_two_reports_is_not_averaged() -> None:
    found = reports(on_split(1), on_split(2), on_split(3), on_split(2))
    assert split_means(found).means == ()
    assert split_means(found).notes == (
        "no mean over the 3 official splits of ucf101 for runs/a: split 2 has 2 reports: runs/b, runs/d",
    )


def test_a_damaged_report_is_named_and_the_others_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        folder = tmp_path / f"run{number}" / "evaluation" / "test"
        folder.mkdir(parents=True)
        write_json(folder / RESULTS_NAME, on_split(number))
    damaged = tmp_path / "run2" / "evaluation" / "damaged"
    damaged.mkdir()
    (damaged / RESULTS_NAME).write_text('{"network": 3}')
    rows = compare([str(tmp_path / f"run{number}") for number in (1, 2, 3)], output=str(tmp_path / "out"))
    assert [row["top-1"] for row in rows] == ["90.1", "88.1", "89.5", "89.2"]
    printed = capsys.readouterr()
    assert f"warning: a report is left out: {damaged / RESULTS_NAME} is not a report" in printed.err
    assert "network must be one printable line, got 3" in printed.err and "no mean over" not in printed.err
    with (tmp_path / "out" / "comparison.csv").open() as file:
        assert [row["top-1"] for row in csv.DictReader(file)] == ["90.1", "88.1", "89.5", "89.2"]
    assert read_report(tmp_path / "run1" / "evaluation" / "test").results == on_split(1)
