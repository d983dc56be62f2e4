"""Tests of the detector: comparison with a naive head, number of parameters, files and exports."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_roi_align import naive

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.saving import load_classifier, load_detector

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=1, gamma_d=0.2)
SIZE = TINY.test_size  # 73, not a multiple of the 32 pixels of a cell
NAMES = ("sit", "wave", "point")


@functools.cache
def detector(head: Any = "full", **options: Any) -> Any:
    """Builds a detector with no weight at its initial value, whose scores differ between boxes."""
    keras.utils.set_random_seed(0)
    network = x3d_tf.build_detector(TINY, num_classes=3, head=head, options=x3d_tf.ModelOptions(**options))
    draw = np.random.default_rng(0)
    for layer in network.layers:
        for weight in layer.weights:
            if "seed" not in weight.path and weight.ndim == 1:
                weight.assign(draw.uniform(0.5, 1.5, weight.shape))
    fc2 = network.get_layer("fc2")
    fc2.kernel.assign(draw.standard_normal(fc2.kernel.shape) * (0.03 if head == "full" else 0.3))
    fc2.bias.assign(np.zeros(3))
    return network


@pytest.fixture(scope="module")
def network() -> Any:
    return detector()


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    corners = np.sort(draw.uniform(0, 1, (2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype("float32")
    corners[1, 2] = 0  # padding
    return {"clip": draw.integers(0, 256, (2, 4, SIZE, SIZE, 3), dtype=np.uint8), "boxes": corners}


@pytest.mark.parametrize(("head", "size"), [("full", 64), ("full", 72), ("simple", 72)])  # 72 is not a multiple of 32
def test_the_head_equals_a_naive_implementation(head: Any, size: int) -> None:
    network = detector(head)
    clip = np.zeros((1, 4, size, size, 3), np.uint8)  # boxes differ more on this than on noise
    clip[:, :, : size // 3] = np.linspace(0, 255, size)[:, None]
    boxes = np.float32([[[0.1, 0.2, 0.9, 0.7], [-0.3, 0.5, 0.4, 1.2], [0, 0, 1, 1]]])
    backbone = keras.Model(network.input, network.get_layer(network.backbone_end).output)
    maps = np.asarray(backbone({"clip": clip, "boxes": boxes}))[0].mean(axis=0)  # (H, W, C)
    pooled = naive(maps, np.clip(boxes[0], 0, 1) * size, 7, 1 / 32, True).max(axis=(1, 2))
    if network.head == "full":
        pooled = np.maximum(pooled @ np.asarray(network.get_layer("fc1").kernel), 0)
    fc2 = network.get_layer("fc2")
    expected = 1 / (1 + np.exp(-(pooled @ np.asarray(fc2.kernel) + np.asarray(fc2.bias))))
    assert np.ptp(expected, axis=0).max() > 3e-3  # boxes differ by far more than the tolerance
    np.testing.assert_allclose(network({"clip": clip, "boxes": boxes})[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("x3d_m", 3.106), ("x3d_xl", 10.3)])
def test_parameters_are_those_of_the_classifier(name: str, millions: float) -> None:
    """Checks against the 3.1 M of X3D-M in the paper's Table 8, by the convention of `cost`, without batch norm."""
    counted = cost(name, num_classes=80, head="full")
    if name == "x3d_m":
        network = x3d_tf.build_detector(name)
        assert sum(int(np.prod(weight.shape)) for weight in network.trainable_variables) == counted.params
    assert counted.params_paper / 1e6 == pytest.approx(millions, abs=0.05 if millions > 5 else 0.0005)


