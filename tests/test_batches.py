"""`x3d_tf.dataset`: its defaults, and that its clips equal those of training and evaluation."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_transforms import naive_resize
from video_fixtures import noise_video, write_records

import x3d_tf
from x3d_tf.data import batches
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.data.sampling import frame_indices

CLIP = x3d_tf.ClipSpec(3, 2.0, 28)  # evaluates at 32 pixels, trains at 32 to 40
VIDEOS = [noise_video(seed, 5 + 4 * seed) for seed in range(5)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"), {"train": VIDEOS, "test": VIDEOS}).folder


def test_training_batches_are_those_of_the_trainer(records: Path) -> None:
    ours = x3d_tf.dataset(records, CLIP, training=True, batch=2, seed=3).take(5)
    theirs = training_dataset(records, "train", CLIP, jitter=(32, 40), flip=True, batch=2, seed=3).take(5)
    for (clips, labels), (expected, truth) in zip(ours.as_numpy_iterator(), theirs.as_numpy_iterator(), strict=True):
        assert (clips.shape, clips.dtype, labels.dtype) == ((2, 3, 28, 28, 3), np.float32, np.int32)
        np.testing.assert_array_equal(clips, expected)
        np.testing.assert_array_equal(labels, truth)
    assert x3d_tf.dataset(records, CLIP, training=True, batch=2).cardinality() == tf.data.INFINITE_CARDINALITY


def test_evaluation_yields_each_middle_clip_once(records: Path) -> None:
    found = list(x3d_tf.dataset(records, CLIP, training=False, batch=2).as_numpy_iterator())
    assert [len(labels) for _, labels in found] == [2, 2, 1]
    assert np.concatenate([labels for _, labels in found]).tolist() == [0, 1, 2, 3, 4]
    for video, clip in zip(VIDEOS, np.concatenate([clips for clips, _ in found]), strict=True):
        frames = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in video.frames])
        start = max(len(frames) - 6, 0) // 2
        chosen = frames[frame_indices(start, len(frames), 30.0, CLIP)]  # 40 x 52 pixels, scaled to 32 x 41
        expected = naive_resize(chosen, 32, 41)[:, 2 : 2 + 28, 7 : 7 + 28]
        np.testing.assert_allclose(clip, expected, atol=0.01)


def test_keras_knows_the_number_of_batches(records: Path) -> None:
    assert int(x3d_tf.dataset(records, CLIP, training=False, batch=2).cardinality()) == 3


def test_defaults_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(batches, "training_dataset", lambda *args, **settings: given.update(settings))
    for name, variant in x3d_tf.VARIANTS.items():
        x3d_tf.dataset("nowhere", variant.expansion.clip, training=True, batch=8)
        assert given["jitter"] == variant.expansion.jitter, name
    assert (given["flip"], given["seed"]) == (True, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": True, "batch": 6}, "batch must be in 1..5, the number of records in split 'train', got 6"),
        ({"training": False, "batch": 0}, "batch must be at least 1, got 0"),
        ({"training": False, "batch": 1, "jitter": (32, 40)}, "jitter must be None for evaluation"),
        ({"training": True, "batch": 1, "split": "val"}, "has no split 'val'; it has train, test"),
        ({"training": True, "batch": 1, "jitter": (20, 40)}, "jitter must be ascending and at least the crop size 28"),
    ],
)
def test_settings_are_checked(records: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        x3d_tf.dataset(records, CLIP, **settings)
