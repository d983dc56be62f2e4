"""Precise statistics of batch norm compared with those of the complete inputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training_steps import batches, config_of, make

from x3d_tf.training import forward
from x3d_tf.training.precise_bn import PreciseStatistics

pytestmark = pytest.mark.usefixtures("eager")


def test_precise_statistics_of_one_batch_make_inference_equal_training() -> None:
    model, _ = make(config_of(group=8, dropout=0.5))
    features = keras.Model(model.input, model.get_layer("conv5").output)
    clips = next(batches())[0]
    expected = features(clips, training=True).numpy()
    assert np.abs(features(clips, training=False).numpy() - expected).max() > 0.1
    PreciseStatistics(model, tf.distribute.get_strategy()).refresh(batches(), 1)
    np.testing.assert_allclose(features(clips, training=False), expected, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_precise_statistics_cover_all_batches_and_keep_the_seeds(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: parts)
    model, _ = make(config_of(group=8, dropout=0.5))
    seeds = [variable.numpy().tolist() for variable in model.variables if "seed_generator" in variable.path]
    before = keras.Model(model.input, model.get_layer("conv1_bn").input)
    stream = batches()
    rows = np.concatenate([before(next(stream)[0]).numpy().astype("float64").reshape(-1, 24) for _ in range(3)])
    PreciseStatistics(model, tf.distribute.get_strategy()).refresh(batches(), 3)
    norm = model.get_layer("conv1_bn")
    np.testing.assert_allclose(norm.moving_mean, rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, rows.var(axis=0), rtol=1e-4)
    assert seeds == [variable.numpy().tolist() for variable in model.variables if "seed_generator" in variable.path]
