"""Losses and metrics of a step compared with those of its logits."""

import numpy as np
import pytest
from training_steps import CLASSES, batches, config_of, make

from x3d_tf.losses import SigmoidLoss, SoftmaxLoss
from x3d_tf.tasks.classification import balancing_weights

pytestmark = pytest.mark.usefixtures("eager")


def test_loss_and_top1_are_of_the_batch() -> None:
    model, step = make(config_of())
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, top1 = step(batches(), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(probabilities[range(8), labels])), rel=1e-4)
    assert float(top1[0]) == np.mean(logits.argmax(axis=1) == labels)


def test_the_multi_label_loss() -> None:
    labels = np.random.default_rng(1).integers(0, 2, (24, CLASSES)).astype("float32")
    model, step = make(config_of(), activation="sigmoid", loss=SigmoidLoss(8))
    clips, truth = (part.numpy() for part in next(batches(labels=labels)))
    logits = model(clips, training=True).numpy().astype("float64")
    probabilities = 1 / (1 + np.exp(-logits))
    likelihood = np.where(truth == 1, probabilities, 1 - probabilities)
    loss, top1 = step(batches(labels=labels), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(likelihood)), rel=1e-4)
    assert float(top1[0]) == np.mean(truth[range(8), logits.argmax(axis=1)])


def test_class_weights_weigh_the_loss() -> None:
    weights = np.array([0.5, 2.0, 0.0], np.float32)
    model, step = make(config_of(), loss=SoftmaxLoss(8, weights))
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[range(8), labels]
    assert float(step(batches(), 1)["loss"][0]) == pytest.approx(np.mean(nll * weights[labels]), rel=1e-4)


def test_balancing_gives_classes_equal_weight() -> None:
    labels = np.array([0] * 6 + [1] * 2 + [3] * 4)
    weights = balancing_weights(labels, 5)
    assert weights.tolist() == pytest.approx([12 / 18, 2.0, 0.0, 1.0, 0.0])
    assert weights[labels].mean() == pytest.approx(1)
    assert balancing_weights(np.array([0, 1, 0, 1]), 2).tolist() == [1, 1]
