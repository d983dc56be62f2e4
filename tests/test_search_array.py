"""The expansion search by several processes over a shared folder. No TensorFlow."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stub_trainings import SMALL_SEARCH, TINY, Steps, noise

from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.processes import WorkerDied
from x3d_tf.search.array_executor import ArrayExecutor, Follower
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import Remote, SerialExecutor
from x3d_tf.search.loop import identity_of, load_search, run_search
from x3d_tf.search.search import Latency, Search
from x3d_tf.search.shared import MOST_KILLS, SharedTraining
from x3d_tf.search.trace import open_trace

HELPERS = Path(__file__).parent / "helpers"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Returns a function that starts a process of the array."""
    processes: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])}

    def call(*failing: str, seconds: float = 0.2) -> "subprocess.Popen[str]":
        command = [sys.executable, str(HELPERS / "array_process.py"), str(tmp_path / "search"), str(seconds), *failing]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def owner(path: Path) -> int:
    """Returns the id of the process that holds a lock file; 0 without one."""
    try:
        return int(path.read_text().split()[1])
    except (OSError, IndexError):
        return 0


def both_train(folder: Path) -> bool:
    """Returns True if two processes train candidates and have taken steps."""
    owners = {owner(path) for path in folder.rglob("*.claim")} - {0}
    taken = {int(process) for path in folder.rglob("*.steps") for process in path.read_text().split()}
    return len(owners) == 2 and owners <= taken


def coordinator(folder: Path) -> int:
    return owner(folder / ".search.lock")


def require_undisturbed(folder: Path, tmp_path: Path) -> list[list[str]]:
    """Checks the result of a search; returns the processes that took the steps of each candidate."""
    search = load_search(folder)
    expected = run_search(tmp_path / "undisturbed", SMALL_SEARCH, SerialExecutor(noise), TINY, num_classes=4)
    assert (search.steps, search.family) == (expected.steps, expected.family)
    steps = [path.read_text().split() for path in folder.rglob("*.steps")]
    assert len(steps) == 4 and {len(processes) for processes in steps} == {5}  # nothing was done twice
    assert {path.suffix for path in (folder / "candidates").iterdir()} == {".steps", ".log", ".json"}
    return steps


