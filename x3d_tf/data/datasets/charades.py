"""The data set `charades`. Imports no TensorFlow.

Its lists are `Charades_v1_train.csv` and `Charades_v1_test.csv`; `--classes` is `Charades_v1_classes.txt`.
"""

import re
from pathlib import Path

from x3d_tf import csv_files
from x3d_tf.data.building.listed import ClassNames, Entry, collect, entries_by_name, read_numbered_classes
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.video.image_sequences import check_frame_rate
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import decimal
from x3d_tf.types import TimedLabel

FRAME_RATE = 24.0  # images per second of the published folders of frames
COLUMNS = (
    *("id", "subject", "scene", "quality", "relevance", "verified", "script", "objects", "descriptions", "actions"),
    "length",
)
_ACTION = re.compile(r"c(?P<label>[0-9]{3}) (?P<start>\S+) (?P<end>\S+)")


class Charades:
    """Videos of activities at home, each with any number of 157 actions and their times."""

    name = "charades"
    requires = ("videos", "lists", "classes")
    accepts = ("frame_rate",)
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos of the lists: files `ID.*` or folders `ID` of frames, directly in the videos' folder.

        The labels of a video are all its actions, and there may be none. A training clip has the actions of its frames.

        Raises:
            UserError: a list cannot be read or a line breaks its rule; the message names file and line.
        """
        folder, rate = inputs.path("videos"), FRAME_RATE if inputs.frame_rate is None else inputs.frame_rate
        check_frame_rate(rate, "frame_rate")
        classes = ClassNames(
            read_numbered_classes(inputs.path("classes"), "c{:03d}"), f"the classes in {inputs.classes}"
        )
        if not folder.is_dir():
            raise UserError(f"videos: {folder} is not a folder")
        files = entries_by_name(folder)
        lists = {split: _read_list(path, classes, files) for split, path in inputs.lists.items()}
        return collect(folder, lists, classes.names, inputs.seed, "multi_label", rate)


DATASETS = (Charades(),)


def _read_list(path: Path, classes: ClassNames, files: dict[str, tuple[Path, ...]]) -> list[Entry]:
    lines = csv_files.numbered_rows(path, read_text(path, "lists"))
    header = [name.strip() for name in next(lines, (1, []))[1]]
    known = {"id", "actions"} <= set(header) <= set(COLUMNS) and len(set(header)) == len(header)
    require(known, f"{path}, line 1", f"have the columns {','.join(COLUMNS)}", header)
    entries = []
    for number, cells in lines:
        where = f"{path}, line {number}"
        require(len(cells) == len(header), where, f"have {len(header)} values, like the header", len(cells))
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        video = row["id"]
        require(bool(re.fullmatch(r"\w+", video, re.ASCII)), f"{where}, column id", "be letters and digits", video)
        timed = tuple(_action(text, classes, f"{where}, column actions") for text in row["actions"].split(";") if text)
        present = [classes.names[label] for label in sorted({action.label for action in timed})]
        entries.append(Entry(video, tuple(present), where, files.get(video, ()), timed=timed))
    return entries


def _action(text: str, classes: ClassNames, where: str) -> TimedLabel:
    """Parses an action with its start and end in seconds, such as `c092 11.90 21.20`."""
    parts = _ACTION.fullmatch(text.strip())
    if parts is None:
        raise UserError(f"{where} must be actions such as c092 11.90 21.20, separated by ';', got {text!r}")
    label = classes.names.index(classes.at(parts["label"], f"{where}: the class"))
    start, end = decimal(parts["start"]), decimal(parts["end"])
    require(0 <= start <= end, where, "have actions that start at 0 seconds or later and do not end earlier", text)
    return TimedLabel(label, start, end)
