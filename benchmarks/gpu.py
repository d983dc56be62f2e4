"""Measures inference and training on a GPU: our networks on JAX and TensorFlow, and PyTorch's.

The rows of JAX differ in the channel-wise convolution, from which the package's kernels for GPUs are to be chosen:

  taps           one depthwise 2-D convolution per temporal tap: what the package computes on JAX, except on a CPU
  grouped        one grouped 3-D convolution, `lax.conv_general_dilated`
  multiply-adds  one shifted multiply-add per element of the kernel, compiled into one pass
  grouped, gradients of multiply-adds
                 in training, the forward pass of one and the gradients of the other

By default a GPU is measured with X3D-S and X3D-M, 8 clips per training step and 32 per forward pass. The command ends
after about --budget seconds. Each table has a share of them, most of it to compile. Rows that would not be ready in
time are skipped and say so. The processes of a GPU compile in parallel. All are measured in turns: in each round, every
row makes one warm-up call and then timed calls for at least 20 ms, each of which waits for the device. Float32 products
on a GPU are computed in TF32 by all frameworks, or in float32 with --full_float32; GPUs before NVIDIA's Ampere have no
TF32. A training step has no dropout, and all its clips share batch-norm statistics. Only TensorFlow's step copies the
batch to the GPU each time. Columns:

  ms/clip    median over the rounds of the time per clip, followed by the 10th and 90th percentile
  TFLOP/s    floating-point operations per second (two per multiply-add; a training step has three times those of a
             forward pass)
  peak MB    peak of the GPU memory: what JAX's executable needs, or what PyTorch has allocated; not for TensorFlow
  speed      speed relative to the fastest mode of PyTorch, of any precision: the median of the ratios within each round
  diff.      maximum difference of a probability from the first float32 row in the group, ours or peers; in training,
             relative difference of the first loss. Float32 rows are marked if it exceeds 1e-5 (TensorFlow, compared
             with JAX: 1e-4), or 0.02 in TF32, and the exit status is 1

If the packages of a row are missing, or its framework sees no GPU, the row says so. If no framework sees a GPU, the CPU
is measured, with smaller defaults; that says nothing about GPUs.

  python benchmarks/gpu.py
  python benchmarks/gpu.py --networks x3d_m --modes training --training_batches 8 32 --json=gpu.json
  python benchmarks/gpu.py --device=cpu --networks x3d_xs --forms 'JAX*' --rounds 3
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from command import CLASSES, parser, positive, run, select
from measuring import Budget, Case, Implementation, Job, JobFailed, Processes, measure
from reporting import figures, machine_info, markdown, write_json

import x3d_tf

PASSES = {"training": 3, "forward": 1}  # modes, with their operations relative to a forward pass
FORMS = ("taps", "grouped", "multiply-adds")  # keys of `jax_networks.FORMS`
TRAINING_FORMS = (*FORMS, "grouped, gradients of multiply-adds")
BACKEND_BOUND = 1e-4  # between float32 on JAX and on TensorFlow, as in the tests of Keras' backends
TF32_BOUND = 0.02  # in bfloat16, which has 3 bits fewer than TF32, the largest difference on a CPU is 0.017 (X3D-S)
FRAMEWORKS = {"JAX": "jax_networks", "TensorFlow": "tensorflow_networks", "PyTorch": "torch_networks"}


@dataclass(frozen=True)
class Defaults:
    """Default values of flags for a device: networks, and batch sizes by mode."""

    networks: tuple[str, ...]
    batches: dict[str, list[int]]


DEFAULTS = {
    "gpu": Defaults(("x3d_s", "x3d_m"), {"training": [8], "forward": [32]}),
    "cpu": Defaults(("x3d_xs",), {"training": [2], "forward": [1]}),
}


def jax(form: str, precision: str, mode: str) -> Implementation:
    """Returns a form of the channel-wise convolution on JAX, a key of `jax_networks.FORMS`."""
    # A process for each form, because compilation takes most of the time. Its precisions share GPU memory.
    job = Job(f"JAX {form}", f"jax_networks:{_function(mode)}", {"form": form, "precision": precision})
    return Implementation(f"JAX {form}{_suffix(precision)}", "ours", job, exact=precision == "float32")


def tensorflow(precision: str, mode: str) -> Implementation:
    """Returns our network in TensorFlow, with the package's kernels for the device."""
    settings: dict[str, Any] = {"precision": precision}
    settings |= {"name": "trainable"} if mode == "forward" else {"comparable": True}
    job = Job("TensorFlow", f"tensorflow_networks:{_function(mode)}", settings)
    exact = precision == "float32"
    return Implementation(f"TensorFlow{_suffix(precision)}", "ours", job, exact=exact, bound=BACKEND_BOUND)


def torch(name: str, precision: str, mode: str, **settings: object) -> Implementation:
    """Returns a mode of PyTorch."""
    process = "PyTorch CUDA graphs" if settings.get("cuda_graphs") else f"PyTorch {precision}"
    job = Job(process, f"torch_networks:{_function(mode)}", {"precision": precision, **settings})
    exact = precision == "float32"
    return Implementation(f"torch {name}{_suffix(precision)}", "peers", job, exact=exact, reference=True)


