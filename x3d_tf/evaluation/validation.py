"""Validation during training: on the centre clip of each video, or on key frames."""

import numpy as np

from x3d_tf.config import Detection
from x3d_tf.data.input_pipeline import MakeExample
from x3d_tf.data.key_frames import validation_key_frames
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.evaluation.detection import score_split
from x3d_tf.evaluation.metrics import MAP, TOP1, mean_average_precision, top_k_accuracy
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.x3d import X3D
from x3d_tf.types import Metric, ViewSpec


class ClipValidation:
    """Evaluates a classifier on a split.

    Computes top1, or the mean average precision (map) if a clip may have several classes, and the mean cross-entropy.

    Args:
        model: the network. Its weights may change between calls.
        manifest: the manifest of the records.
        split: name of the validation split.
        frame_sampling: see `sampling.frame_indices`.
        resize: short side in pixels to which frames are scaled.
        make_example: makes the targets; see `input_pipeline.evaluation_dataset`.
    """

    def __init__(
        self,
        model: X3D,
        manifest: Manifest,
        split: str,
        frame_sampling: FrameSampling,
        resize: int,
        make_example: MakeExample | None = None,
    ) -> None:
        self._model, self._manifest, self._split = model, manifest, split
        self._sampling, self._make_example = frame_sampling, make_example
        self._views = ViewSpec(temporal_views=1, resize=resize, crop=model.clip.size, stretch=model.stretch)
        self.metrics = (TOP1 if model.activation == "softmax" else MAP, Metric("loss", "loss"))

    def __call__(self) -> dict[str, float]:
        """Evaluates the current weights."""
        found = predict_split(
            self._model,
            self._manifest,
            self._split,
            self._views,
            frame_sampling=self._sampling,
            make_example=self._make_example,
        )
        probabilities, truth = found.probabilities, found.truth(self._model.num_classes)
        tiny = np.finfo(np.float32).tiny
        if self._model.activation == "softmax":
            likelihood = probabilities[truth]
            score = {"top1": top_k_accuracy(probabilities, truth.argmax(axis=1), 1)}
        else:
            likelihood = np.where(truth, probabilities, 1 - probabilities)
            score = {"map": mean_average_precision(probabilities, truth)}
        return score | {"loss": float(-np.mean(np.log(np.maximum(likelihood, tiny))))}

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """Ranks by top1 or map; of equal ones, the lower loss is better."""
        return scores[self.metrics[0].name], -scores["loss"]


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
