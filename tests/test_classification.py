"""Evaluation with several views compared with a naive loop; reports, sweeps and watched runs."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluating import evaluate_file, evaluate_run, sweep_file, sweep_run, watch_run
from report_settings import precision_of

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.index import OfficialSplit
from x3d_tf.errors import UserError
from x3d_tf.evaluation import classification, running
from x3d_tf.evaluation import sweep as sweep_module
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.multiview import SplitPredictions
from x3d_tf.evaluation.reports import read_results, settings_of
from x3d_tf.runs import checkpoints as run_checkpoints
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks import classification as task_module
from x3d_tf.tasks.base import find
from x3d_tf.types import Storage

pytestmark = pytest.mark.usefixtures("unoptimized_module")

# One block a stage; 64 pixels, for the larger crop of 73 has more than one window of the head's fixed poolings.
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=4, gamma_s=64 / 112, gamma_b=1, gamma_d=0.2)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moving_square import write_records

    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=5)
    return folder


@pytest.fixture(scope="module")
def network() -> x3d_tf.X3D:
    """Untrained network with weights that give each video different probabilities."""
    import keras

    keras.utils.set_random_seed(3)
    model = x3d_tf.X3D(TINY, 2, x3d_tf.ModelOptions())
    model.get_layer("fc2").kernel.assign(np.random.default_rng(0).normal(0, 3, (2048, 2)))
    model.class_names = ("left", "right")
    return model


@pytest.fixture(scope="module")
def saved(network: x3d_tf.X3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "model.keras"
    x3d_tf.save(x3d_tf.portable(network, network.class_names), file)
    return file


@pytest.fixture
def loaded(network: x3d_tf.X3D, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not build the network of the file again, because the test replaces its predictions."""
    monkeypatch.setattr(sweep_module, "load_any", lambda _: network)


@pytest.fixture
def run(records: Path, saved: Path, tmp_path: Path) -> RunFolder:
    """Finished run folder, created without training."""
    run = unfinished(records, tmp_path / "run")
    shutil.copy(saved, run.model)
    return run


