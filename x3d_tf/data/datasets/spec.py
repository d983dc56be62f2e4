"""Dataset settings, and opening the records they name; synthetic datasets are created on first use.

Imports no TensorFlow, so that configurations can be read without it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from x3d_tf.data.datasets.base import DATA_SETS, DataSet, SyntheticDataSet
from x3d_tf.data.records.index import Record, Split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.files import require_local

ANY = "records"  # name that stands for the records of any data set
HELD_OUT = "validation"  # split for the videos held out of training
_VALIDATION_SPLITS = ("val", "validation")  # default splits to validate on in training
_DEFAULT_EVAL_SPLIT = "test"


@dataclass(frozen=True)
class DatasetSpec:
    """The records to train and evaluate on.

    Attributes:
        records: folder of the records.
        train_split: name of the split to train on.
        eval_split: name of the split to evaluate on. Defaults to "test"; for records without "test", training uses
            "val".
        flip: random horizontal flips in training. Disable them if left and right differ in meaning.
        stretch: resizes both sides to the same length, ignoring the aspect ratio, in training and evaluation, so that
            crops show nearly the full width of wide frames.
        frame_sampling: frame positions within a clip, in training and evaluation; see `sampling.frame_indices`.
        validation_split: name of the split for validation in training. Defaults to "val" or "validation" if the records
            have it and it is neither `train_split` nor `eval_split`, otherwise no validation.
        validation_fraction: fraction of each class's training videos, in (0, 1), held out for validation if the records
            have no validation split. The videos do not depend on the seed. Their split has the name "validation". Clips
            of one recording stay together, where the records state it: the fraction is then that of the recordings.
        name: "records" for the records of any data set; otherwise the name of the data set that the records must be of.
            A synthetic data set such as "moving_shapes" is created in the folder on first use.

    Raises:
        SettingTypeError, UserError: a field breaks its rule; the message names the field, the rule and the value.
    """

    records: str
    train_split: str = "train"
    eval_split: str = _DEFAULT_EVAL_SPLIT
    flip: bool = True
    stretch: bool = False
    frame_sampling: FrameSampling = "slowfast"
    validation_split: str | None = None
    validation_fraction: float = 0.0
    name: str = ANY

    def __post_init__(self) -> None:
        check_field_types(self)
        for field in ("records", "train_split", "eval_split"):
            require(bool(getattr(self, field)), f"DatasetSpec.{field}", "not be empty", getattr(self, field))
        require_local(self.records, "DatasetSpec.records")
        require(self.validation_split != "", "DatasetSpec.validation_split", "not be empty", self.validation_split)
        for field in ("train_split", "eval_split", "validation_split"):  # they become part of folder names
            is_plain = not set("/\\\0") & set(getattr(self, field) or "")
            require(is_plain, f"DatasetSpec.{field}", "be a name, not a path", getattr(self, field))
        fraction = self.validation_fraction
        require(0 <= fraction < 1, "DatasetSpec.validation_fraction", "be in [0, 1)", fraction)
        exclusive = not (fraction and self.validation_split)
        require(exclusive, "DatasetSpec.validation_fraction", "be 0 if validation_split is set", fraction)
        if self.name != ANY:
            _check_flip(self, self._data_set(), self.name)

    @property
    def synthetic(self) -> SyntheticDataSet | None:
        """The data set if it is synthetic, else None; raises `UserError` if no data set has the name."""
        data_set = None if self.name == ANY else self._data_set()
        return data_set if isinstance(data_set, SyntheticDataSet) else None

    def _data_set(self) -> DataSet | SyntheticDataSet:
        try:
            return DATA_SETS.get(self.name)
        except UserError as error:
            raise UserError(f"DatasetSpec.name: {error}") from error


def _check_flip(spec: DatasetSpec, data_set: DataSet | SyntheticDataSet, name: str) -> None:
    rule = f"be False for {name}: flipping would change the classes of its videos"
    require(data_set.flips or not spec.flip, "DatasetSpec.flip", rule, spec.flip)


def with_default_splits(spec: DatasetSpec, names: Collection[str]) -> DatasetSpec:
    """Returns the settings with the default splits for records that have these splits; see `DatasetSpec`."""
    free = [name for name in _VALIDATION_SPLITS if name in names and name not in (spec.train_split, spec.eval_split)]
    if not free:
        return spec
    if spec.eval_split == _DEFAULT_EVAL_SPLIT and _DEFAULT_EVAL_SPLIT not in names:
        spec = replace(spec, eval_split=free[0])
    if spec.validation_split is None:
        spec = replace(spec, validation_split=free[0], validation_fraction=0.0)
    return spec


def validation_split(spec: DatasetSpec) -> str | None:
    """Returns the split for validation in training: `HELD_OUT`, or `validation_split`; None for no validation."""
    return HELD_OUT if spec.validation_fraction else spec.validation_split


def open_for_training(spec: DatasetSpec) -> tuple[Manifest, DatasetSpec]:
    """Opens a dataset like `open_dataset`, and returns its settings with the default splits for training.

    Raises:
        UserError: see `open_dataset`; also if training would flip videos whose class a flip changes.
    """
    manifest = _open_manifest(spec)
    if manifest.dataset in DATA_SETS.names():  # not those of a plugin that is not loaded
        _check_flip(spec, DATA_SETS.get(manifest.dataset), manifest.dataset)
    spec = with_default_splits(spec, manifest.splits)
    manifest = hold_out(manifest, spec)
    _require_records(manifest, spec.train_split, spec.eval_split)
    return manifest, spec


def open_dataset(spec: DatasetSpec) -> Manifest:
    """Returns the manifest of a dataset, with the split held out for validation; creates a synthetic dataset first.

    Raises:
        UserError: the records do not exist (the message names the command that builds them), are damaged, or lack a
            split; see also `hold_out`.
    """
    manifest = _open_manifest(spec)
    manifest = hold_out(manifest, with_default_splits(spec, manifest.splits))
    _require_records(manifest, spec.train_split, spec.eval_split)
    return manifest


def _open_manifest(spec: DatasetSpec) -> Manifest:
    if spec.synthetic is not None:
        return spec.synthetic.open(Path(spec.records))
    manifest = Manifest.load(spec.records)
    same = spec.name in (ANY, manifest.dataset)
    require(same, f"the data set of {spec.records}", f"be {spec.name} (DatasetSpec.name)", manifest.dataset)
    return manifest


def _require_records(manifest: Manifest, *splits: str) -> None:
    for name in splits:
        count = len(manifest.split(name).records)
        require(count > 0, f"split {name!r} of {manifest.folder}", "contain records")


def require_annotations(manifest: Manifest, kinds: Sequence[str]) -> None:
    """Raises `UserError` unless records have one of these kinds of annotation; see `Manifest.task`."""
    require(
        manifest.task in kinds,
        f"the task of the records in {manifest.folder}",
        f"be {' or '.join(kinds)}",
        manifest.task,
    )


def hold_out(manifest: Manifest, spec: DatasetSpec) -> Manifest:
    """Moves a fraction of the training videos to the split "validation", if `validation_fraction` is set.

    Videos are chosen by a hash of their names, independent of their order and of the seed of a run. All segments and
    all key frames of a video stay together. So do all videos of a recording, which count as one: clips of a group of
    UCF101, of a film of HMDB51, or of a YouTube video of Kinetics. The fraction applies to each class; videos with
    several classes form one more group, as do all videos with key frames.

    Raises:
        UserError: the training split has too few videos, or a split "validation" already exists.
    """
    if not spec.validation_fraction:
        return manifest
    if HELD_OUT in manifest.splits:
        raise UserError(
            f'{manifest.folder} has a split "{HELD_OUT}": set DatasetSpec.validation_split="{HELD_OUT}" instead of '
            "DatasetSpec.validation_fraction"
        )
    split = manifest.split(spec.train_split)
    held_out = _choose_videos(split.records, spec.validation_fraction)
    if not held_out:
        raise UserError(
            f"DatasetSpec.validation_fraction requires at least two videos of a class in split {spec.train_split!r} of "
            f"{manifest.folder}, from different recordings"
        )
    parts = {
        spec.train_split: replace(split, records=tuple(r for r in split.records if _recording(r) not in held_out)),
        HELD_OUT: Split(split.shards, tuple(r for r in split.records if _recording(r) in held_out)),
    }
    return replace(manifest, splits=manifest.splits | parts, original=manifest)


def _recording(record: Record) -> str:
    return record.recording or record.video


def _choose_videos(records: tuple[Record, ...], fraction: float) -> set[str]:
    """Returns the recordings to hold out."""
    labels: dict[str, set[int]] = defaultdict(set)
    has_key_frames = any(record.key_frame is not None for record in records)
    for record in records:
        labels[_recording(record)] |= set(record.labels)
    groups: dict[int | None, list[str]] = defaultdict(list)
    for name, video_labels in labels.items():
        single = len(video_labels) == 1 and not has_key_frames
        groups[next(iter(video_labels)) if single else None].append(name)
    chosen: set[str] = set()
    for videos in groups.values():
        videos.sort(key=lambda name: hashlib.sha256(f"0:{name}".encode()).digest())
        chosen |= set(videos[: min(max(round(fraction * len(videos)), 1), len(videos) - 1)])
    return chosen
