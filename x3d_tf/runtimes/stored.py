"""Classifiers in `.keras` files for predictions in TensorFlow, without building a Keras model.

Building the trainable network and loading its weights takes longer than reading the arrays and computing with them.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import HeadPool
from x3d_tf.modeling.archive import read_classifier_metadata, read_layers
from x3d_tf.modeling.folded import FoldedWeights, folded_function
from x3d_tf.modeling.kernels import active_kernels
from x3d_tf.parallel import map_clips_in_parallel
from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL, ClassifierFile


class StoredClassifier(ClassifierFile):
    """A classifier in a run folder or `.keras` file, in its inference form; see `modeling.folded`.

    Args:
        path: run folder, or `.keras` file saved by this package.

    Raises:
        UserError: the file does not exist, was not saved by this package, holds a detector, or has weights that do not
            match its metadata.
    """

    clips_a_call = CLIPS_A_CALL

    def __init__(self, path: str | Path) -> None:
        backend = keras.backend.backend()
        require(backend == "tensorflow", "Keras' backend", "be tensorflow to predict with a .keras file", backend)
        file, metadata = read_classifier_metadata(path)
        super().__init__(file, metadata)
        self._compiled: dict[int, Any] = {}  # by crop: compilation takes seconds
        self._weights = FoldedWeights(read_layers(file, metadata), self.options)

    def for_crop(self, crop: int) -> Callable[[Any], NDArray[np.float32]]:
        """See `ClassifierFile`."""
        compiled = self.compiled(crop)
        return lambda clips: compiled(clips).numpy()

    def with_head_pool(self, head_pool: HeadPool) -> "StoredClassifier":
        """See `ClassifierFile`."""
        other = copy.copy(self)
        options = replace(self.options, head_pool=head_pool)
        ClassifierFile.__init__(other, self.path, replace(self.metadata, options=options))
        other._compiled = {}
        return other

    def compiled(self, crop: int) -> Any:
        """Returns a compiled function from clips to probabilities.

        Args:
            crop: height and width of the clips in pixels.

        Returns:
            The `tf.function` from float32 (N, T, crop, crop, 3), RGB in 0..255, to float32 (N, classes), for any N.
        """
        if crop not in self._compiled:
            self._compiled[crop] = self._compile(crop)
        return self._compiled[crop]

    def _compile(self, crop: int) -> Any:
        on_cpu = active_kernels() == "cpu"
        network = folded_function(self._weights, self.metadata, crop, batch=1 if on_cpu else None)

        return tf.function(
            map_clips_in_parallel(network) if on_cpu else network,
            input_signature=[tf.TensorSpec((None, self.clip.frames, crop, crop, 3), tf.float32)],
            autograph=False,
        )
