"""Trainings that several processes share: claims, results, killed processes. No TensorFlow."""

import errno
import functools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from stub_trainings import SMALL_SEARCH, TINY, Steps, noise

from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.locks import Locked, locked
from x3d_tf.search import shared as shared_module
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.executor import SerialExecutor, _reply
from x3d_tf.search.loop import run_search
from x3d_tf.search.search import Search
from x3d_tf.search.shared import MOST_KILLS, SharedTraining

fcntl = pytest.importorskip("fcntl")


def pending() -> tuple[Candidate, ...]:
    return Search(SMALL_SEARCH, TINY, num_classes=4).pending()


@pytest.fixture
def candidate() -> Candidate:
    return pending()[0]


def shared(folder: Path, *failing: tuple[str, str]) -> SharedTraining:
    return SharedTraining(Steps(folder, seconds=0.0, failing=failing), "this search")


def file_of(folder: Path, suffix: str) -> Path:
    return folder / "candidates" / f"step01_depth_seed0{suffix}"


def test_a_result_is_used_by_other_processes(candidate: Candidate, tmp_path: Path) -> None:
    assert shared(tmp_path).result(candidate) is None
    score = shared(tmp_path)(candidate)
    assert score == noise(candidate) == shared(tmp_path).result(candidate)
    assert shared(tmp_path, ("depth", "raise"))(candidate) == score  # not trained again
    assert {path.suffix for path in file_of(tmp_path, "").parent.iterdir()} == {".steps", ".json"}


def test_one_process_at_a_time_trains(candidate: Candidate, tmp_path: Path) -> None:
    training = shared(tmp_path)
    training.log(candidate)
    with (
        locked(file_of(tmp_path, ".claim"), "", ""),
        pytest.raises(Locked, match=r"another process trains step01_depth_seed0 \(process \d+ on .*\); wait for it"),
    ):
        training(candidate)
    assert training.progress(candidate) == 0


def test_an_exception_is_a_failure_until_it_is_forgotten(candidate: Candidate, tmp_path: Path) -> None:
    assert shared(tmp_path, ("depth", "raise"))(candidate).reason == "ValueError: no depth"
    assert shared(tmp_path)(candidate).reason == "ValueError: no depth"
    shared(tmp_path).forget_failures([candidate])
    assert shared(tmp_path)(candidate) == noise(candidate)
    shared(tmp_path).forget_failures([candidate])
    assert shared(tmp_path).result(candidate) == noise(candidate)


def test_a_full_disk_is_no_result(candidate: Candidate, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="checkpoint cannot be written"):
        shared(tmp_path, ("depth", "write"))(candidate)
    assert shared(tmp_path).result(candidate) is None


def test_processes_killed_in_a_row_are_a_failure(candidate: Candidate, tmp_path: Path) -> None:
    training = shared(tmp_path)
    training.log(candidate)
    for _ in range(MOST_KILLS):
        training.count_kill(candidate)
    score = training(candidate)
    assert score.reason == "5 processes were killed in a row while they trained it (out of memory?)"
    assert training.progress(candidate) == 0 and not file_of(tmp_path, ".kills").exists()
    training.count_kill(candidate)  # late
    assert not file_of(tmp_path, ".kills").exists()


@pytest.mark.parametrize("text", [f"{MOST_KILLS - 1} at 0", f"{MOST_KILLS} at 3", "9 at", "x at 0", "\xff" * 200, ""])
def test_other_kills_are_none(text: str, candidate: Candidate, tmp_path: Path) -> None:
    """A checkpoint since then begins a new count."""
    training = shared(tmp_path)
    training.log(candidate)
    file_of(tmp_path, ".kills").write_text(text)
    assert training(candidate) == noise(candidate) and not file_of(tmp_path, ".kills").exists()


def test_kills_that_nobody_sees_are_not_counted(candidate: Candidate, tmp_path: Path) -> None:
    """The whole search was killed: its trainings are not the cause."""
    training = shared(tmp_path, ("depth", "SIGKILL"))
    training.log(candidate)
    for _ in range(MOST_KILLS + 1):
        if (process := os.fork()) == 0:
            training(candidate)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert shared(tmp_path)(candidate) == noise(candidate)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.ESTALE])
