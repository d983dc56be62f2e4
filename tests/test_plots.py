"""Figures: nothing is cut off, margins are narrow, and axes and captions are correct."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from x3d_tf import plots
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.types import Metric

NAMES = ("hug", "pushing something from left to right, " * 6, "走路 跑步", "дом", "a$^{$b", "\x1b[2J")
TITLE = "x3d(tau=7,t=17,s=0.5714,w=1,b=1,d=1), test, 10 clips x 1 crop of 64 pixels: top-1 83.3%"
Picture = Callable[[Path], None]


def names(count: int) -> list[str]:
    return [NAMES[number] if number < len(NAMES) else f"class {number}" for number in range(count)]


def confusion(classes: int) -> Picture:
    counts = np.random.default_rng(0).integers(0, 30, (classes, classes))
    return lambda path: plots.save_confusion(counts, names(classes), path, TITLE)


def precisions(classes: int) -> Picture:
    values = np.linspace(0, 1, classes)
    return lambda path: plots.save_precisions(values, np.full(classes, 7), names(classes), path, TITLE)


def sweep(count: int) -> Picture:
    points = [(1.963 * k, 1 - 0.1 / k) for k in range(1, count + 1)]
    return lambda path: plots.save_sweep(points, range(1, count + 1), path, TITLE * 2, TOP1, "video")


def staircase(steps: int) -> Picture:
    winners = [(0.04 * 2**step, 1 - 0.5 / (step + 1)) for step in range(steps)]
    points = [(f"X-{name}", cost, score - 0.1 * name, 0.01) for cost, score in winners for name in range(7)]
    return lambda path: plots.save_staircase(points, winners, path, TITLE * 2, "top-1")


def history(count: int, every: int = 0) -> list[dict[str, float]]:
    rows = [
        {"step": 10.0 * number, "loss": 1.0983 + 1e-5 * (number % 3), "top1": 1.0, "learning_rate": 1e-5}
        for number in range(1, count + 1)
    ]
    for row in rows[every - 1 :: every] if every else ():
        row |= {"validation_loss": 0.5, "validation_map": row["step"] / 10 / count}
    return rows


def curves(count: int, every: int = 0) -> Picture:
    metrics = {"training": [Metric("top1", "share")], "validation": [Metric("map", "share"), Metric("loss", "loss")]}
    return lambda path: plots.save_curves(history(count, every), path, TITLE, **metrics)


OTHERS = {  # metrics of a task of your own, without shares
    "training": [Metric("mae", "number"), Metric("auxiliary", "loss"), Metric("clips_left_out", "count")],
    "validation": [Metric("mae", "number"), Metric("errors", "count"), Metric("log_likelihood", "loss")],
}


def other_curves(count: int) -> Picture:
    rows = history(count, 1)
    for row in rows:
        row |= {"mae": 1000 + 1 / row["step"], "auxiliary": 2.0, "clips_left_out": 3.0}
        row |= {"validation_mae": -5.0, "validation_errors": 40.0, "validation_log_likelihood": -0.25}
    return lambda path: plots.save_curves(rows, path, TITLE, **OTHERS)


def many_shares(path: Path) -> None:
    shares = [Metric(f"share_of_the_clips_with_rank_{number}", "share") for number in range(8)]
    rows = [row | {metric.name: 0.1 * n for n, metric in enumerate(shares)} for row in history(4)]
    plots.save_curves(rows, path, TITLE, training=shares, validation=[])


def sheet(rows: int, columns: int, lines: int = 3) -> Picture:
    clips = [np.full((columns, 32, 32, 3), 90)] * rows
    labels = ["\n".join(names(lines))] * rows
    return lambda path: plots.save_clips(clips, labels, path, TITLE, [[0.04 * k for k in range(columns)]] * rows)


PICTURES = {
    **{f"confusion matrix of {count} classes": confusion(count) for count in (2, 6, 60, 61)},
    **{f"precisions of {count} classes": precisions(count) for count in (0, 2, 80)},
    **{f"sweep of {count} points": sweep(count) for count in (1, 5)},
    **{f"staircase of {count} steps": staircase(count) for count in (1, 13)},
    **{f"curves of {count} rows": curves(count) for count in (0, 1, 2000)},
    **{f"curves of {count} rows with validation": curves(count, 8) for count in (16, 2000)},
    "curves of other metrics": other_curves(4),
    "curves of other metrics without rows": other_curves(0),
    "curves of many shares": many_shares,
    **{f"sheet of {rows} x {columns}": sheet(rows, columns) for rows, columns in ((1, 1), (3, 6), (2, 40))},
    "sheet with long labels": sheet(2, 2, 30),
}


@pytest.mark.parametrize("name", PICTURES)
def test_figures_are_cropped_to_their_content(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut-off text would touch the edge; instead, a margin of 11 white pixels surrounds the content."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")  # including warnings about missing glyphs
        PICTURES[name](tmp_path / "a.png")
    assert caplog.text == ""
    ink = (np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 250).astype(int)
    for axis in (0, 1):
        positions = np.flatnonzero(ink.any(axis=axis))
        margins = (positions[0], ink.shape[1 - axis] - 1 - positions[-1])
        assert min(margins) >= 8 and max(margins) <= 25, margins


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list that collects the figures saved during the test."""
    from matplotlib.figure import Figure

    saved: list[Any] = []

    def keep(figure: Any, path: Path, **_: object) -> None:
        figure.canvas.draw()
        path.touch()
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_curves_show_validation_on_plain_axes(figures: list[Any], tmp_path: Path) -> None:
    curves(20, 5)(tmp_path / "a.png")
    loss, shares, rate = figures[0].axes
    assert shares.get_title() == "top1, map in %"
    assert shares.get_ylim() == (0, 100) and loss.get_ylim()[0] == 0 and rate.get_ylim()[0] == 0
    both = (("loss", "loss"), ("top1", "map"))
    expected = ((loss, 1.0983, [0.5] * 4), (shares, 100, [25, 50, 75, 100]))
    for (axes, trained, validated), names in zip(expected, both):
        training, validation = axes.lines
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            f"training {names[0]}",
            f"validation {names[1]}",
        ]
        np.testing.assert_allclose(training.get_ydata(), trained, rtol=1e-4)
        assert list(validation.get_xdata()) == [50, 100, 150, 200]
        np.testing.assert_allclose(validation.get_ydata(), validated)
    assert len(rate.lines) == 1 and rate.get_legend() is None
    for axes in (loss, shares, rate):
        assert axes.get_xlim() == (0, 200)
        assert axes.yaxis.get_offset_text().get_text() == axes.xaxis.get_offset_text().get_text() == ""


