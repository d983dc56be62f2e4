"""Which videos become records, of which classes and in which order: from folders, or from a csv file that lists them.

Imports no TensorFlow: the builder's worker processes import this module.
"""

import codecs
import csv
import hashlib
import io
import os
import re
from x3d_tf.files import read_text
from x3d_tf.types import Annotation, Task
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import csv_files
from x3d_tf.errors import UserError, require
from x3d_tf.files import LARGE, read_limited
from x3d_tf.text import check_class_name, decimal, whole
from x3d_tf.data.build import class_names
from x3d_tf.data.records.index import segment_id
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import FOLDER_FPS, State
from x3d_tf.types import Task

COLUMNS = ("path", "label", "split", "start", "end")  # of a csv file; the first two have to be there
LABEL_SEPARATOR = ";"
_LONGEST = 1e6  # seconds of a video that a list may name: beyond, times have no precision of a frame
SPLIT_NAMES = ("train", "val", "test")  # that folders, or a csv file's column, may have without their being named
_SPELLINGS = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "testing": "test"}
_DELIMITERS = (",", ";", "\t")  # spreadsheets write ";" where the comma is the decimal one




class Video(NamedTuple):
    """A video that is to become a record.

    Attributes:
        path: the file.
        media_id: the record's name.
        classes: names of its classes, none twice.
        start: seconds of the file to leave out at the beginning.
        end: second of the file to stop before; None is its end.
        annotation: of one of the frames between, where a record is of that.
        state: of the file when the build began, to notice a change; None where that does not matter.
        frame_rate: images a second, where the path is a folder of frames.
    """

    path: Path
    media_id: str
    classes: tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    annotation: Annotation | None = None
    state: State | None = None
    frame_rate: float = FOLDER_FPS


@dataclass(frozen=True)
class Sources:
    """What there is to make records of.

    Attributes:
        splits: the videos of each split by its name, in the order in which they will lie in its shards.
        unusable: what was found and cannot become a record, with reasons.
        classes: names of the classes in the order of their labels.
        task: whether a video may have several classes.
        facts: what else of them goes to the manifest's settings.
    """

    splits: dict[str, list[Video]]
    unusable: list[VideoError]
    classes: tuple[str, ...]
    task: Task
    facts: Mapping[str, int | float | str] = field(default_factory=dict)


