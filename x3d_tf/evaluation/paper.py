"""Results published in the paper for Kinetics-400 and AVA, and what makes a result not comparable to them.

The comparison follows from the data set and the numbers of videos in the manifest and from the settings of the
evaluation, never from names of folders. Imports no TensorFlow.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.published import (
    FIGURE_2_STEP_1,
    FIGURE_3,
    TABLE_1,
    TABLE_2,
    TABLE_4,
    TABLE_7_VALIDATION,
    TABLE_8,
    X3D_S_3_CLIPS,
    Row,
)
from x3d_tf.evaluation.reports import stated_metrics
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.expansion import EFFICIENTNETS, VARIANTS
from x3d_tf.plots import PaperPoint
from x3d_tf.text import counted

_NETWORK_OPTIONS = ("input", "stem_kernel", "se", "swish", "swish_before", "separable", "shortcut_norm")
_KINETICS = "kinetics400"  # name of the data set
_AVA = {"ava_v2.1": "2.1", "ava_v2.2": "2.2"}  # versions by the name of the data set
_VALIDATION = ("val", "validate", "validation")  # names of the official validation split


@dataclass(frozen=True)
class PublishedAccuracy:
    """A published accuracy on the validation videos of Kinetics-400.

    Attributes:
        network: name of the variant.
        views: views per video, in the format of reports.
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent; None if the paper does not state it.
        source: table or section of the paper.
    """

    network: str
    views: str
    top1: float
    top5: float | None
    source: str


def _accuracies(rows: Iterable[Row], views: str, source: str) -> Iterator[PublishedAccuracy]:
    for row in rows:
        if row.network and row.top1 is not None:
            yield PublishedAccuracy(row.network, views, row.top1, row.top5, source)


ACCURACIES = (
    PublishedAccuracy(TABLE_1.network, "10-Center", TABLE_1.top1, None, "section 4.1"),
    *_accuracies(TABLE_2, "10-Center", "Table 2"),
    *_accuracies([X3D_S_3_CLIPS], "3-Center", "appendix B"),
    *_accuracies(TABLE_4, "10-LeftCenterRight", "Table 4"),
    *_accuracies([row for row in TABLE_7_VALIDATION if row.network in EFFICIENTNETS], "10-Center", "Table 7"),
)


@dataclass(frozen=True)
class PublishedPrecision:
    """A published frame mAP of action detection (paper, Table 8).

    Attributes:
        network: name of the variant.
        version: version of AVA.
        map: frame mAP in percent on the validation videos, with one centre crop.
        gmacs: GMACs per clip as published, which are those of the network for Kinetics.
        pretrained: the dataset used for pre-training.
    """

    network: str
    version: str
    map: float
    gmacs: float
    pretrained: str


PRECISIONS = tuple(
    PublishedPrecision(row.network, row.dataset, row.map, row.gmacs, row.pretrained)
    for row in TABLE_8
    if row.network and row.map and row.gmacs
)


def _clip_points(rows: Iterable[Row], *, joined: bool = False) -> Iterator[PaperPoint]:
    """Yields top-1 over the cost of a clip."""
    for row in rows:
        if row.gmacs and row.top1 and row.views:
            yield PaperPoint(row.model, row.gmacs, row.top1, row.views, joined)


def _video_points(rows: Iterable[Row]) -> Iterator[PaperPoint]:
    """Yields top-1 over the cost of all clips of a video."""
    for row in rows:
        gmacs = row.video_gmacs or (row.gmacs or 0) * (row.views or 0)
        if gmacs and row.top1 and row.views:
            yield PaperPoint(row.model, gmacs, row.top1, row.views)


# Figure 2, as far as the text and Table 2 print accuracies: the path, and beside it the worst network of step 1 and
# X3D-S, a contraction of step 7. The path continues from step 7 itself.
_BEST, _WORST = FIGURE_2_STEP_1
_ON_PATH = [row for row in TABLE_2 if row.model in ("X3D-XS", "X3D-M", "X3D-L", "X3D-XL")]
FIGURE_2_POINTS = (
    PaperPoint("X2D", TABLE_1.gmacs, TABLE_1.top1, 10),
    *_clip_points([_BEST, *_ON_PATH], joined=True),
    *_clip_points([_WORST, *(row for row in TABLE_2 if row.model == "X3D-S")]),
)

# Figures 3 and A.4, as far as appendix B and Table 2 print accuracies: X3D-S with 3 and 10 clips, others with 10.
_S_3, _S_10, *_OTHERS = _video_points([*FIGURE_3, *(row for row in TABLE_2 if row.model != "X3D-S")])
FIGURE_3_POINTS = (_S_3._replace(name=""), _S_10._replace(joined=True), *_OTHERS)


def published_for(results: Mapping[str, Any]) -> PublishedAccuracy | PublishedPrecision | None:
    """Returns the published result for the network of a report.

    Args:
        results: the content of results.json.

    Returns:
        For detection, the mAP on the report's version of AVA if published, else on the newest version. For
        top-1, the accuracy with the report's views if published, else with 10-Center. None if the paper has no such
        result for the network.
    """
    network = results["network"]
    if "eval_boxes" in results:
        found = [row for row in reversed(PRECISIONS) if row.network == network]
        return next((row for row in found if row.version == ava_version(results)), found[0] if found else None)
    rows = [row for row in ACCURACIES if row.network == network] if TOP1 in stated_metrics(results) else []
    return next((row for row in rows if row.views == results["views"]), rows[0] if rows else None)


def differences(results: Mapping[str, Any], published: PublishedAccuracy | PublishedPrecision) -> list[str]:
    """Returns descriptions of how an evaluation differs from the paper's; none if the results are comparable.

    Args:
        results: the content of results.json.
        published: the published result of the same network.
    """
    if isinstance(published, PublishedPrecision):
        return _detection_differences(results, published)
    expansion = (VARIANTS | EFFICIENTNETS)[published.network].expansion
    size = expansion.clip.size if published.views.endswith("-Center") else expansion.test_size
    changed = _changed_options(results)
    kinetics = is_kinetics400(results)
    missing = _missing_videos(results)
    larger = size > expansion.clip.size  # otherwise all poolings agree
    found = {
        "other data": not kinetics,
        "other task": results.get("task") != "single_label",  # a task of your own may have other targets or clips
        "other split": kinetics and results["split"] not in _VALIDATION,
        str(missing): kinetics and missing is not None,
        "other views": results["views"] != published.views,
        "other clip starts": results.get("clip_starts", "offset") != "offset",
        "other frame sampling": results.get("frame_sampling", "slowfast") != "slowfast",
        "other crop": (results.get("resize"), results.get("crop")) != (expansion.test_size, size)
        or bool(results.get("stretch")),
        "other head pooling": larger and results.get("head_pool") != "fixed_probabilities",
        "views not averaged": results.get("combine", "mean") != "mean",
        f"other network ({', '.join(changed)})": bool(changed),
        "other network (the paper does not define its own)": published.network in EFFICIENTNETS,
    }
    return [name for name, holds in found.items() if holds]


def _detection_differences(results: Mapping[str, Any], published: PublishedPrecision) -> list[str]:
    size = VARIANTS[published.network].expansion.test_size
    changed = _changed_options(results) + (["head"] if results.get("head") != "full" else [])
    ava = ava_version(results) == published.version
    videos, frames = _missing_videos(results), results.get("key_frames_missing", 0)
    boxes = (results["eval_boxes"], results.get("lowest_score_of_a_box"))
    found = {
        "other data": not ava,
        "other task": results.get("task") != "detection",
        "other split": ava and results["split"] not in _VALIDATION,
        str(videos): ava and videos is not None,
        f"{frames} key frames missing": ava and frames != 0,
        "other boxes": boxes != ("proposals", 0.8),
        "other crop": (results.get("resize"), results.get("crop")) != (size, size),
        f"other network ({', '.join(changed)})": bool(changed),
    }
    return [name for name, holds in found.items() if holds]


def _missing_videos(results: Mapping[str, Any]) -> str | None:
    """Returns how the evaluated videos differ from the data set's list; None if they are complete."""
    expected, present = results.get("videos_expected"), results.get("videos_present")
    if expected is None or present is None:
        return "unknown number of videos"
    if expected == present:
        return None
    count = counted(abs(expected - present), "video")
    return f"{count} missing" if expected > present else f"{count} too many"


def ava_version(results: Mapping[str, Any]) -> str | None:
    """Returns the version of AVA that the records are of, "2.1" or "2.2".

    Returns None for other data sets, or if the evaluated actions are not AVA's 60.
    """
    version = _AVA.get(results.get("dataset", ""))
    return version if results["classes"] == 60 else None


def is_kinetics400(results: Mapping[str, Any]) -> bool:
    """Returns True if the records are of the data set Kinetics-400 and have its 400 classes."""
    return results.get("dataset") == _KINETICS and results["classes"] == 400


def _changed_options(results: Mapping[str, Any]) -> list[str]:
    used = results["options"] if isinstance(results.get("options"), Mapping) else results
    default = ModelOptions()
    return [name for name in _NETWORK_OPTIONS if used.get(name, getattr(default, name)) != getattr(default, name)]
