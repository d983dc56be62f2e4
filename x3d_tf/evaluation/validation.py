"""Validation during training: on the centre clip of each video, or on key frames."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from x3d_tf.config import Detection
from x3d_tf.data.input_pipeline import MakeExample
from x3d_tf.data.key_frames import validation_key_frames
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.evaluation.classification_reports import Predictions
from x3d_tf.evaluation.detection import score_split
from x3d_tf.evaluation.metrics import MAP
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.evaluation.reports import metric_values
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.x3d import X3D
from x3d_tf.types import Metric, ViewSpec

LOSS = Metric("loss", "loss")


class ClipValidation:
    """Evaluates a classifier on a split.

    Computes the metrics of its task and, unless one of them has the name "loss", the mean cross-entropy.

    Args:
        model: the network. Its weights may change between calls.
        manifest: the manifest of the records.
        split: name of the validation split.
        metrics: the metrics of the task, the main one first.
        score: computes their values, by name.
        frame_sampling: see `sampling.frame_indices`.
        resize: short side in pixels to which frames are scaled.
        make_example: makes the targets; see `input_pipeline.evaluation_clips`.
    """

    def __init__(
        self,
        model: X3D,
        manifest: Manifest,
        split: str,
        *,
        metrics: Sequence[Metric],
        score: Callable[[Predictions], dict[str, Any]],
        frame_sampling: FrameSampling,
        resize: int,
        make_example: MakeExample | None,
    ) -> None:
        self._model, self._manifest, self._split = model, manifest, split
        self._sampling, self._make_example = frame_sampling, make_example
        self._views = ViewSpec(temporal_views=1, resize=resize, crop=model.clip.size, stretch=model.stretch)
        self._task_metrics, self._score = tuple(metrics), score
        self._loss = next((metric for metric in metrics if metric.name == LOSS.name), LOSS)
        self.metrics = tuple(dict.fromkeys((*metrics, self._loss)))

    def __call__(self) -> dict[str, float]:
        """Evaluates the current weights.

        Raises:
            UserError: a metric has no valid value.
        """
        found = predict_split(
            self._model,
            self._manifest,
            self._split,
            self._views,
            frame_sampling=self._sampling,
            make_example=self._make_example,
        )
        probabilities, truth = found.probabilities, found.truth(self._model.num_classes)
        exclusive = self._model.activation == "softmax"
        videos = tuple(record.media_id for record in self._manifest.split(self._split).records)
        predictions = Predictions(videos, self._model.class_names, probabilities, truth, exclusive)
        likelihood = probabilities[truth] if exclusive else np.where(truth, probabilities, 1 - probabilities)
        loss = float(-np.mean(np.log(np.maximum(likelihood, np.finfo(np.float32).tiny))))
        values = metric_values(self._task_metrics, self._score(predictions))
        return values | {LOSS.name: values.get(LOSS.name, loss)}

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """Ranks by the main metric; of equal ones, the better loss is better."""
        return tuple(metric.rank(scores[metric.name]) for metric in (self.metrics[0], self._loss))


class KeyFrameValidation:
    """Evaluates a detector on a split by its frame mAP (map).

    Args:
        model: the detector. Its weights may change between calls.
        manifest: the manifest of the key-frame records.
        split: name of the validation split.
        detection: the settings that select key frames and boxes.
    """

    metrics = (MAP,)

    def __init__(self, model: Detector, manifest: Manifest, split: str, detection: Detection) -> None:
        self._model, self._manifest = model, validation_key_frames(manifest, split, detection.validation_every)
        self._split, self._detection = split, detection

    def __call__(self) -> dict[str, float]:
        """Evaluates the current weights."""
        _, scores = score_split(self._model, self._manifest, self._split, self._detection)
        return {"map": scores.mean}

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """Ranks by map."""
        return (scores["map"],)
