"""Multi-view prediction: combines the probabilities of several clips per video (paper, section 4)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.data.input_pipeline import MakeExample, evaluation_clips
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import UserError
from x3d_tf.evaluation.views import CombinedViews
from x3d_tf.modeling.x3d import X3D
from x3d_tf.parallel import optimize_for_device
from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL, ClassifierFile
from x3d_tf.terminal import progress_bar
from x3d_tf.types import ClipStarts, Combine, ViewSpec


class SplitPredictions(NamedTuple):
    """Predictions for the videos of a split, in the order of the manifest.

    Attributes:
        probabilities: float32 (videos, classes) in [0, 1].
        targets: int (videos,), or for multi-label records (videos, classes of the records) of 0 and 1.
    """

    probabilities: np.ndarray
    targets: np.ndarray

    def truth(self, classes: int) -> np.ndarray:
        """Returns the targets as bool (videos, classes)."""
        return np.eye(classes, dtype=bool)[self.targets] if self.targets.ndim == 1 else self.targets > 0


def predict_split(
    model: X3D | ClassifierFile,
    manifest: Manifest,
    split: str,
    views: ViewSpec,
    *,
    clip_starts: ClipStarts = "offset",
    frame_sampling: FrameSampling = "slowfast",
    combine: Combine = "mean",
    make_example: MakeExample | None = None,
    progress: bool = True,
) -> SplitPredictions:
    """Computes the class probabilities of each video, combined over its views in float32.

    Args:
        model: a network that returns logits, whose `activation` turns them into probabilities; or a file.
        manifest: the manifest of the records.
        split: name of the split.
        views: the clips and crops of each video.
        clip_starts: the positions of the clips in a video; see `sampling.view_starts`.
        frame_sampling: the choice of the frames of a clip; see `sampling.frame_indices`.
        combine: how the views of a video are combined; see `views.CombinedViews`.
        make_example: makes the targets; see `input_pipeline.evaluation_clips`.
        progress: whether to show a progress bar on stderr.

    Returns:
        The probabilities, and the targets that they are compared with.

    Raises:
        UserError: a setting is out of range, the split does not exist, the records are missing or damaged, or the
            probabilities are not finite.
    """
    network = classifier(model, views.crop)
    records = manifest.split(split).records
    combined = CombinedViews(combine, len(records), model.num_classes)
    targets: list[Any] = [None] * len(records)
    dataset = evaluation_clips(
        manifest,
        split,
        model.clip,
        views,
        clip_starts=clip_starts,
        frame_sampling=frame_sampling,
        make_example=make_example,
    )
    clips_a_call = model.clips_a_call if isinstance(model, ClassifierFile) else CLIPS_A_CALL
    batches = dataset.batch(clips_a_call).prefetch(2)
    total = len(records) * views.views
    with (
        record_errors_as_user_errors(),
        progress_bar(total, "clip", "evaluating", leave=None, disable=not progress) as bar,
    ):
        for clips, target, video in batches:
            probabilities = network(clips)
            finite = np.isfinite(probabilities).all(axis=1)
            if not finite.all():
                first = records[int(video[int(finite.argmin())])].media_id
                raise UserError(
                    f"the network's probabilities for {first} of {manifest.folder} must be finite: its weights are "
                    "NaN, infinite or too large"
                )
            combined.add(video.numpy(), probabilities)
            for index, value in zip(video.numpy(), target.numpy()):
                targets[index] = value
            bar.update(len(probabilities))
    return SplitPredictions(combined.result(), np.array(targets))


def classifier(model: X3D | ClassifierFile, crop: int) -> Callable[[tf.Tensor], NDArray[np.float32]]:
    """Returns a function from clips, float32 (N, T, crop, crop, 3) in 0..255, to an array of probabilities.

    Raises:
        UserError: a file does not support clips of this size.
    """
    if isinstance(model, ClassifierFile):
        return model.for_crop(crop)
    compiled = probabilities_of(model, crop)
    return lambda clips: compiled(clips).numpy()


def probabilities_of(model: X3D, crop: int) -> Any:
    """Returns a compiled function from clips to float32 probabilities, for any precision of the network.

    Args:
        model: a network that returns logits. Its `activation` turns them into probabilities.
        crop: height and width of the clips in pixels.

    Returns:
        The `tf.function` from float32 (N, T, crop, crop, 3), RGB in 0..255, to float32 (N, classes), for any N.
    """
    return _compiled(model, getattr(tf.nn, model.activation), crop)


@functools.lru_cache(maxsize=1)  # compilation takes seconds, and one network is often evaluated several times
def _compiled(model: X3D, activation: Callable[[Any], Any], crop: int) -> Any:
    network = optimize_for_device(lambda clips: activation(tf.cast(model(clips, training=False), tf.float32)))
    return tf.function(network, input_signature=[tf.TensorSpec((None, model.clip.frames, crop, crop, 3), tf.float32)])
