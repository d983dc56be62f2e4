"""Multi-view evaluation of classifiers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.data.input_pipeline import MakeExample
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.evaluation.classification_reports import Predictions, write_report
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.multiview import SplitPredictions, predict_split
from x3d_tf.evaluation.reports import locked_report_folder, settings_of
from x3d_tf.modeling.architecture import HeadPool
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.metadata import copy_metadata
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runtimes.classifier_file import ClassifierFile
from x3d_tf.runtimes.exported import ExportedClassifier
from x3d_tf.terminal import tell
from x3d_tf.types import ClipStarts, Combine, Metric, ViewSpec, stored_to_json


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipEvaluation:
    """A classifier, the records to evaluate it on, and the settings: everything that determines the results.

    Attributes:
        model: the network, or an exported file.
        weights: origin of the weights, for the report.
        manifest: the manifest of the records.
        classes: names of the classes of the targets; they are among the network's.
        make_example: makes the targets; see `input_pipeline.evaluation_clips`.
        metrics: the metrics, the main one first.
        score: computes the values of the metrics, and further results, by name.
        sample: noun for what a record is.
        split: name of the split to evaluate.
        views: the views of each video.
        clip_starts: see `EvalConfig`.
        frame_sampling: see `EvalConfig`.
        combine: see `EvalConfig`.
        seed: seed of the run; None for a model file.
    """

    model: X3D | ClassifierFile
    weights: dict[str, Any]
    manifest: Manifest
    classes: tuple[str, ...]
    make_example: MakeExample | None
    metrics: tuple[Metric, ...]
    score: Callable[[Predictions], dict[str, Any]]
    sample: str
    split: str
    views: ViewSpec
    clip_starts: ClipStarts
    frame_sampling: FrameSampling
    combine: Combine
    seed: int | None

    def with_views(self, temporal_views: int) -> "ClipEvaluation":
        """Returns a copy with another number of clips per video."""
        return replace(self, views=replace(self.views, temporal_views=temporal_views))

    def settings(self) -> dict[str, Any]:
        """Returns the settings as results.json states them."""
        model, views, split = self.model, self.views, self.manifest.split(self.split)
        number, splits = self.manifest.official_split or (None, None)
        count = cost(
            model.expansion,
            replace(model.clip, size=views.crop),
            num_classes=model.num_classes,
            options=model.options,
        )
        exported = {"exported": model.runtime} if isinstance(model, ExportedClassifier) else {}
        return {
            "network": name_of(model.expansion, model.options.family),
            **exported,
            **self.weights,
            "records": str(self.manifest.folder),
            "records_sha256": self.manifest.fingerprint(),
            "dataset": self.manifest.dataset,
            "split": self.split,
            "official_split": number,
            "official_splits": splits,
            "task": model.task,
            "samples": len(split.records),
            "videos_expected": split.expected,
            "videos_present": split.present,
            "classes": model.num_classes,
            "views": f"{views.temporal_views}-{'Center' if views.spatial_crops == 1 else 'LeftCenterRight'}",
            "gmacs_per_clip": count.macs / 1e9,
            "gmacs_per_sample": count.macs * views.views / 1e9,
            "params": count.params,
            "params_paper": count.params_paper,
            "frames": model.clip.frames,
            "stride": model.clip.stride,
            "resize": views.resize,
            "crop": views.crop,
            "stretch": views.stretch,
            "clip_starts": self.clip_starts,
            "frame_sampling": self.frame_sampling,
            "combine": self.combine,
            "stored": stored_to_json(self.manifest.stored),
            "head_pool": model.options.head_pool,
            "stem_kernel": model.options.stem_kernel,
            "options": asdict(model.options),
            "seed": self.seed,
        }

    def predict(self) -> Predictions:
        """Runs the network on all views of all videos."""
        found = predict_split(
            self.model,
            self.manifest,
            self.split,
            self.views,
            clip_starts=self.clip_starts,
            frame_sampling=self.frame_sampling,
            make_example=self.make_example,
            combine=self.combine,
        )
        videos = tuple(record.media_id for record in self.manifest.split(self.split).records)
        names = self.model.class_names
        return Predictions(videos, names, found.probabilities, self._truth(found), self.model.activation == "softmax")

    def measure(self) -> dict[str, Any]:
        """Runs the network on all views of all videos and returns the measured values."""
        return self.score(self.predict())

    def _truth(self, found: SplitPredictions) -> np.ndarray:
        """Returns the targets as the model's classes, bool (videos, classes)."""
        # reversed, so that the first of several classes with the same name is used
        model_classes = {name: index for index, name in reversed([*enumerate(self.model.class_names)])}
        classes = [model_classes[name] for name in self.classes]
        truth = np.zeros((len(found.targets), self.model.num_classes), bool)
        truth[:, classes] = found.truth(len(classes))
        return truth

    def report(self, folder: Path) -> Report:
        """Runs the evaluation and writes its report.

        Raises:
            UserError: the records are missing or damaged, the probabilities are not finite, or another process writes
                the same report.
        """
        settings = settings_of(self)
        with locked_report_folder(folder):  # before the evaluation, so that a wrong path fails at once
            predictions = self.predict()
            tell(f"writing the report {folder}")
            return write_report(folder, settings, predictions, self.score(predictions))


def with_head_pool(model: X3D | ClassifierFile, head_pool: HeadPool | None) -> X3D | ClassifierFile:
    """Returns the network with another head pooling and the same weights; `model` itself if nothing changes.

    Raises:
        UserError: an exported file, whose pooling is fixed.
    """
    if head_pool is None or head_pool == model.options.head_pool:
        return model
    if isinstance(model, ClassifierFile):
        return model.with_head_pool(head_pool)
    options = replace(model.options, head_pool=head_pool)
    changed = X3D(model.expansion, model.num_classes, options, activation=model.activation, task=model.task)
    changed.set_weights(model.get_weights())  # pooling has no weights
    copy_metadata(model, changed)
    return changed
