"""Recomputation and clips in parallel do not change a step: weights, statistics, seeds and loss are equal.

Bit-identical in eager mode; in a graph, TensorFlow reorders operations.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from training_steps import TINY, config_of, dataset, make

import x3d_tf
from x3d_tf.config import Execution
from x3d_tf.training import forward
from x3d_tf.training.forward import _blocks

ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]


def state_after(
    recompute: Any,
    *,
    recipe: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    strategy: tf.distribute.Strategy | None = None,
    expansion: x3d_tf.Expansion = TINY,
    times: int = 2,
    **execution: Any,
) -> dict[str, np.ndarray]:
    """Returns the complete state after some steps: variables of the network and the step, and the losses."""
    dropping = {"dropout": 0.5, "drop_connect": 0.2, "bn_group": 4} | (options or {})
    config = config_of(
        {"ema": 0.5} | (recipe or {}),
        expansion=expansion,
        init="somewhere",  # frozen layers require initial weights
        model=x3d_tf.ModelOptions(**dropping),
        execution=Execution(recompute=recompute, **execution),
    )
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model, step = make(config, strategy=strategy)
    part = config.recipe.batch // config.execution.accumulation // strategy.num_replicas_in_sync
    stream = iter(strategy.distribute_datasets_from_function(lambda context: dataset(part)))
    at_once = config.execution.steps_per_execution
    state = {f"losses {n}": step(stream, at_once)["loss"].numpy() for n in range(times)}
    for role, variables in {"network": model.variables, **step.variables}.items():
        state |= {f"{role} {n}": variable.numpy() for n, variable in enumerate(variables)}
    return state


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = bound if value.dtype.kind == "f" else 0  # seeds and counts are equal
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recipe": {"backbone_lr_factor": 0.0}},
        {"recipe": {"batch_norm": "frozen"}},
        {"options": {"separable": False, "input": "difference", "se": "none"}},
        {"options": {"family": "efficientnet3d"}, "expansion": replace(TINY, gamma_w=0.2, gamma_b=2, gamma_d=0.4)},
    ],
    ids=str,
)
def test_the_same_steps(eager: None, float64: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """With recomputation, and with clips in parallel."""
    times = 1 if settings else 2  # one case with two steps suffices
    expected = state_after("nothing", times=times, **settings)
    for recompute in ("activations", "blocks"):
        assert_same(state_after(recompute, times=times, **settings), expected)
    monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: 2)
    assert_same(state_after("nothing", times=times, **settings), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"precision": "float16", "accumulation": 2}], ids=str)
def test_the_same_steps_in_half_precision(eager: None, settings: dict[str, Any]) -> None:
    expected = state_after("nothing", times=1, **settings)
    for recompute in ("activations", "blocks"):
        assert_same(state_after(recompute, times=1, **settings), expected)


@pytest.mark.slow
def test_the_same_steps_in_a_graph(uncompiled: None, float64: None) -> None:
    settings: dict[str, Any] = {"accumulation": 2, "steps_per_execution": 2}
    expected = state_after("nothing", **settings)
    for recompute in ("activations", "blocks"):
        assert_same(state_after(recompute, **settings), expected, 1e-10)


@pytest.mark.parametrize(("group", "parts"), [(4, 8), (16, 2), (2, 2)])
def test_clips_in_parallel_are_the_batch(
    eager: None, float64: None, monkeypatch: pytest.MonkeyPatch, group: int, parts: int
) -> None:
    """Slices smaller than the batch-norm groups, and larger ones."""
    settings: dict[str, Any] = {"options": {"bn_group": group}, "times": 1}
    expected = state_after("nothing", **settings)
    monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: parts)
    assert_same(state_after("nothing", **settings), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}], ids=str)
def test_clips_in_parallel_in_a_graph_with_cpu_kernels(
    float64: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    x3d_tf.set_kernels("cpu")
    try:
        monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: 1)
        expected = state_after("nothing", **settings)
        monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: 2)
        assert_same(state_after("nothing", **settings), expected, 1e-10)
    finally:
        x3d_tf.set_kernels("auto")


def test_clips_in_parallel_with_recomputation(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: 2)
    expected = state_after("nothing", times=1)
    for recompute in ("activations", "blocks"):
        assert_same(state_after(recompute, times=1), expected)


def test_every_block_is_found() -> None:
    names = {block.name: block.end for block in _blocks(x3d_tf.build_x3d("x3d_s", 2))}
    assert list(names)[:4] == ["res2_0", "res2_1", "res2_2", "res3_0"] and len(names) == 3 + 5 + 11 + 7
    assert names["res2_1"] == "res2_1" and names["res2_2"] == "res2"


TWO_DEVICES = """
import sys
sys.path[:0] = {tests!r}
import keras, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import test_forward as test, x3d_tf
x3d_tf.set_kernels("gpu")
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
states = [
    test.state_after(recompute, strategy=strategy, accumulation=2, options={{"bn_group": 2}})
    for recompute in ("nothing", {recompute!r})
]
test.assert_same(*states, 1e-10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["activations", "blocks"])
def test_two_devices_take_the_same_steps(recompute: str) -> None:
    run(TWO_DEVICES.format(tests=TESTS, recompute=recompute))


PEAK = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
import numpy as np, tensorflow as tf
from training_steps import config_of
from x3d_tf import build_x3d
from x3d_tf.config import Execution
from x3d_tf.losses import SoftmaxLoss
from x3d_tf.training.step import TrainStep
model = build_x3d("x3d_xs")
config = config_of(execution=Execution(recompute={recompute!r}))
step = TrainStep(model, config, tf.distribute.get_strategy(), SoftmaxLoss(8))
clips = np.zeros((8, 4, 160, 160, 3), np.float32)
stream = iter(tf.data.Dataset.from_tensors((clips, np.zeros(8, np.int32))).repeat())
def peak():  # not getrusage, whose peak includes the parent process
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
for _ in range(2):
    step(stream, 1)
print("peak", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="a process's peak is read where Linux says it")
@pytest.mark.parametrize("recompute", ["activations", "blocks"])
def test_the_compiled_step_takes_less_memory(recompute: str) -> None:
    """TensorFlow must not merge the two runs of the same operations, which would save no memory."""
    stored, recomputed = (
        int(run(PEAK.format(tests=TESTS, recompute=mode)).split("peak")[1]) for mode in ("nothing", recompute)
    )
    assert recomputed < 0.9 * stored  # measured: 0.80; merged runs need as much memory as stored activations


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
