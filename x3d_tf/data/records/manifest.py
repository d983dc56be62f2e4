"""The table of contents of a folder of records: classes, shards, and where each record lies. Imports no TensorFlow.

`manifest.json` is written last, so a folder that has one is whole. It holds a checksum over its own content, which
finds edits and damage. It is read as untrusted input: every value is held against its rule before anything relies on
it.
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
from x3d_tf.types import Storage, Task, stored_from_json, stored_to_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 4
_CHECKSUM = "sha256"  # name of the entry with the checksum over all others

_LABELS: dict[Task, tuple[int, float, str]] = {  # of a record: fewest, most, and the rule in words
    "single_label": (1, 1, "be exactly one"),
    "multi_label": (1, math.inf, "be one or more, ascending"),
    "detection": (0, math.inf, "be ascending"),
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Manifest:
    """What a folder of records holds.

    Attributes:
        folder: where the shards lie.
        classes: names of the classes in the order of their labels, shared by all splits.
        splits: the parts by name.
        settings: how the records were made, for people and for comparison: names to numbers or strings.
        stored: how their frames were stored.
        task: "single_label" where every record has exactly one label, "multi_label" where it has one or more,
            "detection" where it is of a key frame, whose boxes have any number.
    """

    folder: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    settings: dict[str, int | float | str]
    stored: Storage
    task: Task = "single_label"

    def split(self, name: str) -> Split:
        """The named part, once its shards have been found whole in the folder.

        Raises:
            UserError: no such split (lists those there are); a shard that is missing, or that has another size than
                the manifest says: it was cut off or replaced.
        """
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}; it has {', '.join(self.splits)}")
        for shard in self.splits[name].shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise UserError(f"{path} is missing; {MANIFEST_NAME} lists it")
            size = path.stat().st_size
            require(size == shard.bytes, f"size of {path}", f"be {shard.bytes} bytes, as {MANIFEST_NAME} says", size)
        return self.splits[name]

    def keeping(self, name: str, records: Sequence[Record]) -> "Manifest":
        """The same, but of the named part only these records."""
        return replace(self, splits=self.splits | {name: Split(self.splits[name].shards, tuple(records))})

    def fingerprint(self) -> str:
        """Returns a hash that two manifests share if their task, classes, shards and records are equal.

        It does not depend on where the folder lies, nor on the settings.
        """
        content = self._content()
        del content["settings"]
        return checksum(content)

    def save(self) -> Path:
        """Writes `manifest.json` into the folder, whole or not at all, and returns its path."""
        content = self._content()
        path = self.folder / MANIFEST_NAME
        atomic_write(path, json.dumps(content | {_CHECKSUM: checksum(content)}, ensure_ascii=False).encode())
        return path

    def _content(self) -> dict[str, Any]:
        """All entries of the file but the checksum."""
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
        """Reads and checks a folder's manifest.

        Raises:
            UserError: no manifest there (says which command makes one); one that cannot be read, has another format or
                was changed after it was written; a value that breaks its rule, naming the file, the entry, the rule and
                the value received.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: {folder} holds no finished records. "
                f"Make them with: python -m x3d_tf.build_records --videos=DIR --output={folder}"
            )
        content = _checked_content(path)
        reader = _Reader(str(path))
        task = cast(Task, content.get("task"))
        reader.check(task in get_args(Task), "task", f"be one of {', '.join(get_args(Task))}", task)
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
    """Returns the SHA-256 of a manifest's entries, which does not depend on their order or on white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked_content(path: Path) -> dict[str, Any]:
    """The entries of the file, once their checksum has been found right; no entry has been checked by itself."""
    try:
        content = json.loads(read_limited(path, LARGE))
        content = _Reader(str(path)).of_type(content, dict, "the file")
        expected = content.pop(_CHECKSUM, None)
        found = checksum(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError covers both broken JSON and broken UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}: the records were made by another "
            "version of x3d_tf; build them again"
        )
    if expected != found:
        raise UserError(
            f"{path}: {_CHECKSUM} must be that of the file's other entries, {found}, got {expected!r}: the file was "
            "edited or damaged after it was written; restore it from a copy or build the records again"
        )
    return content


def _stored_from_json(reader: "_Reader", value: Any) -> Storage:
    try:
        stored = stored_from_json(value)
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from error
    if stored is None:  # records always hold frames
        raise UserError(f"{reader.path}: stored must have short_side and jpeg_quality, got {value!r}")
    return stored


def _split_to_json(split: Split) -> dict[str, Any]:
    columns = list(zip(*split.records, strict=True)) or [()] * len(Record._fields)
    return {
        "count": len(split.records),
        "shards": [asdict(shard) for shard in split.shards],
        "records": dict(zip(Record._fields, columns, strict=True)),
    }


def _split_from_json(reader: "_Reader", name: str, content: Any, classes: int, task: Task) -> Split:
    where = f"splits.{name}"
    content = reader.of_type(content, dict, where)
    entries = reader.of_type(content.get("shards"), list, f"{where}.shards")
    shards = tuple(_shard_from_json(reader, f"{where}.shards[{i}]", entry) for i, entry in enumerate(entries))
    records = _records_from_json(reader, f"{where}.records", content.get("records"))
    reader.check(content.get("count") == len(records), f"{where}.count", f"be {len(records)}", content.get("count"))
    end = (0, 0)  # shard and byte where the record before ends
    for i, record in enumerate(records):
        _check_record(reader, f"{where}.records[{i}]", record, shards, classes, task)
        place = (record.shard, record.offset)
        reader.check(place >= end, f"{where}.records[{i}]", "come after the record before it in the shards", place)
        end = (record.shard, record.offset + record.length + HEADER_BYTES + FOOTER_BYTES)
    return Split(shards, records)


def _shard_from_json(reader: "_Reader", where: str, entry: Any) -> Shard:
    entry = reader.of_type(entry, dict, where)
    file = reader.of_type(entry.get("file"), str, f"{where}.file")
    plain = file not in ("", ".", "..") and not any(character in file for character in "/\\\0")
    reader.check(plain, f"{where}.file", "be a file name without a folder", file)
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
    reader.check(len(lengths) == 1, where, "have columns of one length", lengths)
    return tuple(Record(*row) for row in zip(*checked, strict=True))


def _labels_from_json(reader: "_Reader", where: str, column: Any) -> list[tuple[int, ...]]:
    rows = reader.items(column, list, where)
    return [tuple(reader.items(row, int, f"{where}[{i}]")) for i, row in enumerate(rows)]


def _check_record(
    reader: "_Reader", where: str, record: Record, shards: tuple[Shard, ...], classes: int, task: Task
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
    counted = least <= len(labels) <= most and list(labels) == sorted(set(labels))
    reader.check(counted, f"{where}.labels", rule, labels)


class _Reader:
    """Checks of values from JSON; errors name the file and the entry."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, condition: bool, where: str, rule: str, value: object) -> None:
        if not condition:
            require(False, f"{self.path}: {where}", rule, value)

    def of_type(self, value: Any, kind: type[_T], where: str) -> _T:
        self.check(type(value) is kind, where, f"be a {kind.__name__}", value)  # JSON's true is no int here
        return value

    def items(self, value: Any, kind: type[_T], where: str) -> list[_T]:
        items = self.of_type(value, list, where)
        for i, item in enumerate(items):
            if type(item) is not kind:
                self.of_type(item, kind, f"{where}[{i}]")
        return items
