"""Reads and writes AVA's files: labelled boxes, person boxes, label maps and exclusions. Imports no TensorFlow.

Boxes lie on key frames, one per second of a film. Files name a key frame by its video and second, 902 to 1798 in AVA.
Files are untrusted input: errors name the file, line, rule and value.
"""

import csv
import io
import math
import re
from array import array
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf import csv_files
from x3d_tf.data.class_lists import read_classes
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_path, os_errors_as_write_error, read_text, require_regular
from x3d_tf.text import check_class_name, decimal, whole

# The 60 of AVA's 80 actions that its evaluation uses: those with at least 25 boxes in the validation set.
EVALUATED = frozenset(range(1, 81)) - {
    *(2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75),
}
FIRST_SECOND, LAST_SECOND = 902, 1798  # range of AVA's key frames
_MAX_ACTION = 100_000
_LINES_PER_UPDATE = 100_000  # of the progress bar
NO_ACTION = 0  # action numbers begin at 1

_TEXT = r'"[^"\n]*"|\'[^\'\n]*\''
_ITEM = re.compile(rf"\s*+(?:item|label)\s*+\{{((?:[^{{}}\"']++|{_TEXT})*+)\}}")
_ITEM_NAME = re.compile(r'\bname\s*+:\s*+(?:"([^"\n]*)"|\'([^\'\n]*)\')')
_ITEM_ID = re.compile(r"\b(?:label_)?id\s*+:\s*+([^\s,;]*)")

LabelMap = Mapping[int, str]  # action names by number
Kind = Literal["ground truth", "detections"]
_COLUMNS = {
    "ground truth": "video_id,timestamp,x1,y1,x2,y2,action_id,person_id",
    "detections": "video_id,timestamp,x1,y1,x2,y2,action_id,score",
}


class KeyFrame(NamedTuple):
    """A key frame: the name of its video, and its second in the film."""

    video: str
    second: int


@dataclass(frozen=True, eq=False)
class BoxTable:
    """The rows of a csv file of boxes, as columns.

    Attributes:
        key_frames: key frames with boxes, in the order of their first rows.
        frames: indices into `key_frames`, int32 [n].
        boxes: x1, y1, x2, y2 relative to the frame, in [0, 1], float64 [n, 4].
        actions: action numbers, or `NO_ACTION`, int32 [n].
        scores: scores, 1 for ground truth, float64 [n].
        lines: line numbers in the file, from 1, int32 [n].
        other_actions: number of rows left out because the label map lacks their AVA actions.
    """

    key_frames: tuple[KeyFrame, ...]
    frames: NDArray[np.int32]
    boxes: NDArray[np.float64]
    actions: NDArray[np.int32]
    scores: NDArray[np.float64]
    lines: NDArray[np.int32]
    other_actions: int = 0

    def __len__(self) -> int:
        return len(self.frames)


def ava_actions() -> dict[int, str]:
    """Returns AVA's 80 actions by number; its evaluation uses 60 of them."""
    with resources.as_file(resources.files("x3d_tf.data") / "labels" / "ava.txt") as path:
        return dict(enumerate(read_classes(path), 1))


def evaluated_actions() -> dict[int, str]:
    """Returns the 60 actions of AVA's evaluation by number."""
    return {number: name for number, name in ava_actions().items() if number in EVALUATED}


