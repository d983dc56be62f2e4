"""Exported files in predict and evaluate, against the network that they were exported from, and damaged ones."""

import copy
import csv
import itertools
import json
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_model import NAMES, model_file, opened_model, served_folder
from no_tensorflow import without_tensorflow
from video_fixtures import smooth_frames, write_records, write_video

import x3d_tf
from x3d_tf.data.video.decode import VideoError, encode_video, read_frames
from x3d_tf.errors import UserError
from x3d_tf.evaluation.running import evaluate_file
from x3d_tf.inference import prediction
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.modeling.archive import describe, describe_any, weights_of
from x3d_tf.modeling.cards import CARD, is_exported, read_exported_metadata
from x3d_tf.runtimes import runners
from x3d_tf.runtimes.exported import ExportedClassifier, shares
from x3d_tf.tasks.base import find
from x3d_tf.types import Storage

pytestmark = pytest.mark.usefixtures("uncompiled_module")

PACKAGES = {"tflite": "ai_edge_litert", "onnx": "onnxruntime", "openvino": "openvino", "saved_model": "tensorflow"}
BOUND = 2e-3  # of a probability: exported files take integers as pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a format to an exported file of the network of `model_file`."""
    folder = tmp_path_factory.mktemp("exported")

    def export(name: str) -> Path:
        pytest.importorskip(PACKAGES[name])
        if name == "saved_model":
            return served_folder()
        path = folder / f"tiny{ {'tflite': '_float32.tflite', 'onnx': '.onnx', 'openvino': '.xml'}[name] }"
        if not path.exists() and name == "tflite":
            from x3d_tf.export.tflite import export_tflite

            list(export_tflite(opened_model(), folder, ["float32"]))
        elif not path.exists():
            pytest.importorskip("onnx")
            from x3d_tf.export.onnx import export_formats

            export_formats(opened_model(), folder, [name])
        return path

    return export


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "wide.mp4", smooth_frames(41))
    write_video(folder / "upright.mkv", smooth_frames(30, 80, 60), 25)
    write_video(folder / "short.avi", smooth_frames(5))
    return folder


def probabilities_in(path: Path) -> list[list[float]]:
    """Returns the probabilities of the classes in predictions.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    first = header.index(f"p({NAMES[0]})")
    return [[float(cell) for cell in row[first : first + len(NAMES)]] for row in rows]


def probabilities(model: Any, videos: Path, **settings: Any) -> np.ndarray:
    results = [*predict_videos(model, videos, progress=False, **settings)]
    assert all(isinstance(result, Prediction) for result in results)
    return np.stack([result.probabilities for result in results])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PACKAGES)
def test_predictions_are_those_of_the_network(name: str, files: Callable[[str], Path], videos: Path) -> None:
    path = files(name)
    for settings in ({}, {"temporal_views": 1}, {"window": 0.5, "hop": 0.25}):
        expected = probabilities(model_file(), videos, **settings)
        found = probabilities(path, videos, **settings)
        np.testing.assert_allclose(found, expected, atol=BOUND)
    assert np.ptp(expected) > 50 * BOUND  # else the bound would mean nothing


def test_a_file_with_a_fixed_batch(tmp_path: Path, videos: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from x3d_tf.export.onnx import export_formats

    (path,) = export_formats(opened_model(), tmp_path, ["onnx"], batch=4)  # 3 clips per video
    np.testing.assert_allclose(probabilities(path, videos), probabilities(model_file(), videos), atol=BOUND)


@pytest.mark.parametrize("name", ["tflite", "onnx", "openvino"])
def test_the_command_needs_no_tensorflow(name: str, files: Callable[[str], Path], videos: Path, tmp_path: Path) -> None:
    path = files(name)
    output = tmp_path / "out.json"
    found = without_tensorflow("predict", f"--model={path}", f"--json={output}", videos)
    assert found.returncode == 0, found.stderr
    assert "running in" in found.stderr and "float32" in found.stderr
    content = json.loads(output.read_text())
    assert content["exported"].endswith("float32")
    values = [entry["probabilities"] for entry in content["predictions"]]
    expected = probabilities(model_file(), videos)
    np.testing.assert_allclose(values, expected, atol=BOUND)


@pytest.mark.parametrize("name", ["tflite", "onnx", "openvino", "saved_model"])
def test_evaluation_is_that_of_the_network(
    name: str, files: Callable[[str], Path], videos: Path, tmp_path: Path
) -> None:
    path = files(name)
    encoded = [encode_video(videos / name, 48, 80) for name in ("wide.mp4", "upright.mkv", "short.avi")]
    manifest = write_records(tmp_path / "records", {"test": encoded}, len(NAMES), stored=Storage(48, 80))
    replace(manifest, classes=NAMES).save()
    settings = {"records": str(tmp_path / "records"), "split": "test"}
    task = find("single_label")
    reports = [
        evaluate_file(file, task, output=str(tmp_path / label), **settings)
        for label, file in (("network", model_file()), ("file", path))
    ]
    expected, found = (report.results for report in reports)
    formats = {"tflite": "TFLite", "onnx": "ONNX", "openvino": "OpenVINO", "saved_model": "SavedModel"}
    assert found["exported"] == f"{formats[name]} float32" and "exported" not in expected
    assert found["weights"] == str(path)
    scores = [np.array(probabilities_in(tmp_path / label / "predictions.csv")) for label in ("network", "file")]
    np.testing.assert_allclose(scores[1], scores[0], atol=BOUND)
    assert found["weights_sha256"] != expected["weights_sha256"]
    with pytest.raises(UserError, match=r"spatial_crops must not be set for an exported file"):
        evaluate_file(path, task, output=str(tmp_path / "x"), spatial_crops=3, **settings)


@pytest.mark.parametrize("name", PACKAGES)
def test_many_clips_at_once_are_those_of_one_thread(name: str, files: Callable[[str], Path]) -> None:
    path = files(name)
    clips = np.random.default_rng(0).uniform(0, 255, (9, 4, 48, 48, 3)).astype(np.float32)
    together, alone = ExportedClassifier(path, at_once=4), ExportedClassifier(path, at_once=1)
    np.testing.assert_allclose(together(clips), alone(clips), atol=1e-6)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_card_has_the_metadata(name: str, files: Callable[[str], Path]) -> None:
    metadata, original = read_exported_metadata(files(name)), describe(model_file())
    assert metadata.class_names == NAMES and metadata.form == "exported"
    for field in ("expansion", "options", "stored", "test_views", "combine", "task", "activation", "frame_sampling"):
        assert getattr(metadata, field) == getattr(original, field)


def with_card(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Replaces the card of a `.tflite` file."""
    with zipfile.ZipFile(path) as archive:
        card = json.loads(archive.read(CARD))
        members = {name: archive.read(name) for name in archive.namelist() if name != CARD}
    changed = path.with_name("changed.tflite")
    content = path.read_bytes()
    changed.write_bytes(content[: content.index(b"PK\x03\x04")])
    with zipfile.ZipFile(changed, "a") as archive:
        for member, data in {**members, CARD: json.dumps(change(card))}.items():
            archive.writestr(member, data)
    return changed


