"""Metrics compared with naive versions, scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from x3d_tf.evaluation.metrics import (
    average_precision,
    average_precisions,
    classification_metrics,
    confusion_matrix,
    mean_average_precision,
    top_k_accuracy,
    top_k_hits,
    wilson_interval,
)


def naive_top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> list[bool]:
    return [label in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k] for row, label in zip(scores, labels)]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_is_that_of_sorting(k: int) -> None:
    draw = np.random.default_rng(k)
    scores = draw.integers(0, 4, (200, 7)) / 4  # many ties
    labels = draw.integers(0, 7, 200)
    hits = naive_top_k(scores, labels, k)
    assert top_k_hits(scores, labels, k).tolist() == hits
    assert top_k_accuracy(scores, labels, k) == pytest.approx(sum(hits) / 200)


def test_metrics_that_are_always_one_are_not_listed() -> None:
    names = [[metric.name for metric in classification_metrics(count, exclusive=True)] for count in (2, 5, 6)]
    assert names == [["top1"], ["top1"], ["top1", "top5"]]
    assert [metric.name for metric in classification_metrics(6, exclusive=False)] == ["map"]


def test_no_samples_have_no_accuracy() -> None:
    assert np.isnan(top_k_accuracy(np.zeros((0, 3)), np.zeros(0, int), 1))


def test_confusion_counts_pairs() -> None:
    counts = confusion_matrix(np.array([0, 1, 1, 2]), np.array([0, 0, 0, 2]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]


def naive_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Computes the average precision by its definition, one threshold at a time."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = [positive for score, positive in zip(scores, truth) if score >= threshold]
        recall = sum(taken) / sum(truth)
        total += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    return total


@pytest.mark.parametrize("levels", [2, 5, 1000])  # two levels: nearly everything is tied
@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_the_definition_and_scikit_learn(levels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = (draw.integers(0, levels, 90) / levels).astype(np.float32)
    truth = draw.random(90) < draw.choice([0.03, 0.3, 0.9])
    truth[seed] = True
    measured = average_precision(scores, truth)
    assert measured == pytest.approx(naive_average_precision(scores, truth), abs=1e-12)
    assert measured == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_average_precision_worked_out_by_hand() -> None:
    # ranked labels are 1, 0, (1, 0 tied), 1: precision is 1, then 2/4 after the tie, then 3/5
    scores, truth = np.array([0.9, 0.8, 0.5, 0.5, 0.1]), np.array([1, 0, 1, 0, 1])
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)


def test_all_positive_is_one_and_no_positive_is_nan() -> None:
    scores = np.array([0.1, 0.7, 0.4])
    assert average_precision(scores, np.ones(3)) == 1.0
    assert np.isnan(average_precision(scores, np.zeros(3)))
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0)))


def test_the_mean_ignores_classes_without_positives() -> None:
    draw = np.random.default_rng(0)
    scores, truth = draw.random((50, 4)), draw.random((50, 4)) < 0.3
    truth[:, 2] = False
    each = average_precisions(scores, truth)
    assert np.isnan(each[2])
    expected = [average_precision_score(truth[:, c], scores[:, c]) for c in (0, 1, 3)]
    assert mean_average_precision(scores, truth) == pytest.approx(np.mean(expected), abs=1e-12)
    assert np.isnan(mean_average_precision(scores, np.zeros((50, 4))))


@pytest.mark.parametrize(("hits", "samples"), [(0, 1), (1, 1), (1, 2), (49, 60), (60, 60), (15_000, 20_000)])
def test_the_interval_is_scipys(hits: int, samples: int) -> None:
    expected = binomtest(hits, samples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / samples, samples) == pytest.approx((expected.low, expected.high), abs=1e-6)
