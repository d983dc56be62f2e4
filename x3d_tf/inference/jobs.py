"""Prediction jobs: from video files to printed lines and output files."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from x3d_tf import plots
from x3d_tf.data.ava_files import write_detections
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import require
from x3d_tf.inference.actions import (
    ActionScores,
    CsvBoxes,
    PersonBoxes,
    PersonDetector,
    detect_actions,
    detections,
    format_actions,
)
from x3d_tf.inference.console import print_videos, print_windows, top_lines
from x3d_tf.inference.drawing import draw_video
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.inference.writers import csv_table, json_document, partial_output
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load_classifier, load_detector
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted, distinct_ends

SHEET_ROWS = 30  # rows of a contact sheet at most
_SHEET_FRAMES = 6  # frames of a row


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """Settings of a job that classifies videos.

    Attributes:
        model: run folder or `.keras` file.
        temporal_views, window, hop: see `predict_videos`.
        csv, json, contact_sheet: paths of the output files, or None.
        overwrite: whether existing output files may be replaced.
    """

    model: str
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
        model = load_classifier(self.model)
        if model.activation == "sigmoid":
            tqdm.write("Each class has a probability of its own: they do not add up to 1.")
        tell("compiling the network: the first clips take longer")
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
        tally = _Tally(SHEET_ROWS if self.contact_sheet else 0)
        show = print_videos if self.window is None else print_windows
        with (
            _report_partial(tally.videos, len(paths), self.json, self.csv, windows=self.window is not None),
            contextlib.ExitStack() as files,
        ):
            sinks = self._open(files, about, model.class_names)
            show(tally.count(_into(results, sinks)), model.class_names)
        outputs = [path for path in (self.json, self.csv) if path]
        if self.contact_sheet and tally.rows:
            tell(f"drawing {self.contact_sheet}")
            save_contact_sheet(Path(self.contact_sheet), tally, model.class_names, f"{network}, {self.model}")
            outputs.append(self.contact_sheet)
        _print_written(outputs)
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


@dataclass(frozen=True, kw_only=True)
class DetectJob:
    """Settings of a job that detects the actions of people in videos.

    Attributes:
        model: run folder or `.keras` file of a detector.
        boxes: csv file of people's boxes, or None.
        person_detector: SavedModel that finds people, where `boxes` is None.
        box_score: lowest score of a box.
        action_score: lowest score of an action that is shown.
        starts_at: timestamp of the videos' first frame, seconds.
        csv: path of the detections in AVA's format, or None.
        drawings: the mp4 file to draw for each video, by the video's path; empty for none.
    """

    model: str
    boxes: str | None = None
    person_detector: str | None = None
    box_score: float = 0.8
    action_score: float = 0.5
    starts_at: int = 0
    csv: str | None = None
    drawings: dict[Path, Path]

    def run(self, paths: Sequence[Path]) -> int:
        """Detects actions in videos, prints them and writes the output files.

        Args:
            paths: the video files, with distinct stems.

        Returns:
            The number of files without a prediction.
        """
        boxes = self._load_boxes()
        tell(f"loading {self.model}")
        model = load_detector(self.model)
        found: dict[str, list[ActionScores]] = {}
        failures = 0
        with _report_partial(found, len(paths), self.csv):
            try:
                for path in paths:
                    try:
                        found[path.stem] = self._detect(model, path, boxes)
                    except VideoError as error:
                        tqdm.write(one_line(f"error: {error}"), file=sys.stderr)
                        failures += 1
            except BaseException:
                if self.csv and found:
                    write_detections(partial_output(Path(self.csv)), detections(found, self.starts_at))
                raise
        if self.csv:
            write_detections(Path(self.csv), detections(found, self.starts_at))
        drawn = [str(output) for path, output in self.drawings.items() if path.stem in found]
        _print_written([*drawn, *([self.csv] if self.csv else [])])
        return failures

    def _load_boxes(self) -> "CsvBoxes | PersonDetector":
        if self.person_detector:
            tell(f"loading {self.person_detector}")
            return PersonDetector(self.person_detector, self.box_score)
        require(self.boxes is not None, "boxes", "be given, or person_detector")
        boxes = CsvBoxes(self.boxes or "", self.box_score, self.starts_at)
        if boxes.num_below_threshold:
            ignored = counted(boxes.num_below_threshold, "row")
            print(one_line(f"{self.boxes}: ignored {ignored} with a score below {self.box_score:g} (--box_score)"))
        return boxes

    def _detect(self, model: Detector, path: Path, boxes: "CsvBoxes | PersonDetector") -> list[ActionScores]:
        """Detects the actions in one video, prints and draws them."""
        people = boxes if isinstance(boxes, PersonDetector) else boxes.of_video(path.stem)
        if people is None:
            raise VideoError(path, f"{self.boxes} has no boxes for {path.stem}")
        scores = self._print(model, path, people)
        if isinstance(boxes, CsvBoxes) and (late := boxes.after(path.stem, len(scores))):
            ignored = f"{self.boxes} has {counted(late, 'box')} after its last second, {len(scores) - 1}"
            tqdm.write(one_line(f"{path.name}: {ignored}"))
        if path in self.drawings:
            output = self.drawings[path]
            output.parent.mkdir(parents=True, exist_ok=True)
            tell(f"drawing {output}")
            draw_video(path, output, scores, model.class_names, self.action_score)
        return scores

    def _print(self, model: Detector, path: Path, people: PersonBoxes) -> list[ActionScores]:
        """Detects the actions in one video and prints them second by second."""
        scores = []
        for second in detect_actions(model, path, people):
            scores.append(second)
            for number, actions in enumerate(format_actions(second, model.class_names, self.action_score), 1):
                line = ", ".join(actions) or "no action above the threshold (--action_score)"
                tqdm.write(one_line(f"{path.name}  {second.second:5d} s  person {number}: {line}"))
        return scores


@contextlib.contextmanager
def _report_partial(done: Sized, videos: int, *outputs: str | None, windows: bool = False) -> Iterator[None]:
    """Reports which output files keep the predictions made so far when the block is left early.

    Args:
        done: the videos with predictions; it grows within the block.
        videos: the number of all videos.
        outputs: the output files that were requested.
        windows: whether the last video may lack some windows.
    """
    try:
        yield
    except BaseException:
        kept = [str(partial) for path in outputs if path and (partial := partial_output(Path(path))).is_file()]
        if kept and done:
            last = ", the last one perhaps incomplete" if windows else ""
            what = f"predictions for {len(done)} of {counted(videos, 'video')}{last}"
            print(f"\nkept: {one_line(', '.join(kept))}, {what}", file=sys.stderr)
        raise


def _print_written(outputs: Sequence[str]) -> None:
    if outputs:
        print(one_line(f"written: {', '.join(outputs)}"))
