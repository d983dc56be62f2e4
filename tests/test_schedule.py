"""Learning rates of the schedule compared with the paper's."""

import numpy as np
import pytest

from x3d_tf import gin_config
from x3d_tf.config import Recipe
from x3d_tf.training.schedule import build_schedule

RATES = {0: 0.16, 4000: 0.845418, 8000: 1.530836, 30_000: 0.8, 60_000: 0.0}


@pytest.mark.parametrize(
    ("file", "scale", "stretch"),
    [
        ("kinetics400/x3d_m", 1, 1),
        ("kinetics400/x3d_xxl", 1, 1),
        ("kinetics400/x3d_xs", 2, 0.5),
        ("kinetics400/x3d_s", 2, 0.5),
        ("kinetics600/x3d_s", 2, 1),
        ("kinetics600/x3d_xl", 1, 2),
    ],
)
def test_the_papers_learning_rates(file: str, scale: float, stretch: float) -> None:
    """The rates of the recipes, which are multiples of X3D-M's on a stretched axis of steps."""
    schedule = build_schedule(gin_config.parse([f"gin/{file}.gin"]).config.recipe)
    for step, rate in RATES.items():
        assert float(schedule(round(stretch * step))) == pytest.approx(scale * rate, abs=2e-6)


@pytest.mark.parametrize(
    ("file", "peak", "steps", "warmup", "start"),
    [
        ("kinetics400/x3d_m", 1.6, 60_000, 8000, 0.16),
        ("kinetics400/x3d_s", 3.2, 30_000, 4000, 0.32),
        ("kinetics600/x3d_m", 1.6, 120_000, 16_000, 0.16),
        ("kinetics400/pyslowfast/x3d_s", 0.1, 562_500, 65_625, 0.01),
        ("kinetics400/pyslowfast/x3d_l", 0.05, 960_000, 131_250, 0.01),
    ],
)
def test_the_learning_rate_of_every_step(file: str, peak: float, steps: int, warmup: int, start: float) -> None:
    """An independent form of the schedule: a line to the cosine's value at the end of the warm-up, then the cosine."""
    numbers = np.arange(steps + 1)
    cosine = peak * np.cos(np.pi * numbers / (2 * steps)) ** 2
    expected = np.where(numbers < warmup, np.interp(numbers, [0, warmup], [start, cosine[warmup]]), cosine)
    rates = build_schedule(gin_config.parse([f"gin/{file}.gin"]).config.recipe)(numbers)
    np.testing.assert_allclose(np.asarray(rates), expected, atol=2e-6 * peak)


@pytest.mark.parametrize("file", ["charades/x3d_xl_k400", "charades/x3d_xl_k600"])
def test_the_learning_rate_of_every_step_of_charades(file: str) -> None:
    """A line over 4 of 57 epochs from 1e-4 to 0.02, then a tenth after 41 epochs and after 49; 24,000 steps."""
    recipe = gin_config.parse([f"gin/{file}.gin"]).config.recipe
    numbers = np.arange(24_000)
    first, second = (round(24_000 / 57 * epochs) for epochs in (41, 49))
    constant = 0.02 * 0.1 ** ((numbers >= first).astype(int) + (numbers >= second))
    expected = np.where(numbers < 1684, 1e-4 + 0.0199 * numbers / 1684, constant)
    np.testing.assert_allclose(np.asarray(build_schedule(recipe)(numbers)), expected, rtol=1e-5)
    assert recipe.scaled_steps == 24_000 and recipe.weight_decay == 1e-5


def test_a_schedule_without_warmup_starts_at_its_peak() -> None:
    assert float(build_schedule(Recipe(warmup_fraction=0))(0)) == pytest.approx(1.6)


def test_schedules_round_trip() -> None:
    schedule = build_schedule(Recipe())
    again = type(schedule).from_config(schedule.get_config())
    assert float(again(1234)) == float(schedule(1234))
