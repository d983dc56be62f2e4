"""Tables of several reports, and the summary of one. No TensorFlow."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from report_settings import detection_settings, precision_of, predictions, settings, write

from x3d_tf.errors import UserError
from x3d_tf.evaluation.comparison import as_markdown, compare, describe, find_reports, table
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.paper import published_for
from x3d_tf.evaluation.reports import metrics_to_json, read_report


def test_the_summary_of_a_detector_states_table_8(tmp_path: Path) -> None:
    line = describe(Report(tmp_path, detection_settings(crop=224)))
    assert "mAP 25.0 %" in line
    row = line.splitlines()[-1]
    assert row.startswith("paper, Table 8, AVA v2.2, 6.2 GMACs per clip, pre-trained on Kinetics-600  23.2 ")
    assert row.endswith("not comparable: other crop")
    assert published_for(detection_settings(network="x3d_s")) == ()
    row = table([Report(tmp_path, detection_settings()), Report(tmp_path, settings() | {"top1": 0.7, "top5": 0.9})])
    assert [(cells["paper's mAP"], cells["paper's top-1"]) for cells in row] == [("23.2", "-"), ("-", "72.9")]


@pytest.mark.parametrize(
    ("videos", "top1", "interval"), [(2, 0.5, "9 % to 91 %"), (60, 0.9, "80 % to 95 %"), (1, 1.0, "21 % to 100 %")]
)
def test_the_summary_of_few_videos_states_the_interval(tmp_path: Path, videos: int, top1: float, interval: str) -> None:
    results = settings(dataset="folder") | {"top1": top1, "top5": 1.0, "samples": videos}
    lines = describe(Report(tmp_path, results)).splitlines()
    assert lines[1:] == [f"95 % confidence interval of top-1 on so few videos: {interval}"]


def test_the_summary_on_other_data_omits_the_paper(tmp_path: Path) -> None:
    results = settings() | {"top1": 0.7, "top5": 0.9, "samples": 19_877}
    assert " 72.9 " in describe(Report(tmp_path, results))
    assert "paper" not in describe(Report(tmp_path, results | {"dataset": "folder"}))


def summary_table(**changes: Any) -> list[list[str]]:
    """Returns the columns of the table in the summary of X3D-M with 30 views, without the first line of the summary."""
    protocol = {"views": "10-LeftCenterRight", "resize": 256, "crop": 256, "head_pool": "fixed_probabilities"}
    costs = {"gmacs_per_clip": 6.1806, "gmacs_per_sample": 185.418, "params_paper": 3_761_200}
    counts = {"samples": 19_877, "videos_expected": 19_877, "videos_present": 19_877}
    results = settings(network="x3d_m", **protocol, **costs, **counts) | {"top1": 0.7613, "top5": 0.9238} | changes
    lines = describe(Report(Path("a"), results)).splitlines()[1:]
    return [re.split(" {2,}", line) for line in lines]


def test_the_summary_has_the_columns_of_the_paper() -> None:
    """Figures typed in from Table 4 and from the pages of PySlowFast and pytorchvideo."""
    assert summary_table() == [
        ["result", "top-1", "top-5", "GMACs x views", "M parameters as in the paper", "comparison"],
        ["measured", "76.1", "92.4", "6.181 x 30", "3.761", "-"],
        ["paper, Table 4, 10-LeftCenterRight", "76.0", "92.3", "6.2 x 30", "3.8", "comparable"],
        [
            *("PySlowFast, MODEL_ZOO.md, 10-LeftCenterRight", "76.2", "-", "-", "-"),
            "not comparable: other clip starts",
        ],
        [
            *("pytorchvideo, hub/x3d.py, 10-LeftCenterRight", "75.94", "-", "-", "-"),
            "not comparable: unknown clip starts",
        ],
    ]


def test_on_test_videos_the_summary_states_the_mean() -> None:
    """(76.13 + 92.38) / 2 is 84.255; the paper's Table 4 prints 82.9."""
    header, measured, paper, *_ = summary_table(split="test")
    assert header[:4] == ["result", "top-1", "top-5", "mean of top-1 and top-5"]
    assert measured[1:5] == ["76.1", "92.4", "84.3", "6.181 x 30"]
    assert paper[1:] == ["-", "-", "82.9", "6.2 x 30", "3.8", "comparable"]
    results = settings(split="test") | {"top1": 0.7, "top5": 0.9}
    (row,) = table([Report(Path("a"), results)])
    assert row["mean of top-1 and top-5"] == "80.0"


