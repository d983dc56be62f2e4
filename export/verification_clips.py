"""Real clips for the verification of artefacts: the middle clip of each video, preprocessed as in evaluation."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.data import transforms
from x3d_tf.data.input_pipeline import evaluation_dataset
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.data.sampling import decoded_short_side, view_indices
from x3d_tf.data.video.clip_reader import VideoClips
from x3d_tf.data.video.decode import VideoError, as_stored
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.terminal import one_line

from .models import ExportableModel


def read_clips(source: ExportableModel, path: str | Path, *, split: str | None = None, limit: int) -> NDArray[np.uint8]:
    """Reads one clip per video, as the uint8 pixels that an application feeds to an artefact.

    Args:
        source: the model; defines the clip and the preprocessing.
        path: folder of records, folder of videos with subfolders, or a single video.
        split: split of the records. Defaults to the evaluation split of the run, or to the only split.
        limit: maximum number of clips; more videos are sampled evenly.

    Returns:
        [clips, T, S, S, 3], RGB, rounded.

    Raises:
        UserError: the folder does not exist, or holds no readable videos; the split does not exist; the records are
            damaged.
    """
    path = Path(path)
    require(limit >= 1, "the limit of clips", "be at least 1", limit)
    if not path.exists():
        raise UserError(f"--clips={path}: no such folder of videos or records")
    if (path / MANIFEST_NAME).is_file():
        clips = _read_records(source, Manifest.load(path), split, limit)
    else:
        require(split is None, "--split", f"be used with records, and {path} holds none", split)
        clips = _read_videos(source, _sample_evenly(list_videos([path]), limit))
    return np.clip(np.rint(clips), 0, 255).astype(np.uint8)


def _read_records(source: ExportableModel, manifest: Manifest, split: str | None, limit: int) -> Any:
    split = split or _default_split(source, manifest)
    complete = manifest.split(split)
    require(len(complete.records) > 0, f"split {split!r} of {manifest.folder}", "contain records")
    sampled = dataclasses.replace(complete, records=tuple(_sample_evenly(complete.records, limit)))
    videos = evaluation_dataset(
        dataclasses.replace(manifest, splits={split: sampled}),
        split,
        source.model.clip,
        source.views,
        frame_sampling=source.frame_sampling,
    )
    with record_errors_as_user_errors():
        return np.concatenate([clips[:, 0] for clips, _, _ in videos.as_numpy_iterator()])


def _default_split(source: ExportableModel, manifest: Manifest) -> str:
    names = list(manifest.splits)
    eval_split = source.run.dataset.eval_split if source.run else "test"
    if eval_split in names:
        return eval_split
    require(len(names) == 1, "--split", f"be set for {manifest.folder} to one of {', '.join(names)}")
    return names[0]


def _read_videos(source: ExportableModel, paths: Sequence[Path]) -> Any:
    clips, failures = [], []
    for path in paths:
        try:
            clips.append(_read_video(source, path))
        except VideoError as error:
            failures.append(error)
    if not clips:
        raise UserError(f"none of {len(failures)} files could be read as a video; first error: {failures[0]}")
    for failure in failures:
        print(one_line(f"skipped: {failure}"), file=sys.stderr)
    return np.stack(clips)


def _read_video(source: ExportableModel, path: Path) -> Any:
    clip, views, stored = source.model.clip, source.views, source.model.stored

    def middle(frames: int, fps: float) -> NDArray[np.int64]:
        return view_indices(frames, fps, clip, views.temporal_views, source.frame_sampling)

    short_side = decoded_short_side(stored, views.resize)
    video = VideoClips(path, middle, short_side, lambda pixels: as_stored(pixels, stored))
    frames_by_indices = {cut.numbers: cut.frames for cut in video}
    pixels = np.stack(frames_by_indices[video.chosen[0]])
    with tf.device("cpu"):
        return transforms.view_crop(transforms.resize(pixels, views.resize, views.stretch), views.crop).numpy()


def _sample_evenly(items: Sequence[Any], limit: int) -> list[Any]:
    indices = np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)
    return [items[index] for index in indices]