def test_a_portable_file_loads_without_this_package(
    network: Any,
    inputs: dict[str, np.ndarray],
    tmp_path: Path,
    without_modules: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x3d_tf.save(x3d_tf.portable(network, NAMES), tmp_path / "detector.keras")
    expected = np.asarray(network(inputs))
    without_modules("x3d_tf")
    registered = keras.saving.get_custom_objects()
    for name in list(registered):
        monkeypatch.delitem(registered, name)
    model = keras.models.load_model(tmp_path / "detector.keras")
    assert "x3d_tf" not in sys.modules
    np.testing.assert_allclose(model(inputs), expected, rtol=0, atol=1e-5)
    fewer = {"clip": inputs["clip"][:1], "boxes": inputs["boxes"][:1, :2]}
    np.testing.assert_allclose(model(fewer), expected[:1, :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["trainable", "portable"])
def test_detectors_survive_saving_and_loading(
    network: Any, inputs: dict[str, np.ndarray], tmp_path: Path, form: str
) -> None:
    path = tmp_path / "detector.keras"
    if form == "portable":
        x3d_tf.save(x3d_tf.portable(network, NAMES), path)
    else:
        x3d_tf.save(network, path, NAMES)
    again = x3d_tf.load(path)
    assert again.class_names == NAMES and again.head == network.head and again.task == "detection"
    np.testing.assert_array_equal(again(inputs), network(inputs))
    np.testing.assert_array_equal(load_detector(path)(inputs), network(inputs))
    with pytest.raises(UserError, match="is a detector"):
        load_classifier(path)


def test_load_detector_rejects_classifiers(tmp_path: Path) -> None:
    x3d_tf.save(x3d_tf.build_x3d(TINY, num_classes=3), tmp_path / "a.keras", NAMES)
    with pytest.raises(UserError, match="is not a detector: it classifies clips"):
        load_detector(tmp_path / "a.keras")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "large"}, "head must be one of full, simple, frame, got 'large'"),
        (
            {"options": x3d_tf.ModelOptions(head_pool="fixed_logits")},
            "ModelOptions.head_pool must be \"global\" for a detector, which pools boxes, got 'fixed_logits'",
        ),
        ({"num_classes": 0}, r"num_classes must be in \[1, 100000\], got 0"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        x3d_tf.build_detector(TINY, **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports a detector as a SavedModel and returns its version folder."""
    from x3d_tf.export.models import open_model
    from x3d_tf.export.saved_model import export_saved_model

    folder = tmp_path_factory.mktemp("detector")
    x3d_tf.save(x3d_tf.portable(detector(), NAMES), folder / "detector.keras")
    return export_saved_model(open_model(folder / "detector.keras", inputs=("clip", "boxes")), folder / "actions")


def test_a_saved_model_gives_the_same_scores(served: Path, inputs: dict[str, np.ndarray]) -> None:
    module = tf.saved_model.load(str(served))
    expected = np.asarray(detector()(inputs))
    for name in ("detect", "serving_default"):
        answer = module.signatures[name](clips=tf.constant(inputs["clip"]), boxes=tf.constant(inputs["boxes"]))
        np.testing.assert_allclose(answer["scores"], expected, rtol=0, atol=1e-5)
    one = module.signatures["detect"](clips=tf.constant(inputs["clip"][:1]), boxes=tf.constant(inputs["boxes"][:1, :1]))
    np.testing.assert_allclose(one["scores"], expected[:1, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((1, 3, 4), "float32")}, "boxes must have the batch size of clips"),
        ({"boxes": np.full((2, 3, 4), np.nan, "float32")}, "boxes must be finite"),
        ({"clips": np.zeros((0, 4, SIZE, SIZE, 3), np.uint8)}, "clips must not be empty"),
    ],
)
def test_a_saved_model_rejects_invalid_inputs(
    served: Path, inputs: dict[str, np.ndarray], change: dict[str, np.ndarray], message: str
) -> None:
    module = tf.saved_model.load(str(served))
    tensors = {"clips": inputs["clip"], "boxes": inputs["boxes"]} | change
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        module.signatures["detect"](**{name: tf.constant(value) for name, value in tensors.items()})


def test_the_version_folder_documents_the_detector(served: Path) -> None:
    card = json.loads((served / "model_card.json").read_text())
    assert card["task"] == "detection" and card["classes"] == list(NAMES)
    assert card["signatures"]["detect"] == {
        "clips": {"dtype": "uint8", "shape": ["N", 4, SIZE, SIZE, 3]},
        "boxes": {"dtype": "float32", "shape": ["N", None, 4]},
    }
    assert (served / "assets" / "labels.txt").read_text().split() == list(NAMES)
    logs = tf.data.TFRecordDataset(str(served / "assets.extra" / "tf_serving_warmup_requests"))
    assert [b"detect" in log for log in logs.as_numpy_iterator()] == [False, True]


def test_other_exporters_reject_detectors(tmp_path: Path) -> None:
    from x3d_tf.export.models import open_model

    x3d_tf.save(x3d_tf.portable(detector(), NAMES), tmp_path / "detector.keras")
    with pytest.raises(UserError, match="has the input boxes besides the clip, which this format does not support"):
        open_model(tmp_path / "detector.keras")


def test_the_frame_head_gives_all_boxes_the_same_scores(inputs: dict[str, np.ndarray]) -> None:
    scores = np.asarray(detector("frame")(inputs))
    assert scores.shape == (2, 3, 3)
    np.testing.assert_allclose(scores, np.repeat(scores[:, :1], 3, axis=1), rtol=0, atol=1e-6)
    assert np.abs(scores[0] - scores[1]).max() > 0
