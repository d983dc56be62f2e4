"""Boxes that move with the pixels, and proposals near them as samples."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from x3d_tf.data import boxes as box_ops
from x3d_tf.data.records.format import ParsedAnnotation


def naive_boxes(
    box: list[float], width: int, height: int, short: int, top: int, left: int, size: int, flip: bool
) -> Any:
    """Implements PySlowFast's rule box by box."""
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    x1, x2 = (min(max(x, 0), width - 1) for x in (x1, x2))
    y1, y2 = (min(max(y, 0), height - 1) for y in (y1, y2))
    long = max(width, height) * short // min(width, height)
    ratio = long / max(width, height)
    x1, x2, y1, y2 = x1 * ratio - left, x2 * ratio - left, y1 * ratio - top, y2 * ratio - top
    if flip:
        x1, x2 = size - x2 - 1, size - x1 - 1
    return [min(max(value, 0), size - 1) for value in (x1, y1, x2, y2)]


@pytest.mark.parametrize("graph", [False, True])
def test_boxes_move_with_the_pixels(graph: bool) -> None:
    draw = np.random.default_rng(0)
    given = np.sort(draw.uniform(-0.1, 1.1, (20, 2, 2)), axis=1).reshape(20, 4).astype("float32")

    def moved() -> Any:
        before, after = tf.constant([48, 66]), tf.constant([36, 49])
        boxes = box_ops.scale_boxes(box_ops.to_pixels(tf.constant(given), 48, 66), before, after)
        return box_ops.flip_boxes(box_ops.crop_boxes(boxes, tf.constant(3), tf.constant(10), 32), 32)

    found = (tf.function(moved) if graph else moved)()
    expected = [naive_boxes(list(box), 66, 48, 36, 3, 10, 32, True) for box in given]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_proposals_near_a_box_are_samples_of_it() -> None:
    known = ParsedAnnotation(
        tf.constant(0),
        tf.constant([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]]),
        tf.constant([1, 0, 2], tf.int64),
        tf.constant([[0.0, 0.0, 0.5, 0.49], [0.0, 0.0, 0.5, 0.4], [0.51, 0.5, 1.0, 1.0]]),
        tf.constant([0.9, 0.9, 0.9]),
    )
    boxes = box_ops.ground_truth_samples(known, 3)
    np.testing.assert_array_equal(boxes.boxes, [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    np.testing.assert_array_equal(boxes.labels, [[0, 1, 1], [1, 0, 0]])
    matched = box_ops.add_matched_proposals(boxes, known.proposals, 0.9, negatives=False)
    np.testing.assert_array_equal(matched.labels, [[0, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(matched.boxes[2:], tf.gather(known.proposals, [0, 2]))
    every = box_ops.add_matched_proposals(boxes, known.proposals, 0.9, negatives=True)
    np.testing.assert_array_equal(every.labels[2:], [[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    none = box_ops.Samples(tf.zeros((0, 4)), tf.zeros((0, 3)))
    assert box_ops.add_matched_proposals(none, known.proposals, 0.9, negatives=False).boxes.shape == (0, 4)
    assert (
        box_ops.add_matched_proposals(none, known.proposals, 0.9, negatives=True).labels.numpy().tolist()
        == [[0] * 3] * 3
    )
