"""Synthetic datasets whose classes are directions of motion and differ in nothing else: moving_shapes, shaking_shapes.

A video shifts a picture, so that frame t is a shifted copy of frame t of the same video in any other direction. The
shift of the middle frame is uniform over the torus, so that single frames have the same distribution in all classes: a
network that sees no motion stays at chance.

In shaking_shapes a random shift of each frame hides the motion between few frames: the more frames a network sees, and
the longer its clips, the more videos can be told apart. The module imports no TensorFlow until records are created.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.datasets.synthetic import Picture, ShiftedPictures, torus

DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}  # rows and columns per step
VIDEOS = {"train": 800, "test": 100}
FRAMES, FPS, SIDE = 90, 30.0, 128
SPEEDS = (0.4, 0.8)  # range in pixels per frame; each frame's shift is rounded to integers
# Ranges of red, green and blue values, exclusive. Shapes are brighter than the ground: with arbitrary colours, the sign
# of an edge would be needed to see its motion, and short runs would stay at chance.
GROUND_LEVELS, SHAPE_LEVELS = (0, 64), (160, 256)
SHAPES = (3, 5)  # range of shapes per video
RADII = (10, 20)  # pixels
SHAKING = 7.0  # standard deviation of the shifts of single frames of shaking_shapes, rows and columns, in pixels


class MovingShapes(ShiftedPictures):
    """The synthetic data set, created on first use."""

    name = "moving_shapes"
    flips = False  # left and right are classes
    side, frames, fps = SIDE, FRAMES, FPS
    settings: Mapping[str, int | float | str] = {"version": 1}

    @property
    def classes(self) -> Sequence[str]:
        return sorted(DIRECTIONS)

    @property
    def videos(self) -> Mapping[str, int]:
        return VIDEOS

    def picture(self, seed: int, name: str) -> Picture:
        return draw_picture(seed)

    def shifts(self, seed: int, name: str) -> NDArray[np.int64]:
        return shifts(seed, name)


class ShakingShapes(MovingShapes):
    """The synthetic data set with a random shift of each frame, created on first use."""

    name = "shaking_shapes"

    def shifts(self, seed: int, name: str) -> NDArray[np.int64]:
        shaking = np.random.default_rng((seed, 2)).normal(0, SHAKING, (FRAMES, 2))
        return shifts(seed, name) + np.round(shaking).astype(np.int64)


DATASETS = (MovingShapes(), ShakingShapes())


def draw_picture(seed: int) -> Picture:
    """Draws the picture of a video: bright circles, squares and triangles on a dark ground, uint8 RGB."""
    random = np.random.default_rng(seed)
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = random.integers(*GROUND_LEVELS, 3)
    for _ in range(random.integers(SHAPES[0], SHAPES[1] + 1)):
        centre = random.integers(0, SIDE, 2)
        radius = random.integers(RADII[0], RADII[1] + 1)
        y, x = torus(SIDE, centre)
        inside = (
            x**2 + y**2 <= radius**2,
            np.maximum(abs(x), abs(y)) <= radius,
            (abs(y) <= radius) & (2 * abs(x) <= y + radius),
        )[random.integers(3)]
        picture[inside] = random.integers(*SHAPE_LEVELS, 3)
    return picture


def shifts(seed: int, direction: str) -> NDArray[np.int64]:
    """Returns the shift of the picture in each frame, rows and columns, int64 [FRAMES, 2].

    Shifts are relative to the middle of the video, so that reversing a video gives the one in the opposite direction.
    """
    random = np.random.default_rng((seed, 1))  # independent of the random stream for the picture
    middle, speed = random.integers(0, SIDE, 2), random.uniform(*SPEEDS)
    distance = np.round(speed * (np.arange(FRAMES) - (FRAMES - 1) / 2)).astype(np.int64)
    return middle + distance[:, None] * np.array(DIRECTIONS[direction])
