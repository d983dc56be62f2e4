"""The records of a split in graphs of tf.data: labels, frames, and errors that name the record."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.data.records.format import (
    ParsedRecord,
    ParsedTimes,
    decode_frame,
    diagnose_record,
    parse_record,
)
from x3d_tf.data.records.frames import verify_hint
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.reader import FrameReader, as_numbers, from_numbers
from x3d_tf.data.video.decode import TIME_TOLERANCE
from x3d_tf.errors import UserError, require


@contextmanager
def record_errors_as_user_errors() -> Iterator[None]:
    """Re-raises TensorFlow's error about an unreadable record as a `UserError`.

    The message names the shard, the record, the split and the cause.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = _UNREADABLE.search(error.message)
        if found is None:
            raise
        path, record, *numbers = found.groups()
        offset, length, size = map(int, numbers)
        raise UserError(
            f"{path}: cannot read or decode record {record}, at byte {offset}: "
            f"{diagnose_record(Path(path), offset, length, size)}. {verify_hint(Path(path))}"
        ) from error


# The error of `RecordTable.read`: path, record and split, offset, length, size of the shard.
_UNREADABLE = re.compile(
    r"assertion failed: \[(.*?): cannot read or decode record (\d+ of split .*?), "
    r"at byte (\d+), (\d+) bytes of (\d+)\]",
    re.DOTALL,
)


class StoredFrames(NamedTuple):
    """The frames of a record, which are read when they are needed.

    Attributes:
        record: index of the record in its split, int64 scalar.
        spans: position, length and checksum of each frame, int64 [frames, 3].
        reader: returns the frames of a record at some of its spans.
    """

    record: tf.Tensor
    spans: tf.Tensor
    reader: Callable[..., NDArray[np.object_]]

    @property
    def count(self) -> tf.Tensor:
        """Number of frames, int64 scalar."""
        return tf.shape(self.spans, tf.int64)[0]

    def read(self, chosen: tf.Tensor) -> tf.Tensor:
        """Returns frames, JPEG files, string [n]; `chosen` are their indices, int64 [n]."""
        frames = tf.numpy_function(self.reader, [self.record, tf.gather(self.spans, chosen)], tf.string)
        return tf.ensure_shape(frames, chosen.shape)

    def decode(self, chosen: tf.Tensor) -> tf.Tensor:
        """Returns the pixels of frames, uint8 [n, height, width, 3]; `chosen` are their indices, int64 [n]."""
        return decode_frames(self.read(chosen))


class _GraphReader:
    """A reader for graphs. TensorFlow never releases functions of Python in graphs, so this must not hold the table."""

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader

    def without_frames(self, record: np.int64) -> tuple[bytes, NDArray[np.int64]]:
        serialized, spans = self._reader.read(int(record))
        return serialized, as_numbers(spans)

    def frames(self, record: np.int64, spans: NDArray[np.int64]) -> NDArray[np.object_]:
        frames = np.empty(len(spans), object)  # strings would lose zeros at their end
        frames[:] = self._reader.frames(int(record), from_numbers(spans))
        return frames


class RecordTable:
    """Index of a split's records, as tensors."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        part = manifest.split(split)
        require(len(part.records) > 0, f"split {split!r} of {manifest.folder}", "contain records")
        self._reader = _GraphReader(FrameReader(manifest, split))
        self.split, self._count = split, len(part.records)
        with tf.device("cpu"):  # tf.data runs on the CPU, but numeric constants are placed on a GPU by default
            self._paths = tf.constant([os.fsencode(manifest.folder / shard.file) for shard in part.shards])
            self._sizes = tf.constant([shard.bytes for shard in part.shards], tf.int64)
            self._shard = tf.constant([record.shard for record in part.records], tf.int64)
            self._offset = tf.constant([record.offset for record in part.records], tf.int64)
            self._length = tf.constant([record.length for record in part.records], tf.int64)
            self._media_id = tf.constant([record.media_id.encode(errors="replace") for record in part.records])
            labels = [label for record in part.records for label in record.labels]
            self._labels = tf.constant(labels, tf.int64)  # of all records, concatenated
            ends = np.cumsum([0, *(len(record.labels) for record in part.records)])
            self._first_label = tf.constant(ends, tf.int64)  # [records + 1]
        self._classes = len(manifest.classes) if manifest.task == "multi_label" else None

    def __len__(self) -> int:
        return self._count

    def labels(self, record: tf.Tensor) -> tf.Tensor:
        """Returns the classes of a record, int64 [labels]; `record` is an int64 scalar."""
        return self._labels[self._first_label[record] : self._first_label[record + 1]]

    def target(self, record: tf.Tensor) -> tf.Tensor:
        """Returns a record's training target: its class, int32, or for multi-label float32 [classes] of 0 and 1."""
        if self._classes is None:
            return tf.cast(self.labels(record)[0], tf.int32)
        return _multi_hot(self.labels(record), self._classes)

    def clip_target(self, record: tf.Tensor, parsed: ParsedRecord, first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """Returns the training target of the frames `first` to `last`: that of the record unless labels have times."""
        if self._classes is None:
            return self.target(record)
        visible = visible_labels(parsed.timed, first, last, parsed.fps)
        return tf.where(tf.size(parsed.timed.labels) > 0, _multi_hot(visible, self._classes), self.target(record))

    def read(self, record: tf.Tensor, decode: Callable[[ParsedRecord, StoredFrames], Any]) -> Any:
        """Reads a record and returns the result of `decode`, a tensor or a tuple; `record` is an int64 scalar.

        Every failure raises InvalidArgumentError with shard, record and split. The cause is logged, and
        `record_errors_as_user_errors` reports it.
        """

        def load(_: tf.Tensor) -> tuple[tf.Tensor, Any]:
            serialized, spans = tf.numpy_function(self._reader.without_frames, [record], (tf.string, tf.int64))
            parsed = parse_record(tf.ensure_shape(serialized, []))
            frames = StoredFrames(record, tf.ensure_shape(spans, [None, 3]), self._reader.frames)
            with tf.control_dependencies(self._check_listed(record, parsed)):
                return tf.constant(True), decode(parsed, frames)

        # A graph cannot catch errors, but a dataset can skip a failing element; a second element then marks the skip.
        # The file is read in the map, where an error consumes the element. A dataset over the file would fail again at
        # each try, and `ignore_errors` would retry forever.
        found = tf.data.Dataset.range(1).map(load).ignore_errors(log_warning=True)
        placeholder = tf.nest.map_structure(_zeros, found.element_spec)  # begins with False
        readable, content = found.concatenate(tf.data.Dataset.from_tensors(placeholder)).take(1).get_single_element()
        shard = self._shard[record]
        numbers = record, self._offset[record], self._length[record], self._sizes[shard]
        number, byte, bytes_, size = map(tf.strings.as_string, numbers)
        description = [": cannot read or decode record ", number, f" of split {self.split}, at byte ", byte]
        where = tf.strings.join([self._paths[shard], *description, ", ", bytes_, " bytes of ", size])
        with tf.control_dependencies([tf.debugging.Assert(readable, [where])]):
            return tf.nest.map_structure(tf.identity, content)

    def _check_listed(self, record: tf.Tensor, parsed: ParsedRecord) -> list[tf.Operation]:
        """Returns assertions that a record has the labels and the name in the manifest."""
        listed, message = self.labels(record), "shard and manifest are from different builds"
        counts = tf.debugging.assert_equal(tf.size(parsed.labels), tf.size(listed), message)
        with tf.control_dependencies([counts]):  # checked first, because unequal lengths may broadcast
            labels = tf.debugging.assert_equal(parsed.labels, listed, message)
        return [labels, tf.debugging.assert_equal(parsed.media_id, self._media_id[record], message)]


def visible_labels(timed: ParsedTimes, first: tf.Tensor, last: tf.Tensor, fps: tf.Tensor) -> tf.Tensor:
    """Returns the labels of the frames `first` to `last`, inclusive (as PySlowFast for Charades).

    Args:
        timed: labels with their times, which include their ends.
        first, last: indices of frames, int64 scalars.
        fps: frames per second, float32 scalar.

    Returns:
        Class indices, int64 [n]; a class may be repeated.
    """
    rate = tf.cast(fps, tf.float64) / 1e6  # frames per microsecond
    begin = tf.math.ceil(tf.cast(timed.starts, tf.float64) * rate - TIME_TOLERANCE)  # first frame of each label
    end = tf.math.floor(tf.cast(timed.ends, tf.float64) * rate + TIME_TOLERANCE)
    begin, end = tf.maximum(begin, tf.cast(first, tf.float64)), tf.minimum(end, tf.cast(last, tf.float64))
    return tf.boolean_mask(timed.labels, begin <= end)


def _multi_hot(labels: tf.Tensor, classes: int) -> tf.Tensor:
    """Returns float32 [classes], 1 for the given classes and 0 for others."""
    return tf.minimum(tf.reduce_sum(tf.one_hot(labels, classes), axis=0), 1.0)


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def decode_frames(jpegs: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG files, string [n], to pixels, uint8 [n, height, width, 3]."""
    return tf.map_fn(decode_frame, jpegs, fn_output_signature=tf.TensorSpec((None, None, 3), tf.uint8))
