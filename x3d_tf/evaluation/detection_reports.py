"""Frame mAP of action detections by AVA's protocol, and the report of it. Imports no TensorFlow."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf import csv_files, plots
from x3d_tf.data.datasets.ava import (
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
from x3d_tf.evaluation.reports import RESULTS_NAME, Report, write_csv, write_json
from x3d_tf.text import counted

IOU = 0.5  # of a box found and a real one that match


@dataclass(frozen=True, eq=False)
class DetectionScores:
    """What a comparison of detections with the truth found.

    Attributes:
        actions: numbers and names of the actions that were measured.
        precisions: average precision of each, float64; nan where there is none in the truth.
        positives: boxes of each in the truth.
        key_frames: of the truth.
        boxes: rows of detections, of a box and an action each, less those left out.
        left_out: rows whose box has no width or height, that are on excluded key frames, or of no action to measure.
    """

    actions: dict[int, str]
    precisions: NDArray[np.float64]
    positives: NDArray[np.int64]
    key_frames: int
    boxes: int
    left_out: int

    @property
    def mean(self) -> float:
        """Over the actions that there are in the truth; nan if there is none."""
        return mean_over_classes(self.precisions)


def score_detections(
    truth: BoxTable, found: BoxTable, actions: LabelMap, excluded: Collection[KeyFrame] = ()
) -> DetectionScores:
    """Average precision of each action over all key frames, where boxes overlap by half.

    Args:
        truth, found: boxes; what has no action of the label map does not count.
        actions: those to measure.
        excluded: key frames that do not count.
    """
    numbers = {frame: number for number, frame in enumerate(dict.fromkeys((*found.key_frames, *truth.key_frames)))}
    kept = np.array([frame not in excluded for frame in numbers], bool)
    real, _ = _counted(truth, numbers, kept)
    detected, places = _counted(found, numbers, kept)
    labels = np.array(list(actions))
    sides = detected.boxes[:, 2:] - detected.boxes[:, :2]
    valid = int(((sides > 0).all(axis=1) & np.isin(detected.labels, labels)).sum())
    return DetectionScores(
        dict(actions),
        detection_average_precisions(real, detected, found.scores[places], labels, iou=IOU),
        np.array([(real.labels == label).sum() for label in labels]),
        len(np.unique(real.frames)),
        valid,
        len(found) - valid + found.other_actions,
    )


def _counted(
    table: BoxTable, numbers: Mapping[KeyFrame, int], kept: NDArray[np.bool_]
) -> tuple[LabeledBoxes, NDArray[np.int64]]:
    """The rows that count, with common numbers of key frames, and their places."""
    frames = np.array([numbers[frame] for frame in table.key_frames], np.int64)[table.frames]
    places = np.flatnonzero(kept[frames] & (table.actions > 0)) if len(table) else np.zeros(0, np.int64)
    return LabeledBoxes(frames[places], table.boxes[places], table.actions[places]), places


def evaluate_files(
    detections: str | Path,
    groundtruth: str | Path,
    label_map: str | Path | None,
    exclusions: str | Path | None = None,
) -> tuple[dict[str, Any], DetectionScores]:
    """Measures a file of detections.

    Args:
        detections, groundtruth: see `x3d_tf.data.datasets.ava.read_boxes`.
        label_map: the actions to measure; the 60 that AVA's evaluation takes unless given.
        exclusions: key frames that do not count.

    Returns:
        What was measured, for results.json, and the scores.

    Raises:
        UserError: a file that cannot be read, or what is wrong with one of its lines.
    """
    actions = evaluated_actions() if label_map is None else read_label_map(label_map)
    truth = read_boxes(groundtruth, "ground truth", actions)
    found = read_boxes(detections, "detections", actions)
    excluded = read_exclusions(exclusions) if exclusions else set()
    shared = set(truth.key_frames) - excluded
    require(bool(shared), str(groundtruth), "have boxes of these actions on key frames that are not excluded", "none")
    named = "; ".join(f"{frame.video} at {frame.second}" for frame in found.key_frames[:3])
    common = not len(found) or bool(shared & set(found.key_frames))
    require(common, str(detections), f"have key frames of {groundtruth}", named)
    videos = {frame.video for frame in (*truth.key_frames, *found.key_frames)}
    matched = not exclusions or any(frame.video in videos for frame in excluded)
    require(matched, str(exclusions), f"have key frames of the videos of {groundtruth}", f"{len(excluded)} of others")
    settings = {
        "detections": str(detections),
        "groundtruth": str(groundtruth),
        "label_map": str(label_map or "AVA's 60 actions"),
        "exclusions": str(exclusions) if exclusions else None,
    }
    return settings, score_detections(truth, found, actions, excluded)


def write_detection_report(
    folder: Path, settings: Mapping[str, Any], scores: DetectionScores, found: BoxTable | None = None
) -> Report:
    """Writes results.json, per_class.csv and per_class.png; a folder that has results.json has the rest of it.

    Args:
        folder: made if absent; a report that is there is replaced.
        settings: what was measured and how, for results.json.
        scores: what came out.
        found: the detections, to be written beside it.
    """
    results = {
        **settings,
        "map": scores.mean,
        "iou": IOU,
        "classes": len(scores.actions),
        "classes_with_positives": int((scores.positives > 0).sum()),
        "key_frames": scores.key_frames,
        "boxes": scores.boxes,
        "boxes_left_out": scores.left_out,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_NAME).unlink(missing_ok=True)  # until the rest is of this test
    if found is not None:
        write_detections(folder / "detections.csv", found)
    write_csv(folder / "per_class.csv", _rows(scores))
    names = list(scores.actions.values())
    title = f"frame mAP at IoU {IOU:g}: {scores.mean:.1%}"
    plots.save_precisions(scores.precisions, scores.positives, names, folder / "per_class.png", title)
    write_json(folder / RESULTS_NAME, results)
    return Report(folder, results)


def _rows(scores: DetectionScores) -> Iterable[Sequence[Any]]:
    yield ["action_id", "action", "positives", "average_precision"]
    for (number, name), held, precision in zip(scores.actions.items(), scores.positives, scores.precisions):
        yield [number, name, held, "" if math.isnan(precision) else csv_files.number(precision, ".6g")]


def summary(scores: DetectionScores, worst_and_best: int = 3) -> list[str]:
    """Lines for people."""
    present = int((scores.positives > 0).sum())
    lines = [
        f"frame mAP at IoU {IOU:g}: {scores.mean:.4%} over {counted(present, 'action')} on "
        f"{counted(scores.key_frames, 'key frame')}, {counted(scores.boxes, 'detection')}"
    ]
    if scores.left_out:
        why = "without width or height, excluded, or of other actions"
        lines.append(f"not counted: {counted(scores.left_out, 'detection')}, {why}")
    if missing := len(scores.actions) - present:
        lines.append(f"not counted: {counted(missing, 'action')} of the label map, absent from the ground truth")
    ranked = [place for place in np.argsort(-scores.precisions, kind="stable") if scores.positives[place]]
    if len(ranked) > 2 * worst_and_best:
        ranked = ranked[:worst_and_best] + ranked[-worst_and_best:]
    names = list(scores.actions.values())
    return [*lines, *(f"  {scores.precisions[place]:7.2%}  {names[place]}" for place in ranked)]
