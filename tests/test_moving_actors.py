"""A detector learns the synthetic AVA of `moving_actors`; one that ignores the boxes cannot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import evaluate_run
from key_frames import build_key_frames
from moving_actors import ACTIONS, ACTOR, FPS, KEY_SECONDS, SIDE, actors_of, frames_of, write_films

import x3d_tf
from x3d_tf.config import Detection, Recipe, TrainConfig
from x3d_tf.data.ava_files import read_boxes, read_label_map
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.training.loop import train

SMALL = x3d_tf.Expansion(gamma_tau=4, gamma_t=8, gamma_s=1.5, gamma_b=2.25)
TRAIN, TEST = range(150), range(1000, 1030)


def test_a_film_matches_its_annotations(tmp_path: Path) -> None:
    write_films(tmp_path, "train", range(2))
    actions = read_label_map(tmp_path / "actions.pbtxt")
    assert actions == ACTIONS
    truth = read_boxes(tmp_path / "train.csv", "ground truth", actions)
    assert len(truth.key_frames) == 2 * len(KEY_SECONDS)
    frames, actors = frames_of(0), actors_of(0)
    for key, second in enumerate(KEY_SECONDS):
        middle = (second - 900) * FPS
        for actor in actors:
            for number in (middle - 12, middle, middle + 12):
                x, y = np.round(actor.corners[key] + (number - middle) * actor.velocities[key]).astype(int)
                shown = frames[number, y : y + ACTOR, x : x + ACTOR]
                np.testing.assert_array_equal(shown, actor.picture)  # inside the frame and not occluded
            assert 1 <= len(actor.actions(key)) <= 2
    boxes = truth.boxes[[truth.key_frames[number] == ("train_0000", 904) for number in truth.frames]] * SIDE
    expected = np.array([actor.corners[1] for actor in actors])
    apart = np.abs(boxes[:, None, :2] - expected).max(axis=-1)  # of each row to each actor
    assert (apart.min(axis=1) < 0.2).all() and set(apart.argmin(axis=1)) == {0, 1, 2, 3}


def config_of(records: Path, head: Any) -> TrainConfig:
    return TrainConfig(
        SMALL,
        x3d_tf.ModelOptions(input="difference"),
        DatasetSpec(str(records), flip=False),
        Recipe(batch=8, reference_batch=8, learning_rate=0.1, steps=500, warmup_fraction=0.05),
        detection=Detection(head=head, negatives=True),
        checkpoint_steps=125,
    )


@pytest.mark.slow
def test_only_a_detector_that_uses_the_boxes_learns(tmp_path: Path) -> None:
    """Trains on videos and evaluates on folders of images, with proposals in both, some of them without an actor."""
    write_films(tmp_path, "train", TRAIN)
    write_films(tmp_path, "test", TEST, images=True)
    splits = ("train", "test")
    built = build_key_frames(
        tmp_path / "videos",
        tmp_path / "records",
        {split: tmp_path / f"{split}.csv" for split in splits},
        proposals={split: tmp_path / f"{split}_found.csv" for split in splits},
        exclusions={split: tmp_path / f"{split}_excluded.csv" for split in splits},
        label_map=tmp_path / "actions.pbtxt",
        short_side=SIDE,
    )
    assert built.failures == 0
    counts = {split: len(part.records) for split, part in built.manifest.splits.items()}
    assert counts == {"train": 4 * len(TRAIN) - 1, "test": 4 * len(TEST) - 1}
    results = {}
    for head in ("full", "frame"):
        run = train(config_of(tmp_path / "records", head), tmp_path / head)
        report = evaluate_run(run).results
        assert report["boxes"] == 5 * counts["test"] * len(ACTIONS)  # four actors and one box without an actor
        results[head] = report["map"]
    print(f"frame mAP with RoIAlign {results['full']:.4f}, without {results['frame']:.4f}")
    assert results["full"] > 0.9
    assert results["frame"] < 0.6
