"""Model files: what an application loads, what this package loads again, and what it refuses."""

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import x3d_tf
from x3d_tf._files import WriteError
from x3d_tf.modeling import saving

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.2)
NAMES = ("hug", "kick", "wave")


@pytest.fixture(scope="module")
def model() -> x3d_tf.X3D:
    """A network with nothing left at its first value, so that every weight must travel."""
    network = x3d_tf.build_x3d(TINY, num_classes=3)
    draw = np.random.default_rng(0)
    for weight in network.weights:
        if "seed" not in weight.path:
            weight.assign(np.abs(draw.standard_normal(weight.shape)) * (0.1 if weight.ndim > 1 else 1) + 0.01)
    return network


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def file(model: x3d_tf.X3D, tmp_path: Path) -> Path:
    x3d_tf.save(x3d_tf.portable(model, NAMES), tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_a_full_disk_leaves_the_file_of_before(
    model: x3d_tf.X3D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "model.keras"
    path.write_bytes(b"before")
    with pytest.raises(WriteError, match=r"model\.keras cannot be written: No space left on device$"):
        x3d_tf.save(model, path, NAMES, overwrite=True)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def probabilities(model: x3d_tf.X3D, clips: np.ndarray) -> np.ndarray:
    return np.asarray(keras.ops.softmax(model(clips)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"separable": False},
        {"se": "none", "stem_kernel": 3},
        {"shortcut_norm": "on_width_change", "input": "difference"},
        {"swish": False, "swish_before": True, "se": "all", "drop_connect": 0.5},
    ],
    ids=str,
)
def test_portable_computes_the_same(options: dict, clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d(TINY, num_classes=3, **options)
    for layer in network.layers:
        if hasattr(layer, "moving_mean"):
            layer.moving_mean.assign(np.random.default_rng(2).standard_normal(layer.moving_mean.shape) * 0.1)
            layer.gamma.assign(np.random.default_rng(3).random(layer.gamma.shape) + 0.5)
    app = x3d_tf.portable(network, NAMES)
    np.testing.assert_allclose(app(clips), probabilities(network, clips), atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in app.layers)


def test_portable_of_another_size(model: x3d_tf.X3D) -> None:
    clips = np.random.default_rng(1).integers(0, 256, (1, 4, 81, 81, 3), dtype=np.uint8)
    np.testing.assert_allclose(x3d_tf.portable(model, NAMES, size=81)(clips), probabilities(model, clips), atol=1e-6)


@pytest.mark.parametrize("pool", ["fixed_probabilities", "fixed_logits"])
def test_portable_pools_a_larger_clip_alike(pool: str, tmp_path: Path) -> None:
    network = x3d_tf.build_x3d(TINY, num_classes=3, head_pool=pool)
    clips = np.random.default_rng(1).integers(0, 256, (1, 4, 96, 96, 3), dtype=np.uint8)
    x3d_tf.save(x3d_tf.portable(network, NAMES, size=96), tmp_path / "model.keras")
    app = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(app(clips), probabilities(network, clips), atol=1e-6)
    np.testing.assert_array_equal(x3d_tf.load(tmp_path)(clips), network(clips))


def test_one_frame_is_enough(clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d("x2d", num_classes=3)
    frame = np.random.default_rng(1).integers(0, 256, (1, 1, 112, 112, 3), dtype=np.uint8)
    np.testing.assert_allclose(x3d_tf.portable(network, NAMES)(frame), probabilities(network, frame), atol=1e-6)


APPLICATION = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "x3d_tf":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import numpy as np
import tensorflow as tf

model = tf.keras.models.load_model("model.keras")
np.save("out.npy", model(np.load("clips.npy")))
assert "x3d_tf" not in sys.modules
"""


def test_an_application_needs_only_tensorflow(model: x3d_tf.X3D, file: Path, clips: np.ndarray) -> None:
    np.save(file.parent / "clips.npy", clips)
    done = subprocess.run([sys.executable, "-c", APPLICATION], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # bit-equal to the model that was saved
    np.testing.assert_array_equal(np.load(file.parent / "out.npy"), x3d_tf.portable(model, NAMES)(clips))


def test_either_file_gives_the_trainable_network_again(model: x3d_tf.X3D, file: Path, clips: np.ndarray) -> None:
    x3d_tf.save(model, file.parent / "trainable.keras", NAMES)
    for path in (file, file.parent, file.parent / "trainable.keras"):
        again = x3d_tf.load(path)
        np.testing.assert_array_equal(again(clips), model(clips))
        assert again.class_names == NAMES
        assert again.get_config() | {"name": ""} == model.get_config() | {"name": ""}
    np.testing.assert_array_equal(keras.models.load_model(file.parent / "trainable.keras")(clips), model(clips))


def test_features_travel_without_a_classifier(tmp_path: Path, clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d(TINY, include_top=False)
    x3d_tf.save(network, tmp_path / "features.keras")
    np.testing.assert_array_equal(x3d_tf.load(tmp_path / "features.keras")(clips), network(clips))
    with pytest.raises(ValueError, match="must have its classifier"):
        x3d_tf.portable(network)


def test_missing_names_are_numbered_with_a_warning(model: x3d_tf.X3D, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 classes are numbered"):
        x3d_tf.save(model, tmp_path / "model.keras")
    assert x3d_tf.load(tmp_path / "model.keras").class_names == ("0", "1", "2")


def test_nothing_is_overwritten(model: x3d_tf.X3D, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.keras exists"):
        x3d_tf.save(model, file, NAMES)
    assert file.read_bytes() == before
    x3d_tf.save(model, file, NAMES, overwrite=True)
    assert saving.describe(file).form == "trainable"


def test_what_cannot_be_saved(model: x3d_tf.X3D, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.keras, got .*model.h5"):
        x3d_tf.save(model, tmp_path / "model.h5", NAMES)
    with pytest.raises(ValueError, match="class_names must be 3, got 2"):
        x3d_tf.save(model, tmp_path / "model.keras", ("a", "b"))
    with pytest.raises(ValueError, match=r"takes a model of x3d_tf\.build_x3d"):
        x3d_tf.save(keras.Sequential([keras.Input((1,))]), tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def rewritten(file: Path, change: dict | bytes | None) -> Path:
    """A copy of a model file with another description: fields changed, none at all, or raw bytes."""
    copy = file.with_name("copy.keras")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == saving.MEMBER:
                if change is None:
                    continue
                content = change if isinstance(change, bytes) else json.dumps(json.loads(content) | change).encode()
            target.writestr(name, content)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"copy\.keras has no x3d_tf\.json.*Save it so"),
        (b"{", "not a description"),
        (b"[" * 100_000, "not a description"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"num_classes": 10**9}, "num_classes must be"),
        ({"size": 10**6}, "size must be"),
        ({"form": "pickle"}, "form must be"),
        ({"class_names": ["a"]}, "class_names must be 3, got 1"),
        ({"class_names": [1, 2, 3]}, "class_names must be"),
        ({"class_names": "abc"}, "class_names must be a list"),
        ({"expansion": {"gamma_d": 1e9}}, "blocks of the network must be at most 10000"),
        ({"expansion": {"gamma_w": 1e6}}, "channels of the network must be at most 100000"),
        ({"expansion": {"gamma_w": -1}}, "gamma_w must be positive"),
        ({"expansion": {"gamma_b": 1.0}}, "do not fit its description"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=str,
)
def test_a_bad_description_is_named(file: Path, change: dict | bytes | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        x3d_tf.load(rewritten(file, change))
    assert "copy.keras" in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_pytorch_are_sent_to_the_importer(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pyth"
    if zipped:
        zipfile.ZipFile(path, "w").writestr("archive/data.pkl", b"")
    else:
        path.write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=rf"python -m x3d_tf\.import_weights {path} --variant="):
        x3d_tf.load(path)


def test_missing_weights_are_not_made_up(file: Path) -> None:
    import h5py

    copy = file.with_name("copy.keras")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "model.weights.h5":
                weights = io.BytesIO(content)
                with h5py.File(weights, "r+") as archive:
                    del archive["layers/dense_3"]
                content = weights.getvalue()
            target.writestr(name, content)
    with pytest.raises(ValueError, match=r"copy\.keras do not fit"):
        x3d_tf.load(copy)


def test_what_is_not_a_model_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model file or run folder; a run writes its model when"):
        x3d_tf.load(tmp_path)
    (tmp_path / "a.keras").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"a\.keras is not a \.keras file"):
        x3d_tf.load(tmp_path / "a.keras")
