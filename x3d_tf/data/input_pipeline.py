"""tf.data pipelines from records to clips.

The order of training clips depends only on seed and step: batch n consists of the slots from (n mod S)·batch on in a
permutation for epoch n div S, where S = floor(records / batch). Records are read at the positions in the manifest, so a
stream can start at any step, and each worker reads only its own share. Each read verifies the record's checksums and
compares its length, labels and name with the manifest.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data import transforms
from x3d_tf.data.records.format import (
    ParsedRecord,
    ParsedTimes,
    check_lengths,
    decode_frame,
    diagnose_record,
    parse_record,
    read_record,
    verify_hint,
)
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling, frame_indices, last_start, view_starts
from x3d_tf.data.video.decode import TIME_TOLERANCE
from x3d_tf.errors import UserError, require
from x3d_tf.types import ClipSpec, ClipStarts, ViewSpec

PARALLEL_VIDEOS = 4  # in evaluation

# Makes the clip and the target of a task from a clip [T, S, S, 3], its serialized record, and a seed for the stateless
# random functions of TensorFlow, int64 [2]. Runs in the graph of the input pipeline. The target must follow from the
# record and the seed alone, not from the frames of the clip, because in evaluation a video has only one target.
MakeExample = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class SamplePosition(NamedTuple):
    """Position of a training clip: epoch, slot in the epoch's permutation, and index of the record; int64 scalars."""

    epoch: tf.Tensor
    slot: tf.Tensor
    record: tf.Tensor


def training_dataset(
    records: Manifest | str | Path,
    split: str,
    clip: ClipSpec,
    *,
    jitter: tuple[int, int],
    flip: bool,
    batch: int,
    seed: int,
    start_step: int = 0,
    worker: tuple[int, int] = (0, 1),
    replica_batch: int | None = None,
    frame_sampling: FrameSampling = "slowfast",
    stretch: bool = False,
    make_example: MakeExample | None = None,
) -> tf.data.Dataset:
    """Returns an infinite dataset of training clips: one randomly augmented clip per video and epoch.

    Start, scale, crop and flip of each clip are random.

    Args:
        records: manifest, or folder of the records.
        split: name of the training split.
        clip: the network's clip.
        jitter: range of the random short side in pixels, inclusive; both at least `clip.size`.
        flip: flips half of the clips horizontally.
        batch: clips per step over all workers; records left over at the end of an epoch are dropped.
        seed: random seed for order and augmentation.
        start_step: first step; earlier ones are not read.
        worker: (index, count) of the workers. Worker i reads the i-th slice of every batch.
        replica_batch: clips per element. Defaults to the worker's complete slice.
        frame_sampling: see `sampling.frame_indices`.
        stretch: see `transforms.resize`.
        make_example: makes the targets, after augmentation. Its seed follows from `seed`, the epoch and the clip.
            Defaults to the labels of the records, or of the frames from the first to the last one of the clip if the
            labels have times.

    Returns:
        Dataset of (clips, targets): float32 [replica_batch, T, S, S, 3], RGB in 0..255, and int32 [replica_batch], or
        for multi-label records float32 [replica_batch, classes], 1 for the classes of the video or of these frames and
        0 for others.

    Raises:
        UserError: a setting is out of range, the split has fewer records than `batch`, or the manifest is damaged.

    During iteration, an unreadable record raises tf.errors.InvalidArgumentError with the shard and the record.
    """
    table = RecordTable(_require_videos(as_manifest(records)), split)
    positions = training_positions(table, batch=batch, seed=seed, start_step=start_step, worker=worker)
    size = replica_share(batch, worker, replica_batch)
    check_jitter(jitter, clip)

    @tf.autograph.experimental.do_not_convert  # plain graph code, whose errors should reach the caller as they are
    def load(position: SamplePosition) -> tuple[tf.Tensor, tf.Tensor]:
        randoms = augmentation_randoms(seed, position)  # [5]

        def decode(parsed: ParsedRecord) -> tuple[tf.Tensor, ...]:
            frames = tf.shape(parsed.frames, tf.int64)[0]
            start = randoms[0] * last_start(frames, parsed.fps, clip, xp=tnp)
            chosen = frame_indices(start, frames, parsed.fps, clip, frame_sampling, xp=tnp)
            pixels = decode_frames(tf.gather(parsed.frames, chosen))
            if make_example is not None:
                return pixels, parsed.serialized
            return pixels, table.clip_target(position.record, parsed, chosen[0], chosen[-1])

        pixels, rest = table.read(position.record, decode)  # the serialized record, or the target
        pixels = tf.ensure_shape(pixels, (clip.frames, None, None, 3))
        pixels = transforms.resize(pixels, jittered_short_side(jitter, randoms[1]), stretch)
        pixels = transforms.random_crop(pixels, clip.size, randoms[2:4])
        if flip:
            pixels = transforms.flip(pixels, randoms[4] < 0.5)
        if make_example is None:
            return pixels, rest
        return make_example(pixels, rest, tf.random.fold_in(clip_key(seed, position), 1))

    clips = positions.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return clips.batch(size, drop_remainder=True).prefetch(2).with_options(deterministic())


