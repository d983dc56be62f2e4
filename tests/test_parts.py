"""Builds in parts: any order, interruptions, conflicts between processes, and missing parts."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from counted_decoding import SLOW, build, content, count_decoding, stop_at, write_texts
from video_fixtures import numbered_frames, write_video

from x3d_tf.build_records import part_summary, summary
from x3d_tf.data.building import builder, state
from x3d_tf.data.building.builder import BuildResult, PartResult, build_part, build_records, finish_records
from x3d_tf.data.building.state import BuildFolder, Part, open_build
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.datasets.folder import find_videos
from x3d_tf.errors import UserError
from x3d_tf.files import read_limited
from x3d_tf.locks import is_locked

SHARDS = [f"train-0000{number}-of-00003.tfrecord" for number in range(3)] + ["test-00000-of-00001.tfrecord"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "in")


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_decoding(monkeypatch)


def part_of(videos: Path, output: Path, number: int, total: int, **options: Any) -> PartResult:
    return build_part(Inputs(videos=videos), output, (number, total), progress=False, **options)


def finish(videos: Path, output: Path, **options: Any) -> BuildResult:
    return finish_records(Inputs(videos=videos), output, progress=False, **options)


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opened(output: Path, videos: Path, part: Part | None, quality: int = 95) -> Any:
    """Returns a context in which another process builds a part, or all shards."""
    return open_build(output, {"quality": quality}, find_videos(videos), [], part=part)


@pytest.mark.parametrize("order", [(1,), (2, 1), (3, 1, 2), (4, 3, 2, 1), (5, 3, 7, 1, 2, 4, 6)])
def test_parts_give_the_bytes_of_one_process(
    videos: Path, decoding: list[str], tmp_path: Path, order: tuple[int, ...]
) -> None:
    one = build(videos, tmp_path / "one")
    decoding.clear()
    output, total = tmp_path / "parts", len(order)
    for number in order:
        before = set(output.glob("*.tfrecord"))
        result = part_of(videos, output, number, total)
        assert {path.name for path in set(output.glob("*.tfrecord")) - before} == set(SHARDS[number - 1 :: total])
        assert (result.part, result.shards, result.to_retry) == ((number, total), len(SHARDS[number - 1 :: total]), 0)
        assert not (output / "manifest.json").exists() and not (output / "failures.csv").exists()
    assert len(decoding) == 6
    result = finish(videos, output)
    assert (result.manifest.splits, result.failures, result.was_finished) == (one.manifest.splits, 2, False)
    assert all_files(output) == all_files(tmp_path / "one")
    assert len(decoding) == 6
    assert finish(videos, output).was_finished and part_of(videos, output, 1, total).was_finished


def test_a_part_tells_its_progress(
    videos: Path, decoding: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part_of(videos, tmp_path / "out", 2, 2)
    result = build_part(Inputs(videos=videos), tmp_path / "out", (1, 2))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "shards" in line] == [f"part 1 of 2: {number} of 2 shards" for number in (1, 2)]
    build_part(Inputs(videos=videos), tmp_path / "out", (1, 2))
    assert "part 1 of 2: 2 of 2 shards exist already" in capsys.readouterr().out
    assert part_summary(result) == [
        "part 1 of 2: all of its 2 shards are finished",
        *(["  skipped: 1 video; --finish lists the reasons in failures.csv"] if result.failures else []),
        "When all parts are finished, run the same command with --finish instead of --part.",
    ]


def test_a_part_interrupted_anywhere_resumes(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(videos, tmp_path / "one")
    expected = all_files(tmp_path / "one")
    stops = 0
    for number, before in itertools.product(range(100), (True, False)):
        output = tmp_path / f"{number}{before}"
        restore = stop_at(monkeypatch, number, before)
        try:
            part_of(videos, output, 1, 2)
            break
        except KeyboardInterrupt:
            stops += 1
        finally:
            restore()
        noted = {path.stem for path in output.glob(".build/*.json")}
        decoding.clear()
        part_of(videos, output, 1, 2)
        assert len(decoding) == sum(len(SHARDS[::2]) - 1 for _ in set(SHARDS[::2]) - noted) + (SHARDS[0] not in noted)
        part_of(videos, output, 2, 2)
        finish(videos, output)
        assert all_files(output) == expected
    assert stops >= 2 * (2 + 2 * 5)  # build.json and the number of parts; five renamed files for each shard


def test_finish_lists_what_is_missing(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"output: .*out holds no build; build its parts before --finish, with --part"):
        finish(videos, output)
    assert not output.exists()
    part_of(videos, output, 2, 3)
    message = (
        rf"lacks 3 shards of 4: {SHARDS[0]}, {SHARDS[2]}, {SHARDS[3]}\. Run the same command with --part=1/3, "
        "--part=3/3 instead of --finish, then with --finish again"
    )
    before = all_files(output)
    with pytest.raises(UserError, match=message):
        finish(videos, output)
    assert all_files(output) | {".build/lock": b""} == before
    (output / ".build" / "parts").unlink()
    with pytest.raises(UserError, match="Run the same command with --part, or without it instead of --finish"):
        finish(videos, output)
    part_of(videos, output, 1, 3)
    (output / ".build" / "parts").write_text("0")
    with pytest.raises(UserError, match="lacks 1 shard of 4"):
        finish(videos, output)
    build(videos, output)  # a complete build resumes what parts have left
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "one")


def test_finish_with_other_settings(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    with opened(tmp_path / "out", videos, Part(1, 2)):
        pass  # nothing was finished
    for options in ({}, {"quality": 80}):
        with pytest.raises(UserError, match="holds a build with dataset = None"):
            finish(videos, tmp_path / "out", **options)


@pytest.mark.parametrize("part", [(5, 4), (0, 4), (-1, 4), (0, 0)])
def test_numbers_of_parts(videos: Path, tmp_path: Path, part: tuple[int, int]) -> None:
    message = rf"part must be K/N with 1 <= K <= N, such as 3/16, got '{part[0]}/{part[1]}'"
    with pytest.raises(UserError, match=message):
        build_part(Inputs(videos=videos), tmp_path / "out", part)
    assert not (tmp_path / "out").exists()


def test_processes_that_would_build_the_same_shards(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    part_of(videos, output, 3, 3)
    identity = build_identity(videos)
    with open_build(output, identity, find_videos(videos), [], part=Part(1, 3)):
        before = all_files(output)
        with pytest.raises(
            UserError, match=r"is building part 1 of 3 into .*out \(process \d+ on .*\); wait for it, or"
        ):
            part_of(videos, output, 1, 3)
        message = (
            r"is building part 1 of 3 into .*out; all parts .* must be parts of 3, not of 2\. Wait for it, or use its"
        )
        with pytest.raises(UserError, match=message):
            part_of(videos, output, 2, 2)
        for other in (build, finish):
            with pytest.raises(UserError, match=r"another process is building part 1 of 3 into .*out; wait for it"):
                other(videos, output)
        assert all_files(output) == before
        part_of(videos, output, 2, 3)  # at the same time
    with open_build(output, identity, find_videos(videos), []):
        for number, total in ((1, 3), (1, 2)):
            with pytest.raises(UserError, match=r"is building all shards of .*out, or finishes them \(process \d+ on"):
                part_of(videos, output, number, total)
        for other in (build, finish):
            with pytest.raises(UserError, match=r"another process is building into .*out \(process \d+ on"):
                other(videos, output)
    decoding.clear()
    part_of(videos, output, 1, 2)  # a new number of parts resumes what others have finished
    part_of(videos, output, 2, 2)
    assert len(decoding) == 2 + 1
    finish(videos, output)


def build_identity(videos: Path) -> dict[str, Any]:
    return builder.plan_build(Inputs(videos=videos), progress=False).identity


def test_parts_that_start_at_the_same_time(videos: Path, tmp_path: Path) -> None:
    """All parts that run have the settings in build.json, whichever came first."""
    total, output = 8, tmp_path / "out"
    start, attempted = threading.Barrier(total), threading.Barrier(total)
    running: list[int] = []
    refused: list[str] = []

    def start_part(number: int) -> None:
        quality = 80 + number % 2
        with ExitStack() as stack:
            start.wait(60)
            try:
                stack.enter_context(opened(output, videos, Part(number, total), quality))
                running.append(quality)
            except UserError as error:
                refused.append(str(error))
            attempted.wait(60)

    threads = [threading.Thread(target=start_part, args=(number + 1,)) for number in range(total)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(running) == len(refused) == total / 2 and len(set(running)) == 1
    assert f'"quality": {running[0]}' in (output / "build.json").read_text()
    assert all(f"holds a build with quality = {running[0]}, not" in message for message in refused)


def test_parts_with_other_settings_or_videos(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    part_of(videos, output, 1, 2)
    with pytest.raises(UserError, match="holds a build with quality = 95, not 80"):
        part_of(videos, output, 2, 2, quality=80)
    (videos / "test" / "run" / "6").write_text("new")
    with pytest.raises(UserError, match="holds a build of other videos: test/run/6 of split test is new"):
        part_of(videos, output, 2, 2)
    (videos / "test" / "run" / "6").unlink()
    part_of(videos, output, 2, 2)
    finish(videos, output)
    with opened(tmp_path / "new", videos, Part(1, 2)):  # which has no finished shard yet
        before = all_files(tmp_path / "new")
        with pytest.raises(UserError, match="holds a build with dataset = None, not 'folder'"):
            part_of(videos, tmp_path / "new", 2, 2)
        assert all_files(tmp_path / "new") == before
    part_of(videos, tmp_path / "new", 2, 2)  # replaces it, as a complete build would


def test_files_of_other_parts(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_build(output, build_identity(videos), find_videos(videos), [], part=Part(1, 3)) as folder:
        unfinished = folder.work / f".{SHARDS[0]}.partial"
        unfinished.touch()
        killed = [output / ".build" / f"work-part-{number}-of-3-killed" for number in (2, 3)]
        for path in killed:
            path.mkdir()
            (path / SHARDS[0]).touch()
        part_of(videos, output, 2, 3)
        assert unfinished.exists() and [path.exists() for path in killed] == [False, True]
    part_of(videos, output, 3, 3)
    part_of(videos, output, 1, 3)
    (output / ".build" / "work-all-killed").mkdir()
    (output / ".build" / "part-9-of-9.lock").touch()
    finish(videos, output)
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "one")
    assert not [path for path in output.rglob("*") if "work-" in path.name or path.suffix in (".lock", ".partial")]


def test_two_processes_that_build_a_shard_without_working_locks(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems whose locks do not reach other machines."""
    monkeypatch.setattr("x3d_tf.locks._lock", lambda *_, **__: True)
    write = builder.write_shard

    def write_after_another(folder: BuildFolder, *arguments: Any) -> Any:
        if not (tmp_path / "out" / "train-00000-of-00003.tfrecord").exists():
            monkeypatch.setattr(builder, "write_shard", write)
            (folder.work / f".{SHARDS[0]}.partial").touch()
            part_of(videos, tmp_path / "out", 1, 1)
        return write(folder, *arguments)

    monkeypatch.setattr(builder, "write_shard", write_after_another)
    with pytest.raises(UserError, match=r"cannot be written: .*No such file or directory"):
        part_of(videos, tmp_path / "out", 1, 1)  # the other one takes it for killed
    finish(videos, tmp_path / "out")
    build(videos, tmp_path / "one")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "one")


