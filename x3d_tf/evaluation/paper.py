"""Published results of X3D on Kinetics, Charades and AVA, and what makes a result not comparable to them.

Most are the paper's; PySlowFast and pytorchvideo publish others for Kinetics-400. The comparison follows from the data
set and the numbers of videos in the manifest and from the settings of the evaluation, never from names of folders.
Imports no TensorFlow.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from x3d_tf.evaluation.metrics import MAP, TOP1, TOP5
from x3d_tf.evaluation.published import (
    PYSLOWFAST,
    PYTORCHVIDEO,
    TABLE_1,
    TABLE_2,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7_TEST,
    TABLE_7_VALIDATION,
    TABLE_8,
    X3D_S_3_CLIPS,
    Row,
)
from x3d_tf.evaluation.reports import stated_metrics
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.expansion import EFFICIENTNETS, VARIANTS, Expansion, name_of
from x3d_tf.text import counted
from x3d_tf.types import ClipStarts, Combine, FrameSampling

PAPER = "paper"
MEAN = "mean_of_top1_and_top5"  # the paper's accuracy on test videos
_NETWORK_OPTIONS = ("input", "stem_kernel", "se", "swish", "swish_before", "separable", "shortcut_norm")
_VALIDATION = ("val", "validate", "validation")  # names of the official validation split


class Protocol(NamedTuple):
    """The evaluation of a data set that published results are of.

    Attributes:
        title: name of the data set in texts.
        classes: number of evaluated classes.
        task: name of the task.
        validation: names of the split with the validation videos.
        combine: how the probabilities of a video's views are combined.
        frame_sampling: choice of the frames of a clip.
    """

    title: str
    classes: int
    task: str = "single_label"
    validation: Sequence[str] = _VALIDATION
    combine: Combine = "mean"
    frame_sampling: FrameSampling = "slowfast"


# By the name of the data set. The official list of the validation videos of Charades has the name test.
PROTOCOLS = {
    "kinetics400": Protocol("Kinetics-400", 400),
    "kinetics600": Protocol("Kinetics-600", 600),
    "charades": Protocol("Charades", 157, "multi_label", (*_VALIDATION, "test"), "max", "exact"),
    "ava_v2.2": Protocol("AVA v2.2", 60, "detection"),
    "ava_v2.1": Protocol("AVA v2.1", 60, "detection"),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published result.

    Attributes:
        by: who published it: "paper", "PySlowFast" or "pytorchvideo".
        source: table or section of the paper, or the page.
        network: name of the network, in the format of reports.
        expansion: its factors.
        dataset: key of `PROTOCOLS`.
        split: "val" or "test".
        views: views per video, in the format of reports; "" for one centre crop around each key frame.
        figures: metrics in percent, by name.
        gmacs: GMACs per view as published, in units of 1e9; None if not published.
        params: parameters as published, in units of 1e6; None if not published.
        pretrained: dataset of the pre-training; "-" for none.
        clip_starts: positions of the clips; None if not published.
    """

    by: str = PAPER
    source: str
    network: str
    expansion: Expansion
    dataset: str = "kinetics400"
    split: str = "val"
    views: str
    figures: Mapping[str, float]
    gmacs: float | None
    params: float | None
    pretrained: str = "-"
    clip_starts: ClipStarts | None = "offset"

    @property
    def num_views(self) -> int:
        """Number of views per video."""
        clips, _, crops = self.views.partition("-")
        return int(clips or 1) * (3 if crops == "LeftCenterRight" else 1)


def _published(rows: Iterable[Row], source: str, views: str, **settings: Any) -> Iterator[Published]:
    """Yields the results of X3D and of EfficientNet3D in a table."""
    for row in rows:
        figures = {TOP1.name: row.top1, TOP5.name: row.top5, MAP.name: row.map}
        if row.network:
            yield Published(
                source=source,
                network=row.network,
                expansion=(VARIANTS | EFFICIENTNETS)[row.network].expansion,
                views=views,
                figures={name: value for name, value in figures.items() if value is not None},
                gmacs=row.gmacs,
                params=row.params,
                pretrained=row.pretrained,
                **settings,
            )


