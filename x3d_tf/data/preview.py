"""Contact sheets of training clips, exactly as the network receives them."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from x3d_tf import plots
from x3d_tf.data.boxes import is_nonempty
from x3d_tf.data.input_pipeline import (
    SamplePosition,
    augmentation_randoms,
    sample_position,
)
from x3d_tf.data.records.index import Record, with_labels
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.data.sampling import FrameSampling, frame_indices, last_start
from x3d_tf.errors import require
from x3d_tf.types import ClipSpec

COLOURS = (  # names and RGB values for boxes
    ("red", (230, 30, 30)),
    ("green", (30, 200, 30)),
    ("blue", (60, 90, 255)),
    ("yellow", (240, 220, 30)),
    ("magenta", (230, 40, 230)),
    ("cyan", (30, 220, 220)),
)


def save_preview(
    manifest: Manifest,
    split: str,
    clip: ClipSpec,
    stream: tf.data.Dataset,
    path: str | Path,
    *,
    classes: tuple[str, ...],
    batch: int,
    seed: int,
    frame_sampling: FrameSampling = "slowfast",
    timed: bool = True,
    clips: int = 8,
) -> Path:
    """Draws the first training clips as a PNG, with augmentation and labels.

    Args:
        manifest, split, clip: manifest of the records, name of the split, and the network's clip.
        stream: dataset from `training_dataset` with one clip per element.
        path: output file; replaced if it exists.
        classes: names of the classes that the targets refer to.
        batch, seed, frame_sampling: settings of that dataset.
        timed: whether to show the times of the frames; False if the clips may have other frames than the records.
        clips: number of clips, one per row.

    Returns:
        The path of the PNG.

    Raises:
        UserError: a setting is out of range, or records are damaged.
    """
    require(clips >= 1, "clips", "be at least 1", clips)
    records = manifest.split(split).records
    rows, labelled, times = list[Any](), list[tuple[str, Record]](), list[list[float]]()
    with record_errors_as_user_errors():
        for number, (pixels, labels) in enumerate(stream.take(clips).as_numpy_iterator()):
            position = _position(number, len(records), batch, seed)
            record = records[int(position.record)]
            start = augmentation_randoms(seed, position)[0].numpy() * last_start(record.frames, record.fps, clip)
            seconds = frame_indices(start, record.frames, record.fps, clip, frame_sampling) / record.fps
            rows.append(pixels[0])
            times.append(seconds.tolist())
            labelled.append((label_text(labels[0], classes) or "no label", record))
    captions = [f"{text}\n{record.media_id}" for text, record in labelled]
    if timed:
        places = plots.decimals(times)
        for number, ((_, record), shown) in enumerate(zip(labelled, times)):
            seconds = f"{shown[0]:.{places}f} to {shown[-1]:.{places}f} s"
            captions[number] += f"\n{seconds} of {record.frames / record.fps:.{places}f} s"
    title = f"{manifest.folder}, {split}: first training clips, {clip.frames} frames of {clip.size}² pixels"
    plots.save_clips(rows, captions, Path(path), title, times if timed else None)
    return Path(path)


def _position(clip: int, records: int, batch: int, seed: int) -> SamplePosition:
    """Returns the position of training clip number `clip`, counted from 0 over all steps."""
    step, member = (tf.constant(value, tf.int64) for value in divmod(clip, batch))
    return sample_position(step, member, records=records, batch=batch, seed=seed)


def save_box_preview(
    manifest: Manifest,
    split: str,
    stream: tf.data.Dataset,
    path: str | Path,
    *,
    batch: int,
    seed: int,
    clips: int = 8,
) -> Path:
    """Draws the first training clips of key frames as a PNG, with coloured boxes and their labels.

    Args:
        manifest, split: manifest of the records, and name of the split.
        stream: dataset from `training_key_frames` with one clip per element.
        path: output file; replaced if it exists.
        batch, seed: settings of that dataset.
        clips: number of clips, one per row.

    Returns:
        The path of the PNG.
    """
    records = with_labels(manifest.split(split).records)
    rows, captions = [], []
    with record_errors_as_user_errors():
        for number, (inputs, labels) in enumerate(stream.take(clips).as_numpy_iterator()):
            record = records[int(_position(number, len(records), batch, seed).record)]
            pixels, boxes = np.clip(np.round(inputs["clip"][0]), 0, 255), inputs["boxes"][0]
            shown = is_nonempty(boxes).numpy()
            lines = [f"{record.video}, second {record.key_frame}"]
            for index, (box, label) in enumerate(zip(boxes[shown], labels[0][shown])):
                name, colour = COLOURS[index % len(COLOURS)]
                draw_box(pixels, box, colour)
                lines.append(f"{name}: {label_text(label, manifest.classes) or 'no label'}")
            rows.append(pixels)
            captions.append("\n".join(lines if len(lines) > 1 else [*lines, "no box in the crop"]))
    plots.save_clips(rows, captions, Path(path), f"{manifest.folder}, {split}: first training clips")
    return Path(path)


def draw_box(pixels: np.ndarray, box: Any, colour: tuple[int, int, int], width: int = 2) -> None:
    """Draws the outline of a box into images, in place.

    Args:
        pixels: images [..., height, width, 3].
        box: x1, y1, x2, y2 relative to the image, in [0, 1].
        colour: RGB value.
        width: line width in pixels, drawn inwards.
    """
    image_height, image_width = pixels.shape[-3:-1]
    x1, x2 = (round(float(x) * (image_width - 1)) for x in (box[0], box[2]))
    y1, y2 = (round(float(y) * (image_height - 1)) for y in (box[1], box[3]))
    inside = pixels[..., y1 : y2 + 1, x1 : x2 + 1, :]
    for edge in (slice(None, width), slice(-width, None)):
        inside[..., edge, :, :] = colour
        inside[..., :, edge, :] = colour


def label_text(label: Any, classes: tuple[str, ...]) -> str:
    """Returns the class name of a label, or the comma-separated class names of a multi-hot label."""
    if np.ndim(label) == 0:
        require(0 <= label < len(classes), "a target", f"be the number of a class, 0 to {len(classes) - 1}", int(label))
        return classes[int(label)]
    return ", ".join(classes[index] for index in np.flatnonzero(label))
