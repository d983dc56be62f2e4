"""Predictions of classifiers with their metrics, and the report on them. Imports no TensorFlow."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf import csv_files, plots
from x3d_tf.errors import require
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import (
    MAP,
    TOP1,
    TOP5,
    average_precisions,
    confusion_matrix,
    mean_average_precision,
    top_k_accuracy,
    top_k_hits,
)
from x3d_tf.evaluation.reports import stated_metrics, write_csv, writing_report
from x3d_tf.text import counted


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for videos, with the ground truth.

    Attributes:
        videos: names of the videos.
        class_names: names of the network's classes.
        probabilities: (videos, classes).
        truth: bool (videos, classes).
        exclusive: whether each video has exactly one class.
    """

    videos: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: np.ndarray
    truth: np.ndarray
    exclusive: bool

    @property
    def labels(self) -> np.ndarray:
        """The class of each video, (videos,), if classes are exclusive."""
        return self.truth.argmax(axis=1)

    def measure(self) -> dict[str, Any]:
        """Returns the results for results.json, by name.

        For exclusive classes: top1, top5 and their mean, which the paper reports for test sets. Otherwise:
        map, the mean average precision over the classes that have positives, the number of these classes, and the names
        of the others.

        Raises:
            UserError: a metric is not finite, such as map if no class has positives. Names the metric.
        """
        values = self._values()
        for name, value in values.items():
            if isinstance(value, float):
                require(math.isfinite(value), name, f"be finite on the {counted(len(self.videos), 'video')}", value)
        return values

    def _values(self) -> dict[str, Any]:
        if not self.exclusive:
            positive = self.truth.any(axis=0)
            return {
                MAP.name: mean_average_precision(self.probabilities, self.truth),
                "classes_with_positives": int(positive.sum()),
                "classes_without_positives": [self.class_names[number] for number in np.flatnonzero(~positive)],
            }
        top1, top5 = (top_k_accuracy(self.probabilities, self.labels, k) for k in (1, 5))
        return {TOP1.name: top1, TOP5.name: top5, "mean_of_top1_and_top5": (top1 + top5) / 2}


def write_report(
    folder: Path, settings: Mapping[str, Any], predictions: Predictions, values: Mapping[str, Any]
) -> Report:
    """Writes the report of a classifier.

    Args:
        folder: folder of the report, created if it does not exist. An existing report is replaced.
        settings: the settings of the evaluation, from `reports.settings_of`.
        predictions: the predictions to report.
        values: the measured values, by name.

    Raises:
        UserError: a metric has no valid value; the folder is left as it is.
    """
    with writing_report(folder, settings, values) as report:
        write_csv(folder / "predictions.csv", _prediction_rows(predictions))
        write_csv(folder / "per_class.csv", _class_rows(predictions))
        confusion = folder / "confusion.png"
        confusion.unlink(missing_ok=True)
        if predictions.exclusive:
            classes = predictions.probabilities.argmax(axis=1)
            counts = confusion_matrix(classes, predictions.labels, len(predictions.class_names))
            plots.save_confusion(counts, predictions.class_names, confusion, _title(report.results))
    return report


def _title(results: Mapping[str, Any]) -> str:
    main = stated_metrics(results)[0]
    return f"{results['network']}, {results['split']}, {results['views']}: {main.labelled(results[main.name])}"


def _prediction_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """Yields the header and one row per video: its name, its labels and all probabilities."""
    names = predictions.class_names
    single = predictions.exclusive
    yield ["video", *(["label", "predicted"] if single else ["labels"]), *(f"p({name})" for name in names)]
    for video, row, truth in zip(predictions.videos, predictions.probabilities, predictions.truth):
        labels = ";".join(names[number] for number in np.flatnonzero(truth))
        yield [video, labels, *([names[row.argmax()]] if single else []), *(csv_files.number(p, ".6g") for p in row)]


def _class_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """Yields the header and one row per class. Cells without a measurement are empty."""
    names, truth, probabilities = predictions.class_names, predictions.truth, predictions.probabilities
    if not predictions.exclusive:
        yield ["class", "positives", "average_precision"]
        for name, positives, precision in zip(names, truth.sum(axis=0), average_precisions(probabilities, truth)):
            yield [name, positives, "" if math.isnan(precision) else csv_files.number(precision, ".6g")]
        return
    labels = predictions.labels
    hits = {k: top_k_hits(probabilities, labels, k) for k in (1, 5)}
    errors = confusion_matrix(probabilities.argmax(axis=1), labels, len(names))
    np.fill_diagonal(errors, 0)
    yield ["class", "videos", "top1", "top5", "most_confused_with", "times"]
    for number, name in enumerate(names):
        in_class = labels == number
        shares = [csv_files.number(hits[k][in_class].mean(), ".6g") if in_class.any() else "" for k in (1, 5)]
        other = int(errors[number].argmax())
        times = int(errors[number, other])
        yield [name, int(in_class.sum()), *shares, names[other] if times else "", times or ""]
