"""Record format: a `tf.train.SequenceExample` per video, with JPEG frames, in sharded TFRecord files.

Feature names follow MediaSequence, which Model Garden and DMVR also read. Only this module uses them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from x3d_tf.data.records.frames import (
    Spans,
    frames_path,
    index_hint,
    open_frames,
    read_spans,
    spans_of,
    write_frames,
)
from x3d_tf.data.records.framing import RecordError, read_record
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard, Split, media_id, plan_shards
from x3d_tf.data.video.decode import EncodedVideo, VideoError, frame_at
from x3d_tf.files import os_errors_as_write_error, temporary_path
from x3d_tf.types import Annotation, Box, TimedLabel

_CONTEXT = {
    "clip/label/index": tf.io.RaggedFeature(tf.int64),
    "clip/label/string": tf.io.RaggedFeature(tf.string),
    "clip/media_id": tf.io.FixedLenFeature([], tf.string),
    "image/frame_rate": tf.io.FixedLenFeature([], tf.float32),
    "segment/start/timestamp": tf.io.RaggedFeature(tf.int64),  # absent unless labels are timed
    "segment/end/timestamp": tf.io.RaggedFeature(tf.int64),
    "segment/label/index": tf.io.RaggedFeature(tf.int64),
}
NO_LABEL = -1  # label of a box without classes
_PROPOSAL = "proposal"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_REGIONS = {
    **{f"region/bbox/{name}": tf.io.RaggedFeature(tf.float32) for name in _SIDES},
    **{f"{_PROPOSAL}/region/bbox/{name}": tf.io.RaggedFeature(tf.float32) for name in _SIDES},
    f"{_PROPOSAL}/region/label/confidence": tf.io.RaggedFeature(tf.float32),
    "region/label/index": tf.io.RaggedFeature(tf.int64),
    "region/is_annotated": tf.io.FixedLenSequenceFeature([], tf.int64),
}
MAX_PIXELS = 1 << 25  # per frame, 8K video has 33,177,600; a small JPEG file can decode to gigabytes
_FRAMES = {"image/encoded": tf.io.FixedLenSequenceFeature([], tf.string)}


class RecordSource(NamedTuple):
    """Metadata of a record to write.

    Attributes:
        video, labels, start, end, key_frame, recording: see `index.Record`.
        annotation: annotation of the key frame, for action detection.
        timed: labels with their times; empty if `labels` apply to the complete record.
    """

    video: str
    labels: tuple[int, ...]
    start: float = 0.0
    end: float | None = None
    key_frame: int | None = None
    annotation: Annotation | None = None
    timed: tuple[TimedLabel, ...] = ()
    recording: str = ""

    @property
    def media_id(self) -> str:
        """Name of the record."""
        return media_id(self.video, self.start, self.end, self.key_frame)


class ParsedTimes(NamedTuple):
    """Labels with their times, as tensors.

    Attributes:
        labels: class indices, int64 [n].
        starts, ends: first and last microsecond after the record's first frame, int64 [n].
    """

    labels: tf.Tensor
    starts: tf.Tensor
    ends: tf.Tensor


class ParsedRecord(NamedTuple):
    """The content of a record without its frames, as tensors.

    Attributes:
        labels: class indices, int64 [labels].
        names: class names, string [labels].
        fps: frames per second, float32 scalar.
        media_id: name of the record, string scalar.
        serialized: the record without its frames, a serialized SequenceExample, string scalar.
        timed: labels with their times; empty if `labels` apply to the complete record.
    """

    labels: tf.Tensor
    names: tf.Tensor
    fps: tf.Tensor
    media_id: tf.Tensor
    serialized: tf.Tensor
    timed: ParsedTimes


class ParsedAnnotation(NamedTuple):
    """The annotations of a key frame, as tensors.

    Attributes:
        key_frame: index among the record's frames, int64 scalar.
        boxes: x1, y1, x2, y2 relative to the frame, in [0, 1]; one row per pair of box and class, float32 [n, 4].
        labels: class of each row, or `NO_LABEL`, int64 [n].
        proposals: boxes from a person detector, float32 [m, 4].
        scores: scores of the proposals, float32 [m].
    """

    key_frame: tf.Tensor
    boxes: tf.Tensor
    labels: tf.Tensor
    proposals: tf.Tensor
    scores: tf.Tensor


def encode_record(video: EncodedVideo, source: RecordSource, classes: Sequence[str]) -> bytes:
    """Serializes a video as a SequenceExample, deterministically; `classes` are the names of all classes."""
    names = [classes[label].encode() for label in source.labels]
    context = {
        "clip/label/index": _ints(source.labels),
        "clip/label/string": _bytes(names),  # MediaSequence
        "clip/label/text": _bytes(names),  # DMVR
        "clip/media_id": _bytes([source.media_id.encode()]),
        "image/format": _bytes([b"JPEG"]),
        "image/frame_rate": tf.train.Feature(float_list=tf.train.FloatList(value=[video.fps])),
    }
    if source.timed:
        context |= _segments(source.timed, video.start, classes)
    microseconds = [round(index * 1e6 / video.fps) for index in range(len(video.frames))]
    frames = {
        "image/encoded": tf.train.FeatureList(feature=[_bytes([jpeg]) for jpeg in video.frames]),
        "image/timestamp": tf.train.FeatureList(feature=[_ints([time]) for time in microseconds]),
    }
    if source.annotation is not None:
        frames |= _regions(source.annotation, frame_at(source.annotation.second, video.start, video.fps), microseconds)
    example = tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=frames)
    )
    return bytes(example.SerializeToString(deterministic=True))  # otherwise the order of map entries varies


def _segments(timed: Sequence[TimedLabel], start: float, classes: Sequence[str]) -> dict[str, tf.train.Feature]:
    """Returns MediaSequence's features of segments; times count from the record's first frame, at second `start`."""

    def microseconds(second: float) -> int:
        return round((second - start) * 1e6)

    return {
        "segment/start/timestamp": _ints([microseconds(label.start) for label in timed]),
        "segment/end/timestamp": _ints([microseconds(label.end) for label in timed]),
        "segment/label/index": _ints([label.label for label in timed]),
        "segment/label/string": _bytes([classes[label.label].encode() for label in timed]),
    }


def _regions(annotation: Annotation, key_frame: int, microseconds: Sequence[int]) -> dict[str, tf.train.FeatureList]:
    """Returns MediaSequence's region features, a list for each frame; only the key frame's list has entries.

    A region is a pair of a box and one of its classes, -1 for a box without classes. Boxes from a person detector have
    the prefix `proposal`.
    """
    regions = [
        (box, label)
        for box, labels in zip(annotation.boxes, annotation.labels, strict=True)
        for label in labels or (NO_LABEL,)
    ]
    lists = _boxes("region/bbox", [box for box, _ in regions])
    lists["region/label/index"] = _ints([label for _, label in regions])
    lists |= _boxes(f"{_PROPOSAL}/region/bbox", annotation.proposals)
    lists[f"{_PROPOSAL}/region/label/confidence"] = _floats(annotation.scores)
    columns = {
        name: tf.train.FeatureList(
            feature=[feature if number == key_frame else _empty_like(feature) for number in range(len(microseconds))]
        )
        for name, feature in lists.items()
    }
    marks = [_ints([int(number == key_frame)]) for number in range(len(microseconds))]
    times = [_ints([time]) for time in microseconds]
    columns["region/is_annotated"] = tf.train.FeatureList(feature=marks)
    columns["region/timestamp"] = tf.train.FeatureList(feature=times)
    return columns


def _boxes(prefix: str, boxes: Sequence[Box]) -> dict[str, tf.train.Feature]:
    return {f"{prefix}/{name}": _floats([box[side] for box in boxes]) for side, name in enumerate(_SIDES)}


def _empty_like(feature: tf.train.Feature) -> tf.train.Feature:
    return _floats(()) if feature.HasField("float_list") else _ints(())


def parse_annotation(serialized: tf.Tensor) -> ParsedAnnotation:
    """Parses the annotations of a record's key frame, in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not a record, or the record does not have exactly one key frame.
    """
    _, lists = tf.io.parse_single_sequence_example(serialized, {}, _REGIONS)
    marked = tf.reshape(tf.where(lists["region/is_annotated"] > 0), [-1])
    exactly_one = tf.debugging.assert_equal(tf.size(marked), 1, "records for action detection have one key frame")
    with tf.control_dependencies([exactly_one]):
        key_frame = marked[0]

    def boxes(prefix: str) -> tf.Tensor:
        return tf.stack([lists[f"{prefix}/{name}"][key_frame] for name in _SIDES], -1)

    return ParsedAnnotation(
        key_frame,
        boxes("region/bbox"),
        lists["region/label/index"][key_frame],
        boxes(f"{_PROPOSAL}/region/bbox"),
        lists[f"{_PROPOSAL}/region/label/confidence"][key_frame],
    )


def parse_record(serialized: tf.Tensor) -> ParsedRecord:
    """Parses a record, with or without its frames, in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not such a record.
    """
    context, _ = tf.io.parse_single_sequence_example(serialized, _CONTEXT, {})
    return ParsedRecord(
        context["clip/label/index"],
        context["clip/label/string"],
        context["image/frame_rate"],
        context["clip/media_id"],
        serialized,
        ParsedTimes(
            context["segment/label/index"], context["segment/start/timestamp"], context["segment/end/timestamp"]
        ),
    )


def parse_frames(serialized: tf.Tensor) -> tf.Tensor:
    """Returns the frames of a complete record, JPEG files, string [frames], in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not a record with frames.
    """
    _, lists = tf.io.parse_single_sequence_example(serialized, {}, _FRAMES)
    return lists["image/encoded"]


def decode_frame(jpeg: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG file to uint8 [height, width, 3], in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: the file is not a JPEG file, or has more than `MAX_PIXELS` pixels.
    """
    shape = tf.cast(tf.io.extract_jpeg_shape(jpeg), tf.int64)  # [height, width, channels], from the header
    small = tf.debugging.assert_less_equal(shape[0] * shape[1], tf.constant(MAX_PIXELS, tf.int64), "too many pixels")
    with tf.control_dependencies([small] if small is not None else []):  # None in eager mode
        return _decode_jpeg(jpeg)


