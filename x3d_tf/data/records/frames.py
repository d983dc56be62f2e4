"""Position and checksum of each frame in a shard, in a small file beside it: `SHARD.frames`. Imports no TensorFlow.

A clip needs a few frames of a record that holds hundreds. With this file they are read and verified alone. A record is
divided into spans: the bytes before its frames, each frame (a JPEG file), and the bytes after its frames. All numbers
are little-endian; R is the number of records and S the number of their spans:

    8 bytes       the text "X3DFRAME"
    uint32        format version, 2
    uint32        R
    uint64        S
    uint64        size of the shard in bytes
    32 bytes      SHA-256 of the shard
    16 bytes x R  for each record, in the order of the shard: int64 position of its first byte in the shard, uint32
                  index of its first span, uint32 number of its spans
    16 bytes x S  for each span: int64 position of its first byte in the shard, uint32 number of bytes, uint32 CRC-32C
    32 bytes      SHA-256 of everything before

The file is untrusted: it is compared with the manifest, and each value is checked before it is used. It follows from
the shard, so it can always be made again.
"""

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.data.records.framing import LARGEST_RECORD
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.files import LARGE, atomic_write, open_regular, read_limited
from x3d_tf.wire import Span, fields, inside, to_varint, varint

_MAGIC, _VERSION = b"X3DFRAME", 2
_HEADER = struct.Struct("<8sIIQQ32s")
_RECORD = np.dtype([("offset", "<i8"), ("first", "<u4"), ("spans", "<u4")])
SPAN = np.dtype([("offset", "<i8"), ("length", "<u4"), ("crc", "<u4")])
_DIGEST_BYTES = 32
_FRAMES = b"image/encoded"
_CONTEXT, _LISTS = 1, 2  # fields of a SequenceExample
_LISTS_TAG = bytes([_LISTS << 3 | 2])

Spans = NDArray[np.void]  # of the type SPAN


class FramesFile(NamedTuple):
    """The file of a shard's frames, whose header was checked.

    Attributes:
        path: path of the file.
        records, spans: numbers of records and spans.
    """

    path: Path
    records: int
    spans: int


def frames_path(shard: Path) -> Path:
    """Returns the path of the file for a shard."""
    return shard.with_name(f"{shard.name}.frames")


def index_hint(shard: Path) -> str:
    """Returns a sentence with the command that writes the file of a shard again."""
    return f"Write it again with: python -m x3d_tf.build_records --output={shard.parent} --index"


def verify_hint(shard: Path) -> str:
    """Returns a sentence with the command that verifies the records in a shard's folder."""
    return f"List all damaged records with: python -m x3d_tf.build_records --output={shard.parent} --verify"


def spans_of(record: bytes, listed: int, offset: int = 0) -> Spans:
    """Finds the frames of a serialized record.

    Args:
        record: the bytes of a `tf.train.SequenceExample`, as `format.encode_record` writes it: the frames are the first
            feature list.
        listed: number of frames that the record should have. The search ends with an error once it has more.
        offset: position of the record's first byte in the shard.

    Returns:
        `listed` + 2 spans: the bytes before the frames, the frames, and the bytes after them.

    Raises:
        ValueError: the bytes are not such a record, or it has another number of frames.
    """
    frames_list = _frames_list(record)
    found = list(islice(_frames_in(record, frames_list), listed + 1))
    if len(found) != listed or not found:
        raise ValueError(f"it has {'more than ' if len(found) > listed else ''}{min(len(found), listed)} frames")
    edges = [(0, found[0][0]), *found, (found[-1][1], len(record))]
    if found[-1][1] != frames_list[1]:
        raise ValueError("its last frame has other features")
    without_frames(record[: found[0][0]], record[found[-1][1] :])  # raises an error unless it can be joined
    rows = [(offset + begin, end - begin, google_crc32c.value(record[begin:end])) for begin, end in edges]
    return np.array(rows, SPAN)


def frame_spans(record: bytes) -> Iterator[Span]:
    """Yields the begin and the end of each frame: feature_lists > entry > list > feature > bytes_list > value.

    Raises:
        ValueError: the bytes are not a record with frames.
    """
    for entry in inside(record, inside(record, [(0, len(record))], _LISTS), 1):
        if _has_frames(record, entry):
            yield from _frames_in(record, entry)


def _frames_list(record: bytes) -> Span:
    """Returns the entry of the frames, which must be the first feature list."""
    lists = list(islice(fields(record, 0, len(record), _LISTS), 2))
    entries = inside(record, lists, 1)
    first = next(entries, None)
    if len(lists) != 1 or lists[0][1] != len(record) or first is None or not _has_frames(record, first):
        raise ValueError("its frames are not its first feature list")
    if any(_has_frames(record, entry) for entry in entries):
        raise ValueError("it has two lists of frames")
    return first


