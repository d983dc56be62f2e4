"""Tasks: found by name, checked against the records, and a third one in one file that all commands accept."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tensorflow as tf
from moving_square import write_records
from video_fixtures import write_video

import x3d_tf
from x3d_tf import evaluate, predict, preview, registry, train
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets import moving_shapes
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.data.input_pipeline import evaluation_dataset
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.registry import load_plugin
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.base import find, task_of_model, task_of_records
from x3d_tf.tasks.classification import ClipTask, SingleLabel
from x3d_tf.training.checks import check_records
from x3d_tf.types import ViewSpec

pytestmark = pytest.mark.usefixtures("uncompiled_module")

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
BINDINGS = [
    'TrainConfig.task="playback"',
    "Expansion.gamma_t=6",
    "Expansion.gamma_s=0.4285714285714286",
    "Expansion.gamma_d=0.2",
    "Recipe.batch=8",
    "Recipe.reference_batch=8",
    "Recipe.learning_rate=0.05",
    "ModelOptions.dropout=0.0",
    "TrainConfig.test_views=2",
    "DatasetSpec.flip=False",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of moving_shapes that all move to the right, so that only their direction of playback differs."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_shapes, "VIDEOS", {"train": 24, "val": 4, "test": 8})
        patch.setattr(moving_shapes, "DIRECTIONS", {"right": (0, 1)})
        open_dataset(DatasetSpec(str(folder), flip=False, name="moving_shapes"))
    return folder


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the third task for one test."""
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.syspath_prepend(FIXTURES)
    load_plugin("playback")


def flags_of(records: Path, *bindings: str) -> list[str]:
    chosen = [*BINDINGS, f'DatasetSpec.records="{records}"', *bindings]
    return ["--gin_file=gin/x3d_xs.gin", "--gin_file=gin/data/records.gin", *(f"--gin_bindings={b}" for b in chosen)]


def test_tasks_are_found_without_tensorflow() -> None:
    code = (
        "import sys; from x3d_tf.tasks.base import find; from x3d_tf.registry import load_plugin; "
        f"sys.path.insert(0, {str(FIXTURES)!r}); load_plugin('playback'); "
        "print(*(find(name).sample for name in ('single_label', 'multi_label', 'detection', 'playback')), sep=', '); "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "video, video, key frame, video\nFalse\n", done.stderr


def test_only_tasks_know_the_kinds_of_prediction() -> None:
    training = sorted((ROOT / "x3d_tf" / "training").glob("*.py"))
    commands = [ROOT / "x3d_tf" / f"{name}.py" for name in ("train", "evaluate", "predict", "preview", "build_records")]
    others = [ROOT / "x3d_tf" / "runs" / "run_folder.py", *sorted((ROOT / "export").glob("*.py")), *commands]
    assert len(training) > 10
    for path in training:
        assert "detect" not in path.read_text("utf-8").lower(), path
    for path in (*training, *others):
        assert not re.search(r"task(\.name)? (==|!=|in) |head is |isinstance\(.*Detector", path.read_text("utf-8")), (
            path
        )


def test_the_task_is_that_of_the_records_by_default(records: Path, plugin: None) -> None:
    manifest = open_dataset(DatasetSpec(str(records)))
    assert task_of_records(TrainConfig(), manifest).name == "single_label"
    assert task_of_records(TrainConfig(task="playback"), manifest).name == "playback"
    with pytest.raises(UserError, match=r"task of the records in .* must be detection, got 'single_label'"):
        task_of_records(TrainConfig(task="detection"), manifest)
    with pytest.raises(UserError, match=r"there is no task 'ranking': the names are .*playback, single_label"):
        task_of_records(TrainConfig(task="ranking"), manifest)
    with pytest.raises(UserError, match=r"TrainConfig\.task must be a name of .*, got 'a/b'"):
        TrainConfig(task="a/b")


def test_targets_are_made_from_the_clips(records: Path, plugin: None) -> None:
    """A clip is reversed if, and only if, its target says so; the choice depends on seed, epoch and clip."""
    recipe = Recipe(batch=8, reference_batch=8)
    dataset = DatasetSpec(str(records), flip=False)
    config = TrainConfig(x3d_tf.Expansion(gamma_t=6, gamma_s=48 / 112), dataset=dataset, recipe=recipe)
    manifest, task = open_dataset(dataset), find("playback")
    made = list(task.training_clips(config, manifest).take(6).as_numpy_iterator())
    plain = list(find("single_label").training_clips(config, manifest).take(6).as_numpy_iterator())
    for (clips, targets), (expected, _) in zip(made, plain):
        for clip, target, forwards in zip(clips, targets, expected):
            np.testing.assert_array_equal(clip, forwards[::-1] if target else forwards)
    targets = np.concatenate([targets for _, targets in made])
    assert 14 <= targets.sum() <= 34 and (targets[:24] != targets[24:]).any()  # 24 expected, 3.5 of standard deviation
    resumed = next(task.training_clips(config, manifest, start_step=4).as_numpy_iterator())
    for a, b in zip(resumed, made[4]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda clip, record, seed: (clip[:3], tf.constant(0)), r"return clips of shape \(6, 48, 48, 3\), got Tensor"),
        (lambda clip, record, seed: (clip, tf.constant(0.5)), "return the number of a class, an integer, got Tensor"),
        (
            lambda clip, record, seed: (clip, tf.constant([0, 1])),
            "return the number of a class, an integer, got Tensor",
        ),
    ],
)
def test_examples_of_another_shape_are_an_error(records: Path, make: Any, message: str) -> None:
    class Mine(ClipTask):
        name = "mine"

        def make_example(self) -> Any:
            return make

    dataset = DatasetSpec(str(records), flip=False)
    config = TrainConfig(x3d_tf.Expansion(gamma_t=6, gamma_s=48 / 112), dataset=dataset, recipe=Recipe(8, 8))
    with pytest.raises(UserError, match=f"make_example of the task mine must {message}"):
        Mine().training_clips(config, open_dataset(dataset))