def test_metrics_that_are_no_shares_have_panels_of_their_own(figures: list[Any], tmp_path: Path) -> None:
    other_curves(4)(tmp_path / "a.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == ["loss", "mae", "errors", "learning rate"]
    drawn = {name: [line.get_label() for line in axes.lines] for name, axes in panels.items()}
    assert drawn["loss"] == ["training loss", "training auxiliary", "validation log_likelihood"]
    assert drawn["mae"] == ["training mae", "validation mae"] and drawn["errors"] == ["validation errors"]
    assert len({line.get_color() for line in panels["loss"].lines}) == 3
    assert [text.get_text() for text in panels["errors"].get_legend().get_texts()] == ["validation errors"]
    for axes in panels.values():  # all values are visible
        low, high = axes.get_ylim()
        assert all(low <= value <= high for line in axes.lines for value in line.get_ydata())
    assert panels["errors"].get_ylim()[0] > 0  # numbers need not start at 0


def test_many_metrics_are_told_apart(figures: list[Any], tmp_path: Path) -> None:
    many_shares(tmp_path / "a.png")
    lines = figures[0].axes[1].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 8


def test_curves_without_rows_start_at_zero(figures: list[Any], tmp_path: Path) -> None:
    curves(0)(tmp_path / "a.png")
    assert [axes.get_ylim()[0] for axes in figures[0].axes] == [0, 0, 0]


def test_long_curves_have_a_mean(figures: list[Any], tmp_path: Path) -> None:
    curves(1000)(tmp_path / "a.png")
    noisy, mean = figures[0].axes[0].lines
    assert len(noisy.get_xdata()) == 1000 and len(mean.get_xdata()) == 100
    assert mean.get_xdata()[0] == pytest.approx(55) and mean.get_label() == "training loss, mean of 10 rows"


def test_times_are_below_the_frames_and_labels_beside_them(figures: list[Any], tmp_path: Path) -> None:
    clips = [np.zeros((3, 32, 32, 3)), np.zeros((2, 32, 32, 3))]
    plots.save_clips(clips, ["hug\na.mp4", "kick"], tmp_path / "a.png", "title", [[0, 2.5, 61], [0.01, 0.05]])
    texts = {text.get_text(): text.get_window_extent() for text in figures[0].axes[0].texts}
    assert set(texts) == {"hug\na.mp4", "kick", "title", "0.00 s", "2.50 s", "61.00 s", "0.01 s", "0.05 s"}
    assert texts["0.00 s"].x1 < texts["2.50 s"].x0 and texts["0.01 s"].y1 < texts["0.00 s"].y0
    assert texts["hug\na.mp4"].x1 < texts["0.00 s"].x0 and texts["kick"].y1 < texts["hug\na.mp4"].y0
    assert texts["title"].y0 > texts["hug\na.mp4"].y1


@pytest.mark.parametrize(
    ("times", "decimals"),
    [([], 1), ([[0, 0.1, 0.2]], 1), ([[0, 0.5], [3, 3, 3]], 1), ([[0, 0.5], [3, 3.09]], 2), ([[0.5], [0.53]], 1)],
)
def test_a_sheet_has_one_number_of_decimals(times: list[list[float]], decimals: int) -> None:
    assert plots.decimals(times) == decimals


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([100, 100], (90, 100)),
        ([0], (0, 10)),
        ([50, 60], (49, 61)),
        ([0, 100], (0, 100)),
        ([97.5, 98], (90, 100)),
        ([2.0, 40], (0, 45.6)),
    ],
)
def test_axes_in_percent_stay_within_0_to_100(values: list[float], limits: tuple[float, float]) -> None:
    low, high = plots._percent_limits(values)
    assert (low, high) == pytest.approx(limits)
    assert low <= min(values) and max(values) <= high


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [("hug", 3, "hug"), ("hugs", 3, "h…s"), ("left to right", 9, "left…ight"), ("a\x1bb\udcff", 20, "a\\x1bb\\udcff")],
)
def test_long_names_are_shortened_in_the_middle(name: str, length: int, expected: str) -> None:
    assert plots.shortened(name, length) == expected


@pytest.mark.parametrize(
    ("metric", "values", "label"),
    [(TOP1, [50, 60, 65], "top-1 in %"), (Metric("mae", "number", label="error"), [0.5, 0.6, 0.65], "error")],
)
def test_the_axes_of_a_sweep_have_plain_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, values: list[float], label: str
) -> None:
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []

    def look(figure: Figure, path: Path, **_: object) -> None:
        figure.canvas.draw()
        path.touch()
        drawn.extend([label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes)
        assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
        assert all(axes.lines[0].get_ydata().tolist() == values for axes in figure.axes)
        assert all((axes.get_ylabel(), axes.get_xlabel()[:15]) == (label, "GMACs per video") for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", look)
    points = [(1.963, 0.5), (5.888, 0.6), (19.63, 0.65)]
    plots.save_sweep(points, (1, 3, 10), tmp_path / "sweep.png", "title", metric, "video")
    assert drawn[1] == ["1.96", "5.89", "19.6"]
    assert not any("$" in label for label in drawn[0])


def test_class_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    plots.save_confusion(np.eye(2, dtype=int), ("a$^$", "b_{$"), tmp_path / "confusion.png", "$title^")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