def read_boxes(
    path: str | Path,
    kind: Kind,
    label_map: LabelMap | None,
    *,
    seconds: tuple[int, int] = (FIRST_SECOND, LAST_SECOND),
) -> BoxTable:
    """Reads a csv file of boxes with eight columns and no header.

    Args:
        path: csv file with the columns `video_id,timestamp,x1,y1,x2,y2,action_id` and `person_id` (ground truth) or
            `score` (detections). A box with several actions has one row per action. The action of boxes from a person
            detector is empty.
        kind: kind of boxes, which determines the last column.
        label_map: valid actions. If it is a subset of AVA's, rows with other AVA actions are left out. None accepts any
            action.
        seconds: first and last valid timestamp.

    Raises:
        UserError: the file cannot be read, or a line has other columns, an invalid timestamp, a box outside the frame
            or with reversed corners, an unknown action, or a score that is not a number. Ground-truth boxes must also
            have positive width and height; detections may lose them by rounding.
    """
    path = Path(path)
    known = range(1, _MAX_ACTION + 1) if label_map is None else label_map
    ignored = _missing_ava_actions(label_map) if label_map is not None else frozenset()
    numbers: dict[KeyFrame, int] = {}
    frames, actions, lines = array("i"), array("i"), array("i")
    coordinates, scores = array("d"), array("d")
    other_actions = 0
    for line in _lines(path, _COLUMNS[kind]):
        frame = KeyFrame(line.video(), line.second(*seconds))
        box = line.box(empty=kind == "detections")
        action = line.action(known, ignored)
        score = line.score() if kind == "detections" else 1.0
        if action is None:
            other_actions += 1
            continue
        frames.append(numbers.setdefault(frame, len(numbers)))
        coordinates.extend(box)
        actions.append(action)
        scores.append(score)
        lines.append(line.number)
    return BoxTable(
        tuple(numbers),
        np.array(frames, np.int32),
        np.array(coordinates, np.float64).reshape(-1, 4),
        np.array(actions, np.int32),
        np.array(scores, np.float64),
        np.array(lines, np.int32),
        other_actions,
    )


def read_exclusions(path: str | Path) -> set[KeyFrame]:
    """Reads the key frames to leave out, from a csv file with columns `video_id,timestamp` and no header.

    Raises:
        UserError: the file cannot be read, or a line has other columns or values.
    """
    return {
        KeyFrame(line.video(), line.second(FIRST_SECOND, LAST_SECOND))
        for line in _lines(Path(path), "video_id,timestamp")
    }


def read_label_map(path: str | Path) -> dict[int, str]:
    """Reads action names by number from a .pbtxt file.

    The file holds entries `item { name: "..." id: N }`, or with `label_id: N` since AVA v2.2; other fields are ignored.

    Raises:
        UserError: the file cannot be read, holds other text, or has a number that is out of range, or a repeated number
            or name.
    """
    path = Path(path)
    text = read_text(path, "label_map")
    found: dict[int, str] = {}
    names: set[str] = set()
    end, line = 0, 1
    while item := _ITEM.match(text, end):
        line += text.count("\n", end, item.start(1))
        number, name = _item(item.group(1), f"{path}, line {line}")
        require(number not in found, f"{path}, line {line}", "not repeat an id", number)
        require(name not in names, f"{path}, line {line}", "not repeat a name", name)
        found[number] = name
        names.add(name)
        line += text.count("\n", item.start(1), item.end())
        end = item.end()
    rest = text[end:]
    line += text.count("\n", end, end + len(rest) - len(rest.lstrip()))
    require(not rest.strip(), f"{path}, line {line}", 'contain only items { name: "..." id: N }', rest.strip()[:60])
    if not found:
        raise UserError(f'{path} must contain items {{ name: "..." id: N }}, but it has none')
    return found


def _item(fields: str, where: str) -> tuple[int, str]:
    """Parses the number and name from the text between the braces of a label map entry."""
    names = _ITEM_NAME.findall(fields)
    numbers = _ITEM_ID.findall(re.sub(_TEXT, '""', fields))
    unique = len(names) == len(numbers) == 1
    require(unique, where, 'have one name: "..." and one id: N or label_id: N', fields.strip())
    name, number = "".join(names[0]), whole(numbers[0])
    if number is None or not 1 <= number <= _MAX_ACTION:
        raise UserError(f"{where} must have an id in 1..{_MAX_ACTION}, got {numbers[0][:60]!r}")
    check_class_name(name, where)
    return number, name


def one_row_per_action(
    key_frames: tuple[KeyFrame, ...],
    frames: NDArray[np.integer],
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
) -> BoxTable:
    """Returns a table with a row for each pair of box and action.

    Args:
        key_frames: key frames of the table.
        frames: index into `key_frames` of each box, [n].
        boxes: boxes relative to the frame, in [0, 1], [n, 4].
        scores: score of each action for each box, [n, actions].
    """
    count, actions = scores.shape
    return BoxTable(
        key_frames,
        np.repeat(frames, actions).astype(np.int32),
        np.repeat(boxes, actions, axis=0).astype(np.float64),
        np.tile(np.arange(1, actions + 1, dtype=np.int32), count),
        scores.reshape(-1).astype(np.float64),
        np.zeros(count * actions, np.int32),
    )


