"""Order and content of training clips, and views in evaluation, compared with plain loops."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_transforms import naive_resize
from video_fixtures import noise_video, write_manifest, write_records

from x3d_tf.data import input_pipeline
from x3d_tf.data.input_pipeline import evaluation_dataset, sample_position, training_dataset
from x3d_tf.data.records import table
from x3d_tf.data.records.frames import frames_path
from x3d_tf.data.records.index import Split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.data.sampling import crop_offsets, frame_indices, last_start, view_starts
from x3d_tf.data.video.decode import EncodedVideo
from x3d_tf.types import ClipSpec, ViewSpec

RECORDS, BATCH = 11, 4  # two steps per epoch, three records left over
CLIP = ClipSpec(3, 2.0, 16)
LENGTHS = [4 + 3 * index for index in range(RECORDS)]  # frames; the first is shorter than the clip


@pytest.fixture(scope="module")
def videos() -> list[EncodedVideo]:
    return [noise_video(seed, frames, *((40, 52) if seed % 2 else (48, 36))) for seed, frames in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def manifest(videos: list[EncodedVideo], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Records labelled with their index."""
    return write_records(tmp_path_factory.mktemp("records"), {"train": videos})


def stream(manifest: Manifest, steps: int, **settings: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the elements of the first `steps` batches of a worker."""
    chosen: dict[str, Any] = {"jitter": (18, 24), "flip": True, "batch": BATCH, "seed": 5} | settings
    dataset = training_dataset(manifest, "train", CLIP, **chosen)
    return list(dataset.take(steps).as_numpy_iterator())


@pytest.fixture(scope="module")
def plain(manifest: Manifest) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first eight batches of a single worker."""
    return stream(manifest, 8)


def permutation(records: int, seed: int, epoch: int) -> list[int]:
    places = [
        sample_position(
            tf.constant(epoch, tf.int64), tf.constant(slot, tf.int64), records=records, batch=records, seed=seed
        )
        for slot in range(records)
    ]
    assert [(int(place.epoch), int(place.slot)) for place in places] == [(epoch, slot) for slot in range(records)]
    return [int(place.record) for place in places]


@pytest.mark.parametrize("records", [1, 2, 3, 7, 8, 9, 33, 64])
def test_each_epoch_is_a_permutation(records: int) -> None:
    orders = [permutation(records, seed, epoch) for seed in (0, 1, 256) for epoch in (0, 1, 256)]
    for order in orders:
        assert sorted(order) == list(range(records))
    if records > 8:
        assert len(set(map(tuple, orders))) == len(orders)


def test_permutations_are_uniform() -> None:
    def first_of(epoch: tf.Tensor) -> tf.Tensor:
        return sample_position(epoch, tf.constant(0, tf.int64), records=10, batch=10, seed=3).record

    first = list(tf.data.Dataset.range(2000).map(first_of).as_numpy_iterator())
    assert first[:3] == [permutation(10, 3, epoch)[0] for epoch in range(3)]
    counts = np.bincount(first, minlength=10)  # 200 each on average, 13.4 of standard deviation
    assert np.abs(counts - 200).max() < 5 * 13.4


def test_order_depends_on_seed_and_step(manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]]) -> None:
    found = [labels.tolist() for _, labels in plain]
    steps_per_epoch = RECORDS // BATCH
    for step, labels in enumerate(found):
        order = permutation(RECORDS, 5, step // steps_per_epoch)
        first = (step % steps_per_epoch) * BATCH
        assert labels == order[first : first + BATCH]
    assert found != [labels.tolist() for _, labels in stream(manifest, 8, seed=6)]


def equal(one: list[tuple[np.ndarray, ...]], other: list[tuple[np.ndarray, ...]]) -> bool:
    return all(np.array_equal(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second))


def test_a_stream_starts_at_any_step(manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for start in (0, 1, 2, 5):
        assert equal(plain[start:], stream(manifest, 8 - start, start_step=start))
    assert not equal(plain[:2], plain[2:4])


def test_multi_label_targets(videos: list[EncodedVideo], tmp_path: Path) -> None:
    labels = [(0, 2), (1,), (0, 1, 3), (3,)]
    manifest = write_records(tmp_path, {"train": videos[:4]}, 5, labels)
    expected = np.array([[float(label in chosen) for label in range(5)] for chosen in labels])
    found = [targets for _, targets in stream(manifest, 2)]  # one epoch each
    for epoch, targets in enumerate(found):
        assert targets.dtype == np.float32
        np.testing.assert_array_equal(targets, expected[permutation(4, 5, epoch)])
    views = evaluation_dataset(manifest, "train", CLIP, ViewSpec(temporal_views=1, resize=16, crop=16), batch_videos=3)
    tested = [targets for _, targets, _ in views.as_numpy_iterator()]
    assert [targets.dtype for targets in tested] == [np.float32, np.float32]
    np.testing.assert_array_equal(np.concatenate(tested), expected)


@pytest.mark.parametrize("listed", [(1,), (0, 2), (0, 1, 2)])
def test_labels_that_differ_from_the_manifest_are_errors(
    videos: list[EncodedVideo], tmp_path: Path, listed: tuple[int, ...]
) -> None:
    manifest = write_records(tmp_path, {"train": videos[:1]}, 3, [(0, 1)])
    part = manifest.splits["train"]
    manifest.splits["train"] = Split(part.shards, (part.records[0]._replace(labels=listed),))
    with pytest.raises(ValueError, match="cannot read or decode record 0"), record_errors_as_user_errors():
        list(evaluation_dataset(manifest, "train", CLIP, ViewSpec(temporal_views=1, resize=16, crop=16)))


def test_workers_share_each_batch(manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]]) -> None:
    slices = [stream(manifest, 4, start_step=1, worker=(index, 2)) for index in range(2)]
    joined = [tuple(np.concatenate(parts) for parts in zip(*pair)) for pair in zip(*slices)]
    assert equal(plain[1:5], joined)


