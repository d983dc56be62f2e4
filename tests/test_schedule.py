"""Learning rates of the schedule compared with the paper's."""

import pytest

from x3d_tf.config import Recipe
from x3d_tf.training.schedule import build_schedule


def test_the_papers_learning_rates() -> None:
    schedule = build_schedule(Recipe())
    expected = {0: 0.16, 4000: 0.845418, 8000: 1.530836, 30_000: 0.8, 60_000: 0.0}
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6)


def test_a_schedule_without_warmup_starts_at_its_peak() -> None:
    assert float(build_schedule(Recipe(warmup_fraction=0))(0)) == pytest.approx(1.6)


def test_schedules_round_trip() -> None:
    schedule = build_schedule(Recipe())
    again = type(schedule).from_config(schedule.get_config())
    assert float(again(1234)) == float(schedule(1234))
