"""Frame-level average precision of action detection, as AVA measures it (paper, section 5), in numpy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LabeledBoxes:
    """Boxes with a class each, as columns of one length. A box of several classes stands there as often.

    Attributes:
        frames: number of the key frame that a box is on, integers [n].
        boxes: x1, y1, x2, y2 in any unit, floating point [n, 4].
        labels: number of the class, integers [n].
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
    """Average precision of each class over all frames.

    In the order in which they are given, not in that of their scores, detections take the box of their frame and class
    that they overlap most: they are right where they overlap it by `iou` or more, unless an earlier one has it. Then
    all of a class are ranked by score, later ones first among equals, and the area under the curve of precision over
    recall is taken, precision being the highest at that recall or a larger one (PASCAL VOC since 2010; AVA's evaluation
    does the same). Boxes that are found without width or height do not count.

    Args:
        truth: what there is; its frames are numbered as those of `found`.
        found: what was detected.
        scores: of each box found, [n], finite.
        classes: numbers of the classes, [c].
        iou: intersection over union of two boxes that match.

    Returns:
        [c], in [0, 1]; 0 where a class has boxes of which none is found, nan where it has no boxes.
    """
    valid = (found.boxes[:, 0] < found.boxes[:, 2]) & (found.boxes[:, 1] < found.boxes[:, 3])
    results = np.full(len(classes), np.nan)
    for place, label in enumerate(classes):
        real = np.flatnonzero(truth.labels == label)
        if not len(real):
            continue
        own = np.flatnonzero((found.labels == label) & valid)
        own = own[np.argsort(found.frames[own], kind="stable")]
        right = _first_matches(
            truth.frames[real],
            truth.boxes[real].astype(np.float64),
            found.frames[own],
            found.boxes[own].astype(np.float64),
            iou,
        )
        ranks = np.argsort(scores[own], kind="stable")[::-1]
        results[place] = _area_under_curve(right[ranks], len(real))
    return results


def mean_over_classes(precisions: NDArray[np.float64]) -> float:
    """Mean of the classes that have boxes; nan if none has."""
    measured = precisions[~np.isnan(precisions)]
    return float(measured.mean()) if len(measured) else float("nan")


def intersection_over_union(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of boxes x1, y1, x2, y2: [..., 4] and [..., 4] -> [...] in [0, 1]; 0 where neither has an area."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    union = _areas(a) + _areas(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


def _first_matches(
    truth_frames: NDArray[np.integer],
    truth_boxes: NDArray[np.float64],
    frames: NDArray[np.integer],
    boxes: NDArray[np.float64],
    iou: float,
) -> NDArray[np.bool_]:
    """Which detections of a class are the first on the box that they overlap most; in order of frames."""
    right = np.zeros(len(frames), bool)
    order = np.argsort(truth_frames, kind="stable")
    first, end = (np.searchsorted(truth_frames[order], frames, side) for side in ("left", "right"))
    best, best_iou = np.full(len(frames), -1), np.zeros(len(frames))
    pending = np.flatnonzero(first < end)
    offset = 0
    while len(pending):  # as often as the fullest frame has boxes of the class
        candidates = order[first[pending] + offset]
        overlap = intersection_over_union(boxes[pending], truth_boxes[candidates])
        better = overlap > best_iou[pending]
        best[pending[better]], best_iou[pending[better]] = candidates[better], overlap[better]
        offset += 1
        pending = pending[first[pending] + offset < end[pending]]
    matched = np.flatnonzero((best >= 0) & (best_iou >= iou))
    _, earliest = np.unique(best[matched], return_index=True)
    right[matched[earliest]] = True
    return right


def _area_under_curve(right: NDArray[np.bool_], positives: int) -> float:
    """Area under precision over recall, given which detections are right from the highest score down."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(highest_from_here[right]) / positives)
