"""Verification of exported artefacts: comparison, reports and errors."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from exported_model import three_classes
from video_fixtures import noise_video, numbered_frames, write_records, write_video
from x3d_tf.export import models, verification_clips, verify, workers

import x3d_tf
from x3d_tf.data.video.decode import encode_video
from x3d_tf.modeling.folded import fold
from x3d_tf.runtimes import runners
from x3d_tf.types import Storage

pytestmark = pytest.mark.usefixtures("uncompiled_module")

NAMES = ("hug", "kick", "wave")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> models.ExportableModel:
    return three_classes(tmp_path_factory.mktemp("model"))


def tflite(function: Callable[[Any], Any], shape: tuple[int, ...], app: keras.Model | None = None) -> bytes:
    """Converts a function of uint8 clips to a TFLite file, with the weights of the model that it calls."""
    module = tf.Module()
    module.weights = [variable.value for variable in app.variables] if app else []
    clips = tf.TensorSpec(shape, tf.uint8, name="clips")
    concrete = tf.function(function, input_signature=[clips]).get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], module).convert()


@pytest.fixture(scope="module")
def artefacts(source: models.ExportableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid and invalid artefacts."""
    folder = tmp_path_factory.mktemp("artefacts")
    app = fold(source.model, batch=1)
    good = tflite(lambda clips: app(clips, training=False), (1, 4, 64, 64, 3), app)
    (folder / "phone").mkdir()
    (folder / "phone" / "good.tflite").write_bytes(good)
    (folder / "cut_off.tflite").write_bytes(good[: len(good) // 2])
    for name, content in (("same", source.weights_sha256), ("other", "0" * 64)):
        card = {"weights_sha256": content, "training": {"run": "yesterday"}}
        shutil.copy(folder / "phone" / "good.tflite", folder / f"{name}_weights.tflite")
        with zipfile.ZipFile(folder / f"{name}_weights.tflite", "a") as archive:
            archive.writestr("model_card.json", json.dumps(card))
    (folder / "no_weights.xml").write_text('<?xml version="1.0"?>\n<net name="x" version="11"></net>')
    (folder / ".good.tflite.partial").write_bytes(b"being written")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "good.tflite").write_bytes(good)
    uniform = lambda clips: tf.reduce_sum(tf.cast(clips, tf.float32)) * 0 + tf.fill([1, 3], 1 / 3)  # noqa: E731
    (folder / "uniform.tflite").write_bytes(tflite(uniform, (1, 4, 64, 64, 3)))
    (folder / "other_clip.tflite").write_bytes(tflite(uniform, (1, 4, 96, 96, 3)))
    classes = lambda clips: tf.reduce_sum(tf.cast(clips, tf.float32)) * 0 + tf.fill([1, 2], 1 / 2)  # noqa: E731
    (folder / "other_classes.tflite").write_bytes(tflite(classes, (1, 4, 64, 64, 3)))
    (folder / "nonsense.onnx").write_bytes(b"nonsense")
    (folder / "build.xml").write_text("<project/>")  # of another program

    app = x3d_tf.portable(source.model, NAMES)
    module = tf.Module()
    module.weights = [variable.value for variable in app.variables]
    shape = (None, 4, 64, 64, 3)
    module.function = tf.function(
        lambda clips: {"probabilities": app(clips, training=False)},
        input_signature=[tf.TensorSpec(shape, tf.uint8, name="clips")],
    )
    tf.saved_model.save(module, str(folder / "served" / "1"), signatures={"serving_default": module.function})
    return folder


@pytest.fixture(scope="module")
def rows(source: models.ExportableModel, artefacts: Path) -> dict[str, verify.Row]:
    pytest.importorskip("ai_edge_litert")
    clips = np.random.default_rng(1).integers(0, 256, (3, 4, 64, 64, 3), dtype=np.uint8)
    found = verify.verify(source, runners.find_artefacts(artefacts), clips, threads=(1,), rounds=1)
    return {Path(row.name).name: row for row in found}


def test_matching_artefacts_are_ok(rows: dict[str, verify.Row]) -> None:
    for name, format_name in (("model.keras", "Keras"), ("1", "SavedModel"), ("good.tflite", "TFLite float32")):
        row = rows[name]
        assert (row.format, row.verdict, row.agreement) == (format_name, "OK", 1.0)
        assert row.max_difference is not None and row.mean_difference is not None
        assert 0 <= row.mean_difference <= row.max_difference < 1e-5
        assert row.milliseconds[1] > 0
        assert row.bytes > 100_000


def test_operators_are_those_of_the_format(rows: dict[str, verify.Row]) -> None:
    assert rows["1"].operators["DepthwiseConv2dNative"] == rows["model.keras"].operators["DepthwiseConv2dNative"] > 3
    assert rows["good.tflite"].operators["DEPTHWISE_CONV_2D"] > 3
    assert "DELEGATE" not in rows["good.tflite"].operators


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("uniform.tflite", "FAILED: max difference above 0.0001"),
        ("other_clip.tflite", "FAILED: its clip shape is 4 x 96 x 96 x 3, the model's is 4 x 64 x 64 x 3"),
        ("other_classes.tflite", "FAILED: it has 2 classes, the model has 3"),
        ("cut_off.tflite", "FAILED: "),
        ("other_weights.tflite", "FAILED: it was exported from different weights, those of the run yesterday"),
        ("same_weights.tflite", "OK"),
    ],
)
def test_failures_are_reported_and_do_not_stop_the_others(rows: dict[str, verify.Row], name: str, verdict: str) -> None:
    assert rows[name].verdict.startswith(verdict)
    assert name in ("uniform.tflite", "same_weights.tflite") or not rows[name].milliseconds


