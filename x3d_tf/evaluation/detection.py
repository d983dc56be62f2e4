"""Tests of action detectors on records of key frames: one clip around each, its centre crop (paper, section 5)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.config import Detection, TrainConfig
from x3d_tf.data.boxes import is_nonempty
from x3d_tf.data.build.key_frames import num_key_frames_setting
from x3d_tf.data.datasets.ava import EVALUATED, BoxTable, KeyFrame, ava_actions, one_row_per_action
from x3d_tf.data.datasets.spec import open_dataset
from x3d_tf.data.detection_pipeline import evaluation_key_frames, require_proposals
from x3d_tf.data.input_pipeline import record_errors_as_user_errors
from x3d_tf.data.records.index import parse_key_frame_id
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.comparison import describe
from x3d_tf.evaluation.detection_reports import (
    DetectionScores,
    score_detections,
    summary,
    write_detection_report,
)
from x3d_tf.evaluation.eval_config import detector_report_folder
from x3d_tf.evaluation.multiview import CLIPS_A_CALL
from x3d_tf.evaluation.reports import RESULTS_NAME, Report, refuse_to_replace, reporting
from x3d_tf.modeling.archive import weights_of
from x3d_tf.modeling.detection import Detector, cost_of
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load_detector
from x3d_tf.parallel import optimize_for_device
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.terminal import progress_bar
from x3d_tf.text import counted


@dataclass(frozen=True, eq=False)
class SplitDetections:
    """What a detector says of the boxes of a split, and what is true.

    Attributes:
        records: place in the split of the record of each box, int64 [n].
        boxes: in [0, 1] of the frame, float32 [n, 4].
        scores: float32 [n, classes].
        truth_records, truth_boxes, truth_labels: the annotated boxes, one row for each pair of a box and a class, [m],
            [m, 4] and [m].
        outside: how many of the boxes the centre crop shows nothing of; their scores are those of no pixel.
    """

    records: NDArray[np.int64]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    truth_records: NDArray[np.int64]
    truth_boxes: NDArray[np.float32]
    truth_labels: NDArray[np.int64]
    outside: int

    def tables(self, manifest: Manifest, split: str) -> tuple[BoxTable, BoxTable]:
        """Truth and detections as AVA's files have them: each box found has a row for every action."""
        frames = tuple(KeyFrame(*parse_key_frame_id(record.media_id)) for record in manifest.split(split).records)
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
        manifest: of the records.
        split: which part.
        detection: which boxes are tested.
        progress: whether a bar on stderr tells how far it is.

    Raises:
        UserError: no such split; records that are missing or damaged; scores that are not numbers.
    """
    side = model.expansion.test_size
    scores_of = scoring(model, side)
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
        for inputs, about in batches:
            scores = scores_of(inputs).numpy()
            if not np.isfinite(scores).all():
                raise UserError(f"the network gives scores that are not numbers on {manifest.folder}, {split}")
            for place in range(len(scores)):
                count, known = int(about.count[place]), about.labels[place].numpy() >= 0
                own, truth = about.original[place].numpy()[:count], about.truth[place].numpy()[known]
                record = int(about.record[place])
                outside += int((~is_nonempty(inputs["boxes"][place, :count]).numpy()).sum())
                labels = about.labels[place].numpy()[known]
                found = (np.full(count, record), own, scores[place, :count])
                rows.append((*found, np.full(len(labels), record), truth, labels))
            bar.update(len(scores))
    if outside and progress:
        tqdm.write(f"outside the centre crop, yet among the detections: {counted(outside, 'box')}")
    records, boxes, scores, *truth = (np.concatenate(column) for column in zip(*rows))
    return SplitDetections(records, boxes, scores, truth[0], truth[1], truth[2], outside)


def scoring(model: Detector, side: int) -> Callable[[Any], Any]:
    """The compiled function from {"clip", "boxes"} to scores, float32 (N, B, classes); clips of `side` pixels."""
    network = optimize_for_device(lambda given: model(given, training=False))
    clip = tf.TensorSpec((None, model.clip.frames, side, side, 3), tf.float32)
    return tf.function(network, input_signature=[{"clip": clip, "boxes": tf.TensorSpec((None, None, 4), tf.float32)}])


def score_split(
    model: Detector, manifest: Manifest, split: str, detection: Detection, *, progress: bool = True
) -> tuple[BoxTable, DetectionScores]:
    """Frame mAP of a detector on a split, over the 60 actions of AVA's evaluation or else all classes.

    Returns:
        The detections, and their scores.
    """
    truth, found = detect_split(model, manifest, split, detection, progress=progress).tables(manifest, split)
    require(len(truth) > 0, f"split {split!r} of {manifest.folder}", "hold annotated boxes to measure with", "none")
    return found, score_detections(truth, found, _measured(manifest.classes))


def evaluate_detector(run: RunFolder, *, output: str | None = None, overwrite: bool = False) -> Report:
    """Tests the detector of a finished run and writes a report, with all detections in AVA's format.

    Args:
        run: the run.
        output: folder of the report; `evaluation/RECORDS_SPLIT_BOXES` in the run folder unless given.
        overwrite: whether a report that is there may be replaced.

    Raises:
        UserError: the run has no model yet; records that are missing or damaged; a report is there, or another
            process writes it.
    """
    config = run.read_config()
    folder = Path(output) if output else detector_report_folder(run)
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    manifest = open_dataset(config.dataset)
    with reporting(folder):
        return _report(run, config, manifest, folder)


def _report(run: RunFolder, config: TrainConfig, manifest: Manifest, folder: Path) -> Report:
    split = config.dataset.eval_split
    if config.detection.eval_boxes == "proposals":
        require_proposals(manifest, split)
    model = load_detector(run.root)
    found, scores = score_split(model, manifest, split, config.detection)
    side, own_cost = model.eval_size, cost_of(model)
    records = len(manifest.split(split).records)
    named = manifest.settings.get(num_key_frames_setting(split))
    missing = max(named - records, 0) if isinstance(named, int) else 0
    settings = {
        "network": name_of(model.expansion),
        "head": model.head,
        "records": str(manifest.folder),
        "records_sha256": manifest.fingerprint(),
        "split": split,
        "eval_boxes": config.detection.eval_boxes,
        "lowest_score_of_a_box": config.detection.score,
        "frames": model.clip.frames,
        "stride": model.clip.stride,
        "resize": side,
        "crop": side,
        "options": dataclasses.asdict(model.options),
        "views": f"centre crop of {side}²",
        "videos": records,  # key frames, one clip each
        "key_frames_missing": missing,
        "gmacs_per_clip": own_cost.macs / 1e9,
        "gmacs_per_video": own_cost.macs / 1e9,
        "params": own_cost.params,
        **weights_of(run.root),
        "seed": config.seed,
    }
    report = write_detection_report(folder, settings, scores, found)
    print("\n".join(summary(scores)))
    if missing:
        print(f"without a record, and so not counted: {counted(missing, 'key frame')} of the lists of the records")
    print(describe(report))
    return report


def _measured(classes: tuple[str, ...]) -> dict[int, str]:
    if classes == tuple(ava_actions().values()):
        return {number: classes[number - 1] for number in sorted(EVALUATED)}
    return dict(enumerate(classes, 1))
