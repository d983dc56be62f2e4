"""Files of frames: frames read through them, damage, and shards that have none."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf
from reading import bytes_read, counts_bytes
from video_fixtures import noise_video, write_records, write_small_shards

from x3d_tf import build_records
from x3d_tf.data.input_pipeline import evaluation_dataset
from x3d_tf.data.records import frames
from x3d_tf.data.records.format import RecordSource, encode_record, parse_annotation, parse_frames, parse_record
from x3d_tf.data.records.frames import (
    SPAN,
    IndexResult,
    frames_path,
    index_records,
    open_frames,
    read_frames_file,
    read_spans,
    shards_of,
    spans_of,
    without_frames,
)
from x3d_tf.data.records.framing import read_record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.reader import FrameReader, as_numbers, from_numbers
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.data.records.verify import verify_records
from x3d_tf.errors import UserError
from x3d_tf.types import Annotation, ClipSpec, TimedLabel, ViewSpec
from x3d_tf.wire import to_varint


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    return write_small_shards(tmp_path / "records", monkeypatch)


def test_frames_are_those_of_the_complete_record(records: Manifest) -> None:
    """The order may be any, and frames may be repeated."""
    for name, split in records.splits.items():
        reader = FrameReader(records, name)
        stored = tf.data.TFRecordDataset([str(records.folder / shard.file) for shard in split.shards])
        for number, (record, serialized) in enumerate(zip(split.records, stored, strict=True)):
            expected = parse_frames(serialized).numpy().tolist()
            _, spans = reader.read(number)
            assert len(expected) == len(spans) == record.frames
            chosen = [*range(record.frames), 0, record.frames - 1, 1]
            assert reader.frames(number, spans[chosen]) == [expected[i] for i in chosen]
            assert reader.frames(number, spans[[2, 0]]) == [expected[2], expected[0]]
            assert reader.frames(number, spans[:0]) == []


def test_the_rest_of_a_record_is_complete(records: Manifest) -> None:
    """The context and all other lists are equal."""
    path = records.folder / records.splits["train"].shards[0].file
    rest, _ = FrameReader(records, "train").read(1)
    found = tf.train.SequenceExample.FromString(rest)
    whole = tf.train.SequenceExample.FromString([*tf.data.TFRecordDataset(str(path))][1].numpy())
    assert set(whole.feature_lists.feature_list) - set(found.feature_lists.feature_list) == {"image/encoded"}
    del whole.feature_lists.feature_list["image/encoded"]
    assert found == whole and len(found.feature_lists.feature_list["image/timestamp"].feature) == 4


def test_records_of_a_smaller_manifest_are_found(records: Manifest) -> None:
    """Runs may divide a split, or leave records out."""
    last = records.splits["train"].records[-1]
    alone = FrameReader(records.with_records("train", [last]), "train")
    content, spans = alone.read(0)
    assert parse_record(content).media_id.numpy().decode() == last.media_id and len(spans) == last.frames


def test_spans_as_numbers() -> None:
    spans = np.array([(2**61, 2**32 - 1, 2**32 - 1), (0, 0, 0)], SPAN)
    assert as_numbers(spans).tolist() == [[2**61, 2**32 - 1, 2**32 - 1], [0, 0, 0]]
    assert np.array_equal(from_numbers(as_numbers(spans)), spans)


def test_frames_beside_boxes_are_found() -> None:
    """Records of key frames have many other lists of features."""
    video = noise_video(0, 5)
    annotation = Annotation(0.1, ((0.1, 0.1, 0.2, 0.2),), ((0,),), ((0.0, 0.0, 1.0, 1.0),), (0.5,))
    record = encode_record(video, RecordSource("film", (0,), key_frame=902, annotation=annotation), ["sit"])
    spans = spans_of(record, 5, offset=100)
    parts = [record[begin - 100 : begin - 100 + length] for begin, length, _ in spans.tolist()]
    assert parts[1:-1] == video.frames
    assert spans["crc"].tolist() == [google_crc32c.value(part) for part in parts]
    assert (spans["offset"][0], spans["offset"][-1] + spans["length"][-1]) == (100, 100 + len(record))
    found, expected = (parse_annotation(content) for content in (without_frames(parts[0], parts[-1]), record))
    for one, other in zip(found, expected, strict=True):
        assert one.numpy().tolist() == other.numpy().tolist()
    assert found.boxes.shape == (1, 4) and int(found.key_frame) == 3


def test_times_of_labels_are_found() -> None:
    source = RecordSource("film", (0, 1), timed=(TimedLabel(1, 0.0, 0.1), TimedLabel(0, 0.1, 0.2)))
    record = encode_record(noise_video(0, 5), source, ["sit", "run"])
    spans = spans_of(record, 5)
    before, after = (record[begin : begin + length] for begin, length, _ in spans[[0, -1]].tolist())
    assert parse_record(without_frames(before, after)).timed.ends.numpy().tolist() == [100_000, 200_000]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff", "not a protocol buffer"),
        (b"\x12\xff\xff\xff\xff\x0f", "not a protocol buffer"),
        (b"\x0b", "not a protocol buffer"),
        (b"\x12" + b"\xff" * 20, "not a protocol buffer"),
        (b"", "its frames are not its first feature list"),
        (b"\x12\x00", "its frames are not its first feature list"),
    ],
)
def test_bytes_that_are_not_a_record(record: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spans_of(record, 1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("other first", "its frames are not its first feature list"),
        ("lists twice", "its frames are not its first feature list"),
        ("context last", "its frames are not its first feature list"),
        ("context missing", "it does not begin with its context"),
        ("context twice", "it does not begin with its context, followed by the feature lists"),
        ("frames twice", "it has two lists of frames"),
    ],
)
def test_records_of_another_layout_are_errors(layout: str, message: str) -> None:
    """TensorFlow reads them, but the rest of such a record would not be complete."""
    record = encode_record(noise_video(0, 3), RecordSource("film", (0,)), ["sit"])
    example = tf.train.SequenceExample.FromString(record)
    context = tf.train.SequenceExample(context=example.context).SerializeToString()
    lists = tf.train.SequenceExample(feature_lists=example.feature_lists).SerializeToString(deterministic=True)
    extra = tf.train.FeatureLists(feature_list={"a": tf.train.FeatureList()})
    first = tf.train.SequenceExample(feature_lists=extra).SerializeToString()
    if layout == "other first":
        example.feature_lists.feature_list["a"].CopyFrom(tf.train.FeatureList())
        record = example.SerializeToString(deterministic=True)
    else:
        again = lists[lists.index(b"\x0a") :]  # the entries
        twice = again + again
        orders = {
            "lists twice": context + lists + first,
            "context last": lists + context,
            "context missing": lists,
            "context twice": context + context + lists,
            "frames twice": context + b"\x12" + to_varint(len(twice)) + twice,
        }
        record = orders[layout]
    assert len(parse_frames(record)) == 3
    with pytest.raises(ValueError, match=message):
        spans_of(record, 3)


def test_the_search_stops_after_the_listed_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    record = encode_record(noise_video(0, 9), RecordSource("film", (0,)), ["sit"])
    taken, real = [], frames._frames_in
    monkeypatch.setattr(frames, "_frames_in", lambda *args: (taken.append(span) or span for span in real(*args)))
    with pytest.raises(ValueError, match="it has more than 4 frames"):
        spans_of(record, 4)
    assert len(taken) == 5
    with pytest.raises(ValueError, match="it has 9 frames"):
        spans_of(record, 10)
    assert len(spans_of(record, 9)) == 11


def test_a_damaged_frame_is_an_error(records: Manifest) -> None:
    path = records.folder / records.splits["train"].shards[0].file
    reader = FrameReader(records, "train")
    _, spans = reader.read(1)
    content = bytearray(path.read_bytes())
    content[int(spans["offset"][1]) + 9] ^= 1
    path.write_bytes(content)
    assert len(reader.frames(1, spans[[0, 2]])) == 2
    message = rf"tfrecord: the {spans['length'][1]} bytes at {spans['offset'][1]} do not match their checksum"
    with pytest.raises(UserError, match=message):
        reader.frames(1, spans[:3])
    path.write_bytes(content[: int(spans["offset"][1])])
    with pytest.raises(UserError, match="do not match their checksum"):
        reader.frames(1, spans[[1]])
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        reader.frames(1, spans[[1]])


def test_a_damaged_context_is_an_error(records: Manifest) -> None:
    """Bytes of the context and of the lists after the frames have checksums, too."""
    split = records.splits["train"]
    path, record = records.folder / split.shards[0].file, split.records[0]
    content = path.read_bytes()
    for position in (record.offset + 5, record.offset + record.length - 1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match="do not match their checksum"):
            FrameReader(records, "train").read(0)


@counts_bytes
def test_only_the_chosen_frames_are_read(tmp_path: Path) -> None:
    """Neighbours are read together, with the few bytes between them."""
    records = write_records(tmp_path, {"train": [noise_video(seed, 60, 256, 320) for seed in range(2)]})
    reader = FrameReader(records, "train")
    reader.read(0)  # imports what it needs
    start = bytes_read()
    _, spans = reader.read(1)
    read, chosen = bytes_read() - start, spans[[3, 40, 41, 9]]
    assert read < 20_000
    reader.frames(1, chosen)
    wanted = int(chosen["length"].sum())
    assert wanted <= bytes_read() - start - read < wanted + 1000 and wanted > 100_000


def sealed(content: bytes) -> bytes:
    """Corrects the checksum at the end of a file of frames."""
    return content[:-32] + frames.hashlib.sha256(content[:-32]).digest()


def patched(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: sealed(content[:position] + value + content[position + len(value) :])


FIRST = 64 + 2 * 16  # the spans follow the header and two records, which have seven frames
SIZE = FIRST + 16 * (7 + 2 * 2) + 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], f"has {SIZE - 1} bytes, but its header states {SIZE}, .*Write it again with"),
        (lambda content: content + b"x", f"has {SIZE + 1} bytes, but its header states {SIZE}"),
        (lambda content: b"", "has 0 bytes, fewer than a file of frames"),
        (lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:], "must match its own checksum"),
        (patched(0, b"X3DFRAMF"), "is not a file of frames, version 2. Write it again with: .* --index"),
        (patched(8, b"\x01"), "is not a file of frames, version 2"),
        (lambda content: sealed(patched(12, b"\x01")(content)[:-16]), "must have the 2 records and 11 spans"),
        (patched(24, b"\0"), "belongs to another shard than manifest.json lists"),
        (patched(32, b"\0" * 32), "belongs to another shard than manifest.json lists"),
        (patched(64, struct.pack("<q", 13)), r"record at byte 12 must be listed"),
        (patched(64 + 8, struct.pack("<I", 7)), r"record at byte 12 must have 5 of 11 spans, got \(7, 5\)"),
        (patched(64 + 12, struct.pack("<I", 4)), r"record at byte 12 must have 5 of 11 spans, got \(0, 4\)"),
        (patched(FIRST, struct.pack("<q", 11)), "must have spans that lie inside the record"),
        (patched(FIRST + 16, struct.pack("<q", -1)), "must have spans that lie inside the record"),
        (patched(FIRST + 16, struct.pack("<q", 2**63 - 1)), "must have spans that lie inside the record"),
        (patched(FIRST + 32, struct.pack("<q", 13)), "must have spans that lie inside the record"),
        (patched(FIRST + 24, struct.pack("<I", 0)), "must have spans that lie inside the record"),
        (patched(FIRST + 24, struct.pack("<I", 2**32 - 1)), "must have spans that lie inside the record"),
        (patched(FIRST + 64, struct.pack("<q", 2**63 - 1)), "must have spans that lie inside the record"),
        (patched(FIRST + 64 + 8, struct.pack("<I", 2**32 - 1)), "must have spans that lie inside the record"),
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


def test_a_file_that_shrinks_while_it_is_used(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    opened, content = open_frames(path, shard), frames_path(path).read_bytes()
    for size in (70, FIRST + 20):
        frames_path(path).write_bytes(content[:size])
        with pytest.raises(UserError, match=r"was truncated\. Write it again with"):
            read_spans(opened, members[0])
    frames_path(path).unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_spans(opened, members[0])


@pytest.mark.parametrize("what", ["frames", "shard"])
def test_a_pipe_does_not_block(records: Manifest, what: str) -> None:
    path, shard, members = next(shards_of(records))
    reader, opened = FrameReader(records, "train"), open_frames(path, shard)
    pipe = path if what == "shard" else frames_path(path)
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="it is not a regular file"):
        reader.read(0)
    if what == "shard":
        with pytest.raises(OSError, match="it is not a regular file"):
            read_record(path, members[0].offset, members[0].length)
        return
    for read in (lambda: open_frames(path, shard), lambda: read_spans(opened, members[0])):
        with pytest.raises(UserError, match="it is not a regular file"):
            read()


def test_wrong_positions_and_checksums_are_found_by_verifying(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    file = frames_path(path)
    file.write_bytes(patched(FIRST + 16 + 12, b"\0" * 4)(file.read_bytes()))
    read_frames_file(path, shard, members)  # the values are possible
    report = next(verify_records(records.folder, progress=False))
    assert report.frame_problems == (f"{file} has other positions or checksums than the frames of its shard",)
    assert str(report).endswith(f"none damaged\n  {file} has other positions or checksums than the frames of its shard")


def test_a_pipeline_names_a_file_that_is_missing_or_wrong(records: Manifest) -> None:
    path, _, _ = next(shards_of(records))
    file, clip = frames_path(path), ClipSpec(2, 1.0, 16)
    views = ViewSpec(temporal_views=1, resize=20, crop=16)
    file.write_bytes(patched(FIRST + 16 + 12, b"\0" * 4)(file.read_bytes()))  # the checksum of the first frame
    message = "record 0 .*frames has other positions or checksums than the frames. Write it again with: .*--index"
    with pytest.raises(UserError, match=message), record_errors_as_user_errors():
        list(evaluation_dataset(records, "train", clip, views))
    file.unlink()
    with pytest.raises(UserError, match=r"cannot be read: No such file or directory\. Write it again with: .*--index"):
        evaluation_dataset(records, "train", clip, views)


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
    real, calls = frames.spans_of_shard, iter(range(9))

    def stop_at_the_second(*arguments: object) -> object:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(frames, "spans_of_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        index_records(records.folder, progress=False)
    assert [file.exists() for file in files] == [True, False, False]
    assert index_records(records.folder, progress=False) == IndexResult(written=2, kept=1)


def test_a_record_with_more_frames_than_listed_is_not_indexed(records: Manifest) -> None:
    path, shard, members = next(shards_of(records))
    members = [members[0]._replace(frames=2), *members[1:]]
    with pytest.raises(UserError, match=r"record 0 does not have the 2 frames that .*: it has more than 2 frames"):
        frames.spans_of_shard(path, shard, members)


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
    for path, _, _ in shards_of(records):
        frames_path(path).unlink()
    assert Manifest.load(records.folder) == records
    assert "frames" not in json.loads((records.folder / "manifest.json").read_text())
