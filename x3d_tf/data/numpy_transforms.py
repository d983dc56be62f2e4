"""The evaluation transform of `data.transforms` without TensorFlow, for exported files. Imports no TensorFlow."""

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.sampling import crop_offsets, resized_shape


def resized_centre_crop(clip: NDArray[np.uint8], short_side: int, size: int, stretch: bool) -> NDArray[np.float32]:
    """Scales a clip and crops the centre square, as `transforms.resize` and `transforms.view_crop` do.

    Only the pixels of the square are computed.

    Args:
        clip: uint8 (T, H, W, 3).
        short_side: length in pixels to which the short side is scaled; with `stretch`, both sides.
        size: side of the square in pixels.
        stretch: see `transforms.resize`.

    Returns:
        float32 (T, size, size, 3) in 0..255, not rounded.
    """
    height, width = clip.shape[1:3]
    resized = (short_side, short_side) if stretch else resized_shape(height, width, short_side)
    ((top, left),) = crop_offsets(resized[0], resized[1], size, 1)
    rows = _Axis(height, int(resized[0]), int(top), size)
    columns = _Axis(width, int(resized[1]), int(left), size)
    result = np.empty((len(clip), size, size, 3), np.float32)
    for frame, square in zip(clip, result):  # frame by frame, which stays in the caches
        narrow = _interpolated(frame[rows.begin : rows.end].astype(np.float32), columns, 1)
        _interpolated(narrow, rows, 0, out=square)
    return result


class _Axis:
    """Positions and weights of bilinear interpolation with half-pixel centres along one axis of a frame.

    Attributes:
        begin, end: the part of the axis that is used.
        lower, upper: the neighbours of each result within this part, [size].
        weight: weight of the upper neighbour, float32 [size].
    """

    def __init__(self, given: int, resized: int, first: int, size: int) -> None:
        scale = np.float32(given) / np.float32(resized)
        centres = (np.arange(first, first + size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        below = np.floor(centres)
        self.weight = centres - below
        lower = np.maximum(below.astype(np.int64), 0)
        upper = np.minimum(np.ceil(centres).astype(np.int64), given - 1)
        self.begin, self.end = int(lower.min()), int(upper.max()) + 1
        self.lower, self.upper = lower - self.begin, upper - self.begin


def _interpolated(
    frame: NDArray[np.float32], along: _Axis, axis: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    frame = frame if axis == 0 else frame[:, along.begin : along.end]
    lower = frame.take(along.lower, axis, out=out, mode="clip")
    upper = frame.take(along.upper, axis)
    upper -= lower
    upper *= along.weight[:, None, None] if axis == 0 else along.weight[:, None]
    lower += upper
    return lower