def _function(mode: str) -> str:
    return "predict" if mode == "forward" else "train"


def _suffix(precision: str) -> str:
    return " bf16" if precision == "bfloat16" else ""


def implementations(mode: str) -> tuple[Implementation, ...]:
    """Returns the rows of a mode. In each process, those that matter most come first, because others may be skipped."""
    rows: list[Implementation] = []
    for precision in ("float32", "bfloat16"):
        rows += [jax(form, precision, mode) for form in (FORMS if mode == "forward" else TRAINING_FORMS)]
        rows.append(tensorflow(precision, mode))
    channels_last = {"layout": "channels_last_3d"}
    for precision in ("float32", "bfloat16"):
        rows += [
            torch("channels_last_3d", precision, mode, **channels_last),
            torch("compile channels_last_3d", precision, mode, **channels_last, compiled=True),
            torch("eager", precision, mode),
            torch("compile", precision, mode, compiled=True),
        ]
    graphs = {"compiled": True, "cuda_graphs": True}
    return (*rows, torch("CUDA graphs channels_last_3d", "bfloat16", mode, **channels_last, **graphs))


def all_implementations() -> list[Implementation]:
    """Returns the rows of all modes, one for each name."""
    return list({row.name: row for mode in PASSES for row in implementations(mode)}.values())


def main() -> None:
    """Measures, prints the tables and the conclusions, and writes the JSON file."""
    start = time.monotonic()
    settings = flags()
    device, machine = find_device(settings, start + settings.budget)
    print("\n".join(machine), end="\n\n", flush=True)
    plan, tables = cases(settings, device), []
    for number, (mode, case) in enumerate(plan):
        weights = [PASSES[other] for other, _ in plan[number:]]
        left = max(start + settings.budget - time.monotonic(), 0)
        budget = Budget.starting_now(left * weights[0] / sum(weights))
        table = measure_table(mode, case, settings, budget)
        tables.append(table | {"devices": machine})
        print("\n".join([*network_table(table), "", *table["conclusions"]]), end="\n\n", flush=True)
        write_json(settings.json, vars(settings), tables)
    if device == "cpu":
        print("these are figures of the CPU: they do not say which form is fastest on a GPU")
    print(f"written to {settings.json}; {time.monotonic() - start:.0f} s")
    differing = sorted({row["name"] for table in tables for row in table["forms"] if "DIFFERS" in row["note"]})
    if differing:
        sys.exit(f"error: outputs differ from the first float32 row of the group: {', '.join(differing)}")


def flags() -> argparse.Namespace:
    """Returns the parsed flags."""
    arguments = parser(__doc__, all_implementations(), networks=[], batches=[], rounds=20, json="gpu.json")
    help_device = "device to measure; defaults to a GPU, or the CPU if no framework sees one"
    arguments.add_argument("--device", choices=["auto", "gpu", "cpu"], default="auto", help=help_device)
    arguments.add_argument("--modes", nargs="+", choices=list(PASSES), default=list(PASSES), help="default: both")
    arguments.add_argument(
        "--training_batches", nargs="+", type=positive, metavar="N", help="batch sizes of the training step"
    )
    arguments.add_argument("--budget", type=positive, default=540, help="seconds for everything; default: 540")
    help_precision = "compute float32 products in float32, not in TF32, and compare outputs with the bound of float32"
    arguments.add_argument("--full_float32", action="store_true", help=help_precision)
    return arguments.parse_args()


def cases(settings: argparse.Namespace, device: str) -> list[tuple[str, Case]]:
    """Returns the tables to measure on a device: a mode and the computation of each."""
    defaults, case = DEFAULTS[device], base_case(settings, device)
    batches = {"training": settings.training_batches, "forward": settings.batches}
    return [
        (mode, replace(case, network=network, batch=batch))
        for network in settings.networks or defaults.networks
        for mode in settings.modes
        if selected(mode, case, settings)
        for batch in batches[mode] or defaults.batches[mode]
    ]


def base_case(settings: argparse.Namespace, device: str) -> Case:
    """Returns a case without a network."""
    tf32 = device == "gpu" and not settings.full_float32
    return Case("", 0, settings.threads, verbose=settings.verbose, device=device, tf32=tf32)


def find_device(settings: argparse.Namespace, deadline: float) -> tuple[str, list[str]]:
    """Returns the device to measure, "gpu" or "cpu", and lines that describe it, one for each framework selected.

    Raises:
        SystemExit: --device=gpu, and no framework sees a GPU.
    """
    modules = {row.run.function.partition(":")[0] for row in select(all_implementations(), settings.forms)}
    frameworks = {name: module for name, module in FRAMEWORKS.items() if module in modules}
    if settings.device != "cpu":
        found, missing = describe(frameworks, base_case(settings, "gpu"), deadline)
        if found:
            return "gpu", [*driver(), *found, *missing]
        if settings.device == "gpu":
            sys.exit(f"error: --device=gpu needs a framework that sees a GPU; {'; '.join(missing)}")
        print("no framework sees a GPU; measuring the CPU")
    found, missing = describe(frameworks, base_case(settings, "cpu"), deadline)
    return "cpu", [*found, *missing]