def _has_frames(record: bytes, entry: Span) -> bool:
    return [record[slice(*key)] for key in islice(fields(record, *entry, 1), 2)] == [_FRAMES]


def _frames_in(record: bytes, entry: Span) -> Iterator[Span]:
    for feature in inside(record, fields(record, *entry, 2), 1):
        values = [*islice(inside(record, fields(record, *feature, 1), 1), 2)]
        if len(values) != 1:
            raise ValueError(f"a frame must be one file, got {'several' if values else 'none'}")
        yield values[0]


def without_frames(before: bytes, after: bytes) -> bytes:
    """Returns a record without its frames: a SequenceExample with the same context and the other feature lists.

    Args:
        before: the bytes before the frames. They begin with the context.
        after: the bytes after the frames: the entries of the other feature lists.

    Raises:
        ValueError: the bytes do not begin with a context.
    """
    tag, begin = varint(before, 0, len(before))
    length, begin = varint(before, begin, len(before))
    end = begin + length
    if tag != _CONTEXT << 3 | 2 or before[end : end + 1] != _LISTS_TAG:
        raise ValueError("it does not begin with its context, followed by the feature lists")
    return before[:end] + _LISTS_TAG + to_varint(len(after)) + after


def write_frames(shard_path: Path, shard: Shard, spans: Sequence[Spans]) -> None:
    """Writes the file of a shard atomically.

    Args:
        shard_path: path of the shard.
        shard: the shard's entry in the manifest.
        spans: spans of each record, from `spans_of`.

    Raises:
        WriteError: the file cannot be written.
    """
    content = _packed(shard, spans)
    atomic_write(frames_path(shard_path), content + hashlib.sha256(content).digest())


def _packed(shard: Shard, spans: Sequence[Spans]) -> bytes:
    counts = np.array(list(map(len, spans)), np.int64)
    records = np.zeros(len(spans), _RECORD)
    records["offset"] = [part["offset"][0] for part in spans]
    records["first"], records["spans"] = np.cumsum(counts) - counts, counts
    header = _HEADER.pack(_MAGIC, _VERSION, len(spans), counts.sum(), shard.bytes, bytes.fromhex(shard.sha256))
    return b"".join([header, records.tobytes(), *(part.tobytes() for part in spans)])


def open_frames(shard_path: Path, shard: Shard | None = None) -> FramesFile:
    """Checks the header and the size of the file of a shard.

    Args:
        shard_path: path of the shard.
        shard: the shard's entry in the manifest; None does not compare them.

    Raises:
        UserError: the file does not exist, or is not that of the shard.
    """
    path = frames_path(shard_path)
    try:
        with open_regular(path) as file:
            header, size = os.pread(file.fileno(), _HEADER.size, 0), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {index_hint(shard_path)}") from error
    hint = index_hint(shard_path)
    if len(header) < _HEADER.size:
        raise UserError(f"{path} has {size} bytes, fewer than a file of frames. {hint}")
    magic, version, records, spans, shard_bytes, digest = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, _VERSION):
        raise UserError(f"{path} is not a file of frames, version {_VERSION}. {hint}")
    if shard is not None and (shard_bytes, digest.hex()) != (shard.bytes, shard.sha256):
        raise UserError(f"{path} belongs to another shard than {MANIFEST_NAME} lists. {hint}")
    expected = _HEADER.size + _RECORD.itemsize * records + SPAN.itemsize * spans + _DIGEST_BYTES
    if size != expected or size > LARGE:
        raise UserError(f"{path} has {size} bytes, but its header states {expected}, and it may have {LARGE}. {hint}")
    return FramesFile(path, records, spans)


def read_spans(file: FramesFile, record: Record) -> Spans:
    """Reads the spans of one record.

    Raises:
        UserError: the file cannot be read, does not have the record, or a span does not lie inside the record, after
            the span before it. The message names the record by its position.
    """
    try:
        with open_regular(file.path) as opened:
            return _find_spans(file, record, partial(os.pread, opened.fileno()))
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror}") from error


def _find_spans(file: FramesFile, record: Record, read: Callable[[int, int], bytes]) -> Spans:
    """Returns the checked spans of a record; `read` returns a number of bytes at a position of the file."""

    def rows(dtype: np.dtype[Any], count: int, begin: int) -> NDArray[Any]:
        content = read(dtype.itemsize * count, begin)
        if len(content) < dtype.itemsize * count:
            raise UserError(f"{file.path} was truncated. {index_hint(file.path)}")
        return np.frombuffer(content, dtype)

    def entry(number: int) -> np.void:
        row: np.void = rows(_RECORD, 1, _HEADER.size + _RECORD.itemsize * number)[0]
        return row

    where = f"{file.path}: record at byte {record.offset}"
    number = bisect_left(range(file.records), record.offset, key=lambda number: int(entry(number)["offset"]))
    require(number < file.records, where, "be listed")
    listed, first, count = map(int, entry(number).tolist())
    require(listed == record.offset, where, "be listed")
    rule = f"have {record.frames + 2} of {file.spans} spans"
    require(count == record.frames + 2 and first + count <= file.spans, where, rule, (first, count))
    spans = rows(SPAN, count, _HEADER.size + _RECORD.itemsize * file.records + SPAN.itemsize * first)
    _check_spans(where, spans, record)
    return spans


