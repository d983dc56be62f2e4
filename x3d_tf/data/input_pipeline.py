"""Records -> clips, in tf.data.

The order of training clips is a function of seed and step, not of what was read before: batch n is made of slots
(n mod S)·batch and following of a permutation drawn for epoch n div S, where S = floor(records / batch). Records are
read where the manifest says they lie, so a stream can start at any step, and each worker reads its own part only. Each
read verifies the record's checksums, and compares its length, labels and name with the manifest.
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
    check_lengths,
    decode_frame,
    diagnose_record,
    parse_record,
    read_record,
    verify_hint,
)
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling, frame_indices, last_start, view_starts
from x3d_tf.errors import UserError, require
from x3d_tf.types import ClipSpec, ClipStarts, ViewSpec

PARALLEL_VIDEOS = 4  # of testing


class SamplePosition(NamedTuple):
    """Where a training clip stands: its epoch, its slot in that epoch's order, and the record there; int64 scalars."""

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
) -> tf.data.Dataset:
    """Training clips without end: one random clip, scale, crop and mirroring of each video an epoch.

    Args:
        records: a manifest, or the folder it lies in.
        split: the part to train on.
        clip: what the network sees.
        jitter: smallest and largest short side in pixels, from which each clip draws its scale; both at least
            `clip.size`.
        flip: whether half of the clips are mirrored.
        batch: clips of a step, over all workers; records left over at the end of an epoch are dropped.
        seed: of order and augmentation.
        start_step: the step to start at; nothing before it is read.
        worker: this worker's number and how many there are. It gets the same slice of every step's batch.
        replica_batch: clips of one element; by default this worker's whole slice.
        frame_sampling: see `clips.frame_indices`.
        stretch: see `transforms.resize`.

    Returns:
        Dataset of (clips, labels): float32 [replica_batch, T, S, S, 3], RGB in 0..255, and int32 [replica_batch], or
        for multi-label records float32 [replica_batch, classes], 1 for each class of the video and else 0.

    Raises:
        UserError: a setting out of range, a split with fewer records than `batch`, a damaged manifest.

    While iterating, tf.errors.InvalidArgumentError names the shard and the record that cannot be read.
    """
    table = RecordTable(_require_videos(as_manifest(records)), split)
    places = training_positions(table, batch=batch, seed=seed, start_step=start_step, worker=worker)
    size = replica_share(batch, worker, replica_batch)
    check_jitter(jitter, clip)

    @tf.autograph.experimental.do_not_convert  # plain graph code, whose errors should reach the caller as they are
    def load(place: SamplePosition) -> tuple[tf.Tensor, tf.Tensor]:
        chance = augmentation_randoms(seed, place)  # [5]

        def decode(parsed: ParsedRecord) -> tf.Tensor:
            frames = tf.shape(parsed.frames, tf.int64)[0]
            start = chance[0] * last_start(frames, parsed.fps, clip, xp=tnp)
            chosen = frame_indices(start, frames, parsed.fps, clip, frame_sampling, xp=tnp)
            return decode_frames(tf.gather(parsed.frames, chosen))

        pixels = tf.ensure_shape(table.read(place.record, decode), (clip.frames, None, None, 3))
        pixels = transforms.resize(pixels, jittered(jitter, chance[1]), stretch)
        pixels = transforms.random_crop(pixels, clip.size, chance[2:4])
        if flip:
            pixels = transforms.flip(pixels, chance[4] < 0.5)
        return pixels, table.target(place.record)

    clips = places.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return clips.batch(size, drop_remainder=True).prefetch(2).with_options(deterministic())


