"""One training step on batches in memory: each option compared with the plain step or a naive version."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from training_steps import assert_close, batches, config_of, make

from x3d_tf.config import Execution, TrainConfig
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.training.precise_bn import PreciseStatistics
from x3d_tf.training.update import LossScale

pytestmark = pytest.mark.usefixtures("eager")  # slow tests trace the steps on two devices

ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]


def weights_after(config: TrainConfig, part: int = 8) -> list[np.ndarray]:
    """Returns the weights after two steps."""
    model, step = make(config)
    stream = batches(part)
    for _ in range(2):
        step(stream, 1)
    assert step.completed_steps == 2
    return model.get_weights()


def test_micro_batches_add_up(float64: None) -> None:
    """Moving statistics are not compared, because each micro-batch updates them."""
    parts = config_of(execution=Execution(accumulation=2))
    model, _ = make(parts)
    trained = [weight.trainable for weight in model.weights]
    actual = weights_after(parts, part=4)
    plain = weights_after(config_of())
    assert_close([w for w, t in zip(actual, trained) if t], [w for w, t in zip(plain, trained) if t], 1e-9)


@functools.cache
def two_plain_steps() -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Returns the metrics of each step, and the weights."""
    model, step = make(config_of())
    stream = batches()
    measured = [step(stream, 1) for _ in range(2)]
    return [{name: float(values[0]) for name, values in one.items()} for one in measured], model.get_weights()


def test_several_steps_at_once_are_several_steps() -> None:
    """Their metrics come one by one."""
    model, step = make(config_of(execution=Execution(steps_per_execution=2)))
    measured, (expected, weights) = step(batches(), 2), two_plain_steps()
    np.testing.assert_allclose(measured["loss"], [one["loss"] for one in expected], rtol=1e-6)
    np.testing.assert_allclose(measured["top1"], [one["top1"] for one in expected])
    assert step.completed_steps == 2
    assert_close(model.get_weights(), weights, 0)


def test_a_frozen_backbone_does_not_change() -> None:
    config = config_of({"backbone_lr_factor": 0.0}, init="somewhere")
    model, step = make(config)
    before = {layer.name: layer.get_weights() for layer in model.layers}
    step(batches(), 1)
    moved = {n for n, old in before.items() for a, b in zip(old, model.get_layer(n).get_weights()) if (a != b).any()}
    assert moved == {"fc1", "fc2"}


def test_frozen_batch_norm_keeps_its_statistics_and_the_rest_changes() -> None:
    model, step = make(config_of({"batch_norm": "frozen"}, init="somewhere"))
    norms = [layer for layer in model.layers if isinstance(layer, GhostBatchNorm)]
    before, stem = [norm.get_weights() for norm in norms], model.get_layer("conv1_xy").get_weights()[0]
    step(batches(), 1)
    for norm, old in zip(norms, before):
        for a, b in zip(old, norm.get_weights()):
            np.testing.assert_array_equal(a, b)
    assert np.abs(model.get_layer("conv1_xy").get_weights()[0] - stem).max() > 0


def test_the_learning_rate_of_the_backbone_is_scaled(float64: None) -> None:
    changes = []
    for rate in (1.0, 0.1):
        model, step = make(config_of({"backbone_lr_factor": rate, "weight_decay": 0.0}))
        before = {name: model.get_layer(name).get_weights()[0] for name in ("conv5_conv", "fc1")}
        step(batches(), 1)
        changes.append({name: model.get_layer(name).get_weights()[0] - old for name, old in before.items()})
    np.testing.assert_allclose(changes[1]["fc1"], changes[0]["fc1"], atol=1e-12)
    np.testing.assert_allclose(changes[1]["conv5_conv"], 0.1 * changes[0]["conv5_conv"], atol=1e-12)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_float32_variables(precision: Any) -> None:
    model, step = make(config_of(execution=Execution(precision=precision)))
    assert model.get_layer("res2").compute_dtype == precision
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model(next(batches())[0]).dtype == tf.float32
    assert keras.config.dtype_policy().name == "float32"
    stream = batches()
    for expected in two_plain_steps()[0]:
        assert float(step(stream, 1)["loss"][0]) == pytest.approx(expected["loss"], abs=0.1)


