"""The trace of a search: exact resumption, damage, other settings, full disks. No TensorFlow."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stub_trainings import TINY, noise

from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import SerialExecutor
from x3d_tf.search.loop import drive, load_search, run_search
from x3d_tf.search.reports import family_table, pareto_table
from x3d_tf.search.search import Search
from x3d_tf.search.trace import TRACE_NAME, NotMeasured, follow_trace, open_trace, require_search_folder

CONFIG = ExpandConfig(budget_gmacs=0.03, seeds=2, halving=0.5, keep=2, contraction="all")


def search_in(folder: Path, score: Callable[[Candidate], Score] = noise, **arguments: Any) -> Search:
    config = arguments.pop("config", CONFIG)
    return run_search(folder, config, SerialExecutor(score), TINY, num_classes=4, **arguments)


class Interrupted(BaseException):
    pass


def interrupted_after(count: int) -> Callable[[Candidate], Score]:
    left = [count]

    def score(candidate: Candidate) -> Score:
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return noise(candidate)

    return score


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, bytes]:
    """An uninterrupted search and its trace."""
    folder = tmp_path_factory.mktemp("complete")
    return search_in(folder), (folder / TRACE_NAME).read_bytes()


def refuse(candidate: Candidate) -> Score:
    raise AssertionError(candidate)


def written(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / TRACE_NAME).write_bytes(content)
    return folder


def test_a_line_states_the_candidate_and_its_score(complete: tuple[Search, bytes]) -> None:
    header, *lines = [json.loads(line) for line in complete[1].splitlines()]
    assert header["settings"]["ExpandConfig.budget_gmacs"] == 0.03
    assert header["settings"]["Expansion.gamma_d"] == 0.2
    assert header["settings"]["ModelOptions.se"] == "alternate"
    assert lines[0] == {
        **{"step": 1, "axis": "fast", "contracts": False, "parent": vars(TINY)},
        "factors": vars(Expansion(gamma_tau=16.0, gamma_t=2, gamma_s=32 / 112, gamma_d=0.2)),
        **{"macs": lines[0]["macs"], "ratio": lines[0]["ratio"], "params": lines[0]["params"]},
        **{"seed": 0, "share": 0.5, "bn_group": 16, "batch_factor": 2, "drop_connect": 0.0},
        **{"score": lines[0]["score"], "standard_error": 0.01, "seconds": 1 / 3},
        **{"training_score": lines[0]["training_score"], "reason": None},
    }
    failed = [line for line in lines if line["reason"]]
    assert failed and all(line["score"] is None for line in failed)
    assert any(line["contracts"] for line in lines) and {line["share"] for line in lines} == {0.5, 1.0}


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 30, 62])
def test_an_interrupted_search_gives_the_same_result(
    count: int, complete: tuple[Search, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        search_in(tmp_path, interrupted_after(count))
    asked: list[Candidate] = []
    search = search_in(tmp_path, lambda candidate: [asked.append(candidate), noise(candidate)][1])  # type: ignore[func-returns-value]
    assert len(asked) == len(complete[1].splitlines()) - 1 - count
    assert (search.steps, search.family) == (complete[0].steps, complete[0].family)
    assert (tmp_path / TRACE_NAME).read_bytes() == complete[1]


def test_a_finished_search_scores_nothing(complete: tuple[Search, bytes], tmp_path: Path) -> None:
    search = search_in(written(tmp_path, complete[1]), refuse)
    assert (search.steps, search.family) == (complete[0].steps, complete[0].family)


def test_scores_may_arrive_in_any_order(complete: tuple[Search, bytes], tmp_path: Path) -> None:
    class Shuffled:
        def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
            for candidate in random.Random(len(candidates)).sample(candidates, len(candidates)):
                yield candidate, noise(candidate)

    search = run_search(tmp_path, CONFIG, Shuffled(), TINY, num_classes=4)
    assert (search.steps, search.family) == (complete[0].steps, complete[0].family)
    assert search_in(tmp_path, refuse).family == search.family


def test_an_executor_must_score_something(tmp_path: Path) -> None:
    class Idle:
        def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
            return iter(())

    with pytest.raises(RuntimeError, match="scored no candidate"):
        run_search(tmp_path, CONFIG, Idle(), TINY)


PATHS = (Path(__file__).parent, Path(__file__).parent / "helpers")
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_search_trace import noise, search_in
from x3d_tf.search.config import ExpandConfig

def score(candidate):
    score.count = score.count + 1 if candidate.step == 3 else 0
    if score.count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return noise(candidate)

score.count = 0
search_in(Path(sys.argv[1]), score, config=ExpandConfig(budget_gmacs=0.03))
"""


