"""AVA's files: boxes with actions, person boxes, label maps and exclusions. Imports no TensorFlow.

Boxes are on key frames, one a second of a film: in the files a video's name and a second, from 902 to 1798 of AVA's.
Files are read as untrusted input: errors name file, line, rule and value.
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
from x3d_tf.data.build.sources import read_classes
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_path, os_errors_as_write_error, read_text, require_regular
from x3d_tf.text import check_class_name, decimal, whole

# Those of AVA's 80 actions that its evaluation takes, the ones with 25 boxes or more in the validation set.
EVALUATED = frozenset(range(1, 81)) - {
    *(2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75),
}
FIRST_SECOND, LAST_SECOND = 902, 1798  # of AVA's key frames
_MOST_ACTIONS = 100_000
_LINES_AN_UPDATE = 100_000  # of the progress bar
NO_ACTION = 0  # in place of the number of an action, which count from 1

_TEXT = r'"[^"\n]*"|\'[^\'\n]*\''
_ITEM = re.compile(rf"\s*+(?:item|label)\s*+\{{((?:[^{{}}\"']++|{_TEXT})*+)\}}")
_ITEM_NAME = re.compile(r'\bname\s*+:\s*+(?:"([^"\n]*)"|\'([^\'\n]*)\')')
_ITEM_ID = re.compile(r"\b(?:label_)?id\s*+:\s*+([^\s,;]*)")

LabelMap = Mapping[int, str]  # names of the actions by their numbers
Kind = Literal["ground truth", "detections"]
_COLUMNS = {
    "ground truth": "video_id,timestamp,x1,y1,x2,y2,action_id,person_id",
    "detections": "video_id,timestamp,x1,y1,x2,y2,action_id,score",
}


class KeyFrame(NamedTuple):
    """A frame that boxes are on: the video's name, and the second of the film."""

    video: str
    second: int


@dataclass(frozen=True, eq=False)
class BoxTable:
    """The rows of a file of boxes, as columns of one length.

    Attributes:
        key_frames: those that boxes are on, in the order of their first rows.
        frames: position in `key_frames`, int32 [n].
        boxes: x1, y1, x2, y2 in [0, 1] of the frame, float64 [n, 4].
        actions: numbers of the label map, or `NO_ACTION`, int32 [n].
        scores: float64 [n]; of ground truth 1.
        lines: of the file, from 1, int32 [n].
        other_actions: rows of the file that are not here, because their actions are AVA's and not of the label map.
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
    """AVA's 80 actions by their numbers, of which evaluation takes 60."""
    with resources.as_file(resources.files("x3d_tf.data") / "labels" / "ava.txt") as path:
        return dict(enumerate(read_classes(path), 1))


def evaluated_actions() -> dict[int, str]:
    """The 60 actions that AVA's evaluation takes."""
    return {number: name for number, name in ava_actions().items() if number in EVALUATED}


def read_boxes(
    path: str | Path,
    kind: Kind,
    label_map: LabelMap | None,
    *,
    seconds: tuple[int, int] = (FIRST_SECOND, LAST_SECOND),
) -> BoxTable:
    """Reads a csv file of boxes: no header, eight columns.

    Args:
        path: `video_id,timestamp,x1,y1,x2,y2,action_id` and then `person_id` of ground truth, `score` of detections. A
            box of several actions has a row for each. An empty action is that of a box alone, as person detectors give
            them.
        kind: what the last column is.
        label_map: the actions there are. If it is a part of AVA's, rows of AVA's other actions are left out. None where
            actions do not matter.
        seconds: the first and the last that a timestamp may be.

    Raises:
        UserError: the file cannot be read; a line that does not have these columns, with a timestamp that is no second
            in the range, a box that is not inside the frame or whose sides are reversed, an action that the label map
            does not name, or a score that is not a number. Ground truth without width or height is an error too;
            detections may have none once they are rounded.
    """
    path = Path(path)
    known = range(1, _MOST_ACTIONS + 1) if label_map is None else label_map
    left_out = _actions_left_out(label_map) if label_map is not None else frozenset()
    numbers: dict[KeyFrame, int] = {}
    frames, actions, lines = array("i"), array("i"), array("i")
    coordinates, scores = array("d"), array("d")
    others = 0
    for line in _lines(path, _COLUMNS[kind]):
        frame = KeyFrame(line.video(), line.second(*seconds))
        box = line.box(empty=kind == "detections")
        action = line.action(known, left_out)
        score = line.score() if kind == "detections" else 1.0
        if action is None:
            others += 1
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
        others,
    )


def read_exclusions(path: str | Path) -> set[KeyFrame]:
    """Reads the key frames that do not count: `video_id,timestamp`, no header.

    Raises:
        UserError: the file cannot be read, or a line is no such pair.
    """
    return {
        KeyFrame(line.video(), line.second(FIRST_SECOND, LAST_SECOND))
        for line in _lines(Path(path), "video_id,timestamp")
    }