def training_positions(
    table: "RecordTable", *, batch: int, seed: int, start_step: int, worker: tuple[int, int]
) -> tf.data.Dataset:
    """Where this worker's clips stand, one `SamplePosition` after the other; arguments as `training_dataset`."""
    require(1 <= batch <= len(table), "batch", f"be in 1..{len(table)}, the records of split {table.split!r}", batch)
    index, workers = worker
    require(0 <= index < workers, "worker", "be (index, count) with 0 <= index < count", worker)
    require(batch % workers == 0, "batch", f"be divisible by the number of workers, {workers}", batch)
    require(start_step >= 0, "start_step", "be at least 0", start_step)
    share = batch // workers

    @tf.autograph.experimental.do_not_convert
    def place(number: tf.Tensor) -> SamplePosition:
        step, member = number // share, index * share + number % share
        return sample_position(step, member, records=len(table), batch=batch, seed=seed)

    return tf.data.Dataset.range(start_step * share, tf.int64.max).map(place)


def replica_share(batch: int, worker: tuple[int, int], replica_batch: int | None) -> int:
    """Clips of one element: `replica_batch`, or all that this worker gets of a step."""
    share = batch // worker[1]
    size = share if replica_batch is None else replica_batch
    require(size >= 1 and share % size == 0, "replica_batch", f"divide the {share} clips of a worker", size)
    return size


def check_jitter(jitter: tuple[int, int], clip: ClipSpec) -> None:
    """Raises `UserError` unless frames of these short sides hold a crop."""
    low, high = jitter
    require(clip.size <= low <= high, "jitter", f"be ascending, from at least the crop, {clip.size}", jitter)


def jittered(jitter: tuple[int, int], chance: tf.Tensor) -> tf.Tensor:
    """The short side in pixels that a number in [0, 1) chooses; int64."""
    low, high = jitter
    return tf.cast(tf.round(low + chance * (high - low)), tf.int64)


