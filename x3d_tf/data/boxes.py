"""Box transforms that match the clip transforms, in a tf.data graph or eagerly.

Boxes are float32 [n, 4]: x1, y1, x2, y2, by default in pixels from the upper left corner of the frame. The last pixel
of a frame of width W is W - 1, as in PySlowFast (`datasets.cv2_transform`).
"""

from typing import NamedTuple

import tensorflow as tf

from x3d_tf.data.records.format import ParsedAnnotation


class Samples(NamedTuple):
    """Boxes to train on, float32 [n, 4] relative to the frame in [0, 1]; labels, float32 [n, classes] of 0 and 1."""

    boxes: tf.Tensor
    labels: tf.Tensor


def to_pixels(boxes: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Converts boxes relative to a frame, in [0, 1], to pixels, clipped to the frame."""
    sides = tf.cast(tf.stack([width, height, width, height]), boxes.dtype)
    return tf.clip_by_value(boxes * sides, tf.zeros_like(sides), sides - 1)


def scale_boxes(boxes: tf.Tensor, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """Scales boxes like their frame, whose height and width were `before` and are `after`, [2].

    Both axes are scaled by the ratio of the long side, which was rounded down; only the ratio of the short side is
    exact.
    """
    return boxes * tf.cast(tf.reduce_max(after) / tf.reduce_max(before), boxes.dtype)


def crop_boxes(boxes: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Moves boxes into a square crop of `size` pixels and clips them; boxes outside get zero width or height."""
    corner = tf.cast(tf.stack([left, top, left, top]), boxes.dtype)
    return tf.clip_by_value(boxes - corner, 0.0, size - 1.0)


def flip_boxes(boxes: tf.Tensor, width: int) -> tf.Tensor:
    """Flips boxes horizontally in a frame of the given width."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    return tf.stack([width - 1 - x2, y1, width - 1 - x1, y2], axis=-1)


def is_nonempty(boxes: tf.Tensor) -> tf.Tensor:
    """Returns a mask of the boxes [..., 4] with nonzero width and height, bool [...]."""
    return tf.reduce_all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def pairwise_iou(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Returns the intersection over union of boxes [n, 4] and [m, 4] as [n, m]."""
    low, high = tf.maximum(a[:, None, :2], b[None, :, :2]), tf.minimum(a[:, None, 2:], b[None, :, 2:])
    intersections = tf.reduce_prod(tf.maximum(high - low, 0), axis=-1)
    areas = [tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b)]
    return tf.math.divide_no_nan(intersections, areas[0][:, None] + areas[1][None] - intersections)


def ground_truth_samples(parsed: ParsedAnnotation, classes: int) -> Samples:
    """Returns the distinct annotated boxes of a key frame with all their labels."""
    boxes, indices = tf.raw_ops.UniqueV2(x=parsed.boxes, axis=[0])
    one_hot = tf.one_hot(parsed.labels, classes)  # zeros for a box without classes
    labels = tf.math.unsorted_segment_max(one_hot, indices, tf.shape(boxes)[0])
    return Samples(tf.reshape(boxes, [-1, 4]), labels)


def add_matched_proposals(annotated: Samples, proposals: tf.Tensor, iou: float, *, negatives: bool) -> Samples:
    """Appends proposals whose IoU with an annotated box exceeds `iou`, with the labels of the best match.

    Args:
        annotated: annotated boxes with labels.
        proposals: detected boxes relative to the frame in [0, 1], [m, 4].
        iou: threshold of the intersection over union.
        negatives: appends the other proposals too, without labels.
    """
    ious = pairwise_iou(proposals, annotated.boxes)  # [m, n]
    match = tf.reduce_max(ious, axis=1) > iou  # the maximum is -inf without annotated boxes
    ious = tf.pad(ious, [[0, 0], [0, 1]], constant_values=-1.0)  # argmax needs at least one column
    labels = tf.gather(tf.pad(annotated.labels, [[0, 1], [0, 0]]), tf.argmax(ious, axis=1))
    labels = tf.where(match[:, None], labels, 0.0)
    if not negatives:
        proposals, labels = proposals[match], labels[match]
    return Samples(tf.concat([annotated.boxes, proposals], 0), tf.concat([annotated.labels, labels], 0))
