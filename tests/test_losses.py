"""Losses and accuracy of a step compared with those of its logits."""

import numpy as np
import pytest
from training_steps import CLASSES, batches, config_of, make

pytestmark = pytest.mark.usefixtures("eager")


def test_loss_and_accuracy_are_of_the_batch() -> None:
    model, step = make(config_of())
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, accuracy = step(batches(), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(probabilities[range(8), labels])), rel=1e-4)
    assert float(accuracy[0]) == np.mean(logits.argmax(axis=1) == labels)


def test_the_multi_label_loss() -> None:
    labels = np.random.default_rng(1).integers(0, 2, (24, CLASSES)).astype("float32")
    model, step = make(config_of(), task="multi_label")
    clips, truth = (part.numpy() for part in next(batches(labels=labels)))
    logits = model(clips, training=True).numpy().astype("float64")
    probabilities = 1 / (1 + np.exp(-logits))
    likelihood = np.where(truth == 1, probabilities, 1 - probabilities)
    loss, accuracy = step(batches(labels=labels), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(likelihood)), rel=1e-4)
    assert float(accuracy[0]) == np.mean(truth[range(8), logits.argmax(axis=1)])


def test_class_weights_weigh_the_loss() -> None:
    weights = np.array([0.5, 2.0, 0.0], np.float32)
    model, step = make(config_of(), class_weights=weights)
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[range(8), labels]
    assert float(step(batches(), 1)["loss"][0]) == pytest.approx(np.mean(nll * weights[labels]), rel=1e-4)
