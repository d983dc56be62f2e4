"""The data set `csv`: videos that a csv file lists, with their classes, splits and segments. Imports no TensorFlow."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from x3d_tf import csv_files
from x3d_tf.data.building.sources import (
    SPLIT_NAMES,
    ClassList,
    Sources,
    Video,
    check_splits,
    parse_split_name,
    resolve_class,
    shuffle_by_hash,
    sorted_class_names,
    split_by_fraction,
)
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, decimal
from x3d_tf.types import AnnotationKind

COLUMNS = ("path", "label", "split", "start", "end")  # the first two are required
LABEL_SEPARATOR = ";"
_MAX_SECONDS = 1e6  # largest start or end time: beyond it, times are less precise than a frame
_DELIMITERS = (",", ";", "\t")  # spreadsheets write ";" in locales with decimal commas


class Csv:
    """Videos that a csv file lists."""

    name = "csv"
    requires = ("csv",)
    accepts = ("videos", "splits", "split", "classes")
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos; see `read_csv`."""
        return read_csv(
            inputs.path("csv"),
            videos=inputs.videos,
            splits=inputs.splits,
            split=inputs.split,
            seed=inputs.seed,
            classes=inputs.classes,
        )


DATASETS = (Csv(),)


def read_csv(
    table: Path,
    *,
    videos: Path | None = None,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """Reads the videos that a csv file lists.

    Args:
        table: the csv file. UTF-8, delimited by commas, ";" or tabs. Required columns: `path` and `label`. Optional
            columns: `split` ("train", "val", "test", or the names in `splits`), `start` and `end` (seconds of the video
            to keep; default to the complete video). A file may be listed several times with different times, in one
            split. Several labels in any row, separated by ";" (in quotes if ";" is the delimiter), make the records
            multi-label.
        videos: folder that the paths are relative to; defaults to the folder of the csv file.
        splits: names of the splits in the csv file.
        split: fraction of the files for the split "test"; for single-label videos, of each class.
        seed: random seed for the order of the videos and for choosing the test split.
        classes: text file of the class names, in the order of their labels; see `folder.find_videos`.

    The delimiter may be a comma, ";" or a tab. With ";" or tabs, seconds may have decimal commas. The file may begin
    with a byte order mark. The `'` that the package writes before text that a spreadsheet would run as a formula is
    removed.

    Files that do not exist are unusable, not errors: public datasets list many videos that are no longer available.
    Segments that end more than a second after their video cannot become records, either.

    Raises:
        UserError: a cell breaks its rule (the message names the file, line, column, rule and value), or none of the
            files exists.
    """
    check_splits(splits, split)
    base = table.parent if videos is None else videos
    known = ClassList.read(classes) if classes else None
    header, rows = _read_rows(table)
    require(not splits or "split" in header, f"{table}, line 1", "have a column split, for --splits", header)
    require(split is None or "split" not in header, "split", f"be omitted, because {table} has a column split", split)
    allowed = tuple(splits or SPLIT_NAMES)
    found: dict[str, list[Video]] = {}
    listed: dict[str, set[str]] = {}
    lines: dict[tuple[Path, float, float | None], int] = {}
    split_of: dict[str, tuple[str, int]] = {}  # by file: its split, and the line that lists it first
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
        owner, first = split_of.setdefault(os.path.realpath(video.path), (name, row.line))
        row.check(owner == name, "split", f"be {owner}, like line {first}, because a file may be in one split only")
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
    task: AnnotationKind = "multi_label" if multi_label else "single_label"
    if "split" in header:
        ordered = {name: shuffle_by_hash(found[name], seed) for name in allowed if name in found}
    else:
        ordered = split_by_fraction(found["train"], split, seed)
    expected = {} if split else {name: len(names) for name, names in listed.items()}  # a missing file has no split
    return Sources(ordered, unusable, known.names if known else sorted_class_names(ordered), task, expected)


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
    lines = csv_files.numbered_rows(table, text, delimiter)
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


def _parse_video(row: _Row, base: Path, classes: ClassList | None) -> Video:
    text = row.values["path"]
    row.check(bool(text.strip()) and "\0" not in text, "path", "be a file path")
    path = base / os.path.normpath(text)
    start, end = _parse_seconds(row, "start") or 0.0, _parse_seconds(row, "end")
    row.check(end is None or end > start, "end", f"be greater than the start, {start} s")
    relative = path.relative_to(base) if path.is_relative_to(base) else path
    return Video(path, relative.as_posix(), _parse_labels(row, classes), start, end, must_cover_segment=end is not None)


def _parse_seconds(row: _Row, column: str) -> float | None:
    text = row.values.get(column, "")
    if not text:
        return None
    seconds = decimal(text if row.delimiter == "," else text.replace(",", "."))
    row.check(0 <= seconds <= _MAX_SECONDS, column, f"be a time in seconds from 0 to {_MAX_SECONDS:,.0f}, or empty")
    return seconds


def _parse_labels(row: _Row, classes: ClassList | None) -> tuple[str, ...]:
    labels = [label.strip() for label in row.values["label"].split(LABEL_SEPARATOR)]
    row.check(all(labels), "label", f"be one class name, or several separated by {LABEL_SEPARATOR}")
    for label in labels:
        check_class_name(label, row.where("label"))
    known = tuple(resolve_class(label, classes, row.where("label")) for label in labels)
    row.check(len(set(known)) == len(known), "label", "not repeat a class")
    return known


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False