def training_positions(
    table: "RecordTable", *, batch: int, seed: int, start_step: int, worker: tuple[int, int]
) -> tf.data.Dataset:
    """Returns a dataset of this worker's `SamplePosition`s; the arguments are those of `training_dataset`."""
    require(
        1 <= batch <= len(table),
        "batch",
        f"be in 1..{len(table)}, the number of records in split {table.split!r}",
        batch,
    )
    index, workers = worker
    require(0 <= index < workers, "worker", "be (index, count) with 0 <= index < count", worker)
    require(batch % workers == 0, "batch", f"be divisible by the number of workers, {workers}", batch)
    require(start_step >= 0, "start_step", "be at least 0", start_step)
    share = batch // workers

    @tf.autograph.experimental.do_not_convert
    def position(number: tf.Tensor) -> SamplePosition:
        step, member = number // share, index * share + number % share
        return sample_position(step, member, records=len(table), batch=batch, seed=seed)

    return tf.data.Dataset.range(start_step * share, tf.int64.max).map(position)


def replica_share(batch: int, worker: tuple[int, int], replica_batch: int | None) -> int:
    """Returns the clips per element: `replica_batch`, or this worker's share of a batch."""
    share = batch // worker[1]
    size = share if replica_batch is None else replica_batch
    require(size >= 1 and share % size == 0, "replica_batch", f"divide the {share} clips per worker", size)
    return size


def check_jitter(jitter: tuple[int, int], clip: ClipSpec) -> None:
    """Raises `UserError` unless frames with these short sides contain a crop."""
    low, high = jitter
    require(clip.size <= low <= high, "jitter", f"be ascending and at least the crop size {clip.size}", jitter)


def jittered_short_side(jitter: tuple[int, int], random: tf.Tensor) -> tf.Tensor:
    """Returns the short side in pixels for a random number in [0, 1), int64."""
    low, high = jitter
    return tf.cast(tf.round(low + random * (high - low)), tf.int64)


def sample_position(step: tf.Tensor, member: tf.Tensor, *, records: int, batch: int, seed: int) -> SamplePosition:
    """Returns the position of clip `member` of step `step`, both int64 scalars from 0."""
    steps_per_epoch = records // batch
    epoch = step // steps_per_epoch
    slot = (step % steps_per_epoch) * batch + member
    # The shuffle uses only the lowest 8 or 9 bits of each key word, so plain seeds or epochs would give only 256
    # distinct permutations. A hash of both in all three words gives at least 2**24. With 8 rounds, chi-square tests
    # show no bias.
    source = tf.stack([tf.constant(seed, tf.int64), epoch])
    key = tf.random.stateless_uniform([3], source, minval=None, maxval=None, dtype=tf.int32, alg="philox")
    last = tf.constant(records - 1, tf.int64)
    return SamplePosition(epoch, slot, tf.raw_ops.RandomIndexShuffle(index=slot, seed=key, max_index=last, rounds=8))


