"""Fine-tuning, validation, early stopping, EMA and multi-label training on small records."""

import contextlib
import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from evaluating import evaluate_run
from sklearn.metrics import average_precision_score
from video_fixtures import noise_video, write_records

import x3d_tf
from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.evaluation.validation import ClipValidation
from x3d_tf.modeling.metadata import Metadata
from x3d_tf.runs.checkpoints import checkpoint_steps, load_checkpoint
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.classification import ClipTask
from x3d_tf.training import loop
from x3d_tf.training.history import History
from x3d_tf.training.loop import train

pytestmark = pytest.mark.usefixtures("unoptimized_module")

TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=6, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)
QUICK = Recipe(batch=4, reference_batch=4, learning_rate=0.05, steps=12, warmup_fraction=1 / 6)


def write(folder: Path, videos: int, **kwargs: Any) -> Path:
    from moving_square import write_records

    write_records(folder, videos, **kwargs)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "square", videos=10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved network with other classes, as initial weights."""
    path = tmp_path_factory.mktemp("source") / "source.keras"
    x3d_tf.save(x3d_tf.build_x3d(TINY, num_classes=3), path, ("a", "b", "c"))
    return path


def config_of(
    records: Path, recipe: Recipe = QUICK, dataset: dict[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    spec = DatasetSpec(records=str(records), eval_split="train", flip=False, **(dataset or {}))
    model = x3d_tf.ModelOptions(bn_group=2, drop_connect=0.2)
    fields: dict[str, Any] = {"expansion": TINY, "model": model, "dataset": spec, "recipe": recipe, "test_views": 1}
    return TrainConfig(**({"checkpoint_steps": 4} | fields | changes))


def some(records: Path, source: Path) -> TrainConfig:
    """Returns a configuration with the options that need no extra compilation."""
    recipe = replace(QUICK, ema=0.5, class_weights="balanced", patience=9)
    return config_of(records, recipe, {"validation_fraction": 0.2}, init=str(source))


def everything(records: Path, source: Path) -> TrainConfig:
    config = some(records, source)
    execution = Execution(accumulation=2, steps_per_execution=2)
    return replace(config, recipe=replace(config.recipe, precise_bn_batches=2), execution=execution)


@pytest.fixture(scope="module")
def whole(records: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Uninterrupted run."""
    return train(some(records, source), tmp_path_factory.mktemp("runs") / "whole")


def stopped_in_a_validation(config: TrainConfig, workdir: Path) -> RunFolder:
    """Runs the same training, interrupted in its second validation and resumed."""
    score, calls = ClipValidation.__call__, 0

    def stop_at_the_second(validation: ClipValidation) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return score(validation)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClipValidation, "__call__", stop_at_the_second)
        train(config, workdir)
    return train(config, workdir)


