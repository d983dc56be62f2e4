"""The data set `ucf101`. Imports no TensorFlow.

Its lists are `trainlist0N.txt` and `testlist0N.txt`, one pair for each of its three splits, and `classInd.txt`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from x3d_tf.data.building.listed import ClassNames, Entry, VideoFiles, collect, read_numbered_classes
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records.index import OfficialSplit
from x3d_tf.errors import require
from x3d_tf.files import read_text
from x3d_tf.text import lines_of

_LIST = re.compile(r"(?P<split>train|test)list0(?P<number>[1-3])\.txt")
_CLIP = re.compile(r"(?P<group>.+_g\d+)_c\d+", re.ASCII)  # the clips of a group were cut from one recording


class Ucf101:
    """Videos of 101 human actions, each with one class."""

    name = "ucf101"
    requires = ("videos", "lists", "classes")
    accepts = ()
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos of the lists; the files are found by their names, in any folder.

        Raises:
            UserError: the lists are of different official splits, or an official one is given for the other split; a
                list cannot be read or a line breaks its rule, in which case the message names file and line.
        """
        official = _official_split(inputs.lists)
        classes = ClassNames(
            read_numbered_classes(inputs.path("classes"), "{}", first=1), f"the classes in {inputs.classes}"
        )
        files = VideoFiles(inputs.path("videos"), classes.names)
        lists = {split: _read_list(path, classes, files) for split, path in inputs.lists.items()}
        found = collect(files.folder, lists, classes.names, inputs.seed, exclusive=False)
        return replace(found, official_split=official)


DATASETS = (Ucf101(),)


def _official_split(lists: Mapping[str, Path]) -> OfficialSplit | None:
    """Returns the official split that the names of the lists state; None if a list has another name."""
    names = [path.name for path in lists.values()]
    matches = [_LIST.fullmatch(name) for name in names]
    for split, match in zip(lists, matches, strict=True):
        if match:
            require(split == match["split"], "--lists", f"give {match[0]} as the list of {match['split']}", split)
    numbers = {int(match["number"]) for match in matches if match}
    require(len(numbers) <= 1, "--lists", "be of one of the three official splits", names)
    return OfficialSplit(numbers.pop(), 3) if numbers and all(matches) else None


def _read_list(path: Path, classes: ClassNames, files: VideoFiles) -> list[Entry]:
    """Reads lines of CLASS/VIDEO.avi, in training lists followed by the number of the class."""
    entries = []
    for line, text in enumerate(lines_of(read_text(path, "lists")), 1):
        where = f"{path}, line {line}"
        if not text.strip():
            continue
        video, *number = text.strip().split(None, 1)
        parts = PurePosixPath(video).parts
        if len(parts) != 2:
            require(False, where, "be CLASS/VIDEO, in training lists followed by a class number", text)
        label, stem = classes.find(parts[0], f"{where}: the class"), PurePosixPath(parts[1]).stem
        if number:
            numbered = classes.at(number[0], f"{where}: the class number", first=1)
            require(numbered == label, f"{where}: the class number", f"be that of {label}", number[0])
        clip = _CLIP.fullmatch(stem)
        group = f"{label}/{clip['group']}" if clip else ""
        entries.append(Entry(f"{label}/{stem}", (label,), where, files.named(stem, label), source=group))
    return entries
