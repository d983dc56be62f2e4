"""Metrics of classification, in numpy."""

import numpy as np


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the samples whose class is among the `k` highest scores.

    Of equal scores the lower class comes first. With fewer than `k` classes every sample counts.

    Args:
        scores: (samples, classes), finite.
        labels: (samples,), integers.
        k: at least 1.

    Returns:
        In [0, 1]; nan for no samples.
    """
    if not len(labels):
        return float("nan")
    own = scores[np.arange(len(labels)), labels][:, None]
    before = (scores > own).sum(axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    return float(np.mean(before + ((scores == own) & earlier).sum(axis=1) < k))


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was taken for each: (true class, predicted class), int64."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts
