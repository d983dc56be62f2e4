"""Combines the probabilities of the views of each video. Imports no TensorFlow."""

import numpy as np
from numpy.typing import NDArray

from x3d_tf.types import Combine


class CombinedViews:
    """The combined probabilities of several videos, to which views are added in any order.

    Args:
        combine: "mean" averages over the views (paper, section 4); "max" takes the maximum for each class (paper,
            appendix A.2, for Charades).
        videos: number of videos.
        classes: number of classes.

    Attributes:
        views: number of views that were added for each video, int64 [videos].
    """

    def __init__(self, combine: Combine, videos: int, classes: int) -> None:
        self._combine = combine
        self._values = np.zeros((videos, classes), np.float32)
        self.views = np.zeros(videos, np.int64)

    def add(self, videos: NDArray[np.int64], probabilities: NDArray[np.float32], times: int = 1) -> None:
        """Adds views.

        Args:
            videos: index of each view's video, [n].
            probabilities: probabilities of each view, in [0, 1], float32 [n, classes].
            times: number of times that each view counts.
        """
        if self._combine == "max":
            np.maximum.at(self._values, videos, probabilities)
        else:
            np.add.at(self._values, videos, times * probabilities)
        np.add.at(self.views, videos, times)

    def result(self) -> NDArray[np.float32]:
        """Returns the combined probabilities, float32 [videos, classes]."""
        if self._combine == "max":
            return self._values
        return np.divide(self._values, self.views[:, None], dtype=np.float32)
