"""tf.data pipelines from records to clips.

The order of training clips depends only on seed and step: batch n consists of the slots from (n mod S)·batch on in a
permutation for epoch n div S, where S = floor(records / batch). Records are read at the positions in the manifest, so a
stream can start at any step, and each worker reads only its own share. Only the frames of the clip are read. Each read
verifies the checksums of what it reads, and compares the record's labels and name with the manifest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data import transforms
from x3d_tf.data.records.format import ParsedRecord
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import RecordTable, StoredFrames, record_errors_as_user_errors
from x3d_tf.data.sampling import FrameSampling, frame_indices, last_start, view_starts
from x3d_tf.errors import UserError, require
from x3d_tf.types import ClipSpec, ClipStarts, ViewSpec

PARALLEL_VIDEOS, PARALLEL_VIEWS = 4, 4  # in evaluation

# Makes the clip and the target of a task from a clip [T, S, S, 3], its serialized record without frames, and a seed for
# the stateless random functions of TensorFlow, int64 [2]. Runs in the graph of the input pipeline. The target must
# follow from the record and the seed alone, not from the frames, because in evaluation a video has only one target.
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

        def decode(parsed: ParsedRecord, frames: StoredFrames) -> tuple[tf.Tensor, ...]:
            start = randoms[0] * last_start(frames.count, parsed.fps, clip, xp=tnp)
            chosen = frame_indices(start, frames.count, parsed.fps, clip, frame_sampling, xp=tnp)
            pixels = frames.decode(chosen)
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
    table: RecordTable, *, batch: int, seed: int, start_step: int, worker: tuple[int, int]
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

    Args:
        records, split, clip, views, clip_starts, frame_sampling, make_example: see `evaluation_clips`.
        batch_videos: videos per element; the last element may have fewer.

    Returns:
        Dataset of (clips, targets, indices): float32 [videos, views, T, crop, crop, 3], RGB in 0..255; int32 [videos],
        or for multi-label records float32 [videos, classes] of 0 and 1; int64 [videos], the indices
        into `Manifest.splits[split].records`. View v is clip v // spatial_crops, crop v % spatial_crops.

    Raises:
        UserError: a setting is out of range, or the manifest is damaged.
    """
    require(batch_videos >= 1, "batch_videos", "be at least 1", batch_videos)
    clips = evaluation_clips(
        records,
        split,
        clip,
        views,
        clip_starts=clip_starts,
        frame_sampling=frame_sampling,
        make_example=make_example,
    )
    videos = clips.batch(views.views, drop_remainder=True).map(
        lambda clips, targets, indices: (clips, targets[0], indices[0])  # the same for all views
    )
    return videos.batch(batch_videos).prefetch(1).with_options(deterministic(tuned=False))


def evaluation_clips(
    records: Manifest | str | Path,
    split: str,
    clip: ClipSpec,
    views: ViewSpec,
    *,
    clip_starts: ClipStarts = "offset",
    frame_sampling: FrameSampling = "slowfast",
    make_example: MakeExample | None = None,
) -> tf.data.Dataset:
    """Returns a dataset of the views of every video, one after another, in the order of the records.

    Frames that several views share are decoded once.

    Args:
        records: manifest, or folder of the records.
        split: name of the split to evaluate on.
        clip: the network's clip; `views.crop` replaces its `size`.
        views: clips and crops per video.
        clip_starts: see `sampling.view_starts`.
        frame_sampling: see `sampling.frame_indices`.
        make_example: makes the targets. All clips of a video get the same seed, which follows from the index of its
            record. Defaults to the labels of the records.

    Returns:
        Dataset of (clip, target, index): float32 [T, crop, crop, 3], RGB in 0..255; int32 scalar, or for multi-label
        records float32 [classes] of 0 and 1; int64 scalar, the index into `Manifest.splits[split].records`. View v of
        a video is clip v // spatial_crops, crop v % spatial_crops.

    Raises:
        UserError: a setting is out of range, or the manifest is damaged.

    During iteration, an unreadable record raises tf.errors.InvalidArgumentError with the shard and the record.
    """
    table = RecordTable(_require_videos(as_manifest(records)), split)

    @tf.autograph.experimental.do_not_convert  # plain graph code, whose errors should reach the caller as they are
    def load(record: tf.Tensor) -> tuple[tf.Tensor, ...]:
        def decode(parsed: ParsedRecord, frames: StoredFrames) -> tuple[tf.Tensor, ...]:
            starts = view_starts(frames.count, parsed.fps, clip, views.temporal_views, clip_starts, xp=tnp)
            chosen = frame_indices(starts, frames.count, parsed.fps, clip, frame_sampling, xp=tnp)  # [clips, T]
            unique, positions = tf.unique(tf.reshape(chosen, [-1]))
            pixels = frames.decode(unique)
            positions = tf.reshape(positions, [views.temporal_views, clip.frames])
            return (pixels, positions) if make_example is None else (pixels, positions, parsed.serialized)

        pixels, *rest = table.read(record, decode)
        return record, transforms.resize(pixels, views.resize, views.stretch), *rest

    @tf.autograph.experimental.do_not_convert
    def cut(record: tf.Tensor, pixels: tf.Tensor, positions: tf.Tensor, *serialized: tf.Tensor) -> tf.data.Dataset:
        def view(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            frames = tf.gather(pixels, positions[number // views.spatial_crops])
            made = transforms.view_crop(frames, views.crop, views.spatial_crops, number % views.spatial_crops)
            if make_example is None:
                return made, table.target(record), record
            seed = tf.random.fold_in(tf.zeros([2], tf.int64), record)  # the same for all views; see `MakeExample`
            return *make_example(made, serialized[0], seed), record

        return tf.data.Dataset.range(views.views).map(view, num_parallel_calls=PARALLEL_VIEWS)

    # The frames of ten clips of 16 frames at 356 x 474 pixels are 320 MB, so only a few videos are loaded in parallel.
    videos = tf.data.Dataset.range(len(table)).map(load, num_parallel_calls=PARALLEL_VIDEOS)
    counted = tf.data.experimental.assert_cardinality(len(table) * views.views)  # Keras' progress bars show it
    return videos.flat_map(cut).apply(counted).with_options(deterministic(tuned=False))


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


def _first_shape(_: ParsedRecord, frames: StoredFrames) -> tf.Tensor:
    return tf.io.extract_jpeg_shape(frames.read(tf.zeros([1], tf.int64))[0])  # height, width, channels


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
