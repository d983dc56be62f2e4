"""Training and evaluation batches for custom training loops."""

from pathlib import Path

import tensorflow as tf

from x3d_tf.data.input_pipeline import evaluation_dataset, training_dataset
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import require
from x3d_tf.modeling.expansion import BASE_CROP, Expansion
from x3d_tf.types import ClipSpec, ViewSpec


def dataset(
    records: Manifest | str | Path,
    clip: ClipSpec,
    *,
    training: bool,
    batch: int,
    split: str | None = None,
    jitter: tuple[int, int] | None = None,
    flip: bool = True,
    seed: int = 0,
    frame_sampling: FrameSampling = "slowfast",
    stretch: bool = False,
) -> tf.data.Dataset:
    """Returns a dataset of clips and labels from records that `build_records` made.

    For training, the dataset is infinite. Each epoch has one clip per video, with a random start, scale and crop. An
    epoch is floor(records / batch) batches, and its order depends only on `seed`. For evaluation, the dataset has the
    middle clip of each video, in the order of the records; the last batch may be smaller.

    Args:
        records: folder of the records, or its manifest.
        clip: the network's clip: `Expansion.clip`, or the `clip` of a model.
        training: True for training, False for evaluation.
        batch: batch size.
        split: name of the split. Defaults to "train" for training and "test" for evaluation.
        jitter: range of the random short side of training frames in pixels. Defaults to 128/112 to 160/112 of the crop.
            In evaluation the short side is 128/112 of the crop.
        flip: flips half of the training clips horizontally; use False if left and right differ in meaning.
        seed: random seed for the order and augmentation in training.
        frame_sampling: see `sampling.frame_indices`.
        stretch: see `transforms.resize`.

    Returns:
        Dataset of (clips, labels): float32 [batch, T, S, S, 3], RGB in 0..255; int32 [batch], or for multi-label
        records float32 [batch, classes] of zeros and ones.

    Raises:
        UserError: the records or the split do not exist, a setting is out of range, or the split has fewer records than
            `batch` in training.

    Example:
        >>> train = x3d_tf.dataset("data/mine", model.clip, training=True, batch=8)
        >>> test = x3d_tf.dataset("data/mine", model.clip, training=False, batch=8)
        >>> model.fit(train, steps_per_epoch=100, epochs=10, validation_data=test, shuffle=False)
    """
    expansion = Expansion(gamma_s=clip.size / BASE_CROP)  # supplies the sizes that match the crop
    split = split or ("train" if training else "test")
    if training:
        jitter = jitter or expansion.jitter
        return training_dataset(
            records,
            split,
            clip,
            jitter=jitter,
            flip=flip,
            batch=batch,
            seed=seed,
            frame_sampling=frame_sampling,
            stretch=stretch,
        )
    require(jitter is None, "jitter", "be None for evaluation", jitter)
    require(batch >= 1, "batch", "be at least 1", batch)
    middle = ViewSpec(temporal_views=1, resize=expansion.test_size, crop=clip.size, stretch=stretch)
    videos = evaluation_dataset(records, split, clip, middle, batch_videos=batch, frame_sampling=frame_sampling)
    return videos.map(lambda clips, labels, _: (clips[:, 0], labels))