def test_a_workers_share_comes_in_replica_batches(
    manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    second_half = [(clips[2:], labels[2:]) for clips, labels in plain[:3]]
    pieces = stream(manifest, 6, worker=(1, 2), replica_batch=1)
    assert {clips.shape for clips, _ in pieces} == {(1, 3, 16, 16, 3)}
    joined = [tuple(np.concatenate(parts) for parts in zip(*pieces[n : n + 2])) for n in (0, 2, 4)]
    assert equal(second_half, joined)


def decoded(video: EncodedVideo) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in video.frames])


def test_clips_equal_a_plain_loop(plain: list[tuple[np.ndarray, np.ndarray]], videos: list[EncodedVideo]) -> None:
    mirrored, sizes = [], set()
    for step, (clips, labels) in enumerate(plain[:4]):
        for member in range(BATCH):
            place = sample_position(
                tf.constant(step, tf.int64), tf.constant(member, tf.int64), records=RECORDS, batch=BATCH, seed=5
            )
            chance = input_pipeline.augmentation_randoms(5, place).numpy()
            record = int(labels[member])
            start = chance[0] * last_start(LENGTHS[record], 30.0, CLIP)
            frames = decoded(videos[record])[frame_indices(start, LENGTHS[record], 30.0, CLIP)]
            size = round(18 + chance[1] * 6)
            height, width = (side * size // min(frames.shape[1:3]) for side in frames.shape[1:3])
            top, left = int(chance[2] * (height - 16 + 1)), int(chance[3] * (width - 16 + 1))
            expected = naive_resize(frames, height, width)[:, top : top + 16, left : left + 16]
            mirrored.append(chance[4] < 0.5)
            sizes.add(size)
            expected = expected[:, :, ::-1] if mirrored[-1] else expected
            np.testing.assert_allclose(clips[member], expected, atol=0.01)
    assert 0 < sum(mirrored) < len(mirrored)
    assert len(sizes) > 3


def test_without_flip_nothing_is_flipped(manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]]) -> None:
    kinds = []
    for (some, _), (none, _) in zip(plain[:4], stream(manifest, 4, flip=False), strict=True):
        for a, b in zip(some, none):
            assert np.array_equal(a, b) or np.array_equal(a, b[:, :, ::-1])
            kinds.append(np.array_equal(a, b))
    assert 0 < sum(kinds) < len(kinds)


