"""Records with damage of all kinds, and `--verify`."""

import json
from pathlib import Path

import pytest
import tensorflow as tf
from video_fixtures import write_manifest, write_small_shards

from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.verify import verify_records


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    return write_small_shards(tmp_path / "records", monkeypatch)


def test_intact_records_are_verified(records: Manifest) -> None:
    reports = list(verify_records(records.folder, progress=False))
    assert [str(report) for report in reports] == [
        "train: 3 videos, 12 frames in 2 shards; none damaged",
        "test: 2 videos, 13 frames in 1 shard; none damaged",
    ]


def edit_manifest(records: Manifest, how: str) -> None:
    """Edits manifest.json and corrects its checksum, so that only the records contradict it."""
    content = json.loads((records.folder / "manifest.json").read_text())
    train = content["splits"]["train"]
    columns = train["records"]
    if how == "sha":
        train["shards"][0]["sha256"] = "0" * 64
    elif how == "label":
        columns["labels"][0] = [2]
    elif how == "classes":
        content["classes"] = content["classes"][1:] + content["classes"][:1]
    elif how == "names":
        columns["video"][:2] = columns["video"][1::-1]
    else:
        for column in columns.values():
            del column[1 if how == "last dropped" else 0]
        train["count"] -= 1
    write_manifest(records.folder, content)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gone", "does not exist"),
        ("short", r"has \d+ bytes, but manifest.json lists \d+"),
        ("data", r"record 1 at byte \d+ \(train/1\) cannot be read: its bytes do not match their checksum"),
        ("header", r"record 0 at byte 12 \(train/0\) cannot be read: its bytes do not match their checksum"),
        ("other", r"record 0 at byte 12 .* cannot be read: its header states \d+ bytes, but \d+ are listed"),
        ("jpeg", r"record 0 at byte 12 \(train/0\) cannot be parsed or decoded"),
        ("words", r"record 0 at byte 12 \(train/0\) cannot be parsed or decoded"),
        ("label", r"record 0 at byte 12 \(train/0\) has labels \(0,\), but manifest.json lists \(2,\)"),
        ("sha", "has another SHA-256 than manifest.json lists"),
        ("huge", rf"record 0 at byte 12 .* cannot be read: its header states {2**46} bytes, but \d+ are listed"),
        ("names", r"record 0 at byte 12 \(train/1\) has media_id 'train/0', but manifest.json lists 'train/1'"),
        ("classes", r"has the classes \['class 000'\], but manifest.json lists \['class 001'\]"),
        ("dropped", r"has bytes 0 to \d+ that no record listed in manifest.json covers"),
        ("last dropped", r"has bytes \d+ to \d+ that no record listed in manifest.json covers"),
    ],
)
def test_a_damaged_shard_is_reported(records: Manifest, damage: str, message: str) -> None:
    train = records.splits["train"]
    shard, second = train.shards[0], train.records[1]
    path = records.folder / shard.file
    stored = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "data":
        flip_byte(path, second.offset + second.length // 2)
    elif damage == "header":
        flip_byte(path, 2)
    elif damage == "huge":  # with the right checksum; TensorFlow would allocate this much memory
        path.write_bytes(bytes.fromhex("000000000040000072812907") + path.read_bytes()[12:])
    elif damage in ("label", "sha", "names", "classes", "dropped", "last dropped"):
        edit_manifest(records, damage)
    else:
        other = {
            "other": [stored[1], stored[0]],
            "jpeg": [stored[0].replace(b"\xff\xd8\xff", bytes(3)), stored[1]],
            "words": [b"x" * len(stored[0]), stored[1]],
        }[damage]
        with tf.io.TFRecordWriter(str(path)) as writer:  # with the right checksums
            for record in other:
                writer.write(record)
    reports = list(verify_records(records.folder, progress=False))
    assert [len(report.problems) for report in reports] == ([2, 1] if damage == "classes" else [1, 0])
    assert f"; {len(reports[0].problems)} damaged\n  " in str(reports[0])
    with pytest.raises(AssertionError, match=f"^{path}.*{message}$"):
        raise AssertionError(reports[0].problems[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_unlisted_shards_are_reported(records: Manifest, split: str) -> None:
    content = json.loads((records.folder / "manifest.json").read_text())
    if split == "test":
        del content["splits"]["test"]
    else:
        last = content["splits"]["train"]
        last["shards"].pop()
        last["count"] = 2
        for column in last["records"].values():
            column.pop()
    write_manifest(records.folder, content)
    problems = {report.split: report.problems for report in verify_records(records.folder, progress=False)}
    name = records.splits[split].shards[-1].file
    assert problems[split] == (f"{records.folder / name} is not listed in manifest.json",)
