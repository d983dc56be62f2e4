"""The main metric over the cost of a video for several networks, from reports (paper, Figures 3 and A.4).

Imports no TensorFlow.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import plots
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.paper_points import FIGURE_3_POINTS
from x3d_tf.evaluation.reports import RESULTS_NAME, read_report, stated_metrics
from x3d_tf.terminal import tell
from x3d_tf.text import counted

INFERENCE_COST_NAME = "inference_cost.png"

_DEEPEST = 4  # folders between the given one and results.json, as in candidates/RUN/evaluation/REPORT
_MOST_CURVES, _MOST_ROWS = 40, 8  # that can be told apart, and that fit into a picture
_LEAST_COST = 1e-9  # GMACs: one multiply-add, for the logarithmic axis
_VIEWS = re.compile(r"([1-9][0-9]{0,3})-([A-Za-z]{1,40})", re.ASCII)  # such as 10-Center
# Networks share panels if these entries agree, the records, and the main metric.
_SAMPLES = ("task", "dataset", "split", "sample", "samples", "classes")
# Reports in the same run folder are on one curve if these agree besides.
_PROTOCOL = (
    *("network", "weights_sha256", "params", "gmacs_per_clip", "resize", "crop", "stretch", "clip_starts"),
    *("frame_sampling", "combine", "head_pool"),
)


class NetworkSweep(NamedTuple):
    """Reports on a network that differ in the number of clips per video.

    Attributes:
        name: its run folder, relative to the folder that was searched, and its network.
        reports: a report for each number of clips, in ascending order.
    """

    name: str
    reports: Mapping[int, Report]


def save_inference_cost(folder: Path, path: Path, *, paper: bool = False) -> list[str]:
    """Saves a picture of the sweeps in a folder, unless it has none.

    Networks that were evaluated on other samples, or with another main metric, get panels of their own.

    Args:
        folder: a run folder, or a folder of run folders; see `find_sweeps`.
        path: PNG file to write; an existing file is replaced.
        paper: whether to add the paper's points where the metric is top-1.

    Returns:
        The lines that state what was drawn; none if there are no sweeps.

    Raises:
        UserError: there are too many networks for a picture.
    """
    rows = find_sweeps(folder)
    if not rows:
        return []
    advice = "choose a folder with fewer run folders"
    require(len(rows) <= _MOST_ROWS, str(folder), f"have sweeps on at most {_MOST_ROWS} data sets; {advice}", len(rows))
    networks = sum(map(len, rows))
    rule = f"have sweeps of at most {_MOST_CURVES} networks; {advice}"
    require(networks <= _MOST_CURVES, str(folder), rule, networks)
    panels = [_panels(row, paper=paper) for row in rows]
    plots.save_inference_cost(panels, path, "cost of inference with K clips")
    lines = [f"{row.title}: {row.metric.label} of {counted(len(row.curves), 'network')}" for row in panels]
    if paper:
        lines += [f"{row.title}: the paper has no points for {row.metric.label}" for row in panels if not row.paper]
    return lines


def find_sweeps(folder: Path) -> list[list[NetworkSweep]]:
    """Reads the reports in a folder, up to four levels deep, and returns the networks with several numbers of clips.

    Reports that are damaged are named on standard error and left out.

    Returns:
        A list of networks for each set of samples and main metric.
    """
    curves: dict[tuple[str, ...], dict[int, Report]] = {}
    for report in _reports(folder):
        results = report.results
        if found := _VIEWS.fullmatch(results["views"]):
            records = results.get("records_sha256", results["records"])
            samples = repr([records, stated_metrics(results)[0], *map(results.get, _SAMPLES)])
            protocol = repr([*map(results.get, _PROTOCOL)])
            key = (samples, _run_folder(report, folder), found[2], protocol)
            curves.setdefault(key, {})[int(found[1])] = report
    rows: dict[str, list[NetworkSweep]] = {}
    for (samples, run, crops, _), reports in curves.items():
        if len(reports) > 1:
            network = next(iter(reports.values())).results["network"]
            name = run if run.split("/")[-1] == network else ": ".join(filter(None, (run, network)))
            name += f", {crops}" if crops != "Center" else ""
            rows.setdefault(samples, []).append(NetworkSweep(name, dict(sorted(reports.items()))))
    return [_distinct(sorted(row, key=_cost_of_clip)) for row in rows.values()]


def _reports(folder: Path) -> Iterator[Report]:
    """Yields the reports in a folder, ordered by their paths."""
    for path in sorted(path for depth in range(_DEEPEST + 1) for path in folder.glob("*/" * depth + RESULTS_NAME)):
        try:
            report = read_report(path.parent)
            cost = report.results["gmacs_per_sample"]
            require(cost >= _LEAST_COST, f"{path}, gmacs_per_sample", f"be at least {_LEAST_COST:g}", cost)
        except UserError as error:
            tell(f"warning: a report is left out: {error}")
        else:
            yield report


def _run_folder(report: Report, folder: Path) -> str:
    """Returns the run folder of a report relative to `folder`; "" if it is `folder` itself."""
    parts = report.folder.relative_to(folder).parts[:-1]
    return "/".join(parts[:-1] if parts[-1:] == ("evaluation",) else parts)


def _distinct(sweeps: Sequence[NetworkSweep]) -> list[NetworkSweep]:
    """Returns the sweeps with distinct names: those with the same name also state the settings that differ."""
    counts = Counter(sweep.name for sweep in sweeps)
    return [
        NetworkSweep(f"{sweep.name} ({_differences(sweep, sweeps)})", sweep.reports)
        if counts[sweep.name] > 1
        else sweep
        for sweep in sweeps
    ]


def _differences(sweep: NetworkSweep, sweeps: Sequence[NetworkSweep]) -> str:
    same = [_first(other) for other in sweeps if other.name == sweep.name]
    names = [name for name in _PROTOCOL if len({repr(results.get(name)) for results in same}) > 1]
    return ", ".join(f"{name}={str(_first(sweep).get(name))[:20]}" for name in names)


def _cost_of_clip(sweep: NetworkSweep) -> float:
    return float(_first(sweep)["gmacs_per_clip"])


def _first(sweep: NetworkSweep) -> dict[str, Any]:
    return next(iter(sweep.reports.values())).results


def _panels(sweeps: Sequence[NetworkSweep], *, paper: bool) -> plots.CostPanels:
    results = _first(sweeps[0])
    metric, sample = stated_metrics(results)[0], results["sample"]
    records = plots.shortened(Path(results["records"]).name, 40)
    counts = f"{counted(results['samples'], sample)}, {counted(results['classes'], 'class')}"
    title = f"{records}, split {plots.shortened(results['split'], 40)}, {counts}"
    curves = [
        plots.CostCurve(
            sweep.name,
            [(found.results["gmacs_per_sample"], found.results[metric.name], k) for k, found in sweep.reports.items()],
        )
        for sweep in sweeps
    ]
    return plots.CostPanels(title, metric, sample, curves, FIGURE_3_POINTS if paper and metric == TOP1 else ())
