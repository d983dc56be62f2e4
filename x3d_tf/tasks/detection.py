"""Detection of actions: any number of classes per box on the key frame of a clip. Imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x3d_tf import commands
from x3d_tf.data.datasets.spec import open_dataset, require_annotations, validation_split
from x3d_tf.data.key_frames import require_boxes, require_proposals, validation_key_frames
from x3d_tf.data.records.index import with_labels
from x3d_tf.data.sampling import key_frame_contract
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.eval_config import CLIP_SETTINGS, detector_report_folder
from x3d_tf.evaluation.metrics import MAP
from x3d_tf.modeling.cost import cost
from x3d_tf.tasks.base import Suggestion, require_known_classes
from x3d_tf.types import Metric

if TYPE_CHECKING:
    import tensorflow as tf

    from x3d_tf.config import TrainConfig
    from x3d_tf.data.records.index import Record
    from x3d_tf.data.records.manifest import Manifest
    from x3d_tf.evaluation.detection import DetectorEvaluation
    from x3d_tf.evaluation.eval_config import EvalConfig
    from x3d_tf.evaluation.validation import KeyFrameValidation
    from x3d_tf.inference.action_jobs import DetectJob
    from x3d_tf.losses import BoxLoss
    from x3d_tf.modeling.detection import Detector
    from x3d_tf.modeling.metadata import Metadata
    from x3d_tf.modeling.x3d import Network
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.runtimes.classifier_file import ClassifierFile
    from x3d_tf.tasks.base import Task


_LARGEST_BATCH = 64  # clips: the recipe's batch is for several GPUs


class Detection:
    """Action detection with a `Detector`; see `base.Task`."""

    name = "detection"
    annotations = ("detection",)
    sample = "key frame"
    output = "an independent score for each box and action; boxes are x1, y1, x2, y2, relative to the clip in 0..1"
    sweeps = False
    prediction_flags = ("boxes", "person_detector", "box_score", "action_score", "draw", "starts_at")

    def check(self, config: "TrainConfig", manifest: "Manifest") -> None:
        dataset, weights = config.dataset, config.recipe.class_weights
        reason = f"for the task {self.name}, because clips are sampled around key frames"
        require(not dataset.stretch, "DatasetSpec.stretch", f"be False {reason}", dataset.stretch)
        sampling = dataset.frame_sampling
        require(sampling == "slowfast", "DatasetSpec.frame_sampling", f"be 'slowfast' {reason}", sampling)
        multigrid, rule = config.recipe.multigrid, f'be "none" for the task {self.name}, whose batches cannot be joined'
        require(multigrid == "none", "Recipe.multigrid", rule, multigrid)
        require(weights == "none", "Recipe.class_weights", f'be "none" for the task {self.name}', weights)
        require_boxes(manifest, dataset.eval_split)
        validated = validation_split(dataset)
        if validated:
            require_boxes(validation_key_frames(manifest, validated, config.detection.validation_every), validated)
        if config.detection.eval_boxes == "proposals":
            stored = dataset.train_split if dataset.validation_fraction else validated  # where those held out come from
            for split in filter(None, (dataset.eval_split, stored)):
                require_proposals(manifest, split)

    def advice(self, config: "TrainConfig", manifest: "Manifest") -> list[str]:
        return []  # records of key frames always cover a clip

    def classes(self, manifest: "Manifest") -> tuple[str, ...]:
        return manifest.classes

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        return (MAP,)

    def training_records(self, manifest: "Manifest", split: str) -> "Sequence[Record]":
        return with_labels(manifest.split(split).records)

    def suggestion(self, manifest: "Manifest") -> Suggestion:
        bindings = {"TrainConfig.init": "runs/x3d_m_kinetics"}
        note = " from Kinetics weights (TrainConfig.init; without it from random weights)"
        version = "2.1" if manifest.dataset == "ava_v2.1" else "2.2"
        return Suggestion((f"gin/ava/x3d_m_v{version}.gin",), bindings, _LARGEST_BATCH, note)

    def build_network(self, config: "TrainConfig", num_classes: int) -> "Detector":
        from x3d_tf.modeling.detection import Detector

        return Detector(config.expansion, num_classes, config.model, head=config.detection.head)

    def macs(self, config: "TrainConfig", num_classes: int) -> int:
        head = config.detection.head
        return cost(config.expansion, num_classes=num_classes, options=config.model, head=head).macs

    def input_contract(self, model: "Network") -> dict[str, Any]:
        return key_frame_contract(model)

    def training_clips(
        self,
        config: "TrainConfig",
        manifest: "Manifest",
        *,
        start_step: int = 0,
        worker: tuple[int, int] = (0, 1),
        replica_batch: int | None = None,
    ) -> "tf.data.Dataset":
        from x3d_tf.data.detection_pipeline import training_key_frames

        return training_key_frames(
            manifest,
            config.dataset.train_split,
            config.expansion.clip,
            jitter=config.expansion.jitter,
            flip=config.dataset.flip,
            batch=config.recipe.batch,
            seed=config.seed,
            start_step=start_step,
            worker=worker,
            replica_batch=replica_batch,
            proposal_iou=config.detection.proposal_iou,
            negatives=config.detection.negatives,
            score=config.detection.score,
        )

    def save_preview(self, config: "TrainConfig", manifest: "Manifest", path: Path, clips: int = 8) -> None:
        from x3d_tf.data.preview import save_box_preview

        split, stream = config.dataset.train_split, self.training_clips(config, manifest, replica_batch=1)
        save_box_preview(manifest, split, stream, path, batch=config.recipe.batch, seed=config.seed, clips=clips)

    def loss(self, config: "TrainConfig", manifest: "Manifest") -> "BoxLoss":
        from x3d_tf.losses import BoxLoss

        return BoxLoss(config.execution.accumulation)

    def validation(
        self, model: "Network", config: "TrainConfig", manifest: "Manifest", split: str
    ) -> "KeyFrameValidation":
        from x3d_tf.evaluation.validation import KeyFrameValidation

        return KeyFrameValidation(_detector(model), manifest, split, config.detection)

    def report_folder(self, run: "RunFolder", settings: "EvalConfig", views: int | str | None = None) -> Path:
        _require_no_clips(settings)
        return detector_report_folder(run, settings)

    def evaluation(
        self,
        model: "Network | ClassifierFile",
        weights: dict[str, Any],
        settings: "EvalConfig",
        run: "RunFolder | None",
    ) -> "DetectorEvaluation":
        from x3d_tf.evaluation.detection import DetectorEvaluation

        config = run.read_config() if run else None
        dataset, detection = settings.dataset_of(config), settings.boxes_of(config)
        manifest = open_dataset(dataset)
        self.check_evaluation(model, settings, manifest, run)
        seed = config.seed if config else None
        return DetectorEvaluation(_detector(model), weights, manifest, dataset.eval_split, detection, seed)

    def check_evaluation(
        self,
        network: "Metadata | Network | ClassifierFile",
        settings: "EvalConfig",
        manifest: "Manifest",
        run: "RunFolder | None" = None,
    ) -> None:
        require_annotations(manifest, self.annotations)
        _require_no_clips(settings)
        require_known_classes(network, manifest.classes, manifest.folder)
        config = run.read_config() if run else None
        split = settings.dataset_of(config).eval_split
        require_boxes(manifest, split)
        if settings.boxes_of(config).eval_boxes == "proposals":
            require_proposals(manifest, split, "EvalConfig.eval_boxes")

    def check_prediction(self, metadata: "Metadata", options: Mapping[str, Any], paths: Sequence[Path]) -> None:
        if (options["boxes"] is None) == (options["person_detector"] is None):
            raise UserError(f"{options['model']} detects actions in boxes: give one of --boxes and --person_detector")
        stems = [path.stem for path in paths]
        require(len(set(stems)) == len(stems), "the videos", "have distinct names, because boxes refer to names", stems)
        for output in _drawings(options, paths).values():
            commands.require_free(output, options["overwrite"], "another name")
        for path in paths:
            require(path.is_file(), str(path), "be a video file: a detector does not read folders of images")
        commands.require_path("--boxes", options["boxes"], "csv file")
        commands.require_path("--person_detector", options["person_detector"], "SavedModel")

    def prediction_job(self, options: Mapping[str, Any], paths: Sequence[Path]) -> "DetectJob":
        from x3d_tf.inference.action_jobs import DetectJob

        return DetectJob(
            model=options["model"],
            boxes=options["boxes"],
            person_detector=options["person_detector"],
            box_score=options["box_score"],
            action_score=options["action_score"],
            starts_at=options["starts_at"],
            csv=options["csv"],
            drawings=_drawings(options, paths),
        )


def _drawings(options: Mapping[str, Any], paths: Sequence[Path]) -> dict[Path, Path]:
    """Returns the file to draw for each video."""
    folder = options["draw"]
    return {path: Path(folder) / f"{path.stem}.mp4" for path in paths} if folder else {}


def _detector(model: "Network | ClassifierFile") -> "Detector":
    from x3d_tf.modeling.detection import Detector

    if not isinstance(model, Detector):
        raise UserError("the task detection requires a detector, got a network that classifies clips")
    return model


def _require_no_clips(settings: "EvalConfig") -> None:
    settings.require_unset(CLIP_SETTINGS, "for a detector, which is evaluated on one clip around each key frame")


TASKS: "tuple[Task, ...]" = (Detection(),)
