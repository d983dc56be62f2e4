"""Schedule, optimiser, recipe and run folder compared with independently computed numbers."""

from pathlib import Path

import keras
import numpy as np
import pytest

from x3d_tf import Expansion
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training.optimizer import SGD
from x3d_tf.training.schedule import build_schedule


def test_the_papers_learning_rates() -> None:
    schedule = build_schedule(Recipe())
    expected = {0: 0.16, 4000: 0.845418, 8000: 1.530836, 30_000: 0.8, 60_000: 0.0}
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6)


def test_a_schedule_without_warmup_starts_at_its_peak() -> None:
    assert float(build_schedule(Recipe(warmup_fraction=0))(0)) == pytest.approx(1.6)


def test_recipes_scale_with_the_batch() -> None:
    small = Recipe(batch=64)
    assert (small.scaled_learning_rate, small.scaled_steps, small.scaled_warmup_steps) == (0.1, 960_000, 128_000)
    assert Recipe(batch=8, reference_batch=8, steps=400).scaled_steps == 400


@pytest.mark.parametrize(
    ("recipe", "warmup", "decays"),
    [
        (Recipe(), 8000, ()),
        (Recipe(batch=64), 128_000, ()),
        (Recipe(steps=20), 3, ()),  # 2.67
        (Recipe(steps=1), 0, ()),
        (Recipe(steps=1, warmup_fraction=0.9), 0, ()),  # one step remains for the schedule
        (Recipe(steps=20, warmup_fraction=0.99), 19, ()),
        (
            Recipe(steps=14_000, warmup_fraction=1 / 14, schedule="steps", decay_fractions=(0.5, 0.75)),
            1000,
            (7000, 10500),
        ),
        (Recipe(batch=64, steps=20, warmup_fraction=0.1, schedule="steps", decay_fractions=(0.1, 0.75)), 32, (32, 240)),
        (Recipe(steps=1, warmup_fraction=0, schedule="steps", decay_fractions=(0.0, 0.75)), 0, (1, 1)),
    ],
)
def test_fractions_of_the_steps_are_rounded(recipe: Recipe, warmup: int, decays: tuple[int, ...]) -> None:
    assert (recipe.scaled_warmup_steps, recipe.scaled_decay_steps) == (warmup, decays)


def test_schedules_round_trip() -> None:
    schedule = build_schedule(Recipe())
    again = type(schedule).from_config(schedule.get_config())
    assert float(again(1234)) == float(schedule(1234))


@pytest.mark.parametrize(
    ("l2", "gradients", "rates", "expected"),
    [
        # no gradient, only regularisation: the values of PyTorch's SGD
        (0.1, [0, 0, 0], [0.1, 0.1, 0.1], [0.981, 0.954, 0.921]),
        # a changing rate: the velocity does not include it
        (0.0, [1, 0], [0.1, 0.01], [0.81, 0.8019]),
    ],
)
def test_optimizer_steps(
    float64: None, l2: float, gradients: list[float], rates: list[float], expected: list[float]
) -> None:
    weight = keras.Variable([1.0], dtype="float64")
    optimizer = SGD(0.1, momentum=0.9, l2=l2)
    seen = []
    for gradient, rate in zip(gradients, rates):
        optimizer.learning_rate = rate
        optimizer.apply([keras.ops.array([gradient], "float64")], [weight])
        seen.append(float(np.asarray(weight)[0]))
    assert seen == pytest.approx(expected, abs=5e-4 if l2 else 1e-12)


def test_optimizer_excludes_variables() -> None:
    decayed, left = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = SGD(0.1, l2=0.1)
    optimizer.exclude([left])
    optimizer.apply([keras.ops.zeros(1)] * 2, [decayed, left])
    assert float(np.asarray(left)[0]) == 1 > float(np.asarray(decayed)[0])


CONFIG = TrainConfig(Expansion(gamma_t=4), dataset=DatasetSpec(records="somewhere"), seed=3)


def test_configurations_round_trip_through_json() -> None:
    assert TrainConfig.from_json(CONFIG.to_json()) == CONFIG
    assert CONFIG.settings()["Expansion.gamma_t"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a configuration"),
        ('{"Expansion.gamma_t": 0}', "gamma_t must be positive"),
        ('{"DatasetSpec.records": "a", "Nothing.x": 1}', "known settings, got 'Nothing'"),
        ('{"DatasetSpec.records": "a", "Recipe.x": 1}', "x"),
        ('{"flat": 1}', "not a configuration"),
    ],
)
def test_a_damaged_configuration_is_reported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(text)


def test_fingerprints_distinguish_settings() -> None:
    same = TrainConfig(Expansion(gamma_t=4, gamma_b=1), dataset=DatasetSpec(records="somewhere"), seed=3)
    assert same.fingerprint() == CONFIG.fingerprint()  # 1 and 1.0 are one setting
    assert TrainConfig(Expansion(gamma_t=5), dataset=CONFIG.dataset, seed=3).fingerprint() != CONFIG.fingerprint()


def test_a_run_folder_has_one_configuration(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(CONFIG, {"config.gin": "# text"})
    assert run.read_config() == CONFIG and (run.root / "config.gin").read_text() == "# text"
    run.open(CONFIG, {})
    other = TrainConfig(Expansion(gamma_t=8), dataset=CONFIG.dataset, seed=3)
    run.open(other, {})  # nothing is lost: the run had no checkpoint
    assert run.read_config() == other
    run.checkpoints.mkdir()
    (run.checkpoints / "ckpt-1.index").touch()
    with pytest.raises(ValueError, match=r"Expansion\.gamma_t was 8, now 4.*--workdir"):
        run.open(CONFIG, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path / "full").open(CONFIG, {})
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path / "full").read_config()


def test_history_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_history() == []
    row = dict.fromkeys(("step", "epoch", "learning_rate", "loss", "accuracy", "clips_per_second"), 1.5) | {"step": 1.0}
    run.write_history([row])
    run.append_history(row | {"step": 2.0})
    with run.history.open("a") as file:
        file.write("3,1")  # killed while writing
    assert run.read_history() == [row, row | {"step": 2.0}]