def test_videos_that_took_too_long_are_retried_by_their_part(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    SLOW.add("5")
    SLOW.add("4")
    first = [part_of(videos, output, number, 2) for number in (1, 2)]
    assert sum(result.to_retry for result in first) == 2
    SLOW.remove("4")
    with pytest.raises(UserError, match=r"no video of split test can be read .* build the parts again, then finish"):
        finish(videos, output)
    SLOW.clear()
    assert sum(part_of(videos, output, number, 2).to_retry for number in (1, 2)) == 0
    assert finish(videos, output).to_retry == 0
    SLOW.add("1")
    part_of(videos, tmp_path / "late", 1, 1)
    late = finish(videos, tmp_path / "late")
    assert late.to_retry == 1
    text = (
        "of these, 1 video exceeded --timeout or changed while being read; build the parts and --finish again to retry"
    )
    assert any(text in line for line in summary(late, "build the parts and --finish again"))
    SLOW.clear()
    for number in (1, 2):
        part_of(videos, tmp_path / "late", number, 2)
    assert not (tmp_path / "late" / "manifest.json").exists()
    finish(videos, tmp_path / "late")
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "late") == all_files(tmp_path / "one")


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize("finished", [False, True])
def test_a_repaired_video(
    videos: Path, decoding: list[str], tmp_path: Path, order: tuple[int, int], finished: bool
) -> None:
    output = tmp_path / "out"
    for number in order:
        part_of(videos, output, number, 2)
    if finished:
        finish(videos, output)
    (videos / "train" / "jump" / "bad 3").write_text("repaired")
    before = all_files(output)
    with pytest.raises(UserError, match="lacks 1 shard of 4"):
        finish(videos, output)
    ours = {name for name in before if name not in (".build/lock", ".build/parts")}
    assert {name: before[name] for name in ours} == {name: all_files(output)[name] for name in ours}
    decoding.clear()
    for number in order:
        part_of(videos, output, number, 2)
    assert "bad 3" in decoding and len(decoding) <= 2
    finish(videos, output)
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "one")


