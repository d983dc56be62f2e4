"""Records as bytes: their features, shards, checksums, and what is read of them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from reading import bytes_read, counts_bytes
from video_fixtures import noise_video, write_records

from x3d_tf.data.records import format as record_format
from x3d_tf.data.records import index
from x3d_tf.data.records.format import (
    RecordSource,
    ShardWriter,
    decode_frame,
    encode_record,
    parse_frames,
    parse_record,
)
from x3d_tf.data.records.framing import RecordError, read_record
from x3d_tf.data.records.index import Record, shard_name
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo, VideoError, as_stored, encode_jpeg
from x3d_tf.types import Storage


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    videos = [noise_video(seed, frames=3 + seed) for seed in range(5)]
    return write_records(tmp_path / "records", {"train": videos[:3], "test": videos[3:]})


def test_a_record_has_mediasequences_features() -> None:
    video = EncodedVideo([b"first", b"second", b"third"], 25.0)
    example = tf.train.SequenceExample.FromString(
        encode_record(video, RecordSource("jump/a.mp4", (7,)), [*"abcdefg", "jümp"])
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


def test_a_multi_label_record() -> None:
    video = EncodedVideo([b"frame"], 25.0)
    encoded = encode_record(video, RecordSource("a", (0, 2)), ["jump", "sit", "run"])
    context = tf.train.SequenceExample.FromString(encoded).context.feature
    assert context["clip/label/index"].int64_list.value == [0, 2]
    assert context["clip/label/string"].bytes_list.value == [b"jump", b"run"]
    assert context["clip/label/text"].bytes_list.value == [b"jump", b"run"]
    assert parse_record(tf.constant(encoded)).labels.numpy().tolist() == [0, 2]


def test_parsing_inverts_encoding() -> None:
    video = noise_video(0, frames=4)
    record = encode_record(video, RecordSource("a", (3,)), ["", "", "", "walk"])
    parsed = parse_record(record)
    assert parse_frames(record).numpy().tolist() == video.frames
    assert (parsed.labels.numpy().tolist(), float(parsed.fps), parsed.media_id.numpy()) == ([3], 30.0, b"a")


def test_the_index_matches_tfrecord(manifest: Manifest) -> None:
    for split in manifest.splits.values():
        stored = {path.file: (manifest.folder / path.file).read_bytes() for path in split.shards}
        read = [r.numpy() for s in split.shards for r in tf.data.TFRecordDataset(str(manifest.folder / s.file))]
        indexed = [stored[split.shards[r.shard].file][r.offset : r.offset + r.length] for r in split.records]
        assert indexed == read
        for shard in split.shards:
            assert shard.bytes == len(stored[shard.file])
            assert shard.sha256 == hashlib.sha256(stored[shard.file]).hexdigest()


def stored(path: Path, record: Record) -> bytes:
    """Reads the bytes of a record in a shard."""
    return read_record(path, record.offset, record.length)


def test_videos_are_distributed_to_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 2)
    video, bad = noise_video(0, frames=2), VideoError("x.mp4", "is broken")
    sources = [RecordSource(str(i), (0,)) for i in range(7)]
    taken: list[Any] = []
    results = [video, bad, bad, bad, video, video, video]
    split = record_format.write_split(tmp_path, "train", sources, iter(results), ["a"], taken.append)
    assert taken == results
    assert [(r.shard, r.media_id) for r in split.records] == [(0, "0"), (1, "4"), (1, "5"), (2, "6")]
    names = [shard_name("train", index, 4) for index in (0, 2, 3)]  # both videos of shard 1 failed
    assert [shard.file for shard in split.shards] == sorted(path.name for path in tmp_path.glob("*.tfrecord")) == names
    assert names[0] == "train-00000-of-00004.tfrecord"
    for record in split.records:
        shard = split.shards[record.shard]
        parsed = parse_record(stored(tmp_path / shard.file, record))
        assert parsed.media_id.numpy().decode() == record.media_id


def test_an_interrupted_shard_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.tfrecord") as writer:
        writer.write(b"record")
        assert not (tmp_path / "a.tfrecord").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_equal_videos_give_equal_bytes() -> None:
    once, again = (encode_record(noise_video(0, 3), RecordSource("a", (1,)), "ab") for _ in range(2))
    assert once == again


def test_a_record_is_read_with_its_checksums(manifest: Manifest) -> None:
    split = manifest.splits["train"]
    path, record = manifest.folder / split.shards[0].file, split.records[1]
    content = path.read_bytes()
    data = content[record.offset : record.offset + record.length]
    start, end = record.offset - index.HEADER_BYTES, record.offset + record.length + index.FOOTER_BYTES
    alone = bytes(start) + content[start:end] + bytes(len(content) - end)
    path.write_bytes(alone)
    assert stored(path, record) == data
    for position in (start, start + 8, record.offset, record.offset + record.length // 2, end - 1):
        path.write_bytes(alone[:position] + bytes([alone[position] ^ 1]) + alone[position + 1 :])
        with pytest.raises(RecordError, match="do not match their checksum"):
            stored(path, record)
    for content in (alone[: end - 1], alone[:start], b""):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="do not match their checksum"):
            stored(path, record)
    path.write_bytes(alone)
    with pytest.raises(RecordError, match=f"states {record.length} bytes, but {record.length - 1} are listed"):
        stored(path, record._replace(length=record.length - 1))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        stored(path, record)


@counts_bytes
def test_only_the_bytes_of_the_record_are_read(manifest: Manifest) -> None:
    split = manifest.splits["train"]
    path, record = manifest.folder / split.shards[0].file, split.records[1]
    start, end = record.offset - index.HEADER_BYTES, record.offset + record.length + index.FOOTER_BYTES
    framed, gap = path.read_bytes()[start:end], 1 << 28
    with path.open("wb") as file:  # sparse: uses no disk space
        file.seek(gap)
        file.write(framed)
        file.truncate(2 * gap)
    moved = record._replace(offset=gap + index.HEADER_BYTES)
    before = bytes_read()
    assert len(stored(path, moved)) == record.length
    assert bytes_read() - before < 1 << 20


# A header with a valid checksum, for which TensorFlow would allocate 2**46 bytes and crash.
HUGE = bytes.fromhex("000000000040000072812907")


def test_no_more_memory_than_listed_is_used(manifest: Manifest) -> None:
    split = manifest.splits["train"]
    path, record = manifest.folder / split.shards[0].file, split.records[1]
    content = path.read_bytes()
    path.write_bytes(content[: record.offset - index.HEADER_BYTES] + HUGE + content[record.offset :])
    with pytest.raises(RecordError, match=f"its header states {2**46} bytes, but {record.length} are listed"):
        stored(path, record)


@pytest.mark.parametrize("quality", [50, 80, 95])
def test_a_frame_as_stored_is_that_of_its_record(quality: int) -> None:
    """Pillow decodes as TensorFlow does."""
    pixels = np.random.default_rng(quality).integers(0, 256, (37, 50, 3), np.uint8)
    expected = decode_frame(encode_jpeg(pixels, quality)).numpy()
    np.testing.assert_array_equal(as_stored(pixels, Storage(37, quality)), expected)
