"""The schema of the records, the shards that hold them and the manifest that lists them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from video_fixtures import noise_video, write_records

from x3d_tf.data import index, records
from x3d_tf.data.index import index_shard, shard_name
from x3d_tf.data.manifest import Manifest
from x3d_tf.data.records import ShardWriter, Source, encode_record, parse_record, read_index
from x3d_tf.data.video import EncodedVideo, VideoError


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    videos = [noise_video(seed, frames=3 + seed) for seed in range(5)]
    return write_records(tmp_path / "records", {"train": videos[:3], "test": videos[3:]})


def test_a_record_has_mediasequences_features() -> None:
    video = EncodedVideo([b"first", b"second", b"third"], 25.0)
    example = tf.train.SequenceExample.FromString(
        encode_record(video, Source("jump/a.mp4", (7,)), [*"abcdefg", "jümp"])
    )
    context, lists = example.context.feature, example.feature_lists.feature_list
    assert context["clip/label/index"].int64_list.value == [7]
    assert context["clip/label/string"].bytes_list.value == ["jümp".encode()]
    assert context["clip/label/text"].bytes_list.value == ["jümp".encode()]
    assert context["clip/media_id"].bytes_list.value == [b"jump/a.mp4"]
    assert context["image/format"].bytes_list.value == [b"JPEG"]
    assert context["image/frame_rate"].float_list.value == [25.0]
    assert [f.bytes_list.value[0] for f in lists["image/encoded"].feature] == [b"first", b"second", b"third"]
    assert [f.int64_list.value[0] for f in lists["image/timestamp"].feature] == [0, 40_000, 80_000]


def test_a_record_of_several_classes_lists_them() -> None:
    video = EncodedVideo([b"frame"], 25.0)
    encoded = encode_record(video, Source("a", (0, 2)), ["jump", "sit", "run"])
    context = tf.train.SequenceExample.FromString(encoded).context.feature
    assert context["clip/label/index"].int64_list.value == [0, 2]
    assert context["clip/label/string"].bytes_list.value == [b"jump", b"run"]
    assert context["clip/label/text"].bytes_list.value == [b"jump", b"run"]
    assert parse_record(tf.constant(encoded)).labels.numpy().tolist() == [0, 2]


def test_what_is_written_is_parsed_back() -> None:
    video = noise_video(0, frames=4)
    parsed = parse_record(tf.constant(encode_record(video, Source("a", (3,)), ["", "", "", "walk"])))
    assert parsed.frames.numpy().tolist() == video.frames
    assert (parsed.labels.numpy().tolist(), float(parsed.fps), parsed.media_id.numpy()) == ([3], 30.0, b"a")


def test_the_index_points_at_what_tfrecord_reads(manifest: Manifest) -> None:
    for split in manifest.splits.values():
        stored = {path.file: (manifest.folder / path.file).read_bytes() for path in split.shards}
        read = [r.numpy() for s in split.shards for r in tf.data.TFRecordDataset(str(manifest.folder / s.file))]
        indexed = [stored[split.shards[r.shard].file][r.offset : r.offset + r.length] for r in split.records]
        assert indexed == read
        for shard in split.shards:
            assert shard.bytes == len(stored[shard.file])
            assert shard.sha256 == hashlib.sha256(stored[shard.file]).hexdigest()
            offsets = index_shard(manifest.folder / shard.file)
            assert offsets == [(r.offset, r.length) for r in split.records]


def test_videos_are_dealt_to_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 2)
    video, bad = noise_video(0, frames=2), VideoError("x.mp4", "is broken")
    sources = [Source(str(i), (0,)) for i in range(7)]
    taken: list[Any] = []
    results = [video, bad, bad, bad, video, video, video]
    split = records.write_split(tmp_path, "train", sources, iter(results), ["a"], taken.append)
    assert taken == results
    assert [(r.shard, r.media_id) for r in split.records] == [(0, "0"), (1, "4"), (1, "5"), (2, "6")]
    names = [shard_name("train", index, 4) for index in (0, 2, 3)]  # in shard 1 both failed
    assert [shard.file for shard in split.shards] == sorted(path.name for path in tmp_path.iterdir()) == names
    assert names[0] == "train-00000-of-00004.tfrecord"
    assert read_index([tmp_path / name for name in names]) == split.records


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.tfrecord") as writer:
        writer.write(b"record")
        assert not (tmp_path / "a.tfrecord").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_equal_videos_give_equal_bytes() -> None:
    once, again = (encode_record(noise_video(0, 3), Source("a", (1,)), "ab") for _ in range(2))
    assert once == again


def test_a_manifest_is_loaded_as_saved(manifest: Manifest) -> None:
    assert Manifest.load(manifest.folder) == manifest
    assert [record.frames for record in manifest.split("test").records] == [6, 7]


def edited(manifest: Manifest, *path: Any, value: Any) -> Path:
    """Rewrites one entry of manifest.json; None removes it."""
    file = manifest.folder / "manifest.json"
    content = json.loads(file.read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    if value is None:
        del entry[path[-1]]
    else:
        entry[path[-1]] = value
    file.write_text(json.dumps(content))
    return manifest.folder


def test_a_missing_index_is_rebuilt(manifest: Manifest) -> None:
    edited(manifest, "splits", "train", "records", value=None)
    assert Manifest.load(edited(manifest, "splits", "test", "records", value=None)) == manifest


RECORDS = ("splits", "train", "records")
LABELS = [(0,), (0, 2), (1, 2, 3)]


@pytest.fixture
def multi_label(tmp_path: Path) -> Manifest:
    return write_records(tmp_path / "several", {"train": [noise_video(seed, 2) for seed in range(3)]}, 4, LABELS)


def test_multi_label_records_are_loaded_as_saved(multi_label: Manifest) -> None:
    loaded = Manifest.load(multi_label.folder)
    assert loaded == multi_label
    assert loaded.task == "multi_label"
    assert [record.labels for record in loaded.split("train").records] == LABELS
    assert Manifest.load(edited(multi_label, *RECORDS, value=None)) == multi_label


@pytest.mark.parametrize("labels", [[], [1, 0], [1, 1]])
def test_several_labels_ascend(multi_label: Manifest, labels: list[int]) -> None:
    folder = edited(multi_label, *RECORDS, "labels", 1, value=labels)
    with pytest.raises(ValueError, match=r"records\[1\]\.labels must be one or more, ascending"):
        Manifest.load(folder)


def test_the_task_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    videos = {"train": [noise_video(0, 2)]}
    one, other = write_records(tmp_path / "a", videos, 1), write_records(tmp_path / "b", videos, 1, [(0,)])
    assert one.splits == other.splits
    assert one.fingerprint() != other.fingerprint()


def test_manifests_of_the_first_format_are_read(manifest: Manifest) -> None:
    edited(manifest, "format_version", value=1)
    edited(manifest, "task", value=None)
    for split, part in manifest.splits.items():
        edited(manifest, "splits", split, "records", "label", value=[record.labels[0] for record in part.records])
        edited(manifest, "splits", split, "records", "labels", value=None)
    assert Manifest.load(manifest.folder) == manifest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 3, "format_version must be 1 or 2, got 3"),
        (("classes",), ["a", "a"], "classes must be distinct names"),
        (("classes",), [], "classes must be distinct names"),
        (("classes", 1), 5, r"classes\[1\] must be a str, got 5"),
        (("classes", 1), "a\nb", r"classes\[1\] must name a class in one line of text, .*got 'a\\nb'"),
        (("classes", 1), "a\u2028", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "a\0b", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "a\ud800", r"classes\[1\] must name a class in one line of text"),
        (("classes", 1), "", r"classes\[1\] must name a class in one line of text"),
        (("splits",), [], "splits must be a dict"),
        (("splits", "train", "shards", 0, "file"), "../a", "file must be a file name without a folder, got '../a'"),
        (("splits", "train", "shards", 0, "file"), "..", "file must be a file name without a folder"),
        (("splits", "train", "shards", 0, "bytes"), "9", "bytes must be a int, got '9'"),
        (("splits", "train", "count"), 4, "count must be 3, got 4"),
        ((*RECORDS, "labels", 0), [True], r"labels\[0\]\[0\] must be a int, got True"),
        ((*RECORDS, "labels", 0), [3], r"records\[0\].labels must be in 0..2, got \(3,\)"),
        ((*RECORDS, "labels", 0), [0, 1], r"records\[0\].labels must be exactly one, got \(0, 1\)"),
        ((*RECORDS, "labels", 0), 1, r"labels\[0\] must be a list, got 1"),
        (("task",), "ranking", "task must be one of single_label, multi_label, detection, got 'ranking'"),
        (("task",), None, "task must be one of single_label, multi_label, detection, got None"),
        ((*RECORDS, "shard", 2), 1, r"records\[2\].shard must be in 0..0, got 1"),
        ((*RECORDS, "shard", 2), -1, r"records\[2\].shard must be in 0..0, got -1"),
        ((*RECORDS, "offset", 0), 0, r"records\[0\] must lie inside train-"),
        ((*RECORDS, "length", 1), 10**30, r"records\[1\] must lie inside train-"),
        ((*RECORDS, "length", 1), -1, r"records\[1\] must lie inside train-"),
        ((*RECORDS, "frames", 1), 0, "frames must be at least 1, got 0"),
        ((*RECORDS, "frames", 1), 10**4000, "frames must fit into the record, got 1000"),
        ((*RECORDS, "fps", 1), float("nan"), "fps must be positive, got nan"),
        ((*RECORDS, "fps", 1), 0.0, "fps must be positive, got 0.0"),
        ((*RECORDS, "fps"), [30.0], "must have columns of one length"),
        ((*RECORDS, "media_id"), None, "media_id must be a list, got None"),
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


def test_a_folder_without_records_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m x3d_tf\.build_records --videos=DIR --output="):
        Manifest.load(tmp_path)


def test_damaged_shards_are_named(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        manifest.split("val")
    shard = manifest.folder / manifest.split("train").shards[0].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"size of .*{shard.name} must be {len(content)} bytes"):
        manifest.split("train")
    with pytest.raises(ValueError, match=f"{shard.name} breaks off: the record at byte"):
        index_shard(shard)
    first = manifest.splits["train"].records[0]
    shard.write_bytes(content[: first.offset] + bytes([255]) * first.length + content[first.offset + first.length :])
    with pytest.raises(ValueError, match=f"{shard.name}, record 0 cannot be parsed"):
        read_index([shard])
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        manifest.split("train")
    manifest.split("test")  # the other one's shards are all there
