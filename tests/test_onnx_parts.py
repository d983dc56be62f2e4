"""Networks as ONNX graphs: their outputs in ONNX Runtime and OpenVINO, and their operators."""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import test_efficientnet3d as mobile
from test_folded import TINY, clips, network, probabilities
from test_graph import assert_has_all_methods

import x3d_tf
from x3d_tf.modeling.layers import ChannelwiseConv3D, Conv3D, PointwiseConv3D

onnx = pytest.importorskip("onnx")
from x3d_tf.export import onnx_parts  # noqa: E402  # imports onnx

from x3d_tf.runtimes.runners import import_openvino  # noqa: E402

pytestmark = pytest.mark.usefixtures("uncompiled_module")

FORMS = get_args(onnx_parts.Form)
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def onnxruntime(model: Any) -> Run:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def openvino(model: Any) -> Run:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    core = import_openvino().Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    return lambda inputs: compiled(inputs)[0]


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}
every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)
every_form = pytest.mark.parametrize("form", FORMS)


@functools.cache
def written(form: Any, batch: int | None, *, size: int | None = None, **options: Any) -> Any:
    """Returns the ONNX model of a network of `test_folded`."""
    return onnx_parts.onnx_model(network(**options), form, size=size, batch=batch)


def assert_runs(run: Run, batch: int | None, pixels: np.ndarray, expected: np.ndarray) -> None:
    """Compares the outputs for all clips, `batch` at a time."""
    step = batch or len(pixels)
    found = [run({"clips": pixels[first : first + step]}) for first in range(0, len(pixels), step)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, 1),
        ({}, None),
        ({"separable": False}, 2),
        ({"se": "none", "stem_kernel": 3, "activation": "sigmoid"}, None),
        ({"shortcut_norm": "on_width_change", "input": "difference"}, 1),
        ({"shortcut_norm": "on_width_change", "input": "difference"}, None),
        ({"swish": False, "swish_before": True, "se": "all", "stem_kernel": 1, "drop_connect": 0.5}, 2),
    ],
    ids=str,
)
@every_form
@every_runtime
def test_outputs_equal_the_networks(runtime: str, form: str, options: dict[str, Any], batch: int | None) -> None:
    pixels = clips(2)
    expected = probabilities(network(**options), pixels)
    assert np.ptp(expected, axis=0).max() > 1e-3  # clips differ, so mixing them up would fail
    assert_runs(RUNTIMES[runtime](written(form, batch, **options)), batch, pixels, expected)


@pytest.mark.parametrize(
    ("family", "options", "batch"), [(0, {}, 1), (1, {"se": "all", "input": "difference", "swish_before": True}, None)]
)
@every_form
@every_runtime
def test_efficientnets(runtime: str, form: Any, family: int, options: dict[str, Any], batch: int | None) -> None:
    model, pixels = mobile.network(mobile.FAMILIES[family], **options), mobile.clips(2)
    expected = mobile.softmax(model, pixels)
    assert np.ptp(expected, axis=0).max() > 1e-3
    assert_runs(RUNTIMES[runtime](written_family(form, family, batch, **options)), batch, pixels, expected)


@functools.cache
def written_family(form: Any, family: int, batch: int | None, **options: Any) -> Any:
    """Returns the ONNX model of a network of `test_efficientnet3d`."""
    return onnx_parts.onnx_model(mobile.network(mobile.FAMILIES[family], **options), form, batch=batch)


@pytest.mark.parametrize(
    ("pool", "activation", "batch"),
    [("fixed_probabilities", "softmax", 2), ("fixed_logits", "softmax", 1), ("fixed_probabilities", "sigmoid", None)],
)
@every_form
@every_runtime
def test_windows_of_larger_clips(runtime: str, form: str, pool: str, activation: str, batch: int | None) -> None:
    options = {"head_pool": pool, "activation": activation}
    pixels = clips(2, 81)
    expected = probabilities(network(**options), pixels)
    assert_runs(RUNTIMES[runtime](written(form, batch, size=81, **options)), batch, pixels, expected)
    assert "AveragePool" in operators(written(form, batch, size=81, **options))
    assert "AveragePool" not in operators(written(form, batch, **options))  # with one window all poolings agree


@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (1, None), (2, 1), (2, None)])
@every_form
def test_few_frames(form: str, frames: int, batch: int | None) -> None:
    """The outer temporal taps then see mostly or only padding."""
    expansion = x3d_tf.Expansion(gamma_t=frames, gamma_s=64 / 112, gamma_d=0.2)
    pixels = clips(2, frames=frames)
    expected = probabilities(network(expansion=expansion), pixels)
    assert_runs(onnxruntime(written(form, batch, expansion=expansion)), batch, pixels, expected)


@functools.cache
def detector(head: Any) -> x3d_tf.Detector:
    """Returns a detector with the random weights of `network`, and a classifier layer that tells boxes apart."""
    model, source = x3d_tf.build_detector(TINY, 3, head=head), network()
    for layer in model.layers:
        if layer.weights and layer.name != "fc2":
            layer.set_weights(source.get_layer(layer.name).get_weights())
    kernel = model.get_layer("fc2").kernel
    kernel.assign(np.random.default_rng(0).normal(0, 1 if head == "simple" else 0.1, kernel.shape))
    return model


