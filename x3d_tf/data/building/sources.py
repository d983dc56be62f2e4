"""Lists the videos to build records from, with their classes and order: from class folders or from a csv file.

Imports no TensorFlow: the builder's worker processes import this module.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import csv_files
from x3d_tf.data.building import class_names
from x3d_tf.data.class_lists import read_classes
from x3d_tf.data.records.index import KeyFrameInfo, media_id
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import FOLDER_FPS, FileState
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, counted, decimal, whole
from x3d_tf.types import Annotation, Task

COLUMNS = ("path", "label", "split", "start", "end")  # of a csv file; the first two are required
LABEL_SEPARATOR = ";"
_MAX_SECONDS = 1e6  # largest start or end time: beyond it, times are less precise than a frame
SPLIT_NAMES = ("train", "val", "test")  # recognised without --splits
_SPELLINGS = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "testing": "test"}
_DELIMITERS = (",", ";", "\t")  # spreadsheets write ";" in locales with decimal commas


class Video(NamedTuple):
    """A video to build a record from.

    Attributes:
        path: path of the video file, or of the folder of frames.
        name: name of the video in the records.
        classes: distinct names of its classes.
        start: second of the file at which the record starts.
        end: second of the file at which the record stops; None means the end of the file.
        key_frame: second of the key frame, as annotated; None except for action detection.
        annotation: annotation of the key frame; None except for action detection.
        state: size and time of the file when the build began, to detect changes; None disables the check.
        frame_rate: images per second, for a folder of frames.
    """

    path: Path
    name: str
    classes: tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    key_frame: int | None = None
    annotation: Annotation | None = None
    state: FileState | None = None
    frame_rate: float = FOLDER_FPS

    @property
    def media_id(self) -> str:
        """Name of the record."""
        return media_id(self.name, self.start, self.end, self.key_frame)


@dataclass(frozen=True)
class Sources:
    """The videos to build records from.

    Attributes:
        splits: videos by split name, in the order in which the shards store them.
        unusable: files and folders that cannot become records, with reasons.
        classes: class names in the order of their labels.
        task: kind of annotation of the records.
        expected: number of videos that the data set lists for each split, including missing ones; empty without a list.
        key_frames: common properties of key frames; None except for action detection.
    """

    splits: dict[str, list[Video]]
    unusable: list[VideoError]
    classes: tuple[str, ...]
    task: Task
    expected: Mapping[str, int] = field(default_factory=dict)
    key_frames: KeyFrameInfo | None = None


def find_videos(
    videos: Path,
    *,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """Finds the videos in class folders; the arguments are those of `build_records`.

    Files outside the class folders, and class folders without a file, are unusable.

    Raises:
        UserError: a setting is out of range; a folder does not exist or has another layout; or `classes` lacks a class.
    """
    _check_splits(splits, split)
    if not videos.is_dir():
        raise UserError(f"videos: {videos} is not a folder")
    known = _Classes.read(classes) if classes else None
    unusable: list[VideoError] = []
    folders = {name: videos / name for name in splits or ()}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"splits: {folder} is not a folder")
    if splits is None and split is None:
        folders = find_split_folders(videos)
        unusable += _report_ignored(videos, folders)
    if folders:
        found = {
            name: shuffle_by_hash(_videos_in_class_folders(folder, videos, known, unusable), seed)
            for name, folder in folders.items()
        }
    else:
        found = _split_by_fraction(_videos_in_class_folders(videos, videos, known, unusable), split, seed)
    if not any(found.values()):
        ignored = f"; ignored {counted(len(unusable), 'other entry')}" if unusable else ""
        raise UserError(f"videos: {videos} has no class folders with videos in them{ignored}")
    return Sources(found, unusable, known.names if known else _sorted_class_names(found), "single_label")


def parse_split_name(name: str) -> str | None:
    """Returns the split that a folder's or a csv cell's name stands for ("Validation" is "val"), or None."""
    name = name.casefold()
    name = _SPELLINGS.get(name, name)
    return name if name in SPLIT_NAMES else None


def find_split_folders(videos: Path) -> dict[str, Path]:
    """Finds the split folders that are used without `splits`, in the order of `SPLIT_NAMES`.

    These are the folders for train, val and test, under the names that `parse_split_name` recognises. The result is
    empty unless a train folder with folders in it and at least one other split folder exist.

    Raises:
        UserError: two folders stand for the same split.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(_visible_entries(videos)) if videos.is_dir() else ():
        split = parse_split_name(folder.name)
        if split and folder.is_dir():
            found.setdefault(split, []).append(folder)
    train_entries = (entry for folder in found.get("train", ()) for entry in _visible_entries(folder))
    if len(found) < 2 or not any(entry.is_dir() for entry in train_entries):
        return {}
    for split, folders in found.items():
        if len(folders) > 1:
            raise UserError(
                f"videos: {folders[0]} and {folders[1]} both stand for split {split}. Move the videos into one of "
                "them, or list the folders to use in --splits"
            )
    return {name: found[name][0] for name in SPLIT_NAMES if name in found}


