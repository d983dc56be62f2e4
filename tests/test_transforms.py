"""Resizing, cropping and flipping, compared with numpy loops, eagerly and inside tf.data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from x3d_tf.data import transforms
from x3d_tf.data.numpy_transforms import resized_centre_crop


def eagerly(function: Callable[..., tf.Tensor], *tensors: Any) -> np.ndarray:
    return function(*(tf.constant(tensor) for tensor in tensors)).numpy()


def in_dataset(function: Callable[..., tf.Tensor], *tensors: Any) -> np.ndarray:
    """Calls a function on tensors of unknown shape in a tf.data map, as after decoding."""
    specs = tuple(tf.TensorSpec([None] * np.ndim(tensor), np.asarray(tensor).dtype) for tensor in tensors)
    dataset = tf.data.Dataset.from_generator(lambda: iter([tensors]), output_signature=specs)
    return dataset.map(lambda *values: function(*values)).get_single_element().numpy()


both = pytest.mark.parametrize("run", [eagerly, in_dataset])


def random_clip(height: int, width: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), np.uint8)


def naive_resize(clip: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly by definition: half-pixel centres, weights by distance, edges repeated."""
    result = np.empty((len(clip), height, width, 3))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * clip.shape[1] / height - 0.5, 0), clip.shape[1] - 1)
            x = min(max((column + 0.5) * clip.shape[2] / width - 0.5, 0), clip.shape[2] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, clip.shape[1] - 1), min(left + 1, clip.shape[2] - 1)
            upper = clip[:, top, left] * (1 - (x - left)) + clip[:, top, right] * (x - left)
            lower = clip[:, bottom, left] * (1 - (x - left)) + clip[:, bottom, right] * (x - left)
            result[:, row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@both
@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [(24, 33, 17, (17, 23)), (33, 24, 17, (23, 17)), (20, 20, 31, (31, 31)), (20, 27, 20, (20, 27))],
)
def test_resize(
    run: Callable[..., np.ndarray], height: int, width: int, short_side: int, expected: tuple[int, int]
) -> None:
    clip = random_clip(height, width)
    resized = run(transforms.resize, clip, np.int64(short_side))
    assert resized.dtype == np.float32
    assert resized.shape == (3, *expected, 3)
    np.testing.assert_allclose(resized, naive_resize(clip, *expected), atol=2e-3)


@both
def test_stretched_frames_are_squares(run: Callable[..., np.ndarray]) -> None:
    clip = random_clip(24, 33)
    stretched = run(lambda c: transforms.resize(c, 17, stretch=True), clip)
    np.testing.assert_allclose(stretched, naive_resize(clip, 17, 17), atol=2e-3)


@both
def test_random_crops_cover_every_position(run: Callable[..., np.ndarray]) -> None:
    clip = random_clip(12, 14)
    for top, vertical in ((0, 0.0), (1, 0.26), (4, 0.9999)):  # one of 5 rows
        for left, horizontal in ((0, 0.1), (3, 0.5), (6, 0.9999)):  # one of 7 columns
            crop = run(lambda c, chance: transforms.random_crop(c, 8, chance), clip, np.array([vertical, horizontal]))
            np.testing.assert_array_equal(crop, clip[:, top : top + 8, left : left + 8])


@both
def test_flip(run: Callable[..., np.ndarray]) -> None:
    clip = random_clip(5, 7)
    np.testing.assert_array_equal(run(transforms.flip, clip, np.bool_(False)), clip)
    mirrored = run(transforms.flip, clip, np.bool_(True))
    for column in range(7):
        np.testing.assert_array_equal(mirrored[:, :, column], clip[:, :, 6 - column])


@both
@pytest.mark.parametrize(
    ("height", "width", "places"),
    [(10, 15, [(1, 0), (1, 4), (1, 7)]), (15, 10, [(0, 1), (4, 1), (7, 1)]), (8, 8, [(0, 0)] * 3)],
)
def test_three_crops_and_the_centre(
    run: Callable[..., np.ndarray], height: int, width: int, places: list[tuple[int, int]]
) -> None:
    clip = random_clip(height, width)
    expected = np.stack([clip[:, y : y + 8, x : x + 8] for y, x in places])
    for number in range(3):
        found = run(lambda c, number=number: transforms.view_crop(c, 8, 3, number), clip)
        np.testing.assert_array_equal(found, expected[number])
    np.testing.assert_array_equal(run(lambda c: transforms.view_crop(c, 8), clip), expected[1])


@pytest.mark.parametrize(
    ("height", "width", "side", "size", "stretch"),
    [
        *((24, 33, 17, 16, False), (33, 24, 17, 16, False), (20, 27, 31, 30, False), (20, 27, 20, 20, False)),
        *((37, 91, 36, 32, True), (64, 128, 32, 28, False), (1, 1, 4, 4, False)),
    ],
)
def test_the_numpy_transform_is_bit_equal(height: int, width: int, side: int, size: int, stretch: bool) -> None:
    clip = random_clip(height, width)
    expected = transforms.view_crop(transforms.resize(clip, side, stretch), size).numpy()
    np.testing.assert_array_max_ulp(resized_centre_crop(clip, side, size, stretch), expected, maxulp=1)
