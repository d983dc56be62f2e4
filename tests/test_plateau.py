"""The schedule "plateau": rates that follow from validations, and runs that resume exactly across a division."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from moving_square import write_records

import x3d_tf
from x3d_tf import gin_config
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.evaluation.validation import ClipValidation
from x3d_tf.runs.checkpoints import load_checkpoint
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training.loop import train
from x3d_tf.training.schedule import PlateauWithWarmup, build_schedule
from x3d_tf.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("undrawn")

PLATEAU = Recipe(
    batch=4,
    reference_batch=4,
    learning_rate=0.5,
    steps=12,
    warmup_fraction=0.25,
    schedule="plateau",
    plateau_validations=2,
)
# A validation after each step. The warm-up takes 3 steps, so that the validations after steps 1 and 2 do not count.
SCORES = (0.5, 0.4, 0.4, 0.5, 0.6, 0.6, 0.1, 0.2, 0.2, 0.7, 0.7, 0.7)
# The rate of each step, by hand: the warm-up from 0.05 to 0.5; a division after step 4 (3 and 4 are no improvement),
# after step 7 (6 and 7), after step 9 (8 and 9), after step 12 (11 and 12), which no step follows.
RATES = (0.05, 0.2, 0.35, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-4)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=4)
    return folder


def config_of(records: Path, recipe: Recipe = PLATEAU, **changes: Any) -> TrainConfig:
    expansion = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
    spec = DatasetSpec(str(records), eval_split="train", validation_split="train", flip=False)
    settings: dict[str, Any] = {"test_views": 1, "checkpoint_steps": 1} | changes
    return TrainConfig(expansion, x3d_tf.ModelOptions(dropout=0.0), spec, recipe, **settings)


def score_in_turn(patch: pytest.MonkeyPatch, scores: Sequence[float], stops: Iterator[bool]) -> None:
    """Replaces the validation after step n by `scores[n - 1]`; where `stops` is True, by Ctrl-C."""
    steps: list[TrainStep] = []
    create = TrainStep.__init__

    def remember(step: TrainStep, *arguments: Any) -> None:
        create(step, *arguments)
        steps.append(step)

    def score(_: ClipValidation) -> dict[str, float]:
        if next(stops, False):
            raise KeyboardInterrupt
        return {"top1": scores[steps[-1].completed_steps - 1], "loss": 1.0}

    patch.setattr(TrainStep, "__init__", remember)
    patch.setattr(ClipValidation, "__call__", score)


def rates_of(run: RunFolder) -> list[float]:
    return [row["learning_rate"] for row in run.read_history()]


@pytest.mark.parametrize("seed", range(3))
def test_rates_follow_from_the_validations(seed: int) -> None:
    """Any recipe and any scores, compared with a search for the divisions in the list of scores."""
    generator = np.random.default_rng(seed)
    recipe = replace(PLATEAU, steps=100, batch=8, plateau_validations=int(generator.integers(1, 5)), warmup_start=0.0)
    schedule = build_schedule(recipe)
    assert isinstance(schedule, PlateauWithWarmup)
    scores = generator.integers(0, 12, 50)
    rates, warmup, patience = [], 12, recipe.plateau_validations  # 12.5 of 50 steps, rounded to even
    for step, score in enumerate(scores):
        rates.append(float(schedule(step)))
        schedule.count(step + 1, improved=bool((score > scores[:step]).all()))
    bests = [n for n in range(50) if (scores[n] > scores[:n]).all()]
    starts, divisions = warmup - 1, 0  # validations from index `starts` on count
    expected = [step / warmup for step in range(warmup)]
    for step in range(warmup, 50):
        start = max([starts, *(best + 1 for best in bests if best < step)])
        if step - start >= patience:
            divisions, starts = divisions + 1, step
        expected.append(0.1**divisions)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert divisions >= 2


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((), id="uninterrupted"),
        *(pytest.param((False,) * n + (True,), id=f"validation {n + 1}") for n in (3, 11)),
    ],
)
def test_the_history_states_the_rates(
    records: Path,
    tmp_path: Path,
    untrained: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stops: tuple[bool, ...],
) -> None:
    """Also for a run that is interrupted in a validation and repeats it."""
    score_in_turn(monkeypatch, SCORES, iter(stops))
    if stops:
        with pytest.raises(KeyboardInterrupt):
            train(config_of(records), tmp_path / "run")
    run = train(config_of(records), tmp_path / "run")
    np.testing.assert_allclose(rates_of(run), RATES, rtol=1e-6)
    assert [row["validation_top1"] for row in run.read_history()] == list(SCORES)
    printed = capsys.readouterr().out
    assert "step 7: no improvement in 2 validations, learning rate 0.005" in printed
    assert "learning rate 5e-05" not in printed  # after the last step
    assert "The learning rate is chosen on train, so its results are optimistically biased" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_run_resumes_exactly_across_a_division(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Stopped after step 5. The validation of step 4 divides the rate.

    Killed, the run resumes from the checkpoint of step 4, written before its validation; after Ctrl-C, from step 5.
    """
    recipe = replace(PLATEAU, steps=6, warmup_fraction=0.0, plateau_validations=1)
    config = config_of(records, recipe, checkpoint_steps=2)
    call = TrainStep.__call__

    def stopped_after_step_5(step: TrainStep, batches: Any, steps: int) -> Any:
        measured = call(step, batches, steps)
        if step.completed_steps == 5:
            raise error
        return measured

    score_in_turn(monkeypatch, (0.5,) * 6, iter(()))
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(TrainStep, "__call__", stopped_after_step_5)
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run")
    np.testing.assert_allclose(rates_of(whole), [0.5, 0.5, 0.05], rtol=1e-6)
    assert rates_of(run) == rates_of(whole)
    for a, b in zip(load_checkpoint(whole, 6).get_weights(), load_checkpoint(run, 6).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_optimizer_uses_the_divided_rate() -> None:
    from training_steps import batches, make
    from training_steps import config_of as memory_config

    changes = []
    tf.config.run_functions_eagerly(True)
    try:
        for validations in (0, 1):
            settings = {"schedule": "plateau", "plateau_validations": 1, "warmup_fraction": 0.0, "weight_decay": 0.0}
            model, step = make(memory_config(settings))
            for _ in range(validations):
                assert step.schedule.count(1, improved=False)
            before = model.get_layer("fc1").get_weights()[0]
            step(batches(), 1)
            changes.append(model.get_layer("fc1").get_weights()[0] - before)
    finally:
        tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(changes[1], changes[0] / 10, atol=1e-7)
    assert np.abs(changes[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plateau_validations": 0}, 'plateau_validations must be at least 1 if Recipe.schedule is "plateau"'),
        ({"schedule": "cosine"}, "plateau_validations must be .*, otherwise 0, got 2"),
        ({"decay_fractions": (0.5,)}, "decay_fractions must be given if, and only if"),
        ({"patience": 2}, "patience must be 0 or greater than Recipe.plateau_validations = 2, got 2"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^Recipe\.{message}"):
        replace(PLATEAU, **settings)
    assert replace(PLATEAU, patience=3).needs_validation


def test_a_plateau_requires_validation(records: Path, tmp_path: Path) -> None:
    config = config_of(records)
    with pytest.raises(UserError, match=r'^validates must be True if .* or Recipe.schedule is "plateau", got False'):
        train(config, tmp_path / "run", validates=False)
    unvalidated = replace(config, dataset=replace(config.dataset, validation_split=None))
    with pytest.raises(UserError, match=r'^Recipe.schedule must not be "plateau" without validation: a "val" split, '):
        train(unvalidated, tmp_path / "run")


@pytest.mark.parametrize(("file", "rate"), [("charades/x3d_xl_k400", 0.02), ("ava/x3d_m_v2.2", 1.6)])
def test_the_plateau_of_the_published_recipes(file: str, rate: float) -> None:
    plain = gin_config.parse([f"gin/{file}.gin"]).config
    config = gin_config.parse([f"gin/{file}.gin", "gin/plateau.gin"]).config
    recipe = replace(plain.recipe, schedule="plateau", decay_fractions=(), plateau_validations=3)
    assert config == replace(plain, recipe=recipe, dataset=replace(plain.dataset, validation_fraction=0.1))
    schedule = build_schedule(recipe)
    assert float(schedule(recipe.scaled_warmup_steps)) == pytest.approx(rate)
    assert float(schedule(0)) == pytest.approx(rate * recipe.warmup_start)
