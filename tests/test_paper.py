"""The paper's results, and whether reports are comparable with them. No TensorFlow."""

import csv
from pathlib import Path
from typing import Any

import pytest
from report_settings import detection_settings, precision_of, settings

from x3d_tf import VARIANTS
from x3d_tf.evaluation.paper import (
    PUBLISHED,
    REPRODUCTIONS,
    differences,
    published_for,
    reproductions_for,
)
from x3d_tf.evaluation.paper_points import FIGURE_2_POINTS, FIGURE_3_POINTS

EFFICIENTNET3D = ("efficientnet3d_b0", "efficientnet3d_b3", "efficientnet3d_b4")


def rows_of(shared_data: Path) -> list[dict[str, str]]:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        return list(csv.DictReader(file))


DATASETS = {"kinetics400": "K400", "kinetics600": "K600", "charades": "Charades"}
DATASETS |= {"ava_v2.1": "AVA v2.1", "ava_v2.2": "AVA v2.2"}
METRICS = {"top1": "top1", "top5": "top5", "map": "mAP", "mean_of_top1_and_top5": "test_avg"}
VIEWS = {"10-LeftCenterRight": "30", "": "1 center crop"}
CHARADES_XL = "x3d(tau=12.5,t=16,s=2.786,w=1.45,b=2.25,d=5)"


def test_the_published_figures_are_the_papers(shared_data: Path) -> None:
    """Every figure is the only one that the paper has for its key, and top-5 is left out where the paper has none."""
    rows = [row for row in rows_of(shared_data) if row["source"] == "paper"]
    for ours in PUBLISHED:
        network = "x3d_xl" if ours.network == CHARADES_XL else ours.network
        found = [
            row
            for row in rows
            if row["model"].lower().replace("-", "_") == network
            and (row["dataset"], row["split"]) == (DATASETS[ours.dataset], ours.split)
            and row["views"] == VIEWS.get(ours.views, ours.views)
            and (ours.pretrained == "-" or row["note"] == f"pretrain {ours.pretrained.replace('Kinetics-', 'K')}")
        ]
        for metric, name in METRICS.items():
            printed = {float(row["value"]) for row in found if row["metric"] == name}
            assert printed == ({ours.figures[metric]} if metric in ours.figures else set()), (ours, metric)
    kinetics = {row.network for row in PUBLISHED if (row.dataset, row.split) == ("kinetics400", "val")}
    assert kinetics == {*VARIANTS, *EFFICIENTNET3D}
    assert {(row.network, row.dataset) for row in PUBLISHED if row.dataset != "kinetics400"} == {
        *(("x3d_m", "kinetics600"), ("x3d_xl", "kinetics600"), (CHARADES_XL, "charades")),
        *(("x3d_xl", "ava_v2.1"), ("x3d_m", "ava_v2.2"), ("x3d_xl", "ava_v2.2")),
    }


def test_the_reproductions_are_those_of_their_publishers(shared_data: Path) -> None:
    names = {"PySlowFast": "SlowFast MODEL_ZOO.md", "pytorchvideo": "pytorchvideo hub/x3d.py"}
    views = {"10-Center": "10-Center", "10-LeftCenterRight": "30-view"}
    ours = {(row.network, names[row.by], views[row.views], row.figures["top1"]) for row in REPRODUCTIONS}
    assert ours == {
        (row["model"].lower().replace("-", "_"), row["source"], row["views"], float(row["value"]))
        for row in rows_of(shared_data)
        if row["table"] == "ZOO"
    }
    assert len(ours) == len(REPRODUCTIONS) == 12 and all([*row.figures] == ["top1"] for row in REPRODUCTIONS)


