"""Classification metrics in NumPy."""

import math

import numpy as np

from x3d_tf.types import Metric

TOP1 = Metric("top1", "share", label="top-1")
TOP5 = Metric("top5", "share", label="top-5")
MAP = Metric("map", "share", label="mAP")


def classification_metrics(classes: int, *, exclusive: bool) -> tuple[Metric, ...]:
    """Returns the metrics of a classifier: top1 and top5 for exclusive classes, otherwise map.

    Top5 is left out for five classes or fewer, because it is always 1.
    """
    if not exclusive:
        return (MAP,)
    return (TOP1, TOP5) if classes > 5 else (TOP1,)


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns True for each sample whose class is among the `k` highest scores; bool (samples,).

    Of equal scores, the lower class ranks first. With `k` classes or fewer, all samples are hits.

    Args:
        scores: (samples, classes), finite.
        labels: (samples,), integers.
        k: at least 1.
    """
    label_scores = scores[np.arange(len(labels)), labels][:, None]
    higher = (scores > label_scores).sum(axis=1)
    lower_class = np.arange(scores.shape[1])[None] < labels[:, None]
    return higher + ((scores == label_scores) & lower_class).sum(axis=1) < k


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of samples that are top-k hits, in [0, 1]; NaN without samples."""
    return float(np.mean(top_k_hits(scores, labels, k))) if len(labels) else float("nan")


def wilson_interval(share: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion (Wilson, 1927).

    Args:
        share: measured proportion, in [0, 1].
        samples: number of independent samples, at least 1.
        z: quantile of the normal distribution; the default gives the 95 % interval.

    Returns:
        The lower and upper bound, in [0, 1].
    """
    centre = share + z * z / (2 * samples)
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    low, high = ((centre + sign * half) / (1 + z * z / samples) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts pairs of true and predicted class; int64 (true class, predicted class)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Computes the area under the precision-recall curve as Σ (R_n - R_(n-1)) P_n, without interpolation.

    Samples with equal scores form one step, as in scikit-learn's `average_precision_score`.

    Args:
        scores: (samples,), finite.
        truth: (samples,), bool or 0 and 1.

    Returns:
        A value in (0, 1]; NaN without positive samples, because recall is undefined.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # last index of each score
    found = np.cumsum(truth[order].astype(np.float64))[ends] if len(order) else np.zeros(1)
    if not found[-1]:
        return float("nan")
    precision = found / (ends + 1)
    return float(np.sum(np.diff(found, prepend=0.0) * precision) / found[-1])


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Computes the average precision of each class: (samples, classes) -> float64 (classes,); NaN without positives."""
    return np.array([average_precision(scores[:, number], truth[:, number]) for number in range(scores.shape[1])])


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Computes the mean average precision over the classes that have positives; NaN if none has.

    Args:
        scores: (samples, classes), finite.
        truth: (samples, classes), bool or 0 and 1.
    """
    precisions = average_precisions(scores, truth)
    defined = precisions[~np.isnan(precisions)]
    return float(defined.mean()) if len(defined) else float("nan")
