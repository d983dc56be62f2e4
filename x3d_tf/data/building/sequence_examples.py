"""Videos in the SequenceExamples of TFRecord files, as Model Garden, DMVR and MediaSequence write them.

Model Garden reads the frames `image/encoded` and the labels `clip/label/index` alone. The other features are optional.
Imports no TensorFlow at the top. Its protocol buffers are imported when a record is read, but no device is started.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from x3d_tf.crc32c import crc32c
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES
from x3d_tf.data.video.decode import MAX_RECORD_BYTES, EncodedVideo, VideoError
from x3d_tf.data.video.image_sequences import to_jpeg
from x3d_tf.files import require_regular

LABELS, NAME, RATE = "clip/label/index", "clip/media_id", "image/frame_rate"
LABEL_NAMES = ("clip/label/string", "clip/label/text")  # of MediaSequence and of DMVR
FRAMES = "image/encoded"

_LENGTH_BYTES = 8
_HEAD = 1 << 16  # bytes that are read of each record to find its context
_CONTEXT_TAG = b"\x0a"  # of the field `context`, which is written first


class Example(NamedTuple):
    """A SequenceExample in a TFRecord file: position and number of its bytes."""

    offset: int
    length: int


class Context(NamedTuple):
    """Metadata of a SequenceExample.

    Attributes:
        labels: class indices; None if the feature does not exist.
        label_names: class names; empty if no feature has them.
        name: name of the video, or None.
        frame_rate: frames per second, or None.
    """

    labels: tuple[int, ...] | None
    label_names: tuple[str, ...]
    name: str | None
    frame_rate: float | None


def read_contexts(path: Path) -> Iterator[tuple[Example, Context]]:
    """Yields the records of a TFRecord file with their metadata. Reads no frames, and verifies no checksums.

    Raises:
        VideoError: the file cannot be read, is truncated or is no TFRecord file. Its intact records are yielded first.
    """
    try:
        require_regular(path)
        with path.open("rb", buffering=0) as file:
            end, position, number = os.fstat(file.fileno()).st_size, 0, 0
            while position < end:
                offset = position + HEADER_BYTES
                length = int.from_bytes(os.pread(file.fileno(), _LENGTH_BYTES, position), "little")
                position = offset + length + FOOTER_BYTES
                if length > MAX_RECORD_BYTES or position > end:
                    raise VideoError(path, f"is truncated or not a TFRecord file: record {number} does not fit into it")
                yield Example(offset, length), _context(path, file.fileno(), Example(offset, length), number)
                number += 1
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from error


def _context(path: Path, file: int, example: Example, number: int) -> Context:
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    head = os.pread(file, min(example.length, _HEAD), example.offset)
    size = start = 0
    if head.startswith(_CONTEXT_TAG):
        size, start = _varint(head)
    if start + size > example.length:
        raise VideoError(path, f"is not a file of SequenceExamples: the context of record {number} is too long")
    content = head[start : start + size]
    if start + size > len(head):
        content = os.pread(file, size, example.offset + start)
    try:
        features = tf.train.Features.FromString(content).feature
    except DecodeError as error:
        raise VideoError(path, f"is not a file of SequenceExamples: record {number} cannot be parsed") from error
    names = next((features[name].bytes_list.value for name in LABEL_NAMES if name in features), ())
    rates = features[RATE].float_list.value if RATE in features else ()
    media_ids = features[NAME].bytes_list.value if NAME in features else ()
    return Context(
        tuple(features[LABELS].int64_list.value) if LABELS in features else None,
        tuple(name.decode("utf-8", "replace") for name in names),
        media_ids[0].decode("utf-8", "replace") if media_ids else None,
        rates[0] if rates else None,
    )


def _varint(head: bytes) -> tuple[int, int]:
    """Returns the length of a field that begins with a tag of one byte, and the position of its content."""
    size = 0
    for index, byte in enumerate(head[1:11]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size, index + 2
    return MAX_RECORD_BYTES, 1  # too long for any record


def encode_example(path: Path, example: Example, short_side: int, quality: int, fps: float) -> EncodedVideo:
    """Returns the frames of a record. RGB JPEG frames that need no scaling are copied unchanged.

    Args:
        path: TFRecord file.
        example: the record.
        short_side, quality: as in `decode.encode_video`.
        fps: frames per second.

    Raises:
        VideoError: the record is damaged, has no frames, or has frames that cannot be decoded or differ in size.
    """
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        stored = tf.train.SequenceExample.FromString(_read(path, example))
    except DecodeError as error:
        raise VideoError(path, f"has a record at byte {example.offset} that is not a SequenceExample") from error
    lists = stored.feature_lists.feature_list
    images = [feature.bytes_list.value for feature in lists[FRAMES].feature] if FRAMES in lists else []
    if not images or not all(len(image) == 1 for image in images):
        raise VideoError(path, f"has a record at byte {example.offset} without frames in {FRAMES}")
    where = path / f"record at byte {example.offset}"
    frames, sizes = zip(*(to_jpeg(image[0], where, short_side, quality) for image in images))
    if len(set(sizes)) > 1:
        raise VideoError(path, f"has a record at byte {example.offset} whose frames differ in size")
    return EncodedVideo(list(frames), float(np.float32(fps)))


def _read(path: Path, example: Example) -> bytes:
    """Reads the bytes of a record and verifies both checksums."""
    try:
        require_regular(path)
        with path.open("rb", buffering=0) as file:
            start = example.offset - HEADER_BYTES
            content = os.pread(file.fileno(), HEADER_BYTES + example.length + FOOTER_BYTES, start)
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from error
    if len(content) == HEADER_BYTES + example.length + FOOTER_BYTES:
        spans = np.array([0, HEADER_BYTES]), np.array([_LENGTH_BYTES, example.length])
        checksums = [_masked(int(value)) for value in crc32c(content, *spans)]
        stated = [int.from_bytes(content[at : at + 4], "little") for at in (_LENGTH_BYTES, len(content) - 4)]
        if checksums == stated:
            return content[HEADER_BYTES:-FOOTER_BYTES]
    raise VideoError(path, f"has a damaged record at byte {example.offset}: its checksum differs")


def _masked(checksum: int) -> int:
    """Returns a checksum as TFRecord files store it."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