def unfinished(records: Path, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    dataset = DatasetSpec(records=str(records), eval_split="train", flip=False)
    run.open(TrainConfig(expansion=TINY, dataset=dataset, test_views=2), {})
    return run


def probabilities_in(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open(encoding="utf-8") as file:
        return np.array([[float(row["p(left)"]), float(row["p(right)"])] for row in csv.DictReader(file)])


def naive_probabilities(network: x3d_tf.X3D, records: Path, size: int, starts: list[int]) -> np.ndarray:
    """Averages the softmax of each 2 x 2 window of conv5 and each clip of four frames, one at a time."""
    import keras
    import tensorflow as tf

    from x3d_tf.data.records.format import parse_frames

    conv5 = keras.Model(network.input, network.get_layer("conv5").output)
    fc1, fc2 = np.asarray(network.get_layer("fc1").kernel), network.get_layer("fc2")
    videos = []
    for serialized in tf.data.TFRecordDataset(sorted(map(str, records.glob("*.tfrecord")))):
        frames = [tf.io.decode_jpeg(frame, dct_method="INTEGER_ACCURATE") for frame in parse_frames(serialized)]
        frames = [tf.image.resize(frame, (size, size)).numpy() for frame in frames]
        found = []
        for start in starts:
            maps = np.asarray(conv5(np.stack(frames[start : start + 4])[None]))[0].mean(axis=0)
            assert maps.shape[:2] == (3, 3)
            for top in (0, 1):
                for left in (0, 1):
                    pooled = maps[top : top + 2, left : left + 2].mean(axis=(0, 1))
                    logits = np.maximum(pooled @ fc1, 0) @ np.asarray(fc2.kernel) + np.asarray(fc2.bias)
                    found.append(np.exp(logits) / np.exp(logits).sum())
        videos.append(np.mean(found, axis=0))
    return np.array(videos)


def test_three_crops_with_other_clips_frames_and_head(run: RunFolder, network: x3d_tf.X3D, records: Path) -> None:
    report = evaluate_run(
        run,
        temporal_views=3,
        spatial_crops=3,
        clip_starts="slowfast",
        frame_sampling="exact",
        head_pool="fixed_probabilities",
    )
    # ten frames, clips of four: the last start is 6, and 6·k/3 are the starts; crops of square frames are all alike
    expected = naive_probabilities(network, records, 73, [0, 2, 4])
    assert np.ptp(expected[:, 0]) > 0.01  # otherwise any probabilities would pass
    np.testing.assert_allclose(probabilities_in(report.folder), expected, atol=1e-5)
    r = report.results
    assert (r["views"], r["resize"], r["crop"]) == ("3-LeftCenterRight", 73, 73)
    assert (r["clip_starts"], r["frame_sampling"], r["head_pool"]) == ("slowfast", "exact", "fixed_probabilities")
    assert report.folder.name == "square_train_3leftcenterright_slowfast_starts_exact_frames_fixed_probabilities"
    clip = x3d_tf.ClipSpec(4, 1, 73)
    options = x3d_tf.ModelOptions(head_pool="fixed_probabilities")
    assert r["gmacs_per_sample"] == pytest.approx(
        9 * x3d_tf.cost(TINY, clip, num_classes=2, options=options).macs / 1e9
    )
    assert r["params"] == sum(int(np.prod(w.shape)) for w in network.trainable_weights)

    pooled = evaluate_run(run, temporal_views=3, spatial_crops=3, clip_starts="slowfast", frame_sampling="exact")
    assert pooled.folder != report.folder
    assert np.abs(probabilities_in(pooled.folder) - expected).max() > 1e-4  # the pooling matters


@pytest.mark.parametrize("noun", ["video", "clip", "frame", "view", "class"])
def test_the_noun_of_the_samples_changes_no_other_setting(
    run: RunFolder, network: x3d_tf.X3D, monkeypatch: pytest.MonkeyPatch, noun: str
) -> None:
    task = find("single_label")
    monkeypatch.setattr(type(task), "sample", noun)
    stated = settings_of(task.evaluation(network, {}, EvalConfig(temporal_views=3), run))
    macs = x3d_tf.cost(TINY, num_classes=2).macs / 1e9
    assert (stated["sample"], stated["samples"], stated["gmacs_per_sample"]) == (noun, 5, pytest.approx(3 * macs))
    assert (stated["gmacs_per_clip"], stated["frames"], stated["views"]) == (pytest.approx(macs), 4, "3-Center")
    assert stated["classes"] == 2


@pytest.mark.usefixtures("eager")
def test_a_model_file_is_evaluated_with_its_own_settings(run: RunFolder, records: Path, tmp_path: Path) -> None:
    of_run = evaluate_run(run, temporal_views=1)
    settings: dict[str, Any] = {"records": str(records), "split": "train", "temporal_views": 1}
    of_file = evaluate_file(run.model, output=str(tmp_path / "report"), **settings)
    assert (of_file.folder / "predictions.csv").read_bytes() == (of_run.folder / "predictions.csv").read_bytes()
    of_training = {"settings_sha256": run.read_config().fingerprint(), "init": None, "records_sha256": None}
    known = {"seed": 0, "records": of_run.results["records"], "training": of_training}
    assert of_file.results | known == of_run.results and "training" not in of_file.results
    with pytest.raises(UserError, match="already has a report"):
        evaluate_file(run.model, output=str(tmp_path / "report"), **settings)
    with pytest.raises(UserError, match=r"EvalConfig\.split must be given for a model file"):
        evaluate_file(run.model, output=str(tmp_path / "other"), records=str(records))
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        evaluate_file(run.model, output=str(tmp_path / "other"), records=str(records), split="test")
    assert not (tmp_path / "other").exists()


def test_an_unfinished_run_is_rejected(records: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run writes its model when it is finished"):
        evaluate_run(unfinished(records, tmp_path / "run"))


def test_weights_that_are_not_finite_are_rejected(
    run: RunFolder, network: x3d_tf.X3D, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = classification.with_head_pool(network, "fixed_logits")  # a copy
    broken.get_layer("fc2").bias.assign([float("nan"), 0])
    monkeypatch.setattr(running, "load_any", lambda _: broken)
    with pytest.raises(UserError, match=r"probabilities for square/0 of .*square must be finite"):
        evaluate_run(run, temporal_views=1)
    assert not list(run.evaluations.glob("*/results.json"))


def first_are_left(count: int) -> SplitPredictions:
    """Returns predictions that put the first videos into the class "left" and the others into "right"."""
    first = np.arange(5) < count
    return SplitPredictions(np.stack([first, ~first], axis=1).astype("float32"), np.array([0, 1, 0, 1, 0]))


@pytest.mark.usefixtures("loaded")
def test_an_interrupted_sweep_resumes(
    run: RunFolder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[int] = []

    def predict(model: Any, manifest: Any, split: str, views: Any, **_: Any) -> SplitPredictions:
        if len(tested) == 2:
            raise KeyboardInterrupt
        tested.append(views.temporal_views)
        return first_are_left(views.temporal_views // 2)

    monkeypatch.setattr(classification, "predict_split", predict)
    with pytest.raises(KeyboardInterrupt):
        sweep_run(run)
    tested.append(0)
    sweep = sweep_run(run)
    assert tested == [1, 3, 0, 5, 7, 10]
    with (sweep.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["views"] for row in rows] == [f"{k}-Center" for k in (1, 3, 5, 7, 10)]
    # labels: left, right, left, right, left; the first 0, 1, 2, 3 and 5 videos are predicted left
    assert [float(row["top1"]) for row in rows] == pytest.approx([0.4, 0.6, 0.4, 0.6, 0.6])
    macs = x3d_tf.cost(TINY, num_classes=2).macs / 1e9
    assert [float(row["gmacs_per_sample"]) for row in rows] == pytest.approx([macs * k for k in (1, 3, 5, 7, 10)], 1e-5)
    assert (sweep.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    again = sweep_file(run.model, output=str(tmp_path / "sweep"), records=str(records), split="train")
    assert tested[6:] == [1, 3, 5, 7, 10]
    assert (again.folder / "sweep.csv").read_bytes() == (sweep.folder / "sweep.csv").read_bytes()
    with pytest.raises(UserError, match=r"3clips has a report with other settings \(clip_starts\)"):
        results = json.loads((tmp_path / "sweep" / "3clips" / "results.json").read_text())
        (tmp_path / "sweep" / "3clips" / "results.json").write_text(json.dumps(results | {"clip_starts": "slowfast"}))
        sweep_file(run.model, output=str(tmp_path / "sweep"), records=str(records), split="train")
    with pytest.raises(UserError, match="temporal_views must not be set"):
        sweep_run(run, temporal_views=3)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (
            (),
            {"sample": "key frame"},
            r"3clips has a report with other settings \(sample\)",
        ),
        (("top1",), precision_of(0.5), r"3clips has a report with other settings \(metrics\)"),
    ],
)
def test_a_sweep_reuses_only_reports_that_it_can_plot(
    run: RunFolder,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remove: tuple[str, ...],
    add: dict[str, Any],
    message: str,
) -> None:
    calls: list[int] = []

    def predict(*_: object, **__: object) -> SplitPredictions:
        calls.append(1)
        return first_are_left(2)

    monkeypatch.setattr(classification, "predict_split", predict)
    settings: dict[str, Any] = {"output": str(tmp_path / "sweep"), "records": str(records), "split": "train"}
    sweep_file(run.model, **settings)
    file = tmp_path / "sweep" / "3clips" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in results.items() if name not in remove} | add))
    with pytest.raises(UserError, match=message):
        sweep_file(run.model, **settings)
    assert len(calls) == 5  # none was repeated


class Several(SimpleNamespace):
    """Stands in for a manifest of multi-label records."""

    folder, classes, task = Path("several"), ("b", "a", "c"), "multi_label"  # not in the order of the model
    dataset, stored, official_split = "several", Storage(256, 95), OfficialSplit(2, 3)

    def split(self, _: str) -> Any:
        labels = [(0,), (0, 1), (1,), (0, 1)]
        records = [SimpleNamespace(media_id=f"v{n}", labels=classes) for n, classes in enumerate(labels)]
        return SimpleNamespace(records=records, expected=None, present=len(records))

    def fingerprint(self) -> str:
        return "0" * 64


def test_multi_label_models_report_map(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: x3d_tf.X3D, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import average_precision_score

    scores = np.array([[0.1, 0.9, 0.5], [0.6, 0.4, 0.5], [0.2, 0.6, 0.1], [0.6, 0.8, 0.0]], np.float32)
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], np.float32)  # in the order of the records
    monkeypatch.setattr(classification, "predict_split", lambda *_, **__: SplitPredictions(scores, targets))
    model = x3d_tf.X3D(TINY, 3, x3d_tf.ModelOptions(), activation="sigmoid")
    model.class_names = ("a", "b", "c")
    monkeypatch.setattr(running, "load_any", lambda _: model)
    monkeypatch.setattr(task_module, "open_dataset", lambda _: Several())
    file = tmp_path / "model.keras"
    file.write_bytes(b"weights")
    settings = {"records": "several", "split": "test"}
    report = running.evaluate_file(file, find("multi_label"), output=str(tmp_path / "report"), **settings)

    truth = np.array([[0, 1], [1, 1], [1, 0], [1, 1]])
    precisions = [average_precision_score(truth[:, c], scores[:, c]) for c in (0, 1)]
    assert report.results["map"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert report.results["classes_with_positives"] == 2
    assert (report.results["official_split"], report.results["official_splits"]) == (2, 3)
    assert report.results["classes_without_positives"] == ["c"]
    assert "ignored for mAP: 1 class without positives (c)" in capsys.readouterr().out
    assert not {"top1", "top5"} & set(report.results)
    assert sorted(path.name for path in report.folder.iterdir()) == ["per_class.csv", "predictions.csv", "results.json"]
    with (report.folder / "predictions.csv").open() as stream:
        assert [row["labels"] for row in csv.DictReader(stream)] == ["b", "a;b", "a", "a;b"]
    with (report.folder / "per_class.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["positives"] for row in rows] == ["3", "3", "0"]
    assert [row["average_precision"] for row in rows] == [*(f"{p:.6g}" for p in precisions), ""]

    message = "the task of the records in several must be single_label, got 'multi_label'"
    with pytest.raises(UserError, match=message):
        running.evaluate_file(file, find("single_label"), output=str(tmp_path / "other"), **settings)


class Checkpoints:
    """Stands in for the checkpoints of a training run: the steps found at each poll."""

    def __init__(self, run: RunFolder, looks: list[list[int]], network: x3d_tf.X3D, broken: dict[int, int]) -> None:
        self.run, self.looks, self.network = run, iter(looks), network
        self.broken = broken  # step -> number of failing reads
        self.now: list[int] = []
        self.loaded: list[int] = []

    def sleep(self, _: float) -> None:
        """Advances to the next poll."""
        self.now = next(self.looks)
        if self.now == [-1]:
            raise KeyboardInterrupt
        if self.now[-1] == 60:
            self.run.model.touch()

    def steps(self, folder: Path) -> list[int]:
        assert folder == self.run.checkpoints
        return self.now

    def load(self, run: RunFolder, step: int) -> x3d_tf.X3D:
        if self.broken.get(step, 0):
            self.broken[step] -= 1
            raise UserError(f"the checkpoint of step {step} is damaged")
        self.loaded.append(step)
        return self.network


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def install(checkpoints: Checkpoints) -> Checkpoints:
        def predict(*_: object, **__: object) -> SplitPredictions:
            """Predicts "left" for the first video at step 10, for the first two at step 20, and so on."""
            return first_are_left(checkpoints.loaded[-1] // 10)

        monkeypatch.setattr(classification, "predict_split", predict)
        monkeypatch.setattr(run_checkpoints, "checkpoint_steps", checkpoints.steps, raising=False)
        monkeypatch.setattr(run_checkpoints, "load_checkpoint", checkpoints.load, raising=False)
        monkeypatch.setattr("x3d_tf.evaluation.watch.time.sleep", checkpoints.sleep)
        return checkpoints

    yield install


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    import tensorflow as tf

    files = sorted(map(str, folder.glob("events*")))
    events = [event for file in files for event in tf.compat.v1.train.summary_iterator(file)]
    return [(v.tag, event.step, float(tf.make_ndarray(v.tensor))) for event in events for v in event.summary.value]


def test_watching_evaluates_new_checkpoints_until_the_run_is_finished(
    records: Path, network: x3d_tf.X3D, tmp_path: Path, watching: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(records, tmp_path / "run")
    # step 20 is incomplete at the first poll, 30 is deleted before it can be read, 50 stays damaged
    looks = [[10, 20], [20, 30], [20, 40], [-1]]
    first = watching(Checkpoints(run, looks, network, {20: 1, 30: 9}))
    with pytest.raises(KeyboardInterrupt):
        watch_run(run, temporal_views=1)
    assert first.loaded == [10, 20, 40]

    second = watching(Checkpoints(run, [[40, 50], [50, 60]], network, {50: 9}))
    results = watch_run(run, temporal_views=1)
    assert second.loaded == [60]  # 40 already has a result
    assert sorted(results) == [10, 20, 40, 60]
    folder = run.evaluations / "square_train_1center_steps"
    assert sorted(path.name for path in folder.iterdir()) == ["10.json", "20.json", "40.json", "60.json", "steps.csv"]
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 40, 60]
    expected = [0.6, 0.4, 0.4, 0.6]  # labels: left, right, left, right, left
    assert [float(row["top1"]) for row in rows] == pytest.approx(expected)
    assert read_results(folder / "20.json")["top1"] == pytest.approx(0.4)
    output = capsys.readouterr()
    assert "is finished (" in output.out
    assert "warning: the checkpoint of step 50 was not evaluated: the checkpoint of step 50 is damaged" in output.err

    # sorted: event files written within the same second are read in any order
    found = sorted((step, value) for tag, step, value in scalars(run.tensorboard / folder.name) if tag == "eval/top1")
    assert [step for step, _ in found] == [10, 20, 40, 60]
    assert [value for _, value in found] == pytest.approx(expected)


@pytest.mark.parametrize(("changes", "names"), [({"samples": 4}, "samples"), (precision_of(0.5), "metrics")])
def test_watching_with_other_settings_is_rejected(
    records: Path, network: x3d_tf.X3D, tmp_path: Path, watching: Any, changes: dict[str, Any], names: str
) -> None:
    run = unfinished(records, tmp_path / "run")
    watching(Checkpoints(run, [[10, 60]], network, {}))
    watch_run(run, temporal_views=1)
    path = run.evaluations / "square_train_1center_steps" / "10.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    watching(Checkpoints(run, [[70, 80]], network, {})).now = [70]
    with pytest.raises(UserError, match=rf"10\.json was evaluated with other settings \({names}\).*--overwrite"):
        watch_run(run, temporal_views=1)
    assert sorted(watch_run(run, temporal_views=1, overwrite=True)) == [70]
