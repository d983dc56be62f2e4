"""tf.data pipelines from records of key frames to clips with boxes, with the clip order of `input_pipeline`."""

from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data import transforms
from x3d_tf.data.boxes import (
    add_matched_proposals,
    crop_boxes,
    flip_boxes,
    ground_truth_samples,
    is_nonempty,
    scale_boxes,
    to_pixels,
)
from x3d_tf.data.input_pipeline import (
    PARALLEL_VIDEOS,
    SamplePosition,
    as_manifest,
    augmentation_randoms,
    check_jitter,
    deterministic,
    jittered_short_side,
    replica_share,
    training_positions,
)
from x3d_tf.data.key_frames import key_frames_of
from x3d_tf.data.records.format import NO_LABEL, ParsedAnnotation, ParsedRecord, parse_annotation
from x3d_tf.data.records.index import with_labels
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import RecordTable, StoredFrames
from x3d_tf.data.sampling import STRIDE_FPS, key_frame_indices
from x3d_tf.errors import UserError, require
from x3d_tf.types import ClipSpec


class EvalBoxes(NamedTuple):
    """Padded boxes and labels for a batch of clips in evaluation.

    Attributes:
        record: indices of the records in their split, int64 [batch].
        original: boxes relative to the complete frame, in [0, 1], float32 [batch, B, 4].
        count: number of boxes without padding, int64 [batch].
        truth: annotated boxes relative to the frame, in [0, 1], one row per pair of box and class, float32
            [batch, K, 4].
        labels: class of each row of `truth`, or `NO_LABEL`, int64 [batch, K].
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
    """Returns an infinite dataset of training clips: per epoch, one clip around each key frame.

    Scale, crop and flip of each clip are random, and boxes are transformed with the pixels. Boxes outside the crop are
    set to ones and ignored by the loss. Key frames without labels are left out.

    Args:
        records, split, clip, jitter, flip, batch, seed, start_step, worker, replica_batch: see
            `input_pipeline.training_dataset`.
        proposal_iou: IoU above which a detected box becomes a sample with the labels of an annotated box.
        negatives: makes the other detected boxes samples without labels.
        score: minimum score of detected boxes.

    Returns:
        Dataset of ({"clip": clips, "boxes": boxes}, labels): float32 [replica_batch, T, S, S, 3], RGB in 0..255;
        float32 [replica_batch, B, 4], x1, y1, x2, y2 relative to the clip in [0, 1], padded with zeros, and all ones
        for boxes outside the crop; float32 [replica_batch, B, classes] of 0 and 1, also padded. B is the maximum number
        of boxes per clip, and may be 0.

    Raises:
        UserError: see `input_pipeline.training_dataset`; also if the clip is longer than the records of key frames.
    """
    manifest = as_manifest(records)
    key_frames = key_frames_of(manifest)
    labelled = with_labels(manifest.split(split).records)
    if not labelled:
        raise UserError(f"split {split!r} of {manifest.folder} has no key frame with labels to train on")
    manifest = manifest.with_records(split, labelled)
    classes = len(manifest.classes)
    table = RecordTable(manifest, split)
    _check_length(clip, key_frames.margin)
    check_jitter(jitter, clip)
    positions = training_positions(table, batch=batch, seed=seed, start_step=start_step, worker=worker)
    size = replica_share(batch, worker, replica_batch)

    @tf.autograph.experimental.do_not_convert
    def load(position: SamplePosition) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        randoms = augmentation_randoms(seed, position)  # [start, scale, top, left, flip]; start is unused
        pixels, annotation = table.read(position.record, _decoder(clip))
        samples = ground_truth_samples(annotation, classes)
        proposals = annotation.proposals[annotation.scores >= score]
        samples = add_matched_proposals(samples, proposals, proposal_iou, negatives=negatives)
        pixels, boxes = _resize(pixels, samples.boxes, jittered_short_side(jitter, randoms[1]))
        top, left = transforms.random_crop_position(pixels, clip.size, randoms[2:4])
        pixels, boxes = transforms.crop(pixels, top, left, clip.size), crop_boxes(boxes, top, left, clip.size)
        if flip:
            flipped = randoms[4] < 0.5
            pixels = transforms.flip(pixels, flipped)
            boxes = tf.where(flipped, flip_boxes(boxes, clip.size), boxes)
        boxes = tf.where(is_nonempty(boxes)[:, None], boxes / clip.size, 1.0)
        return {"clip": pixels, "boxes": boxes}, samples.labels

    clips = positions.map(load, num_parallel_calls=tf.data.AUTOTUNE)
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
    """Returns a dataset of the centre crops of all key frames' clips, in the order of the records.

    Boxes outside the crop are kept with zero width or height.

    Args:
        records: manifest, or folder of the records.
        split: name of the split to evaluate on.
        clip: the network's clip; its `size` is not used.
        resize: short side in pixels to which frames are scaled.
        crop: side of the square crop in pixels, at most `resize`.
        batch: clips per element; the last element may have fewer.
        proposals: uses the boxes of the person detector; if False, the annotated boxes.
        score: minimum score of detected boxes.

    Returns:
        Dataset of ({"clip": clips, "boxes": boxes}, `EvalBoxes`): float32 [batch, T, crop, crop, 3], RGB in 0..255;
        float32 [batch, B, 4] relative to the clip in [0, 1], padded with zeros.

    Raises:
        UserError: a setting is out of range, the manifest is damaged, or the clip is longer than the records of key
            frames.
    """
    manifest = as_manifest(records)
    _check_length(clip, key_frames_of(manifest).margin)
    table = RecordTable(manifest, split)
    require(1 <= crop <= resize, "crop", f"be in 1..{resize}, the short side of the frames", crop)

    @tf.autograph.experimental.do_not_convert
    def load(record: tf.Tensor) -> tuple[dict[str, tf.Tensor], EvalBoxes]:
        pixels, annotation = table.read(record, _decoder(clip))
        if proposals:
            original = annotation.proposals[annotation.scores >= score]
        else:
            original = ground_truth_samples(annotation, 1).boxes
        pixels, boxes = _resize(pixels, original, tf.constant(resize, tf.int64))
        shape = tf.shape(pixels)
        top, left = (shape[1] - crop + 1) // 2, (shape[2] - crop + 1) // 2
        clips, boxes = transforms.crop(pixels, top, left, crop), crop_boxes(boxes, top, left, crop)
        count = tf.shape(original, tf.int64)[0]
        eval_boxes = EvalBoxes(record, original, count, annotation.boxes, annotation.labels)
        return {"clip": clips, "boxes": boxes / crop}, eval_boxes

    clips = tf.data.Dataset.range(len(table)).map(load, num_parallel_calls=PARALLEL_VIDEOS)
    sides = (clip.frames, crop, crop, 3)
    shapes = ({"clip": sides, "boxes": (None, 4)}, EvalBoxes((), (None, 4), (), (None, 4), (None,)))
    zero, nothing = tf.constant(0, tf.int64), tf.constant(NO_LABEL, tf.int64)
    padding = ({"clip": 0.0, "boxes": 0.0}, EvalBoxes(zero, 0.0, zero, 0.0, nothing))
    return clips.padded_batch(batch, shapes, padding).prefetch(1).with_options(deterministic(tuned=False))


def _decoder(clip: ClipSpec) -> Any:
    """Returns the function that decodes the clip around a record's key frame and parses its annotation."""

    def decode(parsed: ParsedRecord, frames: StoredFrames) -> tuple[tf.Tensor, ParsedAnnotation]:
        annotation = parse_annotation(parsed.serialized)
        chosen = key_frame_indices(annotation.key_frame, frames.count, parsed.fps, clip, xp=tnp)
        unique, positions = tf.unique(chosen)  # frames are repeated at the ends of a video
        pixels = tf.gather(frames.decode(unique), positions)
        return tf.ensure_shape(pixels, (clip.frames, None, None, 3)), annotation

    return decode


def _resize(pixels: tf.Tensor, boxes: tf.Tensor, short_side: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Scales the short side of a clip; converts its boxes from [0, 1] to pixels of the scaled clip."""
    before = tf.shape(pixels)[1:3]
    resized = transforms.resize(pixels, short_side)
    return resized, scale_boxes(to_pixels(boxes, before[0], before[1]), before, tf.shape(resized)[1:3])


def _check_length(clip: ClipSpec, margin: float) -> None:
    span = clip.frames * clip.stride / STRIDE_FPS
    rule = f"span at most {2 * margin:.2f} s, the length of the records of key frames"
    require(span <= 2 * margin, "the network's clip", rule, f"{span:.2f} s")
