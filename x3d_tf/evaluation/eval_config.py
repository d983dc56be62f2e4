"""Evaluation settings, and the default folders of reports. Imports no TensorFlow."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from x3d_tf.config import Detection, TrainConfig
from x3d_tf.data.datasets.spec import ANY, DatasetSpec
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import check_field_types, require
from x3d_tf.modeling.architecture import HeadPool
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.types import BoxSource, ClipStarts, Combine, ViewSpec

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import X3D
    from x3d_tf.runtimes.classifier_file import ClassifierFile

CLIP_SETTINGS = ("temporal_views", "spatial_crops", "clip_starts", "frame_sampling", "combine", "head_pool")
BOX_SETTINGS = ("eval_boxes", "box_score")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation settings. None means: as in the run, or as stored in the model file.

    Attributes:
        records: folder of the records. Their classes must be among the model's.
        split: name of the split to evaluate.
        temporal_views: number of clips per video, K.
        spatial_crops: 1 for K-Center evaluation (short side resized to 128γs pixels, one centre crop of 112γs) or 3 for
            K-LeftCenterRight (same resize, three crops of 128γs along the longer side).
        clip_starts: the positions of the clips in a video; see `sampling.view_starts`.
        frame_sampling: the choice of the frames of a clip; see `sampling.frame_indices`.
        combine: how the probabilities of a video's views are combined: "mean", or "max" for each class.
        head_pool: pooling of crops larger than the training crop; see `ModelOptions.head_pool`. Only has an effect with
            three crops.
        eval_boxes: for a detector, the boxes to evaluate; see `config.Detection`. A model file does not store it; it
            defaults to "proposals" for one.
        box_score: for a detector, the minimum score of the person detector's boxes. Defaults to 0.8 for a model file.

    Raises:
        SettingTypeError, UserError: a setting is invalid; names the setting, the rule and the value received.
    """

    records: str | None = None
    split: str | None = None
    temporal_views: int | None = None
    spatial_crops: int = 1
    clip_starts: ClipStarts = "offset"
    frame_sampling: FrameSampling | None = None
    combine: Combine | None = None
    head_pool: HeadPool | None = None
    eval_boxes: BoxSource | None = None
    box_score: float | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.spatial_crops in (1, 3), "EvalConfig.spatial_crops", "be 1 or 3", self.spatial_crops)
        for name in ("records", "split"):
            require(getattr(self, name) != "", f"EvalConfig.{name}", "not be empty", getattr(self, name))
        at_least_one = self.temporal_views is None or self.temporal_views >= 1
        require(at_least_one, "EvalConfig.temporal_views", "be at least 1", self.temporal_views)
        inside = self.box_score is None or 0 <= self.box_score <= 1
        require(inside, "EvalConfig.box_score", "be in [0, 1]", self.box_score)

    def require_unset(self, names: Sequence[str], reason: str) -> None:
        """Raises `UserError` if one of these settings is not the default; the message ends with the reason."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            value = getattr(self, name)
            require(value == defaults[name], f"EvalConfig.{name}", f"not be set {reason}", value)

    def check_crops(self, stretch: bool) -> None:
        """Raises `UserError` for several crops of stretched frames."""
        distinct = self.spatial_crops == 1 or not stretch
        rule = "be 1 for a network trained on stretched frames, because square frames have a single crop"
        require(distinct, "EvalConfig.spatial_crops", rule, self.spatial_crops)

    def views_for(self, model: "X3D | ClassifierFile", temporal_views: int) -> ViewSpec:
        """Returns the views of each video; `temporal_views` is used if the setting is None."""
        self.check_crops(model.stretch)
        test_size = model.expansion.test_size
        return ViewSpec(
            temporal_views=self.temporal_views or temporal_views,
            spatial_crops=self.spatial_crops,
            resize=test_size,
            crop=model.clip.size if self.spatial_crops == 1 else test_size,
            stretch=model.stretch,
        )

    def dataset_of(self, config: TrainConfig | None) -> DatasetSpec:
        """Returns the dataset to evaluate: that of the run, with `records` and `split` replaced if set.

        Args:
            config: the configuration of the run; None for a model file.

        Raises:
            UserError: `records` or `split` is missing for a model file.
        """
        if config is None:
            require(self.records is not None, "EvalConfig.records", "be given for a model file")
            require(self.split is not None, "EvalConfig.split", "be given for a model file")
            assert self.records is not None and self.split is not None
            return DatasetSpec(self.records, train_split=self.split, eval_split=self.split)
        dataset = replace(config.dataset, eval_split=self.split or config.dataset.eval_split)
        if self.records is None:
            return dataset
        dataset = replace(dataset, train_split=dataset.eval_split, validation_split=None, validation_fraction=0.0)
        return replace(dataset, name=ANY, records=self.records)

    def boxes_of(self, config: TrainConfig | None) -> Detection:
        """Returns the settings that select the boxes: those of the run, or the defaults for a model file.

        `eval_boxes` and `score` are replaced if set here.
        """
        detection = config.detection if config else Detection()
        score = detection.score if self.box_score is None else self.box_score
        return replace(detection, eval_boxes=self.eval_boxes or detection.eval_boxes, score=score)

    def suffix(self, config: TrainConfig) -> str:
        """Returns the suffix of the report's folder name for settings that differ from the run's."""
        parts = [
            f"_{self.clip_starts}_starts" if self.clip_starts != "offset" else "",
            f"_{self.frame_sampling}_frames"
            if self.frame_sampling not in (None, config.dataset.frame_sampling)
            else "",
            f"_{self.combine}" if self.combine not in (None, config.combine) else "",
            f"_{self.head_pool}" if self.head_pool not in (None, config.model.head_pool) else "",
        ]
        return "".join(parts)


def folder_of(run: RunFolder, eval_config: EvalConfig, temporal_views: int | str | None = None) -> Path:
    """Returns the default report folder for evaluation settings; `temporal_views` overrides their number of clips."""
    config = run.read_config()
    count = temporal_views or eval_config.temporal_views or config.test_views
    crops = "center" if eval_config.spatial_crops == 1 else "leftcenterright"
    return report_folder(run, eval_config.dataset_of(config), f"{count}{crops}{eval_config.suffix(config)}")


def report_folder(run: RunFolder, dataset: DatasetSpec, views: int | str) -> Path:
    """Returns the default report folder of a dataset; `views` is the number of centre clips, or the end of the name."""
    ending = f"{views}center" if isinstance(views, int) else views
    return run.evaluations / f"{Path(dataset.records).name}_{dataset.eval_split}_{ending}"


def detector_report_folder(run: RunFolder, eval_config: EvalConfig) -> Path:
    """Returns the default report folder of a detector."""
    config = run.read_config()
    dataset, detection = eval_config.dataset_of(config), eval_config.boxes_of(config)
    suffix = f"_score{detection.score:g}" if detection.score != config.detection.score else ""
    return run.evaluations / f"{Path(dataset.records).name}_{dataset.eval_split}_{detection.eval_boxes}{suffix}"
