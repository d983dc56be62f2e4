"""Statistics, tables, JSON files and machine information of the benchmarks."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Measurement, Result

from x3d_tf.files import atomic_write
from x3d_tf.processes import available_cpus

PACKAGES = (
    *("x3d-tf", "tensorflow", "keras", "numpy", "torch", "triton", "pytorchvideo"),
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("onnx", "onnxruntime", "openvino", "ai-edge-litert"),
)
# Prefixes of environment variables that affect the speed of frameworks.
VARIABLES = (
    *(
        "OMP_",
        "GOMP_",
        "KMP_",
        "MKL_",
        "OPENBLAS_",
        "ONEDNN_",
        "DNNL_",
        "TF_",
        "TORCH",
        "XLA_",
        "JAX_",
        "CUDA_",
        "NVIDIA_",
    ),
    *("MALLOC_", "GLIBC_", "LD_PRELOAD"),
)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the 10th and the 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def median_ratio(own: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the ratios within each round, so that changes in machine load cancel out."""
    return float(np.median([a / b for a, b in zip(own, others)]))


def find_reference(rows: Sequence[Result]) -> Result | None:
    """Returns the unit of speed: the fastest implementation marked as reference, or else the first one measured."""
    ran = [row for row in rows if not row.failure and row.seconds]
    marked = [row for row in ran if row.implementation.reference]
    return min(marked, key=lambda row: percentiles(row.seconds)["median"]) if marked else next(iter(ran), None)


def figures(measurement: Measurement, flop_per_clip: float) -> dict[str, Any]:
    """Returns all figures of a table for the JSON file.

    Args:
        measurement: measurements of the implementations.
        flop_per_clip: floating-point operations per clip, two per multiply-add.
    """
    reference, flops = find_reference(measurement.results), measurement.flops
    return {
        "network": measurement.case.network,
        "batch": measurement.case.batch,
        "reference": reference.implementation.name if reference else None,
        **({"matmul_flops": percentiles(flops) | {"rounds": flops}} if flops else {}),
        "forms": [_figures(row, flops, reference, flop_per_clip) for row in measurement.results],
    }


def _figures(row: Result, flops: list[float], reference: Result | None, flop_per_clip: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "name": row.implementation.name,
        "group": row.implementation.group,
        "batch": row.batch,
        "note": _note(row),
    }
    if row.failure or not row.seconds or reference is None:
        return figures | {"failure": row.failure or "not measured"}
    seconds_per_clip = [seconds / row.batch for seconds in row.seconds]
    return figures | {
        "ms_per_clip": percentiles([1000 * seconds for seconds in seconds_per_clip]),
        "clips_per_second": 1 / percentiles(seconds_per_clip)["median"],
        "flops": flop_per_clip / percentiles(seconds_per_clip)["median"],
        **(
            {"share_of_peak": median_ratio([flop_per_clip / seconds for seconds in seconds_per_clip], flops)}
            if flops
            else {}
        ),
        "speed_over_reference": median_ratio(
            [seconds / reference.batch for seconds in reference.seconds], seconds_per_clip
        ),
        "max_difference": row.difference,
        "peak_bytes": row.peak_bytes,
        "start_seconds": row.start,
        "seconds_of_calls": row.seconds,
    }


def _note(row: Result) -> str:
    notes = [f"batch 1, {len(row.seconds)} calls"] if row.implementation.slow and row.seconds else []
    return "; ".join(notes + (["DIFFERS"] if row.differs else []))


def network_table(figures: dict[str, Any], threads: int) -> list[str]:
    """Returns the lines of a Markdown table with the values of the function `figures`."""
    peak = figures["matmul_flops"]
    compared = any(row.get("max_difference") is not None for row in figures["forms"])
    header = [
        "implementation",
        "ms/clip",
        "p10 - p90",
        "clips/s",
        "of peak",
        "speed",
        *(["max diff."] if compared else []),
        "",
    ]
    rows = [_cells(row, compared) for row in figures["forms"]]
    return [
        f"{figures['network']}, batch {figures['batch']}, {threads} threads, {len(peak['rounds'])} rounds; peak "
        f"{peak['median'] / 1e9:.0f} GFLOP/s ({peak['p10'] / 1e9:.0f} - {peak['p90'] / 1e9:.0f}); "
        f"speed 1 is {figures['reference']}",
        "",
        *markdown(header, rows),
    ]


def _cells(row: dict[str, Any], compared: bool) -> list[str]:
    if "failure" in row:
        return [row["name"], *["-"] * (5 + compared), row["failure"]]
    ms = row["ms_per_clip"]
    cells = [row["name"], f"{ms['median']:.1f}", f"{ms['p10']:.1f} - {ms['p90']:.1f}"]
    cells += [f"{row['clips_per_second']:.3g}", f"{row['share_of_peak']:.1%}", f"{row['speed_over_reference']:.2f}"]
    if compared:
        difference = row["max_difference"]
        cells.append("-" if difference is None else f"{difference:.1e}")
    return [*cells, row["note"]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table with aligned columns. The first and last column are text, the others numbers."""
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
    """Writes the figures with the settings, versions, machine and environment."""
    result = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": versions(),
        "machine": machine_info(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "tables": tables,
    }
    atomic_write(Path(path), (json.dumps(result, indent=1) + "\n").encode())


def versions() -> dict[str, str]:
    """Returns the versions of Python and the installed packages, without importing them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine_info() -> dict[str, Any]:
    """Returns a description of the machine and its current load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "cpu": _cpu_model(), "cpus": available_cpus(), "load_average_1_minute": load}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
