"""Classification of clips: exactly one class per clip, or any number of classes. Imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from x3d_tf.data.datasets.spec import open_dataset, require_annotations, validation_split
from x3d_tf.data.sampling import clip_contract, require_windows
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.eval_config import BOX_SETTINGS, folder_of
from x3d_tf.evaluation.metrics import classification_metrics
from x3d_tf.evaluation.reports import check_metrics, metrics_to_json
from x3d_tf.modeling.archive import describe_any
from x3d_tf.modeling.cards import runs_in_tensorflow
from x3d_tf.modeling.cost import cost
from x3d_tf.runs.advice import check_class_balance, check_clip_length
from x3d_tf.tasks.base import Suggestion, require_known_classes
from x3d_tf.text import binding_flag
from x3d_tf.types import Metric

if TYPE_CHECKING:
    import tensorflow as tf

    from x3d_tf.config import TrainConfig
    from x3d_tf.data.input_pipeline import MakeExample
    from x3d_tf.data.records.index import Record
    from x3d_tf.data.records.manifest import Manifest
    from x3d_tf.evaluation.classification import ClipEvaluation
    from x3d_tf.evaluation.classification_reports import Predictions
    from x3d_tf.evaluation.eval_config import EvalConfig
    from x3d_tf.evaluation.validation import ClipValidation
    from x3d_tf.inference.jobs import ClassifyJob
    from x3d_tf.losses import SigmoidLoss, SoftmaxLoss
    from x3d_tf.modeling.metadata import Metadata
    from x3d_tf.modeling.x3d import X3D, Network
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.runtimes.classifier_file import ClassifierFile
    from x3d_tf.tasks.base import Task
    from x3d_tf.types import Activation


_X3D_S_MIN_SHORT_SIDE = 182  # pixels: X3D-S upscales smaller frames, which adds nothing
_OUTPUTS = {"softmax": "probabilities that sum to 1", "sigmoid": "an independent probability for each class"}


class ClipTask:
    """Base class of tasks that predict classes of clips with an X3D network; see `base.Task`.

    A task of your own sets `name` and overrides what differs, such as `classes`, `make_example`, and
    `metrics` with `score`.

    Attributes:
        activation: "softmax" for exactly one class per clip, "sigmoid" for any number of classes.
    """

    name: str
    activation: "Activation" = "softmax"
    sample = "video"
    sweeps = True
    prediction_flags: tuple[str, ...] = ("views", "window", "hop", "json", "contact_sheet")

    @property
    def annotations(self) -> tuple[str, ...]:
        if type(self).make_example is not ClipTask.make_example:
            return "single_label", "multi_label"
        return ("single_label",) if self.activation == "softmax" else ("multi_label",)

    @property
    def output(self) -> str:
        return _OUTPUTS[self.activation]

    def make_example(self) -> "MakeExample | None":
        """Returns the function that makes the clip and the target; None for the labels of the records.

        `data.input_pipeline.MakeExample` states its arguments and what the target may depend on.
        """
        return None

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        """Returns the metrics of evaluations and validations: top1 and top5, or map for "sigmoid".

        The main one is the first: a sweep plots it, and early stopping ranks validations by it and then by the loss.
        """
        return classification_metrics(num_classes, exclusive=self.activation == "softmax")

    def score(self, predictions: "Predictions") -> dict[str, Any]:
        """Returns the values of `metrics`, and further results for results.json, by name.

        Validations call it too, and use the values of `metrics`.

        Raises:
            UserError: a metric is not finite.
        """
        return predictions.measure()

    def class_weights(self, config: "TrainConfig", manifest: "Manifest") -> Any:
        """Returns the loss factor of each class, float32 [classes], or None.

        Raises:
            UserError: the task does not support Recipe.class_weights.
        """
        weights = config.recipe.class_weights
        rule = f'be "none" for the task {self.name} ({binding_flag("Recipe.class_weights", "none")})'
        require(weights == "none", "Recipe.class_weights", rule, weights)

    def check(self, config: "TrainConfig", manifest: "Manifest") -> None:
        self.class_weights(config, manifest)
        check_metrics(metrics_to_json(self.metrics(len(self.classes(manifest)))))
        split = validation_split(config.dataset)
        if split and not manifest.split(split).records:
            raise UserError(f"validation split {split!r} of {manifest.folder} must have at least one record")

    def advice(self, config: "TrainConfig", manifest: "Manifest") -> list[str]:
        return check_clip_length(config, self.training_records(manifest, config.dataset.train_split))

    def classes(self, manifest: "Manifest") -> tuple[str, ...]:
        return manifest.classes

    def training_records(self, manifest: "Manifest", split: str) -> "Sequence[Record]":
        return manifest.split(split).records

    def suggestion(self, manifest: "Manifest") -> Suggestion:
        large = manifest.stored.short_side >= _X3D_S_MIN_SHORT_SIDE
        return Suggestion(("gin/x3d_s.gin", "gin/data/records.gin") if large else ("gin/few_videos.gin",))

    def build_network(self, config: "TrainConfig", num_classes: int) -> "X3D":
        from x3d_tf.modeling.x3d import X3D

        return X3D(config.expansion, num_classes, config.model, activation=self.activation, task=self.name)

    def macs(self, config: "TrainConfig", num_classes: int) -> int:
        return cost(config.expansion, num_classes=num_classes, options=config.model).macs

    def input_contract(self, model: "Network") -> dict[str, Any]:
        return clip_contract(model)

    def training_clips(
        self,
        config: "TrainConfig",
        manifest: "Manifest",
        *,
        start_step: int = 0,
        worker: tuple[int, int] = (0, 1),
        replica_batch: int | None = None,
    ) -> "tf.data.Dataset":
        from x3d_tf.data.input_pipeline import training_dataset

        dataset = config.dataset
        clips = training_dataset(
            self._with_training_records(manifest, dataset.train_split),
            dataset.train_split,
            config.expansion.clip,
            jitter=config.expansion.jitter,
            flip=dataset.flip,
            batch=config.recipe.batch,
            seed=config.seed,
            start_step=start_step,
            worker=worker,
            replica_batch=replica_batch,
            frame_sampling=dataset.frame_sampling,
            stretch=dataset.stretch,
            make_example=self.make_example(),
        )
        self._check_examples(clips, config, len(self.classes(manifest)))
        return clips

    def _check_examples(self, clips: "tf.data.Dataset", config: "TrainConfig", classes: int) -> None:
        """Raises `UserError` if `make_example` returns tensors of another shape or type than the network needs."""
        pixels, target = clips.element_spec
        clip = config.expansion.clip
        shape = (clip.frames, clip.size, clip.size, 3)
        rule = f"return clips of shape {shape}"
        require(pixels.shape[1:].is_compatible_with(shape), f"make_example of the task {self.name}", rule, pixels)
        one = self.activation == "softmax"
        valid = target.shape[1:].is_compatible_with(() if one else (classes,)) and target.dtype.is_integer >= one
        rule = "return the number of a class, an integer" if one else f"return {classes} numbers for the classes"
        require(valid, f"make_example of the task {self.name}", rule, target)

    def save_preview(self, config: "TrainConfig", manifest: "Manifest", path: Path, clips: int = 8) -> None:
        from x3d_tf.data.preview import save_preview

        stream = self.training_clips(config, manifest, replica_batch=1)  # avoids decoding a complete batch
        save_preview(
            self._with_training_records(manifest, config.dataset.train_split),
            config.dataset.train_split,
            config.expansion.clip,
            stream,
            path,
            classes=self.classes(manifest),
            batch=config.recipe.batch,
            seed=config.seed,
            frame_sampling=config.dataset.frame_sampling,
            timed=self.make_example() is None,
            clips=clips,
        )

    def _with_training_records(self, manifest: "Manifest", split: str) -> "Manifest":
        return manifest.with_records(split, self.training_records(manifest, split))

    def loss(self, config: "TrainConfig", manifest: "Manifest") -> "SoftmaxLoss | SigmoidLoss":
        from x3d_tf.losses import SigmoidLoss, SoftmaxLoss

        if self.activation == "sigmoid":
            return SigmoidLoss(config.recipe.batch)
        return SoftmaxLoss(config.recipe.batch, self.class_weights(config, manifest))

    def validation(self, model: "Network", config: "TrainConfig", manifest: "Manifest", split: str) -> "ClipValidation":
        from x3d_tf.evaluation.validation import ClipValidation

        classifier = self._classifier(model)
        return ClipValidation(
            classifier,
            manifest,
            split,
            metrics=self.metrics(classifier.num_classes),
            score=self.score,
            frame_sampling=config.dataset.frame_sampling,
            resize=config.expansion.test_size,
            make_example=self.make_example(),
        )

    def report_folder(self, run: "RunFolder", settings: "EvalConfig", views: int | str | None = None) -> Path:
        return folder_of(run, settings, views)

    def evaluation(
        self,
        model: "Network | ClassifierFile",
        weights: dict[str, Any],
        settings: "EvalConfig",
        run: "RunFolder | None",
    ) -> "ClipEvaluation":
        from x3d_tf.evaluation.classification import ClipEvaluation, with_head_pool
        from x3d_tf.runtimes.classifier_file import ClassifierFile

        config = run.read_config() if run else None
        dataset = settings.dataset_of(config)
        if config is None:
            test_views, frame_sampling, combine = model.test_views, model.frame_sampling, model.combine
        else:
            test_views, frame_sampling, combine = config.test_views, dataset.frame_sampling, config.combine
        manifest = open_dataset(dataset)
        self.check_evaluation(model, settings, manifest, run)
        network = model if isinstance(model, ClassifierFile) else self._classifier(model)
        classifier = with_head_pool(network, settings.head_pool)
        return ClipEvaluation(
            model=classifier,
            weights=weights,
            manifest=manifest,
            classes=self.classes(manifest),
            make_example=self.make_example(),
            metrics=self.metrics(classifier.num_classes),
            score=self.score,
            sample=self.sample,
            split=dataset.eval_split,
            views=settings.views_for(classifier, test_views),
            clip_starts=settings.clip_starts,
            frame_sampling=settings.frame_sampling or frame_sampling,
            combine=settings.combine or combine,
            seed=config.seed if config else None,
        )

    def _classifier(self, model: "Network") -> "X3D":
        from x3d_tf.modeling.x3d import X3D

        if not isinstance(model, X3D):
            raise UserError(f"the task {self.name} requires a network that classifies clips, got a detector")
        return model

    def check_evaluation(
        self,
        network: "Metadata | Network | ClassifierFile",
        settings: "EvalConfig",
        manifest: "Manifest",
        run: "RunFolder | None" = None,
    ) -> None:
        if network.form == "exported":
            settings.require_unset(
                ("spatial_crops", "head_pool"), "for an exported file, whose clips have a fixed size"
            )
        require_annotations(manifest, self.annotations)
        rule = f"be {self.activation!r} for the task {self.name}"
        require(network.activation == self.activation, "the activation of the network", rule, network.activation)
        settings.check_crops(network.stretch)
        settings.require_unset(BOX_SETTINGS, f"for the task {self.name}, which has no boxes")
        require_known_classes(network, self.classes(manifest), manifest.folder)

    def check_prediction(self, metadata: "Metadata", options: Mapping[str, Any], paths: Sequence[Path]) -> None:
        require_windows(metadata.expansion.clip, options["window"], options["hop"])

    def prediction_job(self, options: Mapping[str, Any], paths: Sequence[Path]) -> "ClassifyJob":
        from x3d_tf.inference.jobs import ClassifyJob
        from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL

        views = options["views"] or describe_any(options["model"]).test_views
        window = options["window"]
        if views != 1 and window is None and runs_in_tensorflow(options["model"]):
            from x3d_tf.parallel import use_single_threaded_ops

            use_single_threaded_ops(CLIPS_A_CALL)
        return ClassifyJob(
            model=options["model"],
            at_once=1 if views == 1 and window is None else None,  # a single clip is faster with all cores
            temporal_views=options["views"],
            window=window,
            hop=options["hop"],
            csv=options["csv"],
            json=options["json"],
            contact_sheet=options["contact_sheet"],
            overwrite=options["overwrite"],
        )


class SingleLabel(ClipTask):
    """Exactly one class per clip, the label of its record."""

    name = "single_label"

    def class_weights(self, config: "TrainConfig", manifest: "Manifest") -> Any:
        if config.recipe.class_weights == "none":
            return None
        records = self.training_records(manifest, config.dataset.train_split)
        return balancing_weights([record.labels[0] for record in records], len(manifest.classes))

    def advice(self, config: "TrainConfig", manifest: "Manifest") -> list[str]:
        records = self.training_records(manifest, config.dataset.train_split)
        return super().advice(config, manifest) + check_class_balance(config, manifest, records)


class MultiLabel(ClipTask):
    """Any number of classes per clip, the labels of its record."""

    name = "multi_label"
    activation = "sigmoid"


def balancing_weights(labels: Sequence[int], classes: int) -> np.ndarray:
    """Returns loss factors that give all classes equal weight, with mean 1 over the clips; float32 [classes].

    Args:
        labels: the class of each training video.
        classes: number of classes. A class without videos gets the factor 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = int(np.count_nonzero(counts))
    weights = np.divide(len(labels), counts * present, out=np.zeros(classes), where=counts > 0)
    return weights.astype(np.float32)


TASKS: "tuple[Task, ...]" = (SingleLabel(), MultiLabel())