def part_with(video: str, output: Path, total: int = 2) -> tuple[int, Path]:
    """Returns the part that has a failed video, and the note of its shard."""
    notes = [output / ".build" / f"{shard}.json" for shard in SHARDS]
    (number,) = [number for number, note in enumerate(notes) if note.is_file() and video in note.read_text()]
    return number % total + 1, notes[number]


@pytest.mark.parametrize("finished", [False, True])
def test_a_part_keeps_the_notes_of_others(videos: Path, decoding: list[str], tmp_path: Path, finished: bool) -> None:
    """Another part that runs has reported, or will report, that its shards are finished."""
    output = tmp_path / "out"
    for number in (1, 2):
        part_of(videos, output, number, 2)
    if finished:
        finish(videos, output)
    owner, note = part_with("bad 3", output)
    before, description = note.read_bytes(), (output / "build.json").read_bytes()
    (videos / "train" / "jump" / "bad 3").write_text("repaired")
    decoding.clear()
    for _ in range(2):
        assert part_of(videos, output, 3 - owner, 2).was_finished == finished
        assert note.read_bytes() == before and (output / "build.json").read_bytes() == description
        with pytest.raises(UserError, match=f"lacks 1 shard of 4: {note.stem}"):
            finish(videos, output)
    assert decoding == []
    assert not part_of(videos, output, owner, 2).was_finished
    assert "bad 3" in decoding and note.read_bytes() != before
    finish(videos, output)
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "one")


