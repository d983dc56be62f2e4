"""Statistics, tables and JSON files of the benchmarks, and what they ran on."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Measured, Measurement

from x3d_tf.files import atomic_write
from x3d_tf.processes import available_cpus

PACKAGES = (
    *("x3d-tf", "tensorflow", "keras", "numpy", "torch", "pytorchvideo"),
    *("onnx", "onnxruntime", "tf2onnx", "openvino", "ai-edge-litert"),
)
# Beginnings of names of environment variables that change how fast frameworks are.
VARIABLES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "TF_", "TORCH", "XLA_"),
    *("MALLOC_", "GLIBC_", "LD_PRELOAD"),
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and 10th and 90th percentile, between which lie four fifths of the values."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def ratio(own: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of values of the same rounds, so that what slows a whole round cancels."""
    return float(np.median([a / b for a, b in zip(own, others)]))


def reference_of(rows: Sequence[Measured]) -> Measured | None:
    """What speeds are given in units of: the fastest form marked so, or the first of all where none was measured."""
    ran = [row for row in rows if not row.failure and row.seconds]
    marked = [row for row in ran if row.form.reference]
    return min(marked, key=lambda row: spread(row.seconds)["median"]) if marked else next(iter(ran), None)


def figures(measurement: Measurement, flop_per_clip: float) -> dict[str, Any]:
    """All figures of a table, as JSON has them.

    Args:
        measurement: of the forms.
        flop_per_clip: floating-point operations, two for each multiply-add.
    """
    reference = reference_of(measurement.forms)
    return {
        "network": measurement.case.network,
        "batch": measurement.case.batch,
        "reference": reference.form.name if reference else None,
        "matmul_flops": spread(measurement.flops) | {"rounds": measurement.flops},
        "forms": [_figures(row, measurement.flops, reference, flop_per_clip) for row in measurement.forms],
    }


def _figures(row: Measured, flops: list[float], reference: Measured | None, flop_per_clip: float) -> dict[str, Any]:
    found: dict[str, Any] = {"name": row.form.name, "group": row.form.group, "batch": row.batch, "note": _note(row)}
    if row.failure or not row.seconds or reference is None:
        return found | {"failure": row.failure or "not measured"}
    each = [seconds / row.batch for seconds in row.seconds]
    return found | {
        "ms_per_clip": spread([1000 * seconds for seconds in each]),
        "clips_per_second": 1 / spread(each)["median"],
        "share_of_peak": ratio([flop_per_clip / seconds for seconds in each], flops),
        "speed_over_reference": ratio([seconds / reference.batch for seconds in reference.seconds], each),
        "max_difference": row.difference,
        "start_seconds": row.start,
        "seconds_of_calls": row.seconds,
    }


def _note(row: Measured) -> str:
    notes = [f"batch 1, {len(row.seconds)} calls"] if row.form.slow and row.seconds else []
    return "; ".join(notes + (["DIFFERS"] if row.differs else []))


def network_table(found: dict[str, Any], threads: int) -> list[str]:
    """The lines of a table from `figures`, in Markdown."""
    peak = found["matmul_flops"]
    compared = any(form.get("max_difference") is not None for form in found["forms"])
    header = ["form", "ms/clip", "p10 - p90", "clips/s", "of peak", "speed", *(["max diff."] if compared else []), ""]
    rows = [_cells(form, compared) for form in found["forms"]]
    return [
        f"{found['network']}, batch {found['batch']}, {threads} threads, {len(peak['rounds'])} rounds; peak "
        f"{peak['median'] / 1e9:.0f} GFLOP/s ({peak['p10'] / 1e9:.0f} - {peak['p90'] / 1e9:.0f}); "
        f"speed 1 is {found['reference']}",
        "",
        *markdown(header, rows),
    ]


def _cells(form: dict[str, Any], compared: bool) -> list[str]:
    if "failure" in form:
        return [form["name"], *["-"] * (5 + compared), form["failure"]]
    ms = form["ms_per_clip"]
    cells = [form["name"], f"{ms['median']:.1f}", f"{ms['p10']:.1f} - {ms['p90']:.1f}"]
    cells += [f"{form['clips_per_second']:.3g}", f"{form['share_of_peak']:.1%}", f"{form['speed_over_reference']:.2f}"]
    if compared:
        difference = form["max_difference"]
        cells.append("-" if difference is None else f"{difference:.1e}")
    return [*cells, form["note"]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with columns of even width, numbers to the right; the first and the last column are text."""
    last = len(header) - 1
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * max(width, 1) if column in (0, last) else "-" * (width - 1) + ":" for column, width in enumerate(widths)
    ]
    return [line(header), line(rule), *map(line, rows)]


def write_json(path: str | Path, settings: dict[str, Any], tables: list[Any]) -> None:
    """Writes the figures with all that is needed to understand them."""
    result = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "tables": tables,
    }
    atomic_write(Path(path), (json.dumps(result, indent=1) + "\n").encode())


def versions() -> dict[str, str]:
    """Of what decides the figures, without loading it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that is now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "cpu": _cpu_model(), "cpus": available_cpus(), "load_average_1_minute": load}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
