"""The figures that runs leave behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _figure(**kwargs: Any) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(layout="constrained", **kwargs)


def save_curves(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy over the steps of training, with the learning rate, as a PNG.

    Args:
        rows: with step, loss, accuracy in [0, 1] and learning_rate.
        path: replaced if it is there.
        title: of the figure.
    """
    figure = _figure(figsize=(10, 3.2))
    figure.suptitle(title)
    steps = [row["step"] for row in rows]
    for axes, column in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate")):
        axes.plot(steps, [row[column] for row in rows])
        axes.set_xlabel("step")
        axes.set_title(f"training {column}" if column != "learning_rate" else "learning rate")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


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
    figure = _figure(figsize=(side + 1, side))
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if classes <= 60:  # more names would not be legible
        axes.set_xticks(range(classes), class_names, rotation=90)
        axes.set_yticks(range(classes), class_names)
    if classes <= 30:
        for true, predicted in np.argwhere(counts):
            colour = "white" if shares[true, predicted] > 0.5 else "black"
            axes.text(predicted, true, int(counts[true, predicted]), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=110)
