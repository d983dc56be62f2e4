"""Synthetic dataset dominoes, whose classes are directions of a fine texture and differ in nothing else.

Shapes are filled with random pairs of bright pixels, the dominoes. The class is the direction in which the pixels of a
pair are adjacent. Brightness, shapes, colours and motion are the same in all classes, so that a network must see single
pixels of the stored frames: one with a small crop, whose frames are scaled down, sees little of them. The module
imports no TensorFlow until records are created.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.datasets.synthetic import Picture, ShiftedPictures, torus

# Rows and columns from the first pixel of a domino to the second.
DIRECTIONS = {"diagonal_down": (1, 1), "diagonal_up": (-1, 1), "horizontal": (0, 1), "vertical": (1, 0)}
VIDEOS = {"train": 400, "test": 100}
FRAMES, FPS = 16, 30.0
SIDE = 320  # a crop of 224 pixels is of training frames scaled to 256..320: no frame of it is enlarged, which blurs
SPEEDS = (0.5, 2.0)  # range in pixels per frame; each frame's shift is rounded to integers
DENSITY = 0.15  # dominoes that begin at a pixel
GROUND_LEVELS, SHAPE_LEVELS = (0, 64), (160, 256)  # ranges of red, green and blue values, exclusive
DARK = 3  # the pixels of a shape outside of dominoes are darker by this factor
SHAPES = (3, 5)  # range of shapes per video
RADII = (31, 50)  # pixels


class Dominoes(ShiftedPictures):
    """The synthetic data set, created on first use."""

    name = "dominoes"
    flips = False  # the diagonals would swap
    side, frames, fps = SIDE, FRAMES, FPS
    settings: Mapping[str, int | float | str] = {"version": 2}

    @property
    def classes(self) -> Sequence[str]:
        return sorted(DIRECTIONS)

    @property
    def videos(self) -> Mapping[str, int]:
        return VIDEOS

    def picture(self, seed: int, name: str) -> Picture:
        return draw_picture(seed, name)

    def shifts(self, seed: int, name: str) -> NDArray[np.int64]:
        return shifts(seed)


DATASETS = (Dominoes(),)


def draw_texture(seed: int, direction: str) -> NDArray[np.bool_]:
    """Draws dominoes on a torus: True for bright pixels, bool [SIDE, SIDE]. The first pixels are those of any class."""
    first = np.random.default_rng((seed, 2)).random((SIDE, SIDE)) < DENSITY
    return first | np.roll(first, DIRECTIONS[direction], (0, 1))


def draw_picture(seed: int, direction: str) -> Picture:
    """Draws the picture of a video: circles and squares, filled with dominoes, on a dark ground, uint8 RGB."""
    random, bright = np.random.default_rng(seed), draw_texture(seed, direction)
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = random.integers(*GROUND_LEVELS, 3)
    for _ in range(random.integers(SHAPES[0], SHAPES[1] + 1)):
        y, x = torus(SIDE, random.integers(0, SIDE, 2))
        radius = random.integers(RADII[0], RADII[1] + 1)
        inside = (x**2 + y**2 <= radius**2, np.maximum(abs(x), abs(y)) <= radius)[random.integers(2)]
        colour = random.integers(*SHAPE_LEVELS, 3)
        picture[inside & bright], picture[inside & ~bright] = colour, colour // DARK
    return picture


def shifts(seed: int) -> NDArray[np.int64]:
    """Returns the shift of the picture in each frame, rows and columns, int64 [FRAMES, 2], in a random direction."""
    random = np.random.default_rng((seed, 1))  # independent of the random stream for the picture
    middle, speed, angle = random.integers(0, SIDE, 2), random.uniform(*SPEEDS), random.uniform(0, 2 * np.pi)
    distance = speed * (np.arange(FRAMES) - (FRAMES - 1) / 2)
    return middle + np.round(distance[:, None] * (np.sin(angle), np.cos(angle))).astype(np.int64)