def test_a_task_accepts_the_annotations_that_its_targets_need() -> None:
    class Several(ClipTask):
        name = "several"
        activation = "sigmoid"

    assert (SingleLabel().annotations, Several().annotations) == (("single_label",), ("multi_label",))
    assert find("multi_label").annotations == ("multi_label",)


def test_all_views_of_a_video_have_its_target(records: Path, plugin: None) -> None:
    """Each view is reversed if, and only if, the target of its video says so."""
    manifest, make = open_dataset(DatasetSpec(str(records))), cast(ClipTask, find("playback")).make_example()
    views = ViewSpec(temporal_views=3, spatial_crops=3, resize=48, crop=32)
    options: dict[str, Any] = {"records": manifest, "split": "test", "clip": x3d_tf.ClipSpec(6, 2, 32), "views": views}
    made = list(evaluation_dataset(**options, make_example=make).as_numpy_iterator())
    plain = list(evaluation_dataset(**options).as_numpy_iterator())
    for (clips, targets, _), (expected, _, _) in zip(made, plain, strict=True):
        assert (expected[0] != expected[0, :, ::-1]).any(axis=(1, 2, 3, 4)).any()  # the direction can be seen
        np.testing.assert_array_equal(clips, expected[:, :, ::-1] if targets[0] else expected)
    assert {int(targets[0]) for _, targets, _ in made} == {0, 1}


def test_an_evaluation_requires_the_activation_of_the_task(records: Path) -> None:
    """Otherwise a task of your own would measure top-1 instead of mAP, or mAP of probabilities that add up to 1."""
    manifest = open_dataset(DatasetSpec(str(records)))
    model = x3d_tf.build_x3d(x3d_tf.Expansion(gamma_d=0.2), 1, task="mine", activation="sigmoid")
    model.class_names = manifest.classes
    with pytest.raises(UserError, match=r"activation of the network must be 'softmax' for the task .*, got 'sigmoid'"):
        SingleLabel().check_evaluation(model, EvalConfig(), manifest)
    model.activation = "softmax"
    SingleLabel().check_evaluation(model, EvalConfig(), manifest)


def test_a_task_chooses_the_records_to_train_on(tmp_path: Path) -> None:
    class OnlyLeft(SingleLabel):
        def training_records(self, manifest: Manifest, split: str) -> tuple[Record, ...]:
            return tuple(record for record in manifest.split(split).records if record.labels == (0,))

    write_records(tmp_path / "records", videos=8)
    dataset = DatasetSpec(str(tmp_path / "records"), eval_split="train", flip=False)
    expansion = x3d_tf.Expansion(gamma_t=2, gamma_s=32 / 112)
    config = TrainConfig(expansion, dataset=dataset, recipe=Recipe(batch=4, reference_batch=4))
    manifest = open_dataset(dataset)
    for task, targets in ((SingleLabel(), {0, 1}), (OnlyLeft(), {0})):
        batches = task.training_clips(config, manifest).take(2).as_numpy_iterator()
        assert {int(target) for _, labels in batches for target in labels} == targets
        check_records(config, manifest, task)
    too_large = replace(config, recipe=Recipe(batch=5, reference_batch=5))
    with pytest.raises(UserError, match=r"Recipe\.batch must be at most 4, the number of records"):
        check_records(too_large, manifest, OnlyLeft())


def balanced_accuracy(rows: list[dict[str, str]]) -> float:
    """Averages the shares of hits of the classes in predictions.csv."""
    shares = []
    for name in ("forwards", "backwards"):
        of_class = [row["predicted"] == name for row in rows if row["label"] == name]
        shares.append(sum(of_class) / len(of_class))
    return sum(shares) / 2