def _means(rows: Iterable[Row], source: str, views: str) -> Iterator[Published]:
    """Yields the means of top-1 and top-5 on the test videos of Kinetics-400 in Table 4."""
    tests = {row.network: row.test for row in rows}
    for result in _published(rows, source, views, split="test"):
        if (mean := tests[result.network]) is not None:
            yield replace(result, figures={MEAN: mean})


def _with_stride(rows: Iterable[Published], tau: float) -> Iterator[Published]:
    """Yields the results with another temporal stride of the network, γτ."""
    for row in rows:
        expansion = replace(row.expansion, gamma_tau=tau)
        yield replace(row, expansion=expansion, network=name_of(expansion))


_10_CENTER, _30_VIEWS = "10-Center", "10-LeftCenterRight"
_X2D = Row(model="X2D", network=TABLE_1.network, top1=TABLE_1.top1, gmacs=TABLE_1.gmacs, params=TABLE_1.params)

# Of several results that suit a report equally, the first counts. Those of X3D in the upper half of Table 7 are also
# in Table 2. Charades has twice the stride of Kinetics: 10 frames at 24 per second.
PUBLISHED = (
    *_published([_X2D], "section 4.1", _10_CENTER),
    *_published(TABLE_2, "Table 2", _10_CENTER),
    *_published([X3D_S_3_CLIPS], "appendix B", "3-Center"),
    *_published(TABLE_4, "Table 4", _30_VIEWS),
    *_published([row for row in TABLE_7_VALIDATION if row.network in EFFICIENTNETS], "Table 7", _10_CENTER),
    *_published(TABLE_7_TEST, "Table 7", _10_CENTER, split="test"),
    *_means(TABLE_4, "Table 4", _30_VIEWS),
    *_published(TABLE_5, "Table 5", _30_VIEWS, dataset="kinetics600"),
    *_with_stride(_published(TABLE_6, "Table 6", _30_VIEWS, dataset="charades"), 12.5),
    *_published([row for row in TABLE_8 if row.dataset == "2.2"], "Table 8", "", dataset="ava_v2.2"),
    *_published([row for row in TABLE_8 if row.dataset == "2.1"], "Table 8", "", dataset="ava_v2.1"),
)

# Of networks with the same architecture that others trained. pytorchvideo does not state where its clips start.
_SLOWFAST: dict[str, Any] = {"by": "PySlowFast", "clip_starts": "slowfast"}
REPRODUCTIONS = (
    *_published([row for row in PYSLOWFAST if row.views == 10], "MODEL_ZOO.md", _10_CENTER, **_SLOWFAST),
    *_published([row for row in PYSLOWFAST if row.views == 30], "MODEL_ZOO.md", _30_VIEWS, **_SLOWFAST),
    *_published(PYTORCHVIDEO, "hub/x3d.py", _30_VIEWS, by="pytorchvideo", clip_starts=None),
)


def published_for(results: Mapping[str, Any]) -> tuple[Published, ...]:
    """Returns the paper's results for the network and the kind of metric of a report.

    Args:
        results: the content of results.json.

    Returns:
        Those on the data set, the split and the views of the report, or on as many of these three as the paper has, in
        this order. Several differ in the pre-training only. Empty if the paper has no such result for the network.
    """
    return _nearest(PUBLISHED, results)


def reproductions_for(results: Mapping[str, Any]) -> tuple[Published, ...]:
    """Returns the results that others published for the network of a report; empty for other data sets.

    Args:
        results: the content of results.json.
    """
    rows = [row for row in REPRODUCTIONS if is_on(results, row.dataset)]
    publishers = dict.fromkeys(row.by for row in rows)
    return tuple(row for by in publishers for row in _nearest([row for row in rows if row.by == by], results))


def _nearest(rows: Iterable[Published], results: Mapping[str, Any]) -> tuple[Published, ...]:
    kind = _task_of_metrics(results)
    rows = [row for row in rows if row.network == results["network"] and PROTOCOLS[row.dataset].task == kind]
    if not rows:
        return ()
    dataset, split, views = results.get("dataset"), results["split"], results["views"]

    def rank(row: Published) -> tuple[bool, bool, bool]:
        on_data = row.dataset == dataset
        return on_data, on_data and split in _names(row), row.views == views

    best = max(rows, key=rank)
    same = (best.dataset, best.split, best.views)
    return tuple(row for row in rows if (row.dataset, row.split, row.views) == same)