def find_videos(
    videos: Path,
    *,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """The videos in a folder of folders, one for each class; arguments as `build_records`.

    Files that lie outside the class folders, and class folders without a file, are unusable.

    Raises:
        UserError: a setting out of range, a folder that does not exist or is not laid out so, a class that `classes`
            does not name.
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
        folders = default_splits(videos)
        unusable += _beside(videos, folders)
    if folders:
        found = {
            name: in_order(_in_class_folders(folder, videos, known, unusable), seed) for name, folder in folders.items()
        }
    else:
        found = _by_fraction(_in_class_folders(videos, videos, known, unusable), split, seed)
    if not any(found.values()):
        beside = f"; {len(unusable)} entries are no such folders" if unusable else ""
        raise UserError(f"videos: {videos} holds no folder with files for each class{beside}")
    return Sources(found, unusable, known.names if known else _classes_of(found), "single_label")


def split_of(name: str) -> str | None:
    """The split that the name of a folder, or a cell of a list, means: "Validation" is "val"; None where it is none."""
    name = name.casefold()
    name = _SPELLINGS.get(name, name)
    return name if name in SPLIT_NAMES else None


def default_splits(videos: Path) -> dict[str, Path]:
    """The split folders that are used without being named, in the order of `SPLIT_NAMES`.

    Those for train, val and test, under the names that `split_of` knows, where there is one for train with folders in
    it, and another; else none.

    Raises:
        UserError: two folders for one split.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(_visible(videos)) if videos.is_dir() else ():
        split = split_of(folder.name)
        if split and folder.is_dir():
            found.setdefault(split, []).append(folder)
    if len(found) < 2 or not any(entry.is_dir() for folder in found.get("train", ()) for entry in _visible(folder)):
        return {}
    for split, folders in found.items():
        if len(folders) > 1:
            raise UserError(
                f"videos: {folders[0]} and {folders[1]} are both the folder of split {split}; move the videos into one "
                "of them, or name the folders to use with --splits"
            )
    return {name: found[name][0] for name in SPLIT_NAMES if name in found}


def _beside(videos: Path, folders: Mapping[str, Path]) -> list[VideoError]:
    """What lies beside the split folders, and so becomes no record."""
    names = ", ".join(folder.name for folder in folders.values())
    others = sorted(set(_visible(videos)) - set(folders.values())) if folders else []
    return [VideoError(path, f"is beside the split folders {names}, not in one of them") for path in others]


def read_csv(
    table: Path,
    *,
    videos: Path | None = None,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """The videos that a csv file lists; arguments as `build_records`, which describes the columns.

    Cells may be separated by ";" or tabs instead of commas; seconds then may have decimal commas. A byte order mark may
    be first. A leading `'` before text that a spreadsheet would take for a formula is removed, as the package writes
    such cells.

    Files that do not exist are unusable: lists of public datasets name many videos that can no longer be had.

    Raises:
        UserError: naming the file, the line, the column, the rule and the value received; or that none of the files
            exists.
    """
    _check_splits(splits, split)
    base = table.parent if videos is None else videos
    known = _Classes.read(classes) if classes else None
    header, rows = _rows(table)
    require(not splits or "split" in header, f"{table}, line 1", "have a column split, for --splits", header)
    require(split is None or "split" not in header, "split", f"not be given: {table} has a column split", split)
    allowed = tuple(splits or SPLIT_NAMES)
    found: dict[str, list[Video]] = {}
    lines: dict[tuple[Path, float, float | None], int] = {}
    unusable = []
    several = False
    for row in rows:
        video = _video(row, base, known)
        several |= len(video.classes) > 1
        place = (video.path.absolute(), video.start, video.end)
        again = f"not be listed again with the same times: line {lines.get(place)} has it"
        row.check(place not in lines, "path", again)
        lines[place] = row.line
        part = row.values.get("split", "train")
        part = part if splits else split_of(part) or part
        row.check(part in allowed, "split", f"be one of {', '.join(allowed)} (--splits gives other names)")
        members = found.setdefault(part, [])
        if _is_file(video.path):
            members.append(video)
        else:
            unusable.append(VideoError(video.path, f"no such file ({table}, line {row.line})"))
    require(bool(lines), str(table), "list videos below its first line", "no line")
    for name in splits or ():
        require(name in found, "splits", f"be in the column split of {table}", name)
    if not any(found.values()):
        raise UserError(
            f"no file that {table} lists exists ({len(lines)} listed), such as {unusable[0].path}: paths are relative "
            f"to {'--videos' if videos else 'the folder of the csv file, unless --videos gives another'}"
        )
    task: Task = "multi_label" if several else "single_label"
    if "split" in header:
        ordered = {name: in_order(found[name], seed) for name in allowed if name in found}
    else:
        ordered = _by_fraction(found["train"], split, seed)
    return Sources(ordered, unusable, known.names if known else _classes_of(ordered), task)


def read_classes(path: Path) -> tuple[str, ...]:
    """The names of classes in a text file, one a line, in the order of their labels.

    Raises:
        UserError: the file cannot be read, an empty line between names, a name that is there twice.
    """
    names = [line.strip() for line in read_text(path, "classes").rstrip().split("\n")]
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        require(bool(name), f"{path}, line {line}", "name a class: each line counts", name)
        check_class_name(name, f"{path}, line {line}")
        require(name not in seen, f"{path}, line {line}", f"not repeat line {seen.get(name)}", name)
        seen[name] = line
    return tuple(names)


def kinetics_classes() -> tuple[str, ...]:
    """The names of Kinetics-400's classes in the order of their labels."""
    with resources.as_file(resources.files("x3d_tf.data") / "labels" / "kinetics400.txt") as path:
        return read_classes(path)


class _Classes(NamedTuple):
    """The classes that a file names: in order, and for looking them up."""

    names: tuple[str, ...]
    known: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> "_Classes":
        names = read_classes(path)
        return cls(names, frozenset(names))


@dataclass(frozen=True)
class _Row:
    """A line of a csv file: where it stands, and its values by column."""

    table: Path
    line: int
    values: Mapping[str, str]
    delimiter: str

    def where(self, column: str) -> str:
        return f"{self.table}, line {self.line}, column {column}"

    def check(self, condition: bool, column: str, rule: str) -> None:
        if not condition:
            require(False, self.where(column), rule, self.values.get(column, ""))


def _rows(table: Path) -> tuple[list[str], Iterator[_Row]]:
    """The columns of a csv file, and its rows as they are asked for."""
    text = read_text(table, "csv")
    delimiter = _delimiter(text)
    reader = csv_files.Reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    lines = _numbered(table, reader)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    for name in COLUMNS[:2]:
        require(name in header, f"{table}, line 1", f"have a column {name}", header)
    for name in header:
        require(name in COLUMNS, f"{table}, line 1", f"have no other columns than {', '.join(COLUMNS)}", name)
    require(len(set(header)) == len(header), f"{table}, line 1", "have each column once", header)

    def rows() -> Iterator[_Row]:
        for line, cells in lines:
            count = len(header)
            require(len(cells) == count, f"{table}, line {line}", f"have {count} values, as line 1 has", cells)
            # Spaces beside commas are habit, but a file's name may begin with one.
            values = {n: cell if n == "path" else cell.strip() for n, cell in zip(header, cells, strict=True)}
            yield _Row(table, line, values, delimiter)

    return header, rows()


def _delimiter(text: str) -> str:
    """What separates the cells of a list: that by which its first line has most of the columns."""
    match = re.match(r"[\r\n]*([^\r\n]*)", text)
    first = match[1] if match else ""

    def columns(delimiter: str) -> int:
        names = {name.strip().strip('"') for name in first.split(delimiter)}
        return len(names & set(COLUMNS))

    return max(_DELIMITERS, key=columns)


def _numbered(table: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not empty, with the number of the line on which each begins."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{table}, line {line} is not csv: {error}") from error
        if cells:
            yield line, cells


def _video(row: _Row, base: Path, classes: "_Classes | None") -> Video:
    text = row.values["path"]
    row.check(bool(text.strip()) and "\0" not in text, "path", "be the path of a file")
    path = base / os.path.normpath(text)
    start, end = _seconds(row, "start"), _seconds(row, "end")
    row.check(end is None or end > (start or 0.0), "end", f"be after the start, {start or 0.0} s")
    relative = path.relative_to(base) if path.is_relative_to(base) else path
    return Video(path, segment_id(relative.as_posix(), start, end), _labels(row, classes), start or 0.0, end)


def _seconds(row: _Row, column: str) -> float | None:
    text = row.values.get(column, "")
    if not text:
        return None
    seconds = decimal(text if row.delimiter == "," else text.replace(",", "."))
    row.check(0 <= seconds <= _LONGEST, column, f"be seconds, 0 to {_LONGEST:,.0f}, or empty")
    return seconds


def _labels(row: _Row, classes: "_Classes | None") -> tuple[str, ...]:
    labels = [label.strip() for label in row.values["label"].split(LABEL_SEPARATOR)]
    row.check(all(labels), "label", f"name a class, or several separated by {LABEL_SEPARATOR}")
    for label in labels:
        check_class_name(label, row.where("label"))
    known = tuple(_known(label, classes, row.where("label")) for label in labels)
    row.check(len(set(known)) == len(known), "label", "name no class twice")
    return known


def _known(label: str, classes: "_Classes | None", where: str) -> str:
    """The class of a label: itself, or with a list of classes the one of that name, or else of that number."""
    if classes is None or label in classes.known:
        return label
    count = len(classes.names)
    number = whole(label)
    if number is None or number >= count:
        rule = f"be a name in the file of classes, which has {count}, or a number in 0..{count - 1}"
        require(False, where, rule, label)
    return classes.names[number or 0]


def _in_class_folders(folder: Path, root: Path, classes: "_Classes | None", unusable: list[VideoError]) -> list[Video]:
    """The files of the class folders; what lies beside those, and folders without a file, go to `unusable`."""
    videos: list[Video] = []
    for class_folder in sorted(_visible(folder)):
        if not class_folder.is_dir():
            unusable.append(VideoError(class_folder, "is not in a class folder"))
            continue
        files = sorted(_visible(class_folder))
        if not files:
            unusable.append(VideoError(class_folder, "is a class folder without a video"))
            continue
        name = _text(class_folder.name)
        check_class_name(name, f"the name of {class_folder}")
        name = _known(name, classes, f"the name of {class_folder}")
        for file in files:
            if file.is_dir():
                raise UserError(
                    f"{file} is a folder, but class folders hold video files; if {folder.name}/ holds a folder for "
                    f"each split, give their names: --splits={','.join(sorted(p.name for p in _visible(folder)))}"
                )
            videos.append(Video(file, _text(file.relative_to(root).as_posix()), (name,)))
    return videos


def _by_fraction(videos: list[Video], part: float | None, seed: int) -> dict[str, list[Video]]:
    """All for training, or a part of the files of each class for testing; all pieces of a file go together."""
    if part is None:
        return {"train": in_order(videos, seed)}
    files: dict[Path, list[Video]] = {}
    for video in sorted(videos, key=lambda video: video.start):
        files.setdefault(video.path, []).append(video)
    kinds = {path: {name for video in members for name in video.classes} for path, members in files.items()}
    groups: dict[str, list[list[Video]]] = {}
    one_class = all(len(names) == 1 for names in kinds.values())  # else files belong to no class of their own
    for path, members in files.items():
        groups.setdefault(min(kinds[path]) if one_class else "", []).append(members)
    train, test = [], []
    for group in groups.values():
        shuffled = sorted(group, key=lambda members: _hash(members[0], seed))
        # Rounded, but each side gets a file where there are two.
        count = min(max(round(part * len(group)), 1), len(group) - 1)
        test += [video for members in shuffled[:count] for video in members]
        train += [video for members in shuffled[count:] for video in members]
    return {"train": in_order(train, seed), "test": in_order(test, seed)}


def in_order(videos: list[Video], seed: int) -> list[Video]:
    """All videos, shuffled by a hash of seed and name: classes mix, and one video more or less moves no other."""
    return sorted(videos, key=lambda video: _hash(video, seed))


def _hash(video: Video, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{video.media_id}".encode()).digest()


def _classes_of(found: dict[str, list[Video]]) -> tuple[str, ...]:
    return class_names.in_order(name for videos in found.values() for video in videos for name in video.classes)


def _check_splits(splits: Sequence[str] | None, split: float | None) -> None:
    require(splits is None or split is None, "splits and split", "not be given together", (splits, split))
    require(split is None or 0 < split < 1, "split", "be between 0 and 1", split)
    if splits is not None:
        good = len(set(splits)) == len(splits) > 0 and all(_is_plain(name) for name in splits)
        require(good, "splits", "be distinct names of folders, or of a csv file's column", tuple(splits))


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and os.sep not in name


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _text(name: str) -> str:
    """A file name as text that can be stored: file systems also hold names that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


