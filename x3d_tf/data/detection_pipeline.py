"""Records of key frames -> clips with boxes, in tf.data; otherwise as `pipeline`, whose order of clips this shares."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data import boxes as moving
from x3d_tf.data import transforms
from x3d_tf.data.build.key_frames import MARGIN
from x3d_tf.data.input_pipeline import (
    PARALLEL_VIDEOS,
    RecordTable,
    SamplePosition,
    as_manifest,
    augmentation_randoms,
    check_jitter,
    decode_frames,
    deterministic,
    jittered,
    replica_share,
    training_positions,
)
from x3d_tf.data.records.format import NO_LABEL, ParsedAnnotation, ParsedRecord, parse_annotation
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import STRIDE_FPS, key_frame_indices
from x3d_tf.errors import UserError, require
from x3d_tf.types import ClipSpec


class BoxesToTest(NamedTuple):
    """What belongs to the clips of a test, all padded.

    Attributes:
        record: the places of the records in their split, int64 [batch].
        original: the boxes in [0, 1] of the whole frame, float32 [batch, B, 4].
        count: how many of them are real, int64 [batch].
        truth: annotated boxes in [0, 1] of the frame, a row for each pair of a box and a class, float32 [batch, K, 4].
        labels: those classes, or `records.NO_LABEL`, int64 [batch, K].
    """

    record: Any
    original: Any
    count: Any
    truth: Any
    labels: Any


def training_key_frames(
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
    proposal_iou: float = 0.9,
    negatives: bool = False,
    score: float = 0.8,
) -> tf.data.Dataset:
    """Training clips around key frames without end: one random scale, crop and mirroring of each key frame an epoch.

    Boxes move with the pixels. Those of which the crop shows nothing become points, which count nothing in training;
    key frames in which nobody does anything are left out.

    Args:
        records, split, clip, jitter, flip, batch, seed, start_step, worker, replica_batch: see
            `pipeline.training_dataset`.
        proposal_iou: boxes of the person detector that overlap an annotated one by more are further samples of it.
        negatives: whether other boxes of the detector are samples, too, of a person who does nothing.
        score: lowest of a detector's boxes that is a sample.

    Returns:
        Dataset of ({"clip": clips, "boxes": boxes}, labels): float32 [replica_batch, T, S, S, 3], RGB in 0..255;
        float32 [replica_batch, B, 4], x1, y1, x2, y2 in [0, 1] of the clip, padded with zeros, those that the crop does
        not show all ones; float32 [replica_batch, B, classes] of 0 and 1, also padded. B is that of the clip with the
        most boxes, and may be 0.

    Raises:
        UserError: as `pipeline.training_dataset`; a clip longer than what records of key frames hold.
    """
    manifest = _require_key_frames(as_manifest(records))
    acting = with_labels(manifest.split(split).records)
    if not acting:
        raise UserError(f"split {split!r} of {manifest.folder} has no key frame with an action to train on")
    manifest = manifest.with_records(split, acting)
    classes = len(manifest.classes)
    table = RecordTable(manifest, split)
    _check_length(clip)
    check_jitter(jitter, clip)
    places = training_positions(table, batch=batch, seed=seed, start_step=start_step, worker=worker)
    size = replica_share(batch, worker, replica_batch)

    @tf.autograph.experimental.do_not_convert
    def load(place: SamplePosition) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        chance = augmentation_randoms(seed, place)  # of [start, scale, top, left, mirroring] the first is not needed
        pixels, known = table.read(place.record, _decoder(clip))
        samples = moving.ground_truth_samples(known, classes)
        samples = moving.add_matched_proposals(
            samples, known.proposals[known.scores >= score], proposal_iou, negatives=negatives
        )
        pixels, boxes = _resized(pixels, samples.boxes, jittered(jitter, chance[1]))
        top, left = transforms.random_place(pixels, clip.size, chance[2:4])
        pixels, boxes = transforms.crop(pixels, top, left, clip.size), moving.crop(boxes, top, left, clip.size)
        if flip:
            mirrored = chance[4] < 0.5
            pixels = transforms.flip(pixels, mirrored)
            boxes = tf.where(mirrored, moving.flip(boxes, clip.size), boxes)
        boxes = tf.where(moving.is_nonempty(boxes)[:, None], boxes / clip.size, 1.0)
        return {"clip": pixels, "boxes": boxes}, samples.labels

    clips = places.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    shapes = ({"clip": (clip.frames, clip.size, clip.size, 3), "boxes": (None, 4)}, (None, classes))
    return clips.padded_batch(size, shapes, drop_remainder=True).prefetch(2).with_options(deterministic())


def evaluation_key_frames(
    records: Manifest | str | Path,
    split: str,
    clip: ClipSpec,
    *,
    resize: int,
    crop: int,
    batch: int = 1,
    proposals: bool = True,
    score: float = 0.8,
) -> tf.data.Dataset:
    """The centre crop of the clip around each key frame once, in the order of the records.

    Boxes that the crop shows nothing of stay, without width or height.

    Args:
        records, split: the part to test on.
        clip: what the network sees; its `size` is not used.
        resize: short side in pixels to which frames are scaled.
        crop: side of the square crop, at most `resize`.
        batch: clips of an element; the last may have fewer.
        proposals: whether to take the boxes of the person detector, or else the annotated ones.
        score: lowest of a detector's boxes that is taken.

    Returns:
        Dataset of ({"clip": clips, "boxes": boxes}, `BoxesToTest`): float32 [batch, T, crop, crop, 3], RGB in 0..255;
        float32 [batch, B, 4] in [0, 1] of the clip, padded with zeros.

    Raises:
        UserError: a setting out of range, a damaged manifest, a clip longer than what records of key frames hold.
    """
    table = RecordTable(_require_key_frames(as_manifest(records)), split)
    _check_length(clip)
    require(1 <= crop <= resize, "crop", f"be in 1..{resize}, the short side of the frames", crop)

    @tf.autograph.experimental.do_not_convert
    def load(record: tf.Tensor) -> tuple[dict[str, tf.Tensor], BoxesToTest]:
        pixels, known = table.read(record, _decoder(clip))
        original = known.proposals[known.scores >= score] if proposals else moving.ground_truth_samples(known, 1).boxes
        pixels, boxes = _resized(pixels, original, tf.constant(resize, tf.int64))
        shape = tf.shape(pixels)
        top, left = (shape[1] - crop + 1) // 2, (shape[2] - crop + 1) // 2
        clips, boxes = transforms.crop(pixels, top, left, crop), moving.crop(boxes, top, left, crop)
        count = tf.shape(original, tf.int64)[0]
        return {"clip": clips, "boxes": boxes / crop}, BoxesToTest(record, original, count, known.boxes, known.labels)

    clips = tf.data.Dataset.range(len(table)).map(load, num_parallel_calls=PARALLEL_VIDEOS)
    sides = (clip.frames, crop, crop, 3)
    shapes = ({"clip": sides, "boxes": (None, 4)}, BoxesToTest((), (None, 4), (), (None, 4), (None,)))
    zero, nothing = tf.constant(0, tf.int64), tf.constant(NO_LABEL, tf.int64)
    padding = ({"clip": 0.0, "boxes": 0.0}, BoxesToTest(zero, 0.0, zero, 0.0, nothing))
    return clips.padded_batch(batch, shapes, padding).prefetch(1).with_options(deterministic(tuned=False))


def _decoder(clip: ClipSpec) -> Any:
    """The function from a record to the pixels of the clip around its key frame, and what is known of that."""

    def decode(parsed: ParsedRecord) -> tuple[tf.Tensor, ParsedAnnotation]:
        known = parse_annotation(parsed.serialized)
        frames = tf.shape(parsed.frames, tf.int64)[0]
        chosen = key_frame_indices(known.key_frame, frames, parsed.fps, clip, xp=tnp)
        unique, places = tf.unique(chosen)  # at the ends of a video frames are repeated
        pixels = tf.gather(decode_frames(tf.gather(parsed.frames, unique)), places)
        return tf.ensure_shape(pixels, (clip.frames, None, None, 3)), known

    return decode


def _resized(pixels: tf.Tensor, boxes: tf.Tensor, short_side: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The clip with its short side scaled, and boxes in [0, 1] of it in pixels."""
    before = tf.shape(pixels)[1:3]
    resized = transforms.resize(pixels, short_side)
    return resized, moving.scale(moving.to_pixels(boxes, before[0], before[1]), before, tf.shape(resized)[1:3])


def _require_key_frames(manifest: Manifest) -> Manifest:
    if manifest.task != "detection":
        raise UserError(f"{manifest.folder} holds whole videos: build_records --boxes makes records of key frames")
    return manifest


def require_proposals(manifest: Manifest, split: str) -> None:
    """Raises `UserError` where records that `build_key_frames` made have no boxes of a detector in a split."""
    splits = str(manifest.settings.get("proposals", split)).split(",")
    rule = 'be "annotated" on records that were built without --proposals of that split'
    require(split in splits, f"Detection.eval_boxes for split {split!r} of {manifest.folder}", rule, "proposals")


def with_labels(records: Sequence[Record]) -> tuple[Record, ...]:
    """Those of the key frames in which somebody does something: the ones to train on."""
    return tuple(record for record in records if record.labels)


def _check_length(clip: ClipSpec) -> None:
    span = clip.frames * clip.stride / STRIDE_FPS
    rule = f"span at most {2 * MARGIN:.2f} s, what records of key frames hold"
    require(span <= 2 * MARGIN, "the network's clip", rule, f"{span:.2f} s")
