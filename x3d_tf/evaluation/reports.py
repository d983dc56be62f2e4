"""Evaluation reports: a folder with results.json, csv tables and, for single-label tasks, a confusion matrix.

Imports no TensorFlow.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from x3d_tf import csv_files, plots
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.metrics import (
    average_precisions,
    confusion_matrix,
    mean_average_precision,
    top_k_accuracy,
    top_k_hits,
)
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited
from x3d_tf.locks import locked
from x3d_tf.text import counted
from x3d_tf.types import ClipStarts, Combine, FrameSampling

RESULTS_NAME = "results.json"
_STRING_FIELDS = ("network", "records", "split", "views")
_CHOICES: dict[str, tuple[str, ...]] = {  # settings that the comparison with the paper reads; they may be absent
    "clip_starts": get_args(ClipStarts),
    "frame_sampling": get_args(FrameSampling),
    "combine": get_args(Combine),
}
_COUNTS = ("videos_expected", "videos_present", "key_frames_missing")
_LONGEST = 100  # characters of the data set's name
_LARGEST = 1e15  # largest absolute value accepted in results.json


@dataclass(frozen=True)
class Report:
    """Results of an evaluation, and the folder of its report.

    Attributes:
        folder: contains results.json, predictions.csv, per_class.csv and, for single-label tasks, confusion.png.
        results: the content of results.json.
    """

    folder: Path
    results: dict[str, Any]


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

    def metrics(self) -> dict[str, float]:
        """Returns the metrics for results.json, in [0, 1].

        For exclusive classes: top1, top5 and their mean, which the paper reports for test sets. Otherwise:
        map, the mean average precision over the classes that have positives, and the number of these classes.

        Raises:
            UserError: a metric is not finite, such as map if no class has positives. Names the metric.
        """
        metrics = self._metrics()
        for name, value in metrics.items():
            require(math.isfinite(value), name, f"be finite on the {counted(len(self.videos), 'video')}", value)
        return metrics

    def _metrics(self) -> dict[str, float]:
        if not self.exclusive:
            positive = int(self.truth.any(axis=0).sum())
            return {
                "map": mean_average_precision(self.probabilities, self.truth),
                "classes_with_positives": positive,
            }
        top1, top5 = (top_k_accuracy(self.probabilities, self.labels, k) for k in (1, 5))
        return {"top1": top1, "top5": top5, "mean_of_top1_and_top5": (top1 + top5) / 2}


def refuse_to_replace(path: Path, overwrite: bool) -> None:
    """Raises `UserError` if a file exists and `overwrite` is False."""
    if path.is_file() and not overwrite:
        raise UserError(
            f"{path.parent} already has a report ({path.name} exists); choose another --output, or replace it with "
            "--overwrite"
        )


@contextmanager
def locked_report_folder(folder: Path) -> Iterator[None]:
    """Creates a report folder and locks it against other processes for the duration of the block.

    Raises:
        UserError: another process writes to the folder.
        WriteError: the folder cannot be written to.
    """
    with os_errors_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    conflict = f"another process is writing the report {folder}"
    with locked(folder / ".lock", conflict, "wait for it, or choose another --output"):
        yield


def write_report(folder: Path, settings: Mapping[str, Any], predictions: Predictions) -> Report:
    """Writes a report. results.json is written last, so a folder that contains it has a complete report.

    Args:
        folder: folder of the report, created if it does not exist. An existing report is replaced.
        settings: the settings of the evaluation, for results.json.
        predictions: the predictions to report.

    Raises:
        UserError: a metric is not finite; the folder is left as it is.
    """
    results = {**settings, **predictions.metrics()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_NAME).unlink(missing_ok=True)  # until the report is complete
    write_csv(folder / "predictions.csv", _prediction_rows(predictions))
    write_csv(folder / "per_class.csv", _class_rows(predictions))
    confusion = folder / "confusion.png"
    confusion.unlink(missing_ok=True)
    if predictions.exclusive:
        counts = confusion_matrix(
            predictions.probabilities.argmax(axis=1), predictions.labels, len(predictions.class_names)
        )
        title = f"{results['network']}, {results['split']}, {results['views']}: top-1 {results['top1']:.1%}"
        plots.save_confusion(counts, predictions.class_names, confusion, title)
    write_json(folder / RESULTS_NAME, results)
    return Report(folder, results)


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


def read_report(folder: Path) -> Report:
    """Reads a report. results.json is treated as untrusted: every field that a table needs is checked.

    Raises:
        UserError: results.json does not exist or is damaged; names the file, the field, the rule and the value.
    """
    return Report(folder, read_results(folder / RESULTS_NAME))


def read_results(path: Path) -> dict[str, Any]:
    """Reads and checks results.json, or another file of the same format.

    Raises:
        UserError: see `read_report`.
    """
    try:
        results = json.loads(read_limited(path, SMALL))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Repeat the evaluation with --overwrite") from error

    def check(name: str, rule: str, condition: bool) -> None:
        if not condition:
            value = results.get(name) if isinstance(results, dict) else results
            raise UserError(
                f"{path} is damaged: {name} must {rule}, got {value!r}. Repeat the evaluation with --overwrite"
            )

    check("the file", "contain a JSON object", isinstance(results, dict))
    if "detections" in results:
        raise UserError(f"{path} must be the report of a network, not of a csv file of detections")
    for name in _STRING_FIELDS:
        check(name, "be a string", isinstance(results.get(name), str))
    sample = sample_of(results)
    for name in (f"{sample}s", "classes"):
        check(name, "be an integer of at least 1", _is_count(results.get(name)) and results[name] >= 1)
    cost = f"gmacs_per_{sample}"
    for name in ("gmacs_per_clip", cost):
        check(name, "be a number", _is_number(results.get(name)))
    for name, values in _CHOICES.items():
        check(name, f"be one of {', '.join(values)}", results.get(name, values[0]) in values)
    dataset = results.get("dataset", "")
    check("dataset", "be a short string", isinstance(dataset, str) and len(dataset) <= _LONGEST)
    for name in _COUNTS:
        check(name, "be a number of at least 0, or null", results.get(name) is None or _is_count(results[name]))
    clips = results[cost] / (results["gmacs_per_clip"] or math.inf)
    check(cost, "be gmacs_per_clip times 0 to 1,000,000 clips", 0 <= clips <= 1e6)
    check("params", "be a number", _is_number(results.get("params", 0)))
    for name in ("map",) if "map" in results else ("top1", "top5"):
        check(name, "be in [0, 1]", _is_number(results.get(name)) and 0 <= results[name] <= 1)
    return results


def sample_of(results: Mapping[str, Any]) -> Literal["video", "key_frame"]:
    """Returns the unit that a report counts, and whose cost it states, for use in the names of its fields."""
    return "key_frame" if "key_frames" in results else "video"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def differing_settings(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns the names of the settings whose values differ from those in a report. Ignores settings it lacks."""
    compared = {name for name in settings if name in results} - {"weights"}  # the same file may have several paths
    if "records_sha256" in compared:
        compared.discard("records")
    return sorted(name for name in compared if results[name] != settings[name])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    atomic_write(path, json.dumps(content, indent=1).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a csv file atomically, with text that a spreadsheet would run as a formula escaped."""
    atomic_write(path, csv_files.encoded(rows))
