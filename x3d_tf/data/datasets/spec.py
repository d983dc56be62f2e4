"""The datasets by name: where their records lie, and how those are made where the package makes them itself.

Imports no TensorFlow, so that configurations can be read without it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from x3d_tf.data.records.index import Record, Split, parse_key_frame_id, parse_segment_file
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.startup import starting_tensorflow

HELD_OUT = "validation"  # name of the split that is held out of the training videos
_VALIDATION = ("val", "validation")  # names of splits that training validates on without being told
_EVALUATED = "test"  # the default of `eval_split`


@dataclass(frozen=True)
class DatasetSpec:
    """The records to train and to test on.

    Attributes:
        records: the folder that holds them.
        train_split: name of the part to train on.
        eval_split: name of the part to test on. Training on records without "test" takes their "val" in its place.
        flip: whether half of the training clips are mirrored. Off where left and right differ in meaning.
        stretch: whether frames are scaled to squares, in training and in tests, so that crops see all of wide ones.
        frame_sampling: how the frames of a clip are chosen, in training and in tests; see `clips.frame_indices`.
        validation_split: name of a part on which the network is tested while it trains. Training takes "val", or
            "validation", where that is a part that is neither trained on nor named by `eval_split`; else none.
        validation_fraction: the part of each class's training videos, in (0, 1), that is held out for that where the
            records have no such split.
        name: "records" for what `build_records` wrote; "moving_shapes" for made-up videos that are put into the folder
            on first use.

    Raises:
        SettingTypeError, UserError: naming the field, the rule and the value received.
    """

    records: str
    train_split: str = "train"
    eval_split: str = _EVALUATED
    flip: bool = True
    stretch: bool = False
    frame_sampling: FrameSampling = "slowfast"
    validation_split: str | None = None
    validation_fraction: float = 0.0
    name: Literal["records", "moving_shapes"] = "records"

    def __post_init__(self) -> None:
        check_field_types(self)
        for field in ("records", "train_split", "eval_split"):
            require(bool(getattr(self, field)), f"DatasetSpec.{field}", "not be empty", getattr(self, field))
        require(self.validation_split != "", "DatasetSpec.validation_split", "not be empty", self.validation_split)
        for field in ("train_split", "eval_split", "validation_split"):  # they become part of folders' names
            plain = not set("/\\\0") & set(getattr(self, field) or "")
            require(plain, f"DatasetSpec.{field}", "be a name, not a path", getattr(self, field))
        fraction = self.validation_fraction
        require(0 <= fraction < 1, "DatasetSpec.validation_fraction", "be in [0, 1)", fraction)
        one = not (fraction and self.validation_split)
        require(one, "DatasetSpec.validation_fraction", "be 0 where validation_split is given", fraction)
        mirrors_label = self.name == "moving_shapes" and self.flip
        require(not mirrors_label, "DatasetSpec.flip", "be False for moving_shapes: mirrored, left is right", self.flip)


def with_default_splits(spec: DatasetSpec, names: Collection[str]) -> DatasetSpec:
    """The dataset with the splits that training takes where records have splits of these names; see `DatasetSpec`."""
    free = [name for name in _VALIDATION if name in names and name not in (spec.train_split, spec.eval_split)]
    if not free:
        return spec
    if spec.eval_split == _EVALUATED and _EVALUATED not in names:
        spec = replace(spec, eval_split=free[0])
    if spec.validation_split is None:
        spec = replace(spec, validation_split=free[0], validation_fraction=0.0)
    return spec


def open_for_training(spec: DatasetSpec) -> tuple[Manifest, DatasetSpec]:
    """The manifest of a dataset's records, as `open_dataset`, and the dataset with the splits that training takes."""
    manifest = _opened(spec)
    spec = with_default_splits(spec, manifest.splits)
    _require_records(manifest, spec.train_split, spec.eval_split)
    return manifest, spec


def open_dataset(spec: DatasetSpec) -> Manifest:
    """The manifest of a dataset's records, which are made first where the package makes them itself.

    Raises:
        UserError: there are no records and they are not ours to make (says which command makes them), they are damaged,
            or they lack one of the splits.
    """
    manifest = _opened(spec)
    _require_records(manifest, spec.train_split, spec.eval_split)
    return manifest


def _opened(spec: DatasetSpec) -> Manifest:
    if spec.name == "moving_shapes":
        with starting_tensorflow():
            from x3d_tf.data.datasets.moving_shapes import open_moving_shapes

        return open_moving_shapes(Path(spec.records))
    return Manifest.load(spec.records)


def _require_records(manifest: Manifest, *splits: str) -> None:
    for name in splits:
        held = len(manifest.split(name).records)
        require(held > 0, f"split {name!r} of {manifest.folder}", "hold records", held)


def hold_out(manifest: Manifest, spec: DatasetSpec, seed: int) -> Manifest:
    """The records with a part of the training videos in a split of its own, "validation", if the settings ask for it.

    The choice is by a hash of the files' names, so that it does not depend on their order; all pieces of a file, and
    all key frames of a video, go together. A part of each class is taken; files that are of several classes, and all
    videos with key frames, count as one more.

    Raises:
        UserError: the training split has too few videos, or there is another split of that name.
    """
    if not spec.validation_fraction:
        return manifest
    if HELD_OUT in manifest.splits:
        raise UserError(
            f'{manifest.folder} has a split "{HELD_OUT}": set DatasetSpec.validation_split="{HELD_OUT}" instead of '
            "DatasetSpec.validation_fraction"
        )
    split = manifest.split(spec.train_split)
    file = _video_of if manifest.task == "detection" else parse_segment_file
    held = _drawn_files(split.records, file, spec.validation_fraction, seed)
    if not held:
        raise UserError(
            f"DatasetSpec.validation_fraction needs two videos of a class in split {spec.train_split!r} of "
            f"{manifest.folder}"
        )
    parts = {
        spec.train_split: Split(split.shards, tuple(r for r in split.records if file(r.media_id) not in held)),
        HELD_OUT: Split(split.shards, tuple(r for r in split.records if file(r.media_id) in held)),
    }
    return replace(manifest, splits=manifest.splits | parts)


def _video_of(media_id: str) -> str:
    return parse_key_frame_id(media_id)[0]


def _drawn_files(records: tuple[Record, ...], file: Callable[[str], str], fraction: float, seed: int) -> set[str]:
    labels: dict[str, set[int]] = defaultdict(set)
    for record in records:
        labels[file(record.media_id)] |= set(record.labels)
    groups: dict[int | None, list[str]] = defaultdict(list)
    for name, of_file in labels.items():
        groups[next(iter(of_file)) if len(of_file) == 1 and file is parse_segment_file else None].append(name)
    drawn: set[str] = set()
    for files in groups.values():
        files.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        drawn |= set(files[: min(max(round(fraction * len(files)), 1), len(files) - 1)])
    return drawn
