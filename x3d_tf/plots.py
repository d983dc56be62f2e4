"""Figures of training runs and evaluations, saved as PNG files.

Axes are sized for their content, and the saved image is cropped to everything that is drawn. Long names and titles
therefore neither shrink the content nor are cut off.
"""

import itertools
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.terminal import one_line
from x3d_tf.types import Metric

_DPI = 110  # pixels per inch
_PAPER_LABEL = "paper: Kinetics-400,\nnot measured here"
_PAPER_LINE: dict[str, Any] = {"color": "0.55", "ls": "--", "lw": 1}
_MARKERS = "osD^vPX<>"  # of axes of the expansion, or numbers of views
_NAME_LENGTH = 32  # characters of a class name at an axis
# Fallbacks for glyphs that matplotlib's default font lacks; only installed fonts are used.
_FALLBACK_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Hiragino Sans"),
    *("PingFang SC", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Noto Sans Bengali", "Noto Sans Tamil", "Nirmala UI", "Arial Unicode MS"),
)


class PaperPoint(NamedTuple):
    """A point that the paper prints, drawn beside what was measured here.

    Attributes:
        name: its label; may be empty.
        gmacs: cost in units of 1e9 multiply-adds: that of the horizontal axis.
        percent: value of the metric in percent.
        views: number of clips per video.
        joined: whether a line joins it to the point before it.
    """

    name: str
    gmacs: float
    percent: float
    views: int
    joined: bool = False