def _check_spans(where: str, spans: Spans, record: Record) -> None:
    """Raises `UserError` unless the spans lie inside their record, one after the other, and reach from end to end."""
    begins, lengths, end = spans["offset"], spans["length"].astype(np.int64), record.offset + record.length
    contained = (begins >= record.offset) & (begins <= end) & (lengths <= end - np.minimum(begins, end))
    rule = "have spans that lie inside the record, each after the one before it"
    require(record.length <= LARGEST_RECORD and bool(contained.all()), where, rule)
    ordered = (begins[1:] >= (begins + lengths)[:-1]).all() and (lengths[1:-1] > 0).all()
    require(bool(ordered) and begins[0] == record.offset and begins[-1] + lengths[-1] == end, where, rule)


def read_frames_file(shard_path: Path, shard: Shard, records: Sequence[Record]) -> list[Spans]:
    """Reads and checks the complete file of a shard.

    Args:
        shard_path: path of the shard.
        shard: the shard's entry in the manifest.
        records: all records of the shard in the manifest, in its order.

    Returns:
        The spans of each record.

    Raises:
        UserError: the file does not exist, is damaged, or does not fit the manifest.
    """
    file = open_frames(shard_path, shard)
    counts = len(records), sum(record.frames + 2 for record in records)
    rule = f"have the {counts[0]} records and {counts[1]} spans that {MANIFEST_NAME} implies"
    require((file.records, file.spans) == counts, str(file.path), rule, (file.records, file.spans))
    try:
        content = read_limited(file.path, LARGE)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror}") from error
    same = hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
    require(same, str(file.path), "match its own checksum: it is damaged")
    return [_find_spans(file, record, lambda size, begin: content[begin : begin + size]) for record in records]


@dataclass(frozen=True)
class IndexResult:
    """Result of `index_records`: numbers of files that were written, and that existed and fit."""

    written: int
    kept: int


def index_records(folder: str | Path, *, progress: bool = True) -> IndexResult:
    """Writes the file of each shard that has none, or whose file is damaged; an interrupted run resumes.

    Raises:
        UserError: the manifest or a shard does not exist or is damaged.
        WriteError: a file cannot be written.
    """
    manifest = Manifest.load(folder)
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    written = kept = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading shards", disable=not progress) as bar:
        for path, shard, records in shards_of(manifest):
            try:
                read_frames_file(path, shard, records)
                kept += 1
            except UserError:
                write_frames(path, shard, spans_of_shard(path, shard, records))
                written += 1
            bar.update(shard.bytes)
    return IndexResult(written, kept)


def shards_of(manifest: Manifest) -> Iterator[tuple[Path, Shard, list[Record]]]:
    """Yields the path, the entry and the records of each shard."""
    for name in manifest.splits:
        split = manifest.split(name)  # checks that the shards exist
        records: dict[int, list[Record]] = {}
        for record in split.records:
            records.setdefault(record.shard, []).append(record)
        for number, shard in enumerate(split.shards):
            yield manifest.folder / shard.file, shard, records.get(number, [])


def spans_of_shard(path: Path, shard: Shard, records: Sequence[Record]) -> list[Spans]:
    """Finds the frames of a shard by reading all of it.

    Returns:
        The spans of each record.

    Raises:
        UserError: the shard cannot be read, has another SHA-256 than the manifest lists, or has other records.
    """
    found, digest = [], hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, record in enumerate(records):
                content = file.read(HEADER_BYTES + record.length + FOOTER_BYTES)
                digest.update(content)
                start = file.tell() - len(content) + HEADER_BYTES
                require(start == record.offset, f"{path}: record {number}", f"be as {MANIFEST_NAME} lists it")
                try:
                    data = content[HEADER_BYTES : HEADER_BYTES + record.length]
                    found.append(spans_of(data, record.frames, record.offset))
                except ValueError as error:
                    rule = f"does not have the {record.frames} frames that {MANIFEST_NAME} lists"
                    raise UserError(f"{path}: record {number} {rule}: {error}") from error
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != shard.sha256:
        raise UserError(f"{path} has another SHA-256 than {MANIFEST_NAME} lists. {verify_hint(path)}")
    return found
