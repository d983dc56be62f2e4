"""Files of frames: frames read through them, damage, and shards that have none."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from video_fixtures import noise_video, write_small_shards

from x3d_tf import build_records
from x3d_tf.crc32c import crc32c
from x3d_tf.data.records import frames
from x3d_tf.data.records.format import RecordSource, encode_record, parse_record
from x3d_tf.data.records.frames import (
    IndexResult,
    frames_of,
    frames_path,
    index_records,
    read_frames,
    read_frames_file,
    shards_of,
)
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.verify import verify_records
from x3d_tf.errors import UserError
from x3d_tf.types import Annotation


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    return write_small_shards(tmp_path / "records", monkeypatch)


def test_frames_are_those_of_the_complete_record(records: Manifest) -> None:
    """The order may be any, and frames may be repeated."""
    for path, shard, members in shards_of(records):
        table = read_frames_file(path, shard, members)
        for number, (record, serialized) in enumerate(zip(members, tf.data.TFRecordDataset(str(path)), strict=True)):
            expected = parse_record(serialized).frames.numpy().tolist()
            assert len(expected) == record.frames
            chosen = [*range(record.frames), 0, record.frames - 1, 1]
            assert read_frames(path, table, number, chosen) == [expected[i] for i in chosen]
            assert read_frames(path, table, number, []) == []


def test_frames_beside_boxes_are_found() -> None:
    """Records of key frames have many other lists of features."""
    video = noise_video(0, 5)
    annotation = Annotation(0.1, ((0.1, 0.1, 0.2, 0.2),), ((0,),), ((0.0, 0.0, 1.0, 1.0),), (0.5,))
    record = encode_record(video, RecordSource("film", (0,), key_frame=902, annotation=annotation), ["sit"])
    table = frames_of(record, 5, offset=100)
    spans = zip((table.offsets - 100).tolist(), table.lengths.tolist(), strict=True)
    assert [record[begin : begin + length] for begin, length in spans] == video.frames
    joined = b"".join(video.frames)
    lengths = np.array([len(frame) for frame in video.frames])
    assert table.checksums.tolist() == crc32c(joined, np.cumsum(lengths) - lengths, lengths).tolist()


@pytest.mark.parametrize("record", [b"\xff", b"\x12\xff\xff\xff\xff\x0f", b"\x0b", b"\x12" + b"\xff" * 20])
def test_bytes_that_are_not_a_record(record: bytes) -> None:
    with pytest.raises(ValueError, match="not a protocol buffer"):
        frames_of(record, 1)


def test_the_search_stops_after_the_listed_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    record = encode_record(noise_video(0, 9), RecordSource("film", (0,)), ["sit"])
    taken, real = [], frames.frame_spans
    monkeypatch.setattr(frames, "frame_spans", lambda data: (taken.append(span) or span for span in real(data)))
    with pytest.raises(ValueError, match="it has more than 4 frames"):
        frames_of(record, 4)
    assert len(taken) == 5
    assert len(frames_of(record, 9).offsets) == 9


def test_a_damaged_frame_is_an_error(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    table = read_frames_file(path, shard, members)
    content = bytearray(path.read_bytes())
    content[int(table.offsets[4]) + 9] ^= 1
    path.write_bytes(content)
    assert len(read_frames(path, table, 1, [0, 2])) == 2
    with pytest.raises(UserError, match=r"tfrecord: frame 1 of record 1 does not match its checksum"):
        read_frames(path, table, 1, [0, 1, 2])
    path.write_bytes(content[: int(table.offsets[4])])
    with pytest.raises(UserError, match=r"does not match its checksum"):
        read_frames(path, table, 1, [1])
    with pytest.raises(UserError, match=r"chosen must be frames in 0\.\.3, got \[4\]"):
        read_frames(path, table, 1, [4])


def sealed(content: bytes) -> bytes:
    """Corrects the checksum at the end of a file of frames."""
    return content[:-32] + frames.hashlib.sha256(content[:-32]).digest()


def patched(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: sealed(content[:position] + value + content[position + len(value) :])


FIRST_OFFSET = 64 + 2 * 4  # after the header and the numbers of frames of two records with seven frames
FIRST_LENGTH = FIRST_OFFSET + 7 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "size of .*frames must be 216 bytes, as manifest.json implies, got 215"),
        (lambda content: content + b"x", "frames must have at most 216 bytes"),
        (lambda content: b"", "size of .*frames must be 216 bytes, as manifest.json implies, got 0"),
        (lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:], "must match its own checksum"),
        (patched(0, b"X3DFRAMF"), "must be a file of frames, version 1, got 1"),
        (patched(8, b"\x02"), "must be a file of frames, version 1, got 2"),
        (patched(12, b"\x03"), r"must have the sizes of its shard, got \[3, 7, \d+\]"),
        (patched(24, b"\0"), "must have the sizes of its shard"),
        (patched(32, b"\0" * 32), "must have the SHA-256 of its shard in manifest.json, got '0000"),
        (patched(64, struct.pack("<2I", 4, 3)), r"must have the numbers of frames in manifest.json, got \[4, 3\]"),
        (patched(FIRST_OFFSET, struct.pack("<Q", 2**64 - 1)), "frame 0 must lie inside its record"),
        (patched(FIRST_OFFSET, struct.pack("<Q", 0)), "frame 0 must lie inside its record"),
        (
            patched(FIRST_OFFSET + 8, struct.pack("<Q", 13)),
            "frame 1 must lie inside its record, after the frame",
        ),
        (patched(FIRST_LENGTH, struct.pack("<I", 0)), "frame 0 must lie inside its record"),
        (patched(FIRST_LENGTH, struct.pack("<I", 2**32 - 1)), "frame 0 must lie inside its record"),
    ],
)
def test_a_file_of_frames_is_not_trusted(records: Manifest, change: Callable[[bytes], bytes], message: str) -> None:
    path, shard, members = next(shards_of(records))
    file = frames_path(path)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_frames_file(path, shard, members)
    reports = [*verify_records(records.folder, progress=False)]
    assert [report.problems for report in reports] == [(), ()]
    assert len(reports[0].frame_problems) == 1 and str(file) in reports[0].frame_problems[0]


def test_wrong_positions_and_checksums_are_found_by_verifying(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    file = frames_path(path)
    checksums = FIRST_LENGTH + 7 * 4
    file.write_bytes(patched(checksums, b"\0" * 4)(file.read_bytes()))
    read_frames_file(path, shard, members)  # the values are possible
    report = next(verify_records(records.folder, progress=False))
    assert report.frame_problems == (f"{file} has other positions or checksums than the frames of its shard",)
    assert str(report).endswith(f"none damaged\n  {file} has other positions or checksums than the frames of its shard")


def test_missing_files_are_made_again(
    records: Manifest, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One file is missing, one is damaged and one is kept; the new files equal those of the builder."""
    files = [frames_path(path) for path, _, _ in shards_of(records)]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"has no damaged shard, but 2 files of frames must be made again: .*--index"):
        in_process(build_records, "--verify", f"--output={records.folder}")
    assert f"{files[0]} cannot be read: No such file or directory" in capsys.readouterr().out
    in_process(build_records, "--index", f"--output={records.folder}")
    assert capsys.readouterr().out == f"{records.folder}: wrote 2 files of frames; 1 existed\n"
    assert [file.read_bytes() for file in files] == before
    assert index_records(records.folder, progress=False) == IndexResult(written=0, kept=3)


