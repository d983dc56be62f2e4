"""Verifies records by reading every byte; training checks only the records that it reads."""

import hashlib
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
    parse_frames,
    parse_record,
)
from x3d_tf.data.records.frames import Spans, frames_path, read_frames_file, spans_of
from x3d_tf.data.records.framing import RecordError, read_record
from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.errors import UserError
from x3d_tf.text import counted


@dataclass(frozen=True)
class SplitReport:
    """Result of verifying the shards of a split.

    Attributes:
        split: name of the split.
        shards, videos, frames: numbers of these in the manifest.
        problems: one line for each shard that is damaged or not listed in the manifest.
        frame_problems: one line for each intact shard whose file of frames is missing or damaged.
    """

    split: str
    shards: int
    videos: int
    frames: int
    problems: tuple[str, ...]
    frame_problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        shards = counted(self.shards, "shard")
        counts = f"{self.split}: {counted(self.videos, 'video')}, {counted(self.frames, 'frame')} in {shards}"
        lines = [f"{counts}; {len(self.problems) or 'none'} damaged", *self.problems, *self.frame_problems]
        return "\n  ".join(lines)


def verify_records(folder: str | Path, *, progress: bool = True) -> Iterator[SplitReport]:
    """Verifies all shards of a folder of records, one split after the other.

    Checks that the sizes and SHA-256 of all shards and the checksums of all records are correct; that each record
    parses, agrees with the manifest in position, labels, class names, frame rate, name and number of frames, and that
    its first frame decodes; and that the manifest lists every shard and every record once. For key frames, also checks
    that boxes lie within the frame and have the classes that the manifest lists. The file of frames of each intact
    shard is compared with the shard.

    Raises:
        UserError: the manifest does not exist or is damaged.
    """
    manifest = Manifest.load(folder)
    unlisted = _unlisted(manifest)
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress)
    with bar:
        for name, split in manifest.splits.items():
            problems, frame_problems = [], []
            records: dict[int, list[Record]] = {}
            for record in split.records:
                records.setdefault(record.shard, []).append(record)
            for number, shard in enumerate(split.shards):
                path = manifest.folder / shard.file
                try:
                    frames = _verify_shard(path, shard, records.get(number, []), manifest)
                    frame_problems += _verify_frames(path, shard, records.get(number, []), frames)
                except UserError as error:
                    problems.append(str(error))
                except (OSError, tf.errors.OpError) as error:
                    problems.append(f"{path} cannot be read: {error}")
                bar.update(shard.bytes)
            problems += unlisted.pop(name, [])
            count = sum(record.frames for record in split.records)
            counts = len(split.shards), len(split.records), count
            yield SplitReport(name, *counts, tuple(problems), tuple(frame_problems))
    for name, missing in unlisted.items():
        yield SplitReport(name, 0, 0, 0, tuple(missing))


def _unlisted(manifest: Manifest) -> dict[str, list[str]]:
    """Returns, by split, the shard files that the manifest does not list."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    problems: dict[str, list[str]] = {}
    for path in sorted(manifest.folder.iterdir()):
        name = re.fullmatch(r"(.+)-\d+-of-\d+\.tfrecord", path.name)
        if name and path.name not in listed:
            problems.setdefault(name[1], []).append(f"{path} is not listed in {MANIFEST_NAME}")
    return problems


def _verify_frames(path: Path, shard: Shard, records: list[Record], expected: list[Spans]) -> list[str]:
    """Returns a line if the file of a shard's frames does not exist, is damaged, or differs from the shard."""
    try:
        found = read_frames_file(path, shard, records)
    except UserError as error:
        return [str(error)]
    same = all(map(np.array_equal, found, expected))
    return [] if same else [f"{frames_path(path)} has other positions or checksums than the frames of its shard"]


def _verify_shard(path: Path, shard: Shard, records: list[Record], manifest: Manifest) -> list[Spans]:
    """Returns the spans of each record of an intact shard; raises `UserError` or an error of TensorFlow otherwise."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path} has {size} bytes, but {MANIFEST_NAME} lists {shard.bytes}")
    spans = []
    end = 0  # of the previous record
    for number, record in enumerate(records):
        where = f"{path}, record {number} at byte {record.offset} ({record.media_id})"
        start = record.offset - HEADER_BYTES
        if start != end:
            raise UserError(f"{path} has bytes {end} to {start} that no record listed in {MANIFEST_NAME} covers")
        try:
            spans.append(_verify_record(where, path, record, manifest))
        except UserError:
            raise
        except RecordError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        except (tf.errors.InvalidArgumentError, ValueError) as error:  # ValueError covers text that is not UTF-8
            raise UserError(f"{where} cannot be parsed or decoded") from error
        end = record.offset + record.length + FOOTER_BYTES
    if end != size:
        raise UserError(f"{path} has bytes {end} to {size} that no record listed in {MANIFEST_NAME} covers")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise UserError(f"{path} has another SHA-256 than {MANIFEST_NAME} lists")
    return spans


def _verify_record(where: str, path: Path, record: Record, manifest: Manifest) -> Spans:
    serialized = read_record(path, record.offset, record.length)
    frames = parse_frames(serialized)
    parsed = parse_record(serialized)
    found = {
        "frames": len(frames),
        "fps": float(parsed.fps),
        "labels": tuple(parsed.labels.numpy().tolist()),
        "media_id": parsed.media_id.numpy().decode(),
    }
    for field, value in found.items():
        if value != getattr(record, field):
            raise UserError(f"{where} has {field} {value!r}, but {MANIFEST_NAME} lists {getattr(record, field)!r}")
    names = [name.decode() for name in parsed.names.numpy()]
    listed = [manifest.classes[label] for label in record.labels]
    if names != listed:
        raise UserError(f"{where} has the classes {names!r}, but {MANIFEST_NAME} lists {listed!r}")
    decode_frame(frames[0])
    if manifest.task == "detection":
        _verify_annotation(where, parse_annotation(serialized), record)
    return spans_of(serialized, record.frames, record.offset)


def _verify_annotation(where: str, annotation: ParsedAnnotation, record: Record) -> None:
    """Checks the key frame's index, its labels against the manifest, its boxes and its scores."""
    labels = annotation.labels.numpy()
    found = {
        "a key frame among its frames": 0 <= int(annotation.key_frame) < record.frames,
        "the labels of its boxes in the manifest": tuple(np.unique(labels[labels != NO_LABEL]).tolist())
        == record.labels,
        "boxes within the frame": all(_in_frame(boxes.numpy()) for boxes in (annotation.boxes, annotation.proposals)),
        "scores in [0, 1]": bool(((annotation.scores >= 0) & (annotation.scores <= 1)).numpy().all()),
    }
    for rule, holds in found.items():
        if not holds:
            raise UserError(f"{where} does not have {rule}")


def _in_frame(boxes: NDArray[np.float32]) -> bool:
    return bool(((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, :2] <= boxes[:, 2:]).all())