def test_the_points_for_pictures_are_the_papers() -> None:
    """Typed in from section 4.1, Table 2 and appendix B; costs of 10 clips are ten times those of Table 2."""
    path = [("X2D", 0.02067, 47.75), ("γb", 0.0414, 55.0), ("X3D-XS", 0.6, 68.6), ("X3D-M", 4.73, 74.6)]
    path += [("X3D-L", 18.37, 76.8), ("X3D-XL", 35.84, 78.4)]
    beside = [("γd", 0.0414, 51.3), ("X3D-S", 1.96, 72.9)]
    assert [point[:3] for point in FIGURE_2_POINTS] == path + beside
    assert [point.joined for point in FIGURE_2_POINTS] == [False] + 5 * [True] + 2 * [False]
    costs = {"X3D-XS": 6.0, "X3D-M": 47.3, "X3D-L": 183.7, "X3D-XL": 358.4, "X3D-XXL": 1435, "CSN-50": 119}
    costs |= {"X3D-S": 19.6, "CSN-101": 159}
    first, *others = FIGURE_3_POINTS
    assert first == ("", 5.9, 71.4, 3, False)
    assert {point.name: point.gmacs for point in others} == pytest.approx(costs)
    assert {point.views for point in others} == {10}
    assert [point.name for point in others if point.joined] == ["X3D-S"] == [others[0].name]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"records": "kinetics/400/records"}, []),
        ({"dataset": "folder"}, ["other data"]),
        ({"dataset": "folder", "records": "k400_tiny", "videos_expected": None}, ["other data"]),
        ({"videos_expected": 19_877}, ["19837 videos missing"]),
        ({"videos_present": 41}, ["1 video too many"]),
        ({"videos_expected": None}, ["unknown number of videos"]),
        ({"frame_sampling": "exact"}, ["other frame sampling"]),
        ({"combine": "max"}, ["views not averaged"]),
        ({"head_pool": "fixed_logits"}, []),  # equal at the training size
        ({"classes": 10, "split": "test"}, ["other data"]),
        ({"task": "playback"}, ["other task"]),
        ({"task": None}, ["other task"]),
        ({"split": "test"}, ["other split"]),
        ({"views": "1-Center"}, ["other views"]),
        ({"crop": 182}, ["other crop"]),
        ({"clip_starts": "slowfast"}, ["other clip starts"]),
        ({"options": {"swish": False, "dropout": 0.0}}, ["other network (swish)"]),
    ],
)
def test_differences_from_the_paper_are_listed(changes: dict[str, Any], expected: list[str]) -> None:
    results = settings(**changes)
    (published,) = published_for(results)
    assert published.figures == {"top1": 72.9, "top5": 90.5}
    assert differences(results, published) == expected


@pytest.mark.parametrize(
    ("changes", "map", "expected"),
    [
        ({}, 23.2, []),
        ({"network": "x3d_xl", "dataset": "ava_v2.1", "resize": 356, "crop": 356}, 26.1, []),
        ({"network": "x3d_xl", "resize": 356, "crop": 356}, 27.4, []),
        ({"dataset": "ava_v2.1"}, 23.2, ["other data"]),
        ({"dataset": "ava", "records": "data/ava_v2.2"}, 23.2, ["other data"]),
        ({"videos_expected": 64}, 23.2, ["24 videos missing"]),
        ({"classes": 80}, 23.2, ["other data"]),
        ({"task": "people_only"}, 23.2, ["other task"]),
        ({"split": "test"}, 23.2, ["other split"]),
        ({"key_frames_missing": 12}, 23.2, ["12 key frames missing"]),
        ({"eval_boxes": "annotated"}, 23.2, ["other boxes"]),
        ({"lowest_score_of_a_box": 0.9}, 23.2, ["other boxes"]),
        ({"crop": 224}, 23.2, ["other crop"]),
        ({"head": "simple", "options": {"swish": False}}, 23.2, ["other network (swish, head)"]),
    ],
)
def test_detectors_are_compared_with_table_8(changes: dict[str, Any], map: float, expected: list[str]) -> None:
    results = detection_settings(**changes)
    (published,) = published_for(results)
    assert published.figures == {"map": map}
    assert differences(results, published) == expected


def test_efficientnet3d_is_shown_beside_table_7_and_never_comparable() -> None:
    results = settings(network="efficientnet3d_b3", resize=187, crop=164, options={"family": "efficientnet3d"})
    (published,) = published_for(results)
    assert (published.figures, published.source) == ({"top1": 72.4, "top5": 89.6}, "Table 7")
    assert differences(results, published) == ["other network (the paper does not define its own)"]
    assert published_for(results | {"network": "efficientnet3d_matched_b3"}) == ()


def test_thirty_views_are_compared_with_table_4() -> None:
    views = "10-LeftCenterRight"
    results = settings(network="x3d_m", views=views, resize=256, crop=256, head_pool="fixed_probabilities")
    (published,) = published_for(results)
    assert (published.figures["top1"], published.source) == (76.0, "Table 4")
    assert differences(results, published) == []
    assert differences(results | {"head_pool": "global"}, published) == ["other head pooling"]
    assert published_for(settings(network="x3d(tau=1)")) == ()


