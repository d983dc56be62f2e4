"""The configuration of a training run: rounding of steps, JSON, and fingerprints."""

import json

import pytest

from x3d_tf import Expansion
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError


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


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("Execution.precision", "float17", "one of float32, bfloat16, float16, got 'float17'"),
        ("Detection.eval_boxes", 3, "one of proposals, annotated, got 3"),
        ("TrainConfig.init", 3, "str or None, got 3"),
        ("Recipe.steps", "many", "int, got 'many'"),
    ],
)
def test_the_valid_values_of_a_setting_are_listed(setting: str, value: object, rule: str) -> None:
    with pytest.raises(UserError, match=f"^{setting} must be {rule}$"):
        TrainConfig.from_json(json.dumps(CONFIG.settings() | {setting: value}))


def test_fingerprints_distinguish_settings() -> None:
    same = TrainConfig(Expansion(gamma_t=4, gamma_b=1), dataset=DatasetSpec(records="somewhere"), seed=3)
    assert same.fingerprint() == CONFIG.fingerprint()  # 1 and 1.0 are one setting
    assert TrainConfig(Expansion(gamma_t=5), dataset=CONFIG.dataset, seed=3).fingerprint() != CONFIG.fingerprint()


@pytest.mark.parametrize(
    "setting", ["Recipe.steps", "Recipe.learning_rate", "Expansion.gamma_w", "Recipe.decay_fractions"]
)
def test_a_number_of_a_configuration_fits_into_64_bits(setting: str) -> None:
    value = [10**400] if setting == "Recipe.decay_fractions" else 10**400
    text = json.dumps(CONFIG.settings() | {setting: value})
    with pytest.raises(UserError, match=f"{setting} must fit into 64 bits, got 1000"):
        TrainConfig.from_json(text)
