"""Interrupted builds, full disks, and folders of other builds."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from counted_decoding import SLOW, build, content, count_decoding, stop_at, write_texts
from video_fixtures import numbered_frames, write_video

from x3d_tf.build_records import summary
from x3d_tf.data.building import builder
from x3d_tf.data.building.builder import build_part, build_records, finish_records
from x3d_tf.data.building.state import BuildFolder, Failure, FinishedShard, open_build
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.datasets.folder import find_videos
from x3d_tf.data.records import index
from x3d_tf.data.records.index import Record, Shard, Split
from x3d_tf.data.records.manifest import Manifest, split_to_json
from x3d_tf.errors import UserError
from x3d_tf.files import SMALL


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "in")


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_decoding(monkeypatch)


def test_a_build_interrupted_anywhere_gives_the_same_result(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_result = build(videos, tmp_path / "complete")
    expected = content(tmp_path / "complete")
    assert len([name for name in expected if name.endswith(".tfrecord")]) == 4
    shards = {shard.file for split in expected_result.manifest.splits.values() for shard in split.shards}
    frames = {f"{name}.frames" for name in shards}
    assert set(expected) - {"build.json", "failures.csv", "manifest.json"} == shards | frames
    assert expected_result.failures == 2
    sizes = {f"train-0000{number}-of-00003.tfrecord": 2 - number // 2 for number in range(3)}
    sizes["test-00000-of-00001.tfrecord"] = 1
    stops = 0
    for number, before in itertools.product(range(100), (True, False)):
        output = tmp_path / f"{number}{before}"
        restore = stop_at(monkeypatch, number, before)
        try:
            result = build(videos, output)
            assert not result.was_finished
            restore()
            break
        except KeyboardInterrupt:
            stops += 1
        finally:
            restore()
        noted = {path.stem for path in output.glob(".build/*.json")}
        finished = (output / "manifest.json").exists()
        decoding.clear()
        result = build(videos, output)
        assert content(output) == expected
        assert {path.stem for path in output.glob(".build/*.json")} == set(sizes)  # one video failed
        assert (result.manifest.splits, result.failures) == (expected_result.manifest.splits, expected_result.failures)
        assert len(decoding) == (0 if finished else sum(count for name, count in sizes.items() if name not in noted))
    # build.json, failures.csv; each shard, its frames and its note; manifest.json
    assert stops >= 2 * (2 + 3 * 4 + 1)


def test_a_shard_without_its_frames_is_built_again(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    build(videos, tmp_path / "out")
    expected = content(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "train-00000-of-00003.tfrecord.frames").unlink()
    decoding.clear()
    build(videos, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert len(decoding) == 2  # the videos of one shard


def test_finished_shards_are_not_decoded_again(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = builder.write_shard
    calls = itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(builder, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(videos, tmp_path / "out")
    first = list(decoding)
    assert len(first) == 4
    decoding.clear()
    result = build(videos, tmp_path / "out")
    assert not set(first) & set(decoding)
    assert len(decoding) == 2
    decoding.clear()
    again = build(videos, tmp_path / "out")
    assert again.was_finished
    assert decoding == []
    assert (again.manifest, again.failures) == (result.manifest, result.failures)
    assert "the build was already complete" in summary(again)[0]


def test_notes_that_are_damaged_or_without_a_shard_are_ignored(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(videos, tmp_path / "complete")
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        build(videos, output)
    notes = sorted(output.glob(".build/*.json"))
    notes[0].write_text("{")
    notes[1].write_text('{"shards": [{"file": "x"}], "records": [], "failures": []}')
    (output / notes[2].stem).unlink(missing_ok=True)
    decoding.clear()
    build(videos, output)
    assert len(decoding) == 1 + 2 + 2  # the test split comes first
    assert content(output) == content(tmp_path / "complete")


def interrupted(videos: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Builds all shards without the manifest; returns their notes."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        build(videos, output)
    return sorted(output.glob(".build/*.json"))


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((), NESTED),
        ((), '{"part": ' + NESTED),
        ((), " " * SMALL + "{}"),
        ((), "[1, 2]"),
        (("part",), []),
        (("part", "shards"), []),
        (("part", "records"), {}),
        (("part", "records", "fps"), ["fast"]),
        (("part", "records", "labels"), [[7]]),
        (("part", "records", "labels"), [["a"]]),
        (("part", "records", "video"), ["\ud800"]),
        (("part", "records", "offset"), [10**400]),
        (("part", "records", "frames"), [True]),
        (("part", "shards", 0, "bytes"), "100"),
        (("part", "shards", 0, "file"), "../elsewhere"),
        (("failures",), "abc"),
        (("failures",), [["a", "b"]]),
        (("failures",), [["a", {}, False]]),
        (("failures",), [["a", "b", 1]]),
        (("failures",), {"abc": 1}),
    ],
)
def test_hostile_notes(
    videos: Path,
    decoding: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[Any, ...],
    value: Any,
) -> None:
    output = tmp_path / "out"
    note = interrupted(videos, output, monkeypatch)[0]  # of one record
    expected = note.read_bytes()
    if where:
        content = json.loads(expected)
        entry = content
        for name in where[:-1]:
            entry = entry[name]
        entry[where[-1]] = value
        value = json.dumps(content)
    note.write_text(value)
    decoding.clear()
    build(videos, output)
    assert len(decoding) == 1 and note.read_bytes() == expected


def test_a_note_without_records_and_failures(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    """It would drop the videos of the shard."""
    with open_build(tmp_path / "out", {}, find_videos(videos), []) as folder:
        folder.save_finished("a.tfrecord", FinishedShard(Split((), ()), ()))
        assert folder.load_finished("a.tfrecord") is None
        failed = FinishedShard(Split((), ()), (Failure("a", "b", True),))
        folder.save_finished("a.tfrecord", failed)
        assert folder.load_finished("a.tfrecord") == failed


def test_the_largest_note_is_within_the_limit(tmp_path: Path) -> None:
    name = 4096 * chr(0x1F600)  # twelve bytes each in JSON
    records = tuple(
        Record(0, 2**62, 2**62, 2**62, 30.0, tuple(range(1000)), name, 1e8 / 3, 1e9 / 3, 10**9, name)
        for _ in range(index.VIDEOS_PER_SHARD)
    )
    part = Split((Shard("a.tfrecord", 2**62, 64 * "f"),), records)
    folder = BuildFolder(tmp_path, tmp_path / "work", {}, 1000, "detection")
    for path in (folder.work, tmp_path / ".build"):
        path.mkdir()
    (folder.work / "a.tfrecord").touch()
    (folder.work / "a.tfrecord.frames").touch()
    folder.save_finished("a.tfrecord", FinishedShard(part, ()))
    size = (tmp_path / ".build" / "a.tfrecord.json").stat().st_size
    assert len(json.dumps(split_to_json(part))) <= size < SMALL / 2  # leaves room for the reasons of failures


@pytest.mark.parametrize(
    ("row", "value"),
    [
        (None, NESTED),
        (None, "[]"),
        (None, "{"),
        (None, '{"settings": [], "videos": [], "classes": []}'),
        (0, [{}, {}]),
        (0, None),
        ((0, 5), "1"),
        ((0, 6), [[[]]]),
    ],
)
def test_a_hostile_build_json(videos: Path, decoding: list[str], tmp_path: Path, row: Any, value: Any) -> None:
    build(videos, tmp_path / "out")
    file = tmp_path / "out" / "build.json"
    if row is not None:
        content = json.loads(file.read_bytes())
        if isinstance(row, tuple):
            content["videos"][row[0]][row[1]] = value
        else:
            content["videos"][row] = value
        value = json.dumps(content)
    file.write_text(value)
    before = content_with_state(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds a build whose build\.json is damaged\. Use its settings"):
        build(videos, tmp_path / "out")
    assert content_with_state(tmp_path / "out") == before


def test_a_long_value_in_build_json(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    build(videos, tmp_path / "out")
    file = tmp_path / "out" / "build.json"
    content = json.loads(file.read_bytes())
    content["settings"]["quality"] = 10**6 * "9"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"with quality = '9{199}\.\.\., not 95\. Use its"):
        build(videos, tmp_path / "out")


def content_with_state(folder: Path) -> dict[str, bytes]:
    return content(folder) | {f".build/{name}": data for name, data in content(folder / ".build").items()}


def write_foreign(folder: Path) -> dict[str, bytes]:
    """Writes files of other tools, some with names like those of a build; returns their bytes."""
    names = ("poetry.lock", "work-mine/a", "workspace.json", "part-a-of-b.lock", "part-1-of-2.lock.d/a", "work-all/a")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return foreign_in(folder)


def foreign_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["all", "part", "finish"])
@pytest.mark.parametrize("started", [False, True])
def test_a_state_folder_that_is_a_link(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, started: bool
) -> None:
    """Files of other tools would be deleted through it."""
    output, victim = tmp_path / "out", tmp_path / "victim"
    if started:
        interrupted(videos, output, monkeypatch)
        (output / ".build").rename(victim)
    else:
        output.mkdir()
    foreign = write_foreign(victim)
    for name in ("work-all-killed/a", "part-1-of-2.lock", "opening.lock"):
        (victim / name).parent.mkdir(exist_ok=True)
        (victim / name).touch()
    (output / ".build").symlink_to(victim)
    if command == "finish" and not started:
        (output / "build.json").write_text("{}")
    before = foreign_in(victim)
    assert foreign.items() <= before.items()
    message = r"^output: .*out holds a build|^output: .*\.build must be a folder, not a symbolic link; remove the link$"
    with pytest.raises(UserError, match=message):
        if command == "part":
            build_part(Inputs(videos=videos), output, (1, 2), progress=False)
        elif command == "finish":
            finish_records(Inputs(videos=videos), output, progress=False)
        else:
            build(videos, output)
    assert foreign_in(victim) == before


@pytest.mark.parametrize("command", ["all", "part"])
def test_files_of_other_tools_stay(videos: Path, decoding: list[str], tmp_path: Path, command: str) -> None:
    (videos / "train" / "jump" / "bad 3").unlink()  # so that the notes are deleted
    output, victim = tmp_path / "out", tmp_path / "victim"
    foreign, targets = write_foreign(output / ".build"), write_foreign(victim)
    (output / ".build" / "work-all-1").symlink_to(victim)
    (output / ".build" / "work-part-1-of-1-1").symlink_to(victim)
    (output / ".build" / "train-00000-of-00003.tfrecord.json").symlink_to(victim / "workspace.json")
    (output / ".movie.mp4.partial").write_text("mine")
    (output / ".manifest.json.partial").write_text("of a killed process")
    if command == "part":
        build_part(Inputs(videos=videos), output, (1, 1), progress=False)
        finish_records(Inputs(videos=videos), output, progress=False)
    else:
        build(videos, output)
    assert foreign_in(victim) == targets
    assert foreign.items() <= foreign_in(output / ".build").items()
    assert (output / ".movie.mp4.partial").read_text() == "mine"
    assert not (output / ".manifest.json.partial").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    build(videos, tmp_path / "link")  # an output folder may be a link
    assert Manifest.load(tmp_path / "elsewhere") and not (tmp_path / "elsewhere" / ".build").exists()


@pytest.mark.parametrize("name", ["parts", "part-1-of-2.lock", "train-00000-of-00003.tfrecord.json"])
def test_folders_in_place_of_state_files(videos: Path, decoding: list[str], tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / ".build" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        build(videos, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": 80}, "holds a build with quality = 95, not 80. Use its settings to resume it"),
        ({"short_side": 64}, "with short_side = 256, not 64"),
        ({"seed": 1}, "with seed = 0, not 1"),
        ({"splits": ["train"]}, r"with splits = None, not \['train'\]"),
    ],
)
def test_the_folder_of_another_build_is_left_alone(
    videos: Path, decoding: list[str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    build(videos, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        build(videos, tmp_path / "out", **settings)
    assert content(tmp_path / "out") == before


def test_other_videos_are_another_build(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    build(videos, tmp_path / "out")
    file = videos / "train" / "run" / "1"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="train/run/1 of split train has changed since"):
        build(videos, tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match="train/run/1 of split train is no longer among them"):
        build(videos, tmp_path / "out")
    file.write_text("train/run/1")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    (videos / "test" / "run" / "6").touch()
    with pytest.raises(ValueError, match="test/run/6 of split test is new"):
        build(videos, tmp_path / "out")
    (videos / "test" / "run" / "6").unlink()
    assert build(videos, tmp_path / "out").was_finished


def test_videos_that_took_too_long_are_retried(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(videos, tmp_path / "complete")
    expected = content(tmp_path / "complete")
    for number in range(100):
        output = tmp_path / str(number)
        SLOW.update(("1", "4"))
        first = build(videos, output)
        assert (first.failures, first.to_retry) == (4, 2)
        SLOW.clear()
        restore = stop_at(monkeypatch, number, before=number % 2 == 0)
        try:
            build(videos, output)
            break
        except KeyboardInterrupt:
            restore()
        result = build(videos, output)
        assert content(output) == expected
        assert (result.failures, result.to_retry) == (2, 0)
        decoding.clear()
        assert build(videos, output).was_finished and not decoding
    restore()
    assert content(output) == expected
    assert number > 4


def test_a_repaired_video_is_retried(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(videos, tmp_path / "out")
    decoding.clear()
    assert build(videos, tmp_path / "out").was_finished and not decoding
    (videos / "train" / "jump" / "bad 3").write_text("repaired")
    again = build(videos, tmp_path / "out")
    assert not again.was_finished and "bad 3" in decoding and len(decoding) <= 2
    build(videos, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_repaired_video_and_an_interruption_anywhere(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = videos / "train" / "jump" / "bad 3"
    before, status = bad.read_text(), bad.stat()
    expected: dict[str, bytes] = {}
    for number in range(100):
        bad.write_text(before)
        os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
        output = tmp_path / str(number)
        build(videos, output)
        bad.write_text("repaired")
        os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns + 5))
        if not expected:
            build(videos, tmp_path / "fresh")
            expected = content(tmp_path / "fresh")
        restore = stop_at(monkeypatch, number, before=number % 2 == 0)
        try:
            build(videos, output)
            break
        except KeyboardInterrupt:
            restore()
        build(videos, output)
        assert content(output) == expected
    restore()
    assert content(output) == expected
    assert number > 3


def test_a_split_without_readable_videos_is_an_error(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    (videos / "test" / "run" / "5").write_text("bad")
    message = r"no video of split test can be read \(1 tried\); see .*failures.csv for the reasons"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            build(videos, tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
    (videos / "test" / "run" / "5").write_text("repaired")
    decoding.clear()
    build(videos, tmp_path / "out")
    assert decoding == ["5"]


def test_a_build_without_a_finished_shard_is_replaced(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build(videos, output, quality=80)
    (output / ".train-00000-of-00009.tfrecord.partial").touch()  # left by a killed process
    build(videos, output)
    build(videos, tmp_path / "new")
    assert content(output) == content(tmp_path / "new")


def test_one_process_at_a_time(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    with open_build(tmp_path / "out", {"quality": 80}, find_videos(videos), []):
        (tmp_path / "out" / ".train-00000-of-00003.tfrecord.partial").touch()
        before = content(tmp_path / "out")
        with pytest.raises(ValueError, match="another process is building into"):
            build(videos, tmp_path / "out")
        assert content(tmp_path / "out") == before
    build(videos, tmp_path / "out")


def test_a_folder_that_cannot_be_written(videos: Path, decoding: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output: .*file is a file, not a folder"):
        build(videos, tmp_path / "file")
    with pytest.raises(ValueError, match="file/sub cannot be written: Not a directory"):
        build(videos, tmp_path / "file" / "sub")
    if os.geteuid():  # permissions do not bind root
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="closed/out cannot be written: Permission denied"):
            build(videos, tmp_path / "closed" / "out")


class FullWriter:
    """TensorFlow's writer on a disk that is full at the third shard, at the first write or only on closing."""

    made = 0
    fails_at = ""

    def __init__(self, path: str) -> None:
        FullWriter.made += 1
        self.full = FullWriter.made == 3
        self.file = Path(path).open("wb")  # noqa: SIM115

    def write(self, record: bytes) -> None:
        self.fail("write")
        self.file.write(b"x" * (len(record) + 16))

    def close(self) -> None:
        self.file.close()
        self.fail("close")

    def fail(self, where: str) -> None:
        if self.full and where == FullWriter.fails_at:
            raise tf.errors.ResourceExhaustedError(None, None, "/disk/x; No space left on device")


