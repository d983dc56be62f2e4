"""One training step on batches in memory: each option compared with the plain step or a naive version."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import x3d_tf
from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.training import forward
from x3d_tf.training.ema import MovingAverage
from x3d_tf.training.precise_bn import PreciseStatistics
from x3d_tf.training.step import LossScale, TrainStep, balancing_weights, precision_scope

pytestmark = pytest.mark.usefixtures("eager")  # slow tests trace the steps on two devices

ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
CLASSES = 3


def config_of(
    recipe: dict[str, Any] | None = None, group: int = 4, dropout: float = 0.0, **changes: Any
) -> TrainConfig:
    plain: dict[str, Any] = {
        "batch": 8,
        "reference_batch": 8,
        "learning_rate": 0.05,
        "steps": 100,
        "warmup_fraction": 0,
    }
    fields: dict[str, Any] = {
        "expansion": TINY,
        "model": x3d_tf.ModelOptions(dropout=dropout, bn_group=group),
        "dataset": DatasetSpec(records="unused"),
        "recipe": Recipe(**(plain | (recipe or {}))),
    }
    return TrainConfig(**(fields | changes))


def make(
    config: TrainConfig, *, task: Any = "single_label", strategy: tf.distribute.Strategy | None = None, **kwargs: Any
) -> tuple[x3d_tf.X3D, TrainStep]:
    keras.utils.set_random_seed(0)
    with precision_scope(config.execution.precision):
        model = x3d_tf.X3D(TINY, CLASSES, config.model, task=task)
    for layer in model.layers:  # a new residual block is the identity, which would hide most of the network
        if isinstance(layer, GhostBatchNorm):
            layer.gamma.assign(np.ones(layer.gamma.shape))
    return model, TrainStep(model, config, strategy or tf.distribute.get_strategy(), **kwargs)


def dataset(part: int = 8, labels: Any = None) -> tf.data.Dataset:
    """Repeats the same 24 clips in batches of the given size."""
    random = np.random.default_rng(0)
    clips = random.integers(0, 256, (24, 2, 32, 32, 3)).astype("float32")
    labels = random.integers(0, CLASSES, 24).astype("int32") if labels is None else labels
    return tf.data.Dataset.from_tensor_slices((clips, labels)).repeat().batch(part, drop_remainder=True)


def batches(part: int = 8, labels: Any = None) -> Iterator[tuple[Any, Any]]:
    return iter(dataset(part, labels))


def weights_after(config: TrainConfig, steps: int = 2, part: int = 8, at_once: int = 1) -> list[np.ndarray]:
    model, step = make(config)
    stream = batches(part)
    for _ in range(steps // at_once):
        step(stream, at_once)
    assert step.completed_steps == steps
    return model.get_weights()


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], bound: float = 1e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1, np.abs(b).max()))


def test_micro_batches_add_up(float64: None) -> None:
    """Moving statistics are not compared, because each micro-batch updates them."""
    parts = config_of(execution=Execution(accumulation=2))
    model, _ = make(parts)
    trained = [weight.trainable for weight in model.weights]
    actual = weights_after(parts, part=4)
    plain = weights_after(config_of())
    assert_close([w for w, t in zip(actual, trained) if t], [w for w, t in zip(plain, trained) if t], 1e-9)


def test_several_steps_at_once_are_several_steps() -> None:
    at_once = weights_after(config_of(execution=Execution(steps_per_execution=2)), at_once=2)
    assert_close(at_once, weights_after(config_of()), 0)


def test_losses_of_steps_at_once_come_one_by_one() -> None:
    _, single = make(config_of())
    _, double = make(config_of(execution=Execution(steps_per_execution=2)))
    stream = batches()
    expected = [single(stream, 1) for _ in range(3)]
    measured = double(batches(), 3)
    np.testing.assert_allclose(measured["loss"], [float(one["loss"][0]) for one in expected], rtol=1e-6)
    np.testing.assert_allclose(measured["accuracy"], [float(one["accuracy"][0]) for one in expected])


def test_loss_and_accuracy_are_of_the_batch() -> None:
    model, step = make(config_of())
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, accuracy = step(batches(), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(probabilities[range(8), labels])), rel=1e-4)
    assert float(accuracy[0]) == np.mean(logits.argmax(axis=1) == labels)


def test_the_multi_label_loss() -> None:
    labels = np.random.default_rng(1).integers(0, 2, (24, CLASSES)).astype("float32")
    model, step = make(config_of(), task="multi_label")
    clips, truth = (part.numpy() for part in next(batches(labels=labels)))
    logits = model(clips, training=True).numpy().astype("float64")
    probabilities = 1 / (1 + np.exp(-logits))
    likelihood = np.where(truth == 1, probabilities, 1 - probabilities)
    loss, accuracy = step(batches(labels=labels), 1).values()
    assert float(loss[0]) == pytest.approx(-np.mean(np.log(likelihood)), rel=1e-4)
    assert float(accuracy[0]) == np.mean(truth[range(8), logits.argmax(axis=1)])


def test_class_weights_weigh_the_loss() -> None:
    weights = np.array([0.5, 2.0, 0.0], np.float32)
    model, step = make(config_of(), class_weights=weights)
    clips, labels = (part.numpy() for part in next(batches()))
    logits = model(clips, training=True).numpy()
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[range(8), labels]
    assert float(step(batches(), 1)["loss"][0]) == pytest.approx(np.mean(nll * weights[labels]), rel=1e-4)


def test_balancing_gives_classes_equal_weight() -> None:
    labels = np.array([0] * 6 + [1] * 2 + [3] * 4)
    weights = balancing_weights(labels, 5)
    assert weights.tolist() == pytest.approx([12 / 18, 2.0, 0.0, 1.0, 0.0])
    assert weights[labels].mean() == pytest.approx(1)
    assert balancing_weights(np.array([0, 1, 0, 1]), 2).tolist() == [1, 1]


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


def test_the_average_follows_the_weights() -> None:
    model, step = make(config_of({"ema": 0.3}))
    average, stream = step.average, batches()
    assert average is not None
    expected = model.get_weights()
    for number in (1, 2, 3):
        step(stream, 1)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.get_weights())]
    original = model.get_weights()
    with average.swapped():
        assert_close(model.get_weights(), expected)
    assert_close(model.get_weights(), original, 0)
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert_close(model.get_weights(), original, 0)


def test_the_average_is_reset_to_the_weights() -> None:
    model, _ = make(config_of())
    average = MovingAverage(model, 0.9)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    average.reset()
    expected = model.get_weights()
    with average.swapped():
        assert_close(model.get_weights(), expected, 0)


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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_float32_variables(precision: Any) -> None:
    _, full = make(config_of())
    model, step = make(config_of(execution=Execution(precision=precision)))
    assert model.get_layer("res2").compute_dtype == precision
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model(next(batches())[0]).dtype == tf.float32
    assert keras.config.dtype_policy().name == "float32"
    stream, half_stream = batches(), batches()
    losses = [(float(full(stream, 1)["loss"][0]), float(step(half_stream, 1)["loss"][0])) for _ in range(3)]
    for expected, actual in losses:
        assert actual == pytest.approx(expected, abs=0.1)


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
import test_step
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

execution = Execution(precision={precision!r}, accumulation=2, steps_per_execution=2)
if {precision!r} == "float32":
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
config = test_step.config_of({{"ema": 0.5}}, group=2, execution=execution)
with strategy.scope():
    model, step = test_step.make(config, strategy=strategy)
step(iter(strategy.distribute_datasets_from_function(lambda context: test_step.dataset(2))), 2)
np.savez({folder!r} + "/weights", *model.get_weights())
stream = iter(strategy.distribute_datasets_from_function(lambda context: test_step.dataset(2)))
test_step.PreciseStatistics(model, strategy).refresh(stream, 2)
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
    """Two steps per call with two micro-batches, as on one device; independent dropout. float32 means float64."""
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
