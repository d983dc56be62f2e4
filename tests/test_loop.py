"""The training loop on small records: learning, interruption, resuming, several devices."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from evaluating import evaluate_run
from tqdm import tqdm

import x3d_tf
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import clip_contract
from x3d_tf.files import WriteError
from x3d_tf.runs.checkpoints import Checkpoints, checkpoint_steps, load_checkpoint
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training import loop
from x3d_tf.training.history import History
from x3d_tf.training.loop import train
from x3d_tf.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)  # one block per stage
LARGER = x3d_tf.Expansion(gamma_tau=1, gamma_t=6, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # sees the motion
EIGHT = Recipe(batch=8, reference_batch=8, learning_rate=0.05, steps=160, warmup_fraction=1 / 32, weight_decay=0)
SHORT = Recipe(batch=8, reference_batch=8, learning_rate=0.05, steps=60, warmup_fraction=1 / 12)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records of two classes: a bright square on black that moves left or right."""
    from moving_square import write_records

    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=8)
    return folder


def config_of(records: Path, **changes: object) -> TrainConfig:
    fields = {
        "expansion": TINY,
        "model": x3d_tf.ModelOptions(dropout=0.0),
        "dataset": DatasetSpec(records=str(records), eval_split="train", flip=False),
        "recipe": SHORT,
        "test_views": 2,
        "checkpoint_steps": 20,
    }
    return TrainConfig(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(records: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Finished run."""
    return train(config_of(records), tmp_path_factory.mktemp("runs") / "square", texts={"config.gin": "# bindings"})


@pytest.mark.slow
def test_it_overfits_eight_clips(records: Path, tmp_path: Path) -> None:
    run = train(config_of(records, expansion=LARGER, recipe=EIGHT), tmp_path / "run")
    assert evaluate_run(run).results["top1"] == 1.0
    first, last = run.read_history()[0], run.read_history()[-1]
    assert last["loss"] < 0.3 < first["loss"]


def test_the_run_folder_is_complete(finished: RunFolder, records: Path) -> None:
    assert finished.read_config() == config_of(records)
    assert (finished.root / "config.gin").read_text() == "# bindings"
    assert finished.labels.read_text() == "left\nright\n"
    assert finished.curves.read_bytes().startswith(b"\x89PNG")
    assert list(finished.tensorboard.glob("events.out.tfevents.*"))
    rows = finished.read_history()
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["epoch"] == 60  # one step per epoch
    assert len(list(finished.checkpoints.glob("*.index"))) == 2
    assert json.loads(finished.input.read_text()) == clip_contract(x3d_tf.load(finished.root))


def test_the_model_states_what_it_was_trained_on(finished: RunFolder) -> None:
    stored = Manifest.load(finished.read_config().dataset.records).stored
    for model in (x3d_tf.load(finished.root), load_checkpoint(finished, 60)):
        assert (model.stored, model.test_views, model.frame_sampling) == (stored, 2, "slowfast")
    assert json.loads(finished.input.read_text())["stored"] == {"short_side": 256, "jpeg_quality": 95}


def test_a_finished_run_is_left_alone(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.model.stat().st_mtime_ns
    train(config_of(Path("deleted")), finished.root)
    assert finished.model.stat().st_mtime_ns == before
    assert "is already finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings: .*seed was 0, now 7"):
        train(config_of(Path("deleted"), seed=7), finished.root)


def test_early_stopping_requires_validation(records: Path, tmp_path: Path) -> None:
    config = config_of(records, recipe=replace(SHORT, patience=2))
    with pytest.raises(ValueError, match=r"validates must be True if Recipe.patience is set or .*, got False"):
        train(config, tmp_path / "run", validates=False)
    assert not (tmp_path / "run").exists()


def test_the_records_are_opened_once(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    load = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda folder: opened.append(folder) or load(folder))
    monkeypatch.setattr(loop, "train_checked", lambda *_, **__: None)
    train(config_of(records), tmp_path / "run")
    assert opened == [str(records)]


def test_the_report_says_what_was_measured(finished: RunFolder) -> None:
    report = evaluate_run(finished, overwrite=True)
    rows = list(csv.DictReader((report.folder / "predictions.csv").open()))
    results = json.loads((report.folder / "results.json").read_text())
    assert len(rows) == results["samples"] == 8
    hits = [row["predicted"] == row["label"] for row in rows]
    assert sum(hits) / len(hits) == results["top1"]
    assert float(rows[0]["p(left)"]) + float(rows[0]["p(right)"]) == pytest.approx(1, abs=1e-5)
    macs = x3d_tf.cost(TINY, num_classes=2).macs
    assert results["gmacs_per_sample"] == pytest.approx(2 * macs / 1e9)
    assert results["training"]["records_sha256"] == results["records_sha256"]  # those of the training
    assert results["views"] == "2-Center" and report.folder.name == "square_train_2center"
    assert (report.folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("eager")
def test_another_number_of_views_gets_a_report_of_its_own(finished: RunFolder) -> None:
    one = evaluate_run(finished, temporal_views=1)
    assert one.results["views"] == "1-Center" and one.folder.name == "square_train_1center"
    with pytest.raises(ValueError, match=r"already has a report.*--overwrite"):
        evaluate_run(finished, temporal_views=1)
    evaluate_run(finished, temporal_views=1, overwrite=True)


def test_the_model_is_the_last_checkpoint(finished: RunFolder) -> None:
    app, network = keras.models.load_model(finished.model), x3d_tf.load(finished.root)
    clip = np.random.default_rng(0).integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(app(clip), keras.ops.softmax(network(clip)), atol=1e-6)
    assert network.class_names == ("left", "right")
    reader = tf.train.load_checkpoint(str(finished.checkpoints / "ckpt-60"))
    saved = [reader.get_tensor(key) for key in reader.get_variable_to_shape_map() if key.startswith("weights/")]
    weights = np.asarray(network.get_layer("fc1").kernel)
    assert any(array.shape == weights.shape and np.array_equal(array, weights) for array in saved)


def test_records_of_unknown_classes_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    from moving_square import write_records

    write_records(tmp_path / "other", videos=2, classes=("left", "sideways"))
    with pytest.raises(ValueError, match="1 class unknown to the model: sideways"):
        evaluate_run(finished, records=str(tmp_path / "other"), split="train")


def test_a_loss_that_is_not_finite_stops_the_run(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: list[float]
) -> None:
    call = TrainStep.__call__

    def diverging(step: TrainStep, batches: object, steps: int) -> dict[str, Any]:
        measured = call(step, batches, steps)
        return measured | {"loss": tf.constant([np.nan])} if len(untrained) == 12 else measured

    monkeypatch.setattr(TrainStep, "__call__", diverging)
    config = config_of(records, recipe=replace(SHORT, learning_rate=1e30))
    with pytest.raises(
        ValueError, match=r"the loss must be finite, got nan at step \d+.* Recipe\.learning_rate \(now 1e\+30\)"
    ):
        train(config, tmp_path / "run")
    assert len(untrained) == 20  # the end of the row
    assert not (tmp_path / "run" / "model.keras").exists()


def test_a_damaged_record_is_reported(records: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(records, tmp_path / "copy")
    (shard,) = copy.glob("*.tfrecord")
    content = bytearray(shard.read_bytes())
    content[-200:-100] = bytes(100)  # within the last record, after its header
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(shard.name)}: cannot read or decode record \d+ of split train"):
        train(config_of(copy), tmp_path / "run")


COMMAND = """
import sys
from pathlib import Path
from typing import Any
sys.path[:0] = {tests!r}
from test_loop import config_of
from x3d_tf.training.loop import train
train(config_of(Path({records!r}), model=__import__("x3d_tf").ModelOptions(drop_connect=0.2)), {workdir!r})
"""


def start(records: Path, workdir: Path) -> subprocess.Popen[bytes]:
    code = COMMAND.format(tests=TESTS, records=str(records), workdir=str(workdir))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def final_weights(workdir: Path) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(workdir / "checkpoints" / "ckpt-60"))
    keys = [key for key in reader.get_variable_to_shape_map() if key.startswith(("weights/", "seeds/", "optimizer/"))]
    return {key: reader.get_tensor(key) for key in keys}


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(records: Path, tmp_path: Path) -> None:
    whole = start(records, tmp_path / "whole")
    killed = start(records, tmp_path / "killed")
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoints" / "ckpt-20.index").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.keras").exists()
    before = RunFolder(tmp_path / "killed").read_history()[:2]
    again = start(records, tmp_path / "killed")
    assert again.wait(240) == whole.wait(240) == 0
    expected, actual = final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed")
    assert len(expected) > 100
    assert expected.keys() == actual.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key])
    columns = ("step", "epoch", "learning_rate", "loss", "top1")
    histories = [RunFolder(tmp_path / name).read_history() for name in ("whole", "killed")]
    assert [[row[c] for c in columns] for row in histories[0]] == [[row[c] for c in columns] for row in histories[1]]
    assert histories[1][:2] == before  # including times: these steps were not repeated


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_loses_no_step(
    finished: RunFolder,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add = History.add

    def stop_at_27(history: History, result: object) -> None:
        add(history, result)  # type: ignore[arg-type]
        if len(history.rows) == 2 and len(history.pending) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(History, "add", stop_at_27)
        train(config_of(records), tmp_path / "run")
    first, error = capsys.readouterr()
    assert "stopped after step 27; run the same command again to resume" in error and "warning: batch-norm" not in error
    run = train(config_of(records), tmp_path / "run")
    assert "resuming from the checkpoint of step 27" in capsys.readouterr().out
    assert "batch norm over groups of 8 clips (1 per step)" in first
    assert [row["step"] for row in run.read_history()] == [10, 20, 27, 30, 40, 50, 60]
    for a, b in zip(x3d_tf.load(finished.root).get_weights(), x3d_tf.load(run.root).get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_during_a_signal_is_in_the_history(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: list[float], number: int
) -> None:
    call, losses = TrainStep.__call__, untrained

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def step_and_signal(step: TrainStep, batches: object, steps: int) -> dict[str, Any]:
        measured = call(step, batches, steps)
        if len(losses) == 13:
            signal.raise_signal(number)  # after the step, before its loss is returned
        return measured

    before = signal.signal(number, stopped)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainStep, "__call__", step_and_signal)
            train(config_of(records), tmp_path / "run")
        assert signal.getsignal(number) is stopped
    finally:
        signal.signal(number, before)
    rows = RunFolder(tmp_path / "run").read_history()
    assert [row["step"] for row in rows] == [10, 13] and len(losses) == 13
    assert rows[1]["loss"] == pytest.approx(np.mean(losses[10:]), rel=1e-6)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [13]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    finished: RunFolder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    save = Checkpoints.save

    def save_on_a_full_disk(checkpoints: Checkpoints, step: int) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if step == 40 else limits[0], limits[1]))
        try:
            save(checkpoints, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with (
        monkeypatch.context() as patch,
        pytest.raises(WriteError, match=r"ckpt-40\.index cannot be written: .* step 20"),
    ):
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        train(config_of(records), tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert files == ["ckpt-20.data-00000-of-00001", "ckpt-20.index"]
    run = train(config_of(records), tmp_path / "run")
    for a, b in zip(x3d_tf.load(finished.root).get_weights(), x3d_tf.load(run.root).get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_checkpoint_falls_back(
    finished: RunFolder,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Records that were moved and other paths do not prevent resuming, either."""
    copy = shutil.copytree(finished.root, tmp_path / "copy")
    (copy / "model.keras").unlink()
    (copy / "checkpoints" / "ckpt-60.data-00000-of-00001").write_bytes(b"damaged")
    shutil.copytree(records, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = train(config_of(Path("moved"), init="gone.keras"), copy)
    assert run.read_config().dataset.records == "moved"
    assert "ckpt-60.index cannot be read" in capsys.readouterr().err
    repeated_rows, rows = run.read_history(), finished.read_history()
    assert repeated_rows[:4] == rows[:4]  # including times: only the steps after 40 were repeated
    assert repeated_rows[4] != rows[4]
    original, repeated = x3d_tf.load(finished.root), x3d_tf.load(run.root)
    for a, b in zip(original.get_weights(), repeated.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_rebuilt_records_do_not_resume_silently(
    finished: RunFolder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moving_square import write_records

    write_records(tmp_path / "same", videos=8)
    write_records(tmp_path / "more", videos=9)
    fingerprints = [Manifest.load(folder).fingerprint() for folder in (records, tmp_path / "same", tmp_path / "more")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    copy = RunFolder(shutil.copytree(finished.root, tmp_path / "copy"))
    copy.model.unlink()
    monkeypatch.setattr(Manifest, "fingerprint", lambda _: fingerprints[2])
    with pytest.raises(ValueError, match=r"was trained on other records than those of DatasetSpec\.records"):
        train(config_of(records), copy.root)


def test_lost_checkpoints_do_not_start_the_run_again(finished: RunFolder, records: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.root, tmp_path / "copy")
    (copy / "model.keras").unlink()
    for path in (copy / "checkpoints").glob("*.index"):
        path.unlink()
    before = sorted(path for path in copy.rglob("*"))
    with pytest.raises(ValueError, match=r"was trained to step 60 \(it has trained\.txt\), but .* has no complete"):
        train(config_of(records), copy)
    assert sorted(path for path in copy.rglob("*")) == before


def test_only_damaged_checkpoints_are_an_error(finished: RunFolder, records: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.root, tmp_path / "copy")
    (copy / "model.keras").unlink()
    for path in (copy / "checkpoints").glob("*.data*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        train(config_of(records), copy)


TWO_DEVICES = """
import sys
from pathlib import Path
from typing import Any
sys.path[:0] = {tests!r}
import numpy as np
import tensorflow as tf
from tqdm import tqdm
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from test_loop import LARGER, config_of
from x3d_tf import ModelOptions
from x3d_tf.training.loop import train
from x3d_tf.config import Recipe
recipe = Recipe(batch=8, reference_batch=8, learning_rate=0.05, steps=5, warmup_fraction=0)
# Of smaller clips the last stages have one position: batch norm over four values makes much of rounding.
model = ModelOptions(dropout=0.0, bn_group=4)
config = config_of(Path({records!r}), expansion=LARGER, recipe=recipe, model=model)
devices = ["CPU:0", "CPU:1"][: {devices}]
train(config, {workdir!r}, strategy=tf.distribute.MirroredStrategy(devices))
"""


@pytest.mark.slow
def test_another_number_of_devices_is_another_run_unless_allowed(records: Path, tmp_path: Path) -> None:
    code = TWO_DEVICES.replace("bn_group=4", "bn_group=8").replace("strategy=", "allow_other_groups=ALLOW, strategy=")
    code = f"ALLOW = '--allow' in sys.argv\n{code}".replace("import sys\n", "", 1)
    code = "import sys\n" + code

    def start(devices: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
        program = code.format(tests=TESTS, records=str(records), workdir=str(tmp_path), devices=devices)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    done = start(1)
    assert done.returncode == 0, done.stderr
    assert "batch norm over groups of 8 clips (1 per step)" in done.stdout
    (tmp_path / "model.keras").unlink()
    done = start(2)
    assert done.returncode != 0
    assert "1 group of 8 clips per step, now 2 groups of 4 clips" in done.stderr
    done = start(2, "--allow")
    assert done.returncode == 0, done.stderr
    assert "warning: batch-norm groups have 4 clips, fewer than ModelOptions.bn_group = 8" in done.stderr


@pytest.mark.slow
def test_two_devices_compute_what_one_does(records: Path, tmp_path: Path) -> None:
    """Batch-norm groups of four clips, on one device with eight clips or on two with four."""
    histories, weights = [], []
    for devices in (1, 2):
        workdir = tmp_path / str(devices)
        code = TWO_DEVICES.format(tests=TESTS, records=str(records), workdir=str(workdir), devices=devices)
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"on {devices} device" in done.stdout
        histories.append(RunFolder(workdir).read_history())
        weights.append(x3d_tf.load(workdir).get_weights())
    assert histories[0][-1]["loss"] == pytest.approx(histories[1][-1]["loss"], rel=1e-3)
    for one, two in zip(*weights):
        np.testing.assert_allclose(two, one, atol=2e-3 * max(1e-2, np.abs(one).max()))


@pytest.mark.slow
def test_real_clips_become_a_model(shared_data: Path, tmp_path: Path) -> None:
    """From video files to predictions, with the commands only."""
    videos = tmp_path / "videos"
    for split in ("set1", "set2"):
        for label in ("kick", "point"):
            (videos / split / label).mkdir(parents=True)
            for path in sorted((shared_data / "ut_interaction" / split / label).glob("*.avi"))[:4]:
                shutil.copy(path, videos / split / label)
    records, run = tmp_path / "records", tmp_path / "run"
    bindings = [f'DatasetSpec.records="{records}"', 'DatasetSpec.train_split="set1"', 'DatasetSpec.eval_split="set2"']
    bindings += ["Expansion.gamma_d=0.2", f"Expansion.gamma_s={32 / 112}", "Expansion.gamma_t=4", "Recipe.steps=4"]
    bindings += ["TrainConfig.test_views=2"]
    commands = [
        ["build_records", f"--videos={videos}", f"--output={records}", "--splits=set1,set2"],
        ["train", "--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin", f"--workdir={run}"]
        + [f"--gin_bindings={binding}" for binding in bindings],
        ["evaluate", f"--run={run}", "--views=1"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", f"x3d_tf.{command[0]}", *command[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "8 videos, 2 classes, 1-Center" in done.stdout
    assert len(Manifest.load(records).split("set1").records) == 8


def test_the_time_left_does_not_count_compiling() -> None:
    bar = tqdm(total=10, initial=2, file=io.StringIO())
    bar.start_t -= 100  # the first step compiles
    bar.last_print_t -= 100
    log: Any = loop._Log(None, None, SimpleNamespace(add=lambda metrics: None), bar, 2)  # type: ignore[arg-type]
    log.add({}, 3, ends_row=False)
    for done in (4, 5, 6):
        bar.start_t -= 1
        log.add({}, done, ends_row=False)
    state = bar.format_dict
    assert (bar.n, state["initial"]) == (6, 3)
    assert 3 <= state["elapsed"] < 50
    assert "?" not in tqdm.format_meter(**state)
