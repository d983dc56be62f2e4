"""Validation during training, on the centre clip of each video."""

import math
from typing import NamedTuple

import numpy as np

from x3d_tf.config import Detection
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation.detection import score_split
from x3d_tf.evaluation.metrics import mean_average_precision, top_k_accuracy
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.x3d import X3D
from x3d_tf.types import ViewSpec


class Score(NamedTuple):
    """Result of a validation. Higher accuracy is better; of equal accuracies, the lower loss is better.

    Attributes:
        accuracy: top-1 accuracy for single-label tasks, else mean average precision (mAP), in [0, 1].
        loss: mean cross-entropy of the probabilities; 1 - mAP for a detector.
    """

    accuracy: float
    loss: float

    def beats(self, other: "Score | None") -> bool:
        """Returns True if this score is better than `other`, or if `other` is None."""
        return other is None or (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class Validation:
    """Evaluates a classification network on a split.

    Args:
        model: the network. Its weights may change between calls.
        manifest: the manifest of the records.
        split: name of the validation split.
        dataset: the settings for frame sampling.
        resize: short side in pixels to which frames are scaled.

    Raises:
        UserError: the split has no records.
    """

    def __init__(self, model: X3D, manifest: Manifest, split: str, dataset: DatasetSpec, resize: int) -> None:
        self._model, self._manifest, self._split = model, manifest, split
        self._sampling = dataset.frame_sampling
        self._views = ViewSpec(temporal_views=1, resize=resize, crop=model.clip.size, stretch=model.stretch)
        records = manifest.split(split).records
        if not records:
            raise UserError(f"validation split {split!r} of {manifest.folder} must have at least one record")
        self._truth = np.zeros((len(records), len(manifest.classes)), bool)
        for row, record in zip(self._truth, records):
            row[list(record.labels)] = True

    def __call__(self) -> Score:
        """Evaluates the current weights."""
        probabilities = predict_split(
            self._model,
            self._manifest,
            self._split,
            self._views,
            frame_sampling=self._sampling,
        )
        tiny = np.finfo(np.float32).tiny
        if self._model.task == "multi_label":
            likelihood = np.where(self._truth, probabilities, 1 - probabilities)
            accuracy = mean_average_precision(probabilities, self._truth)
        else:
            likelihood = probabilities[self._truth]
            accuracy = top_k_accuracy(probabilities, self._truth.argmax(axis=1), 1)
        return Score(accuracy, float(-np.mean(np.log(np.maximum(likelihood, tiny)))))


class DetectorValidation:
    """Evaluates a detector on a split by its frame mAP, which replaces the accuracy.

    Args:
        model: the detector. Its weights may change between calls.
        manifest: the manifest of the key-frame records.
        split: name of the validation split.
        detection: the settings that select key frames and boxes.

    Raises:
        UserError: the split has no key frames to validate on.
    """

    def __init__(self, model: Detector, manifest: Manifest, split: str, detection: Detection) -> None:
        every = detection.validation_every
        records = manifest.split(split).records
        selected = [record for record in records if (record.key_frame or 0) % every == 0]
        if not selected:
            seconds = f" at a multiple of Detection.validation_every = {every} seconds" if every > 1 else ""
            raise UserError(
                f"validation split {split!r} of {manifest.folder} must have at least one key frame{seconds}"
            )
        self._model, self._manifest, self._split = model, manifest.with_records(split, selected), split
        self._detection = detection

    def __call__(self) -> Score:
        """Evaluates the current weights."""
        _, scores = score_split(self._model, self._manifest, self._split, self._detection)
        mean_ap = 0.0 if math.isnan(scores.mean) else scores.mean
        return Score(mean_ap, 1 - mean_ap)
