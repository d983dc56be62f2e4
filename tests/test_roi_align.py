"""Tests of RoIAlign against a naive loop, an analytic ramp and, if installed, torchvision."""

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from x3d_tf.modeling.roi_align import roi_align

BOXES = np.array(
    [
        [0.0, 0.0, 10.0, 8.0],  # all of the map
        [1.3, 2.2, 6.7, 7.9],
        [4.0, 4.0, 4.9, 4.3],  # within a cell
        [9.1, 0.0, 10.0, 8.0],  # at the right border
        [0.0, 7.0, 10.0, 8.0],  # at the bottom
        [3.0, 3.0, 3.0, 6.0],  # no width
        [0.0, 0.0, 0.0, 0.0],  # padding
        [-3.0, -2.5, 4.0, 5.0],  # crosses the left and upper border
        [6.0, 5.0, 15.5, 13.0],  # crosses the right and lower border
        [-9.0, -9.0, -3.0, -2.0],  # outside
        [5.0, 5.0, 2.0, 1.0],  # reversed
    ]
)


def naive(features: np.ndarray, boxes: np.ndarray, size: int, scale: float, aligned: bool) -> np.ndarray:
    """Implements torchvision's definition sample by sample: (H, W, C) and (B, 4) -> (B, size, size, C)."""
    channels = features.shape[-1]
    result = np.zeros((len(boxes), size, size, channels))
    shift = 0.5 if aligned else 0.0
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = (value * scale - shift for value in box)
        roi_width, roi_height = x2 - x1, y2 - y1
        if not aligned:
            roi_width, roi_height = max(roi_width, 1.0), max(roi_height, 1.0)
        across, down = math.ceil(roi_width / size), math.ceil(roi_height / size)
        for i in range(size):
            for j in range(size):
                for dy in range(down):
                    for dx in range(across):
                        y = y1 + i * roi_height / size + (dy + 0.5) * roi_height / size / down
                        x = x1 + j * roi_width / size + (dx + 0.5) * roi_width / size / across
                        result[number, i, j] += bilinear(features, y, x)
                result[number, i, j] /= max(across * down, 1) if across > 0 and down > 0 else 1
    return result


def bilinear(features: np.ndarray, y: float, x: float) -> np.ndarray:
    height, width, channels = features.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    below, beside = y - top, x - left
    upper = features[top, left] * (1 - beside) + features[top, right] * beside
    lower = features[bottom, left] * (1 - beside) + features[bottom, right] * beside
    return upper * (1 - below) + lower * below


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(7, 1.0), (3, 1.0), (2, 0.5), (7, 1 / 32)])
def test_roi_align_equals_a_naive_loop(aligned: bool, size: int, scale: float) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((2, 8, 10, 3))
    boxes = np.stack([BOXES, BOXES[::-1] + random.uniform(-0.5, 0.5, BOXES.shape)]) / scale
    expected = [naive(maps, maps_boxes, size, scale, aligned) for maps, maps_boxes in zip(features, boxes)]
    actual = roi_align(
        features.astype("float32"), boxes.astype("float32"), size=size, scale=scale, aligned=aligned, samples=10
    )
    assert actual.shape == (2, len(BOXES), size, size, 3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [7, 8, 12, 14, 15])
def test_default_samples_suffice_for_boxes_within_the_map(side: int) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((1, side, side, 2))
    corners = np.sort(random.uniform(0, side, (40, 2, 2)), axis=1).reshape(40, 4)
    boxes = np.concatenate([[[0, 0, side, side]], corners])
    actual = roi_align(features, boxes[None], size=7, scale=1.0)
    np.testing.assert_allclose(actual[0], naive(features[0], boxes, 7, 1.0, True), rtol=0, atol=1e-12)