def test_a_search_killed_in_candidate_4_of_step_3_continues_there(tmp_path: Path) -> None:
    config = ExpandConfig(budget_gmacs=0.03)
    uninterrupted = search_in(tmp_path / "complete", config=config)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), *map(str, PATHS)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    asked: list[tuple[int, int]] = []

    def score(candidate: Candidate) -> Score:
        asked.append((candidate.step, len(asked)))
        return noise(candidate)

    search = search_in(tmp_path / "killed", score, config=config)
    assert (search.steps, search.family) == (uninterrupted.steps, uninterrupted.family)
    traces = [(tmp_path / name / TRACE_NAME).read_bytes() for name in ("complete", "killed")]
    assert traces[0] == traces[1]
    third = [line for line in map(json.loads, traces[0].splitlines()[1:]) if line["step"] == 3]
    assert sum(step == 3 for step, _ in asked) == len(third) - 3


@pytest.mark.parametrize(
    ("tail", "rule"),
    [
        (b'{"step": 1, "axis": "fa', "end with a line break"),
        (b"\0" * 4096, "end with a line break"),
        (b"\0\n", "be a JSON object"),
        (b"\xff\xfe\n", "be a JSON object"),
        (b"\n", "be a JSON object"),
        (b"[" * 100_000 + b"\n", "be a JSON object"),
        (b"7\n", "be a JSON object"),
        (b"9" * 5000 + b"\n", "be a JSON object"),
        (b'{"step": NaN}\n', "be a JSON object"),
        (b'{"step": 1}\n', "have the columns axis"),
        (b'{"latency_ms": -1, "factors": {}}\n', "be a positive number"),
    ],
)
def test_a_damaged_last_line_is_scored_again(
    tail: bytes, rule: str, complete: tuple[Search, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = complete[1].splitlines(keepends=True)
    search = search_in(written(tmp_path, b"".join(lines[:20]) + tail))
    warning = capsys.readouterr().err
    assert f"{TRACE_NAME}, line 21, the last one, is damaged: " in warning and rule in warning
    assert (search.steps, search.family) == (complete[0].steps, complete[0].family)
    assert (tmp_path / TRACE_NAME).read_bytes() == complete[1]


def test_each_torn_end_is_repaired(complete: tuple[Search, bytes], tmp_path: Path) -> None:
    """A crash can leave any beginning of the last line."""
    lines = complete[1].splitlines(keepends=True)
    before = b"".join(lines[:-1])
    for length in range(1, len(lines[-1]), 100):
        search = search_in(written(tmp_path, before + lines[-1][:length]))
        assert search.family == complete[0].family
        assert (tmp_path / TRACE_NAME).read_bytes() == complete[1], length


def edited(line: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(line) | changes).encode() + b"\n"


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (5, lambda line: line[:-9] + b"\n", r"line 5 is damaged: it must be a JSON object with finite numbers"),
        (5, lambda line: b"\n", "line 5 is damaged: it must be a JSON object"),
        (5, lambda line: edited(line, score="0.5"), "line 5 is damaged: Score.value must be float or None, got '0.5'"),
        (5, lambda line: edited(line, score=None, reason=None), "line 5 is damaged: Score.reason must be given"),
        (5, lambda line: edited(line, seconds=-1), "line 5 is damaged: Score.seconds must be at least 0, got -1"),
        (5, lambda line: edited(line, macs=1), "line 5 must hold the score of a candidate that the search asks for"),
        (5, lambda line: edited(line, axis="time"), "line 5 must hold .*'axis': 'time'"),
        (5, lambda line: edited(line, step=10**400), "line 5 must hold|line 5 is damaged"),
        (5, lambda line: edited(line, seed=0), "line 5 must hold .*'seed': 0"),
        (5, lambda line: edited(line, more=1), "line 5 must hold"),
        (5, lambda line: line + line, "line 6 must hold"),
        (5, lambda line: b"", "line 11 must hold"),
        (1, lambda line: b"", r"line 1 must have the format"),
        (1, lambda line: b"?\n", "line 1 must hold the settings of a search: it must be a JSON object"),
        (1, lambda line: edited(line, format="another"), "line 1 must have the format .*, got 'another'"),
        (1, lambda line: edited(line, settings=3), "line 1 must hold the settings of a search"),
        (1, lambda line: edited(line, settings={}), "line 1 must have the settings of this search, .*, got None"),
    ],
)
def test_other_damage_is_an_error(
    number: int, change: Callable[[bytes], bytes], message: str, complete: tuple[Search, bytes], tmp_path: Path
) -> None:
    lines = complete[1].splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    folder = written(tmp_path, b"".join(lines))
    with pytest.raises(UserError, match=f"{TRACE_NAME}, {message}"):
        search_in(folder, refuse)
    assert (tmp_path / TRACE_NAME).read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", [b"", b"\n", b'{"format"'])
