"""Executors of a search: worker processes that die, fail, fill the disk or are stopped. No TensorFlow."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stub_trainings import TINY, noise
from test_search_trace import CONFIG, search_in

from x3d_tf import registry, startup
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.search import executor as executor_module
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import ProcessExecutor, Remote, SerialExecutor, scored
from x3d_tf.search.loop import run_search
from x3d_tf.search.search import Search
from x3d_tf.signals import Terminated


@dataclass(frozen=True)
class Fake:
    """A training that scores at once; axes in `failing` do something else. The training score is the process id."""

    folder: Path
    failing: tuple[tuple[str, str], ...] = ()

    def __call__(self, candidate: Candidate) -> Score:
        action = dict(self.failing).get(candidate.axis, "")
        print(f"training {candidate.axis}")
        if action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
            time.sleep(60)
        if action == "write":
            raise WriteError("checkpoint cannot be written: No space left on device")
        if action == "full":
            raise OSError(28, "No space left on device", "events")
        if action == "raise":
            raise ValueError(f"no {candidate.axis}\nsecond line")
        if action == "sleep":
            (self.folder / f"{os.getpid()}.started").touch()
            time.sleep(60)
        return Score(0.5, training=float(os.getpid()))

    def log(self, candidate: Candidate) -> Path:
        return self.folder / f"{candidate.axis}.log"

    def plugins(self) -> tuple[str, ...]:
        return registry.plugins()

    def double(self, number: int) -> int:
        if number < 0:
            raise KeyError(number)
        return 2 * number


@dataclass(frozen=True)
class Noise:
    """Scores candidates as the tests of the trace do."""

    folder: Path

    def __call__(self, candidate: Candidate) -> Score:
        return noise(candidate)

    def log(self, candidate: Candidate) -> Path:
        return self.folder / "log"


def candidates() -> tuple[Candidate, ...]:
    return Search(ExpandConfig(budget_gmacs=1.0), TINY, num_classes=4).pending()


def scores(executor: ProcessExecutor) -> dict[str, Score]:
    return {candidate.axis: score for candidate, score in executor.scores(candidates())}


def test_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    serial = search_in(tmp_path / "serial")
    with ProcessExecutor([Noise(tmp_path), Noise(tmp_path)]) as executor:
        search = run_search(tmp_path / "parallel", CONFIG, executor, TINY, num_classes=4)
    assert (search.steps, search.family) == (serial.steps, serial.family)


def test_one_process_scores_in_order_and_writes_logs(tmp_path: Path) -> None:
    with ProcessExecutor([Fake(tmp_path)]) as executor:
        found = [*executor.scores(candidates()), *executor.scores(candidates())]
    assert [candidate for candidate, _ in found] == 2 * [*candidates()]
    processes = {score.training for _, score in found}
    assert len(processes) == 1 and processes != {os.getpid()}
    assert (tmp_path / "fast.log").read_text() == 2 * "training fast\n"


def test_processes_are_replaced_before_their_memory_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "TRAININGS_PER_PROCESS", 4)
    with ProcessExecutor([Fake(tmp_path)]) as executor:
        found = [score.training for _, score in [*executor.scores(candidates()), *executor.scores(candidates())]]
    assert [found.count(process) for process in dict.fromkeys(found)] == [4, 4, 2]
    assert not any(Path(f"/proc/{int(process or 0)}").exists() for process in found[:8])


def test_ended_processes_have_exited_and_start_again(tmp_path: Path) -> None:
    with ProcessExecutor([Fake(tmp_path)]) as executor:
        first = {int(score.training or 0) for score in scores(executor).values()}
        executor.end()
        assert len(first) == 1 and not Path(f"/proc/{first.pop()}").exists()
        assert len(scores(executor)) == len(candidates())


def test_a_killed_process_is_a_failure_of_its_candidate(tmp_path: Path) -> None:
    failing = (("spatial", "SIGKILL"), ("width", "raise"))
    with ProcessExecutor([Fake(tmp_path, failing)]) as executor:
        found = scores(executor)
    assert found["spatial"].reason == "its process ended with status -9 (out of memory?)"
    assert found["width"].reason == "ValueError: no width"
    assert [axis for axis, score in found.items() if score.reason] == ["spatial", "width"]
    assert found["fast"].training != found["depth"].training == found["bottleneck"].training  # a new process


@pytest.mark.parametrize(
    ("action", "message"),
    [("write", "checkpoint cannot be written"), ("full", "events cannot be read or written: No space")],
)
def test_a_full_disk_stops_the_search(action: str, message: str, tmp_path: Path) -> None:
    training = Fake(tmp_path, (("spatial", action),))
    with pytest.raises(WriteError, match=message), ProcessExecutor([training]) as executor:
        scores(executor)
    with pytest.raises(WriteError, match=message):
        [*SerialExecutor(training).scores(candidates())]


@pytest.mark.parametrize("kind", ["link", "pipe", "pipe with a reader"])
def test_output_only_goes_to_regular_files(kind: str, tmp_path: Path) -> None:
    """A pipe would wait for a reader."""
    path, target = tmp_path / "spatial.log", tmp_path / "precious"
    target.write_text("precious")
    if kind == "link":
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    if kind == "pipe with a reader":
        os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with (
        pytest.raises(WriteError, match=r"spatial\.log cannot be written"),
        ProcessExecutor([Fake(tmp_path)]) as executor,
    ):
        scores(executor)
    assert target.read_text() == "precious"


def test_a_stopped_process_stops_the_search(tmp_path: Path) -> None:
    """Schedulers send SIGTERM to all processes: none of the candidates has failed."""
    training = Fake(tmp_path, (("spatial", "SIGTERM"),))
    with ProcessExecutor([training]) as executor, pytest.raises(Terminated):
        scores(executor)


def test_errors_of_the_caller_stop_the_processes(tmp_path: Path) -> None:
    training = Fake(tmp_path, (("spatial", "sleep"), ("depth", "sleep")))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ProcessExecutor([training, training]) as executor:
        for _ in executor.scores(candidates()):
            while not [*tmp_path.glob("*.started")]:
                time.sleep(0.01)
            raise KeyboardInterrupt
    assert time.monotonic() - started < 30  # the trainings would sleep for a minute
    assert not any(Path(f"/proc/{path.stem}").exists() for path in tmp_path.glob("*.started"))


def test_a_remote_method_returns_its_result(tmp_path: Path) -> None:
    remote = Remote(Fake(tmp_path))
    assert remote.call("double", 4) == 8
    with pytest.raises(UserError, match="double: KeyError: -1"):
        remote.call("double", -1)
    remote.stop()
    with pytest.raises(UserError, match="its process ended with status 143"):
        remote.call("double", 4)


def test_processes_load_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fixtures"))
    registry.load_plugin("toy_dataset")
    remote = Remote(Fake(tmp_path))
    assert remote.call("plugins") == ("toy_dataset",)
    remote.stop()


ORPHAN = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_search_executor import Fake, candidates
from x3d_tf.search.executor import ProcessExecutor

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for candidate, score in ProcessExecutor([Fake(folder, (("spatial", "sleep"),))]).scores(candidates()):
        while not [*folder.glob("*.started")]:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is absent")
def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Otherwise they would lock the run folders of a search that continues."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent / "helpers")]
    assert subprocess.run([sys.executable, str(script), str(tmp_path), *paths]).returncode == -signal.SIGKILL
    (started,) = tmp_path.glob("*.started")
    end = time.monotonic() + 20
    while Path(f"/proc/{started.stem}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{started.stem}").exists()


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, BrokenPipeError])
@pytest.mark.parametrize("call", ["recv", "send"])
def test_a_process_whose_parent_was_killed_ends_without_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], call: str
) -> None:
    monkeypatch.setattr(executor_module.signals, "install_stop_handlers", lambda: None)
    monkeypatch.setattr(executor_module.tqdm, "set_lock", lambda _: None)

    def fail(*_: object) -> None:
        raise error

    pipe = SimpleNamespace(recv=lambda: ("double", 2), send=lambda _: None)
    setattr(pipe, call, fail)
    executor_module._serve(pipe, Fake(tmp_path), startup.mode(), ())


def test_a_failure_names_the_exception_unless_the_message_is_ours() -> None:
    def fails(error: Exception) -> Any:
        def score(candidate: Candidate) -> Score:
            raise error

        return scored(score, candidates()[0]).reason

    assert fails(MemoryError("too large\nmore")) == "MemoryError: too large"
    assert fails(UserError("the loss must be finite, got nan")) == "the loss must be finite, got nan"
