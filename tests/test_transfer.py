"""Weight transfer: loaded layers, new layers and incompatible networks."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import x3d_tf
from x3d_tf.training import transfer as transfer_module
from x3d_tf.training.transfer import load_pretrained

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)


def network(classes: tuple[str, ...], expansion: x3d_tf.Expansion = TINY, **options: object) -> x3d_tf.X3D:
    model = x3d_tf.X3D(expansion, len(classes), x3d_tf.ModelOptions(**options))  # type: ignore[arg-type]
    model.class_names = classes
    return model


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Loads each file once: building its network takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_module, "load", functools.cache(transfer_module.load))
        yield


@pytest.fixture(scope="module", params=["trainable", "portable"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, x3d_tf.X3D]:
    """File of each format, and its network."""
    model, path = network(("a", "b")), tmp_path_factory.mktemp("source") / "model.keras"
    if request.param == "trainable":
        x3d_tf.save(model, path, ("a", "b"))
    else:
        x3d_tf.save(x3d_tf.portable(model, ("a", "b")), path)
    return path, model


def have_equal_weights(a: x3d_tf.X3D, b: x3d_tf.X3D, layer: str) -> bool:
    pairs = zip(a.get_layer(layer).get_weights(), b.get_layer(layer).get_weights())
    return all(x.shape == y.shape and np.array_equal(x, y) for x, y in pairs)


def test_all_layers_are_loaded_for_equal_classes(source: tuple[Path, x3d_tf.X3D]) -> None:
    path, theirs = source
    ours = network(("a", "b"))
    transfer = load_pretrained(ours, path)
    assert transfer.new == () and transfer.loaded[0] == "conv1_xy" and transfer.loaded[-1] == "fc2"
    assert all(have_equal_weights(ours, theirs, layer.name) for layer in theirs.layers)
    assert str(path) in str(transfer) and "newly initialised: none" in str(transfer)


@pytest.mark.parametrize("classes", [("a", "c"), ("b", "a"), ("a", "b", "c")])
def test_the_classifier_is_new_for_other_classes(source: tuple[Path, x3d_tf.X3D], classes: tuple[str, ...]) -> None:
    path, theirs = source
    longer = x3d_tf.Expansion(gamma_tau=2, gamma_t=6, gamma_s=64 / 112, gamma_b=1, gamma_d=0.2)
    ours = network(classes, longer)  # weights do not depend on the clip
    before = ours.get_layer("fc2").get_weights()
    transfer = load_pretrained(ours, path)
    assert transfer.new == ("fc2",) and transfer.loaded[-1] == "fc1"
    assert all(have_equal_weights(ours, theirs, layer.name) for layer in theirs.layers if layer.name != "fc2")
    np.testing.assert_array_equal(before[0], ours.get_layer("fc2").get_weights()[0])


def test_a_network_without_classifier_can_be_loaded(tmp_path: Path) -> None:
    features = x3d_tf.build_x3d(TINY, include_top=False)
    x3d_tf.save(features, tmp_path / "features.keras")
    assert load_pretrained(network(("a", "b")), tmp_path / "features.keras").new == ("fc1", "fc2")


def test_another_pooling_is_reported(source: tuple[Path, x3d_tf.X3D]) -> None:
    transfer = load_pretrained(network(("a", "b"), head_pool="fixed_logits"), source[0])
    assert "ModelOptions.head_pool is 'global' in the source and 'fixed_logits' in this network" in str(transfer)


@pytest.mark.parametrize(
    ("expansion", "options", "layer"),
    [
        (x3d_tf.Expansion(gamma_b=2.25, gamma_d=0.2), {}, "res2_0_conv_a"),
        (x3d_tf.Expansion(gamma_d=0.4), {}, "res4_1_conv_a"),
        (TINY, {"se": "none"}, "res2_0_se_reduce"),
    ],
)
def test_another_architecture_is_rejected(
    source: tuple[Path, x3d_tf.X3D], expansion: x3d_tf.Expansion, options: dict[str, object], layer: str
) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig.init: .* has another architecture: .* the first is {layer}"):
        load_pretrained(network(("a", "b"), expansion, **options), source[0])


@pytest.mark.parametrize(("option", "value"), [("input", "difference"), ("swish", False), ("swish_before", True)])
def test_incompatible_options_are_rejected(source: tuple[Path, x3d_tf.X3D], option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"was trained with ModelOptions\.{option} = .*, but this run has {value!r}"):
        load_pretrained(network(("a", "b"), **{option: value}), source[0])


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.keras: no such model file or run folder"):
        load_pretrained(network(("a", "b")), tmp_path / "nothing.keras")
