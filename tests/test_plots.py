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
from x3d_tf.evaluation.paper_points import FIGURE_2_POINTS, FIGURE_3_POINTS
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
    curve = plots.CostCurve("x3d_s", [(1.963 * k, 1 - 0.1 / k, k) for k in range(1, count + 1)])
    panels = plots.CostPanels("", TOP1, "video", [curve])
    return lambda path: plots.save_inference_cost([panels], path, TITLE * 2)


def sweeps(networks: int, rows: int) -> Picture:
    curves = [
        plots.CostCurve(f"{name} {n}", [(0.001 * 4**n * k, 0.2 + 0.02 * n - 0.1 / k, k) for k in (1, 3, 10)])
        for n, name in zip(range(networks), names(networks))
    ]
    panels = plots.CostPanels(TITLE * 2, TOP1, "video", curves, FIGURE_3_POINTS)
    return lambda path: plots.save_inference_cost([panels] * rows, path, TITLE)


def staircase(steps: int, *paper: plots.PaperPoint) -> Picture:
    winners = [(0.04 * 2**step, 1 - 0.5 / (step + 1)) for step in range(steps)]
    points = {f"X-{name}": [(cost, score - 0.1 * name, 0.01) for cost, score in winners] for name in range(7)}
    points["no network"] = []
    contractions = [(winners[-1], (0.03 * 2 ** (steps - 1), 0.4))]
    return lambda path: plots.save_staircase(points, winners, contractions, path, TITLE * 2, "top-1", paper)


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
    **{f"sweeps of {networks} networks, {rows} rows": sweeps(networks, rows) for networks, rows in ((3, 1), (6, 2))},
    **{f"staircase of {count} steps": staircase(count) for count in (1, 13)},
    "staircase with the paper's path": staircase(5, *FIGURE_2_POINTS),
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


def at(line: Any) -> tuple[float, float]:
    """Returns the place of a line of one point."""
    return (line.get_xdata().item(), line.get_ydata().item())


@pytest.mark.parametrize(
    ("metric", "values", "label"),
    [(TOP1, [50, 60, 65], "top-1 in %"), (Metric("mae", "number", label="error"), [0.5, 0.6, 0.65], "error")],
)
def test_the_axes_of_a_sweep_have_plain_numbers(
    figures: list[Any], tmp_path: Path, metric: Metric, values: list[float], label: str
) -> None:
    curve = plots.CostCurve("x3d_s", [(1.963, 0.5, 1), (5.888, 0.6, 3), (19.63, 0.65, 10)])
    plots.save_inference_cost([plots.CostPanels("", metric, "video", [curve])], tmp_path / "a.png", "title")
    panels = figures[0].axes
    assert [axes.get_xscale() for axes in panels] == ["linear", "log"]
    for axes in panels:
        line, *points = axes.lines
        assert line.get_xdata().tolist() == [1.963, 5.888, 19.63] and line.get_ydata().tolist() == values
        assert [at(point) for point in points] == list(zip([1.963, 5.888, 19.63], values))
        assert (axes.get_ylabel(), axes.get_xlabel()[:15]) == (label, "GMACs per video")
    ticks = [[text.get_text() for text in axes.get_xticklabels()] for axes in panels]
    assert ticks[1] == ["1.5", "2", "3", "4", "5", "6", "8", "10", "15", "20"]
    assert not any("$" in text for text in ticks[0])


def test_networks_have_colours_and_numbers_of_clips_have_markers(figures: list[Any], tmp_path: Path) -> None:
    first = plots.CostCurve("a", [(1, 0.5, 1), (3, 0.6, 3)])
    second = plots.CostCurve("b", [(6, 0.7, 3), (20, 0.8, 10)])
    rows = [plots.CostPanels(name, TOP1, "video", curves) for name, curves in (("x", [first, second]), ("y", [second]))]
    plots.save_inference_cost(rows, tmp_path / "a.png", "title")
    networks, views = (
        {text.get_text(): handle for text, handle in zip(legend.texts, legend.legend_handles)}
        for legend in figures[0].legends
    )
    assert list(networks) == ["a", "b"] and list(views) == ["K=1", "K=3", "K=10"]
    assert networks["a"].get_color() != networks["b"].get_color()
    assert len({handle.get_marker() for handle in views.values()}) == 3
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["x", "", "y", ""]
    for axes, expected in zip(figures[0].axes, (2 * [first, second], 2 * [first, second], [second], [second])):
        points = {at(line): line for line in axes.lines if len(line.get_xdata()) == 1}
        for curve in expected:
            for cost, value, count in curve.points:
                point = points[cost, 100 * value]
                assert point.get_marker() == views[f"K={count}"].get_marker()
                assert point.get_color() == networks[curve.name].get_color()
        assert len(points) == (4 if first in expected else 2)


