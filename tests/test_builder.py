"""Building records from class folders: layouts, determinism, and failing files."""

import csv
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from video_fixtures import hang_where_marked, numbered_frames, write_class_folders, write_video

from x3d_tf.build_records import summary
from x3d_tf.data.building import builder, plan
from x3d_tf.data.building.builder import build_records
from x3d_tf.data.building.sources import Sources, Video
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.datasets.folder import find_videos
from x3d_tf.data.records import index
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo
from x3d_tf.errors import UserError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("videos"))


def names(manifest: Manifest, split: str) -> set[str]:
    return {record.media_id for record in manifest.split(split).records}


def test_a_folder_per_class(clips: Path, tmp_path: Path) -> None:
    result = build_records(Inputs(videos=clips), tmp_path / "out", workers=2, progress=False)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == result.manifest
    assert manifest.classes == ("jump", "run")
    assert list(manifest.splits) == ["train"]
    for record in manifest.split("train").records:
        number = int(Path(record.media_id).stem.split()[1])
        assert record.media_id == f"{'run' if number < 4 else 'jump'}/clip {number}.mp4"
        assert [manifest.classes[label] for label in record.labels] == [record.media_id.split("/")[0]]
        assert (record.frames, record.fps) == (6 + number, 30.0)
    assert len(names(manifest, "train")) == 7
    with (tmp_path / "out" / "failures.csv").open(newline="") as table:
        failures = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(table)}
    assert set(failures) == {"broken.mp4", "notes.txt"}
    assert failures["broken.mp4"].startswith("cannot be decoded")
    assert failures["notes.txt"] == "is not in a class folder"
    assert result.failures == 2
    assert "build again with --split=0.2" in summary(result)[-1]


def test_bytes_do_not_depend_on_the_number_of_workers(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 2)
    for workers in (1, 3):
        build_records(Inputs(videos=clips, split=0.4), tmp_path / str(workers), workers=workers, progress=False)
    files = sorted(path.name for path in (tmp_path / "1").iterdir() if path.is_file())
    assert len([name for name in files if name.endswith(".tfrecord")]) > 2
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir() if path.is_file())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_fraction_of_each_class_is_for_evaluation(clips: Path) -> None:
    found = find_videos(clips, split=0.5).splits
    for name, count in (("run", 5), ("jump", 3)):
        parts = [{video.path for video in found[split] if video.classes == (name,)} for split in ("train", "test")]
        assert [len(part) for part in parts] == [count - round(count / 2), round(count / 2)]
        assert len(set.union(*parts)) == count
    assert found == find_videos(clips, split=0.5).splits
    assert found != find_videos(clips, split=0.5, seed=1).splits
    tiny = find_videos(clips, split=0.01).splits
    assert sorted(video.classes for video in tiny["test"]) == [("jump",), ("run",)]


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_split_folders(tmp_path: Path) -> None:
    folder = touch(tmp_path, "train/a/1", "train/b/2", "test/a/3", "val/c/4", "test/.x/5")
    found = find_videos(folder).splits
    media = {split: sorted((video.media_id, *video.classes) for video in videos) for split, videos in found.items()}
    assert media == {
        "train": [("train/a/1", "a"), ("train/b/2", "b")],
        "val": [("val/c/4", "c")],
        "test": [("test/a/3", "a")],
    }
    assert list(find_videos(folder, splits=["train", "val", "test"]).splits) == ["train", "val", "test"]


def test_splits_share_their_classes(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "run").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "run" / "clip 0.mp4").symlink_to(clips / "run" / "clip 0.mp4")
    (tmp_path / "two" / "jump").symlink_to(clips / "jump")
    result = build_records(Inputs(videos=tmp_path, splits=("one", "two")), tmp_path / "out", workers=1, progress=False)
    assert result.manifest.classes == ("jump", "run")
    assert names(result.manifest, "one") == {"one/run/clip 0.mp4"}
    assert {record.labels for record in result.manifest.split("two").records} == {(0,)}
    lines = "\n".join(summary(result))
    assert "one has no video for 1 class: jump" in lines
    assert """--gin_bindings='DatasetSpec.train_split="one"' --gin_bindings='DatasetSpec.eval_split="two"'""" in lines