def test_shapes_are_static(manifest: Manifest) -> None:
    dataset = training_dataset(manifest.folder, "train", CLIP, jitter=(16, 16), flip=False, batch=BATCH, seed=0)
    assert dataset.element_spec == (tf.TensorSpec((4, 3, 16, 16, 3), tf.float32), tf.TensorSpec((4,), tf.int32))
    options = dataset.options()
    assert options.deterministic
    assert options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("clip_starts", ["offset", "slowfast"])
def test_views_equal_a_plain_loop(
    manifest: Manifest, videos: list[EncodedVideo], crops: int, clip_starts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ViewSpec(temporal_views=4, spatial_crops=crops, resize=20, crop=16)
    jpegs = tf.Variable(0, dtype=tf.int64)
    decode = table.decode_frames

    def counting(encoded: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([jpegs.assign_add(tf.size(encoded, tf.int64))]):
            return decode(tf.identity(encoded))

    monkeypatch.setattr(table, "decode_frames", counting)
    dataset = evaluation_dataset(manifest, "train", CLIP, views, batch_videos=4, clip_starts=clip_starts)
    elements = list(dataset.as_numpy_iterator())
    assert [len(labels) for _, labels, _ in elements] == [4, 4, 3]
    assert np.concatenate([indices for _, _, indices in elements]).tolist() == list(range(RECORDS))
    assert np.concatenate([labels for _, labels, _ in elements]).tolist() == list(range(RECORDS))
    needed = 0
    for record, clips in enumerate(np.concatenate([clips for clips, _, _ in elements])):
        frames = decoded(videos[record])
        height, width = (side * 20 // min(frames.shape[1:3]) for side in frames.shape[1:3])
        resized = naive_resize(frames, height, width)
        starts = view_starts(len(frames), 30.0, CLIP, 4, clip_starts)
        assert clips.shape == (4 * crops, 3, 16, 16, 3)
        seen = set()
        for view in range(4 * crops):
            chosen = frame_indices(starts[view // crops], len(frames), 30.0, CLIP)
            top, left = crop_offsets(height, width, 16, crops)[view % crops]
            expected = resized[chosen, top : top + 16, left : left + 16]
            np.testing.assert_allclose(clips[view], expected, atol=0.01)
            seen |= set(chosen.tolist())
        needed += len(seen)
    assert int(jpegs) == needed


def damaged(manifest: Manifest, folder: Path, record: int, what: str) -> Manifest:
    """Copies the records and damages one: its first bytes, its last frame, or its label in the manifest."""
    shard = manifest.splits["train"].shards[0].file
    content = (manifest.folder / shard).read_bytes()
    entries = json.loads((manifest.folder / "manifest.json").read_text())
    start, length = manifest.splits["train"].records[record][1:3]
    bad = content[start : start + length]
    if what == "header":
        bad = bytes(100) + bad[100:]
    elif what == "frame":
        position = bad.rindex(b"\xff\xd9") - 20  # pixels of the last frame, which still decodes
        bad = bad[:position] + bytes([bad[position] ^ 4]) + bad[position + 1 :]
    else:
        entries["splits"]["train"]["records"]["labels"][record] = [1]
    (folder / shard).write_bytes(content[:start] + bad + content[start + length :])
    shutil.copy(frames_path(manifest.folder / shard), folder)
    return write_manifest(folder, entries)


@pytest.mark.parametrize(("record", "what"), [(3, "header"), (0, "frame"), (6, "label")])
def test_an_unreadable_record_is_reported(manifest: Manifest, tmp_path: Path, record: int, what: str) -> None:
    bad = damaged(manifest, tmp_path, record, what)
    name = rf"train-00000-of-00001\.tfrecord: cannot read or decode record {record} of split train"
    views = ViewSpec(temporal_views=10, resize=20, crop=16)
    with pytest.raises(tf.errors.InvalidArgumentError, match=name):
        list(evaluation_dataset(bad, "train", CLIP, views))
    with pytest.raises(tf.errors.InvalidArgumentError, match=name):
        stream(bad, 40)


def test_names_that_differ_from_the_manifest_are_errors(manifest: Manifest) -> None:
    records = list(manifest.splits["train"].records)
    names = [record.media_id for record in records]
    swapped = [names[1], names[0], *names[2:]]
    of_others = manifest.with_records("train", [r._replace(video=name) for r, name in zip(records, swapped)])
    cause = "cannot read or decode record 0 of split train, at byte 12: its labels, name, boxes or number of"
    with pytest.raises(ValueError, match=cause), record_errors_as_user_errors():
        list(evaluation_dataset(of_others, "train", CLIP, VIEWS))


VIEWS = ViewSpec(temporal_views=2, resize=20, crop=16)


class Streams:
    """Datasets whose shard is damaged during reading, with more records than are prefetched."""

    def __init__(self, folder: Path) -> None:
        manifest = write_records(folder, {"train": [noise_video(seed, 2) for seed in range(60)]})
        self.records = manifest.splits["train"].records
        self.shard = folder / manifest.splits["train"].shards[0].file
        self.content = self.shard.read_bytes()
        settings: dict[str, Any] = {"jitter": (18, 24), "flip": True, "batch": BATCH, "seed": 5}
        self.datasets = {
            "training": training_dataset(folder, "train", CLIP, **settings),
            "evaluation": evaluation_dataset(folder, "train", CLIP, VIEWS),
        }

    def damage(self, what: str) -> None:
        """Damages the last record or the complete file."""
        if what in ("gone", "directory"):
            self.shard.unlink()
            if what == "directory":
                self.shard.mkdir()
            return
        last = self.records[-1]
        start = last.offset - 12
        damaged = {
            "truncated": self.content[:start],
            "truncated in the record": self.content[: last.offset + 9],
            "empty": b"",
            "other": b"text" * (len(self.content) // 4) + bytes(len(self.content) % 4),
            "other length": self.content[:start] + framed(bytes(last.length - 16)) + framed(b""),
            "flipped": flipped(self.content, last.offset + last.length - 30),  # in the pixels of the last frame
        }[what]
        self.put(damaged)

    def put(self, content: bytes) -> None:
        """Replaces the shard atomically."""
        if self.shard.is_dir():
            self.shard.rmdir()
        written = self.shard.with_name("written")
        written.write_bytes(content)
        written.replace(self.shard)


def flipped(content: bytes, position: int) -> bytes:
    """Flips one bit of a byte."""
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def framed(record: bytes) -> bytes:
    """Frames a record with its checksums, as in a shard."""
    with tempfile.NamedTemporaryFile() as file:
        with tf.io.TFRecordWriter(file.name) as writer:
            writer.write(record)
        return Path(file.name).read_bytes()


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Streams:
    return Streams(tmp_path_factory.mktemp("streams") / "of ü] (x): 5")


def rest(batches: Iterator[Any]) -> None:
    with record_errors_as_user_errors():
        for _, _ in zip(range(100), batches):
            pass


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("truncated", r"the file has \d+ bytes, but the manifest lists \d+: it was truncated or replaced"),
        ("truncated in the record", "the file has .* truncated or replaced"),
        ("empty", "the file has 0 bytes"),
        ("gone", "the file does not exist"),
        ("directory", "it is not a file"),
        ("other", "its bytes do not match their checksum"),
        ("other length", r"its header states \d+ bytes, but \d+ are listed"),
        ("flipped", "its bytes do not match their checksum"),
    ],
)
def test_damage_during_reading_is_an_error(streams: Streams, mode: str, what: str, cause: str) -> None:
    batches = iter(streams.datasets[mode].as_numpy_iterator())
    next(batches)
    streams.damage(what)
    threads = ThreadPoolExecutor(1)  # so that a read that never ends fails the test
    try:
        message = r"cannot read or decode record \d+ of split train, at byte \d+: "
        with pytest.raises(ValueError, match=message + f"({cause})") as caught:
            threads.submit(rest, batches).result(timeout=60)
        assert str(caught.value).startswith(f"{streams.shard}: cannot")
        assert str(caught.value).endswith(f"build_records --output={streams.shard.parent} --verify")
    finally:
        threads.shutdown(wait=False)
        streams.put(streams.content)


READ_AGAIN = """
import sys
import tensorflow as tf
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.types import ClipSpec
clips = training_dataset(sys.argv[1], "train", ClipSpec(3, 2.0, 16), jitter=(18, 24), flip=True, batch=4, seed=5)
for step, _ in enumerate(clips):
    if step == 0:
        print("started", flush=True)
        sys.stdin.readline()
        break
while True:
    try:
        list(clips)
    except tf.errors.InvalidArgumentError:
        print("failed", flush=True)
"""


@pytest.mark.slow  # starts TensorFlow
def test_a_damaged_shard_leaves_ctrl_c_working(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "records")
    command = [sys.executable, "-c", READ_AGAIN, str(streams.shard.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        try:
            assert process.stdout.readline() == b"started\n"
            streams.damage("gone")
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"failed\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT and b"KeyboardInterrupt" in errors


def test_records_before_the_start_are_not_read(
    manifest: Manifest, plain: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    """Damages a record in the first batch of an epoch and starts at the second."""
    first = permutation(RECORDS, 5, 0)[0]
    bad = damaged(manifest, tmp_path, first, "header")
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"record {first} of split"):
        stream(bad, 1)
    settings: Any = {"jitter": (18, 24), "flip": True, "batch": BATCH, "seed": 5, "start_step": 1}
    second = training_dataset(bad, "train", CLIP, **settings)
    assert equal(list(second.take(1).as_numpy_iterator()), plain[1:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 12}, "batch must be in 1..11, the number of records in split 'train', got 12"),
        ({"batch": 0}, "batch must be in 1..11"),
        ({"worker": (2, 2)}, r"worker must be \(index, count\) with 0 <= index < count, got \(2, 2\)"),
        ({"worker": (0, 3)}, "batch must be divisible by the number of workers, 3, got 4"),
        ({"worker": (0, 2), "replica_batch": 4}, "replica_batch must divide the 2 clips per worker, got 4"),
        ({"replica_batch": 0}, "replica_batch must divide"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"jitter": (15, 20)}, r"jitter must be ascending and at least the crop size 16, got \(15, 20\)"),
        ({"jitter": (20, 18)}, "jitter must be ascending"),
        ({"frame_sampling": "fast"}, "frame_sampling must be .* got 'fast'"),
    ],
)
def test_settings_are_checked(manifest: Manifest, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(manifest, 1, **settings)


def test_evaluation_settings_are_checked(manifest: Manifest) -> None:
    views = ViewSpec(resize=20, crop=16)
    with pytest.raises(ValueError, match="batch_videos must be at least 1, got 0"):
        evaluation_dataset(manifest, "train", CLIP, views, batch_videos=0)
    with pytest.raises(ValueError, match=r"clip_starts must be .* got 'first'"):
        evaluation_dataset(manifest, "train", CLIP, views, clip_starts="first")  # type: ignore[arg-type]


def test_a_frame_with_too_many_pixels_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG")
    jpeg = bytearray(buffer.getvalue())
    sides = jpeg.index(b"\xff\xc0") + 5  # height and width, 16 bits each
    jpeg[sides : sides + 4] = (5793).to_bytes(2, "big") * 2  # 5792 x 5792 would be allowed
    with pytest.raises(tf.errors.InvalidArgumentError, match="too many pixels"):
        table.decode_frames(tf.constant([bytes(jpeg)]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="too many pixels"):
        tf.function(table.decode_frames)(tf.constant([bytes(jpeg)]))