def test_the_papers_points_are_grey_and_labelled(figures: list[Any], tmp_path: Path) -> None:
    curve = plots.CostCurve("ours", [(0.5, 0.2, 1), (5, 0.3, 10)])
    paper = [plots.PaperPoint("", 5.9, 71.4, 3), plots.PaperPoint("S", 19.6, 72.9, 10, joined=True)]
    paper.append(plots.PaperPoint("CSN", 119, 70.8, 10))
    plots.save_inference_cost([plots.CostPanels("", TOP1, "video", [curve], paper)], tmp_path / "a.png", "title")
    staircase(5, *paper)(tmp_path / "b.png")
    linear, log = figures[0].axes
    for axes in (linear, log, figures[1].axes[0]):
        grey = [line for line in axes.lines if line.get_color() == "0.55" and len(line.get_xdata())]
        assert [[*line.get_xdata()] for line in grey if len(line.get_xdata()) == 2] == [[5.9, 19.6]]
        assert [at(line) for line in grey if len(line.get_xdata()) == 1] == [(5.9, 71.4), (19.6, 72.9), (119, 70.8)]
        assert {text.get_text() for text in axes.texts} == {"", "S", "CSN"}
        assert axes.get_ylim()[0] < 20 and axes.get_ylim()[1] > 72.9
    assert log.get_xlim()[1] > 119 and linear.get_xlim() == pytest.approx((0, 5.3))  # ours alone
    for figure in figures:
        labels = [" ".join(text.get_text().split()) for text in figure.legends[0].texts]
        assert labels.count("paper: Kinetics-400, not measured here") == 1


def test_without_the_papers_points_no_legend_names_it(figures: list[Any], tmp_path: Path) -> None:
    sweep(5)(tmp_path / "a.png")
    staircase(5)(tmp_path / "b.png")
    assert not [text for figure in figures for text in figure.legends[0].texts if "paper" in text.get_text()]


def test_a_staircase_has_its_path_and_its_contraction(figures: list[Any], tmp_path: Path) -> None:
    winners = [(0.04, 0.5), (0.08, 0.6), (0.16, 0.7)]
    points = {"X-Fast": [(*place, 0.01) for place in winners], "X-Depth": [], "contraction": [(0.12, 0.65, 0.02)]}
    contractions = [((0.16, 0.7), (0.12, 0.65))]
    plots.save_staircase(points, winners, contractions, tmp_path / "a.png", "title", "top-1")
    axes = figures[0].axes[0]
    path, dotted, chosen, *_ = axes.lines
    assert path.get_drawstyle() == "steps-post" and [*map(float, path.get_ydata())] == [50, 60, 70]
    assert list(dotted.get_xdata()) == [0.16, 0.12] and dotted.get_linestyle() == ":"
    assert list(chosen.get_xdata()) == [0.04, 0.08, 0.16, 0.12] and chosen.get_markerfacecolor() == "none"
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.texts] == ["path", "chosen", "X-Fast", "contraction"]
    figures[0].draw_without_rendering()
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1  # hides no point
    fast, contraction = axes.containers
    assert [tuple(map(float, segment[:, 1])) for segment in contraction[2][0].get_segments()] == [(63, 67)]
    assert len(fast[2][0].get_segments()) == 3
    assert [line[0].get_color() for line in axes.containers] == ["C0", "C2"]  # X-Depth keeps its colour


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.03, 0.06, [0.03, 0.04, 0.05, 0.06]),
        (0.03, 1.1, [0.05, 0.1, 0.2, 0.5, 1]),
        (7, 10.6, [8, 10]),
        (1e-6, 1.1, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_logarithmic_axes_have_a_few_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert plots.log_ticks(low, high) == pytest.approx(expected)


def test_class_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    plots.save_confusion(np.eye(2, dtype=int), ("a$^$", "b_{$"), tmp_path / "confusion.png", "$title^")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
