"""How much memory does a training step take, ours and PyTorch's?

Each figure is of a fresh process that takes three steps. Columns:

  peak MB    most memory that the whole process ever held, framework included
  model MB   the same, less what it held just before the network was built
  per clip   of that, a clip's part

Memory is what the system counts as resident (VmHWM). Where the system cannot start the count anew, before the network
is built, both columns count from the start of the process.

  python benchmarks/memory.py
  python benchmarks/memory.py --networks x3d_s x3d_m --batches 1 8 --json=memory.json
  python benchmarks/memory.py --forms ours 'torch channels_last_3d'
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command import chosen, parser, run
from measuring import Case, Failed, Form, Processes, Work, function_of, say
from reporting import markdown, write_json
from train_step import ours, torch

STEPS = 3
# A further form is a line here.
FORMS = (
    ours("ours"),
    ours("ours, recomputing activations", recompute="activations"),
    ours("ours, recomputing blocks", recompute="blocks"),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    settings = parser(__doc__, FORMS, networks=["x3d_s"], batches=[8], rounds=1, json="memory.json").parse_args()
    forms, tables = chosen(FORMS, settings.forms), []
    for network in settings.networks:
        for batch in settings.batches:
            case = Case(network, batch, settings.threads, verbose=settings.verbose)
            rows = [measure(form, case, settings.rounds) for form in forms]
            print(f"{case}, {settings.threads} threads\n")
            print("\n".join(table(rows, batch)), end="\n\n", flush=True)
            tables.append({"network": network, "batch": batch, "forms": rows})
            write_json(settings.json, vars(settings), tables)
    print(f"written to {settings.json}")


def measure(form: Form, case: Case, rounds: int) -> dict[str, Any]:
    """The memory of a form, the largest of the rounds, each in a fresh process, or why there is none."""
    work = Work(form.run.process, "memory:peak", {"function": form.run.function, "settings": dict(form.run.settings)})
    row: dict[str, Any] = {"name": form.name}
    try:
        for _ in range(rounds):
            with Processes(case.threads, case.verbose) as processes:
                found = processes.do(work, case)
            row |= {key: max(value, row.get(key, 0)) for key, value in found.items()}
    except Failed as error:
        row["failure"] = str(error)
    say(f"{case}: {form.name} {'failed' if 'failure' in row else 'measured'}")
    return row


def peak(case: Case, function: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """Makes a training step and takes it `STEPS` times, in this process.

    Returns:
        `process`, the most bytes that it ever held, and `model`, the most since the network was built, less what it
        held before.
    """
    make = function_of(function)  # which loads the framework
    before, earlier = resident(), highest()
    restarted = restart_count()
    call = make(case, **settings)
    for _ in range(STEPS):
        call()
    most = highest()
    return {"process": max(most, earlier), "model": most - before if restarted else most}


def restart_count() -> bool:
    """Makes `highest` count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def highest() -> int:
    """The most bytes that this process has held."""
    status = _status()
    if "VmHWM" in status:
        return status["VmHWM"]
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """The bytes that this process holds; 0 where the system does not tell."""
    return _status().get("VmRSS", 0)


def _status() -> dict[str, int]:
    """Linux's figures of this process, in bytes."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = [line.split(":", 1) for line in lines if line.endswith(" kB")]
    return {name: int(value.removesuffix(" kB")) * 1024 for name, value in pairs}


def table(rows: list[dict[str, Any]], batch: int) -> list[str]:
    """The lines of a table, in Markdown."""
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append([row["name"], "-", "-", "-", row["failure"]])
        else:
            cells = [row["process"], row["model"], row["model"] / batch]
            lines.append([row["name"], *(f"{cell / 1e6:.0f}" for cell in cells), ""])
    return markdown(["form", "peak MB", "model MB", "per clip", ""], lines)


if __name__ == "__main__":
    run(main)
