"""Videos in the SequenceExamples of TFRecord files, as Model Garden, DMVR and MediaSequence write them.

Model Garden reads the frames `image/encoded` and the labels `clip/label/index` alone. The other features are optional.
The files are untrusted. Imports no TensorFlow.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from x3d_tf.data.records.frames import frame_spans
from x3d_tf.data.records.framing import RecordError, read_record, stated_length
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES
from x3d_tf.data.video.decode import MAX_RECORD_BYTES, EncodedVideo, VideoError
from x3d_tf.data.video.image_sequences import to_jpeg
from x3d_tf.errors import UserError
from x3d_tf.files import SMALL, require_regular
from x3d_tf.wire import Span, fields, inside, varint

LABELS, NAME, RATE = "clip/label/index", "clip/media_id", "image/frame_rate"
LABEL_NAMES = ("clip/label/string", "clip/label/text")  # of MediaSequence and of DMVR
START, END = "clip/start/timestamp", "clip/end/timestamp"

_HEAD = 1 << 12  # bytes that are read of each record to find its context
_CONTEXT = 1  # number of the field of a SequenceExample, which is written first
_BYTES_LIST, _FLOAT_LIST, _INT_LIST = 1, 2, 3  # numbers of the fields of a Feature
_FLOAT = struct.Struct("<f")
_MOST_VALUES = 1 << 16  # of a feature of the context
_GZIP = b"\x1f\x8b"


class Example(NamedTuple):
    """A SequenceExample in a TFRecord file.

    Attributes:
        number: number of the record in the file, from 0.
        offset, length: position and number of its bytes.
        labels: class indices when it was listed.
    """

    number: int
    offset: int
    length: int
    labels: tuple[int, ...] | None = None


class Context(NamedTuple):
    """Metadata of a SequenceExample.

    Attributes:
        labels: class indices; None if the feature does not exist.
        label_names: class names; empty if no feature has them.
        name: name of the video; empty if no feature has it.
        frame_rate: frames per second; None if no feature has it, or 0.
        start, end: microsecond of the video at which the record starts and ends; None if no feature has them.
    """

    labels: tuple[int, ...] | None
    label_names: tuple[str, ...]
    name: str
    frame_rate: float | None
    start: int | None
    end: int | None


class Listing(NamedTuple):
    """The records of a TFRecord file with their metadata or errors, and the error that ends the file early."""

    records: list[tuple[Example, Context | VideoError]]
    error: VideoError | None


def list_examples(path: Path) -> Listing:
    """Lists the records of a TFRecord file. Reads no frames. The checksums of the metadata are not verified.

    Raises:
        UserError: the path is not a file.
    """
    try:
        require_regular(path)
        with path.open("rb", buffering=0) as file:
            examples, error = _walk(path, file.fileno())
            return Listing([(example, _context_or_error(path, file.fileno(), example)) for example in examples], error)
    except OSError as error:
        return Listing([], VideoError(path, f"cannot be read: {error.strerror}"))


def _walk(path: Path, file: int) -> tuple[list[Example], VideoError | None]:
    """Returns the records up to the first header that is not valid, and the error at that place."""
    size, position = os.fstat(file).st_size, 0
    examples, bad = list[Example](), False
    while position < size and not bad:
        length = stated_length(os.pread(file, HEADER_BYTES, position))
        offset = position + HEADER_BYTES
        bad = length is None or not 0 < length <= MAX_RECORD_BYTES or offset + length + FOOTER_BYTES > size
        if length is not None and not bad:
            examples.append(Example(len(examples), offset, length))
            position = offset + length + FOOTER_BYTES
    if not bad:
        return examples, None
    if not examples and os.pread(file, 2, 0) == _GZIP:
        return [], VideoError(path, "is compressed; decompress it first")
    reason = f"is truncated, damaged or not a TFRecord file: record {len(examples)} has no valid header"
    return examples, VideoError(path, reason)


def _context_or_error(path: Path, file: int, example: Example) -> Context | VideoError:
    try:
        return _context(_context_bytes(file, example))
    except ValueError as error:
        return VideoError(path, f"has a record {example.number} that is not a SequenceExample: {error}")


def _context_bytes(file: int, example: Example) -> bytes:
    head = os.pread(file, min(example.length, _HEAD), example.offset)
    tag, begin = varint(head, 0, len(head))
    if tag != _CONTEXT << 3 | 2:  # a field of bytes
        return b""
    size, begin = varint(head, begin, len(head))
    if size > min(SMALL, example.length - begin):
        raise ValueError(f"its context has {size} bytes")
    return head[begin : begin + size] if begin + size <= len(head) else os.pread(file, size, example.offset + begin)


def _context(data: bytes) -> Context:
    """Parses a context: entry > key, feature > list > values."""
    features: dict[str, Span] = {}
    for entry in fields(data, 0, len(data), 1):
        keys, values = ([*fields(data, *entry, number)] for number in (1, 2))
        if len(keys) != 1 or len(values) != 1:
            raise ValueError("its context is not a map")
        features[data[slice(*keys[0])].decode("utf-8", "replace")] = values[0]
    names = [_texts(data, features.get(name)) for name in LABEL_NAMES]
    rates = _floats(data, features.get(RATE)) + _ints(data, features.get(RATE))
    start, end = (_ints(data, features.get(name)) for name in (START, END))
    return Context(
        tuple(_ints(data, features[LABELS])) if LABELS in features else None,
        tuple(names[0] or names[1]),
        "".join(_texts(data, features.get(NAME))[:1]),
        next((rate for rate in rates if rate), None),
        start[0] if start else None,
        end[0] if end else None,
    )


def _values(data: bytes, feature: Span | None, kind: int) -> Iterator[Span]:
    """Yields the values of a feature; all numbers of a feature are one packed value."""
    return inside(data, fields(data, *feature, kind) if feature else (), 1)


def _ints(data: bytes, feature: Span | None) -> list[int]:
    values: list[int] = []
    for begin, end in _values(data, feature, _INT_LIST):
        while begin < end:
            value, begin = varint(data, begin, end)
            values.append(value - (1 << 64) if value >> 63 else value)
            if len(values) > _MOST_VALUES:
                raise ValueError(f"a feature has more than {_MOST_VALUES} values")
    return values


def _floats(data: bytes, feature: Span | None) -> list[float]:
    (begin, end) = next(_values(data, feature, _FLOAT_LIST), (0, 0))
    return [*_FLOAT.unpack_from(data, begin)] if end - begin >= _FLOAT.size else []


def _texts(data: bytes, feature: Span | None) -> list[str]:
    values: list[str] = []
    for span in _values(data, feature, _BYTES_LIST):
        values.append(data[slice(*span)].decode("utf-8", "replace"))
        if len(values) > _MOST_VALUES:
            raise ValueError(f"a feature has more than {_MOST_VALUES} values")
    return values


def is_intact(path: Path, example: Example) -> bool:
    """Returns True if the checksums of a record match its bytes."""
    try:
        _read(path, example)
    except VideoError:
        return False
    return True


def encode_example(path: Path, example: Example, short_side: int, quality: int, fps: float) -> EncodedVideo:
    """Returns the frames of a record. RGB JPEG frames that need no scaling are copied unchanged.

    Args:
        path: TFRecord file.
        example: the record.
        short_side, quality: as in `decode.encode_video`.
        fps: frames per second.

    Raises:
        VideoError: the record is damaged, has other labels than when it was listed, or has no frames; or its frames
            cannot be decoded, differ in size or exceed 1 GiB.
    """
    record, where = _read(path, example), f"has a record {example.number}"
    frames: list[bytes] = []
    sizes: dict[tuple[int, int], None] = {}
    try:
        if _context(_first_field(record)).labels != example.labels:
            raise VideoError(path, f"{where} whose labels have changed during the build")
        total = 0
        for begin, end in frame_spans(record):
            jpeg, size = to_jpeg(record[begin:end], short_side, quality)
            sizes.setdefault(size)
            frames.append(jpeg)
            total += len(jpeg)
            if total > MAX_RECORD_BYTES:
                raise VideoError(path, f"{where} whose frames exceed {MAX_RECORD_BYTES} bytes as JPEG")
            if len(sizes) > 1:
                before, now = sizes
                raise VideoError(path, f"{where} whose frame {len(frames) - 1} has the size {now}, not {before}")
    except VideoError:
        raise
    except ValueError as error:
        raise VideoError(path, f"{where} whose frame {len(frames)} cannot be read: {error}") from error
    if not frames:
        raise VideoError(path, f"{where} without frames: it has no image/encoded")
    return EncodedVideo(frames, float(np.float32(fps)))


def _first_field(record: bytes) -> bytes:
    span = next(fields(record, 0, len(record), _CONTEXT), (0, 0))
    return record[slice(*span)]


def _read(path: Path, example: Example) -> bytes:
    """Reads the bytes of a record and verifies both checksums.

    Raises:
        VideoError: the file cannot be read, or a checksum differs.
    """
    try:
        require_regular(path)
        return read_record(path, example.offset, example.length)
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from error
    except UserError as error:  # the file was replaced
        raise VideoError(path, "is no longer a file") from error
    except RecordError as error:
        raise VideoError(path, f"has a damaged record {example.number}, at byte {example.offset}: {error}") from error
