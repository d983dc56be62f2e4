"""Exported files in predict and evaluate, against the network that they were exported from, and damaged ones."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_model import NAMES, model_file, opened_model, served_folder
from no_tensorflow import without_tensorflow
from video_fixtures import smooth_frames, write_records, write_video

import x3d_tf
from x3d_tf.data.video.decode import encode_video
from x3d_tf.errors import UserError
from x3d_tf.evaluation.running import evaluate_file
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.cards import CARD, read_exported_metadata
from x3d_tf.runtimes import runners
from x3d_tf.runtimes.exported import ExportedClassifier
from x3d_tf.tasks.base import find
from x3d_tf.types import Storage

pytestmark = pytest.mark.usefixtures("uncompiled_module")

PACKAGES = {"tflite": "ai_edge_litert", "onnx": "onnxruntime", "openvino": "openvino", "saved_model": "tensorflow"}
BOUND = 2e-3  # of a probability: exported files take whole numbers as pixels


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
    rows = [entry["probabilities"] for entry in json.loads(output.read_text())["predictions"]]
    expected = probabilities(model_file(), videos)
    values = [[row[name] for name in NAMES] if isinstance(row, dict) else row for row in rows]
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
    assert found["top1"] == expected["top1"] and found["weights"] == str(path)
    assert found["weights_sha256"] != expected["weights_sha256"]
    with pytest.raises(UserError, match=r"spatial_crops must not be set for an exported file"):
        evaluate_file(path, task, output=str(tmp_path / "x"), spatial_crops=3, **settings)


def test_many_clips_at_once_are_those_of_one_thread(files: Callable[[str], Path]) -> None:
    for name in ("tflite", "onnx", "openvino"):
        if find_spec(PACKAGES[name]) is None:
            continue
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
        describe(tmp_path / "saved")
    path = shutil.copy(files("tflite"), tmp_path / "cut.tflite")
    content = path.read_bytes()
    card = content[content.index(b"PK\x03\x04") :]
    path.write_bytes(b"\0" * 100 + card)  # a card without a network
    with pytest.raises(UserError, match=r"cut\.tflite cannot be opened: "):
        ExportedClassifier(path)


def test_a_large_card_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "large.tflite", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CARD, b"0" * (17 * 1024 * 1024))
    with pytest.raises(UserError, match=r"model_card\.json must have at most 16777216 bytes, got 17825792"):
        read_exported_metadata(tmp_path / "large.tflite")


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
