"""Losses of logits, with the metrics of a training step."""

from typing import Any

import numpy as np
import tensorflow as tf

from x3d_tf.data.boxes import is_nonempty
from x3d_tf.types import Metric

TOP1 = Metric("top1", "share")
BOX_TOP1 = Metric("box_top1", "share")
BOXES_LEFT_OUT = Metric("boxes_left_out", "count", "boxes outside the training crops, which are ignored")


class SoftmaxLoss:
    """Softmax cross-entropy. Its top1 is the share of clips whose top-scoring class is the label.

    Args:
        batch: number of clips per step, over all devices.
        class_weights: loss factor of each class, float32 [classes].
    """

    metrics = (TOP1,)

    def __init__(self, batch: int, class_weights: np.ndarray | None = None) -> None:
        self._batch = batch
        self._class_weights = None if class_weights is None else tf.constant(class_weights, tf.float32)

    def __call__(self, logits: Any, targets: Any, inputs: Any) -> dict[str, Any]:
        """Computes the loss of logits (clips, classes) for labels int32 (clips,)."""
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        if self._class_weights is not None:
            losses *= tf.gather(self._class_weights, targets)
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), targets)
        top1 = tf.reduce_sum(tf.cast(correct, tf.float32)) / self._batch
        return {"loss": tf.reduce_sum(losses) / self._batch, "top1": top1}


class SigmoidLoss:
    """Sigmoid cross-entropy, averaged over classes. Its top1 is the share of clips whose top class is among the labels.

    Args:
        batch: number of clips per step, over all devices.
    """

    metrics = (TOP1,)

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def __call__(self, logits: Any, targets: Any, inputs: Any) -> dict[str, Any]:
        """Computes the loss of logits (clips, classes) for float32 zeros and ones of the same shape."""
        losses = tf.reduce_mean(_sigmoid_cross_entropy(logits, targets), axis=1)
        top1 = tf.reduce_sum(_top_class_is_right(logits, targets)) / self._batch
        return {"loss": tf.reduce_sum(losses) / self._batch, "top1": top1}


class BoxLoss:
    """Sigmoid cross-entropy averaged over boxes and classes, without padding (PySlowFast's loss for AVA).

    Its box_top1 is the share of boxes whose top-scoring class is among their labels.

    Args:
        micro_batches: number of micro-batches per step. All have equal weight, whatever their number of boxes.
    """

    metrics = (BOX_TOP1, BOXES_LEFT_OUT)

    def __init__(self, micro_batches: int = 1) -> None:
        self._micro_batches = micro_batches

    def __call__(self, logits: Any, targets: Any, inputs: Any) -> dict[str, Any]:
        """Computes the loss of logits (clips, boxes, classes) for float32 zeros and ones of the same shape.

        `inputs` has the entry `boxes`, (clips, boxes, 4). Boxes without width or height are ignored: padding, which is
        all zeros, and boxes outside the crop.
        """
        visible = is_nonempty(inputs["boxes"])  # (clips, boxes)
        left_out = tf.math.count_nonzero(tf.reduce_any(inputs["boxes"] != 0, axis=-1) & ~visible, dtype=tf.float32)
        mask = tf.cast(visible, logits.dtype)
        context = tf.distribute.get_replica_context()
        count = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(mask)) * self._micro_batches
        weights = mask / tf.maximum(count, 1)  # a micro-batch may contain no visible box
        losses = tf.reduce_mean(_sigmoid_cross_entropy(logits, targets), axis=2)
        correct = _top_class_is_right(logits, targets)
        return {
            "loss": tf.reduce_sum(losses * weights),
            "box_top1": tf.reduce_sum(correct * tf.cast(weights, correct.dtype)),
            "boxes_left_out": left_out,
        }


def _sigmoid_cross_entropy(logits: Any, labels: Any) -> Any:
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(labels, logits.dtype), logits)


def _top_class_is_right(logits: Any, labels: Any) -> Any:
    """Returns 1 where the top-scoring class is among the labels, else 0; reduces the last axis."""
    best = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.gather(labels, best, axis=-1, batch_dims=len(logits.shape) - 1)