@pytest.mark.parametrize("where", ["write", "close"])
def test_a_full_disk_keeps_what_is_finished(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(FullWriter, "made", 0)
    monkeypatch.setattr(FullWriter, "fails_at", where)
    with monkeypatch.context() as patch:
        patch.setattr(tf.io, "TFRecordWriter", FullWriter)
        message = (
            r"tfrecord cannot be written: No space left on device. 2 of 4 shards are finished; run the same command"
        )
        with pytest.raises(ValueError, match=message):
            build(videos, output)
    assert len(list(output.glob("*.tfrecord"))) == 2
    assert not list(output.glob(".*.partial"))
    result = build(videos, output)
    assert [len(split.shards) for split in result.manifest.splits.values()] == [3, 1]


def test_a_full_disk_at_the_notes_and_the_manifest(
    videos: Path, decoding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(videos, tmp_path / "complete")
    for count in range(100):
        calls = itertools.count()

        def fsync(file: int, count: int = count, calls: "itertools.count[int]" = calls) -> None:
            if next(calls) == count:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                build(videos, tmp_path / str(count))
                if next(calls) <= count:  # otherwise the text of a lock was not flushed, which does no harm
                    break
            except ValueError as error:
                assert "cannot be written: No space left on device" in str(error)
        build(videos, tmp_path / str(count))
        assert content(tmp_path / str(count)) == content(tmp_path / "complete")
    assert count > 8


@pytest.mark.parametrize("room", [10**12, 100])
def test_size_is_estimated_before_the_bulk(
    videos: Path,
    decoding: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: int,
) -> None:
    monkeypatch.setattr(builder, "ESTIMATE_AFTER", 3)
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": room}))
    if room > 1000:
        build_records(Inputs(videos=videos), tmp_path / "out")
        assert "MB (1000.0 GB free on the disk)" in capsys.readouterr().out
        return
    message = r"out needs about 0\.\d MB more, estimated from the first 3 videos, but its disk has 0\.0 MB .* --quality"
    with pytest.raises(ValueError, match=message):
        build(videos, tmp_path / "out")
    assert len(decoding) == 3


def test_a_killed_build_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_video(tmp_path / "in" / "ab"[number % 2] / f"{number}.mp4", numbered_frames(20))
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 1)
    # The third video never ends, so that the process is killed during the build on any machine.
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from x3d_tf.data.building import builder\n"
        "from x3d_tf.data.records import index\n"
        "real = builder.encode_all\n"
        "def encode_all(*arguments):\n"
        "    for number, result in enumerate(real(*arguments)):\n"
        "        if number == 2:\n"
        "            time.sleep(600)\n"
        "        yield result\n"
        "if __name__ == '__main__':\n"
        "    builder.encode_all, index.VIDEOS_PER_SHARD = encode_all, 1\n"
        "    inputs = builder.Inputs(videos=Path(sys.argv[1]))\n"
        "    builder.build_records(inputs, sys.argv[2], workers=1, progress=False)\n"
    )
    script = tmp_path / "build.py"
    script.write_text(code)
    killed = subprocess.Popen([sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / "out")])
    noted = tmp_path / "out" / ".build"
    deadline = time.monotonic() + 120
    while len(list(noted.glob("*.json"))) < 2 and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list((tmp_path / "out").glob("*.tfrecord"))) == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    result = build(tmp_path / "in", tmp_path / "out", workers=1)
    assert len(result.manifest.split("train").records) == 6
    build(tmp_path / "in", tmp_path / "complete", workers=2)
    assert content(tmp_path / "out") == content(tmp_path / "complete")
