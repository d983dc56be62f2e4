"""Means over the official splits of a data set, such as the three of UCF101 and of HMDB51. Imports no TensorFlow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from x3d_tf.errors import first_few
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.reports import stated_metrics
from x3d_tf.terminal import one_line
from x3d_tf.types import Metric

# Entries of results.json that must be equal, besides the training: the network, the data set and the views.
_SAME = (
    *("network", "options", "head", "gmacs_per_clip", "gmacs_per_sample", "params"),
    *("dataset", "official_splits", "split", "task", "classes", "sample", "metrics", "stored"),
    *("views", "frames", "stride", "resize", "crop", "stretch", "clip_starts", "frame_sampling", "combine"),
    *("head_pool", "stem_kernel", "eval_boxes", "lowest_score_of_a_box"),
)


class SplitMean(NamedTuple):
    """Reports that differ in nothing but the official split, one for each.

    Attributes:
        reports: the reports, by the number of their split.
        last: the last of them in the order that was given.
    """

    reports: tuple[Report, ...]
    last: Report

    def values(self) -> dict[Metric, list[float]]:
        """Returns the value of each metric on each split; the main metric is the first."""
        metrics = stated_metrics(self.reports[0].results)
        return {metric: [report.results[metric.name] for report in self.reports] for metric in metrics}


class SplitMeans(NamedTuple):
    """The means of reports, and one line for each group of reports that has none, with the reason."""

    means: tuple[SplitMean, ...]
    notes: tuple[str, ...]


def split_means(reports: Sequence[Report]) -> SplitMeans:
    """Finds the reports to average: those of one network, recipe and evaluation on all official splits of a data set.

    The recipe is the same if all settings of the runs are, and the path of the initial weights; only the folders of
    the records may differ. Reports of model files are never averaged, because the files do not state their recipe, nor
    are those on other records than the network was trained on: its training videos may be among their test videos.
    """
    means, notes = [], []
    for members in _groups(reports).values():
        by_number = {report.results["official_split"]: report for report in members}
        results = members[0].results
        complete = len(by_number) == len(members) == results["official_splits"]
        if complete and results.get("training") and not any(map(_is_on_other_records, members)):
            means.append(SplitMean(tuple(by_number[number] for number in sorted(by_number)), members[-1]))
        else:
            notes.append(_note(members))
    return SplitMeans(tuple(means), tuple(notes))


def _groups(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Returns the reports on official splits, grouped by all that must be equal; those of model files one by one."""
    groups: dict[str, list[Report]] = {}
    for number, report in enumerate(reports):
        if report.results.get("official_split") is not None:
            groups.setdefault(repr([*_settings(report.results, number)]), []).append(report)
    return groups


def _settings(results: Mapping[str, Any], number: int) -> Iterator[Any]:
    yield from map(results.get, _SAME)
    training = results.get("training")
    yield from map(training.get, ("settings_sha256", "init")) if training else [number]


def _is_on_other_records(report: Report) -> bool:
    """Returns True if a report is on other records than those that the network was trained on."""
    trained = report.results["training"].get("records_sha256")
    return trained is None or trained != report.results.get("records_sha256")


def _note(members: Sequence[Report]) -> str:
    """Returns the reason why reports are not averaged."""
    results = members[0].results
    numbers = [report.results["official_split"] for report in members]
    missing = [str(number) for number in range(1, results["official_splits"] + 1) if number not in numbers]
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if results.get("training") is None:
        why = "a report of a model file does not state the recipe"
    elif others := [one_line(report.folder) for report in members if _is_on_other_records(report)]:
        why = f"the networks of {first_few(others)} were trained on other records, which may hold the test videos"
    elif twice is None:
        why = f"no report of the same recipe and views exists for split {first_few(missing)}"
    else:
        folders = [one_line(report.folder) for report in members if report.results["official_split"] == twice]
        why = f"split {twice} has {len(folders)} reports: {first_few(folders)}"
    splits = f"the {results['official_splits']} official splits of {one_line(results['dataset'])}"
    return f"no mean over {splits} for {one_line(members[0].folder)}: {why}"
