"""Detects the actions of each person in a video, once per second. Boxes come from a csv file or a person detector.

As in AVA, a clip is centred on each whole second, and a box does not move within its clip. Unlike in evaluation, the
network sees the complete frame instead of its centre square, so that people at the sides are included.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.data import transforms
from x3d_tf.data.ava_files import BoxTable, KeyFrame, one_row_per_action, read_boxes
from x3d_tf.data.boxes import is_nonempty
from x3d_tf.data.sampling import decoded_short_side, key_frame_indices
from x3d_tf.data.video.clip_reader import cut_clips
from x3d_tf.data.video.decode import Pixels, as_stored, frame_at, probe, read_frames
from x3d_tf.errors import UserError, require
from x3d_tf.modeling.detection import Detector
from x3d_tf.terminal import progress_bar
from x3d_tf.types import Box

Boxes = NDArray[np.float32]  # (n, 4): x1, y1, x2, y2 in [0, 1] of the frame
PersonBoxes = Callable[[int, Pixels], Boxes]  # (second, frame) -> boxes

_PERSON = 1  # class number of people in COCO's label map, which TensorFlow's detectors use


class ActionScores(NamedTuple):
    """Action scores of the people at one second of a video.

    Attributes:
        second: second of the file, see `VideoInfo.start`.
        boxes: float32 (n, 4), x1, y1, x2, y2 in [0, 1] of the frame.
        scores: float32 (n, classes), probabilities.
    """

    second: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


class CsvBoxes:
    """Boxes from a csv file.

    Args:
        path: csv in the format of `x3d_tf.data.ava_files.read_boxes`, with a score in the last column. Its actions are
            ignored.
        threshold: lowest score of a box; boxes below it are ignored.
        starts_at: timestamp of the videos' first frame, seconds.

    Attributes:
        num_below_threshold: number of rows that were ignored.

    Raises:
        UserError: the file cannot be read, one of its lines is wrong, or no box reaches the threshold.
    """

    def __init__(self, path: str | Path, threshold: float, starts_at: int = 0) -> None:
        table = read_boxes(path, "detections", None, seconds=(starts_at, 10**9 - 1))
        self._boxes: dict[str, dict[int, dict[Box, None]]] = {}  # dict keys: each box once, for all its actions
        reaches = table.scores >= threshold
        rule = f"have a box with a score, the last column, of {threshold:g} or more (--box_score)"
        found = f"; the highest is {table.scores.max():g}" if len(table) else ""
        require(bool(reaches.any()), str(path), rule + found)
        self.num_below_threshold = len(table) - int(reaches.sum())
        for number, box, valid in zip(table.frames, table.boxes, reaches):
            frame = table.key_frames[number]
            seconds = self._boxes.setdefault(frame.video, {})
            x1, y1, x2, y2 = box.tolist()
            if valid and x1 < x2 and y1 < y2:
                seconds.setdefault(frame.second - starts_at, {})[x1, y1, x2, y2] = None

    def of_video(self, name: str) -> PersonBoxes | None:
        """Returns the boxes for a video, or None if the file does not contain the video.

        Args:
            name: the video's file name without its extension.
        """
        seconds = self._boxes.get(name)
        if seconds is None:
            return None
        return lambda second, pixels: np.array(list(seconds.get(second, ())), np.float32).reshape(-1, 4)

    def after(self, name: str, seconds: int) -> int:
        """Returns the number of boxes of a video at or after a second."""
        return sum(len(boxes) for second, boxes in self._boxes.get(name, {}).items() if second >= seconds)


class PersonDetector:
    """Boxes from a SavedModel with the signature of TensorFlow's object detection API.

    The model takes an image, uint8 (1, H, W, 3), and returns `detection_boxes` (1, n, 4) as y1, x1, y2, x2 in [0, 1],
    `detection_scores` (1, n) and `detection_classes` (1, n), where class 1 is a person. SavedModels can execute
    arbitrary code: only load ones you trust.

    Args:
        path: folder of the SavedModel.
        threshold: lowest score of a box; boxes below it are ignored.

    Raises:
        UserError: the model does not exist, or has another signature.
    """

    def __init__(self, path: str | Path, threshold: float) -> None:
        try:
            self._module = tf.saved_model.load(str(path))  # a reference, without which its signatures stop working
            self._signature = self._module.signatures["serving_default"]
        except (OSError, KeyError, ValueError, AttributeError, tf.errors.OpError) as error:
            raise UserError(f"{path} must be a SavedModel with the signature serving_default: {error}") from error
        inputs, outputs = self._signature.structured_input_signature[1], self._signature.structured_outputs
        wanted = ("detection_boxes", "detection_classes", "detection_scores")
        fits = len(inputs) == 1 and set(wanted) <= set(outputs)
        rule = f"take one image and return {', '.join(wanted)}"
        require(fits, f"the signature of {path}", rule, [*inputs, *outputs])
        ((self._input, self._spec),) = inputs.items()
        self._path, self._threshold = path, threshold

    def __call__(self, second: int, pixels: Pixels) -> Boxes:
        """Returns the boxes of the people in a frame.

        Raises:
            UserError: the model fails, or its outputs do not have the shapes and ranges above.
        """
        try:
            answer = self._signature(**{self._input: tf.cast(pixels[None], self._spec.dtype)})
        except (ValueError, TypeError, tf.errors.OpError) as error:
            reason = str(error).strip().splitlines()[0]
            what = f"on the frame at second {second}, {pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise UserError(f"the person detector {self._path} fails {what}: {reason}") from error
        boxes, scores, classes = (answer[f"detection_{part}"].numpy() for part in ("boxes", "scores", "classes"))
        shapes = [boxes.shape, scores.shape, classes.shape]
        count = boxes.shape[1] if boxes.ndim == 3 else 0
        outputs = f"detection_boxes, scores and classes of {self._path}"
        require(
            shapes == [(1, count, 4), (1, count), (1, count)],
            outputs,
            "have the shapes (1, n, 4), (1, n) and (1, n)",
            shapes,
        )
        chosen = boxes[0][(scores[0] >= self._threshold) & (np.round(classes[0]) == _PERSON)][:, [1, 0, 3, 2]]
        inside = bool(((chosen >= -1) & (chosen <= 2)).all())  # False for NaN; slightly outside is usual
        rule = "be fractions of the image in 0..1, not pixels"
        require(inside, f"detection_boxes of {self._path}", rule, np.array2string(chosen[:1], precision=4))
        chosen = np.clip(chosen, 0, 1).astype(np.float32)
        return chosen[is_nonempty(chosen).numpy()]


def detect_actions(
    model: Detector, path: str | Path, people: PersonBoxes, *, progress: bool = True
) -> Iterator[ActionScores]:
    """Scores the actions of the people in a video, second by second. Memory does not grow with the video's length.

    Args:
        model: the detector.
        path: the video.
        people: returns the boxes for a second.
        progress: whether to show a progress bar on stderr.

    Yields:
        The scores for each whole second of the file from 0 to the video's last. Seconds before the video stream starts
        have no boxes.

    Raises:
        VideoError: the video cannot be read, or is truncated.
        UserError: the network returns scores that are not finite.
    """
    info = probe(path)
    fps, clip, side = float(np.float32(info.fps)), model.clip, model.expansion.test_size
    count = max(1, math.ceil(info.start + info.delivered / fps - 1e-6))
    places = [frame_at(second, info.start, fps) for second in range(count)]
    keys = [place for place in places if 0 <= place < info.delivered]
    before = sum(place < 0 for place in places)
    chosen = [key_frame_indices(key, info.delivered, fps, clip) for key in keys]
    parts = [np.union1d(frames, key)[None] for frames, key in zip(chosen, keys)]
    scores_of = tf.function(lambda given: model(given, training=False), reduce_retracing=True)
    frames = (frame.pixels for frame in read_frames(path, decoded_short_side(model.stored, side)))
    for second in range(before):
        yield ActionScores(second, np.zeros((0, 4), np.float32), np.zeros((0, model.num_classes), np.float32))
    with progress_bar(len(keys), "second", Path(path).name, leave=None, disable=not progress) as bar:
        for cut in cut_clips(frames, parts, lambda pixels: as_stored(pixels, model.stored)):
            places, pictures = parts[cut.part][0], np.stack(cut.frames)
            boxes = people(before + cut.part, pictures[np.searchsorted(places, keys[cut.part])])
            scores = np.zeros((0, model.num_classes), np.float32)
            if len(boxes):
                pixels = transforms.resize(pictures[np.searchsorted(places, chosen[cut.part])], side)
                scores = scores_of({"clip": pixels[None], "boxes": tf.constant(boxes[None])}).numpy()[0]
                if not np.isfinite(scores).all():
                    raise UserError(f"the network returns scores that are not finite for {path}")
            bar.update()
            yield ActionScores(before + cut.part, boxes, scores)


def detections(scores_of: Mapping[str, Sequence[ActionScores]], starts_at: int = 0) -> BoxTable:
    """Converts scores into a table in AVA's format, with one row for each action of each box.

    Args:
        scores_of: the scores of each video, by its name.
        starts_at: timestamp of the videos' first frame, seconds.
    """
    frames = tuple(KeyFrame(video, row.second + starts_at) for video, rows in scores_of.items() for row in rows)
    rows = [row for video_rows in scores_of.values() for row in video_rows]
    classes = max((row.scores.shape[1] for row in rows), default=0)
    places = np.repeat(np.arange(len(rows)), [len(row.boxes) for row in rows])
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(row.boxes for row in rows)])
    scores = np.concatenate([np.zeros((0, classes), np.float32), *(row.scores for row in rows)])
    return one_row_per_action(frames, places, boxes, scores)


def format_actions(scores: ActionScores, names: Sequence[str], threshold: float) -> list[list[str]]:
    """Returns the text of up to three actions for each box, highest score first, without those below the threshold."""
    best = [np.argsort(-row, kind="stable")[:3] for row in scores.scores]
    return [
        [f"{names[index]} {row[index]:.0%}" for index in top if row[index] >= threshold]
        for top, row in zip(best, scores.scores)
    ]