def _report_ignored(videos: Path, folders: Mapping[str, Path]) -> list[VideoError]:
    """Reports the entries beside the split folders, which are ignored."""
    names = ", ".join(folder.name for folder in folders.values())
    others = sorted(set(_visible_entries(videos)) - set(folders.values())) if folders else []
    return [VideoError(path, f"is outside the split folders {names}") for path in others]


def read_csv(
    table: Path,
    *,
    videos: Path | None = None,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """Reads the videos that a csv file lists; the arguments and columns are described at `build_records`.

    The delimiter may be a comma, ";" or a tab. With ";" or tabs, seconds may have decimal commas. The file may begin
    with a byte order mark. The `'` that the package writes before text that a spreadsheet would run as a formula is
    removed.

    Files that do not exist are unusable, not errors: public datasets list many videos that are no longer available.

    Raises:
        UserError: a cell breaks its rule (the message names the file, line, column, rule and value), or none of the
            files exists.
    """
    _check_splits(splits, split)
    base = table.parent if videos is None else videos
    known = _Classes.read(classes) if classes else None
    header, rows = _read_rows(table)
    require(not splits or "split" in header, f"{table}, line 1", "have a column split, for --splits", header)
    require(split is None or "split" not in header, "split", f"be omitted, because {table} has a column split", split)
    allowed = tuple(splits or SPLIT_NAMES)
    found: dict[str, list[Video]] = {}
    listed: dict[str, set[str]] = {}
    lines: dict[tuple[Path, float, float | None], int] = {}
    unusable = []
    multi_label = False
    for row in rows:
        video = _parse_video(row, base, known)
        multi_label |= len(video.classes) > 1
        segment = (video.path.absolute(), video.start, video.end)
        rule = f"not be listed twice with the same times (first in line {lines.get(segment)})"
        row.check(segment not in lines, "path", rule)
        lines[segment] = row.line
        name = row.values.get("split", "train")
        name = name if splits else parse_split_name(name) or name
        row.check(name in allowed, "split", f"be one of {', '.join(allowed)}; use --splits for other names")
        members = found.setdefault(name, [])
        listed.setdefault(name, set()).add(video.name)
        if _is_file(video.path):
            members.append(video)
        else:
            unusable.append(VideoError(video.path, f"does not exist ({table}, line {row.line})"))
    require(bool(lines), str(table), "list at least one video below its header")
    for name in splits or ():
        require(name in found, "splits", f"occur in the column split of {table}", name)
    if not any(found.values()):
        raise UserError(
            f"no file listed in {table} exists ({len(lines)} listed); the first is {unusable[0].path}. Paths are "
            f"relative to {'--videos' if videos else 'the folder of the csv file; set --videos to use another folder'}"
        )
    task: Task = "multi_label" if multi_label else "single_label"
    if "split" in header:
        ordered = {name: shuffle_by_hash(found[name], seed) for name in allowed if name in found}
    else:
        ordered = _split_by_fraction(found["train"], split, seed)
    expected = {} if split else {name: len(names) for name, names in listed.items()}  # a missing file has no split
    return Sources(ordered, unusable, known.names if known else _sorted_class_names(ordered), task, expected)


class _Classes(NamedTuple):
    """The class names of a file: in order, and as a set for lookups."""

    names: tuple[str, ...]
    known: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> "_Classes":
        names = read_classes(path)
        return cls(names, frozenset(names))


@dataclass(frozen=True)
class _Row:
    """A row of a csv file: its position and its values by column."""

    table: Path
    line: int
    values: Mapping[str, str]
    delimiter: str

    def where(self, column: str) -> str:
        return f"{self.table}, line {self.line}, column {column}"

    def check(self, condition: bool, column: str, rule: str) -> None:
        if not condition:
            require(False, self.where(column), rule, self.values.get(column, ""))


def _read_rows(table: Path) -> tuple[list[str], Iterator[_Row]]:
    """Returns the columns of a csv file and an iterator over its rows."""
    text = read_text(table, "csv")
    delimiter = _detect_delimiter(text)
    reader = csv_files.Reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    lines = _numbered_rows(table, reader)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    for name in COLUMNS[:2]:
        require(name in header, f"{table}, line 1", f"have a column {name}", header)
    for name in header:
        require(name in COLUMNS, f"{table}, line 1", f"have only the columns {', '.join(COLUMNS)}", name)
    require(len(set(header)) == len(header), f"{table}, line 1", "not repeat a column", header)

    def rows() -> Iterator[_Row]:
        for line, cells in lines:
            count = len(header)
            require(len(cells) == count, f"{table}, line {line}", f"have {count} values, like the header", cells)
            # People write spaces around commas, but a file name may begin with a space.
            values = {n: cell if n == "path" else cell.strip() for n, cell in zip(header, cells, strict=True)}
            yield _Row(table, line, values, delimiter)

    return header, rows()


def _detect_delimiter(text: str) -> str:
    """Returns the delimiter that yields the most known columns in the first line."""
    match = re.match(r"[\r\n]*([^\r\n]*)", text)
    first = match[1] if match else ""

    def columns(delimiter: str) -> int:
        names = {name.strip().strip('"') for name in first.split(delimiter)}
        return len(names & set(COLUMNS))

    return max(_DELIMITERS, key=columns)


def _numbered_rows(table: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields the non-empty rows, each with the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{table}, line {line} is not valid csv: {error}") from error
        if cells:
            yield line, cells


def _parse_video(row: _Row, base: Path, classes: "_Classes | None") -> Video:
    text = row.values["path"]
    row.check(bool(text.strip()) and "\0" not in text, "path", "be a file path")
    path = base / os.path.normpath(text)
    start, end = _parse_seconds(row, "start") or 0.0, _parse_seconds(row, "end")
    row.check(end is None or end > start, "end", f"be greater than the start, {start} s")
    relative = path.relative_to(base) if path.is_relative_to(base) else path
    return Video(path, relative.as_posix(), _parse_labels(row, classes), start, end)


def _parse_seconds(row: _Row, column: str) -> float | None:
    text = row.values.get(column, "")
    if not text:
        return None
    seconds = decimal(text if row.delimiter == "," else text.replace(",", "."))
    row.check(0 <= seconds <= _MAX_SECONDS, column, f"be a time in seconds from 0 to {_MAX_SECONDS:,.0f}, or empty")
    return seconds


def _parse_labels(row: _Row, classes: "_Classes | None") -> tuple[str, ...]:
    labels = [label.strip() for label in row.values["label"].split(LABEL_SEPARATOR)]
    row.check(all(labels), "label", f"be one class name, or several separated by {LABEL_SEPARATOR}")
    for label in labels:
        check_class_name(label, row.where("label"))
    known = tuple(_resolve_class(label, classes, row.where("label")) for label in labels)
    row.check(len(set(known)) == len(known), "label", "not repeat a class")
    return known


def _resolve_class(label: str, classes: "_Classes | None", where: str) -> str:
    """Returns the class that a label stands for. With `classes`, a label is a class name or else a class number."""
    if classes is None or label in classes.known:
        return label
    count = len(classes.names)
    number = whole(label)
    if number is None or number >= count:
        rule = f"be one of the {count} names in the class file, or a number in 0..{count - 1}"
        require(False, where, rule, label)
    return classes.names[number or 0]


def _videos_in_class_folders(
    folder: Path, root: Path, classes: "_Classes | None", unusable: list[VideoError]
) -> list[Video]:
    """Returns the files of the class folders; appends other files and empty class folders to `unusable`."""
    videos: list[Video] = []
    for class_folder in sorted(_visible_entries(folder)):
        if not class_folder.is_dir():
            unusable.append(VideoError(class_folder, "is not in a class folder"))
            continue
        files = sorted(_visible_entries(class_folder))
        if not files:
            unusable.append(VideoError(class_folder, "is a class folder without videos"))
            continue
        name = _to_utf8(class_folder.name)
        check_class_name(name, f"the name of {class_folder}")
        name = _resolve_class(name, classes, f"the name of {class_folder}")
        for file in files:
            if file.is_dir():
                raise UserError(
                    f"{file} is a folder, but class folders must hold video files. If {folder.name}/ has one folder "
                    f"per split, name them: --splits={','.join(sorted(p.name for p in _visible_entries(folder)))}"
                )
            videos.append(Video(file, _to_utf8(file.relative_to(root).as_posix()), (name,)))
    return videos


def _split_by_fraction(videos: list[Video], fraction: float | None, seed: int) -> dict[str, list[Video]]:
    """Puts all videos into "train", or a fraction of each class's files into "test".

    All segments of a file go to the same split.
    """
    if fraction is None:
        return {"train": shuffle_by_hash(videos, seed)}
    files: dict[Path, list[Video]] = {}
    for video in sorted(videos, key=lambda video: video.start):
        files.setdefault(video.path, []).append(video)
    classes_by_path = {path: {name for video in members for name in video.classes} for path, members in files.items()}
    groups: dict[str, list[list[Video]]] = {}
    one_class = all(len(names) == 1 for names in classes_by_path.values())  # else a file belongs to no single class
    for path, members in files.items():
        groups.setdefault(min(classes_by_path[path]) if one_class else "", []).append(members)
    train, test = [], []
    for group in groups.values():
        shuffled = sorted(group, key=lambda members: _shuffle_key(members[0], seed))
        # Each split gets at least one file if the group has two.
        count = min(max(round(fraction * len(group)), 1), len(group) - 1)
        test += [video for members in shuffled[:count] for video in members]
        train += [video for members in shuffled[count:] for video in members]
    return {"train": shuffle_by_hash(train, seed), "test": shuffle_by_hash(test, seed)}


def shuffle_by_hash(videos: list[Video], seed: int) -> list[Video]:
    """Shuffles videos by a hash of seed and name, so that adding a video keeps the order of the others."""
    return sorted(videos, key=lambda video: _shuffle_key(video, seed))


def _shuffle_key(video: Video, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{video.media_id}".encode()).digest()


def _sorted_class_names(found: dict[str, list[Video]]) -> tuple[str, ...]:
    return class_names.sort_class_names(name for videos in found.values() for video in videos for name in video.classes)


def _check_splits(splits: Sequence[str] | None, split: float | None) -> None:
    require(splits is None or split is None, "splits and split", "not be set together", (splits, split))
    require(split is None or 0 < split < 1, "split", "be between 0 and 1", split)
    if splits is not None:
        good = len(set(splits)) == len(splits) > 0 and all(_is_plain_name(name) for name in splits)
        require(good, "splits", "be distinct names of folders, or of splits in a csv file", tuple(splits))


def _is_plain_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and os.sep not in name


def _visible_entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _to_utf8(name: str) -> str:
    """Replaces bytes of a file name that are not valid UTF-8, so that it can be stored as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
