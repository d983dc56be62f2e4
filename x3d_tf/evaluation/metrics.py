"""Metrics of classification, in numpy."""

import math

import numpy as np


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the class of each sample is among the `k` highest scores; bool (samples,).

    Of equal scores the lower class comes first. With fewer than `k` classes every sample counts.

    Args:
        scores: (samples, classes), finite.
        labels: (samples,), integers.
        k: at least 1.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    before = (scores > own).sum(axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    return before + ((scores == own) & earlier).sum(axis=1) < k


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the samples that `top_k_hits` counts, in [0, 1]; nan for no samples."""
    return float(np.mean(top_k_hits(scores, labels, k))) if len(labels) else float("nan")


def wilson_interval(share: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the score interval of a proportion (Wilson, 1927).

    Args:
        share: the proportion that was measured, in [0, 1].
        samples: independent ones, at least 1.
        z: quantile of the normal distribution; the default gives the 95 % interval.

    Returns:
        Lower and upper end, in [0, 1].
    """
    centre = share + z * z / (2 * samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    low, high = ((centre + sign * half) / (1 + z * z / samples) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was taken for each: (true class, predicted class), int64."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the precision-recall curve as a sum of steps, Σ (R_n - R_(n-1)) P_n, without interpolation.

    Samples of equal score are found together: one step. (As scikit-learn's `average_precision_score`.)

    Args:
        scores: (samples,), finite.
        truth: (samples,), bool or 0 and 1.

    Returns:
        In (0, 1]; nan where no sample is positive, for which there is no recall.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of the runs of equal scores
    found = np.cumsum(truth[order].astype(np.float64))[ends] if len(order) else np.zeros(1)
    if not found[-1]:
        return float("nan")
    precision = found / (ends + 1)
    return float(np.sum(np.diff(found, prepend=0.0) * precision) / found[-1])


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`average_precision` of each class, (samples, classes) -> float64 (classes,); nan where none is positive."""
    return np.array([average_precision(scores[:, number], truth[:, number]) for number in range(scores.shape[1])])


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean of `average_precision` over the classes that have positives (samples, classes); nan if none has."""
    each = average_precisions(scores, truth)
    measured = each[~np.isnan(each)]
    return float(measured.mean()) if len(measured) else float("nan")