def describe(frameworks: dict[str, str], case: Case, deadline: float) -> tuple[list[str], list[str]]:
    """Returns descriptions of the device by the frameworks that see it, and the reasons why others do not."""
    found, missing = [], []
    with Processes(case.threads, case.verbose, case.device) as processes:
        for framework, module in frameworks.items():
            try:
                found.append(processes.run(Job(framework, f"{module}:describe"), case, deadline=deadline))
            except JobFailed as error:
                missing.append(f"{framework}: {error}")
    return found, missing


def driver() -> list[str]:
    """Returns the name, memory and driver of NVIDIA's GPUs as nvidia-smi states them; empty without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return [f"nvidia-smi: {line}" for line in done.stdout.splitlines()] if done.returncode == 0 else []


def selected(mode: str, case: Case, settings: argparse.Namespace) -> list[Implementation]:
    """Returns the rows of a mode that the flags select and the device can run."""
    names = {row.name for row in select(all_implementations(), settings.forms)}
    rows = [row for row in implementations(mode) if row.name in names]
    if case.device == "cpu":
        rows = [row for row in rows if "cuda_graphs" not in row.run.settings]
    return [replace(row, bound=TF32_BOUND) for row in rows] if case.tf32 else rows


def measure_table(mode: str, case: Case, settings: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Returns the figures of a network, a batch size and a mode, with the conclusions."""
    before = machine_info()
    measurement = measure(selected(mode, case, settings), case, settings.rounds, budget)
    macs = x3d_tf.cost(case.network, num_classes=CLASSES).macs
    table = figures(measurement, 2 * macs * PASSES[mode]) | {"mode": mode, "machine_before": before}
    return table | {"conclusions": [*conclusions(table)]}


def conclusions(table: dict[str, Any]) -> Iterable[str]:
    """Yields sentences about the fastest form on JAX for each precision, and the fastest rows of JAX and PyTorch."""
    rows = [row for row in table["forms"] if "ms_per_clip" in row]
    title = f"{table['network']}, {table['mode']}, batch {table['batch']}"
    for precision in ("float32", "bfloat16"):
        suffix = _suffix(precision)
        forms = {f"JAX {form}{suffix}": form for form in TRAINING_FORMS}
        ours = [row for row in rows if row["name"] in forms]
        if ours:
            best = fastest(ours)
            others = "; ".join(f"{forms[row['name']]} {_ratio(row, best):.2f}" for row in ours if row is not best)
            yield f"{title}, {precision}: fastest form on JAX: {forms[best['name']]}; times as long: {others or '-'}"
    ours, peers = ([row for row in rows if row["group"] == group] for group in ("ours", "peers"))
    if ours and peers:
        one, other = fastest(ours), fastest(peers)
        speed = _ratio(other, one)
        yield f"{title}: {one['name']} is {speed:.2f} times as fast as PyTorch's best mode, {other['name']}"
    skipped = [row["name"] for row in table["forms"] if "failure" in row]
    if skipped:
        yield f"{title}: not measured, so not considered: {', '.join(skipped)}"


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row with the shortest median time per clip."""
    return min(rows, key=lambda row: row["ms_per_clip"]["median"])


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    """Returns the time of a row relative to that of another: the ratio of the speeds relative to the reference."""
    return other["speed_over_reference"] / row["speed_over_reference"]


def network_table(table: dict[str, Any]) -> list[str]:
    """Returns the lines of a Markdown table with the values of `measure_table`."""
    rounds = max((len(row.get("seconds_of_calls", [])) for row in table["forms"]), default=0)
    header = ["implementation", "ms/clip", "p10 - p90", "clips/s", "TFLOP/s", "peak MB", "speed", "diff.", ""]
    title = f"{table['network']}, {table['mode']}, batch {table['batch']}"
    return [
        f"{title}, {rounds} rounds; speed 1 is {table['reference']}",
        "",
        *markdown(header, [_cells(row) for row in table["forms"]]),
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        return [row["name"], *["-"] * 7, row["failure"]]
    ms, peak, difference = row["ms_per_clip"], row["peak_bytes"], row["max_difference"]
    digits = max(0, 2 - math.floor(math.log10(ms["median"])))
    return [
        row["name"],
        f"{ms['median']:.{digits}f}",
        f"{ms['p10']:.{digits}f} - {ms['p90']:.{digits}f}",
        f"{row['clips_per_second']:.3g}",
        f"{row['flops'] / 1e12:.3g}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        f"{row['speed_over_reference']:.2f}",
        "-" if difference is None else f"{difference:.1e}",
        row["note"],
    ]


if __name__ == "__main__":
    run(main)