@pytest.mark.slow
def test_processes_divide_the_candidates(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    processes = [start(), start()]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    steps = require_undisturbed(folder, tmp_path)
    assert len({process for taken in steps for process in taken}) == 2
    assert sorted(output.splitlines()[-1] for output in outputs) == ["already finished", "finished"]
    assert "another process is searching in" in "".join(outputs)
    waiting = r"waiting for 1 training of other processes: /.*_seed0\.claim \(process \d+ on [\w.-]+\)\n"
    assert re.search(waiting, "".join(outputs))


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["coordinator", "follower"])
def test_a_killed_process_loses_its_claim(killed: str, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    (tmp_path / "hold").touch()
    processes = {process.pid: process for process in (start(), start())}
    wait_for(lambda: both_train(folder))
    first = coordinator(folder)
    (victim,) = [pid for pid in processes if (pid == first) == (killed == "coordinator")]
    os.kill(victim, signal.SIGKILL)
    (tmp_path / "hold").unlink()
    (left,) = [process for pid, process in processes.items() if pid != victim]
    output = left.communicate(timeout=60)[0]
    assert left.returncode == 0 and output.splitlines()[-1] == "finished", output
    steps = require_undisturbed(folder, tmp_path)
    assert sorted(len(set(taken)) for taken in steps) == [1, 1, 1, 2]  # one candidate changed its process


@pytest.mark.slow
def test_a_stopped_process_saves_its_work(start: Start, tmp_path: Path) -> None:
    """The other one continues the candidate at once, and a third one may join."""
    (tmp_path / "hold").touch()
    processes = [start(), start()]
    folder = tmp_path / "search"
    wait_for(lambda: both_train(folder))
    processes[0].send_signal(signal.SIGTERM)
    (tmp_path / "hold").unlink()
    output = processes[0].communicate(timeout=60)[0]
    assert processes[0].returncode == 143 and "Traceback" not in output, output
    processes.append(start())
    for process in processes[1:]:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
    require_undisturbed(folder, tmp_path)


@pytest.mark.slow
def test_all_processes_end_if_a_round_fails(start: Start, tmp_path: Path) -> None:
    failing = ("depth=raise", "width=SIGKILL")
    processes = [start(*failing), start(*failing)]
    for process in processes:
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 1, output
        assert "error: every candidate of step 1 failed" in output and "depth: ValueError: no depth" in output
        assert "width: 5 processes were killed in a row" in output
    lines = (tmp_path / "search" / "trace.jsonl").read_text().splitlines()
    assert len(lines) == 3  # the process that took over has not repeated the failures


@pytest.mark.slow
def test_processes_repeat_the_failures_of_a_round(start: Start, tmp_path: Path) -> None:
    failing = ("depth=raise", "width=raise")
    assert start(*failing).communicate(timeout=100) and len(load_search(tmp_path / "search").failures) == 2
    repeated = [start(), start()]
    for process in repeated:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
    require_undisturbed(tmp_path / "search", tmp_path)


def test_another_process_writes_the_reports(start: Start, tmp_path: Path) -> None:
    """The coordinator dies between the last score and the reports."""
    processes = [start("end=SIGKILL", seconds=0.05), start("end=SIGKILL", seconds=0.05)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [-signal.SIGKILL, 0], outputs
    assert (tmp_path / "search" / "report.md").exists()


@pytest.mark.parametrize("checkpoints", [True, False])
def test_deaths_count_since_the_last_checkpoint(
    checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (candidate, _) = Search(SMALL_SEARCH, TINY, num_classes=4).pending()
    progress = 0

    def ask(_: Remote, asked: Candidate) -> Score:
        nonlocal progress
        progress += checkpoints
        raise WorkerDied(1)

    monkeypatch.setattr(Remote, "ask", ask)
    monkeypatch.setattr(SharedTraining, "progress", lambda *_: progress)
    executor = ArrayExecutor(SharedTraining(Steps(tmp_path), ""))
    for _ in range(MOST_KILLS):
        assert not executor._ask(candidate)
    if checkpoints:
        assert not executor._ask(candidate)
    else:
        with pytest.raises(UserError, match="the process that trains step01_depth_seed0 cannot be started"):
            executor._ask(candidate)


def test_a_reply_without_a_file_is_not_asked_for_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (candidate, _) = Search(SMALL_SEARCH, TINY, num_classes=4).pending()
    monkeypatch.setattr(Remote, "ask", lambda *_: Score(None, reason="lost"))
    assert not ArrayExecutor(SharedTraining(Steps(tmp_path), ""))._ask(candidate)


def test_candidates_wait_for_latencies_of_the_coordinator(tmp_path: Path) -> None:
    """Without one, other candidates would follow from the trace."""
    config = ExpandConfig(budget=100.0, cost="latency", axes=("depth", "width"), max_steps=1)
    settings = identity_of(config, TINY, ModelOptions(), 4)
    offered: list[Sequence[Candidate]] = []

    class Recording(ArrayExecutor):
        def offer(self, candidates: Sequence[Candidate]) -> None:
            offered.append(candidates)

        def wait(self) -> None:
            pass

    def new_search(latency: Latency) -> Search:
        return Search(config, TINY, num_classes=4, latency=latency)

    follower = Follower(tmp_path, settings, new_search, Recording(SharedTraining(Steps(tmp_path), "")))

    def follows() -> Sequence[Candidate]:
        follower.follow()
        return offered[-1]

    follower.follow()  # there is no trace
    assert follower.first_scores == 0
    with open_trace(tmp_path, settings) as trace:
        assert follows() == ()
        latency = trace.memoised(lambda expansion: 5.0 + expansion.gamma_d)
        latency(TINY)
        assert follows() == ()
        search = new_search(latency)
        assert follows() == search.pending() != ()
        for candidate in search.pending():
            trace.append(candidate, noise(candidate))
        assert follows() == ()
