"""Manifest of a folder of records: classes, shards, and the position of each record. Imports no TensorFlow.

`manifest.json` is written last, so a folder that has one is complete. A checksum over its own content detects edits and
damage. The manifest is untrusted input: every value is checked before it is used.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard, Split
from x3d_tf.errors import UserError, require
from x3d_tf.files import LARGE, atomic_write, read_limited
from x3d_tf.text import check_class_name
from x3d_tf.types import AnnotationKind, Storage, stored_from_json, stored_to_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 4
_CHECKSUM = "sha256"  # entry with the checksum of all other entries

_LABELS: dict[AnnotationKind, tuple[int, float, str]] = {  # labels per record: minimum, maximum, and the rule
    "single_label": (1, 1, "be exactly one"),
    "multi_label": (1, math.inf, "be one or more, ascending"),
    "detection": (0, math.inf, "be ascending"),
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Manifest:
    """Contents of a folder of records.

    Attributes:
        folder: folder of the shards.
        classes: class names in the order of their labels, shared by all splits.
        splits: splits by name.
        settings: settings of the build, numbers or strings, for information and comparison.
        stored: storage format of the frames.
        task: "single_label" if every record has exactly one label, "multi_label" if one or more, "detection" if records
            hold a key frame, each of whose boxes has any number of labels.
    """

    folder: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    settings: dict[str, int | float | str]
    stored: Storage
    task: AnnotationKind = "single_label"

    def split(self, name: str) -> Split:
        """Returns a split after checking that its shards exist with the sizes in the manifest.

        Raises:
            UserError: the split does not exist (the message lists the splits), or a shard is missing, truncated or
                replaced.
        """
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}")
        for shard in self.splits[name].shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise UserError(f"{path} does not exist, but {MANIFEST_NAME} lists it")
            size = path.stat().st_size
            require(size == shard.bytes, f"size of {path}", f"be {shard.bytes} bytes, as in {MANIFEST_NAME}", size)
        return self.splits[name]

    def with_records(self, name: str, records: Sequence[Record]) -> "Manifest":
        """Returns a copy in which the named split has only these records."""
        return replace(self, splits=self.splits | {name: Split(self.splits[name].shards, tuple(records))})

    def fingerprint(self) -> str:
        """Returns a hash of the task, classes, storage format, shards and records.

        The hash does not depend on the folder's path or on the settings.
        """
        content = self._content()
        del content["settings"]
        return checksum(content)

    def save(self) -> Path:
        """Writes `manifest.json` into the folder atomically and returns its path."""
        content = self._content()
        path = self.folder / MANIFEST_NAME
        atomic_write(path, json.dumps(content | {_CHECKSUM: checksum(content)}, ensure_ascii=False).encode())
        return path

    def _content(self) -> dict[str, Any]:
        """Returns all entries of the file except the checksum."""
        return {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "settings": self.settings,
            "stored": stored_to_json(self.stored),
            "classes": self.classes,
            "splits": {name: _split_to_json(split) for name, split in self.splits.items()},
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Reads and checks the manifest of a folder.

        Raises:
            UserError: the manifest does not exist, cannot be read, has another format version, was changed after it was
                written, or has a value that breaks its rule (the message names the file, entry, rule and value).
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: {folder} holds no finished records. "
                f"Build them with: python -m x3d_tf.build_records --videos=DIR --output={folder}"
            )
        content = _checked_content(path)
        reader = _Reader(str(path))
        task = cast(AnnotationKind, content.get("task"))
        reader.check(task in get_args(AnnotationKind), "task", f"be one of {', '.join(get_args(AnnotationKind))}", task)
        settings = reader.of_type(content.get("settings"), dict, "settings")
        stored = _stored_from_json(reader, content.get("stored"))
        classes = tuple(reader.items(content.get("classes"), str, "classes"))
        reader.check(len(set(classes)) == len(classes) > 0, "classes", "be distinct names", classes)
        for i, name in enumerate(classes):
            check_class_name(name, f"{path}: classes[{i}]")
        parts = reader.of_type(content.get("splits"), dict, "splits")
        splits = {name: _split_from_json(reader, name, part, len(classes), task) for name, part in parts.items()}
        return cls(Path(folder), classes, splits, settings, stored, task)


def checksum(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's entries, independent of their order and of white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked_content(path: Path) -> dict[str, Any]:
    """Returns the entries of the file after verifying their checksum; the values are still unchecked."""
    try:
        content = json.loads(read_limited(path, LARGE))
        content = _Reader(str(path)).of_type(content, dict, "the file")
        expected = content.pop(_CHECKSUM, None)
        found = checksum(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError covers invalid JSON and invalid UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}. Another version of x3d_tf built these "
            "records; build them again"
        )
    if expected != found:
        raise UserError(
            f"{path}: {_CHECKSUM} must match the file's other entries ({found}), got {expected!r}. The file was edited "
            "or damaged after it was written; restore it from a copy or build the records again"
        )
    return content


def _stored_from_json(reader: "_Reader", value: Any) -> Storage:
    try:
        stored = stored_from_json(value)
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from error
    if stored is None:
        raise UserError(f"{reader.path}: stored must have short_side and jpeg_quality, got {value!r}")
    return stored


def _split_to_json(split: Split) -> dict[str, Any]:
    columns = list(zip(*split.records, strict=True)) or [()] * len(Record._fields)
    return {
        "count": len(split.records),
        "shards": [asdict(shard) for shard in split.shards],
        "records": dict(zip(Record._fields, columns, strict=True)),
    }


def _split_from_json(reader: "_Reader", name: str, content: Any, classes: int, task: AnnotationKind) -> Split:
    where = f"splits.{name}"
    content = reader.of_type(content, dict, where)
    entries = reader.of_type(content.get("shards"), list, f"{where}.shards")
    shards = tuple(_shard_from_json(reader, f"{where}.shards[{i}]", entry) for i, entry in enumerate(entries))
    records = _records_from_json(reader, f"{where}.records", content.get("records"))
    reader.check(content.get("count") == len(records), f"{where}.count", f"be {len(records)}", content.get("count"))
    end = (0, 0)  # shard and byte at which the previous record ends
    for i, record in enumerate(records):
        _check_record(reader, f"{where}.records[{i}]", record, shards, classes, task)
        start = (record.shard, record.offset)
        reader.check(start >= end, f"{where}.records[{i}]", "start after the end of the previous record", start)
        end = (record.shard, record.offset + record.length + HEADER_BYTES + FOOTER_BYTES)
    return Split(shards, records)


def _shard_from_json(reader: "_Reader", where: str, entry: Any) -> Shard:
    entry = reader.of_type(entry, dict, where)
    file = reader.of_type(entry.get("file"), str, f"{where}.file")
    is_plain = file not in ("", ".", "..") and not any(character in file for character in "/\\\0")
    reader.check(is_plain, f"{where}.file", "be a file name without a path", file)
    size = reader.of_type(entry.get("bytes"), int, f"{where}.bytes")
    return Shard(file, size, reader.of_type(entry.get("sha256"), str, f"{where}.sha256"))


def _records_from_json(reader: "_Reader", where: str, columns: Any) -> tuple[Record, ...]:
    columns = reader.of_type(columns, dict, where)
    checked = [
        _labels_from_json(reader, f"{where}.labels", columns.get(field))
        if field == "labels"
        else reader.items(columns.get(field), kind, f"{where}.{field}")
        for field, kind in Record.__annotations__.items()
    ]
    lengths = sorted({len(column) for column in checked})
    reader.check(len(lengths) == 1, where, "have columns of equal length", lengths)
    return tuple(Record(*row) for row in zip(*checked, strict=True))


def _labels_from_json(reader: "_Reader", where: str, column: Any) -> list[tuple[int, ...]]:
    rows = reader.items(column, list, where)
    return [tuple(reader.items(row, int, f"{where}[{i}]")) for i, row in enumerate(rows)]


def _check_record(
    reader: "_Reader", where: str, record: Record, shards: tuple[Shard, ...], classes: int, task: AnnotationKind
) -> None:
    reader.check(0 <= record.shard < len(shards), f"{where}.shard", f"be in 0..{len(shards) - 1}", record.shard)
    last = shards[record.shard].bytes - FOOTER_BYTES
    inside = record.offset >= HEADER_BYTES and 0 < record.length <= last - record.offset
    reader.check(inside, where, f"lie inside {shards[record.shard].file}", (record.offset, record.length))
    reader.check(record.frames >= 1, f"{where}.frames", "be at least 1", record.frames)
    reader.check(record.frames <= record.length, f"{where}.frames", "fit into the record", record.frames)
    reader.check(0 < record.fps < math.inf, f"{where}.fps", "be positive", record.fps)
    labels = record.labels
    reader.check(all(0 <= label < classes for label in labels), f"{where}.labels", f"be in 0..{classes - 1}", labels)
    least, most, rule = _LABELS[task]
    valid = least <= len(labels) <= most and list(labels) == sorted(set(labels))
    reader.check(valid, f"{where}.labels", rule, labels)


class _Reader:
    """Checks values from JSON; errors name the file and the entry."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, condition: bool, where: str, rule: str, value: object) -> None:
        if not condition:
            require(False, f"{self.path}: {where}", rule, value)

    def of_type(self, value: Any, kind: type[_T], where: str) -> _T:
        self.check(
            type(value) is kind, where, f"be a {kind.__name__}", value
        )  # isinstance would accept JSON's true as an int
        return value

    def items(self, value: Any, kind: type[_T], where: str) -> list[_T]:
        items = self.of_type(value, list, where)
        for i, item in enumerate(items):
            if type(item) is not kind:
                self.of_type(item, kind, f"{where}[{i}]")
        return items
