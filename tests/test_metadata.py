"""Metadata of a model file: invalid numbers in it."""

import json

import pytest

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.modeling import metadata

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.2)
NAMES = ("hug", "kick", "wave")
NUMBERS = {"gamma_t": 1024, "gamma_s": 16, "gamma_tau": 1000, "gamma_w": 85.3, "gamma_b": 85.3, "gamma_d": 90.9}


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "null", "true", "[]", "-1", "0", "9" * 5000]
)
@pytest.mark.parametrize("name", [*NUMBERS, "num_classes", "size", "stem_kernel", "bn_group", "dropout"])
def test_invalid_numbers_in_metadata_are_rejected(name: str, value: str) -> None:
    if (name, value) == ("dropout", "0"):
        return
    fields = json.loads(metadata.Metadata(TINY, x3d_tf.ModelOptions(), 3, True, NAMES, "portable", 64).to_json())
    for part in (fields["expansion"], fields["options"], fields):
        if name in part:
            part[name] = "HERE"
    text = json.dumps(fields).replace('"HERE"', value)
    with pytest.raises(UserError) as error:
        metadata.Metadata.from_json(text)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "activation", "head", "message"),
    [
        ("single_label", "softmax", None, ""),
        ("single_label", "sigmoid", None, "activation must be 'softmax' for the task single_label, got 'sigmoid'"),
        ("single_label", "sigmoid", "full", "activation must be 'softmax' for the task single_label, got 'sigmoid'"),
        ("single_label", "softmax", "full", "activation must be 'sigmoid' for a detector, got 'softmax'"),
        ("multi_label", "sigmoid", None, ""),
        ("multi_label", "softmax", None, "activation must be 'sigmoid' for the task multi_label, got 'softmax'"),
        ("multi_label", "sigmoid", "full", "task must fit a detector, got 'multi_label'"),
        ("detection", "sigmoid", "full", ""),
        ("detection", "sigmoid", None, "task must fit a network that classifies clips, got 'detection'"),
        ("detection", "softmax", None, "activation must be 'sigmoid' for the task detection, got 'softmax'"),
        ("my_task", "softmax", None, ""),
        ("my_task", "sigmoid", None, ""),
        ("my_task", "sigmoid", "simple", ""),
    ],
)
def test_the_network_must_fit_a_built_in_task(task: str, activation: str, head: str | None, message: str) -> None:
    good = metadata.Metadata(TINY, x3d_tf.ModelOptions(), 3, True, NAMES, "trainable", 64)
    text = json.dumps(
        json.loads(good.to_json()) | {"task": task, "activation": activation, "detection_head": head}, indent=1
    )
    if not message:
        read = metadata.Metadata.from_json(text)
        assert (read.task, read.activation, read.detection_head) == (task, activation, head)
        return
    with pytest.raises(UserError) as error:
        metadata.Metadata.from_json(text)
    assert str(error.value) == message