def test_a_ramp_gives_the_centres_of_the_bins() -> None:
    """Away from borders, column j is x1 s - 0.5 + (j + 0.5) (x2 - x1) s / 7."""
    ramp = np.broadcast_to(np.arange(20.0)[:, None], (1, 20, 20, 1))  # f(y, x) = x
    x1, x2 = 100.0, 500.0
    actual = roi_align(ramp, np.array([[[x1, 128.0, x2, 400.0]]]), size=7, scale=1 / 32)
    expected = x1 / 32 - 0.5 + (np.arange(7) + 0.5) * (x2 - x1) / 32 / 7
    np.testing.assert_allclose(np.asarray(actual)[0, 0, :, :, 0], np.tile(expected, (7, 1)), atol=1e-12)


def test_the_gradient_is_exact() -> None:
    """Uses linearity in the map, <upstream, f(map)> = <gradient, map>, and a finite difference."""
    random = np.random.default_rng(0)
    features, upstream = tf.constant(random.standard_normal((1, 5, 6, 2))), random.standard_normal((1, 3, 3, 3, 2))
    boxes = np.array([[[0.5, 0.2, 5.8, 4.1], [2.0, 2.0, 2.5, 2.5], [0.0, 0.0, 6.0, 5.0]]])
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = tf.reduce_sum(roi_align(features, boxes, size=3, scale=1.0) * upstream)
    gradient = tape.gradient(value, features)
    assert float(value) == pytest.approx(float(tf.reduce_sum(gradient * features)), abs=1e-12)
    changed = features.numpy()
    changed[0, 2, 3, 1] += 1.0
    other = np.sum(naive(changed[0], boxes[0], 3, 1.0, True) * upstream[0])
    assert other - float(value) == pytest.approx(float(gradient[0, 2, 3, 1]), abs=1e-12)


def test_the_graph_has_no_loop_over_boxes_or_bins() -> None:
    def operations(boxes: int, size: int) -> int:
        spec = tf.TensorSpec((None, 8, 8, 4)), tf.TensorSpec((None, boxes, 4))
        function = tf.function(lambda maps, boxes: roi_align(maps, boxes, size=size, scale=1.0), input_signature=spec)
        return len(function.get_concrete_function().graph.get_operations())

    assert operations(1, 2) == operations(50, 7)


def test_dynamic_sides() -> None:
    features = np.random.default_rng(0).standard_normal((2, 9, 8, 3)).astype("float32")
    boxes = np.tile(np.float32([[0, 0, 8, 9], [1, 2, 3, 4]]), (2, 1, 1))
    spec = [tf.TensorSpec((None, None, None, 3)), tf.TensorSpec((None, None, 4))]
    function = tf.function(lambda maps, boxes: roi_align(maps, boxes, size=7, scale=1.0), input_signature=spec)
    np.testing.assert_allclose(function(features, boxes), roi_align(features, boxes, size=7, scale=1.0), atol=1e-5)


def test_mean_over_time_and_alignment_commute() -> None:
    """For a box that does not move, so the head may average over time first."""
    clips = np.random.default_rng(0).standard_normal((1, 4, 6, 6, 2))
    boxes: Any = np.array([[[0.7, 1.1, 5.2, 4.9]]])
    aligned_frames = [roi_align(clips[:, frame], boxes, size=7, scale=1.0) for frame in range(4)]
    aligned_mean = roi_align(clips.mean(axis=1), boxes, size=7, scale=1.0)
    np.testing.assert_allclose(np.mean(aligned_frames, axis=0), keras.ops.convert_to_numpy(aligned_mean), atol=1e-12)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_torchvision(aligned: bool) -> None:
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    features = np.random.default_rng(0).standard_normal((1, 8, 10, 3)).astype("float32")
    expected = ops.roi_align(
        torch.from_numpy(features.transpose(0, 3, 1, 2).copy()),
        [torch.from_numpy(BOXES.astype("float32"))],
        7,
        aligned=aligned,
    )
    actual = roi_align(features, BOXES[None], size=7, scale=1.0, aligned=aligned, samples=10)
    np.testing.assert_allclose(actual[0], expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
