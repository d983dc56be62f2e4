"""What the persons in a video file do, once a second: their boxes come from a csv file or from a person detector.

As in AVA: a clip around each whole second, whose boxes stand still for it. Other than in tests the network sees the
whole frame and not its centre square, so that persons at the sides are seen, too.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import tensorflow as tf
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from x3d_tf.data import transforms
from x3d_tf.data.boxes import is_nonempty
from x3d_tf.data.datasets.ava import BoxTable, KeyFrame, one_row_per_action, read_boxes
from x3d_tf.data.preview import COLOURS
from x3d_tf.data.records.format import as_stored
from x3d_tf.data.sampling import decoded_short_side, key_frame_indices
from x3d_tf.data.video.clip_reader import cut_clips
from x3d_tf.data.video.decode import Pixels, frame_at, probe, read_frames
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.modeling.detection import Detector
from x3d_tf.plots import shortened
from x3d_tf.terminal import progress_bar
from x3d_tf.types import Box

Boxes = NDArray[np.float32]  # x1, y1, x2, y2 in [0, 1] of the frame, [n, 4]
PersonBoxes = Callable[[int, Pixels], Boxes]  # by second and picture

_Place = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_PERSON = 1  # number of the class in COCO's label map, which TensorFlow's detectors share
_UNLIMITED = 1 << 30  # pixels
_CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"


class ActionScores(NamedTuple):
    """What persons do at a second of a video.

    Attributes:
        second: of the file, see `video.VideoInfo.start`.
        boxes: x1, y1, x2, y2 in [0, 1] of the frame, float32 [n, 4].
        scores: float32 [n, classes].
    """

    second: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


class CsvBoxes:
    """The boxes that a csv file lists.

    Args:
        path: in the format of `ava.read_boxes`, with a score in the last column, whose actions do not matter.
        score: boxes with a lower one are left out.
        starts_at: timestamp of the videos' first frame.

    Raises:
        UserError: the file cannot be read, or what is wrong with one of its lines; no box has that score.
    """

    def __init__(self, path: str | Path, score: float, starts_at: int = 0) -> None:
        table = read_boxes(path, "detections", None, seconds=(starts_at, 10**9 - 1))
        self._of: dict[str, dict[int, dict[Box, None]]] = {}  # each box once, whatever it does
        sure = table.scores >= score
        rule = f"have boxes with a score, the last column, of {score:g} or more (--box_score)"
        highest = f"{table.scores.max():g} at most" if len(table) else "no boxes"
        require(bool(sure.any()), str(path), rule, highest)
        self.unsure = len(table) - int(sure.sum())  # rows left out
        for number, box, taken in zip(table.frames, table.boxes, sure):
            frame = table.key_frames[number]
            seconds = self._of.setdefault(frame.video, {})
            x1, y1, x2, y2 = box.tolist()
            if taken and x1 < x2 and y1 < y2:
                seconds.setdefault(frame.second - starts_at, {})[x1, y1, x2, y2] = None

    def of_video(self, name: str) -> PersonBoxes | None:
        """Those of a video, by its name without ending; None where the file does not name it."""
        seconds = self._of.get(name)
        if seconds is None:
            return None
        return lambda second, pixels: np.array(list(seconds.get(second, ())), np.float32).reshape(-1, 4)

    def after(self, name: str, seconds: int) -> int:
        """How many boxes of a video are of seconds that it does not reach."""
        return sum(len(boxes) for second, boxes in self._of.get(name, {}).items() if second >= seconds)


class PersonDetector:
    """Boxes by a SavedModel with the signature of TensorFlow's object detection.

    It takes a picture, uint8 (1, H, W, 3), and gives `detection_boxes` (1, n, 4) as y1, x1, y2, x2 in [0, 1],
    `detection_scores` and `detection_classes` (1, n), 1 being a person. A SavedModel is a program: run those that you
    trust.

    Args:
        path: its folder.
        score: boxes with a lower one are left out.

    Raises:
        UserError: there is no such model, or it has another signature.
    """

    def __init__(self, path: str | Path, score: float) -> None:
        try:
            self._module = tf.saved_model.load(str(path))  # which its signatures live by
            self._signature = self._module.signatures["serving_default"]
        except (OSError, KeyError, ValueError, AttributeError, tf.errors.OpError) as error:
            raise UserError(f"{path} is no SavedModel with a signature serving_default: {error}") from error
        given, outputs = self._signature.structured_input_signature[1], self._signature.structured_outputs
        wanted = ("detection_boxes", "detection_classes", "detection_scores")
        fits = len(given) == 1 and set(wanted) <= set(outputs)
        rule = f"take one picture and give {', '.join(wanted)}"
        require(fits, f"the signature of {path}", rule, [*given, *outputs])
        ((self._input, self._spec),) = given.items()
        self._path, self._score = path, score

    def __call__(self, second: int, pixels: Pixels) -> Boxes:
        """The persons in a picture.

        Raises:
            UserError: the model fails on it, or gives something else than its signature says.
        """
        try:
            answer = self._signature(**{self._input: tf.cast(pixels[None], self._spec.dtype)})
        except (ValueError, TypeError, tf.errors.OpError) as error:
            reason = str(error).strip().splitlines()[0]
            what = f"on the picture of second {second}, {pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise UserError(f"the person detector {self._path} fails {what}: {reason}") from error
        boxes, scores, classes = (answer[f"detection_{part}"].numpy() for part in ("boxes", "scores", "classes"))
        shapes = [boxes.shape, scores.shape, classes.shape]
        count = boxes.shape[1] if boxes.ndim == 3 else 0
        of_one = f"detection_boxes, scores and classes of {self._path}"
        require(shapes == [(1, count, 4), (1, count), (1, count)], of_one, "be (1, n, 4), (1, n) and (1, n)", shapes)
        chosen = boxes[0][(scores[0] >= self._score) & (np.round(classes[0]) == _PERSON)][:, [1, 0, 3, 2]]
        inside = bool(((chosen >= -1) & (chosen <= 2)).all())  # which NaN is not; a little outside is usual
        rule = "be numbers in 0..1 of the picture, not pixels"
        require(inside, f"detection_boxes of {self._path}", rule, np.array2string(chosen[:1], precision=4))
        chosen = np.clip(chosen, 0, 1).astype(np.float32)
        return chosen[is_nonempty(chosen).numpy()]


def detect_actions(
    model: Detector, path: str | Path, persons: PersonBoxes, *, progress: bool = True
) -> Iterator[ActionScores]:
    """Scores the actions of the persons in a video, second by second; memory does not grow with its length.

    Args:
        model: the detector.
        path: the video.
        persons: gives the boxes of a second.
        progress: whether a bar on stderr tells how far it is.

    Yields:
        One for each whole second of the file up to the video's last, from 0; without boxes for those before it begins.

    Raises:
        VideoError: it cannot be read, or breaks off.
        UserError: scores that are not numbers.
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
            boxes = persons(before + cut.part, pictures[np.searchsorted(places, keys[cut.part])])
            scores = np.zeros((0, model.num_classes), np.float32)
            if len(boxes):
                pixels = transforms.resize(pictures[np.searchsorted(places, chosen[cut.part])], side)
                scores = scores_of({"clip": pixels[None], "boxes": tf.constant(boxes[None])}).numpy()[0]
                if not np.isfinite(scores).all():
                    raise UserError(f"the network gives scores that are not numbers for {path}")
            bar.update()
            yield ActionScores(before + cut.part, boxes, scores)