def test_a_file_without_settings_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 must hold the settings of a search"):
        search_in(written(tmp_path, content), refuse)
    assert (tmp_path / TRACE_NAME).read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"config": ExpandConfig(budget_gmacs=0.05, seeds=2, halving=0.5, keep=2)}, "ExpandConfig.budget_gmacs"),
        ({"config": ExpandConfig(budget_gmacs=0.03, seeds=3, halving=0.5, keep=2)}, "ExpandConfig.seeds"),
        ({"settings": {"Recipe.steps": 100}}, "Recipe.steps"),
    ],
)
def test_a_trace_of_other_settings_is_not_continued(
    changes: dict[str, Any], name: str, complete: tuple[Search, bytes], tmp_path: Path
) -> None:
    folder = written(tmp_path, complete[1])
    with pytest.raises(UserError, match=rf"{TRACE_NAME}, line 1 must have the settings of this search, {name} = "):
        search_in(folder, refuse, **changes)
    assert (tmp_path / TRACE_NAME).read_bytes() == complete[1]


def test_a_score_is_written_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(ExpandConfig(budget_gmacs=0.03, axes=("fast",)), TINY, num_classes=4)
    with open_trace(tmp_path, {}) as trace, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(WriteError, match="I/O error"):
            drive(search, SerialExecutor(noise), trace)
    assert search.steps == [] and len((tmp_path / TRACE_NAME).read_bytes().splitlines()) == 1


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    def score(candidate: Candidate) -> Score:
        with pytest.raises(UserError, match=r"another process is searching in .*; wait for it, or use another folder"):
            search_in(tmp_path, refuse)
        raise Interrupted

    with pytest.raises(Interrupted):
        search_in(tmp_path, score)