@contextmanager
def _figure(path: Path, width: float, height: float, **kwargs: Any) -> Iterator[Any]:
    """Yields a figure of `width` x `height` inches and saves it, cropped to its content, at the end of the block."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure  # pyplot would need a window system and global state

    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "text.parse_math": False,  # class names may contain dollar signs
        "font.family": ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)],
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a glyph that no font has is drawn as a box
        figure = Figure(figsize=(width, height), dpi=_DPI, **kwargs)
        yield figure
        with os_errors_as_write_error(path), atomic_path(path) as partial:
            figure.savefig(partial, dpi=_DPI, format="png", bbox_inches="tight", pad_inches=0.1)


def save_curves(
    rows: Sequence[dict[str, float]],
    path: Path,
    title: str,
    *,
    training: Sequence[Metric],
    validation: Sequence[Metric],
) -> None:
    """Saves the losses, the other metrics, and the learning rate over the steps as a PNG file.

    Shares have one panel together, and each other number has a panel of its own. Counts of training steps are not
    drawn: the summary of a run states their sums.

    Args:
        rows: rows with step, loss, learning_rate and the metrics of training; some also with those of validation, whose
            columns begin with `validation_`.
        path: file to write; an existing file is replaced.
        title: title of the figure.
        training: the metrics of a training step besides the loss.
        validation: the metrics of a validation.
    """
    losses, shares = ([_names(part, kind) for part in (training, validation)] for kind in ("loss", "share"))
    numbers = [_names(training, "number"), _names(validation, "number", "count")]
    percentages, others = ([*dict.fromkeys(part[0] + part[1])] for part in (shares, numbers))
    panels = 2 + bool(percentages) + len(others)
    height = math.ceil(panels / 3)
    with _figure(path, 11, 3.2 * height, layout="constrained") as figure:
        figure.suptitle(_wrap_title(title, 11))
        axes = (figure.add_subplot(height, 3, number) for number in range(1, panels + 1))
        _draw_metrics(next(axes), "loss", rows, ["loss", *losses[0]], losses[1])
        if percentages:
            heading = f"{', '.join(percentages) if len(percentages) <= 2 else 'metrics'} in %"
            _draw_metrics(panel := next(axes), heading, rows, shares[0], shares[1], scale=100)
            panel.set_ylim(0, 100)
        for name in others:
            trained, validated = ([name] if name in part else [] for part in numbers)
            _draw_metrics(next(axes), name, rows, trained, validated, from_zero=False)
        _draw_metrics(next(axes), "learning rate", rows, ["learning_rate"], [], smooth=False)


def _names(metrics: Sequence[Metric], *kinds: str) -> list[str]:
    return [metric.name for metric in metrics if metric.kind in kinds]


def _draw_metrics(
    axes: Any,
    title: str,
    rows: Sequence[dict[str, float]],
    training: Sequence[str],
    validation: Sequence[str],
    *,
    scale: float = 1,
    smooth: bool = True,
    from_zero: bool = True,
) -> None:
    """Draws columns of the history, and validation metrics, over the steps.

    Args:
        axes: the panel.
        title: its title.
        rows: see `save_curves`.
        training: names of columns.
        validation: names of metrics of a validation.
        scale: factor of all values.
        smooth: whether many values are drawn with their mean.
        from_zero: whether the axis starts at 0 if no value is negative.
    """
    steps = np.array([row["step"] for row in rows])
    many = len(rows) > 300 and smooth  # noise would hide the trend
    marker = "o" if len(rows) == 1 else None
    for number, name in enumerate(training):
        values, label = scale * np.array([row[name] for row in rows]), f"training {name}"
        line = _line(number, 0)
        axes.plot(steps, values, marker=marker, alpha=0.3 if many else 1, label=label, **line)
        if many:
            bins = 100
            means = [[part.mean() for part in np.array_split(column, bins)] for column in (steps, values)]
            axes.plot(*means, label=f"{label}, mean of {len(rows) // bins} rows", **line)
    for number, name in enumerate(validation):
        validated = [row for row in rows if f"validation_{name}" in row]
        if validated:
            x, y = [row["step"] for row in validated], [scale * row[f"validation_{name}"] for row in validated]
            marker = "o" if len(validated) <= 50 else None
            axes.plot(x, y, marker=marker, ms=4, label=f"validation {name}", **_line(number, 1))
    if len(axes.lines) > 1 or (axes.lines and validation):
        axes.legend(fontsize=8)
    axes.set(title=_wrap_title(title, 3.5), xlabel="step", xlim=(0, max([1, *steps])))
    if from_zero and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    axes.locator_params("x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default formatter may use a factor or an offset
    axes.grid(alpha=0.3)


def _line(number: int, part: int) -> dict[str, Any]:
    """Returns the look of a line: ten colours serve five metrics each of training, part 0, and validation, part 1."""
    return {"color": f"C{2 * number + part}", "linestyle": ("-", "--", ":", "-.")[number // 5 % 4], "clip_on": False}


def save_confusion(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Saves a confusion matrix as a PNG file.

    Args:
        counts: [true class, predicted class], number of clips or videos.
        class_names: one name per class. Long names are shortened in the middle, and more than 60 are omitted.
        path: file to write; an existing file is replaced.
        title: title of the figure, one or more lines.
    """
    classes = len(class_names)
    cell = 0.35 if classes <= 30 else 0.22  # inches
    side = min(max(cell * classes, 2.5), 13.2)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _figure(path, side, side) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        bar = figure.add_axes((1 + 0.2 / side, 0, 0.15 / side, 1))
        figure.colorbar(image, cax=bar, label="share of the true class", format=lambda share, _: f"{share:.0%}")
        axes.set_title(_wrap_title(title, max(side + 1, 4.5)), loc="left", fontsize=11)
        axes.set(xlabel="predicted", ylabel="true")
        if classes <= 60:  # more names would not be legible
            names = [shortened(name, _NAME_LENGTH) for name in class_names]
            size = 10 if classes <= 30 else 8
            axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
            axes.set_yticks(range(classes), names, fontsize=size)
        else:
            axes.set(xlabel="predicted class, counted from 0", ylabel="true class, counted from 0")
            axes.locator_params(nbins=10, integer=True)
        if classes <= 30:
            for true, predicted in np.argwhere(counts):
                colour = "white" if shares[true, predicted] > 0.5 else "black"
                number = str(int(counts[true, predicted]))
                points = min(11, 100 * side / classes / len(number))  # fits into the cell
                axes.text(predicted, true, number, ha="center", va="center", color=colour, fontsize=points)


class CostCurve(NamedTuple):
    """A metric of a network over the cost of a sample, for several numbers of views.

    Attributes:
        name: name of the network, for the legend.
        points: (GMACs of all views of a sample, value of the metric, number of views), by ascending cost.
    """

    name: str
    points: Sequence[tuple[float, float, int]]


