"""The figures that runs leave behind.

Axes have the size that their content needs, and the saved picture is cut to all that is drawn: no name or title,
however long, takes room from the content or is cut off.
"""

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.terminal import one_line

_DPI = 110  # pixels an inch
_NAME_LENGTH = 32  # characters of a class name beside an axis
# For letters that matplotlib's own font lacks: those of these that are installed.
_OTHER_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Hiragino Sans"),
    *("PingFang SC", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Noto Sans Bengali", "Noto Sans Tamil", "Nirmala UI", "Arial Unicode MS"),
)


@contextmanager
def _figure(path: Path, width: float, height: float, **kwargs: Any) -> Iterator[Any]:
    """A figure to draw on, `width` x `height` inches, saved at the end of the block with all that reaches beyond it."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "text.parse_math": False,  # a dollar in a class name is a dollar
        "font.family": ["DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed)],
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that all fonts lack is drawn as a box
        figure = Figure(figsize=(width, height), dpi=_DPI, **kwargs)
        yield figure
        with os_errors_as_write_error(path), atomic_path(path) as partial:
            figure.savefig(partial, dpi=_DPI, format="png", bbox_inches="tight", pad_inches=0.1)


def save_curves(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy over the steps of training, with those of validation and the learning rate, as a PNG.

    Args:
        rows: with step, loss, accuracy in [0, 1] and learning_rate; some with validation_loss and validation_accuracy.
        path: replaced if it is there.
        title: of the figure.
    """
    with _figure(path, 11, 3.2, layout="constrained") as figure:
        figure.suptitle(_wrapped(title, 11))
        loss, accuracy, rate = figure.subplots(1, 3)
        _draw_measure(loss, rows, "loss", 1)
        _draw_measure(accuracy, rows, "accuracy", 100)
        accuracy.set(ylim=(0, 100), title="accuracy in %")
        _draw_measure(rate, rows, "learning_rate", 1)
        rate.set(title="learning rate")


