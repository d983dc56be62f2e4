"""Training input of a run: clips of complete videos, or around key frames."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from x3d_tf.config import TrainConfig
from x3d_tf.data.detection_pipeline import training_key_frames
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.data.preview import save_box_preview, save_preview
from x3d_tf.data.records.manifest import Manifest


def training_clips(manifest: Manifest, config: TrainConfig, **position: Any) -> tf.data.Dataset:
    """Returns the batches of a run; `position` are the arguments start_step, worker, replica_batch of the pipeline."""
    common: dict[str, Any] = {
        "jitter": config.expansion.jitter,
        "flip": config.dataset.flip,
        "batch": config.recipe.batch,
        "seed": config.seed,
        **position,
    }
    source = (manifest, config.dataset.train_split, config.expansion.clip)
    if manifest.task == "detection":
        common |= {name: getattr(config.detection, name) for name in ("proposal_iou", "negatives", "score")}
        return training_key_frames(*source, **common)
    dataset = config.dataset
    return training_dataset(*source, frame_sampling=dataset.frame_sampling, stretch=dataset.stretch, **common)


def save_training_preview(manifest: Manifest, config: TrainConfig, path: Path, clips: int = 8) -> Path:
    """Saves the first training clips of a run as a PNG, with their boxes for detection. Returns `path`."""
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
