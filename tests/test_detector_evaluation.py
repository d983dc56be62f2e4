"""Evaluation of detectors on other records, splits and boxes than those of the run, and from model files."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluating import evaluate_file, evaluate_run
from key_frames import build_key_frames
from video_fixtures import numbered_frames, write_video

import x3d_tf
from x3d_tf import evaluate
from x3d_tf.config import Detection, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.base import find

pytestmark = pytest.mark.usefixtures("unoptimized_module")

TINY = x3d_tf.Expansion(gamma_tau=5, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
BOXES = ("0.1,0.1,0.4,0.9", "0.5,0.2,0.9,0.8")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key frames of the actions sit and wave: two with two boxes each for training, three with one each for testing.

    Those for testing have a person detector's boxes with the scores 0.9, 0.9 and 0.6.
    """
    root = tmp_path_factory.mktemp("ava")
    write_video(root / "videos" / "film.mp4", numbered_frames(240))
    (root / "videos" / "clip.mp4").symlink_to("film.mp4")
    both = [f"clip,{second:04d},{box},{n + 1},0\n" for second in (903, 904) for n, box in enumerate(BOXES)]
    (root / "train.csv").write_text("".join(both))
    one = [f"film,{second:04d},{BOXES[second % 2]},{second % 2 + 1},0\n" for second in (904, 905, 906)]
    (root / "test.csv").write_text("".join(one))
    found = [f"film,{second:04d},{BOXES[0]},,{score}\n" for second, score in ((904, 0.9), (905, 0.9), (906, 0.6))]
    (root / "found.csv").write_text("".join(found))
    (root / "actions.pbtxt").write_text('item { name: "sit" id: 1 }\nitem { name: "wave" id: 2 }\n')
    build_key_frames(
        root / "videos",
        root / "records",
        {"train": root / "train.csv", "test": root / "test.csv"},
        proposals={"test": root / "found.csv"},
        label_map=root / "actions.pbtxt",
        progress=False,
    )
    return root / "records"


def save_detector(path: Path, *class_names: str) -> Path:
    """Saves a detector whose scores of a class depend on its name only, not on the other classes."""
    import keras

    keras.utils.set_random_seed(0)
    model = x3d_tf.build_detector(TINY, num_classes=len(class_names))
    draws = [np.random.default_rng(list(name.encode())).normal(0, 3, 2048) for name in class_names]
    model.get_layer("fc2").kernel.assign(np.stack(draws, axis=1))
    x3d_tf.save(x3d_tf.portable(model, class_names), path)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(tmp_path_factory.mktemp("model") / "detector.keras", "sit", "wave")


@pytest.fixture
def run(detector: Path, records: Path, tmp_path: Path) -> RunFolder:
    """Finished run folder, created without training."""
    run = RunFolder(tmp_path / "run")
    run.open(TrainConfig(TINY, dataset=DatasetSpec(str(records)), detection=Detection(eval_boxes="proposals")), {})
    shutil.copy(detector, run.model)
    return run


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "detections.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.usefixtures("eager")
def test_a_model_file_is_evaluated_by_the_names_of_its_classes(detector: Path, records: Path, tmp_path: Path) -> None:
    """A detector of more actions in another order gives the same report."""
    settings: dict[str, Any] = {"records": str(records), "split": "train", "eval_boxes": "annotated"}
    report = evaluate_file(detector, output=str(tmp_path / "a"), **settings)
    other = save_detector(tmp_path / "other.keras", "wave", "jump", "sit")
    same = evaluate_file(other, output=str(tmp_path / "b"), **settings)
    assert rows_of(report.folder) == rows_of(same.folder) and len(rows_of(report.folder)) == 2 * 2 * 2
    differing = {name for name, value in report.results.items() if same.results[name] != value}
    costs = {"params", "params_paper", "gmacs_per_clip", "gmacs_per_sample"}
    assert differing == {"weights", "weights_sha256", *costs}
    results = report.results
    assert (results["split"], results["samples"], results["classes"], results["seed"]) == ("train", 2, 2, None)
    assert (results["eval_boxes"], results["lowest_score_of_a_box"]) == ("annotated", 0.8)
    assert 0 < results["map"] <= 1 and "training" not in results


@pytest.mark.usefixtures("eager")
def test_a_run_is_evaluated_on_other_boxes_and_splits(run: RunFolder, records: Path) -> None:
    cases: dict[str, tuple[dict[str, Any], int]] = {  # folder: settings, boxes
        "records_test_proposals": ({}, 2),
        "records_test_proposals_score0.5": ({"box_score": 0.5}, 3),
        "records_test_annotated": ({"eval_boxes": "annotated"}, 3),
        "records_train_annotated": ({"split": "train", "eval_boxes": "annotated"}, 4),
    }
    for name, (settings, boxes) in cases.items():
        report = evaluate_run(run, **settings)
        assert report.folder == run.evaluations / name
        assert report.results["boxes"] == len(rows_of(report.folder)) == 2 * boxes  # one row for each action
        assert report.results["training"]["settings_sha256"] == run.read_config().fingerprint()
    elsewhere = evaluate_run(run, records=str(records), output=str(run.root / "other"))
    assert elsewhere.results["map"] == evaluate_run(run, overwrite=True).results["map"]


def test_records_that_do_not_suit_the_detector_are_refused_at_once(
    detector: Path, records: Path, tmp_path: Path, in_process: Callable[..., None]
) -> None:
    flags = [f"--records={records}", f"--output={tmp_path / 'out'}"]
    message = (
        r'^EvalConfig.eval_boxes must be "annotated" for split \'train\' of .*, which was built without --proposals'
    )
    with pytest.raises(UserError, match=message):
        in_process(evaluate, f"--model={detector}", "--split=train", *flags)
    other = save_detector(tmp_path / "other.keras", "sit", "jump")
    with pytest.raises(UserError, match=r"records has 1 class unknown to the model: wave\. The model has 2: sit, jump"):
        in_process(evaluate, f"--model={other}", "--split=test", *flags)
    with pytest.raises(UserError, match=r"EvalConfig\.spatial_crops must not be set for a detector, .*, got 3"):
        in_process(evaluate, f"--model={detector}", "--split=test", "--crops=3", *flags)
    with pytest.raises(UserError, match="has no split 'val'; it has train, test"):
        in_process(evaluate, f"--model={detector}", "--split=val", *flags)
    assert not (tmp_path / "out").exists()


def test_settings_of_boxes_are_checked() -> None:
    with pytest.raises(UserError, match=r"EvalConfig\.box_score must be in \[0, 1\], got 1.5"):
        EvalConfig(box_score=1.5)
    with pytest.raises(TypeError, match=r"EvalConfig\.eval_boxes must be one of proposals, annotated or None"):
        EvalConfig(eval_boxes="all")  # type: ignore[arg-type]


def test_classifiers_have_no_boxes() -> None:
    model = x3d_tf.X3D(TINY, 2, x3d_tf.ModelOptions())
    model.class_names = ("a", "b")
    manifest: Any = SimpleNamespace(task="single_label", classes=("a", "b"), folder=Path("records"))
    for settings in (EvalConfig(eval_boxes="annotated"), EvalConfig(box_score=0.5)):
        with pytest.raises(UserError, match=r"must not be set for the task single_label, which has no boxes, got "):
            find("single_label").check_evaluation(model, settings, manifest)
