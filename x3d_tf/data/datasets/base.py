"""Interface of a data set, and the registry that finds data sets by name. Imports no TensorFlow.

A data set is an object in the list `DATASETS` of a module: of this package, of a plugin, or an entry point of an
installed package. It lists the videos to build records from (`DataSet`), or creates its records (`SyntheticDataSet`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

from x3d_tf.data.building.sources import Sources
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that data sets can be read from: the flags of `build_records`. Each data set states which it reads.

    Attributes:
        videos: folder of the videos.
        csv: csv file that lists the videos.
        lists: list of the videos of each split, in the format of the data set.
        boxes: csv file of labelled boxes of each split.
        proposals: csv file of a person detector's boxes of each split.
        exclusions: csv file of the key frames to leave out of each split.
        label_map: .pbtxt file of the actions.
        starts_at: timestamp of the first frame of the videos, in seconds.
        frame_rate: frames per second, for folders of frames and for records that state none.
        splits: names of the splits.
        split: fraction of the videos for the split "test".
        classes: text file of the class names, in the order of their labels.
        seed: random seed for the order of the videos and for choosing the test split. All data sets read it.
    """

    videos: Path | None = None
    csv: Path | None = None
    lists: Mapping[str, Path] = field(default_factory=dict)
    boxes: Mapping[str, Path] = field(default_factory=dict)
    proposals: Mapping[str, Path] = field(default_factory=dict)
    exclusions: Mapping[str, Path] = field(default_factory=dict)
    label_map: Path | None = None
    starts_at: float | None = None
    frame_rate: float | None = None
    splits: tuple[str, ...] | None = None
    split: float | None = None
    classes: Path | None = None
    seed: int = 0

    def given(self) -> tuple[str, ...]:
        """Returns the names of the inputs that are set, without the seed."""
        names = (item.name for item in fields(self) if item.name != "seed")
        return tuple(name for name in names if getattr(self, name) not in (None, {}))

    def path(self, name: str) -> Path:
        """Returns a required path."""
        value = getattr(self, name)
        require(isinstance(value, Path), f"--{name}", "be given")
        return Path(value)


class DataSet(Protocol):
    """A data set whose records are built from videos.

    Attributes:
        name: name in manifests, settings and flags.
        requires: names of the `Inputs` that must be given.
        accepts: names of other `Inputs` that are read.
        flips: False if a horizontal flip changes the class of a video.
    """

    @property
    def name(self) -> str: ...

    @property
    def requires(self) -> tuple[str, ...]: ...

    @property
    def accepts(self) -> tuple[str, ...]: ...

    @property
    def flips(self) -> bool: ...

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos of each split with their classes, the missing ones, and the kind of annotation.

        Raises:
            UserError: a file cannot be read or a value breaks its rule.
        """


@runtime_checkable
class SyntheticDataSet(Protocol):
    """A data set that creates its records on first use.

    Attributes:
        name: name in manifests and settings.
        flips: False if a horizontal flip changes the class of a video.
    """

    @property
    def name(self) -> str: ...

    @property
    def flips(self) -> bool: ...

    def open(self, folder: Path) -> Manifest:
        """Returns the manifest of the records in a folder, and creates them if the folder does not exist.

        Raises:
            UserError: the folder holds other files.
        """


DATA_SETS: Registry[DataSet | SyntheticDataSet] = Registry(
    "data set", "x3d_tf.data.datasets", "DATASETS", (DataSet, SyntheticDataSet)
)
_SELECTED_BY = {"boxes": "ava", "csv": "csv"}  # inputs that select a data set without --dataset
_DEFAULT = "folder"


def choose(name: str | None, inputs: Inputs) -> DataSet:
    """Returns the data set to build records of.

    Args:
        name: name of the data set. None selects `ava` for inputs with boxes, `csv` for a csv file, else `folder`.
        inputs: the inputs, which must be those that the data set reads.

    Raises:
        UserError: there is no such data set, it is synthetic, or it does not read these inputs.
    """
    given = inputs.given()
    name = name or next((dataset for key, dataset in _SELECTED_BY.items() if key in given), _DEFAULT)
    data_set = DATA_SETS.get(name)
    if isinstance(data_set, SyntheticDataSet):
        raise UserError(f"the data set {name} has no videos: it is created when DatasetSpec.name={name!r} is used")
    missing = [f"--{key}" for key in data_set.requires if key not in given]
    if missing:
        raise UserError(f"the data set {name} requires {' and '.join(missing)}")
    read = (*data_set.requires, *data_set.accepts)
    unread = [f"--{key}" for key in given if key not in read]
    if unread:
        names = ", ".join(f"--{key}" for key in read)
        raise UserError(f"{', '.join(unread)} must not be given for the data set {name}, which reads {names}")
    return data_set