def test_kinetics_600_has_the_columns_of_the_paper_for_any_network() -> None:
    paper = summary_table(dataset="kinetics600", classes=600)[2]
    assert paper == ["paper, Table 5, 10-LeftCenterRight", "78.8", "94.5", "6.2 x 30", "3.8", "comparable"]
    without = summary_table(dataset="kinetics600", classes=600, network="x3d_s")
    assert [row[0] for row in without] == ["result", "measured"]


def test_charades_is_shown_beside_both_figures_of_table_6() -> None:
    network = "x3d(tau=12.5,t=16,s=2.786,w=1.45,b=2.25,d=5)"
    of_charades = {"dataset": "charades", "classes": 157, "task": "multi_label", "split": "test", "combine": "max"}
    of_charades |= {"frame_sampling": "exact", "resize": 356, "crop": 356, **precision_of(0.43)}
    *_, first, second = summary_table(network=network, **of_charades)
    assert (first[0], first[1:]) == (
        "paper, Table 6, 10-LeftCenterRight, pre-trained on Kinetics-400",
        ["43.4", "48.4 x 30", "11.0", "comparable"],
    )
    assert (second[0][-12:], second[1]) == ("Kinetics-600", "47.1")
    pooled = {"views": "10-LeftCenterRight", "head_pool": "fixed_probabilities"}
    (row,) = table([Report(Path("a"), settings(network=network, **pooled, **of_charades))])
    assert row["paper's mAP"] == "43.4, 47.1"
    source = "Table 6, 10-LeftCenterRight, pre-trained on Kinetics-400 or Kinetics-600"
    assert row["paper"] == f"comparable ({source})"


def test_the_table_states_the_recipe() -> None:
    """Names of files may be anything."""
    recipe = {"gin_files": ["gin/x3d_m.gin", "./a\x1b\n.gin"], "changed_settings": ["Recipe.batch", "Recipe.steps"]}
    training = {"settings_sha256": "1", "init": None}
    results = settings() | {"top1": 0.7, "top5": 0.9}
    found = [{"training": training | recipe}, {"training": training | recipe | {"changed_settings": []}}]
    rows = table([Report(Path("a"), results | extra) for extra in (*found, {"training": training}, {})])
    assert [row["recipe"] for row in rows] == [
        "gin/x3d_m.gin, ./a\\x1b\\n.gin; changed: Recipe.batch, Recipe.steps",
        "gin/x3d_m.gin, ./a\\x1b\\n.gin",
        *("-", "-"),
    ]


def test_reproductions_have_columns_of_their_own() -> None:
    ours = Report(Path("a"), settings(clip_starts="slowfast") | {"top1": 0.73, "top5": 0.9})
    other = Report(Path("b"), settings(dataset="folder") | {"top1": 0.73, "top5": 0.9})
    first, second = table([ours, other])
    assert (first["PySlowFast's top-1"], first["PySlowFast"]) == ("73.1", "comparable (MODEL_ZOO.md, 10-Center)")
    assert first["paper"] == "not comparable: other clip starts (Table 2, 10-Center)"
    assert (second["PySlowFast's top-1"], second["PySlowFast"]) == ("-", "-")
    assert (second["paper's top-1"], second["paper's top-5"]) == ("72.9", "90.5")


