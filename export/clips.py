"""Real clips to hold artefacts against: one of each video, its middle, as the network is tested on."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.data import transforms
from x3d_tf.data.input_pipeline import evaluation_dataset, record_errors_as_user_errors
from x3d_tf.data.records.format import as_stored
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.data.sampling import decoded_short_side, view_indices
from x3d_tf.data.video.clip_reader import VideoClips
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.terminal import one_line

from .models import Source


def read_clips(source: Source, path: str | Path, *, split: str | None = None, limit: int) -> NDArray[np.uint8]:
    """Clips of videos or of records, in the pixels that an application would feed.

    Args:
        source: the model; says what a clip is.
        path: a folder of records, or of videos, also in folders below; or one video.
        split: part of the records; the one that the run was tested on unless given, or the only one.
        limit: clips at most; of more videos, evenly chosen ones.

    Returns:
        [clips, T, S, S, 3], RGB, rounded.

    Raises:
        UserError: no such folder, no videos in it or none that can be read, no such split, damaged records.
    """
    path = Path(path)
    require(limit >= 1, "the limit of clips", "be at least 1", limit)
    if not path.exists():
        raise UserError(f"--clips={path}: no such folder of videos or records")
    if (path / MANIFEST_NAME).is_file():
        clips = _of_records(source, Manifest.load(path), split, limit)
    else:
        require(split is None, "--split", f"be for records, which {path} does not hold", split)
        clips = _of_videos(source, _evenly(list_videos([path]), limit))
    return np.clip(np.rint(clips), 0, 255).astype(np.uint8)


def _of_records(source: Source, manifest: Manifest, split: str | None, limit: int) -> Any:
    split = split or _split_of(source, manifest)
    part = manifest.split(split)
    require(len(part.records) > 0, f"split {split!r} of {manifest.folder}", "hold records", 0)
    chosen = dataclasses.replace(part, records=tuple(_evenly(part.records, limit)))
    videos = evaluation_dataset(
        dataclasses.replace(manifest, splits={split: chosen}),
        split,
        source.model.clip,
        source.views,
        frame_sampling=source.frame_sampling,
    )
    with record_errors_as_user_errors():
        return np.concatenate([clips[:, 0] for clips, _, _ in videos.as_numpy_iterator()])


def _split_of(source: Source, manifest: Manifest) -> str:
    names = list(manifest.splits)
    tested = source.run.dataset.eval_split if source.run else "test"
    if tested in names:
        return tested
    require(len(names) == 1, "--split", f"be given for {manifest.folder}: {', '.join(names)}", None)
    return names[0]


def _of_videos(source: Source, paths: Sequence[Path]) -> Any:
    clips, failures = [], []
    for path in paths:
        try:
            clips.append(_of_video(source, path))
        except VideoError as error:
            failures.append(error)
    if not clips:
        raise UserError(f"no file could be read as a video ({len(failures)} tried); the first, {failures[0]}")
    for failure in failures:
        print(one_line(f"left out: {failure}"), file=sys.stderr)
    return np.stack(clips)


def _of_video(source: Source, path: Path) -> Any:
    clip, views, stored = source.model.clip, source.views, source.model.stored

    def middle(frames: int, fps: float) -> NDArray[np.int64]:
        return view_indices(frames, fps, clip, views.temporal_views, source.frame_sampling)

    short_side = decoded_short_side(stored, views.resize)
    video = VideoClips(path, middle, short_side, lambda pixels: as_stored(pixels, stored))
    found = {cut.numbers: cut.frames for cut in video}
    pixels = np.stack(found[video.chosen[0]])
    with tf.device("cpu"):
        return transforms.crops(transforms.resize(pixels, views.resize, views.stretch), views.crop, 1)[0].numpy()


def _evenly(items: Sequence[Any], limit: int) -> list[Any]:
    places = np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)
    return [items[place] for place in places]
