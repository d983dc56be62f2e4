"""The expansion search as a command: trainings, files, interruption, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_cluster import local_cluster
from moving_square import write_records

import x3d_tf
from x3d_tf import expand, gin_config, plots
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation.reports import read_report
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.search.candidates import PHASES, Candidate
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import SerialExecutor
from x3d_tf.search.search import Search
from x3d_tf.search.trace import TRACE_NAME
from x3d_tf.search.training import CandidateTraining, candidate_config, candidate_run, open_setup
from x3d_tf.tasks.classification import ClipTask
from x3d_tf.training.history import History
from x3d_tf.training.step import TrainStep

ROOT = Path(__file__).parents[1]
TINY = x3d_tf.Expansion(gamma_tau=1.0, gamma_t=1, gamma_s=32 / 112, gamma_d=0.2)
SETTINGS = """
Expansion.gamma_s = {gamma_s}
Expansion.gamma_d = 0.2
DatasetSpec.records = "{records}"
DatasetSpec.validation_fraction = 0.34
DatasetSpec.flip = False
Recipe.batch = 4
Recipe.reference_batch = 4
Recipe.learning_rate = 0.05
Recipe.steps = 4
TrainConfig.checkpoint_steps = 100
TrainConfig.test_views = 1
ExpandConfig.axes = ("fast", "bottleneck")
ExpandConfig.budget_gmacs = 0.0045
"""
Call = Callable[..., None]


class InProcess(SerialExecutor):
    """Scores candidates in the process of the tests, where TensorFlow is started and its kernels are plain ops."""

    def __init__(self, trainings: list[CandidateTraining]) -> None:
        super().__init__(trainings[0])

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def end(self) -> None:
        pass


class Local:
    """Calls the methods of a training in the process of the tests, but for the latency."""

    def __init__(self, training: CandidateTraining) -> None:
        self._training = training

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "latency":
            return 1.25 * arguments[0].gamma_t
        return getattr(self._training, method)(*arguments)

    def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "ProcessExecutor", InProcess)
    monkeypatch.setattr(expand, "Remote", Local)
    # Eager steps need no trace, and the pictures of a run are tested with the training loop.
    monkeypatch.setattr(TrainStep, "trace", lambda *_: None)
    monkeypatch.setattr(ClipTask, "save_preview", lambda *_: None)
    monkeypatch.setattr(History, "save_plots", lambda *_: None)
    monkeypatch.setattr(plots, "save_confusion", lambda *_, **__: None)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gin file of a search over two steps, whose test split cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "square", videos=12)
    write_records(folder / "others", videos=2)
    train, others = Manifest.load(folder / "square"), Manifest.load(folder / "others")
    shard = others.splits["train"].shards[0]
    (folder / "square" / "test").write_bytes(bytes(shard.bytes))
    test = others.splits["train"].__class__((shard.__class__("test", shard.bytes, ""),), others.splits["train"].records)
    train.splits["test"] = test
    train.save()
    (folder / "tiny.gin").write_text(SETTINGS.format(gamma_s=TINY.gamma_s, records=folder / "square"))
    return folder / "tiny.gin"


@pytest.fixture
def run(in_process: Call, settings: Path) -> Call:
    """Returns a function that runs a search in a work folder, with more bindings and flags."""

    def call(folder: Path, *bindings: str, flags: tuple[str, ...] = ()) -> None:
        given = [f"--gin_bindings={binding}" for binding in bindings]
        in_process(expand, f"--gin_file={settings}", f"--workdir={folder}", *given, *flags)

    return call


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the scores in a trace, without durations."""
    lines = [json.loads(line) for line in (folder / TRACE_NAME).read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines if "score" in line]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of the first search, which the first test fills."""
    return tmp_path_factory.mktemp("runs") / "search"


@pytest.mark.usefixtures("eager")
def test_a_search_of_two_steps(run: Call, finished: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(finished)
    printed = capsys.readouterr().out
    assert "step 1: 2 trainings" in printed and "step 2, 2 of 2: bottleneck, " in printed
    rows = lines_of(finished)
    assert [(row["step"], row["axis"]) for row in rows] == [(s, a) for s in (1, 2) for a in ("fast", "bottleneck")]
    assert all(row["score"] * 4 in range(5) and row["training_score"] is not None for row in rows)
    runs = {path.name[:7]: RunFolder(path) for path in sorted((finished / "candidates").iterdir()) if path.is_dir()}
    configs = [
        json.loads((path / "config.json").read_text())
        for path in sorted(finished.rglob("config.json"), key=str)
        for path in [path.parent]
    ]
    assert len(configs) == 4 and len(runs) == 2
    for config in configs:  # the phase of steps 1 to 7: double batches, half of the steps
        assert (config["ModelOptions.bn_group"], config["Recipe.batch"], config["Recipe.reference_batch"]) == (16, 8, 4)
    reports = [read_report(path.parent).results for path in finished.rglob("results.json")]
    assert [(found["split"], found["samples"], found["views"]) for found in reports] == 4 * [
        ("validation", 4, "1-Center")
    ]
    # One evaluation on the validation split suffices: none in training, unless Recipe.patience is set.
    histories = [RunFolder(path.parent).read_history() for path in finished.rglob("history.csv")]
    assert len(histories) == 4 and not any("validation" in name for rows in histories for row in rows for name in row)
    # Of the losers only histories are kept; the winner of step 2 is the found network.
    assert not [*finished.rglob("ckpt-*")]
    models = [path.parent for path in finished.rglob("model.keras")]
    winner = next(path for path in models if path.parent.name == "candidates")
    assert sorted(models) == sorted([winner, finished / "found"]) and winner.name.startswith("step01")
    assert x3d_tf.load(finished / "found").expansion == RunFolder(finished / "found").read_config().expansion
    assert sorted(path.name for path in (finished / "family").iterdir()) == ["step01.gin", "step02.gin"]
    text = (finished / "report.md").read_text()
    assert "top-1 on the split validation, 4 videos" in text and "## Step 2" in text
    assert " ms  network" in text and f" {1.25 * x3d_tf.load(finished / 'found').expansion.gamma_t:.2f}  x3d(" in text
    assert (finished / "staircase.png").read_bytes().startswith(b"\x89PNG")


def test_the_found_network_is_trained_by_its_gin_file(finished: Path) -> None:
    config = gin_config.parse([str(finished / "found.gin")]).config
    trained = RunFolder(finished / "found").read_config()
    assert trained.dataset.eval_split == "validation" and config.dataset.eval_split == "test"
    assert {name for name, value in config.settings().items() if trained.settings()[name] != value} == {
        "DatasetSpec.eval_split"
    }
    assert gin_config.parse([str(finished / "family" / "step02.gin")]).config == config


def test_a_finished_search_is_left_alone(run: Call, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    run(finished)
    assert capsys.readouterr().out == f"{finished} is already finished ({finished / 'report.md'} exists)\n"
    assert contents(finished) == before


def test_missing_files_of_a_finished_search_are_written_again(run: Call, finished: Path) -> None:
    before = (finished / "report.md").read_text()
    for name in ("report.md", "staircase.png", "family/step01.gin"):
        (finished / name).unlink()
    names = (
        "step02_depth_seed0_0",
        "step03_depth_seed0_0",
    )  # finished, and trained by another process
    for name in names:
        (finished / "candidates" / name / "checkpoints").mkdir(parents=True)
    run(finished)
    assert [(finished / "candidates" / name / "checkpoints").exists() for name in names] == [False, True]
    for name in names:
        shutil.rmtree(finished / "candidates" / name)
    assert (finished / "report.md").read_text() == before
    assert (finished / "family" / "step01.gin").is_file() and (finished / "staircase.png").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_an_interrupted_search_gives_the_same_scores(
    run: Call, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, take = [0], TrainStep.__call__

    def interrupted(step: TrainStep, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 4:  # the second step of the second candidate
            raise KeyboardInterrupt
        return take(step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "search", "ExpandConfig.budget_gmacs=0.0027")
    assert "run the same command again to continue the search in" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "search")) == 1
    run(tmp_path / "search", "ExpandConfig.budget_gmacs=0.0027")
    assert "resuming from the checkpoint of step 1" in capsys.readouterr().out
    assert lines_of(tmp_path / "search") == lines_of(finished)[:2]  # that of one step


@pytest.mark.usefixtures("eager")
def test_a_damaged_last_line_is_scored_again(
    run: Call, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "search"
    shutil.copytree(finished, folder)
    scores = (folder / TRACE_NAME).read_bytes().splitlines(keepends=True)[:5]  # without the latencies
    (folder / TRACE_NAME).write_bytes(b"".join(scores)[:-9])
    run(folder)
    assert "line 5, the last one, is damaged" in capsys.readouterr().err
    assert lines_of(folder) == lines_of(finished)


def test_the_picture_is_drawn_from_the_trace_alone(in_process: Call, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / TRACE_NAME, tmp_path)
    in_process(expand, f"--plot={tmp_path}")
    assert (tmp_path / "staircase.png").read_bytes() == (finished / "staircase.png").read_bytes()


@pytest.mark.usefixtures("eager")
def test_diverging_candidates_fail_with_their_reason(run: Call, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every candidate of step 1 failed \(fast: the loss must be finite, got"):
        axes = "ExpandConfig.axes=('fast',)"
        run(tmp_path / "search", "Recipe.learning_rate=1e30", "Recipe.warmup_fraction=0.0", axes)
    assert all(row["score"] is None for row in lines_of(tmp_path / "search"))


@pytest.mark.usefixtures("eager")
def test_the_plan_estimates_the_duration(run: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "search", flags=("--dry_run",))
    printed = capsys.readouterr().out
    assert "step 1: 2 trainings\naxis" in printed and "X-Bottleneck" in printed
    assert "the paper: 30 trainings to 0.6 GMACs, 6 x (0.04 + 0.08 + 0.15 + 0.30 + 0.60) = 7.02 GMACs" in printed
    assert "to 0.0045 GMACs: 2 steps, 5 trainings, whose clips have 0.02 GMACs in sum" in printed
    # 2 steps of 8 clips; 4 videos, 1 clip each at the end
    assert "each training: 16 clips of the split train, 4 of validation" in printed
    assert "This is an estimate" in printed
    assert not (tmp_path / "search").exists()


@pytest.mark.usefixtures("uncompiled")
def test_a_latency_is_measured(settings: Path, tmp_path: Path) -> None:
    setup = open_setup(gin_config.parse_expand([str(settings)])[0])
    training = CandidateTraining(setup.training, setup.num_classes, setup.metric, tmp_path)
    small, large = training.latency(TINY), training.latency(x3d_tf.Expansion(gamma_t=4, gamma_d=0.2))
    assert 0 < small < large < 60_000


def test_the_published_path_is_printed(in_process: Call, capsys: pytest.CaptureFixture[str]) -> None:
    in_process(expand, "--replay=paper")
    assert "x3d_xxl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["ExpandConfig.budget_gmacs=0.001"], "budget_gmacs must exceed the cost of the start network, 0.001"),
        (
            ["ExpandConfig.budget_gmacs=0.00133", "ExpandConfig.axes=('fast',)"],
            "budget_gmacs must leave room for an expansion of the start network",
        ),
        (["ExpandConfig.axes=('fast', 'dept')"], r"ExpandConfig.axes must have names from .*did you mean depth\?"),
        (
            ["DatasetSpec.validation_fraction=0.0"],
            "has neither of the splits val and validation; set DatasetSpec.validation_split, or hold out .*fraction",
        ),
        (
            ["DatasetSpec.validation_fraction=0.0", 'DatasetSpec.validation_split="test"'],
            "DatasetSpec.validation_split must not be 'test', DatasetSpec.eval_split",
        ),
        (['TrainConfig.init="runs/a"'], "TrainConfig.init must be None for a search"),
        (['ModelOptions.family="efficientnet3d"'], 'ModelOptions.family must be "x3d" for a search'),
        (["ModelOptions.bn_group=4"], "ModelOptions.bn_group must be 8, the default: the regularisation"),
        (["Recipe.batch=12"], r"Recipe.batch must be at most 8, the number of records in split 'train'.*got 24"),
        (["Recipe.steps=0"], "Recipe.steps must be at least 1"),
    ],
)
def test_bad_settings_are_named_before_training(run: Call, tmp_path: Path, bindings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "search", *bindings)
    assert not [*(tmp_path / "search").rglob("*.json*")][1:]  # at most a trace without scores


def test_work_folders_of_something_else_are_left_alone(run: Call, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{tmp_path} exists and is not the folder of a search, with trace.jsonl"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt exists and is not the folder of a search"):
        run(tmp_path / "notes.txt")
    before = contents(finished)
    with pytest.raises(UserError, match=r"line 1 must have the settings of this search, Recipe\.steps = 6"):
        run(finished, "Recipe.steps=6")
    assert contents(finished) == before


def test_flags_that_do_not_go_together(in_process: Call, settings: Path) -> None:
    with pytest.raises(UserError, match="one of --gin_file, --replay and --plot is required, got none"):
        in_process(expand)
    with pytest.raises(UserError, match="got --gin_file and --replay"):
        in_process(expand, f"--gin_file={settings}", "--replay=paper")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ray=nonsense"], "ray must be HOST:PORT, the address of the cluster's head node, got 'nonsense'"),
        (["--ray="], "ray must be HOST:PORT"),
        (
            ["--ray=a:1", "--parallel=2"],
            "at most one of --parallel, --array, --ray may be given, got --parallel and --ray",
        ),
        (["--ray=a:1", "--array"], "got --array and --ray"),
        (["--array", "--parallel=2"], "got --parallel and --array"),
        (["--array", "--dry_run"], "--dry_run measures this machine and cannot be combined with --array"),
        (["--ray=a:1", "--dry_run"], "cannot be combined with --ray"),
        (["--gpus=1"], "--gpus requires --ray"),
    ],
)
def test_processes_are_checked_first(in_process: Call, tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        in_process(expand, f"--gin_file={tmp_path / 'absent.gin'}", *given)


def test_other_numbers_of_threads_are_refused(run: Call, finished: Path) -> None:
    """They round differently."""
    with pytest.raises(UserError, match=r"line 1 must have the settings of this search, cpus = 2 .*, got None"):
        run(finished, flags=("--cpus=2",))
    with pytest.raises(UserError, match=r"cpus = 4 .*, got None"):
        run(finished, flags=("--array",))


@pytest.mark.slow
def test_an_address_without_a_cluster(run: Call, tmp_path: Path) -> None:
    """A port that nobody listens on."""
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"ray: no Ray cluster answers at 127\.0\.0\.1:1 within"):
        run(tmp_path / "search", flags=("--ray=127.0.0.1:1",))


def test_a_candidate_trains_with_its_phase_share_and_seed(settings: Path) -> None:
    config = open_setup(
        gin_config.parse_expand([str(settings)], ["Recipe.steps=100", "TrainConfig.seed=5"])[0]
    ).training
    network = Search(ExpandConfig(budget_gmacs=1.0), TINY).pending()[0].network
    trained = [candidate_config(config, Candidate(network, 2, share, PHASES[i])) for i, share in ((0, 1.0), (2, 0.25))]
    clips = [part.recipe.scaled_steps * part.recipe.batch for part in trained]
    assert clips == [400, 100] and [part.recipe.batch for part in trained] == [8, 4]
    assert [part.recipe.scaled_learning_rate for part in trained] == pytest.approx([0.1, 0.05])
    assert [(part.model.bn_group, part.model.drop_connect) for part in trained] == [(16, 0.0), (8, 0.1)]
    assert {part.seed for part in trained} == {7} and {part.expansion for part in trained} == {network.expansion}


def test_candidates_have_run_folders_of_their_own(settings: Path, tmp_path: Path) -> None:
    config = open_setup(gin_config.parse_expand([str(settings)])[0]).training
    search = Search(ExpandConfig(budget_gmacs=1.0, seeds=2, halving=0.5, keep=2), TINY)
    found = [candidate_run(tmp_path, config, candidate).root for candidate in search.pending()]
    found += [
        candidate_run(tmp_path, config, Candidate(c.network, c.seed, 1.0, c.phase)).root for c in search.pending()
    ]
    assert len(set(found)) == len(found) == 2 * len(search.pending())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_continues(settings: Path, tmp_path: Path, number: int, status: int) -> None:
    """The signal goes to all processes, as from terminals and schedulers, while the second candidate trains."""
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "x3d_tf.expand", f"--gin_file={settings}", f"--workdir={folder}"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    while not [*folder.glob("candidates/*bottleneck*/history.csv")]:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status and "Traceback" not in output
    assert f"stopped; run the same command again to continue the search in {folder}" in output
    assert len(lines_of(folder)) == 1
    done = subprocess.run(command, cwd=ROOT, **options)
    assert done.returncode == 0, done.stdout
    assert len(lines_of(folder)) == 4 and all(line["reason"] is None for line in lines_of(folder))


def cluster_search(settings: Path, folder: Path, *flags: str) -> "subprocess.Popen[str]":
    """Starts a search whose candidates train for some seconds with a checkpoint after each step."""
    bindings = ("Recipe.steps=24", "TrainConfig.checkpoint_steps=1", "ExpandConfig.budget_gmacs=0.0027")  # one step
    given = [f"--gin_bindings={binding}" for binding in bindings]
    command = [sys.executable, "-m", "x3d_tf.expand", f"--gin_file={settings}", f"--workdir={folder}", *given, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The scores of a search on this machine, with one thread for each candidate."""
    folder = tmp_path_factory.mktemp("undisturbed") / "search"
    process = cluster_search(settings, folder, "--cpus=1", "--parallel=2")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return in_order(lines_of(folder))


