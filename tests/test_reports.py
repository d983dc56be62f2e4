"""Reports on disk, comparison tables, and comparability with the paper. No TensorFlow."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf import VARIANTS, plots
from x3d_tf.errors import UserError
from x3d_tf.evaluation import reports
from x3d_tf.evaluation.comparison import as_markdown, compare, describe, find_reports, table
from x3d_tf.evaluation.paper import (
    ACCURACIES,
    PRECISIONS,
    PublishedAccuracy,
    PublishedPrecision,
    differences,
    published_for,
)
from x3d_tf.evaluation.reports import Predictions, Report, differing_settings, read_report, write_report

ROOT = Path(__file__).parents[1]
NAMES = ("a", "b", "c", "d", "e", "f", "g")


def settings(**changes: Any) -> dict[str, Any]:
    """Returns the settings of X3D-S on Kinetics-400, evaluated as in the paper."""
    return {
        "network": "x3d_s",
        "records": "data/kinetics400",
        "split": "val",
        "videos": 40,
        "classes": 400,
        "views": "10-Center",
        "gmacs_per_clip": 1.963,
        "gmacs_per_video": 19.63,
        "params": 3_794_000,
        "resize": 182,
        "crop": 160,
        "clip_starts": "offset",
        "options": {"swish": True, "dropout": 0.3},
    } | changes


def predictions(seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 6, 40)  # class g has no samples
    scores = draw.dirichlet(np.ones(7), 40).astype(np.float32)
    return Predictions(tuple(f"v{n}" for n in range(40)), NAMES, scores, np.eye(7, dtype=bool)[labels], "single_label")


def test_the_table_of_classes_counts_like_a_loop(tmp_path: Path) -> None:
    given = predictions()
    report = write_report(tmp_path, settings(), given)
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
    write_report(tmp_path, settings(), Predictions(("x", "y"), ("a", "b"), truth * 0.8 + 0.1, truth, "single_label"))
    assert (tmp_path / "per_class.csv").read_text().splitlines()[1:] == ["a,1,1,1,,", "b,1,1,1,,"]


def test_reports_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, settings(), predictions())

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(plots, "save_confusion", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, settings(views="3-Center"), predictions(1))
    assert not (tmp_path / reports.RESULTS_NAME).exists()  # otherwise it would not match the tables


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", r"the file must contain a JSON object, got \[1\]"),
        ({"network": 3}, "network must be a string, got 3"),
        ({"videos": True}, "videos must be an integer, got True"),
        ({"gmacs_per_video": float("nan")}, "gmacs_per_video must be a number, got nan"),
        ({"top1": 72.9}, r"top1 must be in \[0, 1\], got 72.9"),
        ({"top5": None}, r"top5 must be in \[0, 1\], got None"),
        ({"map": "high"}, r"map must be in \[0, 1\], got 'high'"),
        ({"videos": 10**400}, "videos must be an integer, got 1000"),
        ({"gmacs_per_clip": 10**400}, "gmacs_per_clip must be a number, got 1000"),
        ({"gmacs_per_clip": 1e-300}, "gmacs_per_video must be gmacs_per_clip times 0 to 1,000,000 clips, got "),
        ({"params": "many"}, "params must be a number, got 'many'"),
    ],
)
def test_damaged_results_are_reported(tmp_path: Path, content: Any, message: str) -> None:
    good = settings() | {"top1": 0.5, "top5": 0.9}
    text = content if isinstance(content, str) else json.dumps(good | content)
    folder = tmp_path / "evaluation" / "x"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    with pytest.raises(UserError, match=rf"results\.json is damaged.*{message}|results\.json {message}"):
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


def test_the_published_figures_are_the_papers(shared_data: Path) -> None:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "paper" and row["dataset"] == "K400"]
    for ours in ACCURACIES:
        for metric, value in (("top1", ours.top1), ("top5", ours.top5)):
            printed = {
                float(row["value"])
                for row in rows
                if row["model"].lower().replace("-", "_") == ours.network
                and row["metric"] == metric
                and row["split"] == "val"
                and row["views"] == {"10-LeftCenterRight": "30"}.get(ours.views, ours.views)
            }
            assert printed == ({value} if value is not None else set()), (ours, metric)
    assert {row.network for row in ACCURACIES} == set(VARIANTS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"records": "/data/Kinetics-400_256"}, []),
        ({"records": "data/mine"}, ["other data"]),
        ({"classes": 10, "split": "test"}, ["other data"]),
        ({"split": "test"}, ["other split"]),
        ({"views": "1-Center"}, ["other views"]),
        ({"crop": 182}, ["other crop"]),
        ({"clip_starts": "slowfast"}, ["other clip starts"]),
        ({"options": {"swish": False, "dropout": 0.0}}, ["other network (swish)"]),
    ],
)
def test_differences_from_the_paper_are_listed(changes: dict[str, Any], expected: list[str]) -> None:
    results = settings(**changes)
    published = published_for(results)
    assert isinstance(published, PublishedAccuracy) and published.top1 == 72.9
    assert differences(results, published) == expected


def detection_settings(**changes: Any) -> dict[str, Any]:
    """Returns the settings of a detector evaluated as in the paper."""
    of_a_detector = {
        "network": "x3d_m",
        "head": "full",
        "records": "data/ava_v2.2",
        "eval_boxes": "proposals",
        "lowest_score_of_a_box": 0.8,
        "resize": 256,
        "crop": 256,
        "views": "centre crop of 256²",
        "classes": 60,
        "key_frames_missing": 0,
        "gmacs_per_clip": 6.2,
        "gmacs_per_video": 6.2,
        "map": 0.25,
    }
    return settings(**(of_a_detector | changes))


def test_the_published_precisions_are_the_papers(shared_data: Path) -> None:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "T8" and row["model"].startswith("X3D")]
    printed = {(row["model"], row["dataset"], row["metric"], row["note"]): float(row["value"]) for row in rows}
    expected = {}
    for ours in PRECISIONS:
        name = ours.network.upper().replace("_", "-"), f"AVA v{ours.version}"
        note = f"pretrain {ours.pretrained.replace('Kinetics-', 'K')}"
        expected |= {(*name, "mAP", note): ours.map, (*name, "gflops", note): ours.gmacs}
    assert {key: value for key, value in printed.items() if key[2] != "params"} == expected


@pytest.mark.parametrize(
    ("changes", "map", "expected"),
    [
        ({}, 23.2, []),
        ({"network": "x3d_xl", "records": "ava-2.1_short", "resize": 356, "crop": 356}, 26.1, []),
        ({"network": "x3d_xl", "resize": 356, "crop": 356}, 27.4, []),
        ({"records": "data/ava_v2.1"}, 23.2, ["other data"]),
        ({"records": "data/mine"}, 23.2, ["other data"]),
        ({"classes": 80}, 23.2, ["other data"]),
        ({"split": "test"}, 23.2, ["other split"]),
        ({"key_frames_missing": 12}, 23.2, ["12 key frames missing"]),
        ({"eval_boxes": "annotated"}, 23.2, ["other boxes"]),
        ({"lowest_score_of_a_box": 0.9}, 23.2, ["other boxes"]),
        ({"crop": 224}, 23.2, ["other crop"]),
        ({"head": "simple", "options": {"swish": False}}, 23.2, ["other network (swish, head)"]),
    ],
)
def test_detectors_are_compared_with_table_8(changes: dict[str, Any], map: float, expected: list[str]) -> None:
    results = detection_settings(**changes)
    published = published_for(results)
    assert isinstance(published, PublishedPrecision) and published.map == map
    assert differences(results, published) == expected


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
    results = settings(records="data/mine") | {"top1": top1, "top5": 1.0, "videos": videos}
    lines = describe(Report(tmp_path, results)).splitlines()
    assert lines[1:] == [f"95 % confidence interval of top-1 on so few videos: {interval}"]


def test_the_summary_on_other_data_omits_the_paper(tmp_path: Path) -> None:
    results = settings() | {"top1": 0.7, "top5": 0.9, "videos": 19_877}
    assert "72.9 %" in describe(Report(tmp_path, results))
    assert "paper" not in describe(Report(tmp_path, results | {"records": "data/mine"}))


def test_thirty_views_are_compared_with_table_4() -> None:
    results = settings(network="x3d_m", views="10-LeftCenterRight", resize=256, crop=256)
    published = published_for(results)
    assert isinstance(published, PublishedAccuracy) and (published.top1, published.source) == (76.0, "Table 4")
    assert differences(results, published) == []
    assert published_for(settings(network="x3d(tau=1)")) is None


def test_runs_are_compared_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_report(first / "evaluation" / "val_10center", settings(), predictions())
    write_report(first / "evaluation" / "val_1center", settings(views="1-Center", gmacs_per_video=1.963), predictions())
    write_report(second, settings(network="x3d(b=1|5)", records="data/mine"), predictions(1))
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
    single = Report(Path("a"), settings(classes=4) | {"top1": 0.5, "top5": 1.0})
    several = Report(Path("b"), settings(network="x3d_m") | {"map": 0.25})
    rows = table([single, several])
    assert [(row["top-1"], row["mAP"]) for row in rows] == [("50.0", "-"), ("-", "25.0")]
    assert "top-5" not in rows[0]  # always 100 % with four classes
    assert [row["paper's top-1"] for row in rows] == ["72.9", "-"]  # not comparable with mAP
    assert describe(several).endswith(
        "mAP 25.0 % (40 videos, 400 classes, 10-Center, 1.963 x 10 GMACs per video, 3.794 M parameters)"
    )
    assert rows[0]["paper"].startswith("not comparable: other data")
    assert as_markdown(rows).count("\n") == 4


def test_runs_without_a_report_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report; create one with: python -m x3d_tf\.evaluate --run="):
        find_reports([str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--run, --model, --compare and --detections must be given, got none"),
        ("--run=a --model=b", "--run, --model, --compare and --detections must be given, got --run, --model"),
        ("--model=b --records=c", "--model=b requires --split, --output"),
        ("--run=a --sweep --views=3", "--views must not be given with --sweep"),
        ("--model=a --watch", "--model must not be given with --watch"),
        ("--compare=a --split=b", "--split must not be given with --compare"),
        ("--compare=nowhere", "error: nowhere has no report"),
    ],
)
def test_conflicting_flags(flags: str, message: str) -> None:
    command = [sys.executable, "-m", "x3d_tf.evaluate", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_axes_of_a_sweep_have_plain_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []

    def look(figure: Figure, path: Path, **_: object) -> None:
        figure.canvas.draw()
        path.touch()
        drawn.extend([label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes)
        assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
        assert all(axes.lines[0].get_ydata().tolist() == [50, 60, 65] for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", look)
    points = [(1.963, 0.5), (5.888, 0.6), (19.63, 0.65)]
    plots.save_sweep(points, (1, 3, 10), tmp_path / "sweep.png", "title", "top-1")
    assert drawn[1] == ["1.96", "5.89", "19.6"]
    assert not any("$" in label for label in drawn[0])


def test_class_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    plots.save_confusion(np.eye(2, dtype=int), ("a$^$", "b_{$"), tmp_path / "confusion.png", "$title^")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