def write_detections(path: Path, table: BoxTable) -> None:
    """Writes detections in AVA's format atomically, boxes with three decimals and scores with four.

    Video names of letters, digits, `-` and `_`, like AVA's, are written unchanged, as its evaluators require. Other
    names that a spreadsheet would run as a formula get a leading `'`, which `read_boxes` removes.

    Raises:
        WriteError: the file cannot be written.
    """
    with (
        os_errors_as_write_error(path),
        atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv_files.Writer(file, "\n")
        for frame, box, action, score in zip(table.frames, table.boxes, table.actions, table.scores, strict=True):
            video, second = table.key_frames[frame]
            corners = (csv_files.number(x, ".3f") for x in box)
            writer.row([_name_cell(video), f"{second:04d}", *corners, action or "", csv_files.number(score, ".4f")])


def _name_cell(video: str) -> str:
    """Returns an unguarded cell for names like YouTube's, which may begin with `-` but are not formulas."""
    return csv_files.Verbatim(video) if re.fullmatch(r"[\w-]*", video, re.ASCII) else video


def _missing_ava_actions(label_map: LabelMap) -> frozenset[int]:
    """Returns AVA's actions that a subset of its label map lacks; none for other label maps."""
    ava = ava_actions()
    return frozenset(ava.keys() - label_map.keys() if label_map.items() <= ava.items() else ())


def _lines(path: Path, columns: str) -> Iterator["_Line"]:
    count = columns.count(",") + 1
    try:
        require_regular(path)
        with (
            path.open("rb") as file,
            tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, leave=None, delay=3) as bar,
        ):
            reader = csv_files.Reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            for cells in reader:
                line = _Line(path, reader.line_num, cells)
                if cells:
                    line.check(len(cells) == count, f"have the {count} columns {columns}", cells)
                    yield line
                if reader.line_num % _LINES_PER_UPDATE == 0:
                    bar.update(file.tell() - bar.n)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after line {reader.line_num}, must be UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid csv: {error}") from error


class _Line(NamedTuple):
    """A line of a csv file, with checked access to its cells."""

    path: Path
    number: int
    cells: list[str]

    def check(self, condition: bool, rule: str, value: object) -> None:
        if not condition:
            require(False, f"{self.path}, line {self.number}", rule, value)

    def video(self) -> str:
        self.check(bool(self.cells[0]), "name a video", self.cells[0])
        return self.cells[0]

    def second(self, first: int, last: int) -> int:
        text = self.cells[1]
        second = whole(text)
        inside = second is not None and first <= second <= last
        self.check(inside, f"have an integer timestamp in {first}..{last} seconds", text)
        return second or 0

    def box(self, *, empty: bool) -> tuple[float, float, float, float]:
        """Returns the box; `empty` allows boxes with zero width or height."""
        x1, y1, x2, y2 = map(decimal, self.cells[2:6])
        inside = 0 <= x1 <= 1 and 0 <= y1 <= 1 and 0 <= x2 <= 1 and 0 <= y2 <= 1
        self.check(inside, "have a box inside the frame, with x1,y1,x2,y2 in 0..1", self.cells[2:6])
        ordered = x1 <= x2 and y1 <= y2 if empty else x1 < x2 and y1 < y2
        self.check(
            ordered,
            f"have a box with x1 {'<=' if empty else '<'} x2 and y1 {'<=' if empty else '<'} y2",
            self.cells[2:6],
        )
        return x1, y1, x2, y2

    def action(self, known: Container[int], ignored: frozenset[int]) -> int | None:
        """Returns the number of the action, or None if the row is to be left out."""
        text = self.cells[6]
        if not text:
            return NO_ACTION
        action = whole(text)
        if action is not None and action in known:
            return action
        self.check(action in ignored, "have an action_id from the label map", text)
        return None

    def score(self) -> float:
        score = decimal(self.cells[7])
        self.check(math.isfinite(score), "have a finite number as score", self.cells[7])
        return score
