"""How a network is tested, and where the report of that goes. Imports no TensorFlow."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import check_field_types, require
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.types import ClipStarts, ViewSpec

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import X3D

HeadPool = Literal["global", "fixed_probabilities", "fixed_logits"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How to test. None stands for what the run, or else the network, does by itself.

    Attributes:
        records: folder of the records. Their classes must be among the model's.
        split: its part.
        temporal_views: clips of a video, K.
        spatial_crops: 1 is K-Center testing: the short side scaled to 128γs pixels, a centre crop of 112γs. 3 is
            K-LeftCenterRight: the same scale, three crops of 128γs along the longer side.
        clip_starts: how the clips are spread over a video; see `clips.view_starts`.
        frame_sampling: which frames a clip takes; see `clips.frame_indices`.
        head_pool: what the head does with crops larger than the training crop; see `ModelOptions.head_pool`. Makes a
            difference with three crops only.

    Raises:
        SettingTypeError, UserError: naming the setting, the rule and the value received.
    """

    records: str | None = None
    split: str | None = None
    temporal_views: int | None = None
    spatial_crops: int = 1
    clip_starts: ClipStarts = "offset"
    frame_sampling: FrameSampling | None = None
    head_pool: HeadPool | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.spatial_crops in (1, 3), "Procedure.spatial_crops", "be 1 or 3", self.spatial_crops)
        for name in ("records", "split"):
            require(getattr(self, name) != "", f"Procedure.{name}", "not be empty", getattr(self, name))
        at_least_one = self.temporal_views is None or self.temporal_views >= 1
        require(at_least_one, "Procedure.temporal_views", "be at least 1", self.temporal_views)

    def views_of(self, model: "X3D", temporal_views: int) -> ViewSpec:
        """The views of each video; `temporal_views` is what None stands for."""
        distinct = self.spatial_crops == 1 or not model.stretch
        require(distinct, "crops", "be 1 for a network of stretched frames, which are square", self.spatial_crops)
        test_size = model.expansion.test_size
        return ViewSpec(
            temporal_views=self.temporal_views or temporal_views,
            spatial_crops=self.spatial_crops,
            resize=test_size,
            crop=model.clip.size if self.spatial_crops == 1 else test_size,
            stretch=model.stretch,
        )

    def dataset_of(self, config: TrainConfig) -> DatasetSpec:
        """The records of a run, or those that are asked for instead."""
        dataset = replace(config.dataset, eval_split=self.split or config.dataset.eval_split)
        if self.records is None:
            return dataset
        return replace(dataset, name="records", records=self.records, train_split=dataset.eval_split)

    def suffix(self, config: TrainConfig) -> str:
        """What tells a report of this procedure from the one of the run's own, as part of a folder's name."""
        parts = [
            f"_{self.clip_starts}_starts" if self.clip_starts != "offset" else "",
            f"_{self.frame_sampling}_frames"
            if self.frame_sampling not in (None, config.dataset.frame_sampling)
            else "",
            f"_{self.head_pool}" if self.head_pool not in (None, config.model.head_pool) else "",
        ]
        return "".join(parts)


def folder_of(run: RunFolder, procedure: EvalConfig, temporal_views: int | str | None = None) -> Path:
    """Where the report of a procedure goes by itself; `temporal_views` takes the place of its number of clips."""
    config = run.read_config()
    count = temporal_views or procedure.temporal_views or config.test_views
    crops = "center" if procedure.spatial_crops == 1 else "leftcenterright"
    return report_folder(run, procedure.dataset_of(config), f"{count}{crops}{procedure.suffix(config)}")


def report_folder(run: RunFolder, dataset: DatasetSpec, views: int | str) -> Path:
    """Where the report of a test goes by itself; `views` is a number of centre clips, or says it in words."""
    words = f"{views}center" if isinstance(views, int) else views
    return run.evaluations / f"{Path(dataset.records).name}_{dataset.eval_split}_{words}"


def detector_report_folder(run: RunFolder) -> Path:
    """Where the report of a detector goes by itself."""
    config = run.read_config()
    dataset = config.dataset
    return run.evaluations / f"{Path(dataset.records).name}_{dataset.eval_split}_{config.detection.eval_boxes}"