def evaluation_dataset(
    records: Manifest | str | Path,
    split: str,
    clip: ClipSpec,
    views: ViewSpec,
    *,
    batch_videos: int = 1,
    clip_starts: ClipStarts = "offset",
    frame_sampling: FrameSampling = "slowfast",
    make_example: MakeExample | None = None,
) -> tf.data.Dataset:
    """Returns a dataset of all views of every video, once and in the order of the records.

    Frames that several views share are decoded once.

    Args:
        records: manifest, or folder of the records.
        split: name of the split to evaluate on.
        clip: the network's clip; `views.crop` replaces its `size`.
        views: clips and crops per video.
        batch_videos: videos per element; the last element may have fewer.
        clip_starts: see `sampling.view_starts`.
        frame_sampling: see `sampling.frame_indices`.
        make_example: makes the targets. All clips of a video get the same seed, which follows from the index of its
            record. Defaults to the labels of the records.

    Returns:
        Dataset of (clips, targets, indices): float32 [videos, views, T, crop, crop, 3], RGB in 0..255; int32 [videos],
        or for multi-label records float32 [videos, classes] of 0 and 1; int64 [videos], the indices
        into `Manifest.splits[split].records`. View v is clip v // spatial_crops, crop v % spatial_crops.

    Raises:
        UserError: a setting is out of range, or the manifest is damaged.

    During iteration, an unreadable record raises tf.errors.InvalidArgumentError with the shard and the record.
    """
    table = RecordTable(_require_videos(as_manifest(records)), split)
    require(batch_videos >= 1, "batch_videos", "be at least 1", batch_videos)

    @tf.autograph.experimental.do_not_convert  # plain graph code, whose errors should reach the caller as they are
    def load(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        def decode(parsed: ParsedRecord) -> tuple[tf.Tensor, ...]:
            frames = tf.shape(parsed.frames, tf.int64)[0]
            starts = view_starts(frames, parsed.fps, clip, views.temporal_views, clip_starts, xp=tnp)
            chosen = frame_indices(starts, frames, parsed.fps, clip, frame_sampling, xp=tnp)  # [clips, T]
            unique, positions = tf.unique(tf.reshape(chosen, [-1]))
            pixels = decode_frames(tf.gather(parsed.frames, unique))
            positions = tf.reshape(positions, [views.temporal_views, clip.frames])
            return (pixels, positions) if make_example is None else (pixels, positions, parsed.serialized)

        pixels, positions, *serialized = table.read(record, decode)
        pixels = transforms.resize(pixels, views.resize, views.stretch)
        pixels = transforms.crops(pixels, views.crop, views.spatial_crops)  # [crops, unique frames, crop, crop, 3]
        pixels = tf.gather(pixels, positions, axis=1)  # [crops, clips, T, crop, crop, 3]
        pixels = tf.transpose(pixels, [1, 0, 2, 3, 4, 5])
        pixels = tf.reshape(pixels, [views.views, clip.frames, views.crop, views.crop, 3])
        if make_example is None:
            return pixels, table.target(record), record
        seed = tf.random.fold_in(tf.zeros([2], tf.int64), record)
        # the record and the seed of all views are the same, and so are their targets; see `MakeExample`
        made = [make_example(view, serialized[0], seed) for view in tf.unstack(pixels)]
        return tf.stack([view for view, _ in made]), made[0][1], record

    # 30 views of 16 frames at 356² pixels are 730 MB, so only a few videos are loaded in parallel.
    videos = tf.data.Dataset.range(len(table)).map(load, num_parallel_calls=PARALLEL_VIDEOS)
    return videos.batch(batch_videos).prefetch(1).with_options(deterministic(tuned=False))


@contextmanager
def record_errors_as_user_errors() -> Iterator[None]:
    """Re-raises TensorFlow's error about an unreadable record as a `UserError`.

    The message names the shard, the record, the split and the cause.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = _UNREADABLE.search(error.message)
        if found is None:
            raise
        path, record, *numbers = found.groups()
        offset, length, size = map(int, numbers)
        raise UserError(
            f"{path}: cannot read or decode record {record}, at byte {offset}: "
            f"{diagnose_record(Path(path), offset, length, size)}. {verify_hint(Path(path))}"
        ) from error


# The error of `RecordTable.read`: path, record and split, offset, length, size of the shard.
_UNREADABLE = re.compile(
    r"assertion failed: \[(.*?): cannot read or decode record (\d+ of split .*?), "
    r"at byte (\d+), (\d+) bytes of (\d+)\]",
    re.DOTALL,
)


class RecordTable:
    """Index of a split's records, as tensors."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        part = manifest.split(split)
        require(len(part.records) > 0, f"split {split!r} of {manifest.folder}", "contain records")
        check_lengths(manifest, split)
        self.split, self._count = split, len(part.records)
        with tf.device("cpu"):  # tf.data runs on the CPU, but numeric constants are placed on a GPU by default
            self._paths = tf.constant([os.fsencode(manifest.folder / shard.file) for shard in part.shards])
            self._sizes = tf.constant([shard.bytes for shard in part.shards], tf.int64)
            self._shard = tf.constant([record.shard for record in part.records], tf.int64)
            self._offset = tf.constant([record.offset for record in part.records], tf.int64)
            self._length = tf.constant([record.length for record in part.records], tf.int64)
            self._media_id = tf.constant([record.media_id.encode(errors="replace") for record in part.records])
            labels = [label for record in part.records for label in record.labels]
            self._labels = tf.constant(labels, tf.int64)  # of all records, concatenated
            ends = np.cumsum([0, *(len(record.labels) for record in part.records)])
            self._first_label = tf.constant(ends, tf.int64)  # [records + 1]
        self._classes = len(manifest.classes) if manifest.task == "multi_label" else None

    def __len__(self) -> int:
        return self._count

    def labels(self, record: tf.Tensor) -> tf.Tensor:
        """Returns the classes of a record, int64 [labels]; `record` is an int64 scalar."""
        return self._labels[self._first_label[record] : self._first_label[record + 1]]

    def target(self, record: tf.Tensor) -> tf.Tensor:
        """Returns a record's training target: its class, int32, or for multi-label float32 [classes] of 0 and 1."""
        if self._classes is None:
            return tf.cast(self.labels(record)[0], tf.int32)
        return _multi_hot(self.labels(record), self._classes)

    def clip_target(self, record: tf.Tensor, parsed: ParsedRecord, first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """Returns the training target of the frames `first` to `last`: that of the record unless labels have times."""
        if self._classes is None:
            return self.target(record)
        visible = visible_labels(parsed.timed, first, last, parsed.fps)
        return tf.where(tf.size(parsed.timed.labels) > 0, _multi_hot(visible, self._classes), self.target(record))

    def read(self, record: tf.Tensor, decode: Callable[[ParsedRecord], Any]) -> Any:
        """Reads a record and returns the result of `decode`, a tensor or a tuple; `record` is an int64 scalar.

        Every failure raises InvalidArgumentError with shard, record and split. The cause is logged, and
        `record_errors_as_user_errors` reports it.
        """
        shard, offset, length = self._shard[record], self._offset[record], self._length[record]
        path, size = self._paths[shard], self._sizes[shard]

        def load(_: tf.Tensor) -> tuple[tf.Tensor, Any]:
            parsed = parse_record(read_record(path, offset, length))
            with tf.control_dependencies(self._check_listed(record, parsed)):
                return tf.constant(True), decode(parsed)

        # A graph cannot catch errors, but a dataset can skip a failing element; a second element then marks the skip.
        # The file is read in the map, where an error consumes the element. A dataset over the file would fail again at
        # each try, and `ignore_errors` would retry forever.
        found = tf.data.Dataset.range(1).map(load).ignore_errors(log_warning=True)
        placeholder = tf.nest.map_structure(_zeros, found.element_spec)  # begins with False
        readable, content = found.concatenate(tf.data.Dataset.from_tensors(placeholder)).take(1).get_single_element()
        byte, number, bytes_ = (tf.strings.as_string(value) for value in (offset, record, length))
        description = [": cannot read or decode record ", number, f" of split {self.split}, at byte ", byte]
        where = tf.strings.join([path, *description, ", ", bytes_, " bytes of ", tf.strings.as_string(size)])
        with tf.control_dependencies([tf.debugging.Assert(readable, [where])]):
            return tf.nest.map_structure(tf.identity, content)

    def _check_listed(self, record: tf.Tensor, parsed: ParsedRecord) -> list[tf.Operation]:
        """Returns assertions that a record has the labels and the name in the manifest."""
        listed, message = self.labels(record), "shard and manifest are from different builds"
        counts = tf.debugging.assert_equal(tf.size(parsed.labels), tf.size(listed), message)
        with tf.control_dependencies([counts]):  # checked first, because unequal lengths may broadcast
            labels = tf.debugging.assert_equal(parsed.labels, listed, message)
        return [labels, tf.debugging.assert_equal(parsed.media_id, self._media_id[record], message)]


def visible_labels(timed: ParsedTimes, first: tf.Tensor, last: tf.Tensor, fps: tf.Tensor) -> tf.Tensor:
    """Returns the labels of the frames `first` to `last`, inclusive (as PySlowFast for Charades).

    Args:
        timed: labels with their times, which include their ends.
        first, last: indices of frames, int64 scalars.
        fps: frames per second, float32 scalar.

    Returns:
        Class indices, int64 [n]; a class may be repeated.
    """
    rate = tf.cast(fps, tf.float64) / 1e6  # frames per microsecond
    begin = tf.math.ceil(tf.cast(timed.starts, tf.float64) * rate - TIME_TOLERANCE)  # first frame of each label
    end = tf.math.floor(tf.cast(timed.ends, tf.float64) * rate + TIME_TOLERANCE)
    begin, end = tf.maximum(begin, tf.cast(first, tf.float64)), tf.minimum(end, tf.cast(last, tf.float64))
    return tf.boolean_mask(timed.labels, begin <= end)


def _multi_hot(labels: tf.Tensor, classes: int) -> tf.Tensor:
    """Returns float32 [classes], 1 for the given classes and 0 for others."""
    return tf.minimum(tf.reduce_sum(tf.one_hot(labels, classes), axis=0), 1.0)


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def decode_frames(jpegs: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG files, string [n], to pixels, uint8 [n, height, width, 3]."""
    return tf.map_fn(decode_frame, jpegs, fn_output_signature=tf.TensorSpec((None, None, 3), tf.uint8))


def short_sides(manifest: Manifest, split: str, records: int = 8) -> list[int]:
    """Returns the short sides in pixels of the first frames of `records` records, spread over the split.

    Raises:
        UserError: the split has no records, or one of these records is damaged.
    """
    table = RecordTable(manifest, split)
    chosen = np.unique(np.linspace(0, len(table) - 1, records).round().astype(np.int64))

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)])  # only errors in graphs name the record
    def shape_of(record: tf.Tensor) -> tf.Tensor:
        return table.read(record, _first_shape)

    with record_errors_as_user_errors():
        return [int(min(shape_of(record)[:2])) for record in chosen]


def _first_shape(parsed: ParsedRecord) -> tf.Tensor:
    return tf.io.extract_jpeg_shape(parsed.frames[0])  # height, width, channels


def augmentation_randoms(seed: int, position: SamplePosition) -> tf.Tensor:
    """Returns five uniform random numbers in [0, 1) for start, scale, top, left and flip, float64."""
    return tf.random.stateless_uniform([5], clip_key(seed, position), dtype=tf.float64, alg="philox")


def clip_key(seed: int, position: SamplePosition) -> tf.Tensor:
    """Returns the key of a training clip's random numbers, int64 [2]."""
    return tf.random.fold_in(tf.stack([tf.constant(seed, tf.int64), position.epoch]), position.slot)


def as_manifest(records: Manifest | str | Path) -> Manifest:
    """Returns the manifest, and reads it first if `records` is a folder."""
    return records if isinstance(records, Manifest) else Manifest.load(records)


def _require_videos(manifest: Manifest) -> Manifest:
    if manifest.task == "detection":
        raise UserError(f"{manifest.folder} holds key frames with boxes: read them with x3d_tf.data.detection_pipeline")
    return manifest


def deterministic(*, tuned: bool = True) -> tf.data.Options:
    """Returns the options of all datasets: deterministic order, and no sharding by distribution strategies.

    Set `tuned` only for datasets with tunable parallelism: at its end a dataset waits up to a minute for the tuner.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = tuned
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
