"""The benchmark of GPUs, run on the CPU: its forms of the convolution, its command and its conclusions."""

import json
import os
import runpy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import gpu
import measuring
import numpy as np
import pytest
import reporting

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# Compilers that do less: the speed of the result does not matter here.
QUICKLY = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}


def run_code(code: str) -> None:
    """Runs code in a process that finds the modules of the benchmarks."""
    environment = QUICKLY | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--threads=1", *flags]
    return subprocess.run(command, env=QUICKLY, capture_output=True, text=True)


# The loops over the positions are the independent version.
CONVOLUTIONS = """
import jax, numpy as np
from jax_networks import FORMS
draw = np.random.default_rng(0)
for size, stride in (((3, 3, 3), 2), ((5, 1, 1), 1)):
    x, kernel = draw.normal(size=(2, 3, 5, 6, 4)), draw.normal(size=(*size, 4))
    padded = np.pad(x, [(0, 0), *((side // 2, side // 2) for side in size), (0, 0)])
    upstream = draw.normal(size=(2, 3, -(-5 // stride), -(-6 // stride), 4))
    output, to_padded, to_kernel = np.zeros_like(upstream), np.zeros_like(padded), np.zeros_like(kernel)
    for frame, i, j in np.ndindex(upstream.shape[1:4]):
        row, column = i * stride, j * stride
        window = np.s_[:, frame : frame + size[0], row : row + size[1], column : column + size[2]]
        gradient = upstream[:, frame, i, j][:, None, None, None]
        output[:, frame, i, j] = (padded[window] * kernel).sum((1, 2, 3))
        to_padded[window] += kernel * gradient
        to_kernel += (padded[window] * gradient).sum(0)
    to_x = to_padded[:, size[0] // 2 :, size[1] // 2 :, size[2] // 2 :][:, :3, :5, :6]
    for name, form in FORMS.items():
        @jax.jit
        def run(x, kernel, upstream):
            found, gradients = jax.vjp(lambda x, kernel: form(x, kernel, stride), x, kernel)
            return found, *gradients(upstream)
        found = run(*(value.astype(np.float32) for value in (x, kernel, upstream)))
        for actual, expected in zip(found, (output, to_x, to_kernel), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=name)
"""

# One block per stage; an expansion in place of a network's name.
STEPS = """
import numpy as np, x3d_tf
from jax_networks import describe, predict, train
from measuring import Case
tiny = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
case = Case(tiny, 2, 1)
assert describe(case).endswith("the CPU")
expected = predict(case, "taps")()
assert expected.shape == (2, 400) and np.abs(expected.sum(axis=1) - 1).max() < 1e-5
assert 1e-6 < np.abs(predict(case, "grouped", "bfloat16")() - expected).max() < 0.2
step = train(case, "taps")
first, second = step(), step()
assert second < first and step.peak_bytes > 1e6
"""


@needs("jax")
@pytest.mark.parametrize("code", [CONVOLUTIONS, STEPS], ids=["forms and their gradients", "prediction and training"])
def test_forms_on_jax(code: str) -> None:
    run_code(code)


def test_the_forms_are_those_of_jax() -> None:
    source = (SCRIPT.parent / "jax_networks.py").read_text("utf-8")
    assert all(f'"{form}": ' in source for form in gpu.TRAINING_FORMS)


def rows_of(done: subprocess.CompletedProcess[str], path: Path) -> list[dict]:
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(path.read_text("utf-8"))["tables"]
    return table["forms"]


@needs("jax")
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    forms = ("--forms", "JAX grouped", "JAX grouped bf16")
    done = run_script("--networks", "x2d", "--modes", "forward", "--rounds=2", f"--json={path}", *forms)
    full, half = rows_of(done, path)
    assert [len(row["seconds_of_calls"]) for row in (full, half)] == [2, 2]
    assert full["max_difference"] == 0 < half["max_difference"] < 0.2
    assert "no framework sees a GPU; measuring the CPU" in done.stdout
    assert "x2d, forward, batch 1, float32: fastest form on JAX: " in done.stdout
    assert "they do not say which form is fastest on a GPU" in done.stdout


@pytest.mark.parity
@needs("torch", "pytorchvideo")
def test_torch_is_the_unit_of_speed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    flags = ("--device=cpu", "--networks", "x3d_xs", "--modes", "forward", "--rounds=1", f"--json={path}")
    rows = rows_of(run_script(*flags, "--forms", "torch channels_last_3d", "torch eager"), path)
    assert max(row["speed_over_reference"] for row in rows) == 1
    assert all(row["max_difference"] < measuring.BOUND for row in rows)