def test_a_missing_runtime_is_reported(rows: dict[str, verify.Row]) -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        assert rows["nonsense.onnx"].verdict == "not run: No module named 'onnxruntime'; pip install 'x3d_tf[onnx]'"
    else:
        assert rows["nonsense.onnx"].verdict.startswith("FAILED: ")


def test_only_artefacts_are_rows(rows: dict[str, verify.Row]) -> None:
    others = ["cut_off.tflite", "no_weights.xml", "nonsense.onnx", "other_classes.tflite", "other_clip.tflite"]
    others += ["other_weights.tflite", "good.tflite", "same_weights.tflite", "1", "uniform.tflite"]
    assert list(rows) == ["model.keras", *others]


def test_missing_packages_and_runtime_errors_are_distinguished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artefact = runners.Artefact(tmp_path / "a.tflite", "litert")

    def missing(path: Path, threads: int, at_once: int) -> Any:
        raise ModuleNotFoundError("No module named 'ai_edge_litert'")

    monkeypatch.setitem(runners.RUNTIMES, "litert", missing)
    response = workers._respond({}, 1, artefact, "open")
    assert isinstance(response, workers.RuntimeNotInstalled) and "pip install 'x3d_tf[tflite]'" in str(response)

    def faulty(path: Path, threads: int, at_once: int) -> Any:
        raise RuntimeError("bad\nfile")

    monkeypatch.setitem(runners.RUNTIMES, "litert", faulty)
    response = workers._respond({}, 1, artefact, "open")
    assert isinstance(response, workers.ArtefactError) and str(response) == "RuntimeError: bad file"


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    artefact = runners.Artefact(tmp_path / "a.tflite", "litert")
    with workers.Workers() as pool:
        with pytest.raises((workers.ArtefactError, workers.RuntimeNotInstalled)):
            pool.open(artefact, 1)
        pool._workers["litert", 1]._process.kill()
        with pytest.raises(workers.ArtefactError, match="its process ended with status -9"):
            pool.open(artefact, 1)


class Doubling:
    """Runner with a fixed batch size that returns twice the first pixel of each clip."""

    batch = 2

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        assert len(clips) == self.batch
        return clips.reshape(len(clips), -1)[:, :1] * np.float32(2)


