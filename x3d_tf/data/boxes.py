"""Boxes that move with the pixels of a clip, in a tf.data graph or eagerly.

Boxes are [n, 4], float32: x1, y1, x2, y2, in pixels from the frame's left upper corner unless said otherwise. The last
pixel of a frame W wide is W - 1, as PySlowFast counts (`datasets.cv2_transform`).
"""

from typing import NamedTuple

import tensorflow as tf

from x3d_tf.data.records.format import ParsedAnnotation


class Samples(NamedTuple):
    """Boxes to train on, float32 [n, 4] in [0, 1] of the frame, and what each does, float32 [n, classes] of 0 and 1."""

    boxes: tf.Tensor
    labels: tf.Tensor


def to_pixels(boxes: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Boxes in [0, 1] of a frame, clipped to its pixels."""
    sides = tf.cast(tf.stack([width, height, width, height]), boxes.dtype)
    return tf.clip_by_value(boxes * sides, tf.zeros_like(sides), sides - 1)


def scale(boxes: tf.Tensor, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """Boxes of a frame that was scaled; `before` and `after` are its height and width, [2].

    Both axes by the ratio of the long side, which was rounded down, while the ratio of the short one is exact.
    """
    return boxes * tf.cast(tf.reduce_max(after) / tf.reduce_max(before), boxes.dtype)


def crop(boxes: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Boxes within a square of `size` pixels, clipped to it. Those outside lose their width or height."""
    corner = tf.cast(tf.stack([left, top, left, top]), boxes.dtype)
    return tf.clip_by_value(boxes - corner, 0.0, size - 1.0)


def flip(boxes: tf.Tensor, width: int) -> tf.Tensor:
    """Boxes of a frame whose left and right were swapped."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    return tf.stack([width - 1 - x2, y1, width - 1 - x1, y2], axis=-1)


def is_nonempty(boxes: tf.Tensor) -> tf.Tensor:
    """Which boxes [..., 4] have a width and a height, bool [...]."""
    return tf.reduce_all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def pairwise_iou(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Intersection over union of each of the boxes [n, 4] with each of [m, 4]: [n, m]."""
    low, high = tf.maximum(a[:, None, :2], b[None, :, :2]), tf.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = tf.reduce_prod(tf.maximum(high - low, 0), axis=-1)
    areas = [tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b)]
    return tf.math.divide_no_nan(shared, areas[0][:, None] + areas[1][None] - shared)


def ground_truth_samples(parsed: ParsedAnnotation, classes: int) -> Samples:
    """The boxes of a key frame, each once, with all that it does."""
    boxes, places = tf.raw_ops.UniqueV2(x=parsed.boxes, axis=[0])
    hot = tf.one_hot(parsed.labels, classes)  # nothing of a box without a class
    labels = tf.math.unsorted_segment_max(hot, places, tf.shape(boxes)[0])
    return Samples(tf.reshape(boxes, [-1, 4]), labels)


def add_matched_proposals(known: Samples, proposals: tf.Tensor, iou: float, *, negatives: bool) -> Samples:
    """Annotated boxes, and after them those found that overlap one by more than `iou`, with the labels of the best.

    Args:
        known: annotated boxes.
        proposals: boxes found, in [0, 1] of the frame, [m, 4].
        iou: intersection over union.
        negatives: whether the other ones stay, too, as boxes that do nothing.
    """
    each = pairwise_iou(proposals, known.boxes)  # [m, n]
    match = tf.reduce_max(each, axis=1) > iou  # of no boxes the highest overlap is below any
    each = tf.pad(each, [[0, 0], [0, 1]], constant_values=-1.0)  # so that there is a best one
    labels = tf.gather(tf.pad(known.labels, [[0, 1], [0, 0]]), tf.argmax(each, axis=1))
    labels = tf.where(match[:, None], labels, 0.0)
    if not negatives:
        proposals, labels = proposals[match], labels[match]
    return Samples(tf.concat([known.boxes, proposals], 0), tf.concat([known.labels, labels], 0))