CHANGES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda card: card | {"network_metadata": None}, r"exported by x3d_tf [\d.]+, whose model card has no "),
    (
        lambda card: card | {"network_metadata": card["network_metadata"] | {"format_version": 99}},
        r"the model card of .*, created by x3d_tf [\d.]+: format_version must be \d+, got 99",
    ),
    (
        lambda card: card | {"network_metadata": card["network_metadata"] | {"num_classes": 10**9}},
        r"the model card of .*: num_classes must be",
    ),
    (lambda card: [card], r"no model card that can be read"),
    (
        lambda card: card | {"network_metadata": card["network_metadata"] | {"include_top": False, "class_names": []}},
        r"the model card of .*: include_top must be true: the file must have a classifier",
    ),
    (
        lambda card: card | {"network_metadata": card["network_metadata"] | {"form": "trainable"}},
        r"the model card of .*: form must be 'exported', got 'trainable'",
    ),
    (
        lambda card: card
        | {"network_metadata": card["network_metadata"] | {"detection_head": "full", "activation": "sigmoid",
                                                           "task": "detection"}},
        r"holds a detector; detectors run from a run folder or a \.keras file",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_invalid_cards(change: Any, message: str, files: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=message):
        read_exported_metadata(with_card(files("tflite"), change))


def test_a_card_of_another_network(files: Callable[[str], Path]) -> None:
    def other(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda card: card | {"network_metadata": card["network_metadata"] | fields}

    path = files("tflite")
    metadata = json.loads(describe(model_file()).to_json())
    clip = other(expansion=metadata["expansion"] | {"gamma_t": 8})
    with pytest.raises(UserError, match=r"must take clips of the shape that its model card states, \(8, 48, 48, 3\)"):
        ExportedClassifier(with_card(path, clip))
    fewer = other(num_classes=2, class_names=["a", "b"])
    with pytest.raises(UserError, match=r"must return probabilities of shape \(1, 2\), got \(1, 6\)"):
        ExportedClassifier(with_card(path, fewer))(np.zeros((1, 4, 48, 48, 3), np.float32))


def test_damaged_and_foreign_files(tmp_path: Path, files: Callable[[str], Path]) -> None:
    contents: dict[str, tuple[bytes, str]] = {
        "empty.onnx": (b"", "no model card"),
        "noise.onnx": (bytes(range(256)), "no model card"),
        "noise.tflite": (b"noise", "no model card"),
        "other.xml": (b"<project/>", "no model card"),
        "bomb.xml": (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "no document type"),
        "wide.xml": ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode("utf-16"), "no model card"),
        "broken.xml": (b"<net", "no model card"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_exported_metadata(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.onnx must exist"):
        read_exported_metadata(tmp_path / "missing.onnx")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model card that can be read: .*model_card\.json"):
        describe_any(tmp_path / "saved")
    path = shutil.copy(files("tflite"), tmp_path / "cut.tflite")
    content = path.read_bytes()
    card = content[content.index(b"PK\x03\x04") :]
    path.write_bytes(b"\0" * 100 + card)  # a card without a network
    with pytest.raises(UserError, match=r"cut\.tflite cannot be opened: "):
        ExportedClassifier(path)


def test_a_large_card_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "large.tflite", "w") as archive:
        archive.writestr(CARD, b"0" * (17 * 1024 * 1024))
    with pytest.raises(UserError, match=r"model_card\.json must have at most 16777216 bytes, got 17825792"):
        read_exported_metadata(tmp_path / "large.tflite")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_card_is_not_read(method: int, tmp_path: Path) -> None:
    """Its stated size may be wrong."""
    with zipfile.ZipFile(tmp_path / "small.tflite", "w", method) as archive:
        archive.writestr(CARD, b"0" * 100_000)
    with pytest.raises(UserError, match=r"model_card\.json must be stored without compression"):
        read_exported_metadata(tmp_path / "small.tflite")


def test_many_fields_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "many.onnx").write_bytes(b"\x08\x01" * 1_000_000)
    with pytest.raises(UserError, match="more than 10000 fields"):
        read_exported_metadata(tmp_path / "many.onnx")


def test_a_run_folder_is_never_a_saved_model(tmp_path: Path) -> None:
    """Its content is untrusted, and SavedModels can execute code."""
    shutil.copy(model_file(), tmp_path / "model.keras")
    shutil.copy(served_folder() / CARD, tmp_path)
    (tmp_path / "saved_model.pb").touch()
    assert not is_exported(tmp_path) and describe_any(tmp_path).form == "trainable"
    assert weights_of(tmp_path)["weights"] == str(tmp_path / "model.keras")


def test_the_folder_of_the_versions(files: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"no such model file .*accept a version of a SavedModel: .*/tiny/1"):
        describe_any(served_folder().parent)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, (1, 1)), (2, (2, 1)), (8, (8, 1)), (9, (4, 2)), (12, (6, 2)), (20, (6, 3)), (64, (8, 8))],
)
def test_shares_of_the_cores(cores: int, expected: tuple[int, int]) -> None:
    assert shares(cores) == expected


