"""What a step minimises, and what it reports besides."""

from typing import Any

import numpy as np
import tensorflow as tf

from x3d_tf.data.boxes import is_nonempty
from x3d_tf.types import Task


class Loss:
    """What one device measures on its part of a step; all parts of all devices add up to the step's.

    Args:
        task: of the network. A clip's loss is the cross-entropy of its class (softmax), or the mean of those of all
            classes (sigmoid); that of a detector is the mean over boxes and classes (PySlowFast's loss for AVA), in
            which padding counts nothing.
        batch: clips of a step, over all devices.
        parts: that a step is computed in, one after the other. Each counts the same where boxes are counted.
        class_weights: factor of the loss of each class's clips, float32 [classes]; of single-label tasks only.

    Attributes:
        measures: the names of what is measured, the loss first.
    """

    def __init__(self, task: Task, batch: int, parts: int = 1, class_weights: np.ndarray | None = None) -> None:
        self._of = {"single_label": self._single, "multi_label": self._several, "detection": self._boxes}[task]
        self._batch, self._parts = batch, parts
        self._class_weights = None if class_weights is None else tf.constant(class_weights, tf.float32)
        self.metric_names = ("loss", "accuracy") + (("boxes_left_out",) if task == "detection" else ())

    def __call__(self, logits: Any, labels: Any, given: Any) -> tuple[Any, ...]:
        """A scalar for each of `measures`.

        Args:
            logits: (clips, classes); of a detector (clips, boxes, classes).
            labels: int32 (clips,), or float32 of 0 and 1 in the shape of the logits.
            given: what the network was given; of a detector a dict with `boxes`, (clips, boxes, 4). Those without width
                or height count nothing: padding, which is zeros, and boxes that a crop left out.
        """
        return self._of(logits, labels, given)

    def _single(self, logits: Any, labels: Any, given: Any) -> tuple[Any, Any]:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        if self._class_weights is not None:
            losses *= tf.gather(self._class_weights, labels)
        right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
        return tf.reduce_sum(losses) / self._batch, tf.reduce_sum(tf.cast(right, tf.float32)) / self._batch

    def _several(self, logits: Any, labels: Any, given: Any) -> tuple[Any, Any]:
        losses = tf.reduce_mean(_sigmoid_cross_entropies(logits, labels), axis=1)
        return tf.reduce_sum(losses) / self._batch, tf.reduce_sum(_best_is_right(logits, labels)) / self._batch

    def _boxes(self, logits: Any, labels: Any, given: Any) -> tuple[Any, Any, Any]:
        seen = is_nonempty(given["boxes"])  # (clips, boxes)
        left_out = tf.math.count_nonzero(tf.reduce_any(given["boxes"] != 0, axis=-1) & ~seen, dtype=tf.float32)
        real = tf.cast(seen, logits.dtype)
        context = tf.distribute.get_replica_context()
        count = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(real)) * self._parts
        weights = real / tf.maximum(count, 1)  # a step may show no box
        losses = tf.reduce_mean(_sigmoid_cross_entropies(logits, labels), axis=2)
        right = _best_is_right(logits, labels)
        return tf.reduce_sum(losses * weights), tf.reduce_sum(right * tf.cast(weights, right.dtype)), left_out


def _sigmoid_cross_entropies(logits: Any, labels: Any) -> Any:
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(labels, logits.dtype), logits)


def _best_is_right(logits: Any, labels: Any) -> Any:
    """1 where the class with the highest score is one of those there are, along the last axis."""
    best = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.gather(labels, best, axis=-1, batch_dims=len(logits.shape) - 1)
