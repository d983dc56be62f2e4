"""Settings and predictions of reports, as evaluations write them."""

from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.evaluation.classification_reports import Predictions, write_report
from x3d_tf.evaluation.interfaces import Report
from x3d_tf.evaluation.metrics import MAP, TOP1, TOP5
from x3d_tf.evaluation.reports import metrics_to_json

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def settings(**changes: Any) -> dict[str, Any]:
    """Returns the settings of X3D-S on Kinetics-400, evaluated as in the paper."""
    return {
        "network": "x3d_s",
        "records": "data/mine",
        "dataset": "kinetics400",
        "split": "val",
        "task": "single_label",
        "sample": "video",
        "metrics": metrics_to_json((TOP1, TOP5)),
        "samples": 40,
        "videos_expected": 40,
        "videos_present": 40,
        "classes": 400,
        "views": "10-Center",
        "gmacs_per_clip": 1.963,
        "gmacs_per_sample": 19.63,
        "params": 3_794_000,
        "resize": 182,
        "crop": 160,
        "clip_starts": "offset",
        "frame_sampling": "slowfast",
        "combine": "mean",
        "head_pool": "global",
        "options": {"swish": True, "dropout": 0.3},
    } | changes


def precision_of(value: float) -> dict[str, Any]:
    """Returns the entries of results.json for mAP."""
    return {"metrics": metrics_to_json((MAP,)), "map": value}


def write(folder: Path, settings: dict[str, Any], predictions: Predictions) -> Report:
    return write_report(folder, settings, predictions, predictions.measure())


def predictions(seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 6, 40)  # class g has no samples
    scores = draw.dirichlet(np.ones(7), 40).astype(np.float32)
    return Predictions(tuple(f"v{n}" for n in range(40)), NAMES, scores, np.eye(7, dtype=bool)[labels], exclusive=True)


def detection_settings(**changes: Any) -> dict[str, Any]:
    """Returns the settings of a detector evaluated as in the paper."""
    of_a_detector = {
        "network": "x3d_m",
        "head": "full",
        "task": "detection",
        "dataset": "ava_v2.2",
        "eval_boxes": "proposals",
        "lowest_score_of_a_box": 0.8,
        "resize": 256,
        "crop": 256,
        "views": "centre crop of 256²",
        "classes": 60,
        "key_frames_missing": 0,
        "gmacs_per_clip": 6.2,
        "gmacs_per_sample": 6.2,
        "sample": "key frame",
        **precision_of(0.25),
    }
    return settings(**(of_a_detector | changes))
