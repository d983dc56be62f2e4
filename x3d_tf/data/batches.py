"""The batches of training and testing, for training loops other than this package's."""

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
    """Batches of clips and labels out of records, as `build_records` makes them.

    For training a stream without end: of each video one clip an epoch at a random time, scale and place. An epoch is
    floor(records / batch) batches, and its order is a function of `seed` alone. Else one clip of each video, its
    middle, in the order of the records, and then the end; the last batch may be smaller.

    Args:
        records: the folder, or its manifest.
        clip: what the network sees: `Expansion.clip`, or the `clip` of a model.
        training: which of the two.
        batch: clips of a batch.
        split: part of the records; "train" or "test" unless given.
        jitter: smallest and largest short side in pixels to which training frames are scaled; 128/112 and 160/112 of
            the crop unless given. Without training it is 128/112.
        flip: whether half of the training clips are mirrored; False where left and right differ in meaning.
        seed: of the order and the chances of training.
        frame_sampling: see `clips.frame_indices`.
        stretch: see `transforms.resize`.

    Returns:
        Dataset of (clips, labels): float32 [batch, T, S, S, 3], RGB in 0..255; int32 [batch] or, of multi-label
        records, float32 [batch, classes] of zeros and ones.

    Raises:
        UserError: no records there, no such split, a setting out of range, or fewer records to train on than `batch`.

    Example:
        >>> train = x3d_tf.dataset("data/mine", model.clip, training=True, batch=8)
        >>> test = x3d_tf.dataset("data/mine", model.clip, training=False, batch=8)
        >>> model.fit(train, steps_per_epoch=100, epochs=10, validation_data=test, shuffle=False)
    """
    expansion = Expansion(gamma_s=clip.size / BASE_CROP)  # for the sizes that go with the crop
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
    require(jitter is None, "jitter", "be for training only", jitter)
    require(batch >= 1, "batch", "be at least 1", batch)
    middle = ViewSpec(temporal_views=1, resize=expansion.test_size, crop=clip.size, stretch=stretch)
    videos = evaluation_dataset(records, split, clip, middle, batch_videos=batch, frame_sampling=frame_sampling)
    return videos.map(lambda clips, labels, _: (clips[:, 0], labels))
