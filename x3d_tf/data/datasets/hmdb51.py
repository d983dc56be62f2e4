"""The data set `hmdb51`. Imports no TensorFlow.

Its lists are files `CLASS_test_splitN.txt`, one for each class and each of the three splits, in one folder.
"""

from dataclasses import replace
from pathlib import Path

from x3d_tf.data.building.listed import ClassNames, Entry, VideoFiles, collect
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records.index import OfficialSplit
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, lines_of

_SPLITS = ("split1", "split2", "split3")
_PARTS = {"1": "train", "2": "test", "0": None}  # 0: the video is not used in this split


class Hmdb51:
    """Videos of 51 human actions, each with one class."""

    name = "hmdb51"
    requires = ("videos", "lists")
    accepts = ()
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the training and test videos of one of the three splits.

        `--lists=split1=FOLDER` selects the files `*_test_split1.txt` of the folder. The classes are the names of the
        files, in alphabetical order.

        Raises:
            UserError: a list cannot be read or a line breaks its rule; the message names file and line.
        """
        rule = f"name one split, one of {', '.join(_SPLITS)}, such as split1=FOLDER"
        require(len(inputs.lists) == 1 and set(inputs.lists) <= set(_SPLITS), "--lists", rule, [*inputs.lists])
        ((split, folder),) = inputs.lists.items()
        tables = _tables(folder, split)
        classes = ClassNames(sorted(tables), f"the names of the lists in {folder}")
        files = VideoFiles(inputs.path("videos"), classes.names)
        lists: dict[str, list[Entry]] = {"train": [], "test": []}
        for label in classes.names:
            _read_table(tables[label], label, files, lists)
        found = collect(files.folder, lists, classes.names, inputs.seed, exclusive=False)
        return replace(found, official_split=OfficialSplit(_SPLITS.index(split) + 1, len(_SPLITS)))


DATASETS = (Hmdb51(),)


def _tables(folder: Path, split: str) -> dict[str, Path]:
    """Returns the list of each class for a split."""
    if not folder.is_dir():
        raise UserError(f"--lists: {folder} is not a folder of files CLASS_test_{split}.txt")
    end = f"_test_{split}.txt"
    paths = [path for path in sorted(folder.iterdir()) if path.name.endswith(end) and not path.name.startswith(".")]
    found = {path.name.removesuffix(end): path for path in paths}
    require(bool(found), f"--lists: {folder}", f"hold files CLASS{end}")
    for name, path in found.items():
        check_class_name(name, f"the name of {path}")
    return found


def _read_table(path: Path, label: str, files: VideoFiles, lists: dict[str, list[Entry]]) -> None:
    """Appends the videos of a class to their splits; lines are VIDEO.avi and 0, 1 or 2."""
    for line, text in enumerate(lines_of(read_text(path, "lists")), 1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        video, *parts = text.strip().rsplit(None, 1)
        valid = len(parts) == 1 and parts[0] in _PARTS
        require(valid, where, "be a file name and 0, 1 (training) or 2 (test)", text)
        split = _PARTS[parts[0]]
        if split:
            stem = Path(video).stem
            film = stem.rpartition(f"_{label}_")[0]  # names are FILM_CLASS_PROPERTIES
            lists[split].append(Entry(f"{label}/{stem}", (label,), where, files.named(stem, label), source=film))