@pytest.mark.parametrize("written_bytes", [0, 100])
def test_a_full_disk_loses_no_earlier_score(
    written_bytes: int, complete: tuple[Search, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = complete[1].splitlines(keepends=True)
    folder, write, room = written(tmp_path, b"".join(lines[:4])), os.write, [written_bytes]

    def full(descriptor: int, content: bytes) -> int:
        if b"process" in bytes(content):  # the text of the lock
            return write(descriptor, content)
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(content)[: room.pop()]) + (room.append(0) or 0)  # type: ignore[func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(WriteError, match=f"{TRACE_NAME} cannot be written: No space left on device"):
            search_in(folder)
    assert (tmp_path / TRACE_NAME).read_bytes() == b"".join(lines[:4])
    assert search_in(folder).family == complete[0].family


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is absent")
def test_a_device_without_space_is_a_write_error(tmp_path: Path) -> None:
    def score(candidate: Candidate) -> Score:
        (tmp_path / TRACE_NAME).unlink(missing_ok=True)
        (tmp_path / TRACE_NAME).symlink_to("/dev/full")
        return noise(candidate)

    with pytest.raises(WriteError, match="cannot be written"):
        search_in(tmp_path, score)


def test_a_deleted_trace_is_not_replaced(tmp_path: Path) -> None:
    """A file without settings could not be continued."""

    def score(candidate: Candidate) -> Score:
        (tmp_path / TRACE_NAME).unlink()
        return noise(candidate)

    with pytest.raises(WriteError, match="No such file"):
        search_in(tmp_path, score)
    assert not (tmp_path / TRACE_NAME).exists()


def test_a_step_without_success_is_an_error_and_scored_again(tmp_path: Path) -> None:
    def out_of_memory(candidate: Candidate) -> Score:
        raise MemoryError(f"no memory for {candidate.axis}\nsecond line")

    config = ExpandConfig(budget_gmacs=0.03)
    message = (
        r"every candidate of step 1 failed \(fast: MemoryError: no memory for fast; spatial: .*\)\. Correct the cause"
    )
    for attempt in (1, 2):
        with pytest.raises(UserError, match=message):
            search_in(tmp_path, out_of_memory, config=config)
        assert len((tmp_path / TRACE_NAME).read_bytes().splitlines()) == 1 + 5 * attempt
    search = search_in(tmp_path, config=config)
    assert search.family == search_in(tmp_path / "another", config=config).family
    assert search_in(tmp_path, refuse, config=config).family == search.family


def test_a_full_disk_is_no_failure_of_a_candidate(tmp_path: Path) -> None:
    def full(candidate: Candidate) -> Score:
        raise WriteError("model.keras cannot be written")

    with pytest.raises(WriteError, match=r"model\.keras"):
        search_in(tmp_path, full)
    assert len((tmp_path / TRACE_NAME).read_bytes().splitlines()) == 1


def test_latencies_are_measured_once(tmp_path: Path) -> None:
    measured: list[Expansion] = []

    def latency(network: Expansion) -> float:
        measured.append(network)
        return network.gamma_t * (1 + network.gamma_s) + 0.01 * len(measured)  # never the same twice

    config = ExpandConfig(budget=12.0, cost="latency")
    with pytest.raises(Interrupted):
        search_in(tmp_path, interrupted_after(8), config=config, latency=latency)
    search = search_in(tmp_path, config=config, latency=latency)
    assert len(measured) == len(set(measured))
    content, count = (tmp_path / TRACE_NAME).read_bytes(), len(measured)
    again = search_in(tmp_path, refuse, config=config, latency=latency)
    assert (again.steps, again.family, len(measured)) == (search.steps, search.family, count)
    assert (tmp_path / TRACE_NAME).read_bytes() == content
    with pytest.raises(UserError, match="a latency must be a positive number of milliseconds, got nan"):
        search_in(tmp_path / "other", config=config, latency=lambda _: float("nan"))


def test_latencies_that_are_no_cost_are_measured_for_the_tables_alone(tmp_path: Path) -> None:
    measured: list[Expansion] = []

    def latency(network: Expansion) -> float:
        measured.append(network)
        return 12.5 * network.gamma_t

    search = search_in(tmp_path, latency=latency)
    assert search.steps == search_in(tmp_path / "without").steps
    results = [result.network.expansion for step in search.steps for result in step.results]
    assert {step.best.network.expansion for step in search.steps} <= set(measured) < set(results)
    assert len(measured) == len(set(measured))
    tables = family_table(search) + pareto_table(search)
    assert tables == family_table(load_search(tmp_path)) + pareto_table(load_search(tmp_path))
    assert " 12.50 " in "\n".join(tables) and "inf" not in "\n".join(tables)
    search_in(tmp_path, refuse, latency=latency)
    assert len(measured) == len(set(measured))


def test_the_rule_needs_training_scores(tmp_path: Path) -> None:
    config = ExpandConfig(budget_gmacs=0.03, regularisation="rule")
    with pytest.raises(UserError, match=r"Score.training must be measured"):
        search_in(tmp_path, lambda _: Score(0.5), config=config)
    assert len((tmp_path / TRACE_NAME).read_bytes().splitlines()) == 1  # the search can be repeated


@pytest.mark.parametrize("count", [0, 7, 40, None])
def test_a_search_is_loaded_from_its_trace(count: int | None, complete: tuple[Search, bytes], tmp_path: Path) -> None:
    lines = complete[1].splitlines(keepends=True)
    content = b"".join(lines if count is None else [*lines[: count + 1], b"{"])
    loaded = load_search(written(tmp_path, content))
    assert loaded.config == CONFIG and loaded.start == TINY
    assert loaded.steps == complete[0].steps[: len(loaded.steps)]
    assert len(loaded.steps) == (len(complete[0].steps) if count is None else {0: 0, 7: 0, 40: 1}[count])
    assert (tmp_path / TRACE_NAME).read_bytes() == content  # not even the damaged end is removed


def test_a_search_of_latencies_is_loaded_from_its_trace(tmp_path: Path) -> None:
    config = ExpandConfig(budget=12.0, cost="latency")
    with pytest.raises(Interrupted):
        search_in(tmp_path, interrupted_after(8), config=config, latency=lambda network: 2.0 * network.gamma_t)
    assert len(load_search(tmp_path).steps) == 1


def test_a_folder_without_a_search_is_an_error(complete: tuple[Search, bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be the folder of a search, with trace\.jsonl"):
        load_search(tmp_path)
    header, rest = complete[1].split(b"\n", 1)
    for changes in ({}, {"ExpandConfig.more": 1}, {"Expansion.gamma_b": -1}, {"num_classes": "4"}):
        settings = json.loads(header)["settings"] | changes if changes else {}
        content = edited(header, settings=settings) + rest
        with pytest.raises(UserError, match=f"{TRACE_NAME}, line 1 must hold the settings of a search"):
            load_search(written(tmp_path, content))


def test_random_damage_is_never_another_exception(tmp_path: Path) -> None:
    search_in(tmp_path, config=ExpandConfig(budget_gmacs=0.006))
    content, generator = (tmp_path / TRACE_NAME).read_bytes(), random.Random(0)
    insertions = (b"9" * 500, b"null", b"true", b"-", b"\n", b"[", b"{}", b'"', b"1e999", b"\0", b"\xff")
    outcomes = set()
    for _ in range(100):
        damaged, place = bytearray(content), generator.randrange(len(content))
        damaged[place : place + generator.choice((0, 1, 100))] = generator.choice(insertions)
        try:
            load_search(written(tmp_path, bytes(damaged)))
            outcomes.add("loaded")
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / TRACE_NAME}, line ")
            outcomes.add("rejected")
    assert outcomes == {"loaded", "rejected"}


def test_a_trace_is_followed_while_it_is_written(
    complete: tuple[Search, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow_trace(tmp_path, {}) is None
    header = json.loads(complete[1].splitlines()[0])["settings"]
    lines = complete[1].splitlines(keepends=True)
    folder = written(tmp_path, b"".join(lines[:4]) + lines[4][:-20])
    trace = follow_trace(folder, header)
    assert trace is not None and trace.scores == 3
    assert capsys.readouterr().err == "" and (folder / TRACE_NAME).read_bytes().endswith(lines[4][:-20])
    with pytest.raises(UserError, match=r"line 1 must have the settings of this search, num_classes = 5 .*, got 4"):
        follow_trace(folder, {**header, "num_classes": 5})
    with pytest.raises(NotMeasured):
        trace.known(TINY)


def test_a_folder_whose_trace_is_being_created_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process creates it after the first look, and then the folder of candidates."""
    list_folder = Path.iterdir

    def creating(folder: Path) -> Iterator[Path]:
        found = list(list_folder(folder))
        (folder / TRACE_NAME).touch()
        (folder / "candidates").mkdir()
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", creating)
    require_search_folder(tmp_path)
    monkeypatch.undo()
    (tmp_path / TRACE_NAME).unlink()
    with pytest.raises(UserError, match="is not the folder of a search"):
        require_search_folder(tmp_path)