@functools.cache
def written_detector(form: Any, head: Any, batch: int | None) -> Any:
    """Returns the ONNX model of `detector` for clips of 96 pixels."""
    return onnx_parts.onnx_model(detector(head), form, size=96, batch=batch)


@pytest.mark.parametrize(
    ("head", "batch"), [("full", 1), ("full", 2), ("full", None), ("simple", None), ("frame", 1), ("frame", None)]
)
@every_form
@every_runtime
def test_detectors(runtime: str, form: Any, head: str, batch: int | None) -> None:
    model, run = detector(head), RUNTIMES[runtime](written_detector(form, head, batch))
    squares = np.random.default_rng(2).integers(0, 256, (batch or 2, 4, 12, 12, 3), dtype=np.uint8)
    pixels = squares.repeat(8, axis=2).repeat(8, axis=3)
    boxes = np.random.default_rng(3).uniform(-0.1, 1.1, (batch or 2, 4, 2, 2)).astype(np.float32)
    boxes = np.sort(boxes, axis=2).reshape(-1, 4, 4)
    expected = np.asarray(model({"clip": pixels, "boxes": boxes}))
    assert head == "frame" or np.ptp(expected, axis=1).max() > 1e-3  # boxes differ
    np.testing.assert_allclose(run({"clips": pixels, "boxes": boxes}), expected, atol=1e-5)
    for count in (1, 0):
        assert run({"clips": pixels, "boxes": boxes[:, :count]}).shape == (batch or 2, count, 3)
    empty = np.array([[0, 0, 0, 0], [0.2, 0.2, 0.2, 0.8], [1.5, 0.1, 2, 0.9], [0.8, 0.1, 0.3, 0.7]], np.float32)
    padded = np.concatenate([boxes[:, :2], np.broadcast_to(empty, (len(boxes), 4, 4))], axis=1)
    expected = np.asarray(model({"clip": pixels, "boxes": padded}))
    np.testing.assert_allclose(run({"clips": pixels, "boxes": padded}), expected, atol=1e-5)
    nothing = expected[:, 2:3] if head != "frame" else expected[:, :1]
    padded[:, 2, 0], padded[:, 3], padded[:, 4, 3] = np.nan, np.nan, np.nan
    found = run({"clips": pixels, "boxes": padded})
    np.testing.assert_allclose(found[:, 2:5], np.repeat(nothing, 3, axis=1), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@every_form
@every_runtime
def test_boxes_of_another_number_of_clips_have_no_scores(runtime: str, form: Any, rows: int) -> None:
    """With clip numbers from the boxes, RoIAlign would read beyond the maps."""
    graph = written_detector(form, "simple", None)
    boxes = np.broadcast_to(np.array([0.1, 0.2, 0.8, 0.9], np.float32), (rows, 4, 4))
    try:
        found = RUNTIMES[runtime](graph)({"clips": clips(2, 96), "boxes": boxes})
    except Exception as error:
        assert re.search("cannot be reshaped|equal to the first dimension of the batch indices", str(error))
    else:  # OpenVINO loses the error if it has one thread
        assert runtime == "openvino"
        assert found.size == 0


@functools.cache
def mobile_detector() -> x3d_tf.Detector:
    """Returns a detector without fc1, which sees one frame fewer than the clip has."""
    options = mobile.options(mobile.FAMILIES[0], input="difference")
    model = x3d_tf.build_detector(mobile.TINY, 3, options=options)
    source = mobile.network(mobile.FAMILIES[0], input="difference")
    for layer in model.layers:
        if layer.weights and layer.name != "fc2":
            layer.set_weights(source.get_layer(layer.name).get_weights())
    kernel = model.get_layer("fc2").kernel
    kernel.assign(np.random.default_rng(0).normal(0, 0.1, kernel.shape))
    return model


@functools.cache
def written_mobile_detector(form: Any) -> Any:
    """Returns the ONNX model of `mobile_detector`."""
    return onnx_parts.onnx_model(mobile_detector(), form, size=mobile.clips(1).shape[2], batch=2)


@every_form
@every_runtime
def test_detectors_of_efficientnets(runtime: str, form: Any) -> None:
    model = mobile_detector()
    pixels, boxes = mobile.clips(2), np.array([[0, 0, 0.5, 0.6], [0.4, 0.3, 1, 1]] * 2, np.float32).reshape(2, 2, 4)
    expected = np.asarray(model({"clip": pixels, "boxes": boxes}))
    assert np.ptp(expected, axis=0).max() > 1e-3 and np.ptp(expected, axis=1).max() > 1e-3
    run = RUNTIMES[runtime](written_mobile_detector(form))
    np.testing.assert_allclose(run({"clips": pixels, "boxes": boxes}), expected, atol=1e-5)


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def groups(node: Any) -> int:
    return next(entry.i for entry in node.attribute if entry.name == "group")


def convolutions(model: Any) -> dict[str, tuple[int, list[int]]]:
    """Returns the number of groups and the shape of the kernel of each convolution by name."""
    shapes = {constant.name: list(constant.dims) for constant in model.graph.initializer}
    return {node.name: (groups(node), shapes[node.input[1]]) for node in model.graph.node if node.op_type == "Conv"}


def test_one_grouped_convolution_for_each_channelwise_one() -> None:
    expected = {}
    for layer in network().layers:
        if isinstance(layer, ChannelwiseConv3D):
            channels = layer.kernel.shape[-1]
            expected[layer.name] = channels, [channels, 1, *layer.kernel_size]
        elif isinstance(layer, PointwiseConv3D | Conv3D) or ("_se_" in layer.name and layer.weights):
            *_, inputs, outputs = layer.kernel.shape
            kernel = list(layer.kernel.shape[:-2]) if isinstance(layer, Conv3D) else [1, 1, 1]
            expected[layer.name] = 1, [outputs, inputs, *kernel]
    assert convolutions(written("grouped", 1)) == expected
    assert "res2_0_conv_b" in expected
    assert "conv1_t" in expected
    assert "res4_1_conv_b" in expected


def test_one_depthwise_convolution_for_each_tap() -> None:
    found = convolutions(written("taps", 1))
    for layer in network().layers:
        if isinstance(layer, ChannelwiseConv3D):
            taps = [f"{layer.name}/{tap}" for tap in range(3)] if layer.kernel_size[1] > 1 else [layer.name]
            channels = -(-layer.kernel.shape[-1] // 4) * 4
            for tap in taps:
                count, shape = found.pop(tap)
                assert (count, shape[:2]) == (channels, [channels, 1])
    assert {count for count, _ in found.values()} == {1}
    assert all(len(shape) == 4 and shape[0] % 4 == 0 for _, shape in found.values())


@pytest.mark.parametrize("batch", [1, 2, None])
@every_form
def test_no_operator_is_superfluous(form: str, batch: int | None) -> None:
    """The operators that are no convolutions: what the graph requires, and nothing that folding removes."""
    found = operators(written(form, batch))
    layers = Counter(layer.name.split("_")[-1] for layer in network().layers if "res" in layer.name)
    blocks, excitations = layers["b"], layers["scale"]
    relus = 1 + 2 * blocks + 1 + excitations + 1  # stem, two in a block, conv5, squeeze-excitations, fc1
    expected = {"Relu": relus, "Add": blocks + 1, "Mul": blocks + excitations, "Sigmoid": blocks + excitations}
    expected |= {"GlobalAveragePool": excitations + 1, "MatMul": 2, "Softmax": 1, "Flatten": 1, "Pad": 1, "Cast": 1}
    if form == "grouped":
        expected |= {"Transpose": 1}
    else:
        moves = 2 * blocks
        expected |= {"Sum": blocks, "Pad": 1 + moves, "ReduceMean": excitations + 1, "Transpose": 3}
        # the clips, the stem before and after its temporal convolution, and the means; any batch: both sides of a shift
        expected |= {"Reshape": 3 + excitations + 1 + (0 if batch else 2 * moves)}
        expected |= {} if batch == 1 else {"Tile": excitations}
    found.pop("Conv")
    assert found == expected


@every_form
def test_the_interface(form: str) -> None:
    model = written(form, None)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", onnx_parts.OPSET)]
    assert model.ir_version == onnx_parts.IR_VERSION
    assert onnx_parts.shapes(model) == {"clips": ["N", 4, 64, 64, 3], "probabilities": ["N", 5]}
    assert onnx_parts.shapes(written(form, 1)) == {"clips": [1, 4, 64, 64, 3], "probabilities": [1, 5]}
    boxed = onnx_parts.shapes(written_detector(form, "frame", None))
    assert boxed == {"clips": ["N", 4, 96, 96, 3], "boxes": ["N", "B", 4], "scores": ["N", "B", 3]}
    floats = {entry.data_type for entry in model.graph.initializer} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT}


def test_onnx_runtime_has_its_fast_layout_for_all_convolutions(tmp_path: Path) -> None:
    """The number of channels of the first stage, 54, is no multiple of 4, and would prevent it."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    runtime.InferenceSession(written("taps", 1).SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    found = Counter(node.domain for node in nodes if node.op_type in ("Conv", "FusedConv"))
    if "com.microsoft.nchwc" not in found:
        pytest.skip("this processor has no blocked layout")
    assert found == {"com.microsoft.nchwc": operators(written("taps", 1))["Conv"]}


@every_form
def test_the_forms_have_the_methods_of_the_protocol(form: Any) -> None:
    assert_has_all_methods(onnx_parts._FORMS[form])


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="must have its classifier"):
        onnx_parts.onnx_model(x3d_tf.build_x3d(TINY, include_top=False), "taps")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        onnx_parts.onnx_model(network(), "taps", batch=0)
