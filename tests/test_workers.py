"""Training by two workers on this machine, in processes of their own."""

import csv
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from video_fixtures import noise_video, write_records
from workers import TrainingWorkers

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.gin_config import parse
from x3d_tf.runs.checkpoints import checkpoint_steps
from x3d_tf.training import loop
from x3d_tf.training.cluster import Cluster
from x3d_tf.training.loop import train
from x3d_tf.training.workers import Workers

# one block per stage; a step has two batch-norm groups, one for each worker
SETTINGS: dict[str, Any] = {
    "Expansion.gamma_tau": 1,
    "Expansion.gamma_t": 2,
    "Expansion.gamma_s": 32 / 112,
    "Expansion.gamma_b": 1,
    "Expansion.gamma_d": 0.2,
    "DatasetSpec.flip": False,
    "Recipe.batch": 4,
    "Recipe.reference_batch": 4,
    "ModelOptions.bn_group": 2,
    "ModelOptions.dropout": 0.0,
    "Recipe.learning_rate": 0.01,
    "Recipe.steps": 6,
    "TrainConfig.checkpoint_steps": 3,
    "TrainConfig.test_views": 1,
}
VALIDATION: dict[str, Any] = {
    "DatasetSpec.validation_split": "val",
    "Recipe.patience": 3,
    "Recipe.ema": 0.9,
    "Recipe.precise_bn_batches": 2,
}
PLATEAU: dict[str, Any] = {
    "DatasetSpec.validation_split": "val",
    "Recipe.schedule": "plateau",
    "Recipe.plateau_validations": 1,
    "Recipe.steps": 12,
}
ACCUMULATION: dict[str, Any] = {
    "Recipe.batch": 8,
    "Recipe.reference_batch": 8,
    "Execution.accumulation": 2,
    "Execution.steps_per_execution": 2,
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "noise"
    splits = {"train": range(12), "val": range(12, 16), "test": range(16, 18)}
    write_records(
        folder, {name: [noise_video(number, 10) for number in videos] for name, videos in splits.items()}, classes=2
    )
    return folder


def flags(folder: Path, records: Path, run: Path, **changes: Any) -> list[str]:
    """Writes the configuration of a run, and returns the flags of the command that trains it."""
    file = folder / f"{len(list(folder.glob('*.gin')))}.gin"
    settings = {**SETTINGS, "DatasetSpec.records": str(records), **changes}
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    return [f"--gin_file={file}", f"--workdir={run}"]


def config_of(words: list[str]) -> TrainConfig:
    return parse([words[0].partition("=")[2]], []).config


def rows(run: Path) -> list[dict[str, str]]:
    """Returns the history of a run without the speed."""
    with (run / "history.csv").open(newline="") as file:
        return [
            {name: text for name, text in row.items() if name != "clips_per_second"} for row in csv.DictReader(file)
        ]


def weights(run: Path) -> list[np.ndarray]:
    return x3d_tf.load(run).get_weights()


def train_together(words: list[str]) -> list[tuple[int, str, str]]:
    with TrainingWorkers(words, words) as workers:
        return workers.wait()


@pytest.mark.parametrize(
    "changes",
    [
        {"Recipe.ema": 0.9},
        pytest.param(VALIDATION, marks=pytest.mark.slow),
        pytest.param(PLATEAU, marks=pytest.mark.slow),
        pytest.param(ACCUMULATION, marks=pytest.mark.slow),
    ],
    ids=["EMA", "early stopping, EMA and precise batch norm", "plateau", "accumulation"],
)
def test_two_workers_equal_one(records: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for status, _, errors in train_together(flags(tmp_path, records, two, **changes)):
        assert status == 0, errors
    train(config_of(flags(tmp_path, records, one, **changes)), one)
    assert_equal_weights(two, one, statistics="Execution.accumulation" not in changes)
    names = ("step", "epoch", "learning_rate", "loss", "top1")
    for row, other in zip(rows(two), rows(one), strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose([float(row[n]) for n in names], [float(other[n]) for n in names], rtol=1e-5)
    of_command = {"evaluation", "config.gin", "operative_config.gin", "recipe.json"}
    assert {path.name for path in two.iterdir()} - of_command == {path.name for path in one.iterdir()}


def assert_equal_weights(actual: Path, expected: Path, *, statistics: bool) -> None:
    """Compares the networks of two runs up to another order of sums.

    The statistics of batch norm depend on the order in which the micro-batches of a step are processed.
    """
    ours, theirs = x3d_tf.load(actual), x3d_tf.load(expected)
    for weight, other in zip(ours.weights, theirs.weights, strict=True):
        if statistics or weight.trainable:
            np.testing.assert_allclose(weight.numpy(), other.numpy(), rtol=1e-5, atol=2e-5, err_msg=weight.path)


@pytest.mark.parametrize(
    ("change", "name", "values"),
    [
        ({"Recipe.learning_rate": 0.02}, "Recipe.learning_rate", (0.01, 0.02)),
        pytest.param({"Recipe.batch": 3}, "Recipe.batch", (4, 3), marks=pytest.mark.slow),
    ],
)
def test_workers_with_other_settings_are_refused(
    records: Path, tmp_path: Path, change: dict[str, Any], name: str, values: tuple[float, float]
) -> None:
    ours, theirs = (flags(tmp_path, records, tmp_path / "run", **changes) for changes in ({}, change))
    with TrainingWorkers(ours, theirs) as workers:
        ended = workers.wait()
    for status, _, errors in ended:
        assert status == 1
        assert re.fullmatch(
            rf"error: {name} must be the same on all workers: worker 0 \(127.0.0.1:[0-9]+\) has {values[0]}, worker 1 "
            rf"\(127.0.0.1:[0-9]+\) has {values[1]}\. Start all workers with the same command, records and versions",
            errors.splitlines()[-1],
        )
    assert not (tmp_path / "run").exists()


def test_workers_with_other_versions_are_refused(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(flags(tmp_path, records, tmp_path / "run"))
    ours = loop._identity(config, allow_other_groups=False, validates=True)
    theirs = {**ours, "the version of TensorFlow": "2.20.0"}
    workers = Workers(tf.distribute.get_strategy(), Cluster(("one:1", "two:1"), 0))
    monkeypatch.setattr(workers, "gather", lambda content: [content, theirs])
    message = rf"the version of TensorFlow must be .* worker 0 \(one:1\) has '{tf.__version__}', .* has '2\.20\.0'"
    with pytest.raises(UserError, match=message):
        workers.require_equal(lambda: ours)


@pytest.mark.slow
def test_workers_with_other_records_are_refused(records: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    write_records(
        others, {name: [noise_video(n, 12) for n in range(12)] for name in ("train", "val", "test")}, classes=2
    )
    ours, theirs = (flags(tmp_path, folder, tmp_path / "run") for folder in (records, others))
    with TrainingWorkers(ours, theirs) as workers:
        for status, _, errors in workers.wait():
            assert status == 1 and "the fingerprint of DatasetSpec.records must be the same on all workers" in errors


# TensorFlow itself takes a single device of a CPU.
DEVICES = """
import sys
import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from x3d_tf.errors import UserError
from x3d_tf.training.cluster import cluster_from_environment
from x3d_tf.training.workers import start_workers
count = int(sys.argv[1])
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
CollectiveAllReduceExtended._initialize_local_devices = lambda self, resolver, worker: (
    tuple(f"{worker}/device:CPU:{number}" for number in range(count)), "CPU"
)
try:
    start_workers(cluster_from_environment())
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_workers_with_other_numbers_of_devices_are_refused() -> None:
    """Their collective operations would wait for each other forever."""
    with TrainingWorkers(["1"], ["2"], program=("-c", DEVICES)) as workers:
        for _, out, _ in workers.wait():
            assert out.startswith("the number of devices must be the same on all workers: worker 0 (127.0.0.1:")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_worker_that_waits_for_the_others_can_be_stopped(
    records: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    words = flags(tmp_path, records, tmp_path / "run")
    with TrainingWorkers(words, words) as workers:
        workers.processes[1].kill()
        while "waiting for all 2 workers" not in workers.errors(0):
            assert workers.processes[0].poll() is None
            time.sleep(0.05)
        time.sleep(1)  # the line is printed before the first attempt to reach the others
        workers.processes[0].send_signal(number)
        assert workers.wait()[0][0] == status


@pytest.mark.slow
def test_a_batch_that_the_workers_do_not_divide(records: Path, tmp_path: Path) -> None:
    for status, _, errors in train_together(flags(tmp_path, records, tmp_path / "run", **{"Recipe.batch": 3})):
        assert status == 1 and "Recipe.batch must be a multiple of the number of devices, 2" in errors


def wait_for(path: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        assert time.monotonic() < started + 200, path
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_all_and_they_resume_exactly(records: Path, tmp_path: Path, victim: int) -> None:
    """The result is that of the uninterrupted run, bit for bit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"Recipe.steps": 30, "TrainConfig.checkpoint_steps": 6}
    assert [status for status, _, _ in train_together(flags(tmp_path, records, whole, **changes))] == [0, 0]
    words = flags(tmp_path, records, run, **changes)
    with TrainingWorkers(words, words) as workers:
        wait_for(run / "checkpoints" / "ckpt-6.index")
        workers.processes[victim].kill()
        ended = workers.wait()
    status, _, errors = ended[1 - victim]
    assert ended[victim][0] == -signal.SIGKILL and status == 1
    assert re.fullmatch(
        rf"error: worker {victim} \(127.0.0.1:[0-9]+\) of TF_CONFIG has ended or cannot be reached; see its "
        r"own error\. Start all workers again with the same command: training resumes from its last checkpoint",
        errors.splitlines()[-1],
    )
    ended = train_together(words)
    assert [status for status, _, _ in ended] == [0, 0]
    assert re.search(r"resuming from the checkpoint of step (6|12|18|24)\b", ended[0][1])
    for actual, expected in zip(weights(run), weights(whole), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert rows(run) == rows(whole)
    ended = train_together(words)  # a finished run
    assert [status for status, _, _ in ended] == [0, 0] and "is already finished" in ended[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_one_worker_stops_all_after_the_same_step(
    records: Path, tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = flags(tmp_path, records, run, **{"Recipe.steps": 3000, "TrainConfig.checkpoint_steps": 1000})
    with TrainingWorkers(words, words) as workers:
        wait_for(run / "history.csv")
        while len(rows(run)) < 2:
            time.sleep(0.05)
        os.kill(workers.processes[victim].pid, number)
        ended = workers.wait()
    assert ended[victim][0] == 128 + number and ended[1 - victim][0] == 143
    (step,) = checkpoint_steps(run / "checkpoints")
    assert step % 10 == 0 and f"stopped after step {step}; run the same command again to resume" in ended[0][2]
    assert int(rows(run)[-1]["step"]) == step