def sample_position(step: tf.Tensor, member: tf.Tensor, *, records: int, batch: int, seed: int) -> SamplePosition:
    """Where clip `member` of step `step` stands; both int64 scalars, numbers from 0."""
    steps_per_epoch = records // batch
    epoch = step // steps_per_epoch
    slot = (step % steps_per_epoch) * batch + member
    # The shuffle uses the lowest 8 or 9 bits of each key word: plain seeds or epochs would repeat after 256. A hash of
    # both in all three words gives 2**24 orders or more, and with 8 rounds chi-square tests see no bias.
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
) -> tf.data.Dataset:
    """All views of every video once, in the order of the records; no video is dropped or repeated.

    Each frame that any view needs is decoded once.

    Args:
        records: a manifest, or the folder it lies in.
        split: the part to test on.
        clip: what the network sees; its `size` is not used, `views.crop` is.
        views: the clips and crops of each video.
        batch_videos: videos of one element; the last may have fewer.
        clip_starts: see `clips.view_starts`.
        frame_sampling: see `clips.frame_indices`.

    Returns:
        Dataset of (clips, labels, indices): float32 [videos, views, T, crop, crop, 3], RGB in 0..255; int32 [videos],
        or for multi-label records float32 [videos, classes] of 0 and 1; int64 [videos], the records'
        places in `Manifest.splits[split].records`. View v is clip v // spatial_crops, crop v % spatial_crops.

    Raises:
        UserError: a setting out of range, a damaged manifest.

    While iterating, tf.errors.InvalidArgumentError names the shard and the record that cannot be read.
    """
    table = RecordTable(_require_videos(as_manifest(records)), split)
    require(batch_videos >= 1, "batch_videos", "be at least 1", batch_videos)

    @tf.autograph.experimental.do_not_convert  # plain graph code, whose errors should reach the caller as they are
    def load(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        def decode(parsed: ParsedRecord) -> tuple[tf.Tensor, tf.Tensor]:
            frames = tf.shape(parsed.frames, tf.int64)[0]
            starts = view_starts(frames, parsed.fps, clip, views.temporal_views, clip_starts, xp=tnp)
            chosen = frame_indices(starts, frames, parsed.fps, clip, frame_sampling, xp=tnp)  # [clips, T]
            unique, positions = tf.unique(tf.reshape(chosen, [-1]))
            pixels = decode_frames(tf.gather(parsed.frames, unique))
            return pixels, tf.reshape(positions, [views.temporal_views, clip.frames])

        pixels, positions = table.read(record, decode)
        pixels = transforms.resize(pixels, views.resize, views.stretch)
        pixels = transforms.crops(pixels, views.crop, views.spatial_crops)  # [crops, unique frames, crop, crop, 3]
        pixels = tf.gather(pixels, positions, axis=1)  # [crops, clips, T, crop, crop, 3]
        pixels = tf.transpose(pixels, [1, 0, 2, 3, 4, 5])
        pixels = tf.reshape(pixels, [views.views, clip.frames, views.crop, views.crop, 3])
        return pixels, table.target(record), record

    # 30 views of 16 frames at 356² pixels are 730 MB, so that only a few videos may be under way.
    videos = tf.data.Dataset.range(len(table)).map(load, num_parallel_calls=PARALLEL_VIDEOS)
    return videos.batch(batch_videos).prefetch(1).with_options(deterministic(tuned=False))


@contextmanager
def record_errors_as_user_errors() -> Iterator[None]:
    """Turns TensorFlow's report of a record that cannot be read, raised within the block, into a `UserError`.

    The error names the shard, the record, the split and the cause.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = _UNREADABLE.search(error.message)
        if found is None:
            raise
        path, which, *numbers = found.groups()
        offset, length, size = map(int, numbers)
        raise UserError(
            f"{path}: cannot read or decode record {which}, at byte {offset}: "
            f"{diagnose_record(Path(path), offset, length, size)}. {verify_hint(Path(path))}"
        ) from error


# What `RecordTable.read` reports: path, record and split, offset, length, size of the shard.
_UNREADABLE = re.compile(
    r"assertion failed: \[(.*?): cannot read or decode record (\d+ of split .*?), "
    r"at byte (\d+), (\d+) bytes of (\d+)\]",
    re.DOTALL,
)


class RecordTable:
    """Where the records of a split lie, as tensors that the graph can index."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        part = manifest.split(split)
        require(len(part.records) > 0, f"split {split!r} of {manifest.folder}", "hold records", 0)
        check_lengths(manifest, split)
        self.split, self._count = split, len(part.records)
        with tf.device("cpu"):  # where tf.data runs; by itself a process with a GPU puts numbers there
            self._paths = tf.constant([os.fsencode(manifest.folder / shard.file) for shard in part.shards])
            self._sizes = tf.constant([shard.bytes for shard in part.shards], tf.int64)
            self._shard = tf.constant([record.shard for record in part.records], tf.int64)
            self._offset = tf.constant([record.offset for record in part.records], tf.int64)
            self._length = tf.constant([record.length for record in part.records], tf.int64)
            self._media_id = tf.constant([record.media_id.encode(errors="replace") for record in part.records])
            labels = [label for record in part.records for label in record.labels]
            self._labels = tf.constant(labels, tf.int64)  # of all records, one after the other
            ends = np.cumsum([0, *(len(record.labels) for record in part.records)])
            self._first_label = tf.constant(ends, tf.int64)  # [records + 1]
        self._classes = len(manifest.classes) if manifest.task == "multi_label" else None

    def __len__(self) -> int:
        return self._count

    def labels(self, record: tf.Tensor) -> tf.Tensor:
        """The classes of a record, int64 [labels]; int64 scalar `record`."""
        return self._labels[self._first_label[record] : self._first_label[record + 1]]

    def target(self, record: tf.Tensor) -> tf.Tensor:
        """What a network is to say of a record: its class, int32; multi-label: float32 [classes] of 0 and 1."""
        if self._classes is None:
            return tf.cast(self.labels(record)[0], tf.int32)
        return tf.reduce_max(tf.one_hot(self.labels(record), self._classes), axis=0)

    def read(self, record: tf.Tensor, decode: Callable[[ParsedRecord], Any]) -> Any:
        """What `decode` makes of one record (a tensor or a tuple of them); int64 scalar `record`.

        Whatever fails on the way raises InvalidArgumentError naming shard, record and split; the cause is logged, and
        `record_errors_as_user_errors` states it.
        """
        shard, offset, length = self._shard[record], self._offset[record], self._length[record]
        path, size = self._paths[shard], self._sizes[shard]

        def load(_: tf.Tensor) -> tuple[tf.Tensor, Any]:
            parsed = parse_record(read_record(path, offset, length))
            with tf.control_dependencies(self._same_as_listed(record, parsed)):
                return tf.constant(True), decode(parsed)

        # A graph cannot catch an error, but a dataset can skip an element: a second one then says that it was skipped.
        # The element is a number, and the file is read in the map: an error there uses the number up. A dataset of the
        # file itself would fail again at each try, and `ignore_errors` would try for ever.
        found = tf.data.Dataset.range(1).map(load).ignore_errors(log_warning=True)
        nothing = tf.nest.map_structure(_zeros, found.element_spec)  # its first part is the bool False
        readable, content = found.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1).get_single_element()
        byte, number, bytes_ = (tf.strings.as_string(value) for value in (offset, record, length))
        which = [": cannot read or decode record ", number, f" of split {self.split}, at byte ", byte]
        where = tf.strings.join([path, *which, ", ", bytes_, " bytes of ", tf.strings.as_string(size)])
        with tf.control_dependencies([tf.debugging.Assert(readable, [where])]):
            return tf.nest.map_structure(tf.identity, content)

    def _same_as_listed(self, record: tf.Tensor, parsed: ParsedRecord) -> list[tf.Operation]:
        """Assertions that a record has the labels and the name that the manifest lists."""
        listed, message = self.labels(record), "shard and manifest are of two builds"
        counts = tf.debugging.assert_equal(tf.size(parsed.labels), tf.size(listed), message)
        with tf.control_dependencies([counts]):  # first: unequal lengths may broadcast
            labels = tf.debugging.assert_equal(parsed.labels, listed, message)
        return [labels, tf.debugging.assert_equal(parsed.media_id, self._media_id[record], message)]


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def decode_frames(jpegs: tf.Tensor) -> tf.Tensor:
    """JPEG files, string [n], to pixels, uint8 [n, height, width, 3]."""
    return tf.map_fn(decode_frame, jpegs, fn_output_signature=tf.TensorSpec((None, None, 3), tf.uint8))