class Slow:
    """Stands for a runner; the first clip takes longest."""

    format, clip, batch, operators, card = "ONNX", (None, None, None, 3), None, Counter[str](), ""

    def __init__(self) -> None:
        self.inside, self.most = [0], [0]

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        self.inside[0] += 1
        self.most[0] = max(self.most[0], self.inside[0])
        time.sleep(0.2 if clips.max() == 0 else 0.05)
        self.inside[0] -= 1
        return np.repeat(clips.reshape(len(clips), -1)[:, :1] / np.float32(255), len(NAMES), axis=1)

    def for_another_thread(self) -> "Slow":
        return copy.copy(self)


def test_clips_run_at_once_and_keep_their_order(files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setitem(runners.RUNTIMES, "litert", lambda path, threads, at_once: slow)
    model = ExportedClassifier(files("tflite"), at_once=3)
    clips = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None, None, None], (8, 4, 48, 48, 3))
    np.testing.assert_allclose(model(clips)[:, 0] * 255, np.arange(8), atol=1e-5)
    assert 2 <= slow.most[0] <= 3
    assert model(clips[:0]).shape == (0, len(NAMES))


def test_windows_before_damaged_frames_are_predicted(
    files: Callable[[str], Path], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many by a network, which takes 8 clips at once, as by a file, which takes one."""

    def damaged(path: Path, *arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(read_frames(path, *arguments), 31)
        raise VideoError(path, "damaged")

    for model in (model_file(), files("tflite")):
        settings: dict[str, Any] = {"window": 0.3, "progress": False}
        whole = [*predict_videos(model, videos / "wide.mp4", **settings)]
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "read_frames", damaged)
            *found, error = predict_videos(model, videos / "wide.mp4", **settings)
        assert isinstance(error, VideoError) and (len(found), len(whole)) == (3, 5)
        for one, other in zip(found, whole):
            assert isinstance(one, Prediction) and isinstance(other, Prediction)
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_a_runtime_that_is_not_installed(files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, threads: int, at_once: int) -> Any:
        raise ModuleNotFoundError("No module named 'ai_edge_litert'", name="ai_edge_litert")

    monkeypatch.setitem(runners.RUNTIMES, "litert", missing)
    with pytest.raises(UserError, match=r"_float32\.tflite requires ai_edge_litert: pip install 'x3d_tf\[tflite\]'"):
        ExportedClassifier(files("tflite"))


def test_an_exported_file_is_opened_by_predict_videos_only(files: Callable[[str], Path]) -> None:
    """`x3d_tf.load` returns the trainable network, which an exported file does not have."""
    with pytest.raises(UserError, match=r"\.tflite is an exported file, which only predict and evaluate accept"):
        x3d_tf.load(files("tflite"))


def test_properties_without_keys_come_before_the_card(files: Callable[[str], Path], tmp_path: Path) -> None:
    """ONNX omits an empty key."""
    content = files("onnx").read_bytes()
    (tmp_path / "more.onnx").write_bytes(b"\x72\x03\x12\x01x" + content)  # metadata_props with a value only
    assert read_exported_metadata(tmp_path / "more.onnx") == read_exported_metadata(files("onnx"))
