"""Evaluation of action detectors on the centre crop of one clip around each key frame (paper, section 5)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.config import Detection
from x3d_tf.data.ava_files import BoxTable, KeyFrame, one_row_per_action
from x3d_tf.data.boxes import is_nonempty
from x3d_tf.data.detection_pipeline import evaluation_key_frames
from x3d_tf.data.key_frames import actions_to_evaluate, key_frames_of, require_boxes
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.errors import UserError
from x3d_tf.evaluation.detection_reports import (
    METRICS,
    DetectionScores,
    score_detections,
    summary,
    values_of,
    write_detection_report,
)
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.reports import locked_report_folder, settings_of
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.x3d import cost_of
from x3d_tf.parallel import optimize_for_device
from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL
from x3d_tf.terminal import progress_bar
from x3d_tf.text import counted


@dataclass(frozen=True, eq=False)
class SplitDetections:
    """Scores of the boxes of a split, with the ground truth.

    Attributes:
        records: index of each box's record in the split, int64 [n].
        boxes: x1, y1, x2, y2 relative to the frame, in [0, 1], float32 [n, 4].
        scores: float32 [n, classes of the records].
        truth_records: index of each annotated box's record, int64 [m]. A box with several classes has several rows.
        truth_boxes: annotated boxes, float32 [m, 4].
        truth_labels: class of each annotated box, int64 [m].
        outside: number of boxes outside the centre crop. Their scores do not depend on the video.
    """

    records: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    truth_records: NDArray[np.int64]
    truth_boxes: NDArray[np.float32]
    truth_labels: NDArray[np.int64]
    outside: int

    def tables(self, manifest: Manifest, split: str) -> tuple[BoxTable, BoxTable]:
        """Returns ground truth and detections in AVA's format, where each detected box has one row per action."""
        frames = tuple(KeyFrame(record.video, record.key_frame or 0) for record in manifest.split(split).records)
        count = len(self.truth_labels)
        truth = BoxTable(
            frames,
            self.truth_records.astype(np.int32),
            self.truth_boxes.astype(np.float64),
            (self.truth_labels + 1).astype(np.int32),
            np.ones(count),
            np.zeros(count, np.int32),
        )
        found = one_row_per_action(frames, self.records, self.boxes, self.scores)
        return truth, found


def detect_split(
    model: Detector, manifest: Manifest, split: str, detection: Detection, *, progress: bool = True
) -> SplitDetections:
    """Scores the boxes of a split.

    Args:
        model: the detector.
        manifest: the manifest of the records, whose classes are among the model's.
        split: name of the split.
        detection: the settings that select the boxes to evaluate.
        progress: whether to show a progress bar on stderr.

    Raises:
        UserError: the split does not exist, the records are missing or damaged, or the scores are not finite.
    """
    side = model.expansion.test_size
    compute_scores = compile_detector(model, side)
    columns = [model.class_names.index(name) for name in manifest.classes]
    batches = evaluation_key_frames(
        manifest,
        split,
        model.clip,
        resize=side,
        crop=side,
        batch=CLIPS_A_CALL,
        proposals=detection.eval_boxes == "proposals",
        score=detection.score,
    )
    rows: list[tuple[Any, ...]] = []
    outside = 0
    total = len(manifest.split(split).records)
    with (
        record_errors_as_user_errors(),
        progress_bar(total, "clip", "evaluating", leave=None, disable=not progress) as bar,
    ):
        for inputs, annotations in batches:
            scores = compute_scores(inputs).numpy()
            if not np.isfinite(scores).all():
                raise UserError(f"the detector's scores for split {split!r} of {manifest.folder} must be finite")
            for index in range(len(scores)):
                count, annotated = int(annotations.count[index]), annotations.labels[index].numpy() >= 0
                boxes = annotations.original[index].numpy()[:count]
                truth = annotations.truth[index].numpy()[annotated]
                record = int(annotations.record[index])
                outside += int((~is_nonempty(inputs["boxes"][index, :count]).numpy()).sum())
                labels = annotations.labels[index].numpy()[annotated]
                found = (np.full(count, record), boxes, scores[index, :count][:, columns])
                rows.append((*found, np.full(len(labels), record), truth, labels))
            bar.update(len(scores))
    if outside and progress:
        tqdm.write(f"evaluated although outside the centre crop: {counted(outside, 'box')}")
    records, boxes, scores, *truth = (np.concatenate(column) for column in zip(*rows))
    return SplitDetections(records, boxes, scores, truth[0], truth[1], truth[2], outside)


