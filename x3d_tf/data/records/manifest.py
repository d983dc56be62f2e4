"""Manifest of a folder of records: data set, classes, shards, and the position of each record. Imports no TensorFlow.

`manifest.json` is written last, so a folder that has one is complete. A checksum over its own content detects edits and
damage. The manifest is untrusted input: every value is checked before it is used. Records are stored as columns, which
are checked as arrays, because a data set may have millions of records. A column that no record needs is omitted.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.records.index import (
    FOOTER_BYTES,
    HEADER_BYTES,
    LARGEST,
    MAX_OFFICIAL_SPLITS,
    MAX_SECONDS,
    KeyFrameInfo,
    OfficialSplit,
    Record,
    Shard,
    Split,
)
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.files import LARGE, atomic_write, read_limited
from x3d_tf.text import check_class_name
from x3d_tf.types import AnnotationKind, Storage, stored_from_json, stored_to_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 5
_CHECKSUM = "sha256"  # entry with the checksum of all other entries
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_MAX_SETTINGS = 1000  # entries
_MAX_TEXT = 4096  # characters of a setting or a video's name

_LABELS: dict[AnnotationKind, tuple[int, float, str]] = {  # labels per record: minimum, maximum, and the rule
    "single_label": (1, 1, "be exactly one"),
    "multi_label": (0, math.inf, "be ascending"),
    "detection": (0, math.inf, "be ascending"),
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Manifest:
    """Contents of a folder of records.

    Attributes:
        folder: folder of the shards.
        dataset: name of the data set.
        classes: class names in the order of their labels, shared by all splits.
        splits: splits by name.
        settings: settings of the build, numbers or strings, for information and comparison.
        stored: storage format of the frames.
        task: kind of annotation: "single_label" if every record has exactly one label, "multi_label" if any number,
            "detection" if records hold a key frame, each of whose boxes has any number of labels.
        key_frames: common properties of key frames; None unless the task is "detection".
        original: the manifest of the stored records if this one divides their splits differently, else None.
    """

    folder: Path
    dataset: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    settings: dict[str, int | float | str]
    stored: Storage
    task: AnnotationKind = "single_label"
    key_frames: KeyFrameInfo | None = None
    original: "Manifest | None" = None

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

    @property
    def official_split(self) -> OfficialSplit | None:
        """The official division that the splits are of, for a data set with several; None if the build stated none."""
        number, total = (self.settings.get(name) for name in ("official_split", "official_splits"))
        if type(number) is int and type(total) is int and 1 <= number <= total <= MAX_OFFICIAL_SPLITS:
            return OfficialSplit(number, total)
        return None

    def with_records(self, name: str, records: Sequence[Record]) -> "Manifest":
        """Returns a copy in which the named split has only these records."""
        return replace(self, splits=self.splits | {name: replace(self.splits[name], records=tuple(records))})

    def fingerprint(self) -> str:
        """Returns a hash of the data set's name, task, classes, storage format, shards and records.

        The hash does not depend on the folder's path, on the settings or on how a run divides the stored splits.
        """
        if self.original is not None:
            return self.original.fingerprint()
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
            "dataset": self.dataset,
            "task": self.task,
            "key_frames": None if self.key_frames is None else asdict(self.key_frames),
            "settings": self.settings,
            "stored": stored_to_json(self.stored),
            "classes": self.classes,
            "splits": {name: split_to_json(split) for name, split in self.splits.items()},
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
        dataset = check_dataset_name(content.get("dataset"), f"{path}: dataset")
        task = cast(AnnotationKind, content.get("task"))
        reader.check(task in get_args(AnnotationKind), "task", f"be one of {', '.join(get_args(AnnotationKind))}", task)
        settings = _settings_from_json(reader, content.get("settings"))
        stored = _stored_from_json(reader, content.get("stored"))
        classes = tuple(reader.items(content.get("classes"), str, "classes"))
        reader.check(len(set(classes)) == len(classes) > 0, "classes", "be distinct names", classes)
        for i, name in enumerate(classes):
            check_class_name(name, f"{path}: classes[{i}]")
        parts = reader.of_type(content.get("splits"), dict, "splits")
        splits = {
            name: _split_from_json(reader, f"splits.{name}", part, len(classes), task) for name, part in parts.items()
        }
        key_frames = _key_frames_from_json(reader, content.get("key_frames"), task, splits)
        return cls(Path(folder), dataset, classes, splits, settings, stored, task, key_frames)


def check_dataset_name(name: Any, where: str) -> str:
    """Returns the name of a data set; raises `UserError` unless it is short and plain."""
    valid = isinstance(name, str) and bool(_DATASET_NAME.fullmatch(name))
    require(valid, where, "be a name of letters, digits, '_', '-' and '.'", name)
    return cast(str, name)


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
    if type(version) is not int or version != FORMAT_VERSION:
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


def _settings_from_json(reader: "_Reader", value: Any) -> dict[str, int | float | str]:
    settings = reader.of_type(value, dict, "settings")
    reader.check(len(settings) <= _MAX_SETTINGS, "settings", f"have at most {_MAX_SETTINGS} entries", len(settings))
    for name, entry in settings.items():
        plain = type(entry) in (bool, int, float) or (type(entry) is str and len(entry) <= _MAX_TEXT)
        reader.check(plain and len(name) <= _MAX_TEXT, f"settings.{name[:100]}", "be a number or a short text", entry)
    return settings


def _key_frames_from_json(
    reader: "_Reader", value: Any, task: AnnotationKind, splits: Iterable[str]
) -> KeyFrameInfo | None:
    rule = "be an object if the task is detection, and null otherwise"
    reader.check(isinstance(value, dict) if task == "detection" else value is None, "key_frames", rule, value)
    if value is None:
        return None
    proposals = tuple(reader.items(value.get("proposals"), str, "key_frames.proposals"))
    try:
        info = KeyFrameInfo(**value | {"proposals": proposals})
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from error
    except TypeError as error:  # other entries
        raise UserError(f"{reader.path}: key_frames must have the entries of key frames: {error}") from error
    for name, found in (("proposals", info.proposals), ("listed", tuple(info.listed))):
        distinct = set(found) <= set(splits) and len(set(found)) == len(found)
        reader.check(distinct, f"key_frames.{name}", f"name splits of the records ({first_few([*splits])}) once", found)
    return info


def split_to_json(split: Split) -> dict[str, Any]:
    """Returns the entry of a split, for `split_from_json`."""
    columns = dict(zip(Record._fields, zip(*split.records, strict=True))) if split.records else {}
    needed = {
        name: column
        for name, column in columns.items()
        if name not in Record._field_defaults or any(value != Record._field_defaults[name] for value in column)
    }
    return {
        "expected": split.expected,
        "count": len(split.records),
        "shards": [asdict(shard) for shard in split.shards],
        "records": needed,
    }


def split_from_json(path: Path, where: str, content: Any, classes: int, task: AnnotationKind) -> Split:
    """Returns a split from an entry of an untrusted JSON file.

    Args:
        path: the file.
        where: name of the entry.
        content: the entry.
        classes: number of classes.
        task: kind of annotation.

    Raises:
        UserError: a value breaks its rule (the message names the file, entry, rule and value).
    """
    return _split_from_json(_Reader(str(path)), where, content, classes, task)


def _split_from_json(reader: "_Reader", where: str, content: Any, classes: int, task: AnnotationKind) -> Split:
    content = reader.of_type(content, dict, where)
    expected = content.get("expected")
    valid = expected is None or (type(expected) is int and 0 <= expected <= LARGEST)
    reader.check(valid, f"{where}.expected", "be a number of videos or null", expected)
    entries = reader.of_type(content.get("shards"), list, f"{where}.shards")
    shards = tuple(_shard_from_json(reader, f"{where}.shards[{i}]", entry) for i, entry in enumerate(entries))
    count = content.get("count")
    reader.check(type(count) is int and count >= 0, f"{where}.count", "be a number of records", count)
    columns = _Columns(reader, f"{where}.records", content.get("records"), cast(int, count))
    if columns.are_absent():
        return Split(shards, (), expected)
    columns.check_positions(shards)
    return Split(shards, columns.records(classes, task), expected)


def _shard_from_json(reader: "_Reader", where: str, entry: Any) -> Shard:
    entry = reader.of_type(entry, dict, where)
    file = reader.of_type(entry.get("file"), str, f"{where}.file")
    is_plain = file not in ("", ".", "..") and not any(character in file for character in "/\\\0")
    reader.check(is_plain, f"{where}.file", "be a file name without a path", file)
    size = reader.of_type(entry.get("bytes"), int, f"{where}.bytes")
    reader.check(0 <= size <= LARGEST, f"{where}.bytes", f"be at least 0 and at most {LARGEST}", size)
    return Shard(file, size, reader.of_type(entry.get("sha256"), str, f"{where}.sha256"))


class _Columns:
    """The columns of a split's records, checked as arrays. Errors name the first record that breaks a rule."""

    def __init__(self, reader: "_Reader", where: str, columns: Any, count: int) -> None:
        self._reader, self._where, self._count = reader, where, count
        self._columns = reader.of_type(columns, dict, where)
        unknown = sorted(set(self._columns) - set(Record._fields))
        reader.check(not unknown, where, f"have only the columns {', '.join(Record._fields)}", unknown)

    def are_absent(self) -> bool:
        """Returns True if the split has no records, and therefore no columns."""
        return self._count == 0 and not self._columns

    def check_positions(self, shards: tuple[Shard, ...]) -> None:
        """Checks that each record lies inside its shard, after the previous record."""
        shard = self._integers("shard", 0, len(shards) - 1)
        offset, length = self._integers("offset", 0, LARGEST), self._integers("length", 0, LARGEST)
        sizes = np.array([entry.bytes for entry in shards], np.int64)[shard]
        inside = (offset >= HEADER_BYTES) & (length > 0) & (length <= sizes - FOOTER_BYTES - offset)
        self._check(inside, "", lambda i: f"lie inside {shards[shard[i]].file}", offset, length)
        ends = offset + length + HEADER_BYTES + FOOTER_BYTES
        after = (shard[1:] > shard[:-1]) | ((shard[1:] == shard[:-1]) & (offset[1:] >= ends[:-1]))
        rule = "start after the end of the previous record"
        self._check(np.insert(after, 0, True), "", lambda _: rule, shard, offset)

    def records(self, classes: int, task: AnnotationKind) -> tuple[Record, ...]:
        """Checks the other columns and returns the records."""
        lengths = np.array(self._columns["length"], np.int64)
        frames = self._integers("frames", 1, LARGEST)
        self._check(frames <= lengths, ".frames", lambda _: "fit into the record", frames)
        fps = self._floats("fps")
        self._check((fps > 0) & (fps < math.inf), ".fps", lambda _: "be positive", fps)
        labels = self._labels(classes, task)
        self._check_names("video", 1)
        self._check_names("recording", 0)
        start, end = self._floats("start"), self._floats("end", missing=MAX_SECONDS)
        self._check((start >= 0) & (start < MAX_SECONDS), ".start", lambda _: "be at least 0 seconds", start)
        self._check((end > start) & (end <= MAX_SECONDS), ".end", lambda _: "be after the start", end)
        if task == "detection":
            self._integers("key_frame", 0, LARGEST)
        else:
            is_absent = "key_frame" not in self._columns
            self._reader.check(is_absent, f"{self._where}.key_frame", "be absent unless the task is detection", task)
        given = self._columns | {"labels": labels}
        rows = zip(*(given.get(name) or repeat(Record._field_defaults.get(name)) for name in Record._fields))
        return tuple(map(Record._make, rows)) if self._count else ()

    def _column(self, name: str, kinds: tuple[type, ...]) -> list[Any]:
        """Returns a column after checking the types of its values; a column with a default may be absent."""
        where = f"{self._where}.{name}"
        if name not in self._columns and name in Record._field_defaults and name != "key_frame":
            return [Record._field_defaults[name]] * self._count
        column = self._reader.of_type(self._columns.get(name), list, where)
        self._reader.check(len(column) == self._count, where, f"have {self._count} values, the count", len(column))
        if not set(map(type, column)) <= set(kinds):
            i = next(i for i, value in enumerate(column) if type(value) not in kinds)
            self._reader.check(False, f"{where}[{i}]", _type_rule(kinds[0]), column[i])
        return column

    def _integers(self, name: str, least: int, most: int) -> NDArray[np.int64]:
        column = self._column(name, (int,))
        if column and not (least <= min(column) and max(column) <= most):
            i = next(i for i, value in enumerate(column) if not least <= value <= most)
            rule = f"be in {least}..{most}" if most < LARGEST else f"be at least {least} and at most {most}"
            self._reader.check(False, f"{self._where}[{i}].{name}", rule, column[i])
        return np.array(column, np.int64)

    def _floats(self, name: str, missing: float | None = None) -> NDArray[np.float64]:
        """Returns a column of floats; `missing` stands for null, if null is valid."""
        column = self._column(name, (float,) if missing is None else (float, type(None)))
        return np.array([missing if value is None else value for value in column], np.float64)

    def _labels(self, classes: int, task: AnnotationKind) -> list[tuple[int, ...]]:
        column = list(map(tuple, self._column("labels", (list,))))
        counts = np.array(list(map(len, column)), np.int64)
        flat = list(chain.from_iterable(column))
        if not set(map(type, flat)) <= {int}:
            i, j = next((i, j) for i, row in enumerate(column) for j, value in enumerate(row) if type(value) is not int)
            self._reader.check(False, f"{self._where}.labels[{i}][{j}]", _type_rule(int), column[i][j])
        owner = np.repeat(np.arange(len(column)), counts)
        if flat and not (min(flat) >= 0 and max(flat) < classes):
            i = next(i for i, row in enumerate(column) if any(not 0 <= label < classes for label in row))
            self._reader.check(False, f"{self._where}[{i}].labels", f"be in 0..{classes - 1}", column[i])
        least, most, rule = _LABELS[task]
        values = np.array(flat, np.int64)
        descends = (values[1:] <= values[:-1]) & (owner[1:] == owner[:-1])
        valid = (counts >= least) & (counts <= most)
        valid[owner[1:][descends]] = False
        self._check(valid, ".labels", lambda _: rule, column)
        return column

    def _check_names(self, field: str, least: int) -> None:
        """Checks a column of names of `least` or more characters."""
        column = self._column(field, (str,))
        rule = f"be a name of {least} to {_MAX_TEXT} characters of valid Unicode"
        lengths = np.array(list(map(len, column)), np.int64)
        self._check((lengths >= least) & (lengths <= _MAX_TEXT), f".{field}", lambda _: rule, column)
        try:
            "".join(column).encode()
        except UnicodeEncodeError:
            valid = np.array([name.encode(errors="replace").decode() == name for name in column], bool)
            self._check(valid, f".{field}", lambda _: rule, column)

    def _check(self, valid: NDArray[np.bool_], field: str, rule: Callable[[int], str], *values: Any) -> None:
        """Raises `UserError` with the first record that is not valid, and its value in each sequence of `values`."""
        if not valid.all():
            i = int(valid.argmin())
            found = tuple(column[i].item() if isinstance(column, np.ndarray) else column[i] for column in values)
            self._reader.check(False, f"{self._where}[{i}]{field}", rule(i), found if len(found) > 1 else found[0])


def _type_rule(kind: type) -> str:
    return f"be {'an' if kind is int else 'a'} {kind.__name__}"


class _Reader:
    """Checks values from JSON; errors name the file and the entry."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, condition: bool, where: str, rule: str, value: object) -> None:
        if not condition:
            require(False, f"{self.path}: {where}", rule, value)

    def of_type(self, value: Any, kind: type[_T], where: str) -> _T:
        self.check(type(value) is kind, where, _type_rule(kind), value)  # isinstance would accept JSON's true as an int
        return value

    def items(self, value: Any, kind: type[_T], where: str) -> list[_T]:
        items = self.of_type(value, list, where)
        for i, item in enumerate(items):
            if type(item) is not kind:
                self.of_type(item, kind, f"{where}[{i}]")
        return items