def test_an_interrupted_run_resumes(records: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [frames_path(path) for path, _, _ in shards_of(records)]
    for file in files:
        file.unlink()
    real, calls = frames.frames_of_shard, iter(range(9))

    def stop_at_the_second(*arguments: object) -> object:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(frames, "frames_of_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        index_records(records.folder, progress=False)
    assert [file.exists() for file in files] == [True, False, False]
    assert index_records(records.folder, progress=False) == IndexResult(written=2, kept=1)


def test_a_record_with_more_frames_than_listed_is_not_indexed(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    members = [members[0]._replace(frames=2), *members[1:]]
    with pytest.raises(UserError, match=r"record 0 does not have the 2 frames that .*: it has more than 2 frames"):
        frames.frames_of_shard(path, shard, members)


@pytest.mark.parametrize("damage", ["byte", "record", "gone"])
def test_damaged_shards_are_not_indexed(records: Manifest, damage: str) -> None:
    path, _, members = next(shards_of(records))
    frames_path(path).unlink()
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[-6] ^= 1  # in the time of a frame
        message = "has another SHA-256 than manifest.json lists. List all damaged records with: .*--verify"
    elif damage == "record":
        content[members[0].offset : members[0].offset + 4] = b"\xff" * 4
        message = "record 0 does not have the 3 frames that manifest.json lists: it is not a protocol buffer"
    else:
        message = "does not exist, but manifest.json lists it"
    path.unlink() if damage == "gone" else path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        index_records(records.folder, progress=False)
    assert not frames_path(path).exists()


def test_frames_are_not_part_of_the_manifest(records: Manifest) -> None:
    """Records without them stay valid."""
    for path, _, _ in shards_of(records):
        frames_path(path).unlink()
    assert Manifest.load(records.folder) == records
    assert "frames" not in json.loads((records.folder / "manifest.json").read_text())
