"""The rows and the naive loop of benchmarks/multi_view.py. The times themselves are not checked."""

from pathlib import Path

from moving_square import write_records
from multi_view import ALONE, EVALUATION, NAIVE, first_videos, measure, table, waiting

import x3d_tf
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.types import ViewSpec


def test_the_naive_loop_equals_the_evaluation(tmp_path: Path) -> None:
    write_records(tmp_path / "records", 4)
    manifest = first_videos(Manifest.load(tmp_path / "records"), "train", 2)
    tiny = x3d_tf.Expansion(gamma_tau=2, gamma_t=2, gamma_s=32 / 112, gamma_b=2.25, gamma_d=0.2)
    x3d_tf.save(x3d_tf.build_x3d(tiny, num_classes=2), tmp_path / "a.keras", ["left", "right"])
    model = open_classifier(tmp_path / "a.keras")
    views = ViewSpec(temporal_views=2, spatial_crops=3, resize=40, crop=32)
    seconds, difference = measure(model, manifest, "train", views, rounds=1)
    assert {name: len(values) for name, values in seconds.items()} == {EVALUATION: 1, ALONE: 1, NAIVE: 1}
    assert difference < 1e-6
    assert waiting(model, manifest, "train", views)["core-ms to make a view"] > 0


def test_the_table_compares_within_rounds() -> None:
    seconds = {EVALUATION: [2.0, 4.0, 8.0], ALONE: [1.0, 4.0, 4.0], NAIVE: [4.0, 8.0, 40.0]}
    header, *rows = table(seconds, views=10)
    assert header.split() == ["ms/view", "p10", "-", "p90", "views/s", "speed"]
    assert [(row.split()[-1], row.split()[-2]) for row in rows] == [
        ("0.50", "2.50"),
        ("1.00", "2.50"),
        ("0.25", "1.25"),
    ]
    assert rows[0].startswith("evaluation ") and "240.0 - 720.0" in rows[0]