def right(path: Path, backwards: bool = False) -> Path:
    """Writes a video of a square that moves to the right, or one that moves to the left."""
    frames = np.zeros((45, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:44, number : number + 24] = (230, 200, 180)
    return write_video(path, frames[::-1] if backwards else frames)


def test_a_third_task_runs_through_all_commands(
    records: Path, tmp_path: Path, plugin: None, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tf.config.run_functions_eagerly(True)  # tracing takes longer than a few steps
    try:
        _all_commands(records, tmp_path, in_process, capsys)
    finally:
        tf.config.run_functions_eagerly(False)


def _all_commands(records: Path, tmp_path: Path, command: Callable[..., None], capsys: Any) -> None:
    small = ("Expansion.gamma_t=2", f"Expansion.gamma_s={32 / 112}", "Recipe.batch=4", "Recipe.reference_batch=4")
    flags = flags_of(records, *small, "Recipe.steps=2", "TrainConfig.checkpoint_steps=2")
    workdir = tmp_path / "runs" / "playback"
    command(preview, *flags, f"--output={tmp_path / 'preview.png'}", "--clips=2")
    command(train, *flags, f"--workdir={workdir}")
    run, printed = RunFolder(workdir), capsys.readouterr().out
    assert "step 2: validation_top1 " in printed and "2 classes, 2-Center" in printed
    assert run.labels.read_text() == "forwards\nbackwards\n"
    assert {"top1", "validation_top1", "validation_balanced_accuracy", "validation_loss"} < set(run.read_history()[-1])
    model = x3d_tf.load(workdir)
    assert (model.task, model.activation, model.class_names) == ("playback", "softmax", ("forwards", "backwards"))
    assert task_of_model(workdir) is find("playback")

    (report,) = run.evaluations.iterdir()
    results = json.loads((report / "results.json").read_text())
    assert (results["task"], results["samples"], results["classes"]) == ("playback", 8, 2)
    with (report / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"forwards", "backwards"}  # not the class of the records, "right"
    assert results["top1"] == np.mean([row["label"] == row["predicted"] for row in rows])
    assert results["balanced_accuracy"] == pytest.approx(balanced_accuracy(rows))
    assert f"balanced accuracy {100 * results['balanced_accuracy']:.1f} % (8 videos, " in printed
    command(evaluate, f"--run={workdir}", "--views=1")
    assert "1-Center" in capsys.readouterr().out

    videos = [right(tmp_path / "a.mp4"), right(tmp_path / "b.mp4", backwards=True)]
    command(predict, f"--model={workdir}", f"--csv={tmp_path / 'out.csv'}", *videos, positional=True)
    with (tmp_path / "out.csv").open() as file:
        assert {"p(forwards)", "p(backwards)"} < set(next(csv.DictReader(file)))
    app = tf.keras.models.load_model(run.model)
    np.testing.assert_allclose(app(np.zeros((1, 2, 32, 32, 3), np.uint8)).numpy().sum(), 1, atol=1e-5)


@pytest.mark.slow
def test_a_third_task_learns_and_resumes_exactly(records: Path, tmp_path: Path) -> None:
    """By the commands: training, a killed process, evaluation, export and prediction."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(FIXTURES)))}

    def command(name: str, *arguments: object) -> str:
        line = [sys.executable, "-m", name, "--plugin=playback", *map(str, arguments)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    flags = flags_of(records, "Recipe.steps=240", "TrainConfig.checkpoint_steps=40")
    workdir = tmp_path / "playback"
    command("x3d_tf.train", *flags, f"--workdir={workdir}")
    (results,) = workdir.glob("evaluation/*/results.json")
    assert json.loads(results.read_text())["top1"] > 0.85  # 0.5 by chance
    before = x3d_tf.load(workdir).get_weights()
    shutil.rmtree(workdir / "evaluation")
    (workdir / "model.keras").unlink()
    for path in (workdir / "checkpoints").glob("ckpt-240.*"):
        path.unlink()
    assert "resuming from the checkpoint of step 200" in command("x3d_tf.train", *flags, f"--workdir={workdir}")
    for a, b in zip(x3d_tf.load(workdir).get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "written: " in command("export.saved_model", f"--model={workdir}", f"--output={tmp_path / 'served'}")
    served = tf.saved_model.load(str(tmp_path / "served" / "1")).signatures["serving_default"]
    assert served(clips=tf.zeros((1, 6, 48, 48, 3), tf.uint8))["top_classes"].shape == (1, 2)
    printed = command("x3d_tf.predict", f"--model={workdir}", right(tmp_path / "a.mp4"))
    assert "forwards" in printed