class CostPanels(NamedTuple):
    """The curves of networks that were evaluated on the same samples.

    Attributes:
        title: title of the two panels.
        metric: the metric; shares are drawn in percent.
        sample: noun for what the cost is of, such as "video".
        curves: one curve or more.
        paper: the paper's points, if the metric is theirs.
    """

    title: str
    metric: Metric
    sample: str
    curves: Sequence[CostCurve]
    paper: Sequence[PaperPoint] = ()


def save_inference_cost(rows: Sequence[CostPanels], path: Path, title: str) -> None:
    """Saves a metric over the cost of a sample as a PNG file, on linear axes (left) and logarithmic ones (right).

    The linear axes end at the networks' own costs, so that the paper's larger ones do not compress them.

    Args:
        rows: curves that share two panels, one row for each set of samples.
        path: file to write; an existing file is replaced.
        title: title of the figure.
    """
    names = dict.fromkeys(curve.name for row in rows for curve in row.curves)
    looks = {name: _line(number // 2, number % 2) for number, name in enumerate(names)}
    views = {point[2] for row in rows for curve in row.curves for point in curve.points}
    views |= {point.views for row in rows for point in row.paper}
    markers = dict(zip(sorted(views), itertools.cycle(_MARKERS)))
    with _figure(path, 11, 1 + 3.7 * len(rows), layout="constrained") as figure:
        figure.suptitle(_wrap_title(title, 11))
        for row, panels in zip(rows, np.reshape(figure.subplots(len(rows), 2), (-1, 2))):
            panels[0].set_title(_wrap_title(row.title, 11), loc="left", fontsize=9)
            for axes, scale in zip(panels, ("linear", "log")):
                _draw_cost_panel(axes, row, scale, looks, markers)
        _cost_legends(figure, looks, markers, paper=any(row.paper for row in rows))


def _draw_cost_panel(
    axes: Any, row: CostPanels, scale: str, looks: Mapping[str, dict[str, Any]], markers: Mapping[int, str]
) -> None:
    share = row.metric.kind == "share"
    values: list[float] = []
    for curve in row.curves:
        costs = [cost for cost, _, _ in curve.points]
        scaled = [100 * value if share else value for _, value, _ in curve.points]
        axes.plot(costs, scaled, **looks[curve.name])
        for cost, value, (_, _, count) in zip(costs, scaled, curve.points):
            axes.plot(cost, value, marker=markers[count], color=looks[curve.name]["color"], clip_on=False)
        values += scaled
    axes.set_xscale(scale)
    _draw_paper(axes, row.paper, markers)
    costs = [cost for curve in row.curves for cost, _, _ in curve.points]
    if scale == "linear":
        axes.set_xlim(0, 1.06 * max(costs))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        _set_log_axis(axes, costs + [point.gmacs for point in row.paper])
    if share:
        axes.set_ylim(*_percent_limits([*values, *(point.percent for point in row.paper)]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=f"GMACs per {row.sample} ({scale})")
    axes.set_ylabel(f"{row.metric.label} in %" if share else row.metric.label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _cost_legends(figure: Any, looks: Mapping[str, dict[str, Any]], markers: Mapping[int, str], *, paper: bool) -> None:
    """Draws the legends below the panels: networks to the left, and numbers of views to the right."""
    from matplotlib.lines import Line2D

    lines = [(shortened(name, 60), look) for name, look in looks.items()]
    if paper:
        lines.append((_PAPER_LABEL.replace("\n", " "), _PAPER_LINE))
    longest = max(len(label) for label, _ in lines)
    columns = max(1, int(7 / (0.6 + 0.08 * longest)))  # inches
    handles = [Line2D([], [], label=label, **look) for label, look in lines]
    _draw_outer_legend(figure, "lower left", handles, columns)
    shapes = [Line2D([], [], label=f"K={k}", color="0.3", ls="", marker=marker) for k, marker in markers.items()]
    _draw_outer_legend(figure, "lower right", shapes, min(len(shapes), 5))


def save_staircase(
    points: Mapping[str, Sequence[tuple[float, float, float]]],
    winners: Sequence[tuple[float, float]],
    contractions: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    path: Path,
    title: str,
    metric: str,
    paper: Sequence[PaperPoint] = (),
) -> None:
    """Saves the scored networks of an expansion search over their cost, and the path chosen, as a PNG file.

    Args:
        points: (GMACs, score in [0, 1], standard error of the score) of each network, by the name of its axis. The
            order of the names sets their colours and markers; axes without networks are not drawn.
        winners: (GMACs, score in [0, 1]) of the network that each step chose, in the order of the steps.
        contractions: the same of a winner that was contracted and of the network chosen for it, for each contraction.
        path: file to write; an existing file is replaced.
        title: title of the figure.
        metric: name of the score.
        paper: the paper's points.
    """
    with _figure(path, 11, 5.5, layout="constrained") as figure:
        axes = figure.subplots()
        axes.set_title(_wrap_title(title, 9), loc="left", fontsize=11)
        _draw_paper(axes, paper)
        if paper:
            axes.plot([], [], **_PAPER_LINE, marker="o", mfc="white", ms=5, label=_PAPER_LABEL)
        axes.plot(*_percent(winners), color="0.6", lw=2, drawstyle="steps-post", label="path", zorder=1)
        for pair in contractions:
            axes.plot(*_percent(pair), color="0.6", lw=2, ls=":", zorder=1)
        chosen = [*winners, *(contracted for _, contracted in contractions)]
        axes.plot(*_percent(chosen), color="0.4", ls="", marker="o", ms=15, mfc="none", label="chosen", zorder=3)
        for number, (name, rows) in enumerate(points.items()):
            if not rows:
                continue
            errors = [100 * error for *_, error in rows]
            places = _percent([(cost, score) for cost, score, _ in rows])
            look = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "mec": "white", "mew": 0.5}
            size = 10 - 0.6 * number  # a marker does not hide one behind it
            axes.errorbar(*places, yerr=errors, ls="", ms=size, elinewidth=1, label=name, zorder=2, **look)
        axes.set(xscale="log", xlabel="GMACs per clip (log)", ylabel=f"{metric} in %")
        costs = [cost for rows in points.values() for cost, *_ in rows]
        _set_log_axis(axes, costs + [point.gmacs for point in paper])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        _draw_outer_legend(figure, "right upper", axes.get_legend_handles_labels()[0])


def _draw_outer_legend(figure: Any, place: str, handles: Sequence[Any], columns: int = 1) -> None:
    """Draws a legend beside the panels, where it hides no point."""
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches: room for the border of the legend
    figure.legend(handles=handles, loc=f"outside {place}", ncols=columns, fontsize=8, borderaxespad=1)


def _draw_paper(axes: Any, points: Sequence[PaperPoint], markers: Mapping[int, str] | None = None) -> None:
    """Draws the paper's points in grey, with their names, behind what was measured here."""
    for before, point in pairwise(points):
        if point.joined:
            axes.plot([before.gmacs, point.gmacs], [before.percent, point.percent], **_PAPER_LINE, zorder=0)
    for number, point in enumerate(points):
        place, grey = (point.gmacs, point.percent), _PAPER_LINE["color"]
        marker = markers[point.views] if markers else "o"
        axes.plot(*place, color=grey, mfc="white", ls="", marker=marker, ms=5, zorder=0)
        side, up = (("top", -5), ("bottom", 5))[number % 2]  # names on one side would overlap
        text = axes.annotate(point.name, place, (0, up), textcoords="offset points", annotation_clip=True, zorder=0)
        text.set(color=grey, fontsize=7, ha="center", va=side)


def _set_log_axis(axes: Any, costs: Sequence[float]) -> None:
    """Sets the range of a logarithmic axis of costs, and round numbers as labels instead of powers of ten."""
    low, high = min(costs) / 1.5, max(costs) * 1.5
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks], fontsize=9)
    axes.minorticks_off()
    axes.set_xlim(low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers in a range of positive numbers, if possible at most 12; `high` is at least 1.5 `low`."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [tick for decade in decades for digit in digits if low <= (tick := digit * 10.0**decade) <= high]
        if len(ticks) <= 12:
            break
    return ticks


def _percent(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [cost for cost, _ in points], [100 * score for _, score in points]


def _percent_limits(values: Sequence[float]) -> tuple[float, float]:
    """Returns axis limits in percent with a margin around the values: at least 10 apart, within 0 to 100."""
    middle, half = (min(values) + max(values)) / 2, max(0.6 * (max(values) - min(values)), 5.0)
    low = min(max(middle - half, 0.0), 100.0 - min(2 * half, 100.0))
    return low, min(low + 2 * half, 100.0)


def save_clips(
    clips: Sequence[np.ndarray],
    labels: Sequence[str],
    path: Path,
    title: str,
    times: Sequence[Sequence[float]] | None = None,
) -> None:
    """Saves a contact sheet as a PNG file: one row per clip, with its label on the left and its frames on the right.

    Args:
        clips: arrays of shape [frames, side, side, 3], RGB in 0..255, with equal sides; the numbers of frames may
            differ.
        labels: one label per clip, one or more lines.
        path: file to write; an existing file is replaced.
        title: title of the figure.
        times: times of the frames of each clip in seconds, printed below the frames.
    """
    side, columns = clips[0].shape[1], max(1, *(len(clip) for clip in clips))
    tile = min(1.3, 40 / columns)  # inches
    inch = side / tile  # pixels
    right, below = math.ceil(0.05 * inch), math.ceil((0.2 if times else 0.05) * inch)  # gaps in pixels
    sheet = np.full((len(clips) * (side + below), columns * (side + right), 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(clip):
            top, left = row * (side + below), column * (side + right)
            sheet[top : top + side, left : left + side] = np.clip(np.round(frame), 0, 255)
    width, height = sheet.shape[1] / inch, sheet.shape[0] / inch
    with _figure(path, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(sheet, interpolation="antialiased", aspect="auto")
        label_texts = [
            axes.text(0, row * (side + below) + side / 2, _wrap_label(label), va="center", fontsize=8)
            for row, label in enumerate(labels)
        ]
        widest = max(text.get_window_extent().width for text in label_texts) / _DPI  # inches
        for text in label_texts:
            text.set_x(-(widest + 0.15) * inch)
        places = decimals(times or ())
        for row, seconds in enumerate(times or ()):
            for column, second in enumerate(seconds):
                position = (column * (side + right) + side / 2, row * (side + below) + side + 0.02 * inch)
                axes.text(*position, f"{second:.{places}f} s", ha="center", va="top", fontsize=7)
        heading = _wrap_title(title, max(width + widest, 4))
        axes.text(-(widest + 0.15) * inch, -0.1 * inch, heading, va="bottom", fontsize=11)


def _wrap_label(text: str) -> str:
    """Returns a label of at most 10 lines: long lines are shortened and wrapped, and further lines are counted."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(shortened(line, 80), 40)]
    return "\n".join(lines if len(lines) <= 10 else [*lines[:9], f"and {len(lines) - 9} more lines"])


def decimals(times: Sequence[Sequence[float]]) -> int:
    """Returns the decimals of all times on a contact sheet: 2 if frames are less than 0.1 seconds apart, else 1."""
    return 2 if any(0 < after - before < 0.1 for row in times for before, after in pairwise(row)) else 1


def _wrap_title(title: str, inches: float) -> str:
    """Returns the title wrapped to the width of the figure, with control characters escaped."""
    width = int(inches * 11)  # characters
    return "\n".join("\n".join(textwrap.wrap(one_line(line), width)) for line in title.splitlines())


def shortened(name: str, length: int) -> str:
    """Returns a name of at most `length` characters; the middle is omitted because many names differ only at the end.

    Control characters and non-Unicode bytes of file names are escaped.
    """
    name = one_line(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def save_precisions(
    precisions: np.ndarray, positives: np.ndarray, class_names: Sequence[str], path: Path, title: str
) -> None:
    """Saves the average precision per class as a bar chart, best first, as a PNG file.

    Args:
        precisions: average precision per class in [0, 1]; classes with nan are omitted.
        positives: number of positives per class, printed next to the bars.
        class_names: one name per class; long names are shortened in the middle.
        path: file to write; an existing file is replaced.
        title: title of the figure.
    """
    order = [index for index in np.argsort(-precisions, kind="stable") if not np.isnan(precisions[index])]
    with _figure(path, 6, 0.2 * max(len(order), 3)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.barh(range(len(order)), [100 * precisions[index] for index in order])
        names = [f"{shortened(class_names[index], 60)} ({positives[index]})" for index in order]
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.set(xlim=(0, 100), ylim=(max(len(order), 3) - 0.4, -0.6))
        axes.set(xlabel="average precision in % (in brackets: boxes in the ground truth)")
        axes.set_title(_wrap_title(title, 8), fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
