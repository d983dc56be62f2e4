"""Position and checksum of each frame in a shard, in a small file beside it: `SHARD.frames`. Imports no TensorFlow.

A clip needs a few frames of a record that holds hundreds. With this file they can be read and verified alone. All
numbers are little-endian; R is the number of records and F the number of their frames:

    8 bytes     the text "X3DFRAME"
    uint32      format version, 1
    uint32      R
    uint64      F
    uint64      size of the shard in bytes
    32 bytes    SHA-256 of the shard
    uint32 R    number of frames of each record, in the order of the shard
    uint64 F    position in the shard of the first byte of each frame, a JPEG file
    uint32 F    number of bytes of each frame
    uint32 F    CRC-32C of each frame
    32 bytes    SHA-256 of everything before

The file is untrusted: it is compared with the manifest, and each value is checked before it is used. It follows from
the shard, so it can always be made again.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.crc32c import crc32c
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.data.records.wire import fields, inside
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_write, read_limited

_MAGIC, _VERSION = b"X3DFRAME", 1
_HEADER = struct.Struct("<8sIIQQ32s")
_DIGEST_BYTES = 32
_FRAMES = b"image/encoded"


@dataclass(frozen=True, eq=False)
class FrameTable:
    """Frames of the records of a shard, one record after the other.

    Attributes:
        counts: number of frames of each record, int64 [R].
        offsets: position of each frame in the shard, int64 [F].
        lengths: number of bytes of each frame, int64 [F].
        checksums: CRC-32C of each frame, uint32 [F].
    """

    counts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    checksums: NDArray[np.uint32]

    def equals(self, other: "FrameTable") -> bool:
        """Returns True if all values are equal."""
        names = ("counts", "offsets", "lengths", "checksums")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


def frames_path(shard: Path) -> Path:
    """Returns the path of the file for a shard."""
    return shard.with_name(f"{shard.name}.frames")


def frames_of(record: bytes, listed: int, offset: int = 0) -> FrameTable:
    """Finds the frames of a serialized record.

    Args:
        record: the bytes of a `tf.train.SequenceExample`.
        listed: number of frames that the record should have. The search ends with an error once it has more.
        offset: position of the record's first byte in the shard.

    Raises:
        ValueError: the bytes are not a record with frames, or it has more than `listed`.
    """
    found = list(islice(frame_spans(record), listed + 1))
    if len(found) > listed:
        raise ValueError(f"it has more than {listed} frames")
    spans = np.array(found, np.int64).reshape(-1, 2)
    begins, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    return FrameTable(np.array([len(spans)], np.int64), begins + offset, lengths, crc32c(record, begins, lengths))


def join(tables: Sequence[FrameTable]) -> FrameTable:
    """Concatenates the tables of several records."""
    empty = np.zeros(0, np.int64)
    first = FrameTable(empty, empty, empty, np.zeros(0, np.uint32))
    columns = zip(*((table.counts, table.offsets, table.lengths, table.checksums) for table in (first, *tables)))
    return FrameTable(*(np.concatenate(column) for column in columns))


def write_frames(shard_path: Path, shard: Shard, table: FrameTable) -> None:
    """Writes the file of a shard atomically.

    Raises:
        WriteError: the file cannot be written.
    """
    sizes = len(table.counts), len(table.offsets), shard.bytes
    content = _HEADER.pack(_MAGIC, _VERSION, *sizes, bytes.fromhex(shard.sha256))
    content += table.counts.astype("<u4").tobytes() + table.offsets.astype("<u8").tobytes()
    content += table.lengths.astype("<u4").tobytes() + table.checksums.astype("<u4").tobytes()
    atomic_write(frames_path(shard_path), content + hashlib.sha256(content).digest())


def read_frames_file(shard_path: Path, shard: Shard, records: Sequence[Record]) -> FrameTable:
    """Reads and checks the file of a shard.

    Args:
        shard_path: path of the shard.
        shard: the shard's entry in the manifest.
        records: all records of the shard in the manifest, in its order.

    Raises:
        UserError: the file does not exist, is damaged, or does not fit the manifest.
    """
    path = frames_path(shard_path)
    count = sum(record.frames for record in records)
    size = _HEADER.size + 4 * len(records) + 16 * count + _DIGEST_BYTES
    try:
        content = read_limited(path, size)  # the manifest bounds the size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    require(len(content) == size, f"size of {path}", f"be {size} bytes, as {MANIFEST_NAME} implies", len(content))
    same = hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
    require(same, str(path), "match its own checksum: it is damaged")
    magic, version, *sizes, digest = _HEADER.unpack_from(content)
    require((magic, version) == (_MAGIC, _VERSION), str(path), f"be a file of frames, version {_VERSION}", version)
    require(sizes == [len(records), count, shard.bytes], str(path), "have the sizes of its shard", sizes)
    require(digest.hex() == shard.sha256, str(path), f"have the SHA-256 of its shard in {MANIFEST_NAME}", digest.hex())
    table = _unpack(content, len(records), count)
    _check_spans(path, table, records)
    return table


def _unpack(content: bytes, records: int, count: int) -> FrameTable:
    position, columns = _HEADER.size, []
    for dtype, number in (("<u4", records), ("<u8", count), ("<u4", count), ("<u4", count)):
        columns.append(np.frombuffer(content, dtype, number, position))
        position += columns[-1].nbytes
    counts, offsets, lengths, checksums = columns
    return FrameTable(
        counts.astype(np.int64), offsets.astype(np.int64), lengths.astype(np.int64), checksums.astype(np.uint32)
    )


def _check_spans(path: Path, table: FrameTable, records: Sequence[Record]) -> None:
    """Raises `UserError` unless each frame lies inside its record, after the frame before it."""
    counts = np.array([record.frames for record in records], np.int64)
    same = np.array_equal(table.counts, counts)
    require(same, str(path), f"have the numbers of frames in {MANIFEST_NAME}", table.counts.tolist()[:10])
    begins = np.repeat(np.array([record.offset for record in records], np.int64), counts)
    ends = np.repeat(np.array([record.offset + record.length for record in records], np.int64), counts)
    inside = (table.offsets >= begins) & (table.lengths > 0) & (table.lengths <= ends - table.offsets)
    inside[1:] &= table.offsets[1:] >= (table.offsets + table.lengths)[:-1]
    bad = int(inside.argmin()) if not inside.all() else 0
    require(bool(inside.all()), f"{path}: frame {bad}", "lie inside its record, after the frame before it")


def read_frames(shard_path: Path, table: FrameTable, record: int, chosen: Sequence[int]) -> list[bytes]:
    """Reads frames of a record, and no other bytes of the shard.

    Args:
        shard_path: path of the shard.
        table: the frames of the shard, from `read_frames_file`.
        record: index of the record in the shard.
        chosen: indices of the frames in the record.

    Returns:
        The frames as JPEG files, in the order of `chosen`.

    Raises:
        UserError: a frame does not exist, cannot be read, or does not match its checksum.
    """
    first, count = int(table.counts[:record].sum()), int(table.counts[record])
    require(all(0 <= number < count for number in chosen), "chosen", f"be frames in 0..{count - 1}", list(chosen))
    rows = first + np.array(chosen, np.int64)
    offsets, lengths = table.offsets[rows], table.lengths[rows]
    try:
        with shard_path.open("rb", buffering=0) as file:
            found = [os.pread(file.fileno(), n, at) for at, n in zip(offsets.tolist(), lengths.tolist())]
    except OSError as error:
        raise UserError(f"{shard_path} cannot be read: {error.strerror}") from error
    ends = np.cumsum(list(map(len, found)))
    complete = np.array_equal(np.diff(ends, prepend=0), lengths)
    checksums = crc32c(b"".join(found), ends - lengths, lengths) if complete else np.zeros(len(found), np.uint32)
    for number, frame, expected, crc in zip(chosen, found, table.checksums[rows], checksums):
        if not complete or crc != expected:
            where = f"{shard_path}: frame {number} of record {record}"
            raise UserError(
                f"{where} does not match its checksum ({len(frame)} bytes): the shard was damaged or replaced"
            )
    return found


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
                write_frames(path, shard, frames_of_shard(path, shard, records))
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


def frames_of_shard(path: Path, shard: Shard, records: Sequence[Record]) -> FrameTable:
    """Finds the frames of a shard by reading all of it.

    Raises:
        UserError: the shard cannot be read, has another SHA-256 than the manifest lists, or has other records.
    """
    tables, digest = [], hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, record in enumerate(records):
                content = file.read(HEADER_BYTES + record.length + FOOTER_BYTES)
                digest.update(content)
                start = file.tell() - len(content) + HEADER_BYTES
                try:
                    data = content[HEADER_BYTES : HEADER_BYTES + record.length]
                    table = frames_of(data, record.frames, record.offset)
                except ValueError as error:
                    rule = f"does not have the {record.frames} frames that {MANIFEST_NAME} lists"
                    raise UserError(f"{path}: record {number} {rule}: {error}") from error
                same = start == record.offset and int(table.counts[0]) == record.frames
                require(same, f"{path}: record {number}", f"be as {MANIFEST_NAME} lists it")
                tables.append(table)
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != shard.sha256:
        raise UserError(
            f"{path} has another SHA-256 than {MANIFEST_NAME} lists. List all damaged records with: "
            f"python -m x3d_tf.build_records --output={path.parent} --verify"
        )
    return join(tables)


def frame_spans(record: bytes) -> Iterator[tuple[int, int]]:
    """Yields the begin and the end of each frame: feature_lists > entry > list > feature > bytes_list > value.

    Raises:
        ValueError: the bytes are not a record with frames.
    """
    lists = inside(record, [(0, len(record))], 2)
    for entry in inside(record, lists, 1):
        if [record[slice(*key)] for key in fields(record, *entry, 1)] == [_FRAMES]:
            for feature in inside(record, fields(record, *entry, 2), 1):
                values = [*islice(inside(record, fields(record, *feature, 1), 1), 2)]
                if len(values) != 1:
                    raise ValueError(f"a frame must be one file, got {'several' if values else 'none'}")
                yield values[0]