def _draw_measure(axes: Any, rows: Sequence[dict[str, float]], name: str, scale: float) -> None:
    """Draws a column of the history, and that of the validation where there is one, over the steps from 0."""
    steps, values = (np.array([row[column] for row in rows]) for column in ("step", name))
    marker = "o" if len(rows) == 1 else None
    many = len(rows) > 300 and name != "learning_rate"  # then noise would hide the course
    axes.plot(steps, scale * values, "C0", marker=marker, alpha=0.3 if many else 1, label="training", clip_on=False)
    if many:
        parts = 100
        means = [[part.mean() for part in np.array_split(column, parts)] for column in (steps, scale * values)]
        axes.plot(*means, "C0", label=f"training, mean of {len(rows) // parts} rows", clip_on=False)
    tested = [row for row in rows if f"validation_{name}" in row]
    if tested:
        found = [scale * row[f"validation_{name}"] for row in tested]
        marker = "o" if len(tested) <= 50 else None
        axes.plot([row["step"] for row in tested], found, "C1", marker=marker, ms=4, label="validation", clip_on=False)
    if many or tested:
        axes.legend(fontsize=8)
    axes.set(title=name, xlabel="step", xlim=(0, max([1, *steps])), ylim=(0, None))
    axes.locator_params("x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # by itself it may take out a factor or an offset
    axes.grid(alpha=0.3)


def save_confusion(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """A confusion matrix as a PNG.

    Args:
        counts: (true class, predicted class) -> clips or videos.
        class_names: one a class; long ones are shortened in their middle, and more than 60 are not written.
        path: replaced if it is there.
        title: of the figure, of one or more lines.
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
        axes.set_title(_wrapped(title, max(side + 1, 4.5)), loc="left", fontsize=11)
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
                points = min(11, 100 * side / classes / len(number))  # so that it stays in its cell
                axes.text(predicted, true, number, ha="center", va="center", color=colour, fontsize=points)


def save_sweep(
    points: Sequence[tuple[float, float]], clips: Sequence[int], path: Path, title: str, metric: str
) -> None:
    """Accuracy over the cost of a video, with a linear and with a logarithmic axis, as a PNG.

    Args:
        points: (GMACs of all views of a video, accuracy in [0, 1]), one for each number of clips.
        clips: those numbers, written beside the points.
        path: replaced if it is there.
        title: of the figure.
        metric: name of the accuracy.
    """
    costs, accuracies = [cost for cost, _ in points], [100 * accuracy for _, accuracy in points]
    with _figure(path, 10, 4, layout="constrained") as figure:
        figure.suptitle(_wrapped(title, 10))
        for axes, scale in zip(figure.subplots(1, 2), ("linear", "log")):
            axes.plot(costs, accuracies, marker="o", clip_on=False)
            axes.set(xscale=scale, xlabel=f"GMACs a video ({scale})", ylabel=f"{metric} in %")
            axes.set_ylim(*_percent_limits(accuracies))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if scale == "log":  # by itself matplotlib writes powers there, as formulas
                axes.set_xticks(costs, [f"{cost:.3g}" for cost in costs])
                axes.minorticks_off()
            else:
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.margins(x=0.12)
            axes.grid(alpha=0.3)
            for x, y, number in zip(costs, accuracies, clips):
                axes.annotate(f"K={number}", (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)


def _percent_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis in percent, at least 10 apart and never outside of 0 to 100, with room around the values."""
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
    """A contact sheet as a PNG: a row for each clip, its frames from left to right, its label at the left.

    Args:
        clips: [frames, side, side, 3] each, RGB in 0..255, all of one side; the numbers of frames may differ.
        labels: one a clip, of one or more lines.
        path: replaced if it is there.
        title: of the figure.
        times: seconds of each frame of each clip, written below it.
    """
    side, columns = clips[0].shape[1], max(1, *(len(clip) for clip in clips))
    tile = min(1.3, 40 / columns)  # inches
    inch = side / tile  # pixels
    right, below = math.ceil(0.05 * inch), math.ceil((0.2 if times else 0.05) * inch)  # gaps
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
        beside = [
            axes.text(0, row * (side + below) + side / 2, _label(label), va="center", fontsize=8)
            for row, label in enumerate(labels)
        ]
        widest = max(text.get_window_extent().width for text in beside) / _DPI  # inches
        for text in beside:
            text.set_x(-(widest + 0.15) * inch)
        for row, own in enumerate(times or ()):
            for column, written in enumerate(_seconds(own)):
                place = (column * (side + right) + side / 2, row * (side + below) + side + 0.02 * inch)
                axes.text(*place, written, ha="center", va="top", fontsize=7)
        heading = _wrapped(title, max(width + widest, 4))
        axes.text(-(widest + 0.15) * inch, -0.1 * inch, heading, va="bottom", fontsize=11)


def _label(text: str) -> str:
    """A label as high as its row at most: long lines are shortened and wrapped, and of many the last are counted."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(shortened(line, 80), 40)]
    return "\n".join(lines if len(lines) <= 10 else [*lines[:9], f"and {len(lines) - 9} more lines"])


def _seconds(times: Sequence[float]) -> list[str]:
    """Times as text, to a tenth of a second where they lie that far apart."""
    close = any(0 < after - before < 0.1 for before, after in pairwise(times))
    return [f"{time:.{2 if close else 1}f} s" for time in times]


def _wrapped(title: str, inches: float) -> str:
    """A title whose lines are about as wide as the figure, of printable characters."""
    width = int(inches * 11)  # characters
    return "\n".join("\n".join(textwrap.wrap(one_line(line), width)) for line in title.splitlines())


def shortened(name: str, length: int) -> str:
    """A name of at most so many printable characters; the middle is left out, for many names differ at their end only.

    Control characters and what is no Unicode (bytes of file names) are escaped.
    """
    name = one_line(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def save_precisions(
    precisions: np.ndarray, positives: np.ndarray, class_names: Sequence[str], path: Path, title: str
) -> None:
    """Average precision of classes as bars, best first, as a PNG.

    Args:
        precisions: in [0, 1], or nan: left out.
        positives: how often each class is there, written beside the bars.
        class_names: one a class; long ones are shortened in their middle.
        path: replaced if it is there.
        title: of the figure.
    """
    order = [place for place in np.argsort(-precisions, kind="stable") if not np.isnan(precisions[place])]
    with _figure(path, 6, 0.2 * max(len(order), 3)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.barh(range(len(order)), [100 * precisions[place] for place in order])
        names = [f"{shortened(class_names[place], 60)} ({positives[place]})" for place in order]
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.set(xlim=(0, 100), ylim=(max(len(order), 3) - 0.4, -0.6))
        axes.set(xlabel="average precision in % (in brackets: boxes in the ground truth)")
        axes.set_title(_wrapped(title, 8), fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
