"""The records that training reads: one `tf.train.SequenceExample` a video, frames as JPEG, in sharded TFRecord files.

Feature names are MediaSequence's, which Model Garden and DMVR read too. This is the only module that knows them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import tensorflow as tf

from x3d_tf._checks import UserError
from x3d_tf.data.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard, Split, index_shard
from x3d_tf.data.video import EncodedVideo, VideoError

VIDEOS_PER_SHARD = 64  # at 4 to 10 MB a ten-second video a shard is a few hundred megabytes

_CONTEXT = {
    "clip/label/index": tf.io.RaggedFeature(tf.int64),
    "clip/media_id": tf.io.FixedLenFeature([], tf.string),
    "image/frame_rate": tf.io.FixedLenFeature([], tf.float32),
}
_FRAMES = {"image/encoded": tf.io.FixedLenSequenceFeature([], tf.string)}


class Source(NamedTuple):
    """A video on its way into a record: its name, and its classes as ascending indices."""

    media_id: str
    labels: tuple[int, ...]


class ParsedRecord(NamedTuple):
    """A record's content as tensors.

    Attributes:
        frames: JPEG files, string [frames].
        labels: the classes' indices, int64 [labels].
        fps: float32.
        media_id: string.
    """

    frames: tf.Tensor
    labels: tf.Tensor
    fps: tf.Tensor
    media_id: tf.Tensor


def encode_record(video: EncodedVideo, source: Source, classes: Sequence[str]) -> bytes:
    """One video as a serialised SequenceExample; `classes` names all of them. Equal input gives equal bytes."""
    names = [classes[label].encode() for label in source.labels]
    context = {
        "clip/label/index": _ints(source.labels),
        "clip/label/string": _bytes(names),  # MediaSequence's name for it
        "clip/label/text": _bytes(names),  # DMVR's
        "clip/media_id": _bytes([source.media_id.encode()]),
        "image/format": _bytes([b"JPEG"]),
        "image/frame_rate": tf.train.Feature(float_list=tf.train.FloatList(value=[video.fps])),
    }
    microseconds = [round(index * 1e6 / video.fps) for index in range(len(video.frames))]
    frames = {
        "image/encoded": tf.train.FeatureList(feature=[_bytes([jpeg]) for jpeg in video.frames]),
        "image/timestamp": tf.train.FeatureList(feature=[_ints([time]) for time in microseconds]),
    }
    example = tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=frames)
    )
    return bytes(example.SerializeToString(deterministic=True))  # else the order of map entries may vary


def parse_record(serialized: tf.Tensor) -> ParsedRecord:
    """A record's content, in a graph or eagerly; no frame is decoded.

    Raises:
        tf.errors.InvalidArgumentError: bytes that are no such record.
    """
    context, lists = tf.io.parse_single_sequence_example(serialized, _CONTEXT, _FRAMES)
    return ParsedRecord(
        lists["image/encoded"], context["clip/label/index"], context["image/frame_rate"], context["clip/media_id"]
    )


def shard_name(split: str, index: int, count: int) -> str:
    """File name of a shard: `train-00007-of-00064.tfrecord`."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


class ShardWriter:
    """Writes a TFRecord file that appears under its name only when whole: used as a context manager.

    If the block raises, nothing is left behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._writer = tf.io.TFRecordWriter(str(self._partial))
        self._end = 0

    def write(self, record: bytes) -> tuple[int, int]:
        """Appends a record; returns the offset and the length of its data in bytes."""
        self._writer.write(record)
        offset = self._end + HEADER_BYTES
        self._end = offset + len(record) + FOOTER_BYTES
        return offset, len(record)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._partial.replace(self.path)

    @property
    def shard(self) -> Shard:
        """The finished file, once the block has ended."""
        return Shard(self.path.name, self._end, self.sha256)


def write_split(
    folder: Path,
    split: str,
    sources: Sequence[Source],
    encoded: Iterator[EncodedVideo | VideoError],
    classes: Sequence[str],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> Split:
    """Writes the shards of a split, one after the other, holding one video at a time.

    Args:
        folder: where they go.
        split: its name.
        sources: the videos in the order in which they are to lie in the shards.
        encoded: for each source in turn its frames, or why there are none; one element is taken for each source.
        classes: names of the classes.
        on_result: called with each element taken, for progress and for the list of failures.

    Returns:
        The shards and records. A video that failed is left out, and so is a shard in which all failed.
    """
    count = -(-len(sources) // VIDEOS_PER_SHARD)
    shards: list[Shard] = []
    records: list[Record] = []
    for index in range(count):
        written: list[Record] = []
        with ShardWriter(folder / shard_name(split, index, count)) as writer:
            for source in sources[index * VIDEOS_PER_SHARD : (index + 1) * VIDEOS_PER_SHARD]:
                video = next(encoded)
                if isinstance(video, EncodedVideo):
                    position = writer.write(encode_record(video, source, classes))
                    frames = len(video.frames)
                    written.append(Record(len(shards), *position, frames, video.fps, source.labels, source.media_id))
                on_result(video)
        if written:
            shards.append(writer.shard)
            records += written
        else:
            writer.path.unlink()
    return Split(tuple(shards), tuple(records))


def read_index(shards: Sequence[Path]) -> tuple[Record, ...]:
    """Rebuilds the index of a split from its shards: positions from the record headers, the rest from the records.

    Raises:
        UserError: naming the shard that is missing, or the record in it that cannot be parsed.
    """
    records = []
    for number, path in enumerate(shards):
        if not path.is_file():
            raise UserError(f"{path} is missing")
        with path.open("rb") as file:
            for index, (offset, length) in enumerate(index_shard(path)):
                file.seek(offset)
                try:
                    parsed = parse_record(tf.constant(file.read(length)))
                    media_id = parsed.media_id.numpy().decode()
                except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
                    raise UserError(f"{path}, record {index} cannot be parsed: {error}") from error
                frames, fps, labels = len(parsed.frames), float(parsed.fps), tuple(parsed.labels.numpy().tolist())
                records.append(Record(number, offset, length, frames, fps, labels, media_id))
    return tuple(records)


def _ints(values: Sequence[int]) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _bytes(values: Sequence[bytes]) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
