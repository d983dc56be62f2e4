"""Multigrid training: the phases of a run, their learning rates and clips, and runs that resume exactly."""

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
from x3d_tf.data.datasets.spec import DatasetSpec, open_for_training
from x3d_tf.errors import UserError
from x3d_tf.losses import SoftmaxLoss
from x3d_tf.runs.checkpoints import load_checkpoint
from x3d_tf.search.training import check_settings
from x3d_tf.tasks.base import find
from x3d_tf.training.checks import check_batch
from x3d_tf.training.loop import Trainer, train
from x3d_tf.training.multigrid import LossByBatch, phases_of
from x3d_tf.training.schedule import schedule_of
from x3d_tf.training.step import TrainStep
from x3d_tf.training.workers import Workers
from x3d_tf.types import ClipSpec

LONG = Recipe(
    batch=64,
    reference_batch=64,
    learning_rate=0.1,
    steps=60_000,
    warmup_fraction=0.1,
    schedule="steps",
    decay_fractions=(0.4, 0.65, 0.85),
    multigrid="long",
)
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
# Decays after 15 and 31 of 33 steps: two cycles of one step for each shape, one full step and two full ones.
SHORT = replace(LONG, batch=2, reference_batch=2, steps=33, warmup_fraction=0.0, decay_fractions=(15 / 33, 31 / 33))


def config_of(records: Path | str = "unused", recipe: Recipe = LONG, **changes: Any) -> TrainConfig:
    spec = DatasetSpec(str(records), eval_split="train", flip=False)
    fields = {"expansion": TINY, "model": x3d_tf.ModelOptions(dropout=0.0, bn_group=2), "dataset": spec}
    return TrainConfig(**(fields | {"recipe": recipe, "test_views": 1} | changes))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=6)
    return folder


def test_the_phases_of_x3d_m() -> None:
    """Worked out by hand: stages of 24,000, 15,000 and 12,000 steps are 1600, 1000 and 800 steps of each shape."""
    phases = phases_of(config_of(expansion=x3d_tf.VARIANTS["x3d_m"].expansion))
    shapes = [(8, 4, 158), (4, 8, 158), (2, 8, 224), (1, 16, 224)]  # 224 / √2 = 158.4
    steps = [n for n in (1600, 1000, 800) for _ in range(4)] + [9000]
    found = [(p.factor, p.expansion.clip.frames, p.expansion.clip.size, p.steps) for p in phases.phases]
    assert found == [(*shape, n) for shape, n in zip([*3 * shapes, shapes[-1]], steps, strict=True)]
    assert phases.steps == 4 * 3400 + 9000 == 22_600
    assert {p.expansion.clip.stride for p in phases.phases} == {5.0}
    assert phases.clips == {factor: ClipSpec(frames, 5.0, size) for factor, frames, size in shapes}
    low, high = phases.phases[0].expansion.jitter
    assert (low, high) == (180, 226)  # 128 and 160 times 158 / 112


def test_the_command_of_the_page_has_the_steps_that_it_states() -> None:
    bindings = ['Recipe.multigrid="long"', 'Recipe.schedule="steps"', "Recipe.decay_fractions=(0.393, 0.644, 0.82)"]
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert all(f"--gin_bindings='{binding}'" in page for binding in bindings)
    phases = phases_of(gin_config.parse(["gin/kinetics400/x3d_m.gin"], bindings).config)
    assert f"This\nrun has {phases.steps:,} steps instead of 60,000" in page


@pytest.mark.parametrize("name", [name for name in x3d_tf.VARIANTS if name != "x2d"])
def test_a_step_never_has_more_pixels_than_a_plain_one(name: str) -> None:
    expansion = x3d_tf.VARIANTS[name].expansion
    clips = phases_of(config_of(expansion=expansion)).clips
    plain = expansion.clip.frames * expansion.clip.size**2
    pixels = [factor * clip.frames * clip.size**2 for factor, clip in clips.items()]
    assert max(pixels) == plain and min(pixels) > 0.8 * plain


@pytest.mark.parametrize("seed", range(5))
def test_clips_add_up_and_rates_follow_the_clips(seed: int) -> None:
    """Any recipe, compared with a loop over its steps."""
    draw = np.random.default_rng(seed)
    decays = tuple(sorted(draw.uniform(0.2, 1, draw.integers(1, 4)).tolist()))
    recipe = replace(LONG, batch=32, steps=int(draw.integers(50, 400)), decay_fractions=decays)
    config = config_of(recipe=recipe)
    phases, starts = phases_of(config), (0, *recipe.scaled_decay_steps)
    schedule, warmup = schedule_of(config), recipe.scaled_warmup_steps
    seen, rates, expected = 0, [], []  # clips, in plain batches
    for step in range(phases.steps):
        assert phases.plain_steps(step) == seen
        phase = phases.at(step)
        stage = max(number for number, start in enumerate(starts) if start <= seen)
        rate = recipe.scaled_learning_rate / 10**stage
        if seen < warmup:
            rate *= 0.1 + 0.9 * seen / warmup
        expected.append(rate * phase.factor)
        rates.append(float(schedule(step)))
        seen += phase.factor
    assert seen == recipe.scaled_steps == phases.plain_steps(phases.steps)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(schedule(np.arange(phases.steps))), expected, rtol=1e-5)
    assert [phase.factor for phase in phases.phases[:4]] == [8, 4, 2, 1]
    assert phases.phases[-1].factor == 1


def test_without_multigrid_there_is_one_phase() -> None:
    config = config_of(recipe=replace(LONG, multigrid="none"))
    (phase,) = phases_of(config).phases
    assert (phase.expansion, phase.factor, phase.steps) == (TINY, 1, 60_000)
    assert phases_of(config).plain_steps(1234) == 1234


