"""Tests of the checks of a configuration before training starts."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.training.checks import check_batch, check_records, fitting_batch


def config_of(batch: int, accumulation: int = 1, group: int = 8) -> TrainConfig:
    return TrainConfig(
        model=ModelOptions(bn_group=group),
        dataset=DatasetSpec("unused"),
        recipe=Recipe(batch=batch, reference_batch=batch),
        execution=Execution(accumulation=accumulation),
    )


def check(config: TrainConfig, records: int, devices: int) -> None:
    task: Any = SimpleNamespace(training_records=lambda *_: range(records), check=lambda *_: None)
    manifest: Any = None
    check_records(config, manifest, task)
    check_batch(config, devices)


def is_accepted(config: TrainConfig, devices: int) -> bool:
    try:
        check(config, 100, devices)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("largest", [1, 2, 5, 6, 8, 13, 16, 31])
def test_the_largest_valid_batch_is_found(largest: int) -> None:
    for devices, accumulation, group in itertools.product((1, 2, 3), (1, 2, 4), (1, 3, 8)):
        batches = range(largest, 0, -1)
        accepted = (n for n in batches if is_accepted(config_of(n, accumulation, group), devices))
        assert fitting_batch(config_of(1024, accumulation, group), largest, devices) == next(accepted, 0)


@pytest.mark.parametrize(
    ("config", "records", "devices", "message"),
    [
        (config_of(8), 6, 1, r"be at most 6, .* split 'train' \(--gin_bindings=Recipe\.batch=6\), got 8"),
        (config_of(32), 13, 1, r"be at most 13, .* split 'train' \(--gin_bindings=Recipe\.batch=8\), got 32"),
        (config_of(8, accumulation=4), 3, 1, r"be at most 3, the number of records in split 'train', got 8"),
        (config_of(9), 20, 2, r"be a multiple of the number of devices, 2 \(--gin_bindings=Recipe\.batch=8\), got 9"),
        (config_of(12), 20, 1, r"or fewer than that \(--gin_bindings=Recipe\.batch=8\), got 12"),
    ],
)
def test_an_invalid_batch_is_reported_with_a_valid_one(
    config: TrainConfig, records: int, devices: int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"^Recipe\.batch must .*{message}$"):
        check(config, records, devices)