def test_changed_videos_of_several_parts(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    """Each part records the new state of its own videos."""
    output, names = tmp_path / "out", ("train/jump/bad 3", "test/run/5")
    (videos / names[1]).write_text("bad")
    for number in range(1, 5):
        part_of(videos, output, number, 4)
    owners = [part_with(name, output, 4)[0] for name in names]
    assert owners[0] != owners[1]
    for name in names:
        (videos / name).write_text("repaired now")
    decoding.clear()
    for owner in owners:
        part_of(videos, output, owner, 4)
    assert {"bad 3", "5"} <= set(decoding)
    finish(videos, output)
    build(videos, tmp_path / "one")
    assert all_files(output) == all_files(tmp_path / "one")


def test_a_part_of_a_finished_build_leaves_no_file(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(videos, output)  # whose notes stay, because a video failed
    before = all_files(output)
    assert part_of(videos, output, 1, 2).was_finished
    assert all_files(output) == before


@pytest.mark.parametrize("number", [None, 1])
def test_a_folder_that_a_process_removes_as_it_ends(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    locked, removed = state.locked, list[Path]()

    def locked_after_another_has_ended(path: Path, *arguments: Any, **options: Any) -> Any:
        if not removed:
            path.parent.rmdir()
            removed.append(path.parent)
        return locked(path, *arguments, **options)

    monkeypatch.setattr(state, "locked", locked_after_another_has_ended)
    if number:
        part_of(videos, tmp_path / "out", number, 1)
        finish(videos, tmp_path / "out")
    else:
        build(videos, tmp_path / "out")
    assert removed == [tmp_path / "out" / ".build"]
    build(videos, tmp_path / "one")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "one")


@pytest.mark.parametrize("quality", [95, 80])
def test_build_json_is_compared_before_the_lock(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: int
) -> None:
    """Otherwise parts that start at the same time wait for as many comparisons."""
    output, read = tmp_path / "out", list[Path]()

    def read_without_lock(path: Path, limit: int) -> bytes:
        if path.name == "build.json":
            assert not is_locked(output / ".build" / "opening.lock")
            read.append(path)
        return read_limited(path, limit)

    monkeypatch.setattr(state, "read_limited", read_without_lock)
    as_part = state._Opening.as_part

    def as_part_after_another(*arguments: Any) -> Any:
        monkeypatch.setattr(state._Opening, "as_part", as_part)
        part_of(videos, output, 2, 2)  # which writes build.json
        assert read == []
        return as_part(*arguments)

    monkeypatch.setattr(state._Opening, "as_part", as_part_after_another)
    if quality == 95:
        part_of(videos, output, 1, 2)
        assert len(read) == 1
        finish(videos, output)
    else:
        with pytest.raises(UserError, match="holds a build with quality = 95, not 80"):
            part_of(videos, output, 1, 2, quality=80)


def test_a_split_without_readable_videos(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    (videos / "test" / "run" / "5").write_text("bad")
    part_of(videos, tmp_path / "out", 1, 1)
    for _ in range(2):
        with pytest.raises(UserError, match="no video of split test can be read"):
            finish(videos, tmp_path / "out")
    assert "5,is bad" in (tmp_path / "out" / "failures.csv").read_text()
    (videos / "test" / "run" / "5").write_text("repaired")
    part_of(videos, tmp_path / "out", 1, 1)
    finish(videos, tmp_path / "out")


def test_no_readable_video(tmp_path: Path, decoding: list[str]) -> None:
    for name in ("a/bad 1", "a/bad 2", "a/bad 3"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("bad")
    for number in (1, 2):
        part_of(tmp_path / "in", tmp_path / "out", number, 2)
    with pytest.raises(UserError, match=r"no video can be read \(3 tried\); see .*failures.csv"):
        finish(tmp_path / "in", tmp_path / "out")
    assert sorted(all_files(tmp_path / "out")) == [".build/parts", "build.json", "failures.csv"]


def test_a_file_system_without_locks(
    videos: Path,
    decoding: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    for number in (1, 2):
        part_of(videos, tmp_path / "out", number, 2)
    finish(videos, tmp_path / "out")
    assert capsys.readouterr().err.count("does not support locks") == 1
    build(videos, tmp_path / "one")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "one")


def test_the_estimate_covers_all_parts(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(builder, "ESTIMATE_AFTER", 1)
    monkeypatch.setattr(builder, "check_disk", lambda root, rest, written, bar: rests.append(rest / written))
    build(videos, tmp_path / "all")
    part_of(videos, tmp_path / "parts", 1, 4)
    assert rests[0] == pytest.approx(rests[1])  # the first video stands for five more


SCRIPT = """
import sys, time
from pathlib import Path
from x3d_tf.data.building import builder
from x3d_tf.data.records import index
real = builder.encode_all
def encode_all(*arguments):
    for number, result in enumerate(real(*arguments)):
        if number == 1 and Path(sys.argv[4]).exists():
            time.sleep(600)
        yield result
if __name__ == "__main__":
    builder.encode_all, index.VIDEOS_PER_SHARD = encode_all, 1
    inputs = builder.Inputs(videos=Path(sys.argv[1]))
    builder.build_part(inputs, sys.argv[2], (int(sys.argv[3]), 3), workers=1, progress=False)
"""


@pytest.mark.slow
def test_processes_that_build_parts_and_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write_video(tmp_path / "in" / "ab"[number % 2] / f"{number}.mp4", numbered_frames(20))
    (tmp_path / "in" / "a" / "broken.mp4").write_text("no video")
    monkeypatch.setattr("x3d_tf.data.records.index.VIDEOS_PER_SHARD", 1)
    script, hang = tmp_path / "build.py", tmp_path / "hang"
    script.write_text(SCRIPT)

    def start(number: int) -> "subprocess.Popen[bytes]":
        words = [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / "out"), str(number)]
        return subprocess.Popen([*words, str(hang if number == 2 else tmp_path / "none")])

    hang.touch()
    running = {number: start(number) for number in (1, 2, 3)}
    noted, deadline = tmp_path / "out" / ".build", time.monotonic() + 180
    of_two = {f"train-{number:05d}-of-00010.tfrecord" for number in (1, 4, 7)}
    while not of_two & {path.stem for path in noted.glob("*.json")} and time.monotonic() < deadline:
        assert running[2].poll() is None
        time.sleep(0.05)
    running[2].send_signal(signal.SIGKILL)
    assert [running[number].wait(180) for number in (1, 2, 3)] == [0, -signal.SIGKILL, 0]
    assert of_two - {path.stem for path in noted.glob("*.json")}
    before = {path.name: path.stat().st_mtime_ns for path in noted.glob("*.json")}
    hang.unlink()
    assert start(2).wait(180) == 0
    assert {name: (noted / name).stat().st_mtime_ns for name in before} == before  # not built again
    finish(tmp_path / "in", tmp_path / "out")
    build_records(Inputs(videos=tmp_path / "in"), tmp_path / "one", workers=2, progress=False)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "one")
    assert content(tmp_path / "out").keys() == content(tmp_path / "one").keys()
