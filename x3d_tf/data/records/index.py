"""Index of the records: shards, and the position of each record in them. Imports no TensorFlow."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from x3d_tf.errors import UserError
from x3d_tf.text import whole

HEADER_BYTES, FOOTER_BYTES = 12, 4  # of a TFRecord: length and its checksum; checksum of the data

VIDEOS_PER_SHARD = 64  # a few hundred megabytes, at 4 to 10 MB per ten-second video


def segment_id(file: str, start: float | None, end: float | None) -> str:
    """Returns the ID of a file's segment, from `start` to `end` in seconds: `file#2.5-4.0`, or `file` if complete."""
    if start is None and end is None:
        return file
    return f"{file}#{'' if start is None else start}-{'' if end is None else end}"


def parse_segment_file(media_id: str) -> str:
    """Returns the file of a segment, from an ID made by `segment_id`."""
    return re.sub(r"#[\d.e+-]*-[\d.e+-]*$", "", media_id)


def key_frame_id(video: str, second: int) -> str:
    """Returns the ID of a key frame's record: `video,0902`."""
    return f"{video},{second:04d}"


def parse_key_frame_id(media_id: str) -> tuple[str, int]:
    """Returns the video and the second of a key frame, from an ID made by `key_frame_id`.

    Raises:
        UserError: the ID has another form.
    """
    video, _, text = media_id.rpartition(",")
    second = whole(text)
    if second is None:
        raise UserError(f"the media_id of a key frame must be VIDEO,SECOND, got {media_id[:100]!r}")
    return video, second


class Record(NamedTuple):
    """A record in a shard.

    Attributes:
        shard: index of its shard in the split.
        offset: position of the first data byte in the shard.
        length: number of data bytes.
        frames: number of frames.
        fps: frames per second.
        labels: ascending indices into `Manifest.classes`; exactly one for single-label tasks. For a key frame, the
            labels of all its boxes.
        media_id: name of the record: the video's path in its source folder, or an ID from `segment_id` or
            `key_frame_id`.
    """

    shard: int
    offset: int
    length: int
    frames: int
    fps: float
    labels: tuple[int, ...]
    media_id: str


@dataclass(frozen=True)
class Shard:
    """A TFRecord file: its name in the records folder, its size in bytes and the SHA-256 of its content."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A split of the data, such as "train": its shards, and its records in shard order."""

    shards: tuple[Shard, ...]
    records: tuple[Record, ...]


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard: `train-00007-of-00064.tfrecord`."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


def plan_shards(split: str, videos: int) -> list[tuple[str, slice]]:
    """Divides the videos of a split into shards; returns the file name and the slice of videos of each shard."""
    count = -(-videos // VIDEOS_PER_SHARD)
    starts = range(0, videos, VIDEOS_PER_SHARD)
    return [(shard_name(split, i, count), slice(start, start + VIDEOS_PER_SHARD)) for i, start in enumerate(starts)]


def with_labels(records: Sequence[Record]) -> tuple[Record, ...]:
    """Returns the key frames with labels, on which detectors are trained."""
    return tuple(record for record in records if record.labels)
