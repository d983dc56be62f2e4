"""Evaluation reports: a folder with results.json, csv tables and, for some tasks, figures.

results.json states its metrics, so that tables of reports know no names of metrics. Imports no TensorFlow.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from x3d_tf import csv_files
from x3d_tf.data.records.index import MAX_OFFICIAL_SPLITS
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.interfaces import Evaluation, Report
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited
from x3d_tf.locks import locked
from x3d_tf.runs.run_folder import RECIPE_FIELDS, names_from_json
from x3d_tf.types import ClipStarts, Combine, FrameSampling, Metric

RESULTS_NAME = "results.json"
_LINES = ("network", "split", "views")
_CHOICES: dict[str, tuple[str, ...]] = {  # settings that the comparison with the paper reads; they may be absent
    "clip_starts": get_args(ClipStarts),
    "frame_sampling": get_args(FrameSampling),
    "combine": get_args(Combine),
}
_COUNTS = ("videos_expected", "videos_present", "key_frames_missing")
_PARAMETERS = ("params", "params_paper")
_LONGEST = 100  # characters of the data set's name
_LARGEST = 10**15  # largest absolute value accepted in results.json
_MOST_METRICS = 20
_METRIC_FIELDS = ("name", "kind", "label")
_SAMPLE = re.compile("[a-z][a-z ]*[a-z]")


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


def settings_of(evaluation: "Evaluation") -> dict[str, Any]:
    """Returns the settings of an evaluation as results.json states them, with the noun of its samples and its metrics.

    Raises:
        UserError: a setting is invalid, see `check_settings`, or cannot be written as JSON; a metric has the name of a
            setting.
    """
    stated = metrics_to_json(evaluation.metrics)
    settings = _as_json({**evaluation.settings(), "sample": evaluation.sample, "metrics": stated})
    check_settings(settings)
    both = [metric.name for metric in evaluation.metrics if metric.name in settings]
    require(not both, "the names of metrics", "not be names of settings", both)
    return settings


def results_of(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of results.json.

    Args:
        settings: the settings, from `settings_of`.
        values: the values that were measured, by name. NumPy's numbers and arrays become numbers and lists.

    Raises:
        UserError: a value has the name of a setting, or cannot be written as JSON; a metric has no value, or an invalid
            one.
    """
    both = sorted(settings.keys() & values.keys())
    require(not both, "the names of measured values", "not be names of settings", both)
    return _as_json({**settings, **values, **metric_values(stated_metrics(settings), values)})


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as they are read from JSON.

    Raises:
        UserError: a value has no form in JSON, or is or contains NaN or an infinity.
    """
    converted = dict[str, Any]()
    for name, value in values.items():
        try:
            converted[name] = json.loads(json.dumps(value, allow_nan=False, default=_plain))
        except (TypeError, ValueError, RecursionError):
            require(False, name, "be a value for JSON with finite numbers", value)
    return converted


def _plain(value: Any) -> Any:
    """Returns numbers and arrays of NumPy as numbers and lists of Python."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


@contextmanager
def writing_report(folder: Path, settings: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Report]:
    """Writes results.json after the block has written the other files: a folder that contains it is complete.

    Args:
        folder: folder of the report, created if it does not exist. An existing report is replaced.
        settings: see `results_of`.
        values: see `results_of`.

    Yields:
        The report.

    Raises:
        UserError: see `results_of`; the folder is left as it is.
    """
    report = Report(folder, results_of(settings, values))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_NAME).unlink(missing_ok=True)
    yield report
    write_json(folder / RESULTS_NAME, report.results)


def read_report(folder: Path) -> Report:
    """Reads a report. results.json is treated as untrusted: every field that a table needs is checked.

    Raises:
        UserError: results.json does not exist or is invalid; names the file, the field, the rule and the value.
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
    if isinstance(results, dict) and isinstance(results.get("detections"), str):  # the path of the csv file
        raise UserError(f"{path} must be the report of a network, not of a csv file of detections")
    try:
        require(isinstance(results, dict), "the file", "contain a JSON object", results)
        check_settings(results)
        metric_values(stated_metrics(results), results)
    except UserError as error:
        what = "is not a report of this version of x3d_tf"
        raise UserError(f"{path} {what}: {error}. Repeat the evaluation with --overwrite") from error
    return dict(results)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks the settings of results.json that tables need, apart from the values of the metrics.

    - network, split, views: a line of text each; records: a text; dataset: a short text, optional
    - sample: a noun for what is counted, such as "key frame"
    - samples, classes: integers of at least 1
    - gmacs_per_clip, gmacs_per_sample: numbers of at least 0; params, params_paper: optional, see `modeling.cost.Cost`
    - classes_without_positives: a list of names, optional
    - exported: the format of the exported file that ran, such as "TFLite int8": a line of text; optional
    - official_split, official_splits: its number and how many there are, optional
    - training: an object with settings_sha256, init or null, and optionally records_sha256 and the names of
      `RECIPE_FIELDS`; optional
    - metrics: a list of 1 to 20 objects with name, kind and label; see `Metric`

    Raises:
        UserError: names the field, the rule and the value.
    """
    for name in (*_LINES, *({"exported"} & settings.keys())):
        value = settings.get(name)
        valid = isinstance(value, str) and value.isprintable() and bool(value.strip())
        require(valid, name, "be one printable line", value)
    require(isinstance(settings.get("records"), str), "records", "be a string", settings.get("records"))
    sample: Any = settings.get("sample")
    valid = isinstance(sample, str) and len(sample) <= _LONGEST and bool(_SAMPLE.fullmatch(sample))
    rule = f"be a noun of 2 to {_LONGEST} letters a to z and spaces, with a letter at each end"
    require(valid, "sample", rule, sample)
    for name in ("samples", "classes"):
        value = settings.get(name)
        require(_is_count(value) and value != 0, name, "be an integer in 1..1e15", value)
    for name in ("gmacs_per_clip", "gmacs_per_sample", *_PARAMETERS):
        value = settings.get(name, 0 if name in _PARAMETERS else None)
        require(_is_number(value) and value >= 0, name, "be a number in [0, 1e15]", value)
    for name, values in _CHOICES.items():
        value = settings.get(name, values[0])
        require(value in values, name, f"be one of {', '.join(values)}", value)
    dataset = settings.get("dataset", "")
    require(isinstance(dataset, str) and len(dataset) <= _LONGEST, "dataset", "be a short string", dataset)
    for name in _COUNTS:
        value = settings.get(name)
        require(value is None or _is_count(value), name, "be an integer in 0..1e15, or null", value)
    ignored = settings.get("classes_without_positives", [])
    valid = isinstance(ignored, list) and all(isinstance(name, str) for name in ignored)
    require(valid, "classes_without_positives", "be a list of names", ignored)
    _check_official_split(settings)
    _check_training(settings.get("training"))
    cost = settings["gmacs_per_sample"]
    at_most = cost <= 1e6 * settings["gmacs_per_clip"]
    require(at_most, "gmacs_per_sample", "be at most 1,000,000 times gmacs_per_clip", cost)
    check_metrics(settings.get("metrics"))


