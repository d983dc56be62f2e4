"""The data sets `kinetics400`, `kinetics600` and `kinetics700`. Imports no TensorFlow.

A list is the official csv of a split, or a list of PySlowFast with the path and the class number of a video per line.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from x3d_tf import csv_files
from x3d_tf.data.building import class_names
from x3d_tf.data.building.listed import ClassNames, Entry, VideoFiles, collect
from x3d_tf.data.building.sources import Sources, parse_split_name
from x3d_tf.data.class_lists import kinetics_classes, read_classes
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, decimal, lines_of

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_IGNORED = ("is_cc",)  # Creative Commons license, in the first edition's lists
_MAX_SECONDS = 999_999  # file names have six digits
_SEPARATOR = re.compile(r"[,;\s]")
_CLIP = re.compile(r"(?P<id>[\w-]{11})(_\d{6}_\d{6})?", re.ASCII)  # name of an official clip


@dataclass(frozen=True)
class Kinetics:
    """Clips of YouTube videos, each with one class.

    Attributes:
        name: name of the data set.
        count: number of classes.
    """

    name: str
    count: int
    requires = ("videos", "lists")
    flips = True

    @property
    def accepts(self) -> tuple[str, ...]:
        """Inputs besides the required ones. The class names of Kinetics-700 are not part of this package."""
        return () if self.count in (400, 600) else ("classes",)

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the clips of the lists; see `collect` for missing ones.

        A clip is the file `ID_SSSSSS_EEEEEE.*` with its start and end in seconds, in six digits each, or else the
        segment of the complete video `ID.*`. Both may be in any folder.

        Raises:
            UserError: a list cannot be read or a line breaks its rule; the message names file and line.
        """
        rows = {split: _read_list(path, split) for split, path in inputs.lists.items()}
        classes = self._classes(inputs.classes, rows)
        files = VideoFiles(inputs.path("videos"))
        lists = {split: [row.entry(classes, files) for row in members] for split, members in rows.items()}
        return collect(files.folder, lists, classes.names, inputs.seed)

    def _classes(self, file: Path | None, rows: "dict[str, list[_Clip | _Line]]") -> ClassNames:
        """Returns the official classes: of this package, of a file, or the labels of the official lists."""
        if self.count in (400, 600):
            return ClassNames(kinetics_classes(cast(Literal[400, 600], self.count)), f"the classes of {self.name}")
        if file is not None:
            return ClassNames(read_classes(file), f"the classes in {file}")
        found = [row for members in rows.values() for row in members]
        clips = [row for row in found if isinstance(row, _Clip)]
        rule = f"be given for the data set {self.name} if a list has class numbers"
        require(len(clips) == len(found), "--classes", rule)
        names = class_names.sort_class_names(clip.label for clip in clips)
        return ClassNames(names, "the labels of the lists")


DATASETS = (Kinetics("kinetics400", 400), Kinetics("kinetics600", 600), Kinetics("kinetics700", 700))


@dataclass(frozen=True)
class _Clip:
    """A row of an official csv."""

    where: str
    label: str
    youtube_id: str
    start: float
    end: float

    def entry(self, classes: ClassNames, files: VideoFiles) -> Entry:
        """Finds the file of the clip, or of the complete video."""
        label = classes.find(self.label, f"{self.where}, column label")
        name = f"{self.youtube_id}_{int(self.start):06d}_{int(self.end):06d}"
        clip = files.named(name, label)
        if clip:
            return Entry(name, (label,), self.where, clip, source=self.youtube_id)
        complete = files.named(self.youtube_id, label)
        return Entry(name, (label,), self.where, complete, self.start, self.end, self.youtube_id)


@dataclass(frozen=True)
class _Line:
    """A line of a PySlowFast list: a path, with an optional second name that is ignored, and a class number."""

    where: str
    path: str
    separator: str
    label: str

    def entry(self, classes: ClassNames, files: VideoFiles) -> Entry:
        """Finds the file at the path."""
        label = classes.at(self.label, self.where)
        found, path = files.at(self.path), self.path
        first = self.path.rpartition(self.separator)[0].strip()
        if not found and first and files.at(first):
            found, path = files.at(first), first
        clip = _CLIP.fullmatch(Path(path).stem)
        name = found[0].relative_to(files.folder) if found else Path(path)
        return Entry(name.as_posix(), (label,), self.where, found, source=clip["id"] if clip else "")


def _read_list(path: Path, split: str) -> "list[_Clip | _Line]":
    """Reads the list of a split in either format; the first line of the official one names its columns."""
    text = read_text(path, "lists")
    first = text.lstrip().partition("\n")[0]
    if "youtube_id" in first or "label" in first.split(","):
        return _read_csv(path, text, split)
    rows: list[_Clip | _Line] = []
    for number, line in enumerate(lines_of(text), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        name, separator, label = _split_line(line)
        rule = f"have a path and a class number, or the first line must name the columns {','.join(COLUMNS)}"
        require(bool(name and label), where, f"{rule}; videos without a class cannot be used", line)
        rows.append(_Line(where, name, separator, label))
    return rows


def _split_line(line: str) -> tuple[str, str, str]:
    """Returns path, separator and class number of a line; a part that does not exist is empty.

    The time is linear in the length of the line.
    """
    line = line.rstrip()
    label = _SEPARATOR.split(line)[-1]
    before = line.removesuffix(label)
    path = before.rstrip()
    if path.endswith((",", ";")):
        return path[:-1].rstrip(), path[-1], label
    return path, before[-1:], label


def _read_csv(path: Path, text: str, split: str) -> "list[_Clip | _Line]":
    lines = csv_files.numbered_rows(path, text)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    if "label" not in header:
        raise UserError(
            f"{path}, line 1 must have a column label, got {header}. Official test lists have no labels: omit them"
        )
    rule = f"have the columns {','.join(COLUMNS)}"
    known = set(header) <= {*COLUMNS, *_IGNORED} and set(COLUMNS) <= set(header) and len(set(header)) == len(header)
    require(known, f"{path}, line 1", rule, header)
    rows: list[_Clip | _Line] = []
    for number, cells in lines:
        where = f"{path}, line {number}"
        require(len(cells) == len(header), where, f"have {len(header)} values, like the header", cells)
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        stated, wanted = (parse_split_name(name) or name for name in (row["split"], split))
        require(stated == wanted, f"{where}, column split", f"be {split}, the split in --lists", row["split"])
        rows.append(_clip(where, row))
    return rows


def _clip(where: str, row: dict[str, str]) -> _Clip:
    label, youtube_id = row["label"], row["youtube_id"]
    require(bool(label), f"{where}, column label", "name a class; lists without labels cannot be used", label)
    check_class_name(label, f"{where}, column label")
    plain_id = bool(re.fullmatch(r"[\w-]+", youtube_id, re.ASCII))
    require(plain_id, f"{where}, column youtube_id", "be letters, digits, - and _", youtube_id)
    times = []
    for name in ("time_start", "time_end"):
        second = decimal(row[name])
        rule = f"be a time in seconds from 0 to {_MAX_SECONDS}"
        require(0 <= second <= _MAX_SECONDS, f"{where}, column {name}", rule, row[name])
        times.append(second)
    start, end = times
    require(end > start, f"{where}, column time_end", f"be greater than time_start, {start:g}", row["time_end"])
    return _Clip(where, label, youtube_id, start, end)
