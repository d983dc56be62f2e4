"""TFLite files for GPU delegates: what the delegate accepts, and their outputs compared with the folded network."""

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from exported_model import NAMES, model_file, opened_model
from video_fixtures import smooth_frames, write_video
from x3d_tf.export import tflite, verify
from x3d_tf.export.bias_correction import operator_name, read_model
from x3d_tf.export.tflite_gpu import OPERATORS, fold_for_gpu, require_gpu_operators

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.modeling.folded import fold
from x3d_tf.runtimes.exported import ExportedClassifier
from x3d_tf.runtimes.runners import find_artefacts

litert = pytest.importorskip("ai_edge_litert.interpreter")
pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=32 / 112, gamma_b=2.25, gamma_d=0.2)
CLIP = np.random.default_rng(1).integers(0, 256, (4, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2).astype(np.float32)
NETWORKS: list[Any] = [
    {},
    {"input": "difference", "se": "none", "activation": "sigmoid"},
    {"separable": False, "se": "all", "swish": False},
    {"family": "efficientnet3d"},
    pytest.param({"family": "efficientnet3d_matched"}, marks=pytest.mark.slow),
]


@functools.cache
def network(activation: Any = "softmax", **options: Any) -> x3d_tf.X3D:
    """Returns a network with random weights and the statistics of a batch, whose outputs differ between clips."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(TINY, num_classes=5, activation=activation, options=x3d_tf.ModelOptions(**options))
    draw = np.random.default_rng(0)
    norms = [layer for layer in model.layers if hasattr(layer, "moving_mean")]
    for norm in norms:
        norm.gamma.assign(draw.random(norm.gamma.shape) + 0.5)
        norm.beta.assign(draw.normal(0, 0.3, norm.beta.shape))
        norm.momentum = 0.0
    model(np.stack([CLIP, CLIP[::-1], CLIP / 2, 255 - CLIP]), training=True)
    kernel = model.get_layer("fc2").kernel
    kernel.assign(draw.normal(0, 4 / kernel.shape[0] ** 0.5, kernel.shape))
    return model


@functools.cache
def gpu_file(format_name: str = "float32", **options: Any) -> bytes:
    return tflite.convert(fold_for_gpu(network(**options)), format_name, target="gpu")


def interpreted(content: bytes, frames: np.ndarray) -> np.ndarray:
    interpreter = litert.Interpreter(model_content=content, num_threads=1)
    return interpreter.get_signature_runner()(frames=frames)["probabilities"]


def assert_accepted(content: bytes) -> None:
    """Checks the delegate's rules with the interpreter's view of the file; see gpu_compatibility.cc of TensorFlow."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    ranks = {entry["index"]: len(entry["shape"]) for entry in interpreter.get_tensor_details()}
    types = {entry["index"]: np.dtype(entry["dtype"]) for entry in interpreter.get_tensor_details()}
    found = interpreter._get_ops_details()
    assert len(found) > 50 and max(ranks.values()) == 4
    assert {entry["op_name"] for entry in found} <= {*OPERATORS}
    for entry in found:
        first, *others = entry["inputs"]
        assert types[first] == types[entry["outputs"][0]] == np.float32
        if entry["op_name"] in ("PAD", "STRIDED_SLICE"):
            assert ranks[first] in (3, 4)
        elif entry["op_name"] in ("ADD", "MUL", "SUB"):
            assert ranks[others[0]] in (0, ranks[first])
    codes = read_model(content).operatorCodes
    assert all(code.version == 1 for code in codes)


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_delegate_accepts_the_file_which_equals_the_folded_network(options: dict[str, Any]) -> None:
    assert_accepted(gpu_file(**options))
    expected, backwards = (fold(network(**options), batch=1)(clip[None]).numpy() for clip in (CLIP, CLIP[::-1]))
    assert expected.std() > 0.01 and (expected < 0.99).all()  # so that errors would be seen
    assert abs(expected - backwards).max() > 1e-3
    found = interpreted(gpu_file(**options), CLIP)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_delegate_refuses_the_file_for_cpus() -> None:
    content = tflite.convert(fold(network(), batch=1), "float32")
    with pytest.raises(RuntimeError, match=r"^GPU delegates refuse CAST version 1, .*MEAN.*, the tensor .* of rank 5"):
        require_gpu_operators(content)


@pytest.mark.parametrize(("format_name", "bound"), [("float32", 1e-4), ("float16", 0.02)])
def test_the_gpu_accelerator_of_litert_runs_the_file(format_name: str, bound: float) -> None:
    """Requires a driver for Vulkan, of a GPU or in software."""
    compiled = pytest.importorskip("ai_edge_litert.compiled_model")
    options = pytest.importorskip("ai_edge_litert.options").Options
    gpu = pytest.importorskip("ai_edge_litert.gpu_options").GpuOptions(enforce_f32=True)
    settings = options(hardware_accelerators=compiled.HardwareAccelerator.GPU, gpu_options=gpu)
    try:
        runner = compiled.CompiledModel.from_buffer(gpu_file(format_name), options=settings)
    except RuntimeError as error:
        if "Some ops are not accelerated" in str(error):
            raise
        pytest.skip(f"no GPU: {error}")
    assert runner.is_fully_accelerated()
    inputs, outputs = runner.create_input_buffers(0), runner.create_output_buffers(0)
    inputs[0].write(CLIP)
    runner.run_by_index(0, inputs, outputs)
    expected = fold(network(), batch=1)(CLIP[None]).numpy()
    np.testing.assert_allclose(outputs[0].read(5, np.float32), expected[0], atol=bound)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files of a network with clips of 4 x 48 x 48."""
    folder = tmp_path_factory.mktemp("gpu")
    paths = [*tflite.export_tflite(opened_model(), folder, tflite.TARGETS["gpu"], target="gpu")]
    assert [path.name for path in paths] == ["tiny_gpu_float32.tflite", "tiny_gpu_float16.tflite"]
    return folder


def test_cards_and_reports(folder: Path) -> None:
    for path in sorted(folder.glob("*.tflite")):
        with zipfile.ZipFile(path) as archive:
            card = json.loads(archive.read("model_card.json"))
        report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert card["target"] == report["target"] == "gpu"
        assert card == report["card"]
        assert card["artefact"] == f"TFLite {report['format']}"
        (details,) = litert.Interpreter(str(path)).get_input_details()
        assert details["dtype"] == np.dtype(card["input"]["dtype"]) == np.float32
        assert [*details["shape"]] == card["input"]["shape"] == [4, 48, 48, 3]
        assert card["input"]["range"] == [0, 255]


def test_float16_halves_the_file(folder: Path) -> None:
    float32, float16 = (folder / f"tiny_gpu_{name}.tflite" for name in ("float32", "float16"))
    assert float16.stat().st_size < 0.6 * float32.stat().st_size
    model = read_model(float16.read_bytes())
    (graph,) = model.subgraphs
    used = {operator_name(model, operator) for operator in graph.operators}
    assert "DEQUANTIZE" in used and used - {"DEQUANTIZE"} <= {*OPERATORS}
    clip = np.random.default_rng(2).integers(0, 256, (4, 48, 48, 3)).astype(np.float32)
    expected, found = (interpreted(path.read_bytes(), clip) for path in (float32, float16))
    assert 0 < abs(found - expected).max() < 0.02


def test_verify_predict_and_evaluate_run_the_files(folder: Path, tmp_path: Path) -> None:
    clips = np.random.default_rng(3).integers(0, 256, (3, 4, 48, 48, 3), np.uint8)
    rows = verify.verify(opened_model(), find_artefacts(folder), clips, threads=(1,), rounds=1)
    assert [(row.format, row.verdict) for row in rows[1:]] == [("TFLite float16", "OK"), ("TFLite float32", "OK")]
    path = folder / "tiny_gpu_float32.tflite"
    model = ExportedClassifier(path)  # the network of evaluate
    assert (model.batch, model.runtime) == (1, "TFLite float32")
    np.testing.assert_allclose(model(clips.astype(np.float32)), fold(opened_model().model)(clips), atol=1e-5)
    write_video(tmp_path / "wide.mp4", smooth_frames(41))
    (expected,), (found,) = ([*predict_videos(one, tmp_path, progress=False)] for one in (model_file(), path))
    assert isinstance(expected, Prediction) and isinstance(found, Prediction)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=2e-3)
    assert found.probabilities.shape == (len(NAMES),)


def test_invalid_settings(flags_of_one_command: None, tmp_path: Path) -> None:
    tflite.define_flags()
    flags.FLAGS(["tflite", f"--model={model_file()}", f"--output={tmp_path}", "--target=gpu"])
    for settings, message in (
        ({"formats": ["int8"]}, "--formats must be a list of float32, float16 for --target=gpu, got 'int8'"),
        ({"calibration": "data/mine"}, "--calibration is for int8 files, which --target=gpu does not have; remove it"),
        ({"batch": 2}, "--batch must be 1 for --target=gpu, whose input is one clip, got 2"),
    ):
        with flagsaver.flagsaver(**settings), pytest.raises(UserError, match=f"^{message}"):
            tflite.main()
    assert not [*tmp_path.iterdir()]