def assert_the_same(a: RunFolder, b: RunFolder) -> None:
    for step in checkpoint_steps(a.checkpoints):
        for x, y in zip(load_checkpoint(a, step).get_weights(), load_checkpoint(b, step).get_weights()):
            np.testing.assert_array_equal(x, y)
    scores = [
        [(row["validation_top1"], row["validation_loss"]) for row in run.read_history() if "validation_loss" in row]
        for run in (a, b)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3


@pytest.mark.slow
def test_a_run_interrupted_in_a_validation_ends_as_an_uninterrupted_one(
    whole: RunFolder, records: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped_in_a_validation(some(records, source), tmp_path / "run")
    printed = capsys.readouterr()
    assert f"layers from {source}, " in printed.out and "newly initialised: fc2" in printed.out
    assert "step 4: validation_top1 " in printed.out and "stopped after step 8;" in printed.err
    assert "from the checkpoint of step 8" in printed.out
    assert_the_same(whole, run)
    assert run.preview.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_with_every_option_does_too(records: Path, source: Path, tmp_path: Path) -> None:
    config = everything(records, source)
    assert_the_same(train(config, tmp_path / "whole"), stopped_in_a_validation(config, tmp_path / "run"))


@pytest.fixture(scope="module")
def early(records: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """Run stopped early after three steps, and its output. Only the first score is computed."""
    measure, scores = ClipValidation.__call__, iter([None, {"top1": 1.0, "loss": 1.0}, {"top1": 1.0, "loss": 1.0}])
    config = some(records, source)
    config = replace(config, recipe=replace(config.recipe, patience=1), checkpoint_steps=1)
    printed = io.StringIO()
    tf.config.run_functions_eagerly(True)  # tracing takes longer than three steps
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(ClipValidation, "__call__", lambda validation: next(scores) or measure(validation))
            patch.setattr(ClipTask, "save_preview", lambda *_: None)
            patch.setattr(History, "save_plots", lambda history: history.writer.flush())
            run = train(config, tmp_path_factory.mktemp("runs") / "early")
    finally:
        tf.config.run_functions_eagerly(False)
    return run, printed.getvalue()


def test_the_best_validation_is_kept_and_ends_the_run(early: tuple[RunFolder, str], source: Path) -> None:
    run, printed = early
    assert [row["step"] for row in run.read_history()] == [1, 2, 3]
    assert f"layers from {source}, " in printed and "newly initialised: fc2" in printed
    assert "step 1: validation_top1 " in printed
    assert "early stopping at step 3: no improvement in 1 validation" in printed
    best, last = load_checkpoint(run, 2).get_weights(), load_checkpoint(run, 3).get_weights()
    for model in (x3d_tf.load(run.best), x3d_tf.load(run.root)):
        for a, b in zip(model.get_weights(), best):
            np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(best, last))


def test_a_checkpoint_is_a_network(early: tuple[RunFolder, str], tmp_path: Path) -> None:
    run, _ = early
    model = load_checkpoint(run, 3)
    assert model.class_names == ("left", "right") and model.task == "single_label"
    with pytest.raises(ValueError, match=r"ckpt-99\.index cannot be read"):
        load_checkpoint(run, 99)
    damaged = RunFolder(tmp_path)
    damaged.checkpoints.mkdir()
    for path in run.checkpoints.glob("ckpt-3.*"):
        (damaged.checkpoints / path.name).write_bytes(path.read_bytes()[:50])
    (damaged.checkpoints / "ckpt-last.index").touch()
    assert checkpoint_steps(damaged.checkpoints) == [3]
    with pytest.raises(ValueError, match=r"ckpt-3\.index cannot be read"):
        load_checkpoint(damaged, 3)


@pytest.mark.parametrize(
    ("factor", "value", "message"),
    [
        ("gamma_w", 50.0, "its data must hold at least [0-9]+ parameters for the network in its metadata"),
        ("gamma_d", 800.0, "Expansion.gamma_d must give at most 1000 blocks"),
    ],
)
def test_a_network_that_a_checkpoint_cannot_hold_is_not_built(
    factor: str, value: float, message: str, tmp_path: Path
) -> None:
    described = Metadata(x3d_tf.Expansion(), x3d_tf.ModelOptions(), 2, True, ("a", "b"), "trainable", 112).to_json()
    text = described.replace(f'"{factor}": 1.0', f'"{factor}": {value}')
    assert text != described
    run = RunFolder(tmp_path)
    step = tf.Variable(1, dtype=tf.int64)
    tf.train.Checkpoint(description=tf.Variable(text), step=step).write(str(run.checkpoints / "ckpt-1"))
    with pytest.raises(ValueError, match=rf"ckpt-1\.index cannot be read \(.*{message}"):
        load_checkpoint(run, 1)


def test_a_run_validates_on_an_existing_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is stopped before its first step."""
    video = [noise_video(seed, 4, height=48, width=48) for seed in range(4)]
    started: list[TrainConfig] = []

    def start(config: TrainConfig, *_: Any, **__: Any) -> None:
        started.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Trainer", start)
    monkeypatch.setattr(ClipTask, "save_preview", lambda *_: None)
    given = replace(config_of(tmp_path / "records", replace(QUICK, patience=2)), dataset=DatasetSpec("unset"))
    final, early_stopping = "the final evaluation.", "Early stopping selects the best step on val"
    for names, chosen, sentence in (
        ("train val test", ("test", "val"), f"val (4 records) for validation, test (4 records) for {final}"),
        ("train val", ("val", "val"), f"val (4 records) for validation and {final} {early_stopping}"),
    ):
        write_records(tmp_path / names, dict.fromkeys(names.split(), video))
        config = replace(given, dataset=replace(given.dataset, records=str(tmp_path / names)))
        run = tmp_path / "runs" / names
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
        assert (started[-1].dataset.eval_split, started[-1].dataset.validation_split) == chosen
        assert re.search(sentence.replace("(", r"\(").replace(")", r"\)"), capsys.readouterr().out)
        assert RunFolder(run).read_config() == started[-1]
        RunFolder(run).model.touch()
        assert train(config, run).model.is_file()  # finished: the unresolved settings match those of the run
        assert "is already finished" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"DatasetSpec\.validation_split was .*, now 'train'"):
            train(replace(config, dataset=replace(config.dataset, validation_split="train")), run)
    write_records(tmp_path / "none", {"train": video, "test": video})
    with pytest.raises(ValueError, match=r"Recipe\.patience must be 0 without validation: a \"val\" split, .*got 2"):
        train(replace(given, dataset=DatasetSpec(str(tmp_path / "none"))), tmp_path / "runs" / "none")


@pytest.mark.slow
def test_multi_label_training_and_evaluation(tmp_path: Path) -> None:
    folder = write(tmp_path / "records", videos=8, also=("bright",))
    recipe = Recipe(batch=8, reference_batch=8, learning_rate=0.1, steps=40, warmup_fraction=1 / 8, weight_decay=0)
    config = config_of(folder, recipe, {"validation_split": "train"}, checkpoint_steps=20)
    run = train(replace(config, model=x3d_tf.ModelOptions(dropout=0.0)), tmp_path / "run")
    assert x3d_tf.load(run.root).task == "multi_label"
    report = evaluate_run(run)
    with (report.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    precisions = []
    for name in ("left", "right", "bright"):
        truth = [name in row["labels"].split(";") for row in rows]
        precisions.append(average_precision_score(truth, [float(row[f"p({name})"]) for row in rows]))
    assert report.results["map"] == pytest.approx(np.mean(precisions), abs=1e-4)  # the file rounds probabilities
    assert report.results["map"] > 0.9
    assert run.read_history()[-1]["loss"] < run.read_history()[0]["loss"]
    with pytest.raises(ValueError, match=r'Recipe.class_weights must be "none" for the task multi_label .*, got'):
        train(replace(config, recipe=replace(recipe, class_weights="balanced")), tmp_path / "other")
