"""Comparison table of several reports, with the paper's results for the same networks. Imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.metrics import wilson_interval
from x3d_tf.evaluation.paper import PublishedAccuracy, PublishedPrecision, differences, published_for
from x3d_tf.evaluation.reports import RESULTS_NAME, Report, read_report, refuse_to_replace, sample_of, write_csv
from x3d_tf.files import atomic_write
from x3d_tf.text import counted

_PAPERS_TOP1, _PAPERS_MAP = "paper's top-1", "paper's mAP"
_COUNTS, _COSTS = ("videos", "key frames"), ("GMACs a video", "GMACs a key frame")
_NUMERIC = (*_COUNTS, "top-1", "top-5", "mAP", *_COSTS, "M parameters", _PAPERS_TOP1, _PAPERS_MAP)
_EMPTY = "-"
FEW_VIDEOS = 400  # with fewer, the confidence interval of a top-1 of 50 % is 10 points wide or more


def find_reports(paths: Sequence[str]) -> list[Report]:
    """Reads the reports of runs.

    Args:
        paths: run folders, whose reports are all read, or folders of single reports.

    Raises:
        UserError: a path has no report, or a report is damaged.
    """
    reports: list[Report] = []
    for path in map(Path, paths):
        inside = sorted((path / "evaluation").glob(f"*/{RESULTS_NAME}"))
        files = [path / RESULTS_NAME] if (path / RESULTS_NAME).is_file() else inside
        if not files:
            raise UserError(f"{path} has no report; create one with: python -m x3d_tf.evaluate --run={path}")
        reports += [read_report(file.parent) for file in files]
    return reports


def table(reports: Sequence[Report]) -> list[dict[str, str]]:
    """Returns one row per report, as a dict from column to text. Columns that are empty in all rows are omitted.

    Metrics are in percent. "GMACs a video" is the cost of a clip times the number of clips per video. "paper" states
    whether the measured result is comparable to the paper's.
    """
    rows = [_row(report) for report in reports]
    used = [column for column in rows[0] if any(row[column] != _EMPTY for row in rows)] if rows else []
    return [{column: row[column] for column in used} for row in rows]


def _row(report: Report) -> dict[str, str]:
    r = report.results
    sample = sample_of(r)
    noun = sample.replace("_", " ")
    views = round(r[f"gmacs_per_{sample}"] / r["gmacs_per_clip"]) if r["gmacs_per_clip"] else 0
    counts = dict.fromkeys(_COUNTS, _EMPTY) | {f"{noun}s": str(r[f"{sample}s"])}
    costs = dict.fromkeys(_COSTS, _EMPTY) | {f"GMACs a {noun}": f"{r['gmacs_per_clip']:.4g} x {views}"}
    published = published_for(r)
    return {
        "report": str(report.folder),
        "network": r["network"],
        "records": r["records"],
        "split": r["split"],
        **counts,
        "views": r["views"],
        "top-1": _percent(r, "top1"),
        "top-5": _percent(r, "top5") if r["classes"] > 5 else _EMPTY,  # always 100 % with five classes
        "mAP": _percent(r, "map"),
        **costs,
        "M parameters": f"{r['params'] / 1e6:.3f}" if "params" in r else _EMPTY,
        _PAPERS_TOP1: f"{published.top1:.4g}" if isinstance(published, PublishedAccuracy) else _EMPTY,
        _PAPERS_MAP: f"{published.map:.4g}" if isinstance(published, PublishedPrecision) else _EMPTY,
        "paper": _verdict(r) if published else _EMPTY,
    }


def _verdict(results: Mapping[str, Any]) -> str:
    published = published_for(results)
    if published is None:
        return _EMPTY
    differing = differences(results, published)
    source = _source(published)
    return f"not comparable: {', '.join(differing)} ({source})" if differing else f"comparable ({source})"


def _source(published: PublishedAccuracy | PublishedPrecision) -> str:
    if isinstance(published, PublishedPrecision):
        weights = f"pre-trained on {published.pretrained}"
        return f"Table 8, AVA v{published.version}, {weights}, {published.gmacs} GMACs per clip"
    return f"{published.source}, {published.views}"


def describe(report: Report) -> str:
    """Returns a summary of a report for the terminal.

    The first line states the metrics and the evaluation settings. If there are fewer than `FEW_VIDEOS` videos, a second
    line gives the confidence interval of top-1. If the records are those of the paper's dataset, a last line gives the
    paper's result.
    """
    r, row = report.results, _row(report)
    metrics = [f"{name} {row[name]} %" for name in ("top-1", "top-5", "mAP") if row[name] != _EMPTY]
    sample = sample_of(r)
    noun, count = sample.replace("_", " "), r[f"{sample}s"]
    line = (
        f"{r['network']} on {r['records']}, split {r['split']}: {', '.join(metrics)} ({counted(count, noun)}, "
        f"{counted(r['classes'], 'class')}, {r['views']}, {row[f'GMACs a {noun}']} GMACs per {noun}, "
        f"{row['M parameters']} M parameters)"
    )
    if "top1" in r and count < FEW_VIDEOS:
        low, high = wilson_interval(r["top1"], count)
        line += f"\n95 % confidence interval of top-1 on so few videos: {100 * low:.0f} % to {100 * high:.0f} %"
    if (published := published_for(r)) is None or "other data" in differences(r, published):
        return line
    if row[_PAPERS_MAP] != _EMPTY:
        return f"{line}\nmAP in the paper on AVA: {row[_PAPERS_MAP]} %, {row['paper']}"
    return f"{line}\ntop-1 in the paper on Kinetics-400: {row[_PAPERS_TOP1]} %, {row['paper']}"


def _percent(results: Mapping[str, Any], name: str) -> str:
    return f"{100 * results[name]:.1f}" if name in results else _EMPTY


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats the table in aligned columns for a terminal."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [name in _NUMERIC for name in lines[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(line, widths, numeric)
        ).rstrip()
        for line in lines
    )


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats the table as Markdown."""
    ruler = ["---:" if name in _NUMERIC else "---" for name in rows[0]]
    lines = [list(rows[0]), ruler, *([cell.replace("|", "\\|") for cell in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compare(paths: Sequence[str], *, output: str | None = None, overwrite: bool = False) -> list[dict[str, str]]:
    """Prints a table of the reports of several runs.

    Args:
        paths: run folders, or folders of single reports.
        output: folder for comparison.csv and comparison.md, created if it does not exist. Without it, no files are
            written.
        overwrite: whether to replace existing tables.

    Returns:
        The rows of `table`.

    Raises:
        UserError: a path has no report, a report is damaged, or a table exists.
    """
    require(bool(paths), "paths", "have at least one run", paths)
    if output:
        for name in ("comparison.csv", "comparison.md"):
            refuse_to_replace(Path(output) / name, overwrite)
    rows = table(find_reports(paths))
    print(as_text(rows))
    if output:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        cells = [["" if cell == _EMPTY else cell for cell in row.values()] for row in rows]
        write_csv(folder / "comparison.csv", [list(rows[0]), *cells])
        atomic_write(folder / "comparison.md", as_markdown(rows).encode("utf-8", "backslashreplace"))
    return rows
