"""The manifest: loaded as saved, its fingerprint, and damaged or edited files."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from video_fixtures import noise_video, write_manifest, write_records

from x3d_tf.data.records.index import KeyFrameInfo, Split
from x3d_tf.data.records.manifest import Manifest

RECORDS = ("splits", "train", "records")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    videos = [noise_video(seed, frames=3 + seed) for seed in range(5)]
    return write_records(tmp_path / "records", {"train": videos[:3], "test": videos[3:]})


def test_a_manifest_is_loaded_as_saved(manifest: Manifest) -> None:
    assert Manifest.load(manifest.folder) == manifest
    assert [record.frames for record in manifest.split("test").records] == [6, 7]


def edited(manifest: Manifest, *path: Any, value: Any) -> Path:
    """Replaces one entry of manifest.json and the checksum; None removes it."""
    content = json.loads((manifest.folder / "manifest.json").read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    if value is None:
        del entry[path[-1]]
    else:
        entry[path[-1]] = value
    with suppress(ValueError):
        write_manifest(manifest.folder, content)
    return manifest.folder


def test_segments_and_missing_videos_are_loaded_as_saved(manifest: Manifest) -> None:
    """Two of the three records are segments of one video; the list of the data set has four videos."""
    first, second, third = manifest.splits["train"].records
    second = second._replace(start=1.5, recording="film")
    records = (first, second, third._replace(video=second.video, start=1.5, end=2.0))
    split = replace(manifest.splits["train"], records=records, expected=4)
    replace(manifest, splits=manifest.splits | {"train": split}).save()
    loaded = Manifest.load(manifest.folder).splits["train"]
    assert loaded == split
    assert (loaded.present, loaded.expected) == (2, 4)
    assert [record.media_id for record in loaded.records] == ["train/0", "train/1#1.5-", "train/1#1.5-2.0"]


def test_an_empty_split_is_loaded_as_saved(manifest: Manifest) -> None:
    splits = {"train": manifest.splits["train"], "test": Split((), (), expected=2), "val": Split((), ())}
    changed = replace(manifest, splits=splits)
    changed.save()
    assert Manifest.load(manifest.folder) == changed


def test_columns_that_no_record_needs_are_omitted(manifest: Manifest) -> None:
    content = json.loads((manifest.folder / "manifest.json").read_text())
    assert [*content["splits"]["test"]["records"]] == ["shard", "offset", "length", "frames", "fps", "labels", "video"]


KEY_FRAMES = KeyFrameInfo(1.5, 900.0, None, ("train",), {"train": 5, "test": 2})


@pytest.fixture
def detection(manifest: Manifest) -> Manifest:
    splits = {
        name: replace(
            split, records=tuple(record._replace(key_frame=902 + i) for i, record in enumerate(split.records))
        )
        for name, split in manifest.splits.items()
    }
    changed = replace(manifest, splits=splits, task="detection", key_frames=KEY_FRAMES)
    changed.save()
    return changed


def test_key_frames_are_loaded_as_saved(detection: Manifest) -> None:
    assert Manifest.load(detection.folder) == detection
    assert [record.media_id for record in detection.splits["test"].records] == ["test/0,0902", "test/1,0903"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("key_frames",), None, "key_frames must be an object if the task is detection"),
        (("key_frames", "margin"), None, "key_frames must have the entries of key frames"),
        (("key_frames", "margin"), math.nan, "margin must be a number of at least 0 and at most 60, got nan"),
        (("key_frames", "margin"), 10**400, "margin must be a number of at least 0 and at most 60, got 1000"),
        (("key_frames", "margin"), 1e9, "margin must be a number of at least 0 and at most 60, got 1000000"),
        (("key_frames", "starts_at"), 1e10, "key_frames.starts_at must be a number .* at most 1000000000, got 1000000"),
        (("key_frames", "starts_at"), -1, "starts_at must be a number of at least 0 and at most 1000000000, got -1"),
        (("key_frames", "frame_rate"), "30", "frame_rate must be a number of at least 0 and at most .*, got '30'"),
        (("key_frames", "proposals"), "abc", "key_frames.proposals must be a list, got 'abc'"),
        (("key_frames", "proposals"), None, "key_frames.proposals must be a list, got None"),
        (("key_frames", "proposals"), [5], r"key_frames.proposals\[0\] must be a str, got 5"),
        (("key_frames", "proposals"), ["val"], r"proposals must name splits of the records .* once, got \('val',\)"),
        (("key_frames", "proposals"), ["train", "train"], "key_frames.proposals must name splits .* once, got"),
        (("key_frames", "listed"), {"train": -1}, "listed must be numbers of at least 0 and at most .* by split"),
        (("key_frames", "listed"), {"train": 10**30}, "key_frames.listed must be numbers of at least 0 and at most"),
        (("key_frames", "listed"), {"val": 1}, r"listed must name splits of the records \(train, test\) once, got"),
        (("key_frames", "listed"), [], "key_frames.listed must be numbers of at least 0 and at most .* by split"),
        (("key_frames", "more"), 1, "key_frames must have the entries of key frames"),
        ((*RECORDS, "key_frame"), None, "key_frame must be a list, got None"),
        ((*RECORDS, "key_frame", 1), -1, r"records\[1\].key_frame must be at least 0 and at most"),
        ((*RECORDS, "key_frame", 1), "902", r"key_frame\[1\] must be an int, got '902'"),
    ],
)
def test_key_frames_are_not_trusted(detection: Manifest, path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(edited(detection, *path, value=value))
    assert "manifest.json: " in str(caught.value)


LABELS = [(0,), (0, 2), (1, 2, 3)]


@pytest.fixture
def multi_label(tmp_path: Path) -> Manifest:
    return write_records(tmp_path / "several", {"train": [noise_video(seed, 2) for seed in range(3)]}, 4, LABELS)


def test_multi_label_records_are_loaded_as_saved(multi_label: Manifest) -> None:
    loaded = Manifest.load(multi_label.folder)
    assert loaded == multi_label
    assert loaded.task == "multi_label"
    assert [record.labels for record in loaded.split("train").records] == LABELS


@pytest.mark.parametrize("labels", [[1, 0], [1, 1]])
def test_labels_must_be_ascending(multi_label: Manifest, labels: list[int]) -> None:
    folder = edited(multi_label, *RECORDS, "labels", 1, value=labels)
    with pytest.raises(ValueError, match=r"records\[1\]\.labels must be ascending"):
        Manifest.load(folder)


def test_the_task_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    videos = {"train": [noise_video(0, 2)]}
    one, other = write_records(tmp_path / "a", videos, 1), write_records(tmp_path / "b", videos, 1, [(0,)])
    assert one.splits == other.splits
    assert one.fingerprint() != other.fingerprint()


def test_the_fingerprint_depends_on_the_content(manifest: Manifest, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(manifest.folder, copy)
    same = Manifest.load(copy)
    assert same.fingerprint() == manifest.fingerprint()
    assert replace(same, settings={"other": 1}).fingerprint() == manifest.fingerprint()
    first, second, third = same.splits["train"].records
    others = [
        replace(same, classes=same.classes[::-1]),
        same.with_records("train", [first, second]),
        same.with_records("train", [first._replace(labels=second.labels), second._replace(labels=first.labels), third]),
        same.with_records("train", [first._replace(video="x"), second, third]),
    ]
    assert len({manifest.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def rotate_classes(content: dict[str, Any]) -> None:
    content["classes"] = content["classes"][1:] + content["classes"][:1]


def drop_record(content: dict[str, Any]) -> None:
    train = content["splits"]["train"]
    train["records"] = {name: column[:1] + column[2:] for name, column in train["records"].items()}
    train["count"] = 2


def double_record(content: dict[str, Any]) -> None:
    train = content["splits"]["train"]
    train["records"] = {name: column[:1] + column for name, column in train["records"].items()}
    train["count"] = 4


def swap_names(content: dict[str, Any]) -> None:
    names = content["splits"]["train"]["records"]["video"]
    names[0], names[1] = names[1], names[0]


def swap_rows(content: dict[str, Any]) -> None:
    for column in content["splits"]["train"]["records"].values():
        column[0], column[1] = column[1], column[0]


def change_setting(content: dict[str, Any]) -> None:
    content["settings"]["source"] = "other"


def drop_checksum(content: dict[str, Any]) -> None:
    del content["sha256"]


EDITS = [rotate_classes, drop_record, double_record, swap_names, swap_rows, change_setting, drop_checksum]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(manifest: Manifest, edit: Callable[[dict[str, Any]], None]) -> None:
    path = manifest.folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=2, sort_keys=True))
    assert Manifest.load(manifest.folder) == manifest  # white space and the order of entries do not matter
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json: sha256 must match the file's other entries.* build"):
        Manifest.load(manifest.folder)


def test_a_manifest_that_cannot_be_read(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: Input/output error"):
        Manifest.load(manifest.folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 3, r"format_version must be 5, got 3\. .* build them again"),
        (("format_version",), 5.0, r"format_version must be 5, got 5\.0\. .* build them again"),
        (("format_version",), None, "format_version must be 5, got None"),
        (RECORDS, None, "records must be a dict, got None"),
        ((*RECORDS, "offset", 1), 12, r"records\[1\] must start after the end of the previous record, got \(0, 12\)"),
        (("classes",), ["a", "a"], "classes must be distinct names"),
        (("classes",), [], "classes must be distinct names"),
        (("classes", 1), 5, r"classes\[1\] must be a str, got 5"),
        (("classes", 1), "a\nb", r"classes\[1\] must name a class in one line of text, .*got 'a\\nb'"),
        (("classes", 1), "a\u2028", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "a\0b", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "a\ud800", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "", r"classes\[1\] must name a class in one line of text"),
        (("stored",), None, 'stored must be "none" or have short_side and jpeg_quality, got None'),
        (("stored",), "none", "stored must have short_side and jpeg_quality, got 'none'"),
        (("stored", "short_side"), 0, r"Storage.short_side must be in 1..65535 pixels, got 0"),
        (("stored", "short_side"), 10**30, "Storage.short_side must fit into 64 bits"),
        (("stored", "short_side"), True, "Storage.short_side must be int, got True"),
        (("stored", "jpeg_quality"), 96, r"Storage.jpeg_quality must be in 1..95, got 96"),
        (("stored", "more"), 1, "stored must be"),
        (("splits",), [], "splits must be a dict"),
        (("splits", "train", "shards", 0, "file"), "../a", "file must be a file name without a path, got '../a'"),
        (("splits", "train", "shards", 0, "file"), "..", "file must be a file name without a path"),
        (("splits", "train", "shards", 0, "bytes"), "9", "bytes must be an int, got '9'"),
        (("splits", "train", "shards", 0, "bytes"), 10**30, r"bytes must be at least 0 and at most \d+, got 1000"),
        (("splits", "train", "shards", 0, "bytes"), -1, r"bytes must be at least 0 and at most \d+, got -1"),
        (("splits", "train", "count"), 4, "shard must have 4 values, the count, got 3"),
        (("splits", "train", "records"), {}, "shard must be a list, got None"),
        (("splits", "train", "count"), 0, "shard must have 0 values, the count, got 3"),
        (("splits", "train", "count"), -1, "count must be a number of records, got -1"),
        (("splits", "train", "expected"), -1, "expected must be a number of videos or null, got -1"),
        (("splits", "train", "expected"), True, "expected must be a number of videos or null, got True"),
        (("dataset",), None, "dataset must be a name of letters, digits, '_', '-' and '.', got None"),
        (("dataset",), "../a", "dataset must be a name of letters, .*got '../a'"),
        (("settings",), {str(i): i for i in range(1001)}, "settings must have at most 1000 entries, got 1001"),
        (("settings", "seed"), [0], r"settings.seed must be a number or a short text, got \[0\]"),
        (("settings", "seed"), "x" * 5000, "settings.seed must be a number or a short text"),
        (("key_frames",), {}, "key_frames must be an object if the task is detection, and null otherwise"),
        ((*RECORDS, "labels", 0), [True], r"labels\[0\]\[0\] must be an int, got True"),
        ((*RECORDS, "labels", 0), [3], r"records\[0\].labels must be in 0..2, got \(3,\)"),
        ((*RECORDS, "labels", 0), [0, 1], r"records\[0\].labels must be exactly one, got \(0, 1\)"),
        ((*RECORDS, "labels", 0), 1, r"labels\[0\] must be a list, got 1"),
        (("task",), "ranking", "task must be one of single_label, multi_label, detection, got 'ranking'"),
        (("task",), None, "task must be one of single_label, multi_label, detection, got None"),
        ((*RECORDS, "shard", 2), 1, r"records\[2\].shard must be in 0..0, got 1"),
        ((*RECORDS, "shard", 2), -1, r"records\[2\].shard must be in 0..0, got -1"),
        ((*RECORDS, "offset", 0), 0, r"records\[0\] must lie inside train-"),
        ((*RECORDS, "length", 1), 10**6, r"records\[1\] must lie inside train-"),
        ((*RECORDS, "length", 1), 10**30, r"records\[1\].length must be at least 0 and at most"),
        ((*RECORDS, "length", 1), -1, r"records\[1\].length must be at least 0"),
        ((*RECORDS, "frames", 1), 0, "frames must be at least 1 and at most .*, got 0"),
        ((*RECORDS, "frames", 1), 10**6, r"records\[1\].frames must fit into the record, got 1000000"),
        ((*RECORDS, "frames", 1), 10**4000, "frames must be at least 1 and at most .*got 1000"),
        ((*RECORDS, "fps", 1), float("nan"), "fps must be positive, got nan"),
        ((*RECORDS, "fps", 1), 0.0, "fps must be positive, got 0.0"),
        ((*RECORDS, "fps", 1), math.inf, "fps must be positive, got inf"),
        ((*RECORDS, "fps", 1), 30, r"fps\[1\] must be a float, got 30"),
        ((*RECORDS, "fps"), [30.0], "fps must have 3 values, the count, got 1"),
        ((*RECORDS, "video"), None, "video must be a list, got None"),
        ((*RECORDS, "video", 1), "", r"records\[1\].video must be a name of 1 to 4096 characters of valid Unicode"),
        ((*RECORDS, "video", 1), "a\ud800", r"records\[1\].video must be a name of 1 to 4096 characters"),
        ((*RECORDS, "recording"), ["a", "", 1], r"recording\[2\] must be a str, got 1"),
        (
            (*RECORDS, "recording"),
            ["", "", "a\ud800"],
            r"records\[2\].recording must be a name of 0 to 4096 characters",
        ),
        ((*RECORDS, "start"), [0.0, 1.0, -1.0], r"records\[2\].start must be at least 0 seconds, got -1.0"),
        ((*RECORDS, "start"), [0.0, math.nan, 1.0], r"records\[1\].start must be at least 0 seconds, got nan"),
        ((*RECORDS, "start"), [0.0, None, 1.0], r"start\[1\] must be a float, got None"),
        ((*RECORDS, "end"), [None, 0.0, 1.0], r"records\[1\].end must be after the start, got 0.0"),
        ((*RECORDS, "end"), [None, math.inf, 1.0], r"records\[1\].end must be after the start, got inf"),
        ((*RECORDS, "key_frame"), [1, 2, 3], "key_frame must be absent unless the task is detection"),
        ((*RECORDS, "media_id"), ["a", "b", "c"], r"records must have only the columns shard, .*got \['media_id'\]"),
    ],
)
def test_a_manifest_is_not_trusted(manifest: Manifest, path: tuple[Any, ...], value: Any, message: str) -> None:
    folder = edited(manifest, *path, value=value)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(folder)
    assert "manifest.json: " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_not_json(manifest: Manifest, content: bytes) -> None:
    (manifest.folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        Manifest.load(manifest.folder)


def test_a_folder_without_records_names_the_build_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m x3d_tf\.build_records --videos=DIR --output="):
        Manifest.load(tmp_path)


def test_damaged_shards_are_reported(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        manifest.split("val")
    shard = manifest.folder / manifest.split("train").shards[0].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"size of .*{shard.name} must be {len(content)} bytes"):
        manifest.split("train")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} does not exist, but manifest.json lists it"):
        manifest.split("train")
    manifest.split("test")  # its shards still exist
