"""Losses and training metrics."""

from typing import Any

import numpy as np
import tensorflow as tf

from x3d_tf.data.boxes import is_nonempty
from x3d_tf.types import Task


class Loss:
    """Loss and metrics of a micro-batch on one device. Their sums over devices and micro-batches are those of the step.

    The loss is the softmax cross-entropy for single-label tasks, and the sigmoid cross-entropy averaged over classes
    for multi-label tasks. For detection it is the sigmoid cross-entropy averaged over boxes and classes, without
    padding (PySlowFast's loss for AVA).

    Args:
        task: the task of the network.
        batch: number of clips per step, over all devices.
        micro_batches: number of micro-batches per step. For detection all have equal weight, whatever their boxes.
        class_weights: loss factor of each class, float32 [classes], for single-label tasks only.

    Attributes:
        metric_names: names of the returned values, the loss first.
    """

    def __init__(self, task: Task, batch: int, micro_batches: int = 1, class_weights: np.ndarray | None = None) -> None:
        self._compute = {
            "single_label": self._single_label,
            "multi_label": self._multi_label,
            "detection": self._detection,
        }[task]
        self._batch, self._micro_batches = batch, micro_batches
        self._class_weights = None if class_weights is None else tf.constant(class_weights, tf.float32)
        self.metric_names = ("loss", "accuracy") + (("boxes_left_out",) if task == "detection" else ())

    def __call__(self, logits: Any, labels: Any, inputs: Any) -> tuple[Any, ...]:
        """Returns one scalar for each of `metric_names`.

        Args:
            logits: (clips, classes), or (clips, boxes, classes) for a detector.
            labels: int32 (clips,) for single-label tasks, else float32 zeros and ones in the shape of the logits.
            inputs: the input of the network. For a detector, a dict with `boxes`, (clips, boxes, 4). Boxes without
                width or height are ignored: padding, which is all zeros, and boxes outside the crop.
        """
        return self._compute(logits, labels, inputs)

    def _single_label(self, logits: Any, labels: Any, inputs: Any) -> tuple[Any, Any]:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        if self._class_weights is not None:
            losses *= tf.gather(self._class_weights, labels)
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
        return tf.reduce_sum(losses) / self._batch, tf.reduce_sum(tf.cast(correct, tf.float32)) / self._batch

    def _multi_label(self, logits: Any, labels: Any, inputs: Any) -> tuple[Any, Any]:
        losses = tf.reduce_mean(_sigmoid_cross_entropy(logits, labels), axis=1)
        return tf.reduce_sum(losses) / self._batch, tf.reduce_sum(_top1_correct(logits, labels)) / self._batch

    def _detection(self, logits: Any, labels: Any, inputs: Any) -> tuple[Any, Any, Any]:
        visible = is_nonempty(inputs["boxes"])  # (clips, boxes)
        left_out = tf.math.count_nonzero(tf.reduce_any(inputs["boxes"] != 0, axis=-1) & ~visible, dtype=tf.float32)
        mask = tf.cast(visible, logits.dtype)
        context = tf.distribute.get_replica_context()
        count = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(mask)) * self._micro_batches
        weights = mask / tf.maximum(count, 1)  # a micro-batch may contain no visible box
        losses = tf.reduce_mean(_sigmoid_cross_entropy(logits, labels), axis=2)
        correct = _top1_correct(logits, labels)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(correct * tf.cast(weights, correct.dtype)), left_out


def _sigmoid_cross_entropy(logits: Any, labels: Any) -> Any:
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(labels, logits.dtype), logits)


def _top1_correct(logits: Any, labels: Any) -> Any:
    """Returns 1 where the top-scoring class is among the labels, else 0; reduces the last axis."""
    best = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.gather(labels, best, axis=-1, batch_dims=len(logits.shape) - 1)