def test_errors_of_the_file_system_are_no_failures(
    number: int, candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of the claim, nor those of the result, nor those of the training."""
    training = shared(tmp_path)
    remote_reply = functools.partial(_reply, training, "", [candidate])

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        assert isinstance(remote_reply(), UserError)
    with monkeypatch.context() as patch:
        patch.setattr(shared_module, "read_result", fail)
        assert isinstance(remote_reply(), WriteError)
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "__call__", fail)
        assert isinstance(remote_reply(), WriteError)
    assert shared(tmp_path).result(candidate) is None
    assert remote_reply() == noise(candidate)


def test_a_result_counts_though_its_kills_cannot_be_deleted(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        if path.suffix == ".kills":
            raise OSError(errno.ESTALE, "Stale file handle")
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", fail)
    assert shared(tmp_path)(candidate) == noise(candidate) == shared(tmp_path).result(candidate)


def test_a_result_that_cannot_be_read_now_is_kept(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = shared(tmp_path)(candidate)

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(shared_module, "read_result", fail)
        assert shared(tmp_path).result(candidate) is None
    assert shared(tmp_path).result(candidate) == score


def test_a_damaged_result_is_only_deleted_by_the_process_with_the_claim(candidate: Candidate, tmp_path: Path) -> None:
    training = shared(tmp_path)
    training.log(candidate)
    path = file_of(tmp_path, ".score.json")
    path.write_text("{")
    with locked(training.claim(candidate), "", ""):
        assert training.result(candidate) is None and path.exists()
    assert training.result(candidate) is None and not path.exists()


def test_failures_are_repeated_unless_they_arose_while_this_process_followed(
    candidate: Candidate, tmp_path: Path
) -> None:
    failing = shared(tmp_path, ("depth", "raise"), ("width", "raise"))

    def search(training: SharedTraining, followed: int | None = None) -> Search:
        executor = SerialExecutor(training)
        return run_search(tmp_path, SMALL_SEARCH, executor, TINY, num_classes=4, shared=training, followed=followed)

    for followed in (None, 0, 1):
        with pytest.raises(UserError, match="every candidate of step 1 failed"):
            search(failing if followed is None else shared(tmp_path), followed)
        assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 3
        assert failing.result(candidate) is not None  # not forgotten
    assert search(shared(tmp_path), 2).steps


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"score": 1e999}, "finite"),
        ({"score": "high"}, r"Score\.value must be"),
        ({"score": None}, r"Score\.reason must be given"),
        ({"standard_error": -1}, r"Score\.standard_error must be at least 0"),
        ({"search": "another search"}, "it must be of this search"),
        ({"axis": "width"}, "it must be of the candidate"),
        ({"more": 1}, "it must be of the candidate"),
        ({"padding": "x" * 2**20}, "must have at most 1048576 bytes"),
        ({"latency_ms": 1}, "factors must be"),
        (None, "it must be a JSON object"),
    ],
)
def test_results_are_untrusted(
    edit: dict[str, object] | None,
    message: str,
    candidate: Candidate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    score, path = shared(tmp_path)(candidate), file_of(tmp_path, ".score.json")
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, **edit}) if edit is not None else path.read_text()[:-9])
    assert shared(tmp_path).result(candidate) is None
    printed = capsys.readouterr().err
    assert f"warning: {path} is damaged: " in printed and "its candidate trained again" in printed
    assert re.search(message, printed), printed
    assert not path.exists()
    assert shared(tmp_path)(candidate) == score


def test_a_pipe_in_place_of_a_result_is_removed(candidate: Candidate, tmp_path: Path) -> None:
    training = shared(tmp_path)
    training.log(candidate)
    os.mkfifo(file_of(tmp_path, ".score.json"))
    assert training.result(candidate) is None
    assert training(candidate) == noise(candidate)


def test_a_long_reason_fits_into_the_limit(candidate: Candidate, tmp_path: Path) -> None:
    class Long(Steps):
        def __call__(self, candidate: Candidate) -> Score:
            raise ValueError("\ud800" * 10**6)

    score = SharedTraining(Long(tmp_path), "this search")(candidate)
    found = shared(tmp_path).result(candidate)
    assert found == score and score.reason and len(score.reason) == 1000
