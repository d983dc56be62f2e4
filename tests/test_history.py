"""The history of a run: columns of the task, averages and counts, and the best validation."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training.history import History
from x3d_tf.training.multigrid import phases_of
from x3d_tf.training.schedule import schedule_of
from x3d_tf.types import Metric

METRICS = (Metric("box_top1", "share"), Metric("boxes_left_out", "count", "boxes outside the crops"))
CONFIG = TrainConfig(recipe=Recipe(batch=4), dataset=DatasetSpec("unused"))


class MapValidation:
    """Stands in for a validation that only ranks scores."""

    metrics = (Metric("map", "share"),)

    def __call__(self) -> dict[str, float]:
        raise NotImplementedError

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        return (scores["map"],)


def history_of(run: RunFolder, first: int = 0) -> History:
    return History(run, CONFIG, schedule_of(CONFIG), phases_of(CONFIG), 10, first, METRICS, MapValidation())


def add_steps(history: History, losses: list[float], left_out: float) -> None:
    shares, counts = np.linspace(0, 1, len(losses)), np.full(len(losses), left_out)
    history.add({"loss": tf.constant(losses), "box_top1": tf.constant(shares), "boxes_left_out": tf.constant(counts)})


def test_rows_have_the_columns_of_the_task(tmp_path: Path) -> None:
    history = history_of(RunFolder(tmp_path))
    add_steps(history, [1.0, 2.0], 3.0)
    add_steps(history, [6.0], 1.0)
    assert history.end_row(3).endswith("clips/s, loss 3.000, box_top1 33%")
    assert history.add_validation(3, {"map": 0.25})
    header, line = history.run.history.read_text().splitlines()
    assert header == "step,epoch,learning_rate,loss,clips_per_second,box_top1,boxes_left_out,validation_map"
    cells = dict(zip(header.split(","), line.split(",")))
    assert (cells["step"], cells["epoch"], cells["loss"]) == ("3", "0.3", "3.0")
    assert float(cells["box_top1"]) == pytest.approx(1 / 3) and cells["boxes_left_out"] == "7"  # a sum, not a mean
    assert cells["validation_map"] == "0.25"
    assert history.totals() == ["boxes_left_out: 7 (boxes outside the crops)"]


def test_the_best_validation_is_found_again_by_a_resumed_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    history = history_of(run)
    for step, score in enumerate((0.2, 0.5, 0.5, 0.4), start=1):
        add_steps(history, [1.0], 0.0)
        history.end_row(step)
        assert history.add_validation(step, {"map": score}) == (step <= 2)  # an equal score is no improvement
    assert history.best() == ({"map": 0.5}, 2)
    resumed = history_of(run, first=3)
    assert resumed.best() == ({"map": 0.5}, 1)
    assert not resumed.add_validation(3, {"map": 0.5})  # repeated, because the run was interrupted in it
    assert resumed.totals() == []


def test_numbers_that_are_not_finite_are_errors(tmp_path: Path) -> None:
    history = history_of(RunFolder(tmp_path))
    add_steps(history, [1.0], 0.0)
    history.end_row(1)
    with pytest.raises(UserError, match="validation_map must be finite, got nan at step 1"):
        history.add_validation(1, {"map": float("nan")})
    assert "validation_map" not in history.rows[0]
    add_steps(history, [1.0, float("inf")], 0.0)
    with pytest.raises(UserError, match=r"the loss must be finite, got inf at step 3"):
        history.end_row(3)


@pytest.mark.parametrize("name", ["box_top1", "boxes_left_out"])
def test_a_metric_that_is_not_finite_writes_no_row(tmp_path: Path, name: str) -> None:
    history = history_of(RunFolder(tmp_path))
    before = history.run.history.read_text()
    metrics = {"loss": [1.0, 1.0], "box_top1": [0.5, 0.5], "boxes_left_out": [0.0, 0.0]} | {name: [0.0, float("nan")]}
    history.add({key: tf.constant(values) for key, values in metrics.items()})
    with pytest.raises(UserError, match=rf"^{name} at step 8 must be finite, got nan$"):
        history.end_row(8)
    assert history.rows == [] and history.run.history.read_text() == before