def short_sides(manifest: Manifest, split: str, records: int = 8) -> list[int]:
    """Short sides in pixels of the stored frames: of the first frame of that many records, spread over the split.

    Raises:
        UserError: a split without records, or one of these is damaged.
    """
    table = RecordTable(manifest, split)
    chosen = np.unique(np.linspace(0, len(table) - 1, records).round().astype(np.int64))

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)])  # the errors of graphs name the record
    def shape_of(record: tf.Tensor) -> tf.Tensor:
        return table.read(record, _first_shape)

    with record_errors_as_user_errors():
        return [int(min(shape_of(record)[:2])) for record in chosen]


def _first_shape(parsed: ParsedRecord) -> tf.Tensor:
    return tf.io.extract_jpeg_shape(parsed.frames[0])  # height, width, channels


def augmentation_randoms(seed: int, place: SamplePosition) -> tf.Tensor:
    """Five uniform numbers in [0, 1) for start, scale, top, left and mirroring; float64."""
    key = tf.random.fold_in(tf.stack([tf.constant(seed, tf.int64), place.epoch]), place.slot)
    return tf.random.stateless_uniform([5], key, dtype=tf.float64, alg="philox")


def as_manifest(records: Manifest | str | Path) -> Manifest:
    """The manifest, read where its folder is given."""
    return records if isinstance(records, Manifest) else Manifest.load(records)


def _require_videos(manifest: Manifest) -> Manifest:
    if manifest.task == "detection":
        raise UserError(f"{manifest.folder} holds key frames with boxes: x3d_tf.data.detection_pipeline reads them")
    return manifest


def deterministic(*, tuned: bool = True) -> tf.data.Options:
    """Options of all datasets: their order is fixed, and no strategy changes what a worker reads.

    `tuned` is for those with something to tune: the end of a dataset waits for the thread that does it, up to a minute.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = tuned
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