def _check_official_split(settings: Mapping[str, Any]) -> None:
    number: Any = settings.get("official_split")
    count: Any = settings.get("official_splits")
    if (number, count) != (None, None):
        dataset = settings.get("dataset")
        require(bool(dataset), "dataset", "be given if official_splits is", dataset)
        valid = _is_count(count) and 1 <= count <= MAX_OFFICIAL_SPLITS
        require(valid, "official_splits", f"be an integer in 1..{MAX_OFFICIAL_SPLITS}", count)
        valid = _is_count(number) and 1 <= number <= count
        require(valid, "official_split", f"be an integer in 1..{count}, of official_splits", number)


def _check_training(training: Any) -> None:
    """Checks what trained the network; see `RunFolder.training_record`."""
    if training is not None:
        require(isinstance(training, dict), "training", "be an object or null", training)
        digest, init = training.get("settings_sha256"), training.get("init")
        require(isinstance(digest, str), "training.settings_sha256", "be a string", digest)
        require(init is None or isinstance(init, str), "training.init", "be a string or null", init)
        records = training.get("records_sha256")
        require(records is None or isinstance(records, str), "training.records_sha256", "be a string or null", records)
        for name in training.keys() & set(RECIPE_FIELDS):
            names_from_json(training[name], f"training.{name}")


def check_metrics(stated: Any) -> None:
    """Checks the entry "metrics" of results.json: 1 to 20 metrics with distinct names and labels.

    Raises:
        UserError: names the rule and the value.
    """
    valid = isinstance(stated, list) and 1 <= len(stated) <= _MOST_METRICS
    require(valid, "metrics", f"be a list of 1 to {_MOST_METRICS}", stated)
    for entry in stated:
        complete = isinstance(entry, dict) and sorted(entry) == sorted(_METRIC_FIELDS)
        require(complete, "metrics", f"be objects with {', '.join(_METRIC_FIELDS)}", entry)
    metrics = [Metric(**entry) for entry in stated]
    for field in ("name", "label"):
        found = [getattr(metric, field) for metric in metrics]
        require(len(set(found)) == len(found), f"the {field}s of metrics", "be distinct", found)


def metric_values(metrics: Sequence[Metric], values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of metrics by name, as numbers of Python.

    Raises:
        UserError: a metric has no value in [0, 1], if it is a share, or no finite value.
    """
    found = {metric.name: _plain(values.get(metric.name)) for metric in metrics}
    for metric in metrics:
        value = found[metric.name]
        if metric.kind == "share":
            require(_is_number(value) and 0 <= value <= 1, metric.name, "be in [0, 1]", value)
        else:
            require(_is_number(value), metric.name, "be a finite number in [-1e15, 1e15]", value)
    return found


def metrics_to_json(metrics: Iterable[Metric]) -> list[dict[str, str]]:
    """Returns the entry "metrics" of results.json."""
    return [{name: getattr(metric, name) for name in _METRIC_FIELDS} for metric in metrics]


def stated_metrics(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Returns the metrics of results.json, the main one first."""
    return tuple(Metric(**entry) for entry in results["metrics"])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def differing_settings(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns the names of the settings whose values differ from those in a report. Ignores settings it lacks."""
    paths = {"weights", "training"}  # the same file may have several, and its hash identifies it
    compared = {name for name in settings if name in results} - paths
    if "records_sha256" in compared:
        compared.discard("records")
    return sorted(name for name in compared if results[name] != settings[name])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object of finite numbers atomically."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a csv file atomically, with text that a spreadsheet would run as a formula escaped."""
    atomic_write(path, csv_files.encoded(rows))
