"""Tests of a network while it trains: on one clip from the middle of each video, always the same."""

import math
from typing import NamedTuple

import numpy as np

from x3d_tf.config import Detection
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.index import parse_key_frame_id
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation.detection import score_split
from x3d_tf.evaluation.metrics import mean_average_precision, top_k_accuracy
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.x3d import X3D
from x3d_tf.types import ViewSpec


class Score(NamedTuple):
    """A validation: higher accuracy is better, and of equal ones the lower loss.

    Attributes:
        accuracy: top-1, or mean average precision where videos, or boxes, have several labels.
        loss: mean cross-entropy of the probabilities; of a detector what its precision lacks.
    """

    accuracy: float
    loss: float

    def beats(self, other: "Score | None") -> bool:
        """Whether this is better; anything is better than nothing."""
        return other is None or (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class Validation:
    """Tests a network on a split.

    Args:
        model: whose weights may change from one call to the next.
        manifest, split: the records.
        dataset: how frames are sampled.
        resize: short side in pixels that frames are scaled to.
    """

    def __init__(self, model: X3D, manifest: Manifest, split: str, dataset: DatasetSpec, resize: int) -> None:
        self._model, self._manifest, self._split = model, manifest, split
        self._sampling = dataset.frame_sampling
        self._views = ViewSpec(temporal_views=1, resize=resize, crop=model.clip.size, stretch=model.stretch)
        records = manifest.split(split).records
        if not records:
            raise UserError(f"split {split!r} of {manifest.folder} holds no records to validate on")
        self._truth = np.zeros((len(records), len(manifest.classes)), bool)
        for row, record in zip(self._truth, records):
            row[list(record.labels)] = True

    def __call__(self) -> Score:
        """Scores the weights as they are."""
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
    """Tests a detector on a split: frame mAP, which takes the place of the accuracy.

    Args:
        model: whose weights may change from one call to the next.
        manifest, split: the records, of key frames.
        detection: which boxes are tested.
    """

    def __init__(self, model: Detector, manifest: Manifest, split: str, detection: Detection) -> None:
        every = detection.validation_every
        records = manifest.split(split).records
        taken = [record for record in records if parse_key_frame_id(record.media_id)[1] % every == 0]
        if not taken:
            of_these = f" whose seconds {every} divides" if every > 1 else ""
            raise UserError(f"split {split!r} of {manifest.folder} holds no records{of_these} to validate on")
        self._model, self._manifest, self._split = model, manifest.with_records(split, taken), split
        self._detection = detection

    def __call__(self) -> Score:
        """Scores the weights as they are."""
        _, scores = score_split(self._model, self._manifest, self._split, self._detection)
        precision = 0.0 if math.isnan(scores.mean) else scores.mean
        return Score(precision, 1 - precision)
