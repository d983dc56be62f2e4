"""The report of a test: a folder with results.json, tables for people and, of single labels, a confusion matrix.

Imports no TensorFlow.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf import csv_files, plots
from x3d_tf.errors import UserError
from x3d_tf.evaluation.metrics import (
    average_precisions,
    confusion_matrix,
    mean_average_precision,
    top_k_accuracy,
    top_k_hits,
)
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited
from x3d_tf.locks import locked
from x3d_tf.types import Task

RESULTS_NAME = "results.json"
_TEXTS = ("network", "records", "split", "views")
_COUNTS = ("videos", "classes")
_NUMBERS = ("gmacs_per_clip", "gmacs_per_video")
_LARGEST = 1e15  # of a report's numbers


@dataclass(frozen=True)
class Report:
    """What a test found, and the folder with the details.

    Attributes:
        folder: holds results.json, predictions.csv, per_class.csv and, of single labels, confusion.png.
        results: the content of results.json.
    """

    folder: Path
    results: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network says of videos, and what is true.

    Attributes:
        videos: their names.
        class_names: the network's.
        probabilities: (videos, classes).
        truth: (videos, classes), bool; exactly one class of each video where the task is "single_label".
        task: whether a video has one class or several.
    """

    videos: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: np.ndarray
    truth: np.ndarray
    task: Task

    @property
    def labels(self) -> np.ndarray:
        """The class of each video, (videos,)."""
        return self.truth.argmax(axis=1)

    def metrics(self) -> dict[str, float]:
        """What results.json says of them, in [0, 1].

        Of single labels top1, top5 and their mean, which the paper gives for test sets; of several labels map, the mean
        of the average precision over the classes that have positives, and the number of those.
        """
        if self.task == "multi_label":
            positive = int(self.truth.any(axis=0).sum())
            return {
                "map": mean_average_precision(self.probabilities, self.truth),
                "classes_with_positives": positive,
            }
        top1, top5 = (top_k_accuracy(self.probabilities, self.labels, k) for k in (1, 5))
        return {"top1": top1, "top5": top5, "mean_of_top1_and_top5": (top1 + top5) / 2}


def refuse_to_replace(path: Path, overwrite: bool) -> None:
    """Raises `UserError` where a file is there already and may not be replaced."""
    if path.is_file() and not overwrite:
        raise UserError(
            f"{path.parent} holds a report already ({path.name}); choose another --output, or replace it with "
            "--overwrite"
        )


@contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Makes the folder of a report and keeps other processes from writing to it within the block.

    Raises:
        UserError: another process writes to it.
        WriteError: it cannot be written.
    """
    with os_errors_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    conflict = f"another process is writing the report {folder}"
    with locked(folder / ".lock", conflict, "wait for it, or choose another --output"):
        yield


def write_report(folder: Path, settings: Mapping[str, Any], predictions: Predictions) -> Report:
    """Writes a report; a folder that has results.json has the rest of it.

    Args:
        folder: made if absent; a report that is there is replaced.
        settings: what was tested and how, for results.json.
        predictions: what came out.
    """
    results = {**settings, **predictions.metrics()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_NAME).unlink(missing_ok=True)  # until the rest is of this test
    write_csv(folder / "predictions.csv", _prediction_rows(predictions))
    write_csv(folder / "per_class.csv", _class_rows(predictions))
    confusion = folder / "confusion.png"
    confusion.unlink(missing_ok=True)
    if predictions.task == "single_label":
        counts = confusion_matrix(
            predictions.probabilities.argmax(axis=1), predictions.labels, len(predictions.class_names)
        )
        title = f"{results['network']}, {results['split']}, {results['views']}: top-1 {results['top1']:.1%}"
        plots.save_confusion(counts, predictions.class_names, confusion, title)
    write_json(folder / RESULTS_NAME, results)
    return Report(folder, results)


def _prediction_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """One row a video: its name, its class or classes, and all probabilities."""
    names = predictions.class_names
    single = predictions.task == "single_label"
    yield ["video", *(["label", "predicted"] if single else ["labels"]), *(f"p({name})" for name in names)]
    for video, row, truth in zip(predictions.videos, predictions.probabilities, predictions.truth):
        own = ";".join(names[number] for number in np.flatnonzero(truth))
        yield [video, own, *([names[row.argmax()]] if single else []), *(csv_files.number(p, ".6g") for p in row)]


def _class_rows(predictions: Predictions) -> Iterable[Sequence[Any]]:
    """One row a class; cells that nothing was measured for are empty."""
    names, truth, probabilities = predictions.class_names, predictions.truth, predictions.probabilities
    if predictions.task == "multi_label":
        yield ["class", "positives", "average_precision"]
        for name, held, precision in zip(names, truth.sum(axis=0), average_precisions(probabilities, truth)):
            yield [name, held, "" if math.isnan(precision) else csv_files.number(precision, ".6g")]
        return
    labels = predictions.labels
    hits = {k: top_k_hits(probabilities, labels, k) for k in (1, 5)}
    wrong = confusion_matrix(probabilities.argmax(axis=1), labels, len(names))
    np.fill_diagonal(wrong, 0)
    yield ["class", "videos", "top1", "top5", "most_confused_with", "times"]
    for number, name in enumerate(names):
        own = labels == number
        shares = [csv_files.number(hits[k][own].mean(), ".6g") if own.any() else "" for k in (1, 5)]
        other = int(wrong[number].argmax())
        times = int(wrong[number, other])
        yield [name, int(own.sum()), *shares, names[other] if times else "", times or ""]


def read_report(folder: Path) -> Report:
    """Reads a report's results.json as untrusted input: every entry that a table needs is checked.

    Raises:
        UserError: there is none, or it is damaged: names the file, the entry, the rule and the value received.
    """
    return Report(folder, read_results(folder / RESULTS_NAME))


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json, or of another file of the same content.

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
        raise UserError(f"{path} is damaged, it is not JSON: {error}. Make it again with --overwrite") from error

    def check(name: str, rule: str, holds: bool) -> None:
        if not holds:
            value = results.get(name) if isinstance(results, dict) else results
            raise UserError(f"{path} is damaged: {name} must {rule}, got {value!r}. Make it anew with --overwrite")

    check("the file", "hold a JSON object", isinstance(results, dict))
    if "detections" in results:
        raise UserError(f"{path} is of a csv file of detections: it tells of no network to compare")
    for name in _TEXTS:
        check(name, "be text", isinstance(results.get(name), str))
    for name in _COUNTS:
        check(name, "be a whole number", type(results.get(name)) is int and _is_number(results[name]))
    for name in _NUMBERS:
        check(name, "be a number", _is_number(results.get(name)))
    clips = results["gmacs_per_video"] / (results["gmacs_per_clip"] or math.inf)
    check("gmacs_per_video", "be that of 0 to 1,000,000 clips", 0 <= clips <= 1e6)
    check("params", "be a number", _is_number(results.get("params", 0)))
    for name in ("map",) if "map" in results else ("top1", "top5"):
        check(name, "be in [0, 1]", _is_number(results.get(name)) and 0 <= results[name] <= 1)
    return results


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def other_settings(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of those of `settings` that a report had otherwise; ones that it does not mention do not count."""
    told = {name for name in settings if name in results} - {"weights"}  # the same file may have several paths
    if "records_sha256" in told:
        told.discard("records")
    return sorted(name for name in told if results[name] != settings[name])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    atomic_write(path, json.dumps(content, indent=1).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a csv atomically; `csv_files` guards text that a spreadsheet would take for a formula."""
    atomic_write(path, csv_files.encoded(rows))
