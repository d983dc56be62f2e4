"""Comparison table of several reports, with the paper's results for the same networks. Imports no TensorFlow."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from x3d_tf.csv_files import Verbatim
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import MAP, TOP1, TOP5, wilson_interval
from x3d_tf.evaluation.paper import MEAN, PROTOCOLS, Published, differences, is_on, published_for, reproductions_for
from x3d_tf.evaluation.reports import RESULTS_NAME, read_report, refuse_to_replace, stated_metrics, write_csv
from x3d_tf.evaluation.split_means import SplitMean, split_means
from x3d_tf.files import atomic_write
from x3d_tf.runs.run_folder import RECIPE_FIELDS
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted, plural
from x3d_tf.types import Metric

_MEAN = Metric(MEAN, "share", label="mean of top-1 and top-5")
_LABELS = {metric.name: metric.label for metric in (TOP1, TOP5, MAP, _MEAN)}
_PUBLISHERS = ("paper", "PySlowFast", "pytorchvideo")
# Columns of the table in the summary of a report.
_RESULT, _VIEWS, _PARAMETERS, _VERDICT = "result", "GMACs x views", "M parameters as in the paper", "comparison"
_PLACE = ("report", "network", "records", "split", "official split", "views", "recipe")
_TEXTS = (*_PLACE, *_PUBLISHERS, _RESULT, _VERDICT)  # columns that are aligned to the left
_EMPTY = "-"
FEW_SAMPLES = 400  # with fewer, the confidence interval of a top-1 of 50 % is 10 points wide or more


def find_reports(paths: Sequence[str]) -> list[Report]:
    """Reads the reports of runs. Invalid ones are left out, with a warning.

    Args:
        paths: run folders, whose reports are all read, or folders of single reports.

    Raises:
        UserError: a path has no report, or no report is valid.
    """
    reports: list[Report] = []
    errors: list[UserError] = []
    for path in map(Path, paths):
        inside = sorted((path / "evaluation").glob(f"*/{RESULTS_NAME}"))
        files = [path / RESULTS_NAME] if (path / RESULTS_NAME).is_file() else inside
        if not files:
            raise UserError(f"{path} has no report; create one with: python -m x3d_tf.evaluate --run={path}")
        for file in files:
            try:
                reports.append(read_report(file.parent))
            except UserError as error:
                errors.append(error)
    if not reports:
        raise errors[0]
    for invalid in errors:
        tell(f"warning: a report is left out: {invalid}")
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

    Reports on all official splits of a data set are followed by a row of their means; see `split_means`. Shares are in
    percent. "GMACs a video" is the cost of a clip times the number of clips per video. "paper" states whether the
    measured result is comparable to the paper's.

    Raises:
        UserError: two columns cannot be told apart.
    """
    means = split_means(reports).means
    groups = []
    for report in reports:
        groups.append(_groups(report))
        groups += [_mean_groups(mean) for mean in means if mean.last is report]
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
    folders = {"report": one_line(report.folder), "network": r["network"], "records": one_line(r["records"])}
    return (
        {Column(name): cell for name, cell in (folders | {"split": r["split"], **_official_split(r)}).items()},
        {Column(plural(r["sample"]), "samples"): str(r["samples"])},
        {Column("views"): r["views"]},
        {_column(metric): Verbatim(metric.cell(value)) for metric, value in _values(r).items()},
        {Column(f"GMACs a {r['sample']}"): _cost(r)},
        {
            Column(name): cell
            for name, cell in (
                {"M parameters": _parameters(r), "file": r.get("exported", _EMPTY), "recipe": _recipe(r)}
                | _published_cells(r)
            ).items()
        },
    )


def _column(metric: Metric) -> Column:
    return Column(metric.label, f"{metric.name}, {metric.kind}")


def _official_split(results: Mapping[str, Any]) -> dict[str, str]:
    number = results.get("official_split")
    return {} if number is None else {"official split": f"{number} of {results['official_splits']}"}


def _mean_groups(mean: SplitMean) -> tuple[dict[Column, str], ...]:
    """Returns the cells of a row of means: those that its reports share, the means, and the values on each split."""
    place, samples, views, _, *rest = (
        {name: cell if all(other[name] == cell for other in cells) else _EMPTY for name, cell in cells[0].items()}
        for cells in zip(*map(_groups, mean.reports))
    )
    values = mean.values()
    main = next(iter(values))
    numbers = ", ".join(str(report.results["official_split"]) for report in mean.reports)
    place |= {Column("report"): "mean", Column("official split"): f"{numbers} of {len(mean.reports)}"}
    means: dict[Column, str] = {_column(name): Verbatim(name.cell(fmean(found))) for name, found in values.items()}
    means[Column(f"{main.label} on each split")] = Verbatim(", ".join(map(main.cell, values[main])))
    return place, samples, views, means, *rest


def _cost(results: Mapping[str, Any]) -> str:
    clip = results["gmacs_per_clip"]
    return f"{clip:.4g} x {round(results['gmacs_per_sample'] / clip) if clip else 0}"


def _parameters(results: Mapping[str, Any]) -> str:
    return f"{results['params'] / 1e6:.3f}" if "params" in results else _EMPTY


def _recipe(results: Mapping[str, Any]) -> str:
    """Returns the gin files that a network was trained with, and the settings that were changed after them."""
    training = results.get("training") or {}
    files, changed = (", ".join(map(one_line, training.get(name, ()))) for name in RECIPE_FIELDS)
    return files + (f"; changed: {changed}" if changed else "") or _EMPTY


