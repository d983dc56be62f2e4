"""Frame mAP of action detections by AVA's protocol, and its report. Imports no TensorFlow."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf import csv_files, plots
from x3d_tf.data.ava_files import (
    BoxTable,
    KeyFrame,
    LabelMap,
    evaluated_actions,
    read_boxes,
    read_exclusions,
    read_label_map,
    write_detections,
)
from x3d_tf.errors import require
from x3d_tf.evaluation.detection_metrics import LabeledBoxes, detection_average_precisions, mean_over_classes
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import MAP
from x3d_tf.evaluation.reports import metrics_to_json, write_csv, writing_report
from x3d_tf.text import counted

IOU = 0.5  # minimum intersection over union of a match
METRICS = (MAP,)


@dataclass(frozen=True, eq=False)
class DetectionScores:
    """Average precision of detections.

    Attributes:
        actions: numbers and names of the evaluated actions.
        precisions: average precision of each action, float64; NaN for actions without annotated boxes.
        positives: number of annotated boxes of each action.
        key_frames: number of key frames with annotated boxes.
        boxes: number of evaluated detections, pairs of a box and an action.
        left_out: number of ignored detections: without width or height, on excluded key frames, or of other actions.
    """

    actions: dict[int, str]
    precisions: NDArray[np.float64]
    positives: NDArray[np.int64]
    key_frames: int
    boxes: int
    left_out: int

    @property
    def mean(self) -> float:
        """Mean average precision over the actions with annotated boxes; NaN if there are none."""
        return mean_over_classes(self.precisions)


def score_detections(
    truth: BoxTable, found: BoxTable, actions: LabelMap, excluded: Collection[KeyFrame] = ()
) -> DetectionScores:
    """Computes the average precision of each action over all key frames, at an IoU of 0.5.

    Args:
        truth: annotated boxes. Actions outside the label map are ignored.
        found: detected boxes. Actions outside the label map are ignored.
        actions: the actions to evaluate.
        excluded: key frames to ignore.
    """
    numbers = {frame: number for number, frame in enumerate(dict.fromkeys((*found.key_frames, *truth.key_frames)))}
    included = np.array([frame not in excluded for frame in numbers], bool)
    annotated, _ = _select(truth, numbers, included)
    detected, rows = _select(found, numbers, included)
    labels = np.array(list(actions))
    sides = detected.boxes[:, 2:] - detected.boxes[:, :2]
    valid = int(((sides > 0).all(axis=1) & np.isin(detected.labels, labels)).sum())
    return DetectionScores(
        dict(actions),
        detection_average_precisions(annotated, detected, found.scores[rows], labels, iou=IOU),
        np.array([(annotated.labels == label).sum() for label in labels]),
        len(np.unique(annotated.frames)),
        valid,
        len(found) - valid + found.other_actions,
    )


def _select(
    table: BoxTable, numbers: Mapping[KeyFrame, int], included: NDArray[np.bool_]
) -> tuple[LabeledBoxes, NDArray[np.int64]]:
    """Returns the rows to evaluate, with key frames numbered by `numbers`, and their row indices in the table."""
    frames = np.array([numbers[frame] for frame in table.key_frames], np.int64)[table.frames]
    rows = np.flatnonzero(included[frames] & (table.actions > 0)) if len(table) else np.zeros(0, np.int64)
    return LabeledBoxes(frames[rows], table.boxes[rows], table.actions[rows]), rows


def evaluate_files(
    detections: str | Path,
    groundtruth: str | Path,
    label_map: str | Path | None,
    exclusions: str | Path | None = None,
) -> tuple[dict[str, Any], DetectionScores]:
    """Evaluates a csv file of detections.

    Args:
        detections: csv file of detections; see `x3d_tf.data.ava_files.read_boxes`.
        groundtruth: csv file of annotated boxes, in the same format.
        label_map: file of the actions to evaluate. Defaults to the 60 actions of AVA's evaluation.
        exclusions: csv file of key frames to ignore.

    Returns:
        The settings for results.json, and the scores.

    Raises:
        UserError: a file cannot be read, or a line is invalid; the files have no key frames in common.
    """
    actions = evaluated_actions() if label_map is None else read_label_map(label_map)
    truth = read_boxes(groundtruth, "ground truth", actions)
    found = read_boxes(detections, "detections", actions)
    excluded = read_exclusions(exclusions) if exclusions else set()
    shared = set(truth.key_frames) - excluded
    rule = "have boxes of the evaluated actions on key frames that are not excluded"
    require(bool(shared), str(groundtruth), rule)
    examples = "; ".join(f"{frame.video} at {frame.second}" for frame in found.key_frames[:3])
    overlapping = not len(found) or bool(shared & set(found.key_frames))
    require(overlapping, str(detections), f"have detections on key frames of {groundtruth}", examples)
    videos = {frame.video for frame in (*truth.key_frames, *found.key_frames)}
    matched = not exclusions or any(frame.video in videos for frame in excluded)
    require(matched, str(exclusions), f"have key frames of videos in {groundtruth}")
    settings: dict[str, Any] = {
        "detections": str(detections),
        "groundtruth": str(groundtruth),
        "label_map": str(label_map or "AVA's 60 actions"),
        "exclusions": str(exclusions) if exclusions else None,
        "classes": len(actions),
        "metrics": metrics_to_json(METRICS),
    }
    return settings, score_detections(truth, found, actions, excluded)


def values_of(scores: DetectionScores) -> dict[str, Any]:
    """Returns the measured values for results.json."""
    return {
        MAP.name: scores.mean,
        "iou": IOU,
        "classes_with_positives": int((scores.positives > 0).sum()),
        "annotated_key_frames": scores.key_frames,
        "boxes": scores.boxes,
        "boxes_left_out": scores.left_out,
    }


def write_detection_report(
    folder: Path, settings: Mapping[str, Any], scores: DetectionScores, found: BoxTable | None = None
) -> Report:
    """Writes per_class.csv, per_class.png and, last, results.json, which marks the report as complete.

    Args:
        folder: folder of the report, created if it does not exist. An existing report is replaced.
        settings: the settings of the evaluation, for results.json.
        scores: the scores to report.
        found: the detections, to be written to detections.csv.

    Raises:
        UserError: mAP is undefined; the folder is left as it is.
    """
    with writing_report(folder, settings, values_of(scores)) as report:
        if found is not None:
            write_detections(folder / "detections.csv", found)
        write_csv(folder / "per_class.csv", _class_rows(scores))
        names = list(scores.actions.values())
        title = f"frame mAP at IoU {IOU:g}: {scores.mean:.1%}"
        plots.save_precisions(scores.precisions, scores.positives, names, folder / "per_class.png", title)
    return report


def _class_rows(scores: DetectionScores) -> Iterable[Sequence[Any]]:
    yield ["action_id", "action", "positives", "average_precision"]
    for (number, name), positives, precision in zip(scores.actions.items(), scores.positives, scores.precisions):
        yield [number, name, positives, "" if math.isnan(precision) else csv_files.number(precision, ".6g")]


def summary(scores: DetectionScores, worst_and_best: int = 3) -> list[str]:
    """Returns the lines to print: frame mAP, ignored detections, and the best and the worst actions."""
    present = int((scores.positives > 0).sum())
    lines = [
        f"frame mAP at IoU {IOU:g}: {scores.mean:.4%} over {counted(present, 'action')} on "
        f"{counted(scores.key_frames, 'key frame')}, {counted(scores.boxes, 'detection')}"
    ]
    if scores.left_out:
        reason = "without width or height, excluded, or of other actions"
        lines.append(f"ignored: {counted(scores.left_out, 'detection')} ({reason})")
    if missing := len(scores.actions) - present:
        lines.append(f"ignored: {counted(missing, 'action')} of the label map without boxes in the ground truth")
    ranked = [index for index in np.argsort(-scores.precisions, kind="stable") if scores.positives[index]]
    if len(ranked) > 2 * worst_and_best:
        ranked = ranked[:worst_and_best] + ranked[-worst_and_best:]
    names = list(scores.actions.values())
    return [*lines, *(f"  {scores.precisions[index]:7.2%}  {names[index]}" for index in ranked)]
