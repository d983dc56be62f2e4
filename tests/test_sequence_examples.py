"""Records from the TFRecord files of other tools: the data set `sequence_examples`."""

import csv
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
from x3d_tf.data.building.sequence_examples import LABELS, NAME, RATE, read_contexts
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


def gardens(label: int = 1) -> bytes:
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
    write(tmp_path / "train-00000-of-00002", gardens(2), gardens(0))
    write(tmp_path / "train-00001-of-00002", gardens(1))
    found = sources(tmp_path)
    classes = {video.name: video.classes for video in found.splits["train"]}
    shards = ("train-00000-of-00002", "train-00001-of-00002")
    assert classes == {
        f"{shards[0]}:0": ("shot put",),
        f"{shards[0]}:1": ("running",),
        f"{shards[1]}:0": ("high jump",),
    }
    assert (found.task, found.classes, found.unusable) == ("single_label", CLASSES, [])
    video = encoded(found, f"{shards[0]}:1")
    assert video == EncodedVideo([image(number) for number in range(5)], 12.0)  # unchanged


def test_frames_are_scaled_and_other_formats_converted(tmp_path: Path) -> None:
    images = [image(number, kind="PNG") for number in range(3)]
    write(tmp_path / "train", example(images, {LABELS: feature(0)}), gardens())
    for name, short_side, expected in (("train:0", 32, (48, 32)), ("train:1", 16, (24, 16))):
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
        write(tmp_path / "train", gardens(), other)
        found = sources(tmp_path)
        assert found.task == "multi_label"
        assert {video.name: video.classes for video in found.splits["train"]}["train:1"] == classes


def test_names_and_frame_rates_of_records(tmp_path: Path) -> None:
    """A repeated name is replaced. The rate of a record comes before the one given. The first context is long."""
    contexts: list[dict[str, tf.train.Feature]] = [
        {NAME: feature(b"a"), RATE: feature(25.0), "text": feature(b"z" * 99_999)},
        {NAME: feature(b"a")},
        {NAME: feature(b"x" * 2000)},
    ]
    write(tmp_path / "train", *(example([image(0)], {LABELS: feature(1)} | context) for context in contexts))
    found = {video.name: video.frame_rate for video in sources(tmp_path).splits["train"]}
    assert found == {"a": 25.0, "train:1": 12.0, "train:2": 12.0}


@pytest.mark.parametrize(
    ("context", "rate", "pattern", "message"),
    [
        (
            {LABELS: feature(3)},
            1.0,
            "train",
            "record 0: clip/label/index must be in 0..2, as in --classes, got 3",
        ),
        ({LABELS: feature(-1)}, 1.0, "train", "train, record 0: clip/label/index must be in 0..2"),
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
        ({LABELS: feature(1)}, 0.0, "train", "frame_rate must be above 0 and at most 1000, got 0"),
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
    bad = [
        example([image(0)], {}),
        example([image(0)], {LABELS: feature(0), RATE: feature(float("nan"))}),
        gardens(),
    ]
    write(tmp_path / "train-0", *bad)
    damaged = bytearray(write(tmp_path / "train-1", gardens(), gardens()).read_bytes())
    damaged[len(damaged) // 2 - 200] ^= 1  # in a frame of the first record
    (tmp_path / "train-1").write_bytes(damaged)
    content = write(tmp_path / "train-2", gardens(), gardens()).read_bytes()
    (tmp_path / "train-2").write_bytes(content[:-1])
    (tmp_path / "train-3").write_bytes(b"not a TFRecord file, as its first bytes show")
    write(tmp_path / "train-4", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    different = [image(0), image(1, (16, 16))]
    write(tmp_path / "train-5", *(example(images, {LABELS: feature(0)}) for images in ([], different)))
    write(tmp_path / "train-6", example([b"no image"], {LABELS: feature(0)}))
    settings: dict[str, Any] = {"dataset": "sequence_examples", "short_side": 32, "progress": False}
    result = build_records(inputs(tmp_path), tmp_path / "records", **settings)
    names = {record.media_id for record in result.manifest.splits["train"].records}
    assert names == {"train-0:2", "train-1:1", "train-2:0"}
    with (tmp_path / "records" / "failures.csv").open(newline="") as file:
        found = {(Path(path).relative_to(tmp_path).parts[0], reason) for path, reason in list(csv.reader(file))[1:]}
    reasons = {
        ("train-0", "has no clip/label/index in record 0"),
        ("train-0", "has a frame rate of nan in record 1"),
        ("train-1", "has a damaged record at byte 12: its checksum differs"),
        ("train-2", "is truncated or not a TFRecord file: record 1 does not fit into it"),
        ("train-3", "is truncated or not a TFRecord file: record 0 does not fit into it"),
        ("train-4", "is not a file of SequenceExamples: the context of record 0 is too long"),
        ("train-5", "has a record at byte 12 without frames in image/encoded"),
    }
    assert reasons <= found
    assert {name for name, _ in found - reasons} == {"train-5", "train-6"} and len(found) == len(reasons) + 2


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    """A record is unusable or unchanged; nothing else is raised."""
    content = write(tmp_path / "train", gardens()).read_bytes()
    (whole,) = sources(tmp_path).splits["train"]
    expected = encode_or_error(whole, 256, 95)
    outcomes = set()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        (tmp_path / "train").write_bytes(damaged)
        try:
            contexts = list(read_contexts(tmp_path / "train"))
        except VideoError:
            outcomes.add("listed")
            continue
        result = encode_or_error(whole._replace(example=contexts[0][0]), 256, 95)
        assert isinstance(result, VideoError) or result == expected
        outcomes.add(type(result).__name__)
    assert outcomes == {"listed", "VideoError"}
