"""Validation during training: the held-out videos and the score."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import HELD_OUT, DatasetSpec, hold_out, open_dataset, open_for_training
from x3d_tf.data.records.index import Record, Shard, Split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation import validation as validation_module
from x3d_tf.evaluation.classification_reports import Predictions
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.multiview import SplitPredictions
from x3d_tf.evaluation.validation import ClipValidation
from x3d_tf.tasks.classification import ClipTask, SingleLabel
from x3d_tf.types import Metric, Storage

pytestmark = pytest.mark.usefixtures("unoptimized_module")

TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=6, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)


def manifest_of(counts: dict[int, int], task: str = "single_label") -> Manifest:
    labels = [label for label, count in counts.items() for _ in range(count)]
    records = tuple(Record(0, 12, 100, 10, 30.0, (label,), f"{label}/{i}") for i, label in enumerate(labels))
    split = Split((Shard("train-0", 1000, ""),), records)
    names = tuple(str(label) for label in counts)
    return Manifest(Path("unused"), "mine", names, {"train": split}, {}, Storage(256, 95), task)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "records" not in request.fixturenames:
        monkeypatch.setattr(Manifest, "split", lambda manifest, name: manifest.splits[name])


def spec(fraction: float) -> DatasetSpec:
    return DatasetSpec(records="unused", validation_fraction=fraction)


def test_a_part_of_each_class_is_held_out() -> None:
    manifest = manifest_of({0: 20, 1: 10, 2: 2, 3: 1})
    splits = hold_out(manifest, spec(0.2)).splits
    counts = {name: np.bincount([r.labels[0] for r in split.records], minlength=4) for name, split in splits.items()}
    assert counts[HELD_OUT].tolist() == [4, 2, 1, 0]
    assert counts["train"].tolist() == [16, 8, 1, 1]
    names = {name: {record.media_id for record in split.records} for name, split in splits.items()}
    assert not names["train"] & names[HELD_OUT]
    assert len(manifest.splits["train"].records) == 33  # the original is unchanged


def test_segments_of_a_file_stay_together() -> None:
    """Some files have segments of two classes; segments are named as those of a csv with start and end."""
    whole = manifest_of({0: 12, 1: 12})
    pieces = tuple(
        record._replace(video=f"{i // 3}.mp4", start=float(i), end=None if i % 2 else i + 1.5)
        for i, record in enumerate(whole.splits["train"].records[2:])
    )
    manifest = dataclasses.replace(whole, splits={"train": Split(whole.splits["train"].shards, pieces)})
    splits = hold_out(manifest, spec(0.3)).splits
    files = {name: {record.video for record in split.records} for name, split in splits.items()}
    assert not files["train"] & files[HELD_OUT]
    assert files["train"] | files[HELD_OUT] == {f"{i}.mp4" for i in range(8)}


def test_clips_of_a_recording_stay_together() -> None:
    """They show nearly the same."""
    whole = manifest_of({0: 40})
    clips = tuple(
        record._replace(video=f"{i:02d}", recording=f"film {i // 4}")
        for i, record in enumerate(whole.splits["train"].records)
    )
    manifest = dataclasses.replace(whole, splits={"train": Split(whole.splits["train"].shards, clips)})
    splits = hold_out(manifest, spec(0.2)).splits
    films = {name: {record.recording for record in split.records} for name, split in splits.items()}
    assert not films["train"] & films[HELD_OUT] and len(films[HELD_OUT]) == 2 and len(splits[HELD_OUT].records) == 8


def test_the_choice_depends_on_names_alone() -> None:
    manifest = manifest_of({0: 20})
    split = manifest.splits["train"]
    shuffled = dataclasses.replace(manifest, splits={"train": Split(split.shards, split.records[::-1])})
    chosen = [
        {record.media_id for record in hold_out(m, spec(0.2)).splits[HELD_OUT].records} for m in (manifest, shuffled)
    ]
    order = sorted(split.records, key=lambda record: hashlib.sha256(f"0:{record.video}".encode()).digest())
    assert chosen[0] == chosen[1] == {record.media_id for record in order[:4]}


def test_the_fingerprint_stays_that_of_the_stored_records() -> None:
    manifest = manifest_of({0: 20})
    held_out = hold_out(manifest, spec(0.2))
    assert held_out.fingerprint() == manifest.fingerprint()
    assert dataclasses.replace(held_out, original=None).fingerprint() != manifest.fingerprint()


def test_evaluations_know_the_split_held_out(records: Path) -> None:
    dataset = DatasetSpec(str(records), eval_split="train", validation_fraction=0.3)
    manifest = open_dataset(dataset)
    assert {name: len(split.records) for name, split in manifest.splits.items()} == {"train": 3, HELD_OUT: 2}
    opened, resolved = open_for_training(dataset)
    assert (opened, resolved) == (manifest, dataset)
    config = TrainConfig(dataset=dataset)
    assert open_dataset(EvalConfig(split=HELD_OUT).dataset_of(config)) == manifest
    # Other records are not divided: the videos held out were those of the training records.
    assert HELD_OUT not in open_dataset(EvalConfig(records=str(records)).dataset_of(config)).splits


def test_nothing_is_held_out_by_default() -> None:
    manifest = manifest_of({0: 4})
    assert hold_out(manifest, spec(0)) is manifest


def test_too_few_videos_to_hold_out() -> None:
    with pytest.raises(ValueError, match="requires at least two videos of a class in split 'train'"):
        hold_out(manifest_of({0: 1, 1: 1}), spec(0.5))
    twice = hold_out(manifest_of({0: 4}), spec(0.5))
    with pytest.raises(ValueError, match=r'set DatasetSpec.validation_split="validation" instead'):
        hold_out(twice, spec(0.5))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moving_square import write_records

    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=5)
    return folder


def test_a_score_is_that_of_the_middle_clips(records: Path) -> None:
    model = x3d_tf.X3D(TINY, 2, x3d_tf.ModelOptions())
    manifest = Manifest.load(records)
    validation = SingleLabel().validation(model, TrainConfig(TINY), manifest, "train")
    clips, labels = next(iter(x3d_tf.dataset(records, TINY.clip, split="train", training=False, batch=5)))
    for shift in (0.0, 0.3):  # different weights, the same compiled function
        model.get_layer("fc2").bias.assign([shift, 0])
        logits = model(clips).numpy().astype("float64")
        log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        score = validation()
        assert [metric.name for metric in validation.metrics] == list(score)
        assert score["top1"] == np.mean(logits.argmax(axis=1) == labels.numpy())
        assert score["loss"] == pytest.approx(-np.mean(log[range(5), labels.numpy()]), rel=1e-4)
    best, worst, second = {"top1": 0.5, "loss": 0.9}, {"top1": 0.4, "loss": 0.0}, {"top1": 0.5, "loss": 1.0}
    assert sorted((best, worst, second), key=validation.rank) == [worst, second, best]


class Distances(ClipTask):
    """Measures how far the predicted class is from the label, and the share of the longest distance."""

    name = "distances"
    found: tuple[Metric, ...] = (Metric("distance", "number", better="lower"), Metric("farthest", "share"))

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        return self.found

    def score(self, predictions: Predictions) -> dict[str, Any]:
        distances = np.abs(predictions.probabilities.argmax(axis=1) - predictions.labels)
        farthest = (distances == len(predictions.class_names) - 1).mean()
        return {"distance": np.float32(distances.mean()), "farthest": farthest, "videos": list(predictions.videos)}


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function from a task to its validation of four videos, without running the network."""
    probabilities = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.25, 0.5, 0.25]])
    found = SplitPredictions(probabilities, np.array([0, 2, 2, 2]))
    monkeypatch.setattr(validation_module, "predict_split", lambda *_, **__: found)
    model = x3d_tf.X3D(TINY, 3, x3d_tf.ModelOptions())
    model.class_names = ("0", "1", "2")
    manifest = manifest_of({0: 1, 1: 1, 2: 2})
    return lambda task: task.validation(model, TrainConfig(TINY), manifest, "train")


