"""Index arithmetic of clips and crops, with numpy and inside a tf.data graph."""

import json
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow.experimental.numpy as tnp

import x3d_tf
from x3d_tf.data.sampling import (
    clip_contract,
    crop_offsets,
    frame_indices,
    key_frame_contract,
    key_frame_indices,
    last_start,
    resized_shape,
    view_starts,
)
from x3d_tf.modeling.expansion import VARIANTS
from x3d_tf.types import ClipSpec, Storage

M, XS, S, XXL = (VARIANTS[name].expansion.clip for name in ("x3d_m", "x3d_xs", "x3d_s", "x3d_xxl"))


def in_numpy(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    return np.asarray(function(*arguments, xp=np))


def in_graph(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Calls a function in a tf.data map, with tensors of the types in records: int64 and float32."""
    tensors = [
        a if isinstance(a, ClipSpec | str) else tf.constant(a, tf.float32 if isinstance(a, float) else tf.int64)
        for a in arguments
    ]
    static = [isinstance(a, ClipSpec | str) for a in arguments]
    dynamic = tuple(t for t, fixed in zip(tensors, static) if not fixed)

    def call(*values: tf.Tensor) -> tf.Tensor:
        remaining = iter(values)
        return tf.convert_to_tensor(
            function(*[t if fixed else next(remaining) for t, fixed in zip(tensors, static)], xp=tnp)
        )

    return tf.data.Dataset.from_tensors(dynamic).map(call).get_single_element().numpy()


both = pytest.mark.parametrize("run", [in_numpy, in_graph])


@both
@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (M, [0, 5, 10, 15, 21, 26, 31, 36, 42, 47, 52, 57, 63, 68, 73, 79]),
        (XS, [0, 15, 31, 47]),
        (S, [0, 6, 12, 19, 25, 32, 38, 44, 51, 57, 64, 70, 77]),
    ],
)
def test_frames_of_the_published_clips(run: Callable[..., np.ndarray], clip: ClipSpec, expected: list[int]) -> None:
    assert run(frame_indices, 0, 300, 30.0, clip).tolist() == expected


@both
@pytest.mark.parametrize(
    ("views", "clip_starts", "expected"),
    [
        (10, "slowfast", range(0, 199, 22)),
        (1, "slowfast", [0]),
        (1, "offset", [110]),
        (3, "offset", [0, 110, 220]),
        (10, "offset", range(0, 217, 24)),
    ],
)
def test_starts_of_evaluation_clips(
    run: Callable[..., np.ndarray], views: int, clip_starts: Any, expected: list[int]
) -> None:
    def starts(frames: Any, fps: Any, xp: Any) -> Any:
        return view_starts(frames, fps, M, views, clip_starts, xp=xp)

    assert run(starts, 300, 30.0).tolist() == list(expected)


@both
@pytest.mark.parametrize(
    ("height", "width", "crop", "expected"),
    [
        (256, 341, 256, [(0, 0), (0, 43), (0, 85)]),
        (341, 256, 256, [(0, 0), (43, 0), (85, 0)]),
        (182, 242, 160, [(11, 0), (11, 41), (11, 82)]),
        (256, 256, 256, [(0, 0)] * 3),
    ],
)
def test_crop_offsets(
    run: Callable[..., np.ndarray], height: int, width: int, crop: int, expected: list[tuple[int, int]]
) -> None:
    def offsets(count: int) -> Callable[..., Any]:
        return lambda h, w, xp: [
            xp.stack([xp.asarray(y), xp.asarray(x)]) for y, x in crop_offsets(h, w, crop, count, xp)
        ]

    assert run(offsets(3), height, width).tolist() == [list(place) for place in expected]
    assert run(offsets(1), height, width).tolist() == [list(expected[1])]


@both
def test_frames_equal_exact_fractions(run: Callable[..., np.ndarray]) -> None:
    random = np.random.default_rng(0)
    for clip in (M, XS, S, XXL, ClipSpec(1, 1.0, 112)):
        for fps in (24.0, 25.0, 30.0, 59.5):
            frames, start = int(random.integers(20, 400)), int(random.integers(0, 150))
            length = Fraction(clip.stride) * clip.frames * Fraction(fps) / 30
            gaps = max(clip.frames - 1, 1)
            spread = [start + i * (length - 1) / gaps for i in range(clip.frames)]
            steps = [start + i * Fraction(clip.stride) * Fraction(fps) / 30 for i in range(clip.frames)]
            for sampling, positions in (("slowfast", spread), ("exact", steps)):
                expected = [int(min(max(position, 0), frames - 1)) for position in positions]
                assert run(frame_indices, start, frames, fps, clip, sampling).tolist() == expected


@both
def test_a_short_video_repeats_its_last_frame(run: Callable[..., np.ndarray]) -> None:
    assert run(last_start, 50, 30.0, M) == 0
    assert run(frame_indices, 0, 50, 30.0, M).tolist() == [0, 5, 10, 15, 21, 26, 31, 36, 42, 47, 49, 49, 49, 49, 49, 49]


def test_training_clips_cover_the_video_and_stay_inside() -> None:
    for frames in (80, 81, 300, 301):
        last = last_start(frames, 30.0, M)
        assert last == frames - 80
        for chance in np.linspace(0, 1, 33):
            position = chance * last + np.arange(16) * 79 / 15
            assert position.max() <= frames - 1  # nothing is clamped
            assert (frame_indices(chance * last, frames, 30.0, M) == position.astype(int)).all()
        assert frame_indices(last, frames, 30.0, M)[-1] == frames - 1


@both
@pytest.mark.parametrize(("height", "width"), [(256, 341), (341, 256), (240, 320), (256, 256), (1080, 1921)])
def test_resized_shape(run: Callable[..., np.ndarray], height: int, width: int) -> None:
    def shape(h: Any, w: Any, size: Any, xp: Any) -> Any:
        return xp.stack([xp.asarray(side) for side in resized_shape(h, w, size, xp=xp)])

    for size in (160, 182, 228, 256):
        long_side = int(Fraction(max(height, width) * size, min(height, width)))
        expected = [size, long_side] if height <= width else [long_side, size]
        assert run(shape, height, width, size).tolist() == expected


def test_each_start_gives_a_row() -> None:
    starts = np.array([0.0, 110.0, 220.0])
    rows = frame_indices(starts, 300, 30.0, M)
    assert rows.shape == (3, 16)
    for row, start in zip(rows, starts):
        assert (row == frame_indices(start, 300, 30.0, M)).all()


def network_of(**facts: Any) -> Any:
    """Returns a network without layers, for an input contract."""
    network = VARIANTS["x3d_s"].expansion
    known = {"expansion": network, "clip": network.clip, "eval_size": 160, "stored": None}
    return SimpleNamespace(
        **known | {"stretch": False, "frame_sampling": "slowfast", "test_views": 10, "combine": "mean"} | facts
    )


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {"offsets": [0, 6, 12, 19, 25, 32, 38, 44, 51, 57, 64, 70, 77], "clips": 10, "stored": "none"}),
        ({}, {"decoded_short_side": 256, "resize": 182, "resized": "the short side", "crop": 160}),
        ({"frame_sampling": "exact"}, {"offsets": [*range(0, 78, 6)], "frame_sampling": "exact"}),
        ({"stored": Storage(96, 90)}, {"stored": {"short_side": 96, "jpeg_quality": 90}, "decoded_short_side": 96}),
        ({"stretch": True, "test_views": 3}, {"resized": "both sides", "clips": 3}),
        ({"combine": "max"}, {"combine": "max"}),
        ({"expansion": VARIANTS["x3d_xl"].expansion}, {"decoded_short_side": 356}),
    ],
)
def test_clip_contract(facts: dict[str, Any], expected: dict[str, Any]) -> None:
    contract = clip_contract(network_of(**facts))
    assert {name: contract[name] for name in expected} == expected
    json.dumps(contract)
    assert set(contract["rules"]) - {"fps", "span", "prediction"} <= set(contract)


def test_key_frame_contract() -> None:
    contract = key_frame_contract(network_of())
    assert (contract["offsets"], contract["frame_sampling"]) == ([*range(-39, 39, 6)], "key_frame")
    assert not {"clips", "combine"} & set(contract) and "prediction" not in contract["rules"]
    json.dumps(contract)
    assert set(contract["rules"]) - {"fps", "span"} <= set(contract)


def test_unknown_values_are_errors() -> None:
    with pytest.raises(ValueError, match=r"frame_sampling .* got 'fast'"):
        frame_indices(0, 300, 30.0, M, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"clip_starts .* got 'fast'"):
        view_starts(300, 30.0, M, 10, "fast")  # type: ignore[arg-type]


def test_the_frames_of_a_clip_lie_around_its_key_frame() -> None:
    """PySlowFast's sequence, range(c - h, c + h, τ), clamped; XXL's stride is not whole."""
    m, s, xxl = (x3d_tf.VARIANTS[name].expansion.clip for name in ("x3d_m", "x3d_s", "x3d_xxl"))
    assert key_frame_indices(100, 1000, 30.0, m).tolist() == list(range(60, 140, 5))
    assert key_frame_indices(100, 1000, 30.0, s).tolist() == list(range(61, 139, 6))
    assert key_frame_indices(100, 1000, 30.0, xxl).tolist() == [60 + int(2.5 * i) for i in range(32)]
    assert key_frame_indices(10, 30, 30.0, m).tolist() == [min(max(i, 0), 29) for i in range(-30, 50, 5)]
    assert key_frame_indices(50, 1000, 15.0, m).tolist() == [50 - 20 + int(2.5 * i) for i in range(16)]
