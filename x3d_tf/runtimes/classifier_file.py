"""Attributes and methods of all classifiers in files. Imports no TensorFlow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import HeadPool, ModelOptions
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.modeling.metadata import Metadata, copy_metadata
from x3d_tf.types import Activation, ClipSpec, Combine, FrameSampling, Storage

CLIPS_A_CALL = 8  # batch size of networks in TensorFlow


class ClassifierFile:
    """A classifier in a file, with the attributes of the network.

    Args:
        path: the file.
        metadata: its metadata.

    Attributes:
        path, metadata: the arguments.
        form: "trainable" or "portable" for a `.keras` file, otherwise "exported"; see `Metadata`.
        clips_a_call: number of clips of a call that keeps all cores busy without taking too much memory.
        expansion, options, num_classes, activation, task, class_names, stretch, stored, frame_sampling, test_views,
            combine, include_top: as those of the network; see `modeling.x3d.Network`.
    """

    clips_a_call: int
    class_names: tuple[str, ...]
    stretch: bool
    stored: Storage | None
    frame_sampling: FrameSampling
    test_views: int
    combine: Combine

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata
        self.form: Literal["trainable", "portable", "exported"] = metadata.form
        self.expansion: Expansion = metadata.expansion
        self.options: ModelOptions = metadata.options
        self.num_classes, self.include_top, self.task = metadata.num_classes, metadata.include_top, metadata.task
        self.activation: Activation = metadata.activation
        copy_metadata(metadata, self)

    @property
    def clip(self) -> ClipSpec:
        """The clip of the network: frames, stride and size."""
        return self.expansion.clip

    def with_head_pool(self, head_pool: HeadPool) -> "ClassifierFile":
        """Returns the classifier with another head pooling; see `ModelOptions`.

        Raises:
            UserError: the pooling is fixed.
        """
        raise UserError(f"the head pooling of {self.path} is fixed")

    def for_crop(self, crop: int) -> Callable[[Any], NDArray[np.float32]]:
        """Returns a function from clips to probabilities.

        Args:
            crop: height and width of the clips in pixels.

        Returns:
            The function from float32 (N, T, crop, crop, 3), RGB in 0..255, an array or a tensor, to float32
            (N, classes), for any N.

        Raises:
            UserError: the file does not support clips of this size.
        """
        raise NotImplementedError