def test_a_validation_measures_the_metrics_of_the_task(validate: Any) -> None:
    validation: ClipValidation = validate(Distances())
    assert [metric.name for metric in validation.metrics] == ["distance", "farthest", "loss"]
    scores = validation()
    assert scores == {"distance": 0.75, "farthest": 0.25, "loss": pytest.approx(1.5 * np.log(2))}
    assert type(scores["distance"]) is float
    near, far = {"distance": 0.5, "farthest": 0.0, "loss": 2.0}, {"distance": 0.75, "farthest": 1.0, "loss": 0.0}
    assert sorted((near, far, near | {"loss": 1.0}), key=validation.rank) == [far, near, near | {"loss": 1.0}]
    assert list(validate(SingleLabel())()) == ["top1", "loss"]  # top-5 says nothing about three classes


def test_a_task_may_measure_a_loss_of_its_own(validate: Any) -> None:
    class Own(Distances):
        found = (Metric("loss", "loss"), TOP1)

        def score(self, predictions: Predictions) -> dict[str, Any]:
            return {"loss": -3.0, "top1": 0.5}

    validation = validate(Own())
    assert [metric.name for metric in validation.metrics] == ["loss", "top1"]
    assert validation() == {"loss": -3.0, "top1": 0.5}
    assert validation.rank({"loss": -4.0, "top1": 0.0}) > validation.rank({"loss": -3.0, "top1": 1.0})


@pytest.mark.parametrize("value", [None, 1.5, float("nan"), "high"])
def test_a_metric_without_a_valid_value_is_an_error(validate: Any, value: object) -> None:
    class Wrong(Distances):
        def score(self, predictions: Predictions) -> dict[str, Any]:
            return {"distance": 1, "farthest": value}

    with pytest.raises(UserError, match=rf"^farthest must be in \[0, 1\], got {value!r}$"):
        validate(Wrong())()


def test_the_metrics_of_a_task_are_checked_before_training() -> None:
    """Not by the evaluation, after hours of training."""

    class Twice(Distances):
        found = (TOP1, TOP1)

    class Nothing(Distances):
        found = ()

    manifest, config = manifest_of({0: 2, 1: 2}), TrainConfig(TINY)
    SingleLabel().check(config, manifest)
    with pytest.raises(UserError, match=r"the names of metrics must be distinct, got \['top1', 'top1'\]"):
        Twice().check(config, manifest)
    with pytest.raises(UserError, match=r"metrics must be a list of 1 to 20, got \[\]"):
        Nothing().check(config, manifest)