def _task_of_metrics(results: Mapping[str, Any]) -> str:
    """Returns the task of this package that has the metrics of a report, "" for other metrics."""
    if "eval_boxes" in results:
        return "detection"
    metrics = stated_metrics(results)
    return "single_label" if TOP1 in metrics else "multi_label" if MAP in metrics else ""


def _names(published: Published) -> Sequence[str]:
    """Returns the names that the split of a published result may have in records."""
    return PROTOCOLS[published.dataset].validation if published.split == "val" else (published.split,)


def is_on(results: Mapping[str, Any], dataset: str) -> bool:
    """Returns True if a report is on a data set of `PROTOCOLS`, by its name, and on all of its classes."""
    return results.get("dataset") == dataset and results["classes"] == PROTOCOLS[dataset].classes


def differences(results: Mapping[str, Any], published: Published) -> list[str]:
    """Returns descriptions of how an evaluation differs from a published one; none if the results are comparable.

    Args:
        results: the content of results.json.
        published: the published result of the same network.
    """
    protocol = PROTOCOLS[published.dataset]
    same_data = is_on(results, published.dataset)
    missing = _missing_videos(results)
    specific = _detection_differences if protocol.task == "detection" else _clip_differences
    found = {
        "other data": not same_data,
        "other task": results.get("task") != protocol.task,  # a task of your own may have other targets or clips
        "other split": same_data and results["split"] not in _names(published),
        str(missing): same_data and missing is not None,
        **specific(results, published, protocol),
    }
    return [name for name, holds in found.items() if holds]


def _clip_differences(results: Mapping[str, Any], published: Published, protocol: Protocol) -> dict[str, bool]:
    expansion, starts = published.expansion, published.clip_starts
    size = expansion.clip.size if published.views.endswith("-Center") else expansion.test_size
    larger = size > expansion.clip.size  # otherwise all poolings agree
    changed = _changed_options(results)
    other_starts = "unknown clip starts" if starts is None else "other clip starts"
    combined = "views not averaged" if protocol.combine == "mean" else "views averaged"
    return {
        "other views": results["views"] != published.views,
        other_starts: results.get("clip_starts", "offset") != starts,
        "other frame sampling": results.get("frame_sampling", "slowfast") != protocol.frame_sampling,
        "other crop": (results.get("resize"), results.get("crop")) != (expansion.test_size, size)
        or bool(results.get("stretch")),
        "other head pooling": larger and results.get("head_pool") != "fixed_probabilities",
        combined: results.get("combine", "mean") != protocol.combine,
        f"other network ({', '.join(changed)})": bool(changed),
        "other network (the paper does not define its own)": published.network in EFFICIENTNETS,
    }


def _detection_differences(results: Mapping[str, Any], published: Published, _: Protocol) -> dict[str, bool]:
    size = published.expansion.test_size
    changed = _changed_options(results) + (["head"] if results.get("head") != "full" else [])
    frames = results.get("key_frames_missing", 0)
    boxes = (results["eval_boxes"], results.get("lowest_score_of_a_box"))
    return {
        f"{frames} key frames missing": is_on(results, published.dataset) and frames != 0,
        "other boxes": boxes != ("proposals", 0.8),
        "other crop": (results.get("resize"), results.get("crop")) != (size, size),
        f"other network ({', '.join(changed)})": bool(changed),
    }


def _missing_videos(results: Mapping[str, Any]) -> str | None:
    """Returns how the evaluated videos differ from the data set's list; None if they are complete."""
    expected, present = results.get("videos_expected"), results.get("videos_present")
    if expected is None or present is None:
        return "unknown number of videos"
    if expected == present:
        return None
    count = counted(abs(expected - present), "video")
    return f"{count} missing" if expected > present else f"{count} too many"


def _changed_options(results: Mapping[str, Any]) -> list[str]:
    used = results["options"] if isinstance(results.get("options"), Mapping) else results
    default = ModelOptions()
    return [name for name in _NETWORK_OPTIONS if used.get(name, getattr(default, name)) != getattr(default, name)]
