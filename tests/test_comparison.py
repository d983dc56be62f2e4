"""Tables of several reports, and the summary of one. No TensorFlow."""

import csv
from pathlib import Path

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
    source = "(Table 8, AVA v2.2, pre-trained on Kinetics-600, 6.2 GMACs per clip)"
    assert line.endswith(f"mAP in the paper on AVA: 23.2 %, not comparable: other crop {source}")
    assert published_for(detection_settings(network="x3d_s")) is None
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
    assert "72.9 %" in describe(Report(tmp_path, results))
    assert "paper" not in describe(Report(tmp_path, results | {"dataset": "folder"}))


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
