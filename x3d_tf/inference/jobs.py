"""The job that classifies videos: from video files to printed lines and output files.

`action_jobs` has the one that detects actions. Imports TensorFlow only for networks that run in it.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from x3d_tf import plots
from x3d_tf.data.video.decode import VideoError
from x3d_tf.inference.console import print_videos, print_windows, print_written, report_partial, top_lines
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.inference.writers import csv_table, json_document
from x3d_tf.modeling.expansion import name_of
from x3d_tf.runtimes.exported import ExportedClassifier
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted, distinct_ends

SHEET_ROWS = 30  # rows of a contact sheet at most
_SHEET_FRAMES = 6  # frames of a row


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """Settings of a job that classifies videos.

    Attributes:
        model: run folder, `.keras` file, or exported file.
        at_once: for an exported file, the number of clips that are processed at once; see `ExportedClassifier`.
        temporal_views, window, hop: see `predict_videos`.
        csv, json, contact_sheet: paths of the output files, or None.
        overwrite: whether existing output files may be replaced.
    """

    model: str
    at_once: int | None = None
    temporal_views: int | None = None
    window: float | None = None
    hop: float | None = None
    csv: str | None = None
    json: str | None = None
    contact_sheet: str | None = None
    overwrite: bool = False

    def run(self, paths: Sequence[Path]) -> int:
        """Classifies videos, prints the classes and writes the output files.

        Args:
            paths: the video files.

        Returns:
            The number of files that could not be read.
        """
        tell(f"loading {self.model}")
        model = open_classifier(self.model, self.at_once)
        if model.activation == "sigmoid":
            tqdm.write("Each class has a probability of its own: they do not add up to 1.")
        if isinstance(model, ExportedClassifier):
            tell(f"running in {model.runtime}, {counted(model.at_once, 'clip')} at once")
        else:
            tell(f"compiling the network: the first clips take longer{_faster(self.model)}")
        results = predict_videos(
            model,
            paths,
            temporal_views=self.temporal_views,
            window=self.window,
            hop=self.hop,
            thumbnails=_SHEET_FRAMES if self.contact_sheet else 0,
        )
        network = name_of(model.expansion, model.options.family)
        about = {"model": self.model, "network": network, "task": model.task, "window": self.window}
        if isinstance(model, ExportedClassifier):
            about["exported"] = model.runtime
        tally = _Tally(SHEET_ROWS if self.contact_sheet else 0)
        show = print_videos if self.window is None else print_windows
        with (
            report_partial(tally.videos, len(paths), self.json, self.csv, windows=self.window is not None),
            contextlib.ExitStack() as files,
        ):
            sinks = self._open(files, about, model.class_names)
            show(tally.count(_into(results, sinks)), model.class_names)
        outputs = [path for path in (self.json, self.csv) if path]
        if self.contact_sheet and tally.rows:
            tell(f"drawing {self.contact_sheet}")
            save_contact_sheet(Path(self.contact_sheet), tally, model.class_names, f"{network}, {self.model}")
            outputs.append(self.contact_sheet)
        print_written(outputs)
        return tally.failures

    def _open(
        self, files: contextlib.ExitStack, about: dict[str, Any], names: Sequence[str]
    ) -> list[Callable[[Prediction | VideoError], None]]:
        """Opens the output files. Returns a function for each that adds a result."""
        sinks = []
        if self.json:
            sinks.append(files.enter_context(json_document(self.json, about, names, overwrite=self.overwrite)))
        if self.csv:
            sinks.append(files.enter_context(csv_table(self.csv, names, overwrite=self.overwrite)))
        return sinks


def _faster(model: str) -> str:
    """Returns a hint to the file that is fastest on a CPU; "" on a GPU."""
    from x3d_tf.modeling.kernels import active_kernels

    command = f"python -m x3d_tf.export.onnx --model={shlex.quote(model)} --output=exported"
    return f". Exported files are faster on CPUs: {one_line(command)}" if active_kernels() == "cpu" else ""


def _into(
    results: Iterable[Prediction | VideoError], sinks: Sequence[Callable[[Prediction | VideoError], None]]
) -> Iterator[Prediction | VideoError]:
    """Yields the results after writing each of them."""
    for result in results:
        for add in sinks:
            add(result)
        yield result


class _Tally:
    """Counts results, and keeps the first predictions for a contact sheet.

    Args:
        rows: predictions to keep at most.
    """

    def __init__(self, rows: int) -> None:
        self.rows: list[Prediction] = []
        self.failures = self.predictions = 0
        self.videos: set[str] = set()
        self._limit = rows

    def count(self, results: Iterable[Prediction | VideoError]) -> Iterator[Prediction | VideoError]:
        """Yields the results after counting each of them."""
        for result in results:
            self.videos.add(str(result.path))
            if isinstance(result, VideoError):
                self.failures += 1
            else:
                self.predictions += 1
                self.rows += [result] if len(self.rows) < self._limit else []
            yield result


def save_contact_sheet(path: Path, tally: _Tally, names: Sequence[str], title: str) -> None:
    """Draws the frames of predictions beside their most probable classes, as PNG."""

    rows, ends = tally.rows, distinct_ends(map(Path, tally.videos))
    clips, times = [row.thumbnails for row in rows], [row.times.tolist() for row in rows]
    decimals = plots.decimals(times)

    def label(row: Prediction) -> str:
        seconds = f"{row.start:.{decimals}f} - {row.end:.{decimals}f} s"
        return "\n".join([one_line(ends[row.path]), seconds, *top_lines(row, names, 3)])

    if len(rows) < tally.predictions:
        title += f", the first {len(rows)} of {tally.predictions}"
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_clips(clips, [label(row) for row in rows], path, title, times)