def test_a_fixed_batch_is_padded() -> None:
    clips = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1, 1)
    found = runners.probabilities(Doubling(), clips)  # type: ignore[arg-type]
    assert found[:, 0].tolist() == [0, 2, 4, 6, 8]


def test_pixels_are_quantized() -> None:
    clips = np.array([0, 127, 255], np.uint8)
    for dtype, quantization, expected in (
        (np.uint8, (0.0, 0), [0, 127, 255]),
        (np.float32, (0.0, 0), [0.0, 127.0, 255.0]),
        (np.int8, (1.0, -128), [-128, -1, 127]),
        (np.int8, (0.5, 0), [0, 127, 127]),
    ):
        found = runners._quantize(clips, {"dtype": dtype, "quantization": quantization})
        assert found.dtype == dtype and found.tolist() == expected


def test_clips_of_records_are_those_of_evaluation(source: models.ExportableModel, tmp_path: Path) -> None:
    write_records(tmp_path, {"test": [noise_video(i, 12, 90, 120) for i in range(3)], "train": [noise_video(9, 12)]}, 3)
    found = verification_clips.read_clips(source, tmp_path, limit=10)
    batches = x3d_tf.dataset(tmp_path, source.model.clip, training=False, batch=3)
    ((expected, _),) = batches.as_numpy_iterator()
    np.testing.assert_array_equal(found, np.rint(expected))
    assert found.dtype == np.uint8


def test_a_limited_number_of_clips_is_sampled_evenly() -> None:
    assert verification_clips._sample_evenly(range(10), 3) == [0, 4, 9]
    assert verification_clips._sample_evenly(range(3), 10) == [0, 1, 2]


