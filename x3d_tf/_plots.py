"""The figures that runs leave behind."""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf._files import appearing, writing


@contextmanager
def _figure(path: Path, **kwargs: Any) -> Iterator[Any]:
    """A figure to draw on, saved at the end of the block."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a class name is a dollar
        figure = Figure(layout="constrained", **kwargs)
        yield figure
        with writing(path), appearing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")


def save_curves(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy over the steps of training, with the learning rate, as a PNG.

    Args:
        rows: with step, loss, accuracy in [0, 1] and learning_rate.
        path: replaced if it is there.
        title: of the figure.
    """
    steps = [row["step"] for row in rows]
    with _figure(path, figsize=(10, 3.2)) as figure:
        figure.suptitle(title)
        for axes, column in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate")):
            axes.plot(steps, [row[column] for row in rows])
            axes.set_xlabel("step")
            axes.set_title(f"training {column}" if column != "learning_rate" else "learning rate")
            axes.grid(alpha=0.3)


def save_confusion(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """A confusion matrix as a PNG.

    Args:
        counts: (true class, predicted class) -> clips or videos.
        class_names: one a class.
        path: replaced if it is there.
        title: of the figure.
    """
    classes = len(class_names)
    side = min(3 + 0.35 * classes, 24)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _figure(path, figsize=(side + 1, side)) as figure:
        axes = figure.subplots()
        figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the true class")
        axes.set(xlabel="predicted", ylabel="true", title=title)
        if classes <= 60:  # more names would not be legible
            axes.set_xticks(range(classes), class_names, rotation=90)
            axes.set_yticks(range(classes), class_names)
        if classes <= 30:
            for true, predicted in np.argwhere(counts):
                colour = "white" if shares[true, predicted] > 0.5 else "black"
                number = int(counts[true, predicted])
                axes.text(predicted, true, number, ha="center", va="center", color=colour, fontsize=8)


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
    with _figure(path, figsize=(10, 4)) as figure:
        figure.suptitle(title)
        for axes, scale in zip(figure.subplots(1, 2), ("linear", "log")):
            axes.plot(costs, accuracies, marker="o")
            axes.set(xscale=scale, xlabel=f"GMACs a video ({scale})", ylabel=f"{metric} in %")
            if scale == "log":  # by itself matplotlib writes powers there, as formulas
                axes.set_xticks(costs, [f"{cost:.3g}" for cost in costs])
                axes.minorticks_off()
            axes.margins(x=0.1)
            axes.grid(alpha=0.3)
            for x, y, number in zip(costs, accuracies, clips):
                axes.annotate(f"K={number}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)


def save_clips(clips: Sequence[np.ndarray], labels: Sequence[str], path: Path, title: str) -> None:
    """A contact sheet as a PNG: a row for each clip, its frames from left to right, its label at the left.

    Args:
        clips: [frames, side, side, 3] each, RGB in 0..255, all of one side; the numbers of frames may differ.
        labels: one a clip, of one or more lines.
        path: replaced if it is there.
        title: of the figure.
    """
    side, columns, gap = clips[0].shape[1], max(len(clip) for clip in clips), max(clips[0].shape[1] // 24, 1)
    sheet = np.full((len(clips) * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(clip):
            top, left = row * (side + gap), column * (side + gap)
            sheet[top : top + side, left : left + side] = np.clip(np.round(frame), 0, 255)
    tile = 1.3  # inches
    size = (3.5 + min(columns * tile, 40), 0.8 + len(clips) * tile)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is drawn as a box
        with _figure(path, figsize=size) as figure:
            figure.suptitle(_drawable(title, 120))
            axes = figure.subplots()
            axes.imshow(sheet, interpolation="antialiased")
            centres = np.arange(len(clips)) * (side + gap) + side / 2
            axes.set_yticks(centres, [_drawable(label) for label in labels], fontsize=8)
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)


def _drawable(text: str, width: int = 40) -> str:
    """Text with long lines wrapped, and with what is no Unicode (bytes of file names) escaped."""
    lines = text.encode("utf-8", "backslashreplace").decode().splitlines()
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in lines)


def save_precisions(
    precisions: np.ndarray, positives: np.ndarray, class_names: Sequence[str], path: Path, title: str
) -> None:
    """Average precision of classes as bars, best first, as a PNG.

    Args:
        precisions: in [0, 1], or nan: left out.
        positives: how often each class is there, written beside the bars.
        class_names: one a class.
        path: replaced if it is there.
        title: of the figure.
    """
    order = [place for place in np.argsort(-precisions, kind="stable") if not np.isnan(precisions[place])]
    with _figure(path, figsize=(9, 1.2 + 0.22 * max(len(order), 3))) as figure:
        axes = figure.subplots()
        axes.barh(range(len(order)), [100 * precisions[place] for place in order])
        names = [f"{_drawable(class_names[place], 60)} ({positives[place]})" for place in order]
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="average precision in % (in brackets: boxes in the ground truth)", title=title)
        axes.grid(axis="x", alpha=0.3)
