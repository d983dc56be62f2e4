"""Frame-level average precision of action detection by AVA's protocol (paper, section 5), in NumPy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LabeledBoxes:
    """Boxes with one class each, as columns of equal length. A box with several classes has several rows.

    Attributes:
        frames: number of each box's key frame, integers [n].
        boxes: x1, y1, x2, y2 in any unit, floating point [n, 4].
        labels: class number of each box, integers [n].
    """

    frames: NDArray[np.integer]
    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.frames)


def detection_average_precisions(
    truth: LabeledBoxes,
    found: LabeledBoxes,
    scores: NDArray[np.floating],
    classes: NDArray[np.integer],
    *,
    iou: float = 0.5,
) -> NDArray[np.float64]:
    """Computes the average precision of each class over all frames, as AVA's evaluation does.

    Each detection is matched to the annotated box of its frame and class with the highest IoU. It is correct if that
    IoU is at least `iou` and no earlier detection, in the given order (not in that of the scores), matched the same
    box. The detections of a class are then ranked by score; of equal scores, later ones come first. The result is the
    area under the precision-recall curve with interpolated precision (PASCAL VOC since 2010). Detections without width
    or height are ignored.

    Args:
        truth: annotated boxes. Their frames are numbered like those of `found`.
        found: detected boxes.
        scores: score of each detected box, [n], finite.
        classes: class numbers, [c].
        iou: minimum intersection over union of a match.

    Returns:
        [c] in [0, 1]; 0 for classes whose annotated boxes all remain undetected, NaN for classes without any.
    """
    valid = (found.boxes[:, 0] < found.boxes[:, 2]) & (found.boxes[:, 1] < found.boxes[:, 3])
    results = np.full(len(classes), np.nan)
    for index, label in enumerate(classes):
        annotated = np.flatnonzero(truth.labels == label)
        if not len(annotated):
            continue
        detected = np.flatnonzero((found.labels == label) & valid)
        detected = detected[np.argsort(found.frames[detected], kind="stable")]
        correct = _first_matches(
            truth.frames[annotated],
            truth.boxes[annotated].astype(np.float64),
            found.frames[detected],
            found.boxes[detected].astype(np.float64),
            iou,
        )
        ranking = np.argsort(scores[detected], kind="stable")[::-1]
        results[index] = _area_under_curve(correct[ranking], len(annotated))
    return results


def mean_over_classes(precisions: NDArray[np.float64]) -> float:
    """Returns the mean over the classes with annotated boxes, those that are not NaN; NaN if there are none."""
    measured = precisions[~np.isnan(precisions)]
    return float(measured.mean()) if len(measured) else float("nan")


def intersection_over_union(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Computes the IoU of boxes x1, y1, x2, y2: [..., 4] and [..., 4] -> [...] in [0, 1]; 0 if neither has an area."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.prod(np.maximum(sides, 0), axis=-1)
    union = _areas(a) + _areas(b) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


def _first_matches(
    truth_frames: NDArray[np.integer],
    truth_boxes: NDArray[np.float64],
    frames: NDArray[np.integer],
    boxes: NDArray[np.float64],
    iou: float,
) -> NDArray[np.bool_]:
    """Returns a mask of the detections of a class that are the first to match their box; `frames` are ascending."""
    correct = np.zeros(len(frames), bool)
    order = np.argsort(truth_frames, kind="stable")
    first, end = (np.searchsorted(truth_frames[order], frames, side) for side in ("left", "right"))
    best, best_iou = np.full(len(frames), -1), np.zeros(len(frames))
    pending = np.flatnonzero(first < end)
    offset = 0
    while len(pending):  # one iteration per annotated box of the class in the most crowded frame
        candidates = order[first[pending] + offset]
        overlap = intersection_over_union(boxes[pending], truth_boxes[candidates])
        better = overlap > best_iou[pending]
        best[pending[better]], best_iou[pending[better]] = candidates[better], overlap[better]
        offset += 1
        pending = pending[first[pending] + offset < end[pending]]
    matched = np.flatnonzero((best >= 0) & (best_iou >= iou))
    _, earliest = np.unique(best[matched], return_index=True)
    correct[matched[earliest]] = True
    return correct


def _area_under_curve(correct: NDArray[np.bool_], positives: int) -> float:
    """Computes the area under the precision-recall curve; `correct` is in order of descending score."""
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(interpolated[correct]) / positives)
