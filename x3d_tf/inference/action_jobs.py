"""The job that detects actions: from video files to printed lines, output files and drawings."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

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
from x3d_tf.inference.console import print_written, report_partial
from x3d_tf.inference.drawing import draw_video
from x3d_tf.inference.writers import partial_output
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.saving import load_detector
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted


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
        with report_partial(found, len(paths), self.csv):
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
        print_written([*drawn, *([self.csv] if self.csv else [])])
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