@pytest.mark.parametrize(
    ("splits", "bindings"),
    [
        (("train", "val", "test"), []),
        (("Train", "Validation"), []),
        (("one", "two", "three"), ["train_split=one", "validation_split=two", "eval_split=three"]),
        (("train", "dev", "test"), ["validation_split=dev"]),
        (("test", "train"), []),
        (("test", "dev", "train"), ["validation_split=dev"]),
        (("b", "a"), ["train_split=b", "eval_split=a"]),
    ],
)
def test_split_bindings_are_printed_for_unusual_names(
    clips: Path, tmp_path: Path, splits: tuple[str, ...], bindings: list[str]
) -> None:
    for number, split in enumerate(splits):
        for name in ("RUN", "run"):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            (tmp_path / "in" / split / name / "0.mp4").symlink_to(clips / "run" / f"clip {number}.mp4")
    named = None if splits[0].lower() == "train" and "dev" not in splits else splits  # the order of the command
    with pytest.warns(UserWarning, match="the classes 'RUN', 'run' differ only in case"):
        result = build_records(
            Inputs(videos=tmp_path / "in", splits=named), tmp_path / "out", workers=1, progress=False
        )
    assert [len(split.records) for split in result.manifest.splits.values()] == [2] * len(splits)
    printed = re.findall(r"DatasetSpec\.(\w*_split=[^']*)", "\n".join(summary(result)))
    assert printed == [binding.replace("=", '="') + '"' for binding in bindings]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [0, 1, 0]}, r"split train must list each video, or part of it, once, got 'run/clip 0\.mp4'"),
        ({"train": [0, 1], "test": [2, 1]}, r"run/clip 1\.mp4 is listed in the splits train and test; a video"),
    ],
)
def test_a_data_set_lists_a_record_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[int]], message: str
) -> None:
    """Otherwise a data set of your own could evaluate a network on its training videos."""
    videos = [Video(clips / "run" / f"clip {number}.mp4", f"run/clip {number}.mp4", ("run",)) for number in range(3)]
    listed = Sources(
        {name: [videos[i] for i in chosen] for name, chosen in splits.items()}, [], ("run",), "single_label"
    )
    monkeypatch.setattr(plan, "choose", lambda *_: SimpleNamespace(name="mine", sources=lambda _: listed))
    with pytest.raises(UserError, match=message):
        build_records(Inputs(videos=clips), tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (["a/1"], {"splits": ("a",), "split": 0.2}, "splits and split must not be set together"),
        (["a/1"], {"split": 1.0}, "split must be between 0 and 1, got 1.0"),
        (["a/1"], {"splits": ("a", "a")}, "splits must be distinct names of folders"),
        (["a/1"], {"splits": ("../a",)}, "splits must be distinct names of folders"),
        (["a/b/1"], {"splits": ("a", "b")}, "b is not a folder"),
        (["one/a/1", "two/a/1"], {}, "is a folder, but class folders must hold video files.*--splits=one,two"),
        (["notes"], {}, "has no class folders with videos in them; ignored 1 other entry"),
        (["a/1"], {}, "no video can be read \\(1 tried\\); see .* for the reasons"),
        (["a/1", "out/1"], {}, "output: .*out is not empty"),
        (["a/1"], {"split": 0.2}, "split test has no videos. Add videos to it, or leave it out of --splits"),
        (
            ["one/a/1", "two/notes"],
            {"splits": ("one", "two")},
            "split two has no videos \\(1 unusable entry; the first: .*two/notes: is not in a class folder\\)",
        ),
        (["a/1"], {"timeout": 0.0}, "timeout must be above 0 and at most 1,000,000 seconds, got 0"),
        (["a/1"], {"timeout": float("inf")}, "timeout must be above 0 and at most 1,000,000 seconds, got inf"),
        (["a/1"], {"quality": 96}, "quality must be in 1..95, got 96"),
        (["a/1"], {"short_side": 0}, "short_side must be at least 1 pixel, got 0"),
        (["a/1"], {"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_invalid_settings_are_reported(
    tmp_path: Path, files: list[str], settings: dict[str, Any], message: str
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        inputs = {name: settings.pop(name) for name in [*settings] if name in Inputs.__dataclass_fields__}
        build_records(Inputs(videos=tmp_path, **inputs), tmp_path / "out", progress=False, **settings)
    left = {path.name for path in (tmp_path / "out").glob("*")} if (tmp_path / "out").exists() else set()
    assert left <= {"failures.csv", "build.json", "1"}


def test_file_names_of_all_kinds(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", numbered_frames(3)).read_bytes()
    names = [b"with space.mp4", b"quo\"ted'.mp4", b"a, b.mp4", "прыжок 跳.mp4".encode(), b"new\nline.mp4"]
    names += [b"\xff\xfe.mp4", b"concat:a|b.mp4", b"%03d.mp4", b"-y.mp4", b"no suffix"]
    folder = tmp_path / "in" / "прыжок, „hoch“"
    folder.mkdir(parents=True)
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(video)
    for name in (b"bad \xff.mp4", b'bad ",\n.mp4'):
        (folder / os.fsdecode(name)).write_text("no video")
    result = build_records(Inputs(videos=tmp_path / "in"), tmp_path / "out", workers=1, progress=False)
    assert Manifest.load(tmp_path / "out") == result.manifest
    assert result.manifest.classes == ("прыжок, „hoch“",)
    expected = {f"прыжок, „hoch“/{name.decode('utf-8', 'replace')}" for name in names}
    assert {record.media_id for record in result.manifest.split("train").records} == expected
    with (tmp_path / "out" / "failures.csv").open(newline="", encoding="utf-8") as table:
        paths = [row["path"] for row in csv.DictReader(table)]
    assert {path.rpartition("/")[2] for path in paths} == {r"bad \udcff.mp4", 'bad ",\n.mp4'}
    assert [len(path) > 30 for path in paths] == [True, True]
    assert summary(result)[0].endswith(": 1 class, task single_label")
    assert build_records(Inputs(videos=tmp_path / "in"), tmp_path / "out", progress=False).was_finished


def test_a_csv_file_of_segments_with_several_classes(clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    rows = ["run/clip 3.mp4,run,0,0.1", "run/clip 3.mp4,run;turn,0.1,", "jump/clip 4.mp4,jump,5,", "jump/x,jump,,"]
    rows.append("run/clip 2.mp4,run,0,1000000")
    table.write_text("path,label,start,end\n" + "\n".join([*rows, "run/broken.mp4,run,0,1", "run/broken.mp4,run,1,2"]))
    result = build_records(Inputs(videos=clips, csv=table), tmp_path / "out", workers=1, progress=False)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == result.manifest
    assert (manifest.task, manifest.classes) == ("multi_label", ("jump", "run", "turn"))
    found = {record.media_id: (record.frames, record.labels) for record in manifest.split("train").records}
    assert found == {"run/clip 3.mp4#0.0-0.1": (3, (1,)), "run/clip 3.mp4#0.1-": (6, (1, 2))}
    with (tmp_path / "out" / "failures.csv").open(newline="") as failures:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(failures)}
    assert reasons["x"] == f"does not exist ({table}, line 5)"
    assert reasons["clip 4.mp4"] == "ends before the start time 5.0 s"
    assert reasons["clip 2.mp4"] == "ends at 0.3 s, before the end of its segment, 1e+06 s"
    assert result.failures == len(reasons) == 4  # the broken file once
    lines = "\n".join(summary(result))
    assert "3 classes, task multi_label" in lines
    assert "train has no video for 1 class: jump" in lines


def test_neither_videos_nor_a_csv_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data set folder requires --videos"):
        build_records(Inputs(), tmp_path / "out")


def test_a_video_that_hangs_is_listed_and_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/first", "a/hangs", "b/last"):
        write_video(tmp_path / "in" / f"{name}.mp4", numbered_frames(3))
    (tmp_path / "in" / ".hang").touch()
    monkeypatch.setattr(builder, "encode_or_error", hang_where_marked)

    def build(output: Path) -> builder.BuildResult:
        return build_records(Inputs(videos=tmp_path / "in"), output, workers=1, timeout=3, progress=False)

    result = build(tmp_path / "out")
    assert names(result.manifest, "train") == {"a/first.mp4", "b/last.mp4"}
    assert (result.failures, result.to_retry) == (1, 1)
    assert "hangs.mp4,takes longer than 3 s to decode (--timeout)" in (tmp_path / "out" / "failures.csv").read_text()
    assert any("of these, 1 video exceeded --timeout" in line for line in summary(result))
    (tmp_path / "in" / ".hang").unlink()
    again = build(tmp_path / "out")
    assert (again.failures, again.to_retry, again.was_finished) == (0, 0, False)
    fresh = build(tmp_path / "fresh")
    assert again.manifest.splits == fresh.manifest.splits
    for path in (tmp_path / "fresh").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert build(tmp_path / "out").was_finished


def test_real_clips(shared_data: Path, tmp_path: Path) -> None:
    for name in ("apply_eye_makeup.avi", "deadlifting.mp4"):
        (tmp_path / "in" / name[:4]).mkdir(parents=True)
        (tmp_path / "in" / name[:4] / name).symlink_to(shared_data / "clips" / name)
    result = build_records(Inputs(videos=tmp_path / "in"), tmp_path / "out", short_side=64, workers=2, progress=False)
    found = {record.media_id: (record.frames, record.fps) for record in result.manifest.split("train").records}
    assert found == {"appl/apply_eye_makeup.avi": (164, 25.0), "dead/deadlifting.mp4": (360, 30.0)}


def test_the_estimate_is_in_proportion(tmp_path: Path) -> None:
    def rest(videos: list[Video], count: int = 2) -> float:
        estimate = builder._Estimate(videos)
        for _ in range(count):
            estimate.add(EncodedVideo([b"12345", b"67890"], 30.0))
        return estimate.rest

    paths = [tmp_path / str(number) for number in range(4)]
    for path, size in zip(paths, (10, 30, 50, 70), strict=True):
        path.write_bytes(bytes(size))
    assert rest([Video(path, "", ()) for path in paths]) == pytest.approx(20 / 40 * 120)
    assert rest([Video(path, "", (), start, start + 2) for start, path in enumerate(paths)]) == pytest.approx(20)
    assert rest([Video(path, "", (), start) for start, path in enumerate(paths)]) == pytest.approx(20)
    assert rest([Video(tmp_path / "gone", "", ())] * 4) == 0.0
