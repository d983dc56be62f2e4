"""Average precision of detection compared with a naive version of AVA's rule and with the published evaluators."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf.data.ava_files import BoxTable, read_boxes, read_label_map
from x3d_tf.evaluation.detection_metrics import (
    LabeledBoxes,
    detection_average_precisions,
    intersection_over_union,
    mean_over_classes,
)

ROOT = Path(__file__).parents[1]
ORACLE = ROOT.parent / "shared" / "data" / "ava_eval"


def naive(truth: list[Any], found: list[Any], label: int, threshold: float = 0.5) -> float:
    """Computes the average precision in loops over frames and detections; rows are (frame, box, label[, score])."""
    scores, right = [], []
    for frame in dict.fromkeys(row[0] for row in found):
        real = [box for box_frame, box, number in truth if box_frame == frame and number == label]
        taken = [False] * len(real)
        for box_frame, box, number, score in found:
            if box_frame != frame or number != label or not (box[0] < box[2] and box[1] < box[3]):
                continue
            overlaps = [overlap(box, other) for other in real]
            best = int(np.argmax(overlaps)) if real else -1
            hit = bool(real) and overlaps[best] >= threshold and not taken[best]
            if hit:
                taken[best] = True
            scores.append(score)
            right.append(hit)
    positives = sum(number == label for _, _, number in truth)
    if not positives:
        return float("nan")
    ranks = np.argsort(scores, kind="stable")[::-1]
    hits = np.cumsum(np.array(right)[ranks]) if scores else np.zeros(0)
    recall = np.concatenate([[0], hits / positives, [1]])
    precision = np.concatenate([[0], hits / np.arange(1, len(hits) + 1), [0]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    return float(sum((recall[n] - recall[n - 1]) * precision[n] for n in range(1, len(recall))))


def overlap(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def columns(rows: list[Any]) -> LabeledBoxes:
    boxes = np.array([row[1] for row in rows], float).reshape(-1, 4)
    return LabeledBoxes(np.array([row[0] for row in rows], int), boxes, np.array([row[2] for row in rows], int))


def precisions(truth: list[Any], found: list[Any], classes: list[int]) -> np.ndarray:
    scores = np.array([row[3] for row in found], float)
    return detection_average_precisions(columns(truth), columns(found), scores, np.array(classes))


BOX, ELSEWHERE, THIRD = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9), (0.0, 0.7, 0.2, 0.9)


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([(0, BOX, 1)], [(0, BOX, 1, 0.3)], 1.0),
        ([(0, BOX, 1)], [(0, BOX, 1, 0.9), (0, BOX, 1, 0.8)], 1.0),  # the second is wrong and ranks lower
        ([(0, BOX, 1)], [(0, BOX, 1, 0.3), (0, BOX, 1, 0.9)], 0.5),  # the first in order matches, whatever its score
        ([(0, BOX, 1)], [(1, BOX, 1, 0.9), (0, BOX, 1, 0.8)], 0.5),  # on a frame without annotated boxes
        (
            [(0, BOX, 1), (0, ELSEWHERE, 1)],
            [(0, BOX, 1, 0.9), (0, THIRD, 1, 0.8), (0, ELSEWHERE, 1, 0.7)],
            0.5 * 1 + 0.5 * 2 / 3,
        ),
        ([(0, BOX, 1)], [], 0.0),
        ([(0, BOX, 1)], [(0, (0.5, 0.1, 0.5, 0.5), 1, 0.9), (0, BOX, 1, 0.8)], 1.0),  # boxes without width are ignored
        ([(0, BOX, 1)], [(0, BOX, 2, 0.9)], 0.0),
    ],
)
def test_small_cases(truth: list[Any], found: list[Any], expected: float) -> None:
    assert precisions(truth, found, [1])[0] == pytest.approx(expected, abs=1e-15)
    assert naive(truth, found, 1) == pytest.approx(expected, abs=1e-15)


def test_classes_without_boxes_are_ignored() -> None:
    values = precisions([(0, BOX, 1), (0, ELSEWHERE, 2)], [(0, BOX, 1, 0.5), (0, BOX, 3, 0.9)], [1, 2, 3])
    np.testing.assert_array_equal(values, [1.0, 0.0, np.nan])
    assert mean_over_classes(values) == 0.5
    assert np.isnan(mean_over_classes(values[2:]))


def test_a_naive_evaluator_gives_the_same() -> None:
    draw = np.random.default_rng(0)

    def box() -> Any:
        corner = draw.uniform(0, 0.5, 2)
        return (*corner, *(corner + draw.uniform(0.0, 0.5, 2)))

    truth = [(int(draw.integers(12)), box(), int(draw.integers(1, 4))) for _ in range(60)]
    found: list[Any] = []
    for _ in range(300):  # half of them near an annotated box; frames in any order, scores with ties
        frame, near, label = truth[draw.integers(len(truth))]
        chosen = tuple(np.array(near) + draw.normal(0, 0.03, 4)) if draw.random() < 0.7 else box()
        found.append((frame if draw.random() < 0.9 else 99, chosen, label, round(draw.random(), 1)))
    expected = [naive(truth, sorted(found, key=lambda row: row[0]), label) for label in (1, 2, 3)]
    assert min(expected) > 0.05
    np.testing.assert_allclose(precisions(truth, found, [1, 2, 3]), expected, rtol=0, atol=1e-12)


def test_intersection_over_union() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.uniform(0, 1, (2, 50, 4))
    for boxes in (a, b):
        boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(intersection_over_union(a, b), [overlap(x, y) for x, y in zip(a, b)], atol=1e-12)
    assert intersection_over_union(np.zeros(4), np.zeros(4)) == 0


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the published evaluators' example is not installed")
def test_the_published_evaluators_give_the_same() -> None:
    actions = read_label_map(ORACLE / "action_list.txt")
    truth = read_boxes(ORACLE / "gt.csv", "ground truth", actions)
    found = read_boxes(ORACLE / "pred.csv", "detections", actions)
    frames = {frame: number for number, frame in enumerate(found.key_frames)}

    def table(rows: BoxTable) -> LabeledBoxes:
        numbers = np.array([frames[frame] for frame in rows.key_frames])
        return LabeledBoxes(numbers[rows.frames], rows.boxes, rows.actions)

    each = detection_average_precisions(table(truth), table(found), found.scores, np.array(list(actions)))
    np.testing.assert_allclose(each, [0.17045454545, 0.0, 0.11111111], atol=1e-8)
    assert mean_over_classes(each) == pytest.approx(0.09385521885521886, abs=1e-12)


@pytest.mark.slow
def test_millions_of_detections_fit_into_little_memory() -> None:
    """57,000 key frames with 5 boxes of 60 actions each, in a process that prints its time and peak memory."""
    done = subprocess.run([sys.executable, "-c", MILLIONS], capture_output=True, text=True, check=True)
    mean, _, kilobytes = map(float, done.stdout.split())
    assert 0 < mean < 1 and kilobytes < 4e6


MILLIONS = """
import resource, time
import numpy as np
from x3d_tf.evaluation.detection_metrics import LabeledBoxes, detection_average_precisions, mean_over_classes
draw, frames, boxes, actions = np.random.default_rng(0), 57_000, 5, 60
corners = draw.uniform(0, 0.5, (frames * boxes, 2))
found = np.concatenate([corners, corners + draw.uniform(0.1, 0.5, corners.shape)], axis=1)
real = np.repeat(found + draw.normal(0, 0.02, found.shape), 2, axis=0)
numbers = np.repeat(np.arange(frames, dtype=np.int32), boxes)
truth = LabeledBoxes(np.repeat(numbers, 2), real, draw.integers(1, actions + 1, len(real)))
rows = LabeledBoxes(
    np.repeat(numbers, actions),
    np.repeat(found, actions, axis=0),
    np.tile(np.arange(1, actions + 1, dtype=np.int16), len(found)),
)
scores = draw.random(len(rows), dtype=np.float32)
start = time.perf_counter()
each = detection_average_precisions(truth, rows, scores, np.arange(1, actions + 1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(mean_over_classes(each), time.perf_counter() - start, peak)
"""