def _decode_jpeg(jpeg: tf.Tensor) -> tf.Tensor:
    # The accurate DCT is the default of other decoders.
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")


class ShardWriter:
    """Context manager that writes a TFRecord file atomically. If the block raises, no file is left.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = temporary_path(path)
        with os_errors_as_write_error(path):
            self._writer = tf.io.TFRecordWriter(str(self._partial))
        self._end = 0

    def write(self, record: bytes) -> tuple[int, int]:
        """Appends a record; returns the offset and the length of its data in bytes."""
        with os_errors_as_write_error(self.path):
            self._writer.write(record)
        offset = self._end + HEADER_BYTES
        self._end = offset + len(record) + FOOTER_BYTES
        return offset, len(record)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(tf.errors.OpError):  # on a full disk, closing fails too
                self._writer.close()
            self._partial.unlink(missing_ok=True)
            return
        try:
            with os_errors_as_write_error(self.path):
                self._writer.close()
                with self._partial.open("rb") as file:
                    os.fsync(file.fileno())
                    self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)  # left only if an error occurred

    @property
    def shard(self) -> Shard:
        """Index entry of the finished file, available after the block."""
        return Shard(self.path.name, self._end, self.sha256)


def write_split(
    folder: Path,
    split: str,
    sources: Sequence[RecordSource],
    encoded: Iterator[EncodedVideo | VideoError],
    classes: Sequence[str],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> Split:
    """Writes the shards of a split sequentially, with one video in memory at a time.

    Args:
        folder: folder for the shards.
        split: name of the split.
        sources: metadata of the videos, in the order of the records.
        encoded: encoded video or error of each source, in the same order.
        classes: class names.
        on_result: called with each element of `encoded`, for progress and for the list of failures.

    Returns:
        The shards and records, without failed videos and without shards in which all videos failed.
    """
    return join_shards(
        [
            write_shard(folder / name, sources[part], encoded, classes, on_result)
            for name, part in plan_shards(split, len(sources))
        ]
    )


def write_shard(
    path: Path,
    sources: Sequence[RecordSource],
    encoded: Iterator[EncodedVideo | VideoError],
    classes: Sequence[str],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> Split:
    """Writes a shard and then the file of its frames, see `frames`; the arguments are those of `write_split`.

    Returns:
        A split with this shard only, empty if all videos failed.

    Raises:
        WriteError: the file cannot be written; no file is left.
    """
    written: list[Record] = []
    spans: list[Spans] = []
    with ShardWriter(path) as writer:
        for source in sources:
            video = next(encoded)
            if isinstance(video, EncodedVideo):
                content = encode_record(video, source, classes)
                offset, length = writer.write(content)
                spans.append(spans_of(content, len(video.frames), offset))
                identity = source.video, source.start, source.end, source.key_frame, source.recording
                written.append(Record(0, offset, length, len(video.frames), video.fps, source.labels, *identity))
            on_result(video)
    if written:
        write_frames(path, writer.shard, spans)
        return Split((writer.shard,), tuple(written))
    with os_errors_as_write_error(path):
        path.unlink()
        frames_path(path).unlink(missing_ok=True)  # of an earlier build, in which a video could be read
    return Split((), ())


def join_shards(parts: Sequence[Split]) -> Split:
    """Concatenates the shards and records of several splits."""
    shards: list[Shard] = []
    records: list[Record] = []
    for part in parts:
        records += [record._replace(shard=record.shard + len(shards)) for record in part.records]
        shards += part.shards
    return Split(tuple(shards), tuple(records))


def diagnose_record(path: Path, offset: int, length: int, size: int) -> str:
    """Finds out why a record could not be read, by reading it again outside the graph.

    Args:
        path: path of the shard.
        offset, length: position and size of the record's data in bytes, from the manifest.
        size: size of the shard in bytes, from the manifest.

    Returns:
        The cause, as a clause without a full stop.
    """
    try:
        if not path.exists():
            return "the file does not exist"
        if not path.is_file():
            return "it is not a file"
        found = path.stat().st_size
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found != size:
        return f"the file has {found} bytes, but the manifest lists {size}: it was truncated or replaced"
    try:
        record = read_record(path, offset, length)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except RecordError as error:
        return str(error)
    try:
        frames = parse_frames(record)
        parse_record(record)
    except tf.errors.InvalidArgumentError:
        return "it is not a video record"
    for number, jpeg in enumerate(frames):
        try:
            decode_frame(jpeg)
        except tf.errors.InvalidArgumentError:
            return f"frame {number} is not a JPEG image of at most {MAX_PIXELS} pixels"
    return _diagnose_frames(path, Record(0, offset, length, len(frames), 0.0, (), ""), record)


def _diagnose_frames(path: Path, record: Record, content: bytes) -> str:
    try:
        found = read_spans(open_frames(path), record)
        same = np.array_equal(found, spans_of(content, record.frames, record.offset))
    except ValueError as error:  # also `UserError`
        return str(error)
    if not same:
        return f"{frames_path(path)} has other positions or checksums than the frames. {index_hint(path)}"
    return "its labels, name, boxes or number of frames differ from the manifest, or the read error was temporary"


def _ints(values: Sequence[int]) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _floats(values: Sequence[float]) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def _bytes(values: Sequence[bytes]) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
