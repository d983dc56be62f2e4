"""Index of the records: shards, and the position of each record in them. Imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from x3d_tf.errors import require

HEADER_BYTES, FOOTER_BYTES = 12, 4  # of a TFRecord: length and its checksum; checksum of the data

MAX_SECONDS = 1e9  # of a time in a video
LARGEST = 2**62  # of positions, lengths and counts
_MAX_MARGIN = 60  # seconds; a larger margin would let clips pass that are longer than any record of a key frame

MAX_OFFICIAL_SPLITS = 100  # the comparison of reports lists those that are missing

VIDEOS_PER_SHARD = 64  # a few hundred megabytes, at 4 to 10 MB per ten-second video


def media_id(video: str, start: float = 0.0, end: float | None = None, key_frame: int | None = None) -> str:
    """Returns the name of a record, which its file stores; nothing parses it.

    Args:
        video: name of the video.
        start, end: the stored segment in seconds of the video; an end of None is the end of the video.
        key_frame: second of the key frame, which replaces the segment.

    Returns:
        `video,0902` for a key frame, `video#2.5-4.0` for a segment, and `video` for a complete video.
    """
    if key_frame is not None:
        return f"{video},{key_frame:04d}"
    if start == 0 and end is None:
        return video
    return f"{video}#{start}-{'' if end is None else end}"


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
        video: name of the video, such as its path in the source folder. A video may have several records.
        start: second of the video at which the record starts; 0 for key frames.
        end: second of the video at which the record ends; None for the end of the video, and for key frames.
        key_frame: second of the key frame, as annotated; None except for action detection.
        recording: name of the recording that the video was cut from; empty if no other video was.
    """

    shard: int
    offset: int
    length: int
    frames: int
    fps: float
    labels: tuple[int, ...]
    video: str
    start: float = 0.0
    end: float | None = None
    key_frame: int | None = None
    recording: str = ""

    @property
    def media_id(self) -> str:
        """Name of the record, unique in its split."""
        return media_id(self.video, self.start, self.end, self.key_frame)


@dataclass(frozen=True)
class Shard:
    """A TFRecord file: its name in the records folder, its size in bytes and the SHA-256 of its content."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A split of the data, such as "train".

    Attributes:
        shards: the shards.
        records: the records, in shard order.
        expected: number of videos that the data set lists for the split, including missing ones; None if it has no
            list.
    """

    shards: tuple[Shard, ...]
    records: tuple[Record, ...]
    expected: int | None = None

    @property
    def present(self) -> int:
        """Number of videos with at least one record."""
        return len({record.video for record in self.records})


class OfficialSplit(NamedTuple):
    """One of the official divisions of a data set into training and test videos.

    UCF101 and HMDB51 have three, and their published figures are means over the three.

    Attributes:
        number: its number, 1..`total`.
        total: how many the data set has.
    """

    number: int
    total: int


@dataclass(frozen=True)
class KeyFrameInfo:
    """Common properties of records that hold key frames, for action detection.

    Attributes:
        margin: seconds stored before and after a key frame, at most 60.
        starts_at: timestamp of the first frame of the videos, in seconds.
        frame_rate: images per second of folders of frames; None if all videos are files.
        proposals: splits with boxes from a person detector.
        listed: number of key frames that the data set lists for each split, including those of missing videos.

    Raises:
        UserError: names the field, the rule and the value received.
    """

    margin: float
    starts_at: float
    frame_rate: float | None
    proposals: tuple[str, ...]
    listed: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, most in (("margin", _MAX_MARGIN), ("starts_at", MAX_SECONDS), ("frame_rate", MAX_SECONDS)):
            value = getattr(self, name)
            valid = type(value) in (int, float) and 0 <= value <= most
            valid = valid or (name == "frame_rate" and value is None)
            require(valid, f"key_frames.{name}", f"be a number of at least 0 and at most {most:.0f}", value)
        names = isinstance(self.proposals, tuple) and all(isinstance(name, str) for name in self.proposals)
        require(names, "key_frames.proposals", "be names of splits", self.proposals)
        valid = isinstance(self.listed, dict)
        valid = valid and all(type(count) is int and 0 <= count <= LARGEST for count in self.listed.values())
        require(valid, "key_frames.listed", f"be numbers of at least 0 and at most {LARGEST} by split", self.listed)


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