def test_runs_are_compared_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first / "evaluation" / "val_10center", settings(), predictions())
    write(first / "evaluation" / "val_1center", settings(views="1-Center", gmacs_per_sample=1.963), predictions())
    write(second, settings(network="x3d(b=1|5)", records="data/mine"), predictions(1))
    rows = compare([str(first), str(second)], output=str(tmp_path / "tables"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and len({line.index("x3d") for line in printed[1:]}) == 1
    assert [row["paper's top-1"] for row in rows] == ["72.9", "72.9", "-"]
    assert rows[0]["paper"] == "comparable (Table 2, 10-Center)"
    assert rows[1]["paper"] == "not comparable: other views (Table 2, 10-Center)"
    assert [row["GMACs a video"] for row in rows] == ["1.963 x 10", "1.963 x 1", "1.963 x 10"]
    assert rows[0]["M parameters"] == "3.794"
    assert "mAP" not in rows[0]  # no report has one
    top1 = read_report(second).results["top1"]
    assert rows[2]["top-1"] == f"{100 * top1:.1f}"
    with (tmp_path / "tables" / "comparison.csv").open() as file:
        assert list(csv.DictReader(file)) == [{k: "" if v == "-" else v for k, v in row.items()} for row in rows]
    lines = (tmp_path / "tables" / "comparison.md").read_text().splitlines()
    assert len(lines) == 5 and "x3d(b=1\\|5)" in lines[4]
    with pytest.raises(UserError, match=r"already has a report \(comparison\.csv exists\)"):
        compare([str(first)], output=str(tmp_path / "tables"))
    compare([str(first)], output=str(tmp_path / "tables"), overwrite=True)


def test_map_and_accuracy_share_a_table() -> None:
    single = Report(Path("a"), settings(classes=4, metrics=metrics_to_json((TOP1,))) | {"top1": 0.5, "top5": 1.0})
    several = Report(Path("b"), settings(network="x3d_m") | precision_of(0.25))
    rows = table([single, several])
    assert [(row["top-1"], row["mAP"]) for row in rows] == [("50.0", "-"), ("-", "25.0")]
    assert "top-5" not in rows[0]  # no report states it
    assert [row["paper's top-1"] for row in rows] == ["72.9", "-"]  # not comparable with mAP
    assert describe(several).endswith(
        "mAP 25.0 % (40 videos, 400 classes, 10-Center, 1.963 x 10 GMACs per video, 3.794 M parameters)"
    )
    assert rows[0]["paper"].startswith("not comparable: other data")
    assert as_markdown(rows).count("\n") == 4


def test_reports_of_key_frames_count_key_frames() -> None:
    detector = Report(Path("a"), detection_settings())
    (row,) = table([detector])
    assert (row["key frames"], row["GMACs a key frame"]) == ("40", "6.2 x 1") and "videos" not in row
    assert "(40 key frames, 60 classes, centre crop of 256², 6.2 x 1 GMACs per key frame, " in describe(detector)
    both = table([detector, Report(Path("b"), settings() | {"top1": 0.5, "top5": 0.5})])
    assert [(row["videos"], row["key frames"]) for row in both] == [("-", "40"), ("40", "-")]


def test_names_of_folders_stay_on_one_line() -> None:
    """A folder may have any name; a line break would end the row of the Markdown table."""
    results = settings(dataset="folder", records="data/a\nb") | {"top1": 0.5, "top5": 0.5, "samples": 10**6}
    report = Report(Path("runs/c\u2028d"), results)
    assert "data/a\\nb, split val: " in describe(report) and len(describe(report).splitlines()) == 1
    (row,) = table([report])
    assert (row["report"], row["records"]) == ("runs/c\\u2028d", "data/a\\nb")
    assert len(as_markdown([row]).splitlines()) == 3


def test_runs_without_a_report_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report; create one with: python -m x3d_tf\.evaluate --run="):
        find_reports([str(tmp_path)])
