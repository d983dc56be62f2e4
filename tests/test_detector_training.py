"""Training and evaluation of action detectors: the loss, the steps, and a run from AVA's files to a report."""

import csv
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from evaluating import evaluate_run, watch_run
from key_frames import build_key_frames
from video_fixtures import numbered_frames, write_video

import x3d_tf
from x3d_tf import plots
from x3d_tf.config import Detection, Execution, Recipe, TrainConfig
from x3d_tf.data.ava_files import KeyFrame, read_boxes
from x3d_tf.data.datasets.spec import HELD_OUT, DatasetSpec
from x3d_tf.data.key_frames import key_frames_of
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError
from x3d_tf.evaluation.detection import score_split
from x3d_tf.evaluation.detection_reports import evaluate_files, score_detections
from x3d_tf.evaluation.validation import KeyFrameValidation
from x3d_tf.losses import BoxLoss
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.saving import load_detector
from x3d_tf.tasks.base import find
from x3d_tf.training import forward
from x3d_tf.training.checks import check_records
from x3d_tf.training.loop import train
from x3d_tf.training.schedule import build_schedule
from x3d_tf.training.step import TrainStep
from x3d_tf.training.transfer import load_pretrained

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ROOT = Path(__file__).parents[1]
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
TINY = x3d_tf.Expansion(gamma_tau=5, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
RECIPE = Recipe(batch=4, reference_batch=4, learning_rate=0.05, steps=6, warmup_fraction=1 / 6, weight_decay=1e-7)


def given(boxes: int, padding: int, clips: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns random clips with the given number of boxes each, and their labels."""
    draw = np.random.default_rng(0)
    corners = np.sort(draw.uniform(0, 1, (clips, boxes, 2, 2)), axis=2).reshape(clips, boxes, 4)
    labels = draw.integers(0, 2, (clips, boxes, 3)).astype("float32")
    pad = [(0, 0), (0, padding), (0, 0)]
    pixels = draw.integers(0, 256, (clips, 4, 32, 32, 3)).astype("float32")
    return {"clip": pixels, "boxes": np.pad(corners, pad).astype("float32")}, np.pad(labels, pad)


def test_the_loss_is_the_mean_over_boxes_and_classes() -> None:
    draw = np.random.default_rng(1)
    inputs, labels = given(3, 0)
    logits = draw.standard_normal((4, 3, 3)).astype("float32")
    inputs["boxes"][0, 1] = 0  # padding
    inputs["boxes"][2, 0] = inputs["boxes"][3, 0] = 1  # outside the crop
    real = np.ones((4, 3), bool)
    real[[0, 2, 3], [1, 0, 0]] = False
    p = 1 / (1 + np.exp(-logits[real]))
    expected = -np.mean(np.where(labels[real] > 0, np.log(p), np.log(1 - p)))
    loss, top1, left_out = BoxLoss()(tf.constant(logits), tf.constant(labels), inputs).values()
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    right = [row[scores.argmax()] for row, scores in zip(labels[real], logits[real])]
    assert float(top1) == pytest.approx(np.mean(right), abs=1e-6)
    assert float(left_out) == 2


def test_a_step_without_boxes_has_no_loss() -> None:
    inputs, labels = given(0, 2)
    loss, top1, left_out = BoxLoss()(tf.zeros((4, 2, 3)), tf.constant(labels), inputs).values()
    assert float(loss) == float(top1) == float(left_out) == 0


def state_after(padding: int = 0, parts: int = 1, monkeypatch: Any = None, **execution: Any) -> list[np.ndarray]:
    """Returns losses and weights after two steps on the same clips, for a given padding of the boxes."""
    import keras

    keras.utils.set_random_seed(0)
    if monkeypatch is not None:
        monkeypatch.setattr(forward, "num_batch_slices", lambda clips, group: parts)
    config = TrainConfig(TINY, recipe=RECIPE, dataset=DatasetSpec("unused"), execution=Execution(**execution))
    model = Detector(TINY, 3, x3d_tf.ModelOptions(dropout=0.0, bn_group=2))
    for layer in model.layers:
        if isinstance(layer, GhostBatchNorm):
            layer.gamma.assign(np.ones(layer.gamma.shape))
    step = TrainStep(model, config, tf.distribute.get_strategy(), BoxLoss(config.execution.accumulation))
    inputs, labels = given(3, padding)
    share = 4 // config.execution.accumulation
    stream = iter(tf.data.Dataset.from_tensor_slices((inputs, labels)).repeat().batch(share, drop_remainder=True))
    losses = [step(stream, 1)["loss"].numpy() for _ in range(2)]
    return [*losses, *(variable.numpy() for variable in model.variables)]


@functools.cache
def plain_state() -> list[np.ndarray]:
    return state_after()


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray], bound: float) -> None:
    for value, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=bound)


def test_padding_changes_nothing(eager: None, float64: None) -> None:
    assert_same(state_after(padding=5), plain_state(), 1e-10)


@pytest.mark.parametrize("recompute", ["nothing", pytest.param("activations", marks=pytest.mark.slow)])
def test_clips_in_parallel_and_recomputation(
    eager: None, monkeypatch: pytest.MonkeyPatch, float64: None, recompute: str
) -> None:
    sliced = state_after(parts=2, monkeypatch=monkeypatch, recompute=recompute)
    assert_same(sliced, plain_state(), 1e-10)


def compare_loss_on_devices(strategy: tf.distribute.Strategy) -> None:
    """Compares the loss on two devices with that on one; test_step.py calls this in its process with two devices."""
    inputs, labels = given(3, 2)
    inputs["boxes"][0] = 0  # different numbers of boxes per device
    logits = np.random.default_rng(1).standard_normal((4, 5, 3)).astype("float32")

    def loss(*batch: Any) -> list[Any]:
        return list(BoxLoss()(*batch).values())

    def one() -> list[Any]:
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        own_logits, own_labels, boxes, clip = (
            tf.gather(tf.reshape(array, (2, 2, *array.shape[1:])), number)
            for array in (logits, labels, inputs["boxes"], inputs["clip"])
        )
        return loss(own_logits, own_labels, {"boxes": boxes, "clip": clip})

    both = [strategy.reduce("SUM", part, None) for part in strategy.run(tf.function(one))]
    np.testing.assert_allclose(both, loss(tf.constant(logits), tf.constant(labels), inputs), atol=1e-6)


RUNS = """
import sys
sys.path[:0] = {tests!r}
import keras, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from pathlib import Path
import numpy as np
import test_detector_training as test
from x3d_tf import ModelOptions
if {execution!r} == "float64":
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    execution, group = test.Execution(), 2
else:  # one clip per device and micro-batch
    execution, group = test.Execution(precision={execution!r}, accumulation=2), 1
rates = dict(learning_rate=0.05, warmup_fraction=1 / 4)
recipe = test.Recipe(batch=4, reference_batch=4, steps=4, precise_bn_batches=2, **rates)
config = test.config_of(
    Path({folder!r}), recipe=recipe, execution=execution, model=ModelOptions(dropout=0.0, bn_group=group)
)
for name, devices in (("one", ["CPU:0"]), ("two", ["CPU:0", "CPU:1"])):
    run = test.train(config, Path({to!r}) / name, strategy=tf.distribute.MirroredStrategy(devices))
    np.savez(run.root / "weights", *test.load_detector(run.root).get_weights())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("execution", "bound"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_a_run_on_two_devices_is_that_on_one(folder: Path, tmp_path: Path, execution: str, bound: float) -> None:
    """In float32 with precise batch norm; in bfloat16 with two micro-batches."""
    code = RUNS.format(tests=TESTS, folder=str(folder), to=str(tmp_path), execution=execution)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (list(np.load(tmp_path / name / "weights.npz").values()) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert np.isfinite(ours).all()
        assert np.linalg.norm(ours - theirs) <= bound * max(np.linalg.norm(ours), 0.05)


def test_rates_fall_in_steps() -> None:
    shape = {"warmup_fraction": 0.1, "warmup_start": 0, "schedule": "steps", "decay_fractions": (0.5, 0.8)}
    recipe = Recipe(batch=512, learning_rate=1.6, steps=100, **shape)
    rates = [float(build_schedule(recipe)(step)) for step in (0, 10, 20, 99, 100, 159, 160, 199)]
    np.testing.assert_allclose(rates, [0, 0.4, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"decay_fractions": (0.5,)},
            'decay_fractions must be given if, and only if, Recipe.schedule is "steps"',
        ),
        ({"schedule": "steps"}, "must be given if, and only if"),
        ({"schedule": "steps", "decay_fractions": (0.5, 0.3)}, r"must be ascending .* in \[warmup_fraction = 0.2, 1\)"),
        ({"schedule": "steps", "decay_fractions": (0.5, 0.5)}, "must be ascending"),
        ({"schedule": "steps", "decay_fractions": (0.1,)}, "must be ascending"),
        ({"schedule": "steps", "decay_fractions": (1.0,)}, "must be ascending"),
        ({"schedule": "steps", "decay_fractions": (math.nan,)}, "must be ascending"),
        ({"warmup_fraction": 1}, r"Recipe.warmup_fraction must be in \[0, 1\), a fraction of the steps, got 1"),
        (
            {"warmup_fraction": math.nan},
            r"Recipe.warmup_fraction must be in \[0, 1\), a fraction of the steps, got nan",
        ),
    ],
)
def test_shares_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**{"warmup_fraction": 0.2, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of four training and three test key frames, one of the latter excluded."""
    root = tmp_path_factory.mktemp("ava")
    write_video(root / "videos" / "film.mp4", numbered_frames(240))
    boxes = ("0.1,0.1,0.4,0.9", "0.5,0.2,0.9,0.8")
    rows = [f"film,{903 + n // 2:04d},{boxes[n % 2]},{n % 2 + 1},{n % 2}\n" for n in range(8)]
    (root / "truth.csv").write_text("".join(rows))
    (root / "videos" / "clip.mp4").symlink_to("film.mp4")
    (root / "train.csv").write_text("".join(rows).replace("film", "clip"))
    near = ["film,0903,0.1,0.1,0.4,0.88,,0.9\n", "film,0904,0.1,0.1,0.4,0.5,,0.9\n", "film,0905,0,0,1,1,,0.5\n"]
    (root / "found.csv").write_text("".join(near))
    (root / "actions.pbtxt").write_text('item { name: "sit" id: 1 }\nitem { name: "wave" id: 2 }\n')
    (root / "out.csv").write_text("film,0906\n")
    truth = {"train": root / "train.csv", "test": root / "truth.csv"}
    out, found = {"test": root / "out.csv"}, {"test": root / "found.csv"}
    build_key_frames(
        root / "videos",
        root / "records",
        truth,
        proposals=found,
        exclusions=out,
        label_map=root / "actions.pbtxt",
        progress=False,
    )
    return root


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    fields = {
        "expansion": TINY,
        "dataset": DatasetSpec(str(folder / "records"), validation_split="test"),
        "recipe": RECIPE,
        "detection": Detection(eval_boxes="annotated"),
        "checkpoint_steps": 3,
    }
    return TrainConfig(**(fields | changes))


def short_run(folder: Path, **changes: Any) -> TrainConfig:
    """Returns the configuration of the fixture `run`: two steps, each with a checkpoint."""
    return config_of(folder, recipe=replace(RECIPE, steps=2, warmup_fraction=0.5), checkpoint_steps=1, **changes)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tf.config.run_functions_eagerly(True)  # tracing takes longer than six steps; slow tests train with traced ones
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "save_curves", lambda *_, **__: None)
            return train(short_run(folder), tmp_path_factory.mktemp("runs") / "detector")
    finally:
        tf.config.run_functions_eagerly(False)


def test_previews_name_the_key_frame_and_the_labels_of_its_boxes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_clips", lambda *given: drawn.extend(given))
    manifest = Manifest.load(folder / "records")
    find("detection").save_preview(config_of(folder), manifest, tmp_path / "a.png", 6)
    seconds, named = set(), set()
    for pixels, caption in zip(*drawn[:2]):
        first, *boxes = caption.splitlines()
        video, _, second = first.partition(", second ")
        grey = numbered_frames(240)[30 * (int(second) - 900), -1, -1]  # of the key frame, the third of the clip
        assert video == "clip" and np.abs(np.median(pixels[2], axis=(0, 1)) - grey).max() < 8
        seconds.add(int(second))
        named |= {name for line in boxes for name in line.partition(": ")[2].split(", ")}
    assert len(seconds) > 1 and named >= {"sit", "wave"}


def test_a_run_saves_a_detector(run: Any) -> None:
    model = load_detector(run.root)
    assert model.class_names == ("sit", "wave") and model.num_classes == 2
    assert run.preview.read_bytes().startswith(b"\x89PNG")
    rows = run.read_history()
    assert rows[-1]["step"] == 2 and 0 <= rows[-1]["validation_map"] <= 1
    assert all(row["boxes_left_out"] >= 0 for row in rows)
    contract = json.loads(run.input.read_text())
    assert (contract["resize"], contract["crop"]) == (TINY.test_size, TINY.test_size)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("boxes", ["annotated", "proposals"])
def test_its_report_matches_its_detections(
    folder: Path, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], boxes: str
) -> None:
    config = short_run(folder, detection=Detection(eval_boxes=boxes))
    run.config.write_text(config.to_json())
    try:
        report = evaluate_run(run, output=str(tmp_path / "report"))
    finally:
        run.config.write_text(short_run(folder).to_json())
    manifest = Manifest.load(folder / "records")
    found, scores = score_split(load_detector(run.root), manifest, "test", config.detection, progress=False)
    assert report.results["map"] == scores.mean and 0 < scores.mean <= 1
    assert report.results["key_frames_missing"] == 0
    assert (report.results["sample"], report.results["samples"]) == ("key frame", 3)
    assert report.results["gmacs_per_sample"] == report.results["gmacs_per_clip"] > 0
    table = capsys.readouterr().out
    assert f"{100 * scores.mean:.1f} %" in table and "3 key frames" in table and "centre crop of 36²" in table
    files = (report.folder / "detections.csv", folder / "truth.csv", folder / "actions.pbtxt", folder / "out.csv")
    _, of_files = evaluate_files(*files)
    assert of_files.key_frames == scores.key_frames and of_files.positives.tolist() == scores.positives.tolist()
    rounded = replace(found, boxes=found.boxes.round(3), scores=np.array([float(f"{x:.4f}") for x in found.scores]))
    truth = read_boxes(folder / "truth.csv", "ground truth", scores.actions)
    assert of_files.mean == score_detections(truth, rounded, scores.actions, {KeyFrame("film", 906)}).mean
    assert scores.key_frames == 3 and scores.positives.tolist() == [3, 3]  # one is excluded
    frames = [found.key_frames[number].second for number in found.frames]
    if boxes == "annotated":
        assert sorted(frames) == sorted([903, 904, 905] * 4)  # two boxes of two actions each
    else:
        assert sorted(frames) == [903, 903, 904, 904]  # one box per key frame has a high enough score
    written = read_boxes(report.folder / "detections.csv", "detections", {1: "sit", 2: "wave"})
    np.testing.assert_allclose(written.boxes, found.boxes, rtol=0, atol=5.1e-4)
    np.testing.assert_allclose(written.scores, found.scores, rtol=0, atol=5.1e-5)
    assert [written.key_frames[number].second for number in written.frames] == frames
    assert written.actions.tolist() == found.actions.tolist()
    with (report.folder / "per_class.csv").open() as file:
        assert [row["action"] for row in csv.DictReader(file)] == ["sit", "wave"]
    assert (report.folder / "per_class.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("eager")
def test_a_report_counts_key_frames_without_a_record(folder: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text((folder / "truth.csv").read_text() + "gone,0902,0.1,0.1,0.4,0.9,1,0\n" * 2)
    built = build_key_frames(
        folder / "videos",
        tmp_path / "records",
        {"train": folder / "train.csv", "test": tmp_path / "truth.csv"},
        label_map=folder / "actions.pbtxt",
        progress=False,
    )
    assert key_frames_of(built.manifest).listed["test"] == 5 and len(built.manifest.splits["test"].records) == 4
    run.config.write_text(short_run(tmp_path).to_json())
    try:
        report = evaluate_run(run, output=str(tmp_path / "report"))
    finally:
        run.config.write_text(short_run(folder).to_json())
    assert report.results["key_frames_missing"] == 1


@pytest.mark.usefixtures("eager")
def test_validation_on_a_subset_of_the_key_frames(folder: Path, run: Any) -> None:
    manifest, model = Manifest.load(folder / "records"), load_detector(run.root)
    every = [Detection(eval_boxes="annotated", validation_every=number) for number in (2, 452, 1000)]
    taken = KeyFrameValidation(model, manifest, "test", every[0])._manifest.splits["test"].records
    assert [record.media_id for record in taken] == ["film,0904"]
    assert 0 <= KeyFrameValidation(model, manifest, "test", every[1])()["map"] <= 1
    with pytest.raises(UserError, match=r"at least one key frame at a multiple of Detection\.validation_every = 1000"):
        KeyFrameValidation(model, manifest, "test", every[2])


def test_boxes_of_a_person_detector_are_required_where_they_are_evaluated(folder: Path) -> None:
    """Held-out key frames have the boxes of the split that they come from."""
    manifest = Manifest.load(folder / "records")
    assert manifest.key_frames is not None
    held_out = {HELD_OUT: manifest.split("train")}
    key_frames = replace(manifest.key_frames, proposals=("test",))
    manifest = replace(manifest, splits=manifest.splits | held_out, key_frames=key_frames)
    dataset = DatasetSpec(str(folder / "records"), validation_fraction=0.5)
    config = replace(config_of(folder, dataset=dataset), detection=Detection(eval_boxes="proposals"))
    with pytest.raises(UserError, match=r"^Detection\.eval_boxes must be \"annotated\" for split 'train' of"):
        find("detection").check(config, manifest)


def test_without_annotated_boxes_training_does_not_start(folder: Path, tmp_path: Path) -> None:
    """mAP would be undefined, in a validation or in the final evaluation."""
    manifest = Manifest.load(folder / "records")
    unlabelled = [record._replace(labels=()) for record in manifest.splits["test"].records]
    manifest = manifest.with_records("test", unlabelled)
    message = "split 'test' of .* must have annotated boxes of the evaluated actions"
    for validated in (None, "test"):
        dataset = DatasetSpec(str(folder / "records"), validation_split=validated)
        with pytest.raises(UserError, match=message):
            check_records(config_of(folder, dataset=dataset), manifest, find("detection"))


@pytest.mark.usefixtures("eager")
def test_checkpoints_of_a_detector_are_evaluated(run: Any) -> None:
    results = watch_run(run)
    assert sorted(results) == [1, 2]
    assert all(0 <= of_step["map"] <= 1 and of_step["samples"] == 3 for of_step in results.values())
    assert results[2]["map"] == run.read_history()[-1]["validation_map"]  # the test split is the validation split


def test_views_of_a_detector_cannot_be_set(run: Any) -> None:
    message = r"EvalConfig\.temporal_views must not be set for a detector, .* around each key frame, got 3"
    with pytest.raises(UserError, match=message):
        evaluate_run(run, temporal_views=3)


@pytest.mark.parametrize("head", ["full", "simple"])
def test_a_detector_starts_from_a_classifier(head: Any, tmp_path: Path) -> None:
    classifier = x3d_tf.build_x3d(TINY, num_classes=5)
    x3d_tf.save(classifier, tmp_path / "a.keras", tuple("abcde"))
    model = x3d_tf.build_detector(TINY, num_classes=3, head=head)
    transfer = load_pretrained(model, tmp_path / "a.keras")
    assert transfer.new == ("fc2",) and "res5_0_conv_a" in transfer.loaded
    for name in transfer.loaded:
        for ours, theirs in zip(model.get_layer(name).get_weights(), classifier.get_layer(name).get_weights()):
            np.testing.assert_array_equal(ours, theirs)