@pytest.mark.parametrize(
    ("changes", "figures", "source"),
    [
        ({"views": "10-Center"}, {"top1": 73.0, "top5": 90.8}, "Table 7"),
        ({"views": "10-LeftCenterRight"}, {"mean_of_top1_and_top5": 82.9}, "Table 4"),
        ({"views": "1-Center"}, {"top1": 73.0, "top5": 90.8}, "Table 7"),
        ({"dataset": "folder"}, {"top1": 74.6, "top5": 91.7}, "Table 2"),
    ],
)
def test_test_videos_of_kinetics_have_figures_of_their_own(
    changes: dict[str, Any], figures: dict[str, float], source: str
) -> None:
    results = settings(network="x3d_m", split="test", resize=256, crop=224) | changes
    (published,) = published_for(results)
    assert (published.figures, published.source) == (figures, source)
    assert "other split" not in differences(results, published)
    assert ("other views" in differences(results, published)) == (results["views"] == "1-Center")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"classes": 400}, ["other data"]),
        ({"dataset": "kinetics700"}, ["other data"]),
        ({"split": "test"}, ["other split"]),
        ({"videos_expected": 41}, ["1 video missing"]),
        ({"views": "10-Center", "crop": 224}, ["other views", "other crop"]),
        ({"combine": "max"}, ["views not averaged"]),
    ],
)
def test_kinetics_600_is_compared_with_table_5(changes: dict[str, Any], expected: list[str]) -> None:
    protocol: dict[str, Any] = {"resize": 256, "crop": 256, "head_pool": "fixed_probabilities"}
    results = settings(network="x3d_m", dataset="kinetics600", classes=600, views="10-LeftCenterRight", **protocol)
    (published,) = published_for(results)
    assert (published.figures, published.source) == ({"top1": 78.8, "top5": 94.5}, "Table 5")
    assert differences(results | changes, published) == expected


def charades(**changes: Any) -> dict[str, Any]:
    """Returns the settings of X3D-XL on Charades, evaluated as in the paper."""
    of_recipe = {"network": CHARADES_XL, "dataset": "charades", "split": "test", "task": "multi_label", "classes": 157}
    of_recipe |= {"views": "10-LeftCenterRight", "resize": 356, "crop": 356, "combine": "max"}
    of_recipe |= {"frame_sampling": "exact", "head_pool": "fixed_probabilities", **precision_of(0.43)}
    return settings(**(of_recipe | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"combine": "mean"}, ["views averaged"]),
        ({"frame_sampling": "slowfast"}, ["other frame sampling"]),
        ({"views": "1-LeftCenterRight"}, ["other views"]),
        ({"split": "train"}, ["other split"]),
        ({"videos_present": 39}, ["1 video missing"]),
        ({"head_pool": "global"}, ["other head pooling"]),
        ({"dataset": "folder"}, ["other data"]),
    ],
)
def test_charades_is_compared_with_table_6(changes: dict[str, Any], expected: list[str]) -> None:
    """The pre-training is not part of a report, so both of the paper's figures are given."""
    published = published_for(charades(**changes))
    trained = {row.pretrained: row.figures for row in published}
    assert trained == {"Kinetics-400": {"map": 43.4}, "Kinetics-600": {"map": 47.1}}
    assert [differences(charades(**changes), row) for row in published] == [expected, expected]
    assert published_for(charades(network="x3d_xl")) == ()  # with the stride of Kinetics


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clip_starts": "slowfast"}, {"PySlowFast": (75.1, [])}),
        ({}, {"PySlowFast": (75.1, ["other clip starts"])}),
        ({"split": "test", "clip_starts": "slowfast"}, {"PySlowFast": (75.1, ["other split"])}),
        ({"network": "x3d_xl"}, {}),
        ({"dataset": "kinetics600"}, {}),
        ({"classes": 600}, {}),
    ],
)
def test_reproductions_are_of_their_own_protocol(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    results = settings(network="x3d_m", resize=256, crop=224) | changes
    found = {row.by: (row.figures["top1"], differences(results, row)) for row in reproductions_for(results)}
    assert {by: found[by] for by in found if by == "PySlowFast"} == expected
    assert [*found] == ["PySlowFast", "pytorchvideo"] * bool(expected)


def test_thirty_views_have_two_reproductions() -> None:
    views: dict[str, Any] = {"views": "10-LeftCenterRight", "resize": 256, "crop": 256, "clip_starts": "slowfast"}
    results = settings(network="x3d_m", head_pool="fixed_probabilities", **views)
    found = {row.by: (row.figures["top1"], differences(results, row)) for row in reproductions_for(results)}
    assert found == {"PySlowFast": (76.2, []), "pytorchvideo": (75.94, ["unknown clip starts"])}
