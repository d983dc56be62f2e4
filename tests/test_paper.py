"""The paper's results, and whether reports are comparable with them. No TensorFlow."""

import csv
from pathlib import Path
from typing import Any

import pytest
from report_settings import detection_settings, settings

from x3d_tf import VARIANTS
from x3d_tf.evaluation.paper import (
    ACCURACIES,
    FIGURE_2_POINTS,
    FIGURE_3_POINTS,
    PRECISIONS,
    PublishedAccuracy,
    PublishedPrecision,
    differences,
    published_for,
)

EFFICIENTNET3D = ("efficientnet3d_b0", "efficientnet3d_b3", "efficientnet3d_b4")


def test_the_published_figures_are_the_papers(shared_data: Path) -> None:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "paper" and row["dataset"] == "K400"]
    for ours in ACCURACIES:
        for metric, value in (("top1", ours.top1), ("top5", ours.top5)):
            printed = {
                float(row["value"])
                for row in rows
                if row["model"].lower().replace("-", "_") == ours.network
                and row["metric"] == metric
                and row["split"] == "val"
                and row["views"] == {"10-LeftCenterRight": "30"}.get(ours.views, ours.views)
            }
            assert printed == ({value} if value is not None else set()), (ours, metric)
    assert {row.network for row in ACCURACIES} == {*VARIANTS, *EFFICIENTNET3D}


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
    published = published_for(results)
    assert isinstance(published, PublishedAccuracy) and published.top1 == 72.9
    assert differences(results, published) == expected


def test_the_published_precisions_are_the_papers(shared_data: Path) -> None:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "T8" and row["model"].startswith("X3D")]
    printed = {(row["model"], row["dataset"], row["metric"], row["note"]): float(row["value"]) for row in rows}
    expected = {}
    for ours in PRECISIONS:
        name = ours.network.upper().replace("_", "-"), f"AVA v{ours.version}"
        note = f"pretrain {ours.pretrained.replace('Kinetics-', 'K')}"
        expected |= {(*name, "mAP", note): ours.map, (*name, "gflops", note): ours.gmacs}
    assert {key: value for key, value in printed.items() if key[2] != "params"} == expected


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
    published = published_for(results)
    assert isinstance(published, PublishedPrecision) and published.map == map
    assert differences(results, published) == expected


def test_efficientnet3d_is_shown_beside_table_7_and_never_comparable() -> None:
    results = settings(network="efficientnet3d_b3", resize=187, crop=164, options={"family": "efficientnet3d"})
    published = published_for(results)
    assert isinstance(published, PublishedAccuracy)
    assert (published.top1, published.top5, published.source) == (72.4, 89.6, "Table 7")
    assert differences(results, published) == ["other network (the paper does not define its own)"]
    assert published_for(results | {"network": "efficientnet3d_matched_b3"}) is None


def test_thirty_views_are_compared_with_table_4() -> None:
    views = "10-LeftCenterRight"
    results = settings(network="x3d_m", views=views, resize=256, crop=256, head_pool="fixed_probabilities")
    published = published_for(results)
    assert isinstance(published, PublishedAccuracy) and (published.top1, published.source) == (76.0, "Table 4")
    assert differences(results, published) == []
    assert differences(results | {"head_pool": "global"}, published) == ["other head pooling"]
    assert published_for(settings(network="x3d(tau=1)")) is None
