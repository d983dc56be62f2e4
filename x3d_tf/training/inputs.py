"""The clips that a run trains on, of whole videos or around key frames."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from x3d_tf.config import TrainConfig
from x3d_tf.data.detection_pipeline import training_key_frames
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.data.preview import save_box_preview, save_preview
from x3d_tf.data.records.manifest import Manifest


def training_clips(manifest: Manifest, config: TrainConfig, **which: Any) -> tf.data.Dataset:
    """The clips of a run; `which` are start_step, worker and replica_batch of `training_dataset`."""
    common: dict[str, Any] = {
        "jitter": config.expansion.jitter,
        "flip": config.dataset.flip,
        "batch": config.recipe.batch,
        "seed": config.seed,
        **which,
    }
    place = (manifest, config.dataset.train_split, config.expansion.clip)
    if manifest.task == "detection":
        common |= {name: getattr(config.detection, name) for name in ("proposal_iou", "negatives", "score")}
        return training_key_frames(*place, **common)
    dataset = config.dataset
    return training_dataset(*place, frame_sampling=dataset.frame_sampling, stretch=dataset.stretch, **common)


def save_training_preview(manifest: Manifest, config: TrainConfig, path: Path, clips: int = 8) -> Path:
    """Draws the first clips of a run as a PNG, those of key frames with their boxes; returns its path."""
    split = config.dataset.train_split
    if manifest.task == "detection":
        stream = training_clips(manifest, config, replica_batch=1)
        return save_box_preview(manifest, split, stream, path, batch=config.recipe.batch, seed=config.seed, clips=clips)
    return save_preview(
        manifest,
        split,
        config.expansion.clip,
        path,
        jitter=config.expansion.jitter,
        flip=config.dataset.flip,
        batch=config.recipe.batch,
        seed=config.seed,
        frame_sampling=config.dataset.frame_sampling,
        stretch=config.dataset.stretch,
        clips=clips,
    )