def test_few_steps_have_no_cycle() -> None:
    phases = phases_of(config_of(recipe=replace(LONG, steps=20)))
    assert {phase.factor for phase in phases.phases} == {1} and phases.steps == 20


def test_the_loss_of_each_batch() -> None:
    """A larger batch has the mean over its own clips."""
    draw = np.random.default_rng(0)
    loss = LossByBatch({clips: SoftmaxLoss(2 * clips) for clips in (4, 32)})  # two devices
    assert loss.metrics == SoftmaxLoss(1).metrics
    for clips in (4, 32):
        logits, labels = draw.normal(size=(clips, 3)).astype("float32"), draw.integers(0, 3, clips).astype("int32")
        mean = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        assert float(loss(tf.constant(logits), tf.constant(labels), None)["loss"]) == pytest.approx(float(mean) / 2)


@pytest.mark.usefixtures("uncompiled")
def test_a_large_batch_has_the_clips_of_plain_batches(records: Path) -> None:
    config = config_of(records, replace(SHORT, decay_fractions=(30 / 33,)))  # two steps of each shape
    manifest, _ = open_for_training(config.dataset)
    trainer = Trainer(config, manifest, Workers(tf.distribute.MirroredStrategy()), find("single_label"))
    plain = iter(find("single_label").training_clips(config, manifest))
    labels = [label for _ in range(33) for label in next(plain)[1].numpy()]
    eighth, quarter, half, full = (16, 1, 22), (8, 2, 22), (4, 2, 32), (2, 4, 32)
    steps = [(0, 0, eighth), (1, 8, eighth), (2, 16, quarter), (3, 20, quarter), (5, 26, half), (7, 29, full)]
    for step, seen, shape in steps:
        clips, targets = next(iter(trainer.batches(step)))
        assert clips.shape == (*shape, shape[-1], 3)
        assert targets.numpy().tolist() == labels[2 * seen : 2 * seen + shape[0]]
    clips, targets = next(iter(trainer.batches(1, full=True)))
    assert clips.shape == (2, 4, 32, 32, 3) and targets.numpy().tolist() == labels[16:18]


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled", "undrawn")
def test_a_run_traces_each_shape_once_and_resumes_exactly(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after steps 3 and 6; the phases have one step each."""
    config, call, trace_step = config_of(records, SHORT, checkpoint_steps=2), TrainStep.__call__, TrainStep.train_step
    traced: list[tuple[int, ...]] = []

    def noted(step: TrainStep, inputs: Any, targets: Any) -> Any:
        traced.append(tuple(inputs.shape[:3]))
        return trace_step(step, inputs, targets)

    def killed(step: TrainStep, batches: Any, steps: int) -> Any:
        measured = call(step, batches, steps)
        if step.completed_steps in kills:
            kills.remove(step.completed_steps)
            raise SystemExit
        return measured

    monkeypatch.setattr(TrainStep, "train_step", noted)
    whole = train(config, tmp_path / "whole")
    assert traced == [(16, 1, 22), (8, 2, 22), (4, 2, 32), (2, 4, 32)]
    printed = capsys.readouterr().out
    assert "11 steps with a batch of 2 to 16 clips" in printed
    shapes = "16 x 1 x 22², 8 x 2 x 22², 4 x 2 x 32², 2 x 4 x 32² (clips x frames x pixels)"
    assert f"in 4 input shapes, each of which is compiled once: {shapes}" in printed

    kills = [3, 6]
    monkeypatch.setattr(TrainStep, "__call__", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train(config, tmp_path / "run")
    run = train(config, tmp_path / "run")
    for a, b in zip(load_checkpoint(whole, 11).get_weights(), load_checkpoint(run, 11).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    histories = [[(row["step"], row["epoch"], row["loss"]) for row in r.read_history()] for r in (whole, run)]
    assert histories[0] == histories[1]
    assert [epoch for _, epoch, _ in histories[0]] == [seen / 3 for seen in (12, 15, 27, 30, 32, 33)]  # 6 records


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            {"schedule": "cosine", "decay_fractions": ()},
            {},
            r"Recipe.multigrid must be \"none\" unless Recipe.schedule",
        ),
        ({}, {"expansion": replace(TINY, gamma_t=3)}, r"Expansion.gamma_t must be at least 4 for multigrid .*, got 3"),
        (
            {},
            {"expansion": replace(TINY, gamma_t=7), "model": x3d_tf.ModelOptions(input="difference")},
            r"Expansion.gamma_t must be at least 8 for multigrid .*, got 7",
        ),
        (
            {},
            {"model": x3d_tf.ModelOptions(head_pool="fixed_logits")},
            r"ModelOptions.head_pool must be \"global\" for multigrid",
        ),
    ],
)
def test_settings_that_do_not_suit_multigrid(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        config_of(recipe=replace(LONG, **recipe), **changes)


def test_larger_batches_must_have_complete_groups() -> None:
    config = config_of(recipe=replace(LONG, batch=3), model=x3d_tf.ModelOptions(bn_group=8))
    check_batch(replace(config, recipe=replace(config.recipe, multigrid="none")), 1)
    rule = "must give a multiple of ModelOptions.bn_group = 8 clips per device in a batch 4 times as large too"
    with pytest.raises(UserError, match=rf"^Recipe.batch {rule} \(Recipe.multigrid\), got 12"):
        check_batch(config, 1)


def test_detectors_and_searches_have_no_multigrid_training() -> None:
    manifest: Any = None
    with pytest.raises(UserError, match=r"^Recipe.multigrid must be \"none\" for the task detection"):
        find("detection").check(config_of(), manifest)
    with pytest.raises(UserError, match=r"^Recipe.multigrid must be \"none\" for a search"):
        check_settings(config_of())
