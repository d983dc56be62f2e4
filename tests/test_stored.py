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
from x3d_tf.runtimes import stored as stored_module
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
    monkeypatch.setattr(stored_module, "map_clips_in_parallel", None)
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


def named_twice(layers: dict[str, h5py.Group]) -> None:
    other = layers["fc1"].file.create_group("other/vars")
    other.attrs["name"] = "fc1"
    other["0"] = np.zeros((4, 4), np.float32)


def nested(layers: dict[str, h5py.Group]) -> None:
    layers["fc1"].create_group("/".join("a" * 9))


def with_a_large_attribute(layers: dict[str, h5py.Group]) -> None:
    layers["fc1"].attrs["other"] = np.array(["text"] * 10, h5py.string_dtype())


def removed(name: str) -> Any:
    def change(layers: dict[str, h5py.Group]) -> None:
        del layers[name].parent["vars"]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"layer fc1 must have arrays of the shapes \[\(\d+, 2048\)\], as in its metadata, got \[\]"),
        (named_twice, "layer fc1 must occur once"),
        (nested, "must have groups to a depth of at most 8"),
        (with_a_large_attribute, r"attribute other of /layers/dense.* must be a scalar, got \(10,\)"),
        (replaced("fc2", 1, (1,)), r"layer fc2 must have arrays of the shapes .* got \[\(2048, 5\), \(1,\)\]"),
        (replaced("conv1_bn", 2, (1,)), "layer conv1_bn must have arrays of the shapes"),
        (replaced("fc2", 0, (5, 2048)), "layer fc2 must have arrays of the shapes"),
        (replaced("fc2", 0, (1, 2048, 5)), "layer fc2 must have arrays of the shapes"),
        (replaced("conv1_xy", 0, (3 * 3 * 3 * 24,)), "layer conv1_xy must have arrays of the shapes"),
        (replaced("conv1_t", 0, (5, 24, 1, 1)), "layer conv1_t must have arrays of the shapes"),
    ],
)
def test_weights_of_another_network_are_refused_before_a_video_is_read(
    change: Any, message: str, tmp_path: Path
) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)
    with pytest.raises(UserError, match=rf"changed\.keras: model\.weights\.h5: .*{message}"):
        open_classifier(rewritten(tmp_path / "a.keras", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed("fc1"), "must hold at least"),
        (renamed, "layer fc1 must have arrays of the shapes"),
        (removed("res2_0_conv_b_1"), "layer res2_0_conv_b must have arrays of the shapes"),
        (replaced("res3_0_conv_b_0", 0, (3, 3, 108, 2)), "cannot be read"),
        (replaced("conv1_t", 0, (1, 5, 1, 24, 2)), "layer conv1_t must have arrays of the shapes"),
    ],
)
def test_portable_weights_of_another_network_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    x3d_tf.save(x3d_tf.portable(network(), NAMES), tmp_path / "a.keras")
    with pytest.raises(UserError, match=message):
        open_classifier(rewritten(tmp_path / "a.keras", change))


def test_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    x3d_tf.save(network(), tmp_path / "a.keras", NAMES)

    def halved(layers: dict[str, h5py.Group]) -> None:
        array = layers["fc1"]["0"][()]
        del layers["fc1"]["0"]
        layers["fc1"]["0"] = array.astype(np.float16)

    pixels = clips(2).astype(np.float32)
    found = open_classifier(rewritten(tmp_path / "a.keras", halved)).for_crop(64)(pixels)
    np.testing.assert_allclose(found, probabilities(network(), pixels), atol=1e-3)


def test_a_policy_of_keras_changes_nothing(tmp_path: Path) -> None:
    model = network(**OPTIONS[3])
    x3d_tf.save(model, tmp_path / "a.keras", NAMES)
    pixels = clips(2).astype(np.float32)
    expected = probabilities(model, pixels)
    for policy in ("mixed_bfloat16", "float64"):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            found = open_classifier(tmp_path / "a.keras").for_crop(64)(pixels)
        finally:
            keras.config.set_dtype_policy(before)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_keras_layers_are_built(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x3d_tf.save(network(**options), tmp_path / "a.keras", NAMES)
    monkeypatch.setattr(keras.layers.Layer, "__init__", None)
    pixels = clips(1).astype(np.float32)
    assert open_classifier(tmp_path / "a.keras").for_crop(64)(pixels).shape == (1, 5)
