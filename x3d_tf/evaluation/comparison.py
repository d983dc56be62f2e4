"""Comparison table of several reports, with the paper's results for the same networks. Imports no TensorFlow."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf.csv_files import Verbatim
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import TOP1, wilson_interval
from x3d_tf.evaluation.paper import PublishedAccuracy, PublishedPrecision, differences, published_for
from x3d_tf.evaluation.reports import RESULTS_NAME, read_report, refuse_to_replace, stated_metrics, write_csv
from x3d_tf.files import atomic_write
from x3d_tf.terminal import one_line
from x3d_tf.text import counted, plural

_PAPERS_TOP1, _PAPERS_MAP = "paper's top-1", "paper's mAP"
_TEXTS = ("report", "network", "records", "split", "views", "paper")  # aligned to the left
_EMPTY = "-"
FEW_SAMPLES = 400  # with fewer, the confidence interval of a top-1 of 50 % is 10 points wide or more


def find_reports(paths: Sequence[str]) -> list[Report]:
    """Reads the reports of runs.

    Args:
        paths: run folders, whose reports are all read, or folders of single reports.

    Raises:
        UserError: a path has no report, or a report is invalid.
    """
    reports: list[Report] = []
    for path in map(Path, paths):
        inside = sorted((path / "evaluation").glob(f"*/{RESULTS_NAME}"))
        files = [path / RESULTS_NAME] if (path / RESULTS_NAME).is_file() else inside
        if not files:
            raise UserError(f"{path} has no report; create one with: python -m x3d_tf.evaluate --run={path}")
        reports += [read_report(file.parent) for file in files]
    return reports


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        name: its name.
        source: what its cells are, added to the name if other columns have the same name.
    """

    name: str
    source: str = ""


def table(reports: Sequence[Report]) -> list[dict[str, str]]:
    """Returns one row per report, as a dict from column to text. Columns that are empty in all rows are omitted.

    Shares are in percent. "GMACs a video" is the cost of a clip times the number of clips per video. "paper" states
    whether the measured result is comparable to the paper's.

    Raises:
        UserError: two columns cannot be told apart.
    """
    groups = [_groups(report) for report in reports]
    columns = [column for group in zip(*groups) for column in dict.fromkeys(name for cells in group for name in cells)]
    rows = [{column: cell for cells in group for column, cell in cells.items()} for group in groups]
    names = _distinct_names(columns)
    used = [column for column in columns if any(row.get(column, _EMPTY) != _EMPTY for row in rows)]
    return [{names[column]: row.get(column, _EMPTY) for column in used} for row in rows]


def _distinct_names(columns: Sequence[Column]) -> dict[Column, str]:
    """Returns the name of each column, with its source if other columns have the same name."""
    counts = Counter(column.name for column in columns)
    names = {
        column: f"{column.name} ({column.source})" if column.source and counts[column.name] > 1 else column.name
        for column in columns
    }
    clashes = [name for name, count in Counter(names.values()).items() if count > 1]
    require(not clashes, "columns of the table", "have distinct names", clashes)
    return names


def _groups(report: Report) -> tuple[dict[Column, str], ...]:
    """Returns the cells of a report in groups, whose columns follow each other in the table."""
    r = report.results
    published = published_for(r)
    folders = {"report": one_line(report.folder), "network": r["network"], "records": one_line(r["records"])}
    last = {
        "M parameters": _parameters(r),
        _PAPERS_TOP1: f"{published.top1:.4g}" if isinstance(published, PublishedAccuracy) else _EMPTY,
        _PAPERS_MAP: f"{published.map:.4g}" if isinstance(published, PublishedPrecision) else _EMPTY,
        "paper": _verdict(r),
    }
    return (
        {Column(name): cell for name, cell in (folders | {"split": r["split"]}).items()},
        {Column(plural(r["sample"]), "samples"): str(r["samples"])},
        {Column("views"): r["views"]},
        {
            Column(metric.label, f"{metric.name}, {metric.kind}"): Verbatim(metric.cell(r[metric.name]))
            for metric in stated_metrics(r)
        },
        {Column(f"GMACs a {r['sample']}"): _cost(r)},
        {Column(name): cell for name, cell in last.items()},
    )


def _cost(results: Mapping[str, Any]) -> str:
    clip = results["gmacs_per_clip"]
    return f"{clip:.4g} x {round(results['gmacs_per_sample'] / clip) if clip else 0}"


def _parameters(results: Mapping[str, Any]) -> str:
    return f"{results['params'] / 1e6:.3f}" if "params" in results else _EMPTY


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

    The first line states the metrics and the evaluation settings. If there are fewer than `FEW_SAMPLES` samples, a
    second line gives the confidence interval of top-1. If mAP ignores classes, a line names them. If the records are
    those of the paper's dataset, a last line gives the paper's result.
    """
    r = report.results
    metrics, sample, count = stated_metrics(r), r["sample"], r["samples"]
    line = (
        f"{r['network']} on {one_line(r['records'])}, split {r['split']}: "
        f"{', '.join(metric.labelled(r[metric.name]) for metric in metrics)} ({counted(count, sample)}, "
        f"{counted(r['classes'], 'class')}, {r['views']}, {_cost(r)} GMACs per {sample}, "
        f"{_parameters(r)} M parameters)"
    )
    if TOP1 in metrics and count < FEW_SAMPLES:
        low, high = wilson_interval(r[TOP1.name], count)
        interval = f"{100 * low:.0f} % to {100 * high:.0f} %"
        line += f"\n95 % confidence interval of top-1 on so few {plural(sample)}: {interval}"
    if ignored := r.get("classes_without_positives"):
        names = first_few([one_line(name) for name in ignored])
        line += f"\nignored for mAP: {counted(len(ignored), 'class')} without positives ({names})"
    if (published := published_for(r)) is None or "other data" in differences(r, published):
        return line
    if isinstance(published, PublishedPrecision):
        return f"{line}\nmAP in the paper on AVA: {published.map:.4g} %, {_verdict(r)}"
    return f"{line}\ntop-1 in the paper on Kinetics-400: {published.top1:.4g} %, {_verdict(r)}"


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats the table in aligned columns for a terminal."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [name not in _TEXTS for name in lines[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(line, widths, numeric)
        ).rstrip()
        for line in lines
    )


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats the table as Markdown."""
    ruler = ["---" if name in _TEXTS else "---:" for name in rows[0]]
    header, *lines = ([cell.replace("|", "\\|") for cell in line] for line in (rows[0], *(r.values() for r in rows)))
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ruler, *lines))


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
        UserError: a path has no report, a report is invalid, or a table exists.
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
