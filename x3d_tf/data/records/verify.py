"""Verification of records: reads every byte of them. Training checks less: only the records that it reads.

Shards are untrusted. TensorFlow reserves memory for a record of any length that its header states, and crashes where
there is none, so that each header is compared with the manifest before TensorFlow reads the record.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.data.records.format import (
    NO_LABEL,
    ParsedAnnotation,
    decode_frame,
    parse_annotation,
    parse_record,
    stated_length,
    stored_record,
)
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.errors import UserError
from x3d_tf.text import counted


@dataclass(frozen=True)
class SplitReport:
    """What was found in the shards of a split.

    Attributes:
        split: its name.
        shards, videos, frames: how many the manifest lists.
        problems: for each shard that is damaged or not listed in the manifest a line that names it.
    """

    split: str
    shards: int
    videos: int
    frames: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        shards = counted(self.shards, "shard")
        counts = f"{self.split}: {counted(self.videos, 'video')}, {counted(self.frames, 'frame')} in {shards}"
        return "\n  ".join([f"{counts}; {len(self.problems) or 'none'} damaged", *self.problems])


def verify_records(folder: str | Path, *, progress: bool = True) -> Iterator[SplitReport]:
    """Reads all shards of a folder of records, one split after the other.

    Checked are the shards' sizes and SHA-256, the checksums of all records, that each parses and agrees with the
    manifest in its place, labels, class names, rate, name and number of frames, and that its first frame decodes; that
    the manifest lists all shards and all their records, each once; of key frames also that their boxes are within the
    frame, and of the classes that the manifest says.

    Raises:
        UserError: there is no manifest, or it is damaged itself.
    """
    manifest = Manifest.load(folder)
    unlisted = _unlisted(manifest)
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress)
    with bar:
        for name, split in manifest.splits.items():
            problems = []
            records: dict[int, list[Record]] = {}
            for record in split.records:
                records.setdefault(record.shard, []).append(record)
            for number, shard in enumerate(split.shards):
                path = manifest.folder / shard.file
                try:
                    _verify_shard(path, shard, records.get(number, []), manifest)
                except UserError as error:
                    problems.append(str(error))
                except (OSError, tf.errors.OpError) as error:
                    problems.append(f"{path} cannot be read: {error}")
                bar.update(shard.bytes)
            problems += unlisted.pop(name, [])
            frames = sum(record.frames for record in split.records)
            yield SplitReport(name, len(split.shards), len(split.records), frames, tuple(problems))
    for name, missing in unlisted.items():
        yield SplitReport(name, 0, 0, 0, tuple(missing))


def _unlisted(manifest: Manifest) -> dict[str, list[str]]:
    """Problems by split: files named as shards that the manifest does not list."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    problems: dict[str, list[str]] = {}
    for path in sorted(manifest.folder.iterdir()):
        name = re.fullmatch(r"(.+)-\d+-of-\d+\.tfrecord", path.name)
        if name and path.name not in listed:
            problems.setdefault(name[1], []).append(f"{path} is not listed in {MANIFEST_NAME}")
    return problems


def _verify_shard(path: Path, shard: Shard, records: list[Record], manifest: Manifest) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path} has {size} bytes, and {MANIFEST_NAME} says {shard.bytes}")
    end = 0  # of the record before
    for number, record in enumerate(records):
        where = f"{path}, record {number} at byte {record.offset} ({record.media_id})"
        start = record.offset - HEADER_BYTES
        if start != end:
            raise UserError(f"{path} has bytes {end} to {start} that no record listed in {MANIFEST_NAME} covers")
        try:
            _verify_record(where, path, record, manifest)
        except tf.errors.DataLossError as error:
            raise UserError(f"{where} does not have its checksum") from error
        except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be parsed or decoded") from error
        end = record.offset + record.length + FOOTER_BYTES
    if end != size:
        raise UserError(f"{path} has bytes {end} to {size} that no record listed in {MANIFEST_NAME} covers")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise UserError(f"{path} has another SHA-256 than {MANIFEST_NAME} says")


def _verify_record(where: str, path: Path, record: Record, manifest: Manifest) -> None:
    length = stated_length(path, record.offset)
    if length != record.length:
        raise UserError(f"{where} has length {length}, and {MANIFEST_NAME} says {record.length}")
    place = tf.constant([record.offset, record.length], tf.int64)
    serialized = stored_record(tf.constant(os.fsencode(path)), *place)
    parsed = parse_record(serialized)
    found = {
        "frames": len(parsed.frames),
        "fps": float(parsed.fps),
        "labels": tuple(parsed.labels.numpy().tolist()),
        "media_id": parsed.media_id.numpy().decode(),
    }
    for field, value in found.items():
        if value != getattr(record, field):
            raise UserError(f"{where} has {field} {value!r}, and {MANIFEST_NAME} says {getattr(record, field)!r}")
    names = [name.decode() for name in parsed.names.numpy()]
    listed = [manifest.classes[label] for label in record.labels]
    if names != listed:
        raise UserError(f"{where} is of the classes {names!r}, and {MANIFEST_NAME} says {listed!r}")
    decode_frame(parsed.frames[0])
    if manifest.task == "detection":
        _verify_boxes(where, parse_annotation(serialized), record)


def _verify_boxes(where: str, known: ParsedAnnotation, record: Record) -> None:
    """That what is said of a key frame is of its frames and its classes, and of boxes within the frame."""
    labels = known.labels.numpy()
    found = {
        "a key frame that is one of its frames": 0 <= int(known.key_frame) < record.frames,
        "boxes of its classes": tuple(np.unique(labels[labels != NO_LABEL]).tolist()) == record.labels,
        "boxes within the frame": all(_in_frame(boxes.numpy()) for boxes in (known.boxes, known.proposals)),
        "scores in [0, 1]": bool(((known.scores >= 0) & (known.scores <= 1)).numpy().all()),
    }
    for what, holds in found.items():
        if not holds:
            raise UserError(f"{where} does not have {what}")


def _in_frame(boxes: NDArray[np.float32]) -> bool:
    return bool(((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, :2] <= boxes[:, 2:]).all())