def test_statistics_are_summed_in_full_precision() -> None:
    """Sums in bfloat16, which has eight bits, would be wrong by several per cent."""
    x = tf.cast(np.random.default_rng(0).normal(1, 0.5, (8, 2, 8, 8, 4)), tf.bfloat16)
    norm = GhostBatchNorm(8, dtype="mixed_bfloat16")
    assert norm(x, training=True).dtype == tf.bfloat16
    exact = x.numpy().astype("float64").reshape(-1, 4)
    np.testing.assert_allclose(norm.moving_mean, 0.1 * exact.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(norm.moving_variance, 0.9 + 0.1 * exact.var(axis=0, ddof=1), rtol=1e-4)


def test_a_step_with_overflowing_gradients_is_skipped() -> None:
    model, step = make(config_of(execution=Execution(precision="float16")))
    scale = step.variables["loss_scale"][0]
    scale.assign(np.float32(2.0**120))
    before = [np.array(variable) for variable in model.trainable_variables]
    step(batches(), 1)
    assert_close([np.array(variable) for variable in model.trainable_variables], before, 0)
    assert step.completed_steps == 1 and float(scale) == 2.0**119
    scale.assign(2.0**10)
    step(batches(), 1)
    changes = [np.abs(np.array(v) - b).max() for v, b in zip(model.trainable_variables, before)]
    assert max(changes) > 0 and np.isfinite(changes).all()


def test_the_loss_scale_grows_after_many_good_steps() -> None:
    scale = LossScale()
    scale.variables[1].assign(1998)
    for good, expected in ((True, 2.0**15), (True, 2.0**16), (False, 2.0**15), (True, 2.0**15)):
        scale.update(tf.constant(not good))
        assert float(scale.value) == expected
    assert int(scale.variables[1]) == 1


TWO_DEVICES = """
import os, sys
sys.path[:0] = {tests!r}
import keras, numpy as np, tensorflow as tf, x3d_tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import test_detector_training, training_steps
from x3d_tf.training.precise_bn import PreciseStatistics
from x3d_tf.modeling.layers import Dropout
from x3d_tf.config import Execution
x3d_tf.set_kernels("gpu")
tf.config.run_functions_eagerly({eagerly})
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

with strategy.scope():
    layer = Dropout(0.5, seed=3)
masks = strategy.experimental_local_results(strategy.run(lambda: layer(tf.ones([1000]), training=True)))
shared = np.mean([(a > 0) == (b > 0) for a, b in zip(*[mask.numpy() for mask in masks])])
print("shared", shared)
test_detector_training.compare_loss_on_devices(strategy)

execution = Execution(precision={precision!r}, accumulation=2, steps_per_execution=2)
if {precision!r} == "float32":
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
config = training_steps.config_of({{"ema": 0.5}}, group=2, execution=execution)
with strategy.scope():
    model, step = training_steps.make(config, strategy=strategy)
step(iter(strategy.distribute_datasets_from_function(lambda context: training_steps.dataset(2))), 2)
np.savez({folder!r} + "/weights", *model.get_weights())
stream = iter(strategy.distribute_datasets_from_function(lambda context: training_steps.dataset(2)))
PreciseStatistics(model, strategy).refresh(stream, 2)
np.savez({folder!r} + "/refreshed", *model.get_weights())
with step.average.swapped():
    np.savez({folder!r} + "/average", *model.get_weights())
"""


@pytest.mark.parametrize(
    ("precision", "eagerly"),
    [
        ("float32", True),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("float16", False, marks=pytest.mark.slow),
    ],
)
def test_two_devices_take_the_same_steps(float64: None, tmp_path: Path, precision: Any, eagerly: bool) -> None:
    """Two steps per call with two micro-batches, as on one device; independent dropout; the loss of boxes.

    float32 means float64.
    """
    code = TWO_DEVICES.format(tests=TESTS, folder=str(tmp_path), precision=precision, eagerly=eagerly)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = float(done.stdout.split("shared")[1].split()[0])
    assert 0.4 < shared < 0.6  # two independent masks agree in half of the elements
    weights, average, refreshed = (
        list(np.load(tmp_path / f"{name}.npz").values()) for name in ("weights", "average", "refreshed")
    )
    config = config_of(group=2, execution=Execution(precision=precision, accumulation=2))
    if precision == "float16":
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    model, _ = make(config)
    expected = weights_after(config, part=4)
    trained = [(a, b, np.asarray(w)) for a, b, w in zip(weights, expected, model.weights) if w.trainable]
    if precision == "float32":
        assert_close([a for a, _, _ in trained], [b for _, b, _ in trained], 1e-8)
    else:  # rounding flips ReLUs, by 0.4 of the update at most; a wrong loss scale would halve it
        away = sum(np.square(a - b).sum() for a, b, _ in trained)
        assert away < 0.45**2 * sum(np.square(b - first).sum() for _, b, first in trained)
    assert max(np.abs(a - b).max() for a, b in zip(weights, average)) > 0
    if precision == "float32":
        model.set_weights(weights)
        PreciseStatistics(model, tf.distribute.get_strategy()).refresh(batches(4), 2)
        assert_close(refreshed, model.get_weights(), 1e-5)  # statistics are computed in float32