def detections(acting: Mapping[str, Sequence[ActionScores]], starts_at: int = 0) -> BoxTable:
    """Boxes and scores as AVA's files have them: a row for each action of a box.

    Args:
        acting: by the name of the video.
        starts_at: timestamp of the videos' first frame.
    """
    frames = tuple(KeyFrame(video, each.second + starts_at) for video, own in acting.items() for each in own)
    rows = [each for own in acting.values() for each in own]
    classes = max((each.scores.shape[1] for each in rows), default=0)
    places = np.repeat(np.arange(len(rows)), [len(each.boxes) for each in rows])
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(each.boxes for each in rows)])
    scores = np.concatenate([np.zeros((0, classes), np.float32), *(each.scores for each in rows)])
    return one_row_per_action(frames, places, boxes, scores)


def draw_video(
    path: str | Path, output: str | Path, acting: Sequence[ActionScores], names: Sequence[str], score: float
) -> None:
    """Writes a video as an mp4 file with its boxes and what they do; boxes stay half a second before and after theirs.

    Args:
        path: the video.
        output: ends in .mp4; replaced if it is there, and whole or not there.
        acting: of its seconds, from 0.
        names: of the actions.
        score: actions with a lower one are not written; three at most of a box.

    Raises:
        VideoError: the video cannot be read.
        WriteError: the file cannot be written.
    """
    output = Path(output)
    info = probe(path)
    rate = Fraction(info.fps).limit_denominator(1001)
    with (
        os_errors_as_write_error(output),
        atomic_path(output) as partial,
        av.open(str(partial), "w", format="mp4") as container,
    ):
        stream: Any = None
        for number, frame in enumerate(read_frames(path, _UNLIMITED)):
            height, width = (side // 2 * 2 for side in frame.pixels.shape[:2])  # which its chroma wants
            if stream is None:
                stream = container.add_stream(_CODEC, rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            place = min(math.floor(Fraction(info.start) + number / rate + Fraction(1, 2)), len(acting) - 1)
            picture = _drawn(frame.pixels[:height, :width], acting[place], names, score)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def format_actions(acting: ActionScores, names: Sequence[str], score: float) -> list[list[str]]:
    """What each box does: up to three actions of at least that score, highest first."""
    best = [np.argsort(-scores, kind="stable")[:3] for scores in acting.scores]
    return [
        [f"{names[index]} {scores[index]:.0%}" for index in own if scores[index] >= score]
        for own, scores in zip(best, acting.scores)
    ]


def _drawn(pixels: Pixels, acting: ActionScores, names: Sequence[str], score: float) -> Pixels:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    pen, size = ImageDraw.Draw(picture), max(10, picture.height // 36)
    corners = acting.boxes * np.array((picture.width, picture.height) * 2)
    colours = [COLOURS[number % len(COLOURS)][1] for number in range(len(corners))]
    for box, colour in zip(corners.tolist(), colours):
        pen.rectangle(box, outline=colour, width=max(2, size // 6))
    longest = min(int(picture.width / (0.65 * size)), 36)  # characters of a line
    written: list[_Place] = []
    for (x1, y1, _, _), actions, colour in zip(corners.tolist(), format_actions(acting, names, score), colours):
        if not actions:
            continue
        text = "\n".join(shortened(each, longest) for each in actions)
        left, top, right, bottom = pen.multiline_textbbox((2, 0), text, _font(size))
        place = _free_place((x1, y1, x1 + right + left, y1 + bottom + top), picture.size, written)
        pen.rectangle(place, fill=colour)
        ink = (0, 0, 0) if colour[1] > 150 else (255, 255, 255)  # green makes a colour bright
        pen.multiline_text((place[0] + 2, place[1]), text, ink, _font(size))
        written.append(place)
    return np.asarray(picture)


def _free_place(place: _Place, size: tuple[int, int], written: Sequence[_Place]) -> _Place:
    """The nearest place of a text that is within the picture and, if there is room below, over no other text."""
    width, height = place[2] - place[0], place[3] - place[1]
    left = max(min(place[0], size[0] - 1 - width), 0.0)
    highest = max(min(place[1], size[1] - 1 - height), 0.0)
    top = highest
    for other in sorted(written, key=lambda other: other[1]):
        if left < other[2] and other[0] < left + width and top < other[3] and other[1] < top + height:
            top = other[3] + 1
    top = top if top + height < size[1] else highest
    return left, top, left + width, top + height


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's font, which has Greek, Cyrillic and Arabic letters; Pillow's has Latin ones only."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
