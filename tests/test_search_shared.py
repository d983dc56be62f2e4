"""Trainings that several processes share: claims, results, killed processes. No TensorFlow."""

import json
import os
import re
from pathlib import Path

import pytest
from stub_trainings import SMALL_SEARCH, TINY, Steps, noise

from x3d_tf.files import WriteError
from x3d_tf.locks import Locked, locked
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.search import Search
from x3d_tf.search.shared import MOST_KILLS, SharedTraining


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
    assert shared(tmp_path).result(candidate) is None and not file_of(tmp_path, ".starts").exists()


def test_processes_killed_in_a_row_are_a_failure(candidate: Candidate, tmp_path: Path) -> None:
    training = shared(tmp_path)
    training.log(candidate)
    file_of(tmp_path, ".starts").write_text(f"{MOST_KILLS} at 0\n")  # what killed processes leave
    score = training(candidate)
    assert score.reason == "5 processes were killed in a row while they trained it (out of memory?)"
    assert training.progress(candidate) == 0 and not file_of(tmp_path, ".starts").exists()


@pytest.mark.parametrize("text", [f"{MOST_KILLS - 1} at 0", f"{MOST_KILLS} at 3", "9 at", "x at 0", "\xff" * 200, ""])
def test_other_starts_are_none(text: str, candidate: Candidate, tmp_path: Path) -> None:
    """A checkpoint since then begins a new count."""
    training = shared(tmp_path)
    training.log(candidate)
    file_of(tmp_path, ".starts").write_text(text)
    assert training(candidate) == noise(candidate)


def test_a_start_is_counted_before_it_can_be_killed(candidate: Candidate, tmp_path: Path) -> None:
    seen = []

    class Seen(Steps):
        def __call__(self, candidate: Candidate) -> Score:
            seen.append(file_of(tmp_path, ".starts").read_text())
            return noise(candidate)

    training = SharedTraining(Seen(tmp_path), "this search")
    training.log(candidate)
    file_of(tmp_path, ".starts").write_text("2 at 0")
    training(candidate)
    assert seen == ["3 at 0\n"]


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
    assert score.reason and found and found.reason == score.reason[:10_000]
