"""Measures the peak memory of a training step, ours and PyTorch's.

Each implementation takes three steps in a new process. Columns:

  peak MB    peak memory of the process, including the framework
  model MB   increase of the peak over the memory used just before the network was built
  per clip   model MB divided by the batch size

Memory is the resident set size (VmHWM). On systems that cannot reset its peak before the network is built, both columns
give the peak since the start of the process.

  python benchmarks/memory.py
  python benchmarks/memory.py --networks x3d_s x3d_m --batches 1 8 --json=memory.json
  python benchmarks/memory.py --forms ours 'torch channels_last_3d'
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command import parser, run, select
from measuring import Case, Implementation, Job, JobFailed, Processes, function_of, log
from reporting import markdown, write_json
from train_step import ours, torch

STEPS = 3
# To add an implementation, add a line here.
IMPLEMENTATIONS = (
    ours("ours"),
    ours("ours, recomputing activations", recompute="activations"),
    ours("ours, recomputing blocks", recompute="blocks"),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    arguments = parser(__doc__, IMPLEMENTATIONS, networks=["x3d_s"], batches=[8], rounds=1, json="memory.json")
    settings = arguments.parse_args()
    implementations, tables = select(IMPLEMENTATIONS, settings.forms), []
    for network in settings.networks:
        for batch in settings.batches:
            case = Case(network, batch, settings.threads, verbose=settings.verbose)
            rows = [measure(implementation, case, settings.rounds) for implementation in implementations]
            print(f"{case}, {settings.threads} threads\n")
            print("\n".join(table(rows, batch)), end="\n\n", flush=True)
            tables.append({"network": network, "batch": batch, "forms": rows})
            write_json(settings.json, vars(settings), tables)
    print(f"written to {settings.json}")


def measure(implementation: Implementation, case: Case, rounds: int) -> dict[str, Any]:
    """Returns the memory of an implementation, the maximum over rounds in new processes, or the failure."""
    run = implementation.run
    job = Job(run.process, "memory:measure_peak", {"function": run.function, "settings": dict(run.settings)})
    row: dict[str, Any] = {"name": implementation.name}
    try:
        for _ in range(rounds):
            with Processes(case.threads, case.verbose) as processes:
                peaks = processes.run(job, case)
            row |= {key: max(value, row.get(key, 0)) for key, value in peaks.items()}
    except JobFailed as error:
        row["failure"] = str(error)
    log(f"{case}: {implementation.name} {'failed' if 'failure' in row else 'measured'}")
    return row


def measure_peak(case: Case, function: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """Creates a training step and runs it `STEPS` times in this process.

    Returns:
        `process`, the peak memory of the process in bytes, and `model`, the increase of the peak over the memory used
        before the network was built.
    """
    make = function_of(function)  # imports the framework
    before, earlier_peak = resident_bytes(), peak_bytes()
    was_reset = reset_peak()
    call = make(case, **settings)
    for _ in range(STEPS):
        call()
    peak = peak_bytes()
    return {"process": max(peak, earlier_peak), "model": peak - before if was_reset else peak}


def reset_peak() -> bool:
    """Resets the peak that `peak_bytes` reports; returns False if the system does not support this."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Returns the peak memory of this process in bytes."""
    status = _status()
    if "VmHWM" in status:
        return status["VmHWM"]
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Returns the memory of this process in bytes; 0 if the system does not report it."""
    return _status().get("VmRSS", 0)


def _status() -> dict[str, int]:
    """Returns the memory figures of this process on Linux, in bytes."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = [line.split(":", 1) for line in lines if line.endswith(" kB")]
    return {name: int(value.removesuffix(" kB")) * 1024 for name, value in pairs}


def table(rows: list[dict[str, Any]], batch: int) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append([row["name"], "-", "-", "-", row["failure"]])
        else:
            cells = [row["process"], row["model"], row["model"] / batch]
            lines.append([row["name"], *(f"{cell / 1e6:.0f}" for cell in cells), ""])
    return markdown(["implementation", "peak MB", "model MB", "per clip", ""], lines)


if __name__ == "__main__":
    run(main)
