"""Classifiers in `.keras` files, computed without Keras layers: equal to the network, also for damaged files."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from test_folded import TINY, clips, network, probabilities

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.modeling import kernels
from x3d_tf.modeling.archive import WEIGHTS
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.runtimes.stored import StoredClassifier

NAMES = list("abcde")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"separable": False},
    {"se": "none", "stem_kernel": 3, "activation": "sigmoid"},
    {"shortcut_norm": "on_width_change", "input": "difference"},
    {"swish": False, "swish_before": True, "se": "all"},
]


@pytest.mark.parametrize("form", ["trainable", "portable"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_equal_the_networks(options: dict[str, Any], form: str, tmp_path: Path) -> None:
    model, pixels = network(**options), clips(3)
    expected = probabilities(model, pixels)
    if form == "portable":
        x3d_tf.save(x3d_tf.portable(model, NAMES), tmp_path / "a.keras")
    else:
        x3d_tf.save(model, tmp_path / "a.keras", NAMES)
    stored = open_classifier(tmp_path / "a.keras")
    assert (stored.form, stored.class_names, stored.clip) == (form, tuple(NAMES), model.clip)
    np.testing.assert_allclose(stored.for_crop(64)(pixels.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["fixed_probabilities", "fixed_logits"])
def test_larger_crops_with_each_pooling(pool: Any, tmp_path: Path) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)
    pixels = clips(2, size=81).astype(np.float32)
    stored = open_classifier(tmp_path / "a.keras")
    expected = probabilities(network(head_pool=pool), pixels)
    np.testing.assert_allclose(stored.with_head_pool(pool).for_crop(81)(pixels), expected, atol=1e-5)
    np.testing.assert_allclose(stored.for_crop(81)(pixels), probabilities(network(), pixels), atol=1e-5)
    assert np.abs(stored.for_crop(81)(pixels) - expected).max() > 1e-5


def test_a_gpu_processes_all_clips_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)
    monkeypatch.setattr(kernels, "_chosen", "gpu")
    pixels = clips(3)
    found = open_classifier(tmp_path / "a.keras").for_crop(64)(pixels.astype(np.float32))
    np.testing.assert_allclose(found, probabilities(network(), pixels), atol=1e-5)


def test_a_network_without_classifier_and_a_detector_are_refused(tmp_path: Path) -> None:
    x3d_tf.save(x3d_tf.build_x3d(TINY, include_top=False), tmp_path / "features.keras")
    with pytest.raises(UserError, match="must have its classifier"):
        list(x3d_tf.predict_videos(tmp_path / "features.keras", tmp_path))
    x3d_tf.save(x3d_tf.build_detector(TINY, num_classes=5), tmp_path / "detector.keras", NAMES)
    with pytest.raises(UserError, match="is a detector"):
        StoredClassifier(tmp_path / "detector.keras")


def rewritten(path: Path, change: Any) -> Path:
    """Applies a change to the h5py file of the weights."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = BytesIO(members[WEIGHTS])
    with h5py.File(content, "a") as file:
        change({item.attrs["name"]: item for item in groups(file)})
    changed = path.with_name("changed.keras")
    with zipfile.ZipFile(changed, "w") as archive:
        for name, member in (members | {WEIGHTS: content.getvalue()}).items():
            archive.writestr(name, member)
    return changed


def groups(file: h5py.File) -> list[h5py.Group]:
    found: list[h5py.Group] = []
    file.visititems(lambda _, item: found.append(item) if "name" in item.attrs else None)
    return found


def replaced(name: str, number: int, shape: tuple[int, ...]) -> Any:
    def change(layers: dict[str, h5py.Group]) -> None:
        del layers[name][str(number)]
        layers[name][str(number)] = np.zeros(shape, np.float32)

    return change


def renamed(layers: dict[str, h5py.Group]) -> None:
    layers["fc1"].attrs["name"] = "fc9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"a\.keras|changed\.keras: model\.weights\.h5: layer fc1 must have the \d+ parameters of the network",
        ),
        (
            replaced("fc2", 1, (1,)),
            "layer fc2 must have the 10245 parameters of the network in its metadata, got 10241",
        ),
        (replaced("conv1_bn", 2, (1,)), r"conv1_bn must have arrays of shape \(24,\), got \(1,\)"),
        (replaced("fc2", 0, (5, 2048)), "do not match its metadata"),
        (replaced("conv1_t", 0, (5, 24, 1, 1)), "do not match its metadata"),
    ],
)
def test_weights_of_another_network_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)
    pixels = clips(1).astype(np.float32)
    with pytest.raises(UserError, match=message) as caught:
        open_classifier(rewritten(tmp_path / "a.keras", change)).for_crop(64)(pixels)
    assert "changed.keras" in str(caught.value)


def test_no_keras_layers_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)
    monkeypatch.setattr(keras.layers.Layer, "__init__", None)
    pixels = clips(1).astype(np.float32)
    assert open_classifier(tmp_path / "a.keras").for_crop(64)(pixels).shape == (1, 5)