def in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: (line["step"], line["axis"]))


def wait_for_checkpoint(folder: Path, process: "subprocess.Popen[str]") -> None:
    while not [*folder.glob("candidates/*/checkpoints/ckpt-2.index")]:
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("nodes", "flag", "settings"),
    [(0, None, {}), (2, None, {"gpus": 1}), (2, 2, {"gpus": 2}), (2, 0, {})],
)
def test_the_number_of_gpus_is_a_setting(
    nodes: int, flag: int | None, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = {"NodeID": "0", "Alive": True, "Resources": {"CPU": 4.0, "GPU": float(nodes)}}
    ray = SimpleNamespace(nodes=lambda: [node], remote=lambda **_: lambda function: function)
    monkeypatch.setattr(expand.ray_cluster, "connected", lambda _: nullcontext(ray))
    monkeypatch.setattr(expand, "FLAGS", SimpleNamespace(ray="host:1", array=False, cpus=1, gpus=flag))
    records = SimpleNamespace(records=str(tmp_path))
    run: Any = SimpleNamespace(folder=tmp_path, settings={"cpus": 1}, shared_training=lambda: None)
    run.setup = SimpleNamespace(training=SimpleNamespace(dataset=records))
    with expand._executor(run) as executor:
        assert run.settings == {"cpus": 1, **settings} and executor._gpus == settings.get("gpus", 0)


@pytest.mark.slow
def test_a_search_on_a_cluster_that_loses_a_node(
    settings: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "search"
    with local_cluster(nodes=2) as (cluster, nodes):
        process = cluster_search(settings, folder, f"--ray={cluster.address}", "--cpus=1")
        wait_for_checkpoint(folder, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "was lost and starts again from its last checkpoint" in output
    assert any("resuming from the checkpoint of step" in path.read_text() for path in folder.glob("candidates/*.log"))
    assert in_order(lines_of(folder)) == undisturbed
    assert (folder / "found" / "model.keras").is_file()


@pytest.mark.slow
def test_a_stopped_search_on_a_cluster_continues(
    settings: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "search"
    with local_cluster(nodes=2) as (cluster, _):
        process = cluster_search(settings, folder, f"--ray={cluster.address}", "--cpus=1")
        wait_for_checkpoint(folder, process)
        process.terminate()
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 143 and "Traceback" not in output, output
        assert f"stopped; run the same command again to continue the search in {folder}" in output
        assert not [*folder.glob("candidates/*.kills")]  # the trainings have saved their checkpoints
        process = cluster_search(settings, folder, f"--ray={cluster.address}", "--cpus=1")
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert in_order(lines_of(folder)) == undisturbed


@pytest.mark.slow
def test_an_array_that_loses_a_process(settings: Path, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    """The process that coordinates is killed; the other one takes its place, and a third one joins."""
    folder = tmp_path / "search"
    processes = [cluster_search(settings, folder, "--array", "--cpus=1") for _ in range(2)]
    wait_for_checkpoint(folder, processes[0])
    first = int((folder / ".search.lock").read_text().split()[1])
    (killed,) = [process for process in processes if process.pid == first]
    killed.kill()
    killed.communicate()
    (left,) = [process for process in processes if process.pid != first]
    while f"process {left.pid} " not in (folder / ".search.lock").read_text():  # else a later one may coordinate
        assert left.poll() is None
        time.sleep(0.02)
    other = cluster_search(settings, folder, "--array", "--cpus=1")
    refused = cluster_search(settings, folder, "--array", "--cpus=2")
    assert (
        "must have the settings of this search, cpus = 2 (continue it with its settings), got 1"
        in (refused.communicate()[0])
    )
    outputs = [process.communicate()[0] for process in (left, other)]
    assert [process.returncode for process in (left, other, refused)] == [0, 0, 1], outputs
    assert in_order(lines_of(folder)) == undisturbed
    assert (folder / "report.md").is_file() and (folder / "found" / "model.keras").is_file()


@pytest.mark.slow
def test_two_processes_train_at_a_time(settings: Path, tmp_path: Path) -> None:
    """One is killed: its candidate fails, and the search goes on."""
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "x3d_tf.expand", f"--gin_file={settings}", f"--workdir={folder}", "--parallel=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not [*folder.glob("candidates/step01_bottleneck*/.lock")]:
        assert process.poll() is None
        time.sleep(0.1)
    (lock,) = folder.glob("candidates/step01_bottleneck*/.lock")
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    assert process.wait() == 0
    reasons = {(line["step"], line["axis"]): line["reason"] for line in lines_of(folder)}
    assert reasons.pop((1, "bottleneck")) == "its process ended with status -9 (out of memory?)"
    assert len(reasons) == 3 and not any(reasons.values())