def _values(results: Mapping[str, Any]) -> dict[Metric, float]:
    """Returns the values of the metrics, the main one first.

    On the test videos of Kinetics, the mean of top-1 and top-5 is added, which is the paper's accuracy on them.
    """
    values = {metric: results[metric.name] for metric in stated_metrics(results)}
    if {TOP1, TOP5} <= values.keys() and results["split"] == "test" and _is_on_kinetics(results):
        values[_MEAN] = (values[TOP1] + values[TOP5]) / 2
    return values


def _is_on_kinetics(results: Mapping[str, Any]) -> bool:
    return any(is_on(results, name) for name in ("kinetics400", "kinetics600"))


def _published_cells(results: Mapping[str, Any]) -> dict[str, str]:
    """Returns the published figures for a network, by whose they are, and whether the report is comparable to them."""
    published = (*published_for(results), *reproductions_for(results))
    cells: dict[str, str] = {}
    for by in _PUBLISHERS:
        rows = [row for row in published if row.by == by]  # several differ in the pre-training only
        for name, label in _LABELS.items():
            figures = [_figure(row.figures[name]) for row in rows if name in row.figures]
            cells[f"{by}'s {label}"] = ", ".join(figures) or _EMPTY
        cells[by] = f"{_verdict(results, rows[0])} ({_source(rows)})" if rows else _EMPTY
    return cells


def _verdict(results: Mapping[str, Any], published: Published) -> str:
    differing = differences(results, published)
    return f"not comparable: {', '.join(differing)}" if differing else "comparable"


def _source(rows: Sequence[Published]) -> str:
    """Returns the source of results that differ in the pre-training only."""
    first = rows[0]
    place = first.views or f"{PROTOCOLS[first.dataset].title}, {first.gmacs} GMACs per clip"
    trained = f", pre-trained on {' or '.join(row.pretrained for row in rows)}" if first.pretrained != "-" else ""
    return f"{first.source}, {place}{trained}"


def describe(report: Report) -> str:
    """Returns a summary of a report for the terminal.

    The first line states the metrics and the evaluation settings. If there are fewer than `FEW_SAMPLES` samples, a
    second line gives the confidence interval of top-1. If mAP ignores classes, a line names them. If the records are of
    a data set with published results for the network, or of Kinetics, a table in the columns of the paper follows.
    """
    r = report.results
    values, sample, count = _values(r), r["sample"], r["samples"]
    file = f"{r['exported']}, " if "exported" in r else ""
    line = (
        f"{r['network']} on {one_line(r['records'])}, split {r['split']}: "
        f"{', '.join(metric.labelled(value) for metric, value in values.items())} ({file}{counted(count, sample)}, "
        f"{counted(r['classes'], 'class')}, {r['views']}, {_cost(r)} GMACs per {sample}, "
        f"{_parameters(r)} M parameters)"
    )
    if TOP1 in values and count < FEW_SAMPLES:
        low, high = wilson_interval(values[TOP1], count)
        interval = f"{100 * low:.0f} % to {100 * high:.0f} %"
        line += f"\n95 % confidence interval of top-1 on so few {plural(sample)}: {interval}"
    if ignored := r.get("classes_without_positives"):
        names = first_few([one_line(name) for name in ignored])
        line += f"\nignored for mAP: {counted(len(ignored), 'class')} without positives ({names})"
    published = [row for row in (*published_for(r), *reproductions_for(r)) if is_on(r, row.dataset)]
    if not published and not (TOP1 in values and _is_on_kinetics(r)):
        return line
    rows = [_measured_row(r, values), *(_published_row(r, row, values) for row in published)]
    return f"{line}\n{as_text(rows)}"


def _measured_row(results: Mapping[str, Any], values: Mapping[Metric, float]) -> dict[str, str]:
    """Returns the row of a report in a table in the columns of the paper, with the parameters as the paper counts."""
    params = f"{results['params_paper'] / 1e6:.3f}" if "params_paper" in results else _EMPTY
    cells = {metric.label: metric.cell(value) for metric, value in values.items()}
    return {_RESULT: "measured", **cells, _VIEWS: _cost(results), _PARAMETERS: params, _VERDICT: _EMPTY}


def _published_row(results: Mapping[str, Any], row: Published, metrics: Iterable[Metric]) -> dict[str, str]:
    values = {metric.label: _figure(row.figures.get(metric.name)) for metric in metrics}
    cost = _EMPTY if row.gmacs is None else f"{_figure(row.gmacs)} x {row.num_views}"
    name = f"{row.by}, {_source([row])}"
    return {_RESULT: name, **values, _VIEWS: cost, _PARAMETERS: _figure(row.params), _VERDICT: _verdict(results, row)}


def _figure(value: float | None) -> str:
    return _EMPTY if value is None else str(float(value))


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
        UserError: a path has no report, no report is valid, or a table exists.
    """
    require(bool(paths), "paths", "have at least one run", paths)
    if output:
        for name in ("comparison.csv", "comparison.md"):
            refuse_to_replace(Path(output) / name, overwrite)
    reports = find_reports(paths)
    rows = table(reports)
    print(as_text(rows))
    for note in split_means(reports).notes:
        tell(note)
    if output:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        cells = [["" if cell == _EMPTY else cell for cell in row.values()] for row in rows]
        write_csv(folder / "comparison.csv", [list(rows[0]), *cells])
        atomic_write(folder / "comparison.md", as_markdown(rows).encode("utf-8", "backslashreplace"))
    return rows