def compile_detector(model: Detector, side: int) -> Callable[[Any], Any]:
    """Returns a compiled function from {"clip", "boxes"} to float32 scores (N, B, classes); clips of `side` pixels."""
    network = optimize_for_device(lambda inputs: model(inputs, training=False))
    clip = tf.TensorSpec((None, model.clip.frames, side, side, 3), tf.float32)
    return tf.function(network, input_signature=[{"clip": clip, "boxes": tf.TensorSpec((None, None, 4), tf.float32)}])


def score_split(
    model: Detector, manifest: Manifest, split: str, detection: Detection, *, progress: bool = True
) -> tuple[BoxTable, DetectionScores]:
    """Computes the frame mAP of a detector on a split: over the 60 actions that AVA evaluates, or else all classes.

    Returns:
        The detections and their scores.

    Raises:
        UserError: the split has no annotated boxes of these actions; otherwise as `detect_split`.
    """
    require_boxes(manifest, split)
    truth, found = detect_split(model, manifest, split, detection, progress=progress).tables(manifest, split)
    return found, score_detections(truth, found, actions_to_evaluate(manifest.classes))


class DetectorEvaluation:
    """A detector, and the key frames and boxes to evaluate it on.

    Args:
        model: the detector.
        weights: origin of the weights, for the report.
        manifest: the manifest of the records, which have the boxes to evaluate. Their classes are among the model's.
        split: name of the split to evaluate.
        detection: the settings that select the boxes.
        seed: seed of the run; None for a model file.
    """

    metrics = METRICS
    sample = "key frame"

    def __init__(
        self,
        model: Detector,
        weights: dict[str, Any],
        manifest: Manifest,
        split: str,
        detection: Detection,
        seed: int | None,
    ) -> None:
        self.model, self.weights, self.seed = model, weights, seed
        self.manifest, self.split, self.detection = manifest, split, detection
        records = len(self.manifest.split(self.split).records)
        self.missing = max(key_frames_of(self.manifest).listed.get(self.split, records) - records, 0)

    def with_views(self, temporal_views: int) -> "DetectorEvaluation":
        raise UserError("a detector is evaluated on one clip around each key frame, not on several clips per video")

    def settings(self) -> dict[str, Any]:
        """Returns the settings as results.json states them."""
        model, detection = self.model, self.detection
        side, cost, split = model.eval_size, cost_of(model), self.manifest.split(self.split)
        return {
            "network": name_of(model.expansion, model.options.family),
            "head": model.head,
            "records": str(self.manifest.folder),
            "records_sha256": self.manifest.fingerprint(),
            "dataset": self.manifest.dataset,
            "videos_expected": split.expected,
            "videos_present": split.present,
            "split": self.split,
            "task": model.task,
            "eval_boxes": detection.eval_boxes,
            "lowest_score_of_a_box": detection.score,
            "frames": model.clip.frames,
            "stride": model.clip.stride,
            "resize": side,
            "crop": side,
            "options": dataclasses.asdict(model.options),
            "views": f"centre crop of {side}²",
            "samples": len(split.records),
            "key_frames_missing": self.missing,
            "classes": len(actions_to_evaluate(self.manifest.classes)),
            "gmacs_per_clip": cost.macs / 1e9,
            "gmacs_per_sample": cost.macs / 1e9,
            "params": cost.params,
            "params_paper": cost.params_paper,
            **self.weights,
            "seed": self.seed,
        }

    def measure(self) -> dict[str, Any]:
        """Runs the detector on all key frames and returns the measured values."""
        _, scores = self._score()
        return values_of(scores)

    def report(self, folder: Path) -> Report:
        """Runs the evaluation and writes its report, including all detections in AVA's format.

        Raises:
            UserError: the records are damaged, or another process writes the same report.
        """
        settings = settings_of(self)
        with locked_report_folder(folder):
            found, scores = self._score()
            report = write_detection_report(folder, settings, scores, found)
        print("\n".join(summary(scores)))
        if self.missing:
            print(f"not evaluated: {counted(self.missing, 'key frame')} of the annotation lists without a record")
        return report

    def _score(self) -> tuple[BoxTable, DetectionScores]:
        return score_split(self.model, self.manifest, self.split, self.detection)
