"""Tests of model files: saving, loading with and without this package, and rejection of invalid files."""

import errno
import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.modeling import archive, metadata, saving

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.2)
NAMES = ("hug", "kick", "wave")


@pytest.fixture(scope="module")
def model() -> x3d_tf.X3D:
    """A network with no weight at its initial value, so that each must be saved and loaded."""
    network = x3d_tf.build_x3d(TINY, num_classes=3)
    draw = np.random.default_rng(0)
    for weight in network.weights:
        if "seed" not in weight.path:
            weight.assign(np.abs(draw.standard_normal(weight.shape)) * (0.1 if weight.ndim > 1 else 1) + 0.01)
    return network


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(model: x3d_tf.X3D, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    x3d_tf.save(x3d_tf.portable(model, NAMES), path)
    return path.read_bytes()


@pytest.fixture
def file(saved: bytes, tmp_path: Path) -> Path:
    (tmp_path / "model.keras").write_bytes(saved)
    return tmp_path / "model.keras"


def test_a_full_disk_leaves_the_existing_file_intact(
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
    function = keras.ops.softmax if model.activation == "softmax" else keras.ops.sigmoid
    return np.asarray(function(model(clips)))


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
def test_portable_equals_the_trainable_network(options: dict, clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d(TINY, num_classes=3, options=x3d_tf.ModelOptions(**options))
    for layer in network.layers:
        if hasattr(layer, "moving_mean"):
            layer.moving_mean.assign(np.random.default_rng(2).standard_normal(layer.moving_mean.shape) * 0.1)
            layer.gamma.assign(np.random.default_rng(3).random(layer.gamma.shape) + 0.5)
    app = x3d_tf.portable(network, NAMES)
    np.testing.assert_allclose(app(clips), probabilities(network, clips), atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in app.layers)


def test_portable_of_another_size(model: x3d_tf.X3D, tmp_path: Path) -> None:
    clips = np.random.default_rng(1).integers(0, 256, (1, 4, 81, 81, 3), dtype=np.uint8)
    app = x3d_tf.portable(model, NAMES, size=81)
    np.testing.assert_allclose(app(clips), probabilities(model, clips), atol=1e-6)
    x3d_tf.save(app, tmp_path / "model.keras")
    np.testing.assert_array_equal(x3d_tf.load(tmp_path)(clips), model(clips))


@pytest.mark.parametrize(
    ("pool", "activation"),
    [("fixed_probabilities", "softmax"), ("fixed_logits", "softmax"), ("fixed_probabilities", "sigmoid")],
)
def test_portable_pools_larger_clips_alike(pool: Any, activation: Any, tmp_path: Path) -> None:
    network = x3d_tf.build_x3d(TINY, num_classes=3, activation=activation, options=x3d_tf.ModelOptions(head_pool=pool))
    clips = np.random.default_rng(1).integers(0, 256, (1, 4, 96, 96, 3), dtype=np.uint8)
    x3d_tf.save(x3d_tf.portable(network, NAMES, size=96), tmp_path / "model.keras")
    app = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(app(clips), probabilities(network, clips), atol=1e-6)
    assert archive.describe(tmp_path).options == network.options


def test_portable_of_a_single_frame(clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d(replace(TINY, gamma_t=1), num_classes=3)
    frame = np.random.default_rng(1).integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(x3d_tf.portable(network, NAMES)(frame), probabilities(network, frame), atol=1e-6)


def test_portable_files_load_without_this_package(
    model: x3d_tf.X3D,
    file: Path,
    clips: np.ndarray,
    without_modules: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = x3d_tf.portable(model, NAMES)(clips)
    x3d_tf.save(model, file.parent / "trainable.keras", NAMES)
    without_modules("x3d_tf")
    registered = keras.saving.get_custom_objects()
    for name in list(registered):
        monkeypatch.delitem(registered, name)
    with pytest.raises(TypeError, match="x3d_tf"):
        keras.models.load_model(file.parent / "trainable.keras")
    np.testing.assert_array_equal(keras.models.load_model(file)(clips), expected)  # bit-equal to the saved model
    assert "x3d_tf" not in sys.modules


def test_both_forms_load_as_the_trainable_network(model: x3d_tf.X3D, file: Path, clips: np.ndarray) -> None:
    x3d_tf.save(model, file.parent / "trainable.keras", NAMES)
    for path in (file.parent, file.parent / "trainable.keras"):
        again = x3d_tf.load(path)
        np.testing.assert_array_equal(again(clips), model(clips))
        assert again.class_names == NAMES
        assert again.get_config() | {"name": ""} == model.get_config() | {"name": ""}
    np.testing.assert_array_equal(keras.models.load_model(file.parent / "trainable.keras")(clips), model(clips))


def test_a_network_without_classifier_survives_saving_and_loading(tmp_path: Path, clips: np.ndarray) -> None:
    network = x3d_tf.build_x3d(TINY, include_top=False)
    x3d_tf.save(network, tmp_path / "features.keras")
    np.testing.assert_array_equal(x3d_tf.load(tmp_path / "features.keras")(clips), network(clips))
    with pytest.raises(ValueError, match="must have its classifier"):
        x3d_tf.portable(network)


def test_missing_names_are_numbered_with_a_warning(model: x3d_tf.X3D, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 classes numbered from 0"):
        x3d_tf.save(model, tmp_path / "model.keras")
    assert x3d_tf.load(tmp_path / "model.keras").class_names == ("0", "1", "2")


def test_existing_files_are_kept_by_default(model: x3d_tf.X3D, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.keras exists"):
        x3d_tf.save(model, file, NAMES)
    assert file.read_bytes() == before
    x3d_tf.save(model, file, NAMES, overwrite=True)
    assert archive.describe(file).form == "trainable"


def test_invalid_arguments_of_save_are_named(model: x3d_tf.X3D, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.keras, got .*model.h5"):
        x3d_tf.save(model, tmp_path / "model.h5", NAMES)
    with pytest.raises(ValueError, match="class_names must have 3 entries, got 2"):
        x3d_tf.save(model, tmp_path / "model.keras", ("a", "b"))
    with pytest.raises(ValueError, match=r"requires a model from x3d_tf\.build_x3d"):
        x3d_tf.save(keras.Sequential([keras.Input((1,))]), tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def rewritten(file: Path, change: dict | bytes | None) -> Path:
    """Copies a model file with other metadata: changed fields (dict), raw bytes, or none."""
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
        (None, r"copy\.keras has no x3d_tf\.json.*Save it again with"),
        (b"{", "invalid X3D metadata"),
        (b"[" * 100_000, "invalid X3D metadata"),
        ({"format_version": 2}, "format_version must be 3, got 2"),
        ({"task": "../a"}, r"task must be a name of .*, got '\.\./a'"),
        ({"activation": "tanh"}, "activation must be"),
        ({"detection_head": "full"}, "activation must be 'sigmoid' for a detector, got 'softmax'"),
        ({"stored": None}, 'stored must be "none" or have short_side and jpeg_quality, got None'),
        ({"stored": {"short_side": 96}}, 'stored must be "none" or have short_side and jpeg_quality'),
        ({"stored": {"short_side": 96.5, "jpeg_quality": 95}}, "Storage.short_side must be int, got 96.5"),
        ({"stored": {"short_side": 65536, "jpeg_quality": 95}}, r"Storage.short_side must be in 1\.\.65535"),
        ({"stored": {"short_side": 96, "jpeg_quality": 0}}, r"Storage.jpeg_quality must be in 1\.\.95"),
        ({"frame_sampling": "every"}, "frame_sampling must be"),
        ({"combine": "sum"}, r"Metadata.combine must be .*got 'sum'"),
        ({"test_views": 0}, r"test_views must be in 1\.\.1000, got 0"),
        ({"test_views": 10**9}, r"test_views must be in 1\.\.1000, got 1000000000"),
        ({"num_classes": 10**9}, "num_classes must be"),
        ({"size": 10**6}, "size must be"),
        ({"form": "pickle"}, "form must be"),
        ({"class_names": ["a"]}, "class_names must have 3 entries, got 1"),
        ({"class_names": [1, 2, 3]}, "class_names must be"),
        ({"class_names": "abc"}, "class_names must be a list"),
        ({"class_names": ["a", "b\nc", "d"]}, r"class_names\[1\] must name a class in one line of text"),
        ({"class_names": ["a", "b", "c\r"]}, r"class_names\[2\] must name a class in one line of text"),
        ({"expansion": {"gamma_d": 1e9}}, "Expansion.gamma_d must give at most 1000 blocks"),
        ({"expansion": {"gamma_w": 1e6}}, "Expansion.gamma_w must give at most 16384 channels"),
        ({"expansion": {"gamma_w": -1}}, "gamma_w must be positive"),
        ({"expansion": vars(TINY) | {"gamma_b": 1.0}}, "do not match its metadata"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=str,
)
def test_invalid_metadata_is_named(file: Path, change: dict | bytes | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        x3d_tf.load(rewritten(file, change))
    assert "copy.keras" in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_checkpoints_are_referred_to_the_importer(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pyth"
    if zipped:
        zipfile.ZipFile(path, "w").writestr("archive/data.pkl", b"")
    else:
        path.write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=rf"python -m x3d_tf\.import_weights {path} --variant="):
        x3d_tf.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma_w": 30.0}, "model.weights.h5 must hold at least [0-9]+ parameters"),
        ({"gamma_b": 50.0}, "model.weights.h5 must hold at least [0-9]+ parameters"),
        ({"gamma_d": 80.0}, "model.weights.h5 must hold at least [0-9]+ parameters"),
        ({"gamma_d": 10.0, "gamma_w": 0.1, "gamma_b": 0.2}, "model.weights.h5 must hold at least [0-9]+ arrays"),
    ],
    ids=str,
)
def test_a_network_too_large_for_the_file_is_not_built(
    change: dict, message: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_build_classifier", lambda metadata: pytest.fail("built"))
    with pytest.raises(UserError, match=rf"copy\.keras: {message} for the network in its metadata, got"):
        x3d_tf.load(rewritten(file, {"expansion": vars(TINY) | change}))


def test_a_classifier_too_large_for_the_file_is_rejected(file: Path) -> None:
    for count in (10_000, 100_000):
        change = {"num_classes": count, "class_names": ["a"] * count}
        with pytest.raises(UserError, match=r"model\.weights\.h5 must hold at least [0-9]+ parameters"):
            archive.describe(rewritten(file, change))


def test_metadata_counts_the_parameters_of_every_network() -> None:
    """An overestimate would reject valid files."""
    options, build = x3d_tf.ModelOptions(), metadata.Metadata
    networks = [
        (x3d_tf.build_x3d(TINY, 3), build(TINY, options, 3, True, NAMES, "trainable", 64)),
        (x3d_tf.build_x3d(TINY, 3, include_top=False), build(TINY, options, 3, False, (), "trainable", 64)),
    ]
    for head in ("full", "simple", "frame"):
        described = build(TINY, options, 3, True, NAMES, "trainable", 64, "detection", "sigmoid", detection_head=head)
        networks.append((x3d_tf.build_detector(TINY, 3, head=head), described))
    for network, described in networks:
        counts = [(weight.path.split("/")[0], weight) for weight in network.trainable_variables]
        assert sum(count for _, count in described.layers()) == sum(int(np.prod(weight.shape)) for _, weight in counts)


def zipped(file: Path, change: Callable[[str, bytes, zipfile.ZipFile], None]) -> Path:
    """Copies a model file; `change(name, content, archive)` writes each member."""
    copy = file.with_name("copy.keras")
    with zipfile.ZipFile(file) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        with zipfile.ZipFile(copy, "w") as target:
            for name in source.namelist():
                change(name, source.read(name), target)
    return copy


def _double(name: str, content: bytes, target: zipfile.ZipFile) -> None:
    target.writestr(name, content)
    if name == saving.MEMBER:
        target.writestr(name, content)


def _add(name: str, content: bytes, target: zipfile.ZipFile) -> None:
    target.writestr(name, content)
    if name == saving.MEMBER:
        target.writestr("assets/a.txt", b"a")


def _deflate(name: str, content: bytes, target: zipfile.ZipFile) -> None:
    deflated = zipfile.ZIP_DEFLATED if name == "model.weights.h5" else zipfile.ZIP_STORED
    target.writestr(name, content, compress_type=deflated)


def _without_weights(name: str, content: bytes, target: zipfile.ZipFile) -> None:
    if name != "model.weights.h5":
        target.writestr(name, content)


def _padded(member: str, size: int) -> Callable[[str, bytes, zipfile.ZipFile], None]:
    return lambda name, content, target: target.writestr(name, content + b" " * (size if name == member else 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_double, "a model file must contain each member once, got 'x3d_tf.json'"),
        (_add, r"a member of a model file must be one of model\.weights\.h5, .*, got 'assets/a.txt'"),
        (_deflate, r"model\.weights\.h5 must be stored without compression"),
        (_without_weights, r"a model file must contain model\.weights\.h5"),
        (_padded("x3d_tf.json", 17 << 20), "x3d_tf.json must have at most 16777216 bytes, got 178"),
        (_padded("metadata.json", 2 << 20), "metadata.json must have at most 1048576 bytes, got 209"),
    ],
)
def test_unexpected_members_are_rejected(change: Any, message: str, file: Path) -> None:
    with pytest.raises(UserError, match=rf"copy\.keras: {message}"):
        x3d_tf.load(zipped(file, change))


@pytest.mark.parametrize(("offset", "message"), [(8, "encrypted"), (20, "stored without"), (24, "stored without")])
def test_inconsistent_member_headers_are_rejected(offset: int, message: str, file: Path) -> None:
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\1\2")  # of the last member, the metadata
    content[entry + offset : entry + offset + 1] = b"\x01"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        x3d_tf.load(file)


def test_member_sizes_beyond_the_file_are_rejected(file: Path) -> None:
    content = bytearray(file.read_bytes())
    entry = content.index(b"model.weights.h5", content.index(b"PK\1\2")) - 46
    for offset in (20, 24):
        content[entry + offset : entry + offset + 4] = (1 << 31).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.weights\.h5 must have at most \d+ bytes, got 2147483648"):
        x3d_tf.load(file)


def _link(archive: Any, array: str) -> None:
    import h5py

    archive["elsewhere"] = h5py.SoftLink(f"/{array}")


def _external_link(archive: Any, array: str) -> None:
    import h5py

    del archive[array]
    archive[array] = h5py.ExternalLink("/etc/hostname", "/")


def _external_array(archive: Any, array: str) -> None:
    shape = archive[array].shape
    del archive[array]
    archive.create_dataset(array, shape, "f4", external=[("/etc/passwd", 0, 1 << 20)])


def _virtual_array(archive: Any, array: str) -> None:
    import h5py

    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (3,))
    archive.create_virtual_dataset("elsewhere", layout)


def _shape_bomb(archive: Any, array: str) -> None:
    archive.create_dataset("elsewhere", (1 << 28,), "f4", compression="gzip")


def _unwritten(archive: Any, array: str) -> None:
    archive.create_dataset("elsewhere", (1 << 28,), "f4")


def _second_name(archive: Any, array: str) -> None:
    archive["elsewhere"] = archive["layers"]


def _cycle(archive: Any, array: str) -> None:
    archive["layers/elsewhere"] = archive["layers"]


def _text(archive: Any, array: str) -> None:
    archive["elsewhere"] = ["text"]


def _deep(archive: Any, array: str) -> None:
    group = archive
    for _ in range(3000):
        group = group.create_group("a")
    group["elsewhere"] = archive[array]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_link, "/elsewhere must be an array or a group, not a link, got 'SoftLink'"),
        (_external_link, "must be an array or a group, not a link, got 'ExternalLink'"),
        (_external_array, "must be stored in the file itself"),
        (_virtual_array, "/elsewhere must be stored in the file itself"),
        (_shape_bomb, "/elsewhere must have the 1073741824 bytes of its shape .*, uncompressed, got 0"),
        (_unwritten, "/elsewhere must have the 1073741824 bytes of its shape .*, uncompressed, got 0"),
        (_second_name, "must have a single name"),
        (_cycle, "/layers/elsewhere must have a single name"),
        (_text, "/elsewhere must be an array of numbers"),
        (_deep, "must have groups to a depth of at most 8"),
    ],
)
def test_weights_other_than_plain_arrays_are_rejected(change: Any, message: str, file: Path) -> None:
    import h5py

    def rewrite(name: str, content: bytes, target: zipfile.ZipFile) -> None:
        if name == "model.weights.h5":
            weights = io.BytesIO(content)
            with h5py.File(weights, "r+") as archive:
                change(archive, "layers/dense_3/vars/0")
            content = weights.getvalue()
        target.writestr(name, content)

    with pytest.raises(UserError, match=rf"copy\.keras: model\.weights\.h5: .*{message}"):
        x3d_tf.load(zipped(file, rewrite))


@pytest.mark.parametrize("keep", [0, 8, 100, 10_000, -100])
def test_damaged_weights_are_reported_with_the_file(keep: int, file: Path) -> None:
    def cut(name: str, content: bytes, target: zipfile.ZipFile) -> None:
        content = content[:keep] + bytes(len(content[keep:])) if name == "model.weights.h5" else content
        target.writestr(name, content)

    with pytest.raises(UserError, match=r"copy\.keras"):
        x3d_tf.load(zipped(file, cut))


def test_missing_weights_are_an_error(file: Path) -> None:
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
    with pytest.raises(ValueError, match=r"copy\.keras do not match"):
        x3d_tf.load(copy)


def test_other_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model file or run folder; a run writes its model when"):
        x3d_tf.load(tmp_path)
    (tmp_path / "a.keras").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"a\.keras is not a \.keras file"):
        x3d_tf.load(tmp_path / "a.keras")