def test_rows_say_which_package_is_missing_or_that_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    (row,) = (row for row in gpu.implementations("forward") if row.name == "TensorFlow")
    with measuring.Processes(1, device="gpu") as processes, pytest.raises(measuring.JobFailed) as failed:
        processes.open(row.name, row.run, measuring.Case("x2d", 1, 1, device="gpu"))
    assert "TensorFlow sees no GPU" in str(failed.value)
    job = measuring.Job("one", "no_such_framework:describe")
    with measuring.Processes(1) as processes, pytest.raises(measuring.JobFailed, match="not installed: No module"):
        processes.run(job, measuring.Case("x2d", 1, 1))


def sleep(case: measuring.Case, seconds: float) -> object:
    time.sleep(seconds)
    return lambda: None


def sleeping(name: str, process: str, seconds: float) -> measuring.Implementation:
    """Returns a row that takes a number of seconds to compile."""
    job = measuring.Job(process, "test_gpu_benchmark:sleep", {"seconds": seconds})
    return measuring.Implementation(name, "ours", job)


def test_rows_that_exceed_the_budget_are_skipped_and_the_others_measured() -> None:
    rows = [sleeping("first", "one", 0), sleeping("slow", "two", 30), sleeping("after it", "two", 0)]
    start = time.monotonic()
    budget = measuring.Budget(start + 4, start + 5, start + 6)
    found = measuring.measure(rows, measuring.Case("x2d", 1, 1, device="gpu"), 1000, budget)
    first, slow, after = found.results
    assert time.monotonic() - start < 20  # 30 s, and 20 s of rounds, without a limit
    assert slow.failure == after.failure == measuring.OVER_BUDGET
    assert not first.failure and first.seconds and not found.flops


# In a process of its own: a signal to the process of the tests may end that.
INTERRUPTED = """
import os, signal, threading
import measuring
from test_gpu_benchmark import sleeping
rows = [sleeping("slow", "one", 30), sleeping("after it", "one", 30), sleeping("slow, too", "two", 30)]
threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    measuring.measure(rows, measuring.Case("x2d", 1, 1, device="gpu"), 1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_the_compilation_in_parallel() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(Path(__file__).parent)])}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert time.monotonic() - start < 20


def table() -> dict:
    """Returns the figures of four rows, two of them measured on JAX; the fastest takes 1 s, PyTorch 2 s."""
    job = measuring.Job("process", "module:name")
    results = [
        measuring.Result(measuring.Implementation("JAX taps", "ours", job), 1, [4.0]),
        measuring.Result(measuring.Implementation("JAX grouped", "ours", job), 1, [1.0], peak_bytes=3_000_000),
        measuring.Result(measuring.Implementation("JAX multiply-adds", "ours", job), 1, failure="why"),
        measuring.Result(measuring.Implementation("torch eager", "peers", job, reference=True), 1, [2.0]),
    ]
    measurement = measuring.Measurement(measuring.Case("x2d", 1, 1), results, [])
    return reporting.figures(measurement, 2e12) | {"mode": "forward"}


def test_conclusions_name_the_fastest_form_and_the_rows_not_considered() -> None:
    assert list(gpu.conclusions(table())) == [
        "x2d, forward, batch 1, float32: fastest form on JAX: grouped; times as long: taps 4.00",
        "x2d, forward, batch 1: JAX grouped is 2.00 times as fast as PyTorch's best mode, torch eager",
        "x2d, forward, batch 1: not measured, so not considered: JAX multiply-adds",
    ]


def test_the_table() -> None:
    title, _, _, _, *lines = gpu.network_table(table())
    assert title == "x2d, forward, batch 1, 1 rounds; speed 1 is torch eager"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert cells[1] == ["JAX grouped", "1000", "1000 - 1000", "1", "2", "3", "2.00", "-"]
    assert cells[2] == ["JAX multiply-adds", "-", "-", "-", "-", "-", "-", "-", "why"]


def test_losses_are_compared_relatively() -> None:
    assert measuring._difference(2.0, 4.0) == 0.5
    assert measuring._difference(None, 4.0) is measuring._difference(2.0, None) is None
    assert measuring._difference(np.array([[0.5, 0.5]]), np.array([[0.25, 0.75], [0, 1]])) == 0.25


def test_the_other_benchmarks_hide_all_gpus() -> None:
    assert measuring._environment(1, measuring.Case("x2d", 1, 1).device)["CUDA_VISIBLE_DEVICES"] == "-1"
    assert "CUDA_VISIBLE_DEVICES" not in measuring._environment(1, "gpu")


def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    assert "python benchmarks/gpu.py" in capsys.readouterr().out