def read_label_map(path: str | Path) -> dict[int, str]:
    """Reads the names of actions by their numbers from a .pbtxt file.

    It holds entries `item { name: "..." id: N }`, or with `label_id: N` as from AVA v2.2 on; other fields are passed
    over.

    Raises:
        UserError: the file cannot be read; what is no such entry; a number out of range; a number or a name that is
            there twice.
    """
    path = Path(path)
    text = read_text(path, "label_map")
    found: dict[int, str] = {}
    names: set[str] = set()
    end, line = 0, 1
    while item := _ITEM.match(text, end):
        line += text.count("\n", end, item.start(1))
        number, name = _item(item.group(1), f"{path}, line {line}")
        require(number not in found, f"{path}, line {line}", "have an id of its own", number)
        require(name not in names, f"{path}, line {line}", "have a name of its own", name)
        found[number] = name
        names.add(name)
        line += text.count("\n", item.start(1), item.end())
        end = item.end()
    rest = text[end:]
    line += text.count("\n", end, end + len(rest) - len(rest.lstrip()))
    require(not rest.strip(), f"{path}, line {line}", 'be items { name: "..." id: N }', rest.strip()[:60])
    if not found:
        raise UserError(f'{path} must hold items {{ name: "..." id: N }}, and holds no item')
    return found


def _item(fields: str, where: str) -> tuple[int, str]:
    """Number and name of an entry of a label map, from what stands between its braces."""
    names = _ITEM_NAME.findall(fields)
    numbers = _ITEM_ID.findall(re.sub(_TEXT, '""', fields))
    one = len(names) == len(numbers) == 1
    require(one, where, 'hold name: "..." and one of id: N and label_id: N', fields.strip())
    name, number = "".join(names[0]), whole(numbers[0])
    if number is None or not 1 <= number <= _MOST_ACTIONS:
        raise UserError(f"{where} must have an id in 1..{_MOST_ACTIONS}, got {numbers[0][:60]!r}")
    check_class_name(name, where)
    return number, name


def of_all_actions(
    key_frames: tuple[KeyFrame, ...],
    frames: NDArray[np.integer],
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
) -> BoxTable:
    """A table with a row for each action of each box.

    Args:
        key_frames: of the table.
        frames: position in them of each box, [n].
        boxes: in [0, 1] of the frame, [n, 4].
        scores: of each box and action, [n, actions].
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
    """Writes detections in AVA's format, boxes to three decimals and scores to four; whole or not at all.

    Names of videos of letters, digits, `-` and `_`, as AVA's, are written as they are, so that its evaluators find
    them. Others that a spreadsheet would take for a formula get a leading `'`, which `read_boxes` removes.

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
    """The name as AVA's evaluators have to find it: YouTube's names may begin with `-`, and none can be run."""
    return csv_files.Verbatim(video) if re.fullmatch(r"[\w-]*", video, re.ASCII) else video


def _actions_left_out(label_map: LabelMap) -> frozenset[int]:
    """AVA's actions that a part of its label map does not name; none beside another label map."""
    ava = ava_actions()
    return frozenset(ava.keys() - label_map.keys() if label_map.items() <= ava.items() else ())


def _lines(path: Path, columns: str) -> Iterator["_Line"]:
    count = columns.count(",") + 1
    try:
        require_regular(path)
        # in the middle of millions of lines it is good to know where one stands
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
                if reader.line_num % _LINES_AN_UPDATE == 0:
                    bar.update(file.tell() - bar.n)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not csv: {error}") from error


class _Line(NamedTuple):
    """A line of a file of boxes; what is asked for is checked."""

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
        self.check(inside, f"have a timestamp in {first}..{last}, whole seconds", text)
        return second or 0

    def box(self, *, empty: bool) -> tuple[float, float, float, float]:
        """The corners; `empty` allows boxes without width or height."""
        x1, y1, x2, y2 = map(decimal, self.cells[2:6])
        inside = 0 <= x1 <= 1 and 0 <= y1 <= 1 and 0 <= x2 <= 1 and 0 <= y2 <= 1
        self.check(inside, "have a box inside the frame, x1,y1,x2,y2 in 0..1", self.cells[2:6])
        ordered = x1 <= x2 and y1 <= y2 if empty else x1 < x2 and y1 < y2
        self.check(ordered, f"have a box with x1 {'<=' if empty else '<'} x2 and y1 likewise", self.cells[2:6])
        return x1, y1, x2, y2

    def action(self, known: Container[int], left_out: frozenset[int]) -> int | None:
        """The number of the action; None is one to leave out."""
        text = self.cells[6]
        if not text:
            return NO_ACTION
        action = whole(text)
        if action is not None and action in known:
            return action
        self.check(action in left_out, "have an action_id of the label map", text)
        return None

    def score(self) -> float:
        score = decimal(self.cells[7])
        self.check(math.isfinite(score), "have a score that is a number", self.cells[7])
        return score