def test_clips_are_the_middles_of_videos(
    source: models.ExportableModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a" / "long.mp4", numbered_frames(40, 96, 128))
    (tmp_path / "notes.txt").write_text("not a video")
    (clip,) = verification_clips.read_clips(source, tmp_path, limit=10)
    assert re.search(r"skipped: .*notes\.txt", capsys.readouterr().err)
    # A clip spans 8 of the 40 frames: it starts at 16, and its 4 frames are spread over the span.
    numbers = [round((float(frame[32:, 32:].mean()) - 16) / 4) for frame in clip]
    assert numbers == [16, 18, 20, 23]


def test_clips_of_videos_are_those_of_their_records(
    source: models.ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(60, 70)
    monkeypatch.setattr(source.model, "stored", stored)
    path = write_video(tmp_path / "videos" / "a.mp4", numbered_frames(40, 96, 128))
    write_records(tmp_path / "records", {"test": [encode_video(path, 60, 70)]}, 3, stored=stored)
    of_video, of_record = (
        verification_clips.read_clips(source, tmp_path / name, limit=1) for name in ("videos", "records")
    )
    np.testing.assert_array_equal(of_video, of_record)


def test_missing_clips(source: models.ExportableModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder of videos or records"):
        verification_clips.read_clips(source, tmp_path / "nothing", limit=10)
    with pytest.raises(ValueError, match="files or folders with files"):
        verification_clips.read_clips(source, tmp_path, limit=10)
    (tmp_path / "notes.txt").write_text("not a video")
    with pytest.raises(ValueError, match=r"none of 1 files could be read as a video; first error: .*notes\.txt"):
        verification_clips.read_clips(source, tmp_path, limit=10)
    with pytest.raises(ValueError, match="--split must be used with records"):
        verification_clips.read_clips(source, tmp_path, split="test", limit=10)
    write_records(tmp_path / "records", {"set1": [noise_video(0, 9)], "set2": [noise_video(1, 9)]}, 3)
    with pytest.raises(ValueError, match=r"--split must be set for .* to one of set1, set2"):
        verification_clips.read_clips(source, tmp_path / "records", limit=10)


@pytest.fixture
def command(flags_of_one_command: None) -> Iterator[Any]:
    verify.define_flags()
    flags.FLAGS(["verify", "--model=unset", "--artefacts=unset", "--clips=unset"])

    def call(**settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            verify.main()

    yield call


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        (["OK", "not run: x is not installed"], None),
        (["OK", "FAILED: max difference above 1e-05"], "does not match the model"),
        (["not run: x is not installed"], "nothing was verified"),
    ],
)
def test_the_exit_status_reports_exceeded_bounds(
    command: Any,
    source: models.ExportableModel,
    verdicts: list[str],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "a.tflite").write_bytes(b"")
    write_video(tmp_path / "video.mp4", numbered_frames(12))
    rows = [verify.Row(str(source.path), "Keras", 1), *(verify.Row(str(folder / v), "", 1, v) for v in verdicts)]
    monkeypatch.setattr(verify, "verify", lambda *_, **__: rows)
    monkeypatch.setattr(models, "open_model", lambda _: source)
    paths = {"model": source.path, "artefacts": folder, "clips": tmp_path / "video.mp4", "json": tmp_path / "out.json"}
    if message is None:
        command(**paths)
    else:
        with pytest.raises(SystemExit, match=message):
            command(**paths)
    printed = capsys.readouterr().out
    assert all(verdict in printed for verdict in verdicts)
    written = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["verdict"] for row in written] == ["OK", *verdicts]
    assert list(written[0])[:3] == ["name", "form", "bytes"]
    with pytest.raises(ValueError, match=r"out\.json exists"):
        command(**paths)
    with pytest.raises(ValueError, match=r"--json=.*b\.json: its folder does not exist"):
        command(**paths | {"json": tmp_path / "a" / "b.json"})


def test_nothing_to_verify(command: Any, source: models.ExportableModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        command(model=source.path, artefacts=tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no artefact")
    with pytest.raises(ValueError, match=r"contain no artefact: no saved_model\.pb"):
        command(model=source.path, artefacts=tmp_path)
    (tmp_path / "a.tflite").touch()
    with pytest.raises(ValueError, match=r"^--clips=nothing: no such folder of videos or records$"):
        command(model=source.path, artefacts=tmp_path, clips="nothing")


def test_the_table_has_a_row_for_each_and_all_operators(tmp_path: Path) -> None:
    rows = [
        verify.Row("elsewhere/model.keras", "Keras", 4_000_000, "OK", 1e-7, 1e-8, 1.0, {1: 20.0, 2: 11.0}, {"Relu": 3}),
        verify.Row(str(tmp_path / "a" / "b.onnx"), "", 5_000_000, "not run: onnxruntime is not installed"),
    ]
    lines = verify.table(rows, tmp_path, 7)
    assert lines[0] == "7 clips"
    assert re.search(r"model\.keras +Keras +1\.0e-07 +1\.0e-08 +100\.0% +4\.0 +20\.0 +11\.0 +1 OK", lines[2])
    assert re.search(r"^a/b\.onnx +- +- +- +- +5\.0 +- +- +- not run: onnxruntime", lines[3])
    assert lines[-2:] == ["  elsewhere/model.keras: Relu 3", "  a/b.onnx: unknown"]


@pytest.mark.parametrize(
    ("clips", "same", "violations"),
    [
        (12, 12, []),
        (12, 11, []),  # one clip says nothing about a fraction
        (12, 10, ["top-1 agreement below 95%: 10 of 12 clips"]),
        (100, 95, []),
        (100, 94, ["top-1 agreement below 95%: 94 of 100 clips"]),
    ],
)
def test_one_clip_may_always_differ(clips: int, same: int, violations: list[str]) -> None:
    assert verify._bound_violations(0.5, same / clips, clips, verify.BOUNDS["TFLite int8"]) == violations


def test_help_lists_the_bounds() -> None:
    """The docstring repeats the bounds of each format."""
    text = (verify.__doc__ or "").split("same top-1 class:\n")[1]
    for format_name, bound in verify.BOUNDS.items():
        name = format_name.removeprefix("TFLite ")
        (line,) = [line for line in text.splitlines() if line.startswith("  ") and name in line]
        difference = "-" if bound.difference is None else f"{bound.difference:f}".rstrip("0")
        assert line.split()[-3:] == [difference, f"{bound.agreement:.0%}".rstrip("%"), "%"]
