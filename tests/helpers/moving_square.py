"""Small records for tests: a bright square that moves left or right on a black background."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from x3d_tf.data.records.format import RecordSource, write_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo
from x3d_tf.types import Storage

FRAMES, SIDE, SQUARE = 10, 56, 20


def write_records(
    folder: Path, videos: int, classes: Sequence[str] = ("left", "right"), *, also: Sequence[str] = ()
) -> None:
    """Writes records with one split, train.

    Args:
        folder: folder of the records.
        videos: number of videos.
        classes: classes, assigned to the videos in turn.
        also: further classes of every video, which make the task multi-label.
    """
    folder.mkdir(parents=True)
    names = (*classes, *also)
    extra_labels = tuple(range(len(classes), len(names)))
    sources = [RecordSource(f"square/{number}", (number % len(classes), *extra_labels)) for number in range(videos)]
    encoded = (
        EncodedVideo(_frames(number, -1 if source.labels[0] == 0 else 1), 30.0) for number, source in enumerate(sources)
    )
    split = write_split(folder, "train", sources, encoded, names, lambda _: None)
    task: Any = "multi_label" if also else "single_label"
    Manifest(folder, "square", names, {"train": split}, {"source": "test"}, Storage(256, 95), task).save()


def _frames(seed: int, direction: int) -> list[bytes]:
    top, left = np.random.default_rng(seed).integers(0, SIDE, 2)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:SQUARE, :SQUARE] = 255
    shifted = (np.roll(picture, (top, left + 2 * direction * t), (0, 1)) for t in range(FRAMES))
    return [_jpeg(frame) for frame in shifted]


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
