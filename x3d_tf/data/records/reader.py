"""Reads single frames and the metadata of records. Imports no TensorFlow."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.records.frames import SPAN, Spans, open_frames, read_spans, without_frames
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.files import open_regular

_THREADS = 16  # open files in parallel, which hides the latency of network disks
_LARGEST_GAP = 64  # bytes between two frames that are read together; neighbours are about 10 bytes apart


class FrameReader:
    """Reads the records of a split, without the frames that are not needed. Its methods may run in several threads.

    Raises:
        UserError: a shard does not exist, or its file of frames does not exist or is that of another shard.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        part = manifest.split(split)
        self._records = part.records
        self._paths = [manifest.folder / shard.file for shard in part.shards]
        used = sorted({record.shard for record in part.records})
        with ThreadPoolExecutor(_THREADS) as threads:
            files = threads.map(lambda number: open_frames(self._paths[number], part.shards[number]), used)
            self._files = dict(zip(used, files))

    def read(self, number: int) -> tuple[bytes, Spans]:
        """Returns a record without its frames, a serialized SequenceExample, and the spans of its frames.

        Args:
            number: index of the record in the split.

        Raises:
            UserError: the record or its spans cannot be read or do not match a checksum.
        """
        record = self._records[number]
        spans = read_spans(self._files[record.shard], record)
        before, after = _read(self._paths[record.shard], spans[[0, -1]])
        try:
            return without_frames(before, after), spans[1:-1]
        except ValueError as error:
            raise UserError(f"{self._paths[record.shard]}: record {number} cannot be read: {error}") from error

    def frames(self, number: int, spans: Spans) -> list[bytes]:
        """Returns frames of a record, JPEG files.

        Args:
            number: index of the record in the split.
            spans: some of the spans from `read`, in any order. Repeated ones are read once.

        Raises:
            UserError: a frame cannot be read or does not match its checksum.
        """
        return _read(self._paths[self._records[number].shard], spans)


def as_numbers(spans: Spans) -> NDArray[np.int64]:
    """Returns spans as numbers that TensorFlow can hold: offset, length and CRC-32C, int64 [n, 3]."""
    return np.stack([spans[name].astype(np.int64) for name in ("offset", "length", "crc")], axis=-1)


def from_numbers(numbers: NDArray[np.int64]) -> Spans:
    """Inverts `as_numbers`."""
    spans = np.zeros(len(numbers), SPAN)
    for column, name in enumerate(("offset", "length", "crc")):
        spans[name] = numbers[:, column]
    return spans


def _read(path: Path, spans: Spans) -> list[bytes]:
    """Reads spans of a shard and verifies their checksums. Neighbours are read together."""
    unique, places = np.unique(spans, return_inverse=True)  # sorted by offset
    found: list[bytes] = []
    try:
        with open_regular(path) as file:
            for group in _groups(unique):
                begin, end = int(group["offset"][0]), int(group["offset"][-1]) + int(group["length"][-1])
                content = os.pread(file.fileno(), end - begin, begin)
                starts = (group["offset"] - begin).tolist()
                found += [content[at : at + n] for at, n in zip(starts, group["length"].tolist())]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for span, content in zip(unique, found):
        if len(content) != span["length"] or google_crc32c.value(content) != span["crc"]:
            where = f"{path}: the {span['length']} bytes at {span['offset']}"
            raise UserError(f"{where} do not match their checksum: the shard was damaged or replaced")
    return [found[place] for place in places]


def _groups(spans: Spans) -> Sequence[Spans]:
    gaps = spans["offset"][1:] - (spans["offset"] + spans["length"])[:-1]
    return np.split(spans, np.flatnonzero(gaps > _LARGEST_GAP) + 1) if len(spans) else []
