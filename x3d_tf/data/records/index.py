"""Where records lie: shards, and the place of each record in them. Imports no TensorFlow."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from x3d_tf.errors import UserError
from x3d_tf.text import whole

HEADER_BYTES, FOOTER_BYTES = 12, 4  # what TFRecord puts around each record: length and checksum, checksum

VIDEOS_PER_SHARD = 64  # at 4 to 10 MB a ten-second video a shard is a few hundred megabytes


def segment_id(file: str, start: float | None, end: float | None) -> str:
    """The name of a piece of a file, seconds `start` to `end`: `file#2.5-4.0`; the file's own where it is whole."""
    if start is None and end is None:
        return file
    return f"{file}#{'' if start is None else start}-{'' if end is None else end}"


def parse_segment_file(media_id: str) -> str:
    """The file that a piece is of, by its name as `segment_id` makes it."""
    return re.sub(r"#[\d.e+-]*-[\d.e+-]*$", "", media_id)


def key_frame_id(video: str, second: int) -> str:
    """The name of the record of a key frame: `video,0902`."""
    return f"{video},{second:04d}"


def parse_key_frame_id(media_id: str) -> tuple[str, int]:
    """The video and the second that a key frame is of, by its name as `key_frame_id` makes it.

    Raises:
        UserError: no name of a key frame.
    """
    video, _, text = media_id.rpartition(",")
    second = whole(text)
    if second is None:
        raise UserError(f"the name of a record of a key frame must be VIDEO,SECOND, got {media_id[:100]!r}")
    return video, second


class Record(NamedTuple):
    """One video in a shard.

    Attributes:
        shard: which of its split's shards, from 0.
        offset: first byte of the record's data in the shard.
        length: bytes of the record's data.
        frames: frames of the video.
        fps: frames per second.
        labels: its classes, ascending indices into `Manifest.classes`; exactly one where the task is single-label. Of
            a key frame, those of all its boxes.
        media_id: the video's name: its path below the folder it came from.
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
    """A part of the data, such as "train": its shards and, in shard order, its records."""

    shards: tuple[Shard, ...]
    records: tuple[Record, ...]


def shard_name(split: str, index: int, count: int) -> str:
    """File name of a shard: `train-00007-of-00064.tfrecord`."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


def plan_shards(split: str, videos: int) -> list[tuple[str, slice]]:
    """The shards of a split of so many videos: the name of each, and which of the videos it is to hold."""
    count = -(-videos // VIDEOS_PER_SHARD)
    starts = range(0, videos, VIDEOS_PER_SHARD)
    return [(shard_name(split, i, count), slice(start, start + VIDEOS_PER_SHARD)) for i, start in enumerate(starts)]
