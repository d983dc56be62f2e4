"""The videos to build records from, as data sets list them: their classes, splits and order.

Imports no TensorFlow: the builder's worker processes import this module.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from x3d_tf.data.building import class_names
from x3d_tf.data.building.sequence_examples import Example
from x3d_tf.data.class_lists import read_classes
from x3d_tf.data.records.index import KeyFrameInfo, OfficialSplit, media_id
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import FOLDER_FPS, FileState
from x3d_tf.errors import require
from x3d_tf.text import whole
from x3d_tf.types import Annotation, AnnotationKind, TimedLabel

SPLIT_NAMES = ("train", "val", "test")  # recognised without --splits
_SPELLINGS = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "testing": "test"}


class Video(NamedTuple):
    """A video to build a record from.

    Attributes:
        path: path of the video file, of the folder of frames, or of a TFRecord file.
        name: name of the video in the records.
        classes: distinct names of its classes.
        start: second of the file at which the record starts.
        end: second of the file at which the record stops; None means the end of the file.
        key_frame: second of the key frame, as annotated; None except for action detection.
        annotation: annotation of the key frame; None except for action detection.
        state: size and time of the file when the build began, to detect changes; None disables the check.
        frame_rate: images per second, for a folder of frames or a SequenceExample.
        must_cover_segment: the file must last until `end`; otherwise the record may end earlier, with the file.
        timed: its classes with their times; empty if they apply to the complete video.
        example: the record of a TFRecord file; None for all others.
        recording: name of the recording that it was cut from; empty if no other video was.
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
    must_cover_segment: bool = False
    timed: tuple[TimedLabel, ...] = ()
    example: Example | None = None
    recording: str = ""

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
        official_split: the official division that the splits are of, for data sets with several.
    """

    splits: dict[str, list[Video]]
    unusable: list[VideoError]
    classes: tuple[str, ...]
    task: AnnotationKind
    expected: Mapping[str, int] = field(default_factory=dict)
    key_frames: KeyFrameInfo | None = None
    official_split: OfficialSplit | None = None


def parse_split_name(name: str) -> str | None:
    """Returns the split that a folder's or a csv cell's name stands for ("Validation" is "val"), or None."""
    name = name.casefold()
    name = _SPELLINGS.get(name, name)
    return name if name in SPLIT_NAMES else None


class ClassList(NamedTuple):
    """The class names of a file: in order, and as a set for lookups."""

    names: tuple[str, ...]
    known: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> "ClassList":
        names = read_classes(path)
        return cls(names, frozenset(names))


def resolve_class(label: str, classes: ClassList | None, where: str) -> str:
    """Returns the class that a label stands for. With `classes`, a label is a class name or else a class number."""
    if classes is None or label in classes.known:
        return label
    count = len(classes.names)
    number = whole(label)
    if number is None or number >= count:
        rule = f"be one of the {count} names in the class file, or a number in 0..{count - 1}"
        require(False, where, rule, label)
    return classes.names[number or 0]


def split_by_fraction(videos: list[Video], fraction: float | None, seed: int) -> dict[str, list[Video]]:
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


def sorted_class_names(found: dict[str, list[Video]]) -> tuple[str, ...]:
    """Returns the names of all classes in label order."""
    return class_names.sort_class_names(name for videos in found.values() for video in videos for name in video.classes)


def check_splits(splits: Sequence[str] | None, split: float | None) -> None:
    """Raises `UserError` unless the names of the splits, or the fraction for the test split, are valid."""
    require(splits is None or split is None, "splits and split", "not be set together", (splits, split))
    require(split is None or 0 < split < 1, "split", "be between 0 and 1", split)
    if splits is not None:
        good = len(set(splits)) == len(splits) > 0 and all(_is_plain_name(name) for name in splits)
        require(good, "splits", "be distinct names of folders, or of splits in a csv file", tuple(splits))


def _is_plain_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and os.sep not in name


def visible_entries(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are not hidden."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
