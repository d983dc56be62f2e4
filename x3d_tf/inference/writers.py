"""Output files of predictions: csv and JSON, written one prediction at a time. Imports no TensorFlow."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from x3d_tf import csv_files
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError, commit_file, os_errors_as_write_error, temporary_path
from x3d_tf.locks import locked

if TYPE_CHECKING:
    from x3d_tf.inference.prediction import Prediction


@contextmanager
def csv_table(
    path: str | Path, class_names: Sequence[str], *, overwrite: bool = False
) -> Iterator[Callable[["Prediction | VideoError"], None]]:
    """Writes a csv file of predictions. Yields the function that adds one.

    Columns: video, start and end in seconds of the file (see `VideoInfo.start`), predicted (the most probable class),
    error, and p(CLASS) for each class. Text that a spreadsheet would take for a formula gets a leading `'`, which
    `x3d_tf.csv_files` removes when it reads the file. The file appears, complete, when the block ends. If the block is
    left early, `partial_output(path)` holds the rows written so far.

    Raises:
        UserError: the file exists and `overwrite` is false.
        WriteError: the file cannot be written; nothing is left behind.
    """
    with _results_file(Path(path), overwrite) as file:
        table = csv_files.Writer(file)
        table.row(["video", "start", "end", "predicted", "error", *(f"p({name})" for name in class_names)])

        def add(result: "Prediction | VideoError") -> None:
            if isinstance(result, VideoError):
                table.row([result.path, "", "", "", result.reason, *("" for _ in class_names)])
                return
            times = (csv_files.number(result.start, ".3f"), csv_files.number(result.end, ".3f"))
            predicted = class_names[result.top(1)[0]]
            table.row(
                [str(result.path), *times, predicted, "", *(csv_files.number(p, ".6g") for p in result.probabilities)]
            )

        yield add


@contextmanager
def json_document(
    path: str | Path, about: Mapping[str, Any], class_names: Sequence[str], *, overwrite: bool = False
) -> Iterator[Callable[["Prediction | VideoError"], None]]:
    """Writes a JSON file of predictions. Yields the function that adds one.

    The file holds one object: the entries of `about`, `classes`, and `predictions`, a list in the order of the videos
    and of time. Each prediction has `video`, and either `error` or `start` and `end` in seconds, `top` (classes with
    their probabilities, highest first) and `probabilities` in the order of `classes`. The file appears, complete, when
    the block ends. If the block is left early, `partial_output(path)` holds the predictions written so far.

    Raises:
        UserError: the file exists and `overwrite` is false.
        WriteError: the file cannot be written; nothing is left behind.
    """
    with _results_file(Path(path), overwrite, end="\n ]\n}\n") as file:
        head = json.dumps({**about, "classes": list(class_names)}, ensure_ascii=False, indent=1)
        file.write(head.removesuffix("\n}") + ',\n "predictions": [')
        separator = "\n  "

        def add(result: "Prediction | VideoError") -> None:
            nonlocal separator
            file.write(separator + json.dumps(_entry(result, class_names), ensure_ascii=False))
            separator = ",\n  "

        yield add


def _entry(result: "Prediction | VideoError", class_names: Sequence[str]) -> dict[str, Any]:
    if isinstance(result, VideoError):
        return {"video": result.path, "error": result.reason}
    probabilities = [float(f"{p:.6g}") for p in result.probabilities]
    return {
        "video": str(result.path),
        "start": round(result.start, 3),
        "end": round(result.end, 3),
        "top": [{"class": class_names[index], "probability": probabilities[index]} for index in result.top()],
        "probabilities": probabilities,
    }


def partial_output(path: Path) -> Path:
    """Returns the path for the results of an interrupted prediction: `out.partial.csv` for `out.csv`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class _Results:
    """A text file that is written one result at a time, after its header."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self.texts, self.broken = 0, False

    def write(self, text: str) -> None:
        try:
            with os_errors_as_write_error(self._path):
                self._file.write(text)
        except WriteError:
            self.broken = True
            raise
        self.texts += 1


@contextmanager
def _results_file(path: Path, overwrite: bool, end: str = "") -> Iterator[_Results]:
    """Yields a file that appears as `path` if the block succeeds, and as `partial_output(path)` if it fails.

    Other processes cannot write the file during the block.

    Args:
        path: the file.
        overwrite: whether an existing file may be replaced.
        end: text that is written last.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another path, or overwrite=True")
    with os_errors_as_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    conflict = f"another process is writing {path}"
    with locked(lock, conflict, "wait for it, or give another path"), _written(path, end) as results:
        yield results


@contextmanager
def _written(path: Path, end: str) -> Iterator[_Results]:
    partial = temporary_path(path)
    with os_errors_as_write_error(path):
        partial.unlink(missing_ok=True)  # it may be a link to another file
        # file names that are not UTF-8 are written as escapes
        file = partial.open("x", newline="", encoding="utf-8", errors="backslashreplace")

    def finish(place: Path) -> None:
        with os_errors_as_write_error(place):
            file.write(end)
            file.close()
            commit_file(partial, place)

    results = _Results(path, file)
    try:
        try:
            yield results
        except BaseException:
            if results.texts > 1 and not results.broken:
                finish(partial_output(path))
            raise
        finish(path)
    finally:
        with suppress(OSError):  # a full disk was reported above
            file.close()
        partial.unlink(missing_ok=True)
