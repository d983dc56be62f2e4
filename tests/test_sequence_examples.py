"""Records from the TFRecord files of other tools: the data set `sequence_examples`."""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from video_fixtures import noise_video, write_records

from x3d_tf.data.building.builder import build_records
from x3d_tf.data.building.encoding import encode_or_error
from x3d_tf.data.building.sequence_examples import END, LABELS, NAME, RATE, START
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError

CLASSES = ("running", "high jump", "shot put")


def image(number: int, size: tuple[int, int] = (48, 32), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (9 * number, 40, 200)).save(file, kind)
    return file.getvalue()


def feature(*values: Any) -> tf.train.Feature:
    if isinstance(values[0], bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if isinstance(values[0], float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def example(images: Sequence[bytes], context: Mapping[str, tf.train.Feature]) -> bytes:
    lists = {"image/encoded": tf.train.FeatureList(feature=[feature(value) for value in images])}
    return tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=lists)
    ).SerializeToString()


def model_garden_example(label: int = 1) -> bytes:
    """An example with the two features that Model Garden requires."""
    return example([image(number) for number in range(5)], {LABELS: feature(label)})


def write(path: Path, *examples: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for serialized in examples:
            writer.write(serialized)
    return path


def inputs(root: Path, rate: float | None = 12.0, pattern: str = "train*") -> Inputs:
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return Inputs(lists={"train": root / pattern}, classes=root / "classes.txt", frame_rate=rate)


def sources(root: Path, rate: float | None = 12.0, pattern: str = "train*") -> Sources:
    given = inputs(root, rate, pattern)
    return choose("sequence_examples", given).sources(given)


def encoded(found: Sources, name: str, short_side: int = 256) -> EncodedVideo | VideoError:
    (video,) = (video for video in found.splits["train"] if video.name == name)
    return encode_or_error(video, short_side, 95)


def test_records_with_the_features_that_model_garden_requires(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002", model_garden_example(2), model_garden_example(0))
    write(tmp_path / "train-00001-of-00002", model_garden_example(1))
    found = sources(tmp_path)
    classes = {video.name: video.classes for video in found.splits["train"]}
    shards = ("train-00000-of-00002", "train-00001-of-00002")
    assert classes == {
        f"train/{shards[0]}:0": ("shot put",),
        f"train/{shards[0]}:1": ("running",),
        f"train/{shards[1]}:0": ("high jump",),
    }
    assert (found.task, found.classes, found.unusable) == ("single_label", CLASSES, [])
    video = encoded(found, f"train/{shards[0]}:1")
    assert video == EncodedVideo([image(number) for number in range(5)], 12.0)  # unchanged


def test_frames_are_scaled_and_other_formats_converted(tmp_path: Path) -> None:
    images = [image(number, kind="PNG") for number in range(3)]
    write(tmp_path / "train", example(images, {LABELS: feature(0)}), model_garden_example())
    for name, short_side, expected in (("train/train:0", 32, (48, 32)), ("train/train:1", 16, (24, 16))):
        video = encoded(sources(tmp_path), name, short_side)
        assert isinstance(video, EncodedVideo)
        for number, jpeg in enumerate(video.frames):
            with Image.open(io.BytesIO(jpeg)) as picture:
                assert (picture.format, picture.size) == ("JPEG", expected)
                np.testing.assert_allclose(np.asarray(picture).mean((0, 1)), (9 * number, 40, 200), atol=2)


def test_records_of_this_package_are_read_back(tmp_path: Path) -> None:
    """Names, classes, frame rates and the bytes of all frames are the same."""
    videos = [replace(noise_video(number, 3 + number), fps=10.0 + number) for number in range(4)]
    write_records(tmp_path / "own", {"train": videos}, classes=2)
    own = Manifest.load(tmp_path / "own")
    (tmp_path / "classes.txt").write_text("\n".join(own.classes))
    given = Inputs(lists={"train": tmp_path / "own" / "train*.tfrecord"}, classes=tmp_path / "classes.txt")
    found = choose("sequence_examples", given).sources(given)
    by_name = {video.name: video for video in found.splits["train"]}
    assert list(map(len, (by_name, found.unusable))) == [4, 0]
    for record, video in zip(own.splits["train"].records, videos, strict=True):
        copy = by_name[record.media_id]
        assert copy.classes == tuple(own.classes[label] for label in record.labels)
        assert encode_or_error(copy, 256, 95) == video


def test_the_task_follows_from_the_numbers_of_labels(tmp_path: Path) -> None:
    none = example([image(0)], {LABELS: tf.train.Feature(int64_list=tf.train.Int64List())})
    several = example([image(0)], {LABELS: feature(2, 0, 2)})
    for other, classes in ((none, ()), (several, ("shot put", "running"))):
        write(tmp_path / "train", model_garden_example(), other)
        found = sources(tmp_path)
        assert found.task == "multi_label"
        assert {video.name: video.classes for video in found.splits["train"]}["train/train:1"] == classes


def test_names_times_and_frame_rates_of_records(tmp_path: Path) -> None:
    """The rate of a record comes before the one given. The first context is longer than what is read at first."""
    contexts: list[dict[str, tf.train.Feature]] = [
        {NAME: feature(b"a"), RATE: feature(25.0), "text": feature(b"z" * 99_999)},
        {NAME: feature(b"a"), START: feature(1_500_000), END: feature(4_000_000), RATE: feature(20)},
        {RATE: feature(0.0)},
        {NAME: feature(b"a")},
    ]
    write(tmp_path / "train", *(example([image(0)], {LABELS: feature(1)} | context) for context in contexts))
    found = sources(tmp_path)
    rates = {(video.name, video.start, video.end): video.frame_rate for video in found.splits["train"]}
    assert rates == {("a", 0.0, None): 25.0, ("a", 1.5, 4.0): 20.0, ("train/train:2", 0.0, None): 12.0}
    (repeated,) = found.unusable
    assert repeated.reason == f"has a record 3 that repeats the name and the times of {tmp_path}/train, record 0"
    assert found.expected == {"train": 4}


def test_files_of_equal_names_in_two_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "data", model_garden_example(), model_garden_example())
    given = replace(inputs(tmp_path), lists={split: tmp_path / split / "data" for split in ("train", "test")})
    result = build_records(given, tmp_path / "records", dataset="sequence_examples", short_side=32, progress=False)
    names = {name: {record.media_id for record in part.records} for name, part in result.manifest.splits.items()}
    assert names == {split: {f"{split}/data:0", f"{split}/data:1"} for split in ("train", "test")}


def test_another_frame_rate_is_another_build(tmp_path: Path) -> None:
    write(tmp_path / "train", model_garden_example())
    settings: dict[str, Any] = {"dataset": "sequence_examples", "short_side": 32, "progress": False}
    build_records(inputs(tmp_path), tmp_path / "records", **settings)
    with pytest.raises(UserError, match=r"holds a build with frame_rate = 12.0, not 24.0"):
        build_records(inputs(tmp_path, 24.0), tmp_path / "records", **settings)


@pytest.mark.parametrize(
    ("context", "rate", "pattern", "message"),
    [
        (
            {LABELS: feature(3)},
            1.0,
            "train",
            "record 0: clip/label/index must be in 0..2, as in --classes, got 3",
        ),
        ({LABELS: feature(-2)}, 1.0, "train", "train, record 0: clip/label/index must be in 0..2"),
        (
            {LABELS: feature(1), RATE: feature(1e-30)},
            1.0,
            "train",
            "image/frame_rate must be in 0.017..1000 frames",
        ),
        (
            {LABELS: feature(1), START: feature(5), END: feature(5)},
            1.0,
            "train",
            "record 0: clip/start/timestamp must be before clip/end/timestamp",
        ),
        (
            {LABELS: feature(1), "clip/label/text": feature(b"running")},
            1.0,
            "train",
            "record 0: the name of its label must be that of class 1 in --classes, 'high jump', got 'running'",
        ),
        (
            {LABELS: feature(1)},
            None,
            "train",
            "--frame_rate must be given: .*, record 0 states no image/frame_rate",
        ),
        ({LABELS: feature(1)}, 0.0, "train", r"frame_rate must be in 0.017..1000 frames per second, got 0"),
        ({LABELS: feature(1)}, 1.0, "test-*", "--lists=train must be a TFRecord file, or a pattern that matches some"),
    ],
)
def test_errors_name_the_record(
    tmp_path: Path, context: dict[str, Any], rate: float | None, pattern: str, message: str
) -> None:
    write(tmp_path / "train", example([image(0)], context))
    with pytest.raises(UserError, match=message):
        sources(tmp_path, rate, pattern)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train must be a regular file, not a folder, pipe or device"):
        sources(tmp_path)


def test_names_of_classes_may_be_spelled_differently(tmp_path: Path) -> None:
    write(tmp_path / "train", example([image(0)], {LABELS: feature(1), "clip/label/string": feature(b"High_Jump")}))
    assert sources(tmp_path).splits["train"][0].classes == ("high jump",)


def test_unusable_records_are_left_out(tmp_path: Path) -> None:
    """All intact records of damaged files are kept."""
    write(
        tmp_path / "train-0",
        example([image(0)], {}),
        example([image(0)], {LABELS: feature(-1)}),
        model_garden_example(),
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + bytes(100),
        b"\x0a\x7f" + bytes(200),
        model_garden_example(),
    )
    damaged = bytearray(write(tmp_path / "train-1", model_garden_example(), model_garden_example()).read_bytes())
    damaged[len(damaged) // 2 - 200] ^= 1  # in a frame of the first record
    (tmp_path / "train-1").write_bytes(damaged)
    content = write(tmp_path / "train-2", model_garden_example(), model_garden_example()).read_bytes()
    (tmp_path / "train-2").write_bytes(content[:-1])
    (tmp_path / "train-3").write_bytes(b"not a TFRecord file, as its first bytes show")
    (tmp_path / "train-4").write_bytes(gzip.compress(content))
    different = [image(0), image(1, (16, 16))]
    write(tmp_path / "train-5", *(example(images, {LABELS: feature(0)}) for images in ([], different, [b"no image"])))
    with (tmp_path / "train-6").open("wb") as file:
        file.write(content)
        file.truncate(10**9)  # a download that did not finish
    (tmp_path / "train-0.frames").touch()
    settings: dict[str, Any] = {"dataset": "sequence_examples", "short_side": 32, "progress": False}
    result = build_records(inputs(tmp_path), tmp_path / "records", **settings)
    names = {record.media_id for record in result.manifest.splits["train"].records}
    kept = ("train-0:2", "train-0:5", "train-1:1", "train-2:0", "train-6:0", "train-6:1")
    assert names == {f"train/{name}" for name in kept}
    with (tmp_path / "records" / "failures.csv").open(newline="") as file:
        found = {(Path(path).relative_to(tmp_path).parts[0], reason) for path, reason in list(csv.reader(file))[1:]}
    no_header = "is truncated, damaged or not a TFRecord file: record {} has no valid header"
    assert found == {
        ("train-0", "has a record 0 without clip/label/index"),
        ("train-0", "has a record 1 with the label -1"),
        ("train-0", "has a record 3 that is not a SequenceExample: its context has 18446744073709551615 bytes"),
        ("train-0", "has a record 4 that is not a SequenceExample: it is not a protocol buffer"),
        ("train-1", "has a damaged record 0, at byte 12: its bytes do not match their checksum"),
        ("train-2", no_header.format(1)),
        ("train-3", no_header.format(0)),
        ("train-4", "is compressed; decompress it first"),
        ("train-5", "has a record 0 without frames: it has no image/encoded"),
        ("train-5", "has a record 1 whose frame 1 has the size (16, 16), not (32, 48)"),
        ("train-5", "has a record 2 whose frame 0 cannot be read: it is not a JPEG or PNG image"),
        ("train-6", no_header.format(2)),
    }
    assert result.manifest.splits["train"].expected == 14


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    """A record is unusable or unchanged; nothing else is raised."""
    content = write(tmp_path / "train", model_garden_example()).read_bytes()
    (intact,) = sources(tmp_path).splits["train"]
    expected = encode_or_error(intact, 256, 95)
    outcomes = set()
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        (tmp_path / "train").write_bytes(damaged)
        found = sources(tmp_path)
        results = [encode_or_error(video, 256, 95) for video in found.splits["train"]]
        assert all(isinstance(result, VideoError) or result == expected for result in results)
        outcomes.add((len(found.unusable), *(type(result).__name__ for result in results)))
    assert outcomes == {(1,), (0, "VideoError")}


def test_labels_that_change_during_the_build(tmp_path: Path) -> None:
    write(tmp_path / "train", model_garden_example(1))
    (video,) = sources(tmp_path).splits["train"]
    write(tmp_path / "train", model_garden_example(2))
    changed = encode_or_error(video, 256, 95)
    assert isinstance(changed, VideoError)
    assert changed.reason == "has a record 0 whose labels have changed during the build"
