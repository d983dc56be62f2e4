"""TFLite files: their content, and their outputs in LiteRT compared with the network."""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from moving_square import write_records
from x3d_tf.export import bias_correction, models, tflite
from x3d_tf.export.bias_correction import CONVOLUTIONS, read_model
from x3d_tf.export.models import ExportableModel, open_model

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.modeling.folded import fold

litert = pytest.importorskip("ai_edge_litert.interpreter")
pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=32 / 112, gamma_b=2.25, gamma_d=0.2)
NAMES = ("left", "right", "störung")


def trained(*, activation: Any = "softmax", **options: Any) -> x3d_tf.X3D:
    """Returns a network with random batch norms that gives different probabilities for each of `clips`."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(
        TINY, num_classes=len(NAMES), activation=activation, options=x3d_tf.ModelOptions(**options)
    )
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if hasattr(layer, "moving_mean"):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    pixels = clips(6).astype(np.float32)
    features = keras.Model(model.input, model.get_layer("fc2").input)(pixels).numpy()
    kernel = np.linalg.svd(features - features.mean(0))[2][: len(NAMES)].T  # the directions of the largest variance
    kernel /= (features @ kernel).std(axis=0)
    model.get_layer("fc2").set_weights([kernel, -(features @ kernel).mean(axis=0)])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file and records."""
    folder = tmp_path_factory.mktemp("tflite")
    x3d_tf.save(trained(), folder / "model.keras", NAMES)
    write_records(folder / "records", 3)
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> ExportableModel:
    return open_model(folder / "model.keras")


@pytest.fixture(scope="module")
def exported(folder: Path, source: ExportableModel) -> tuple[dict[str, Path], bytes]:
    """Files of all formats, with a batch size of 1, and the float32 file that the int8 biases were compared with."""
    references: list[bytes] = []

    def record(content: bytes, reference: bytes, clips: np.ndarray) -> bytes:
        references.append(reference)
        return bias_correction.correct_biases(content, reference, clips)

    calibration = tflite.Calibration(folder / "records", clips=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tflite, "correct_biases", record)
        paths = list(tflite.export_tflite(source, folder / "out", tflite.FORMATS, calibration=calibration))
    (reference,) = references
    return dict(zip(tflite.FORMATS, paths)), reference


@pytest.fixture(scope="module")
def files(exported: tuple[dict[str, Path], bytes]) -> dict[str, Path]:
    return exported[0]


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    tflite.define_flags()
    flags.FLAGS(["tflite", "--model=unset", "--output=unset"])

    def call(**settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            tflite.main()

    yield call


def clips(count: int) -> np.ndarray:
    """Returns random coloured squares, brighter from clip to clip."""
    squares = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 4, 3))
    squares = squares * np.linspace(0.2, 1, count)[:, None, None, None, None]
    return squares.astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)


def interpreted(content: bytes | Path, calls: np.ndarray) -> np.ndarray:
    """Returns the probabilities that LiteRT computes for uint8 (calls, batch, ...)."""
    settings = {"model_path": str(content)} if isinstance(content, Path) else {"model_content": content}
    interpreter = litert.Interpreter(**settings, num_threads=1)
    runner = interpreter.get_signature_runner()
    return np.concatenate([runner(clips=call)["probabilities"] for call in calls])


@pytest.mark.parametrize(("name", "bound"), [("float32", 1e-4), ("float16", 0.03), ("dynamic", 0.3), ("int8", 0.3)])
def test_litert_matches_the_network(files: dict[str, Path], source: ExportableModel, name: str, bound: float) -> None:
    pixels = clips(6)
    expected = np.asarray(keras.ops.softmax(source.model(pixels)))
    found = interpreted(files[name], pixels[:, None])
    assert found.dtype == np.float32
    assert np.ptp(expected, axis=0).max() > 2 * bound  # so that constant outputs fail
    np.testing.assert_allclose(found, expected, atol=bound)
    if name != "float32":
        assert np.abs(found - expected).max() > 1e-6  # a different file


@pytest.mark.parametrize("name", tflite.FORMATS)
def test_builtin_operators_only(files: dict[str, Path], name: str) -> None:
    """Compares the operators with the runtime's list, which contains custom operators by their own names."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(str(files[name]), experimental_op_resolver_type=resolver)
    listed = Counter(entry["op_name"] for entry in interpreter._get_ops_details())
    builtin = {name for name in vars(tf_schema().BuiltinOperator) if not name.startswith("_")} - {"CUSTOM"}
    assert set(listed) <= builtin
    report = json.loads(files[name].with_suffix(".json").read_text(encoding="utf-8"))
    assert report["operators"] == listed


def tf_schema() -> Any:
    from tensorflow.lite.python import schema_py_generated

    return schema_py_generated


def test_convolutions_are_int8_except_those_listed_in_the_report(files: dict[str, Path]) -> None:
    report = json.loads(files["int8"].with_suffix(".json").read_text(encoding="utf-8"))
    left = [row["name"] for row in report["left_in_float"] if row["operator"] in CONVOLUTIONS]
    assert 5 < len(left) < 20
    assert all("conv1_" in name or "res2" in name or "fc2" in name for name in left)
    assert convolutions_in_float(files["int8"].read_bytes()) == left


def convolutions_in_float(content: bytes) -> list[str]:
    """Returns the names of the convolutions with other types than int8, according to the interpreter."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    names = {entry["index"]: entry["name"] for entry in interpreter.get_tensor_details()}
    types = {entry["index"]: np.dtype(entry["dtype"]) for entry in interpreter.get_tensor_details()}
    convolutions = [entry for entry in interpreter._get_ops_details() if entry["op_name"] in CONVOLUTIONS]
    assert len(convolutions) > 20
    kinds = [[types.get(index) for index in (*entry["inputs"][:2], *entry["outputs"])] for entry in convolutions]
    return [names[entry["outputs"][0]] for entry, kind in zip(convolutions, kinds) if kind != [np.dtype("int8")] * 3]


def test_pixels_are_quantized_without_rounding(files: dict[str, Path]) -> None:
    (entry,) = litert.Interpreter(str(files["int8"])).get_input_details()
    assert entry["dtype"] == np.uint8
    assert entry["quantization"] == (1.0, 0)


def test_metadata_and_report(files: dict[str, Path], source: ExportableModel) -> None:
    for name, path in files.items():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert archive.read("labels.txt").decode() == "left\nright\nstörung\n"
            card = json.loads(archive.read("model_card.json"))
        report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stated = json.loads(json.dumps(source.card(1)))
        stated["input"] |= {"dtype": "uint8", "range": [0, 255]}
        assert card == report["card"] == stated | {"artefact": f"TFLite {name}", "target": "cpu"}
        assert card["input"]["shape"] == [1, 4, 32, 32, 3]
        assert report["format"] == name
        assert report["file"] == path.name
        assert report["bytes"] == path.stat().st_size
        assert (report["calibration"] is not None) == (name == "int8")
    assert report["calibration"]["clips"] == 4
    sizes = [files[name].stat().st_size for name in ("float32", "float16", "dynamic")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"input": "difference", "activation": "sigmoid", "se": "none"},
        pytest.param({"separable": False, "se": "all"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_networks_are_quantized_completely(options: dict[str, Any]) -> None:
    model = trained(**options)
    pixels = clips(6).reshape(3, 2, 4, 32, 32, 3)
    pixels[0, 0, :, 0, :2] = [[0] * 3, [255] * 3]
    content = tflite.convert(fold(model, batch=2), "int8", pixels, float_until="none")
    assert convolutions_in_float(content) == []
    assert tflite.left_in_float(content) == []
    function = keras.ops.sigmoid if model.activation == "sigmoid" else keras.ops.softmax
    expected = np.asarray(function(model(pixels.reshape(6, 4, 32, 32, 3))))
    np.testing.assert_allclose(interpreted(content, pixels), expected, atol=0.3)


def test_larger_batches(source: ExportableModel, tmp_path: Path) -> None:
    (path,) = tflite.export_tflite(source, tmp_path, ["float32"], batch=3)
    pixels = clips(6)
    expected = np.asarray(keras.ops.softmax(source.model(pixels)))
    np.testing.assert_allclose(interpreted(path, pixels.reshape(2, 3, 4, 32, 32, 3)), expected, atol=1e-4)


def test_unexpected_float_operators_of_an_int8_file_are_errors(files: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"the int8 file has unexpected float operators: .*CONV_2D"):
        tflite._check(files["float32"].read_bytes(), "int8", float_until="res2")


def test_operators_of_tensorflow_are_errors() -> None:
    function = tf.function(tf.linalg.det, input_signature=[tf.TensorSpec((2, 2))]).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    with pytest.raises(RuntimeError, match=r"that are not builtin: CUSTOM Flex.*, CUSTOM FlexMatrixDeterminant"):
        tflite._check(converter.convert(), "float32", float_until="res2")


def test_the_command(
    run: Any,
    source: ExportableModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "open_model", {str(source.path): source}.__getitem__)
    run(model=source.path, output=tmp_path / "out", formats=["float16"])
    (path,) = (tmp_path / "out").glob("*.tflite")
    assert path.name == "model_float16.tflite"
    assert f"written: {path} (" in capsys.readouterr().out
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"already exists: .*_float16\.tflite; choose another --output, or replace with --overwrite"
    ):
        run(model=source.path, output=tmp_path / "out", formats=["float16"])
    assert path.read_bytes() == before
    with zipfile.ZipFile(path) as archive:
        converted = before[: min(entry.header_offset for entry in archive.infolist())]
    monkeypatch.setattr(tflite, "convert", lambda *_, **__: converted)  # saves the second conversion
    path.write_bytes(b"another")
    run(model=source.path, output=tmp_path / "out", formats=["float16"], overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_model_without_class_names(tmp_path: Path) -> None:
    x3d_tf.save(trained(), tmp_path / "model.keras", ["0", "1", "2"])
    with pytest.warns(UserWarning, match="has no class names: 3 classes numbered from 0"):
        source = open_model(tmp_path / "model.keras")
    (path,) = tflite.export_tflite(source, tmp_path, ["dynamic"])
    with zipfile.ZipFile(path) as archive:
        assert archive.read("labels.txt") == b"0\n1\n2\n"


@pytest.mark.parametrize("shape", [(1, 5, 32, 32, 3), (1, 4, 48, 32, 3), (2, 4, 32, 32, 3), (4, 32, 32, 3)], ids=str)
def test_a_clip_of_another_shape_is_refused(files: dict[str, Path], shape: tuple[int, ...]) -> None:
    interpreter = litert.Interpreter(str(files["float32"]))
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    with pytest.raises(ValueError, match="Dimension mismatch"):
        interpreter.set_tensor(given["index"], np.zeros(shape, np.uint8))


def test_a_wrong_bias_is_corrected(exported: tuple[dict[str, Path], bytes]) -> None:
    def bias_of(content: bytes | bytearray) -> tuple[np.ndarray, float]:
        """Returns the bias of the last conv_c, whose outputs are not clipped at zero, and the scale of its entry 3."""
        model = read_model(content)
        graph = model.subgraphs[0]
        operator = [entry for entry in graph.operators if b"conv_c" in graph.tensors[entry.outputs[0]].name][-1]
        bias = graph.tensors[operator.inputs[2]]
        return model.buffers[bias.buffer].data.view(np.int32), bias.quantization.scale[3]

    files, reference = exported
    content, pixels = files["int8"].read_bytes(), clips(6)[:, None]
    wrong = bytearray(content)
    values, unit = bias_of(wrong)
    values[3] += round(0.5 / unit)
    corrected = bias_correction.correct_biases(bytes(wrong), reference, pixels)
    before, after = (bias_of(file)[0][3] for file in (content, corrected))
    assert abs(before - after) * unit < 0.15
    assert len(corrected) == len(content)


def test_the_example_in_the_readme(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = (
        (Path(__file__).parent.parent / "export" / "README.md")
        .read_text("utf-8")
        .split("\n## TFLite\n")[1]
        .split("\n## ")[0]
    )
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.M)
    exec(code.replace("exported/mine/mine_int8.tflite", str(files["int8"])), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


def test_invalid_input(run: Any, source: ExportableModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--formats must be a list of float32, float16, dynamic, int8, got 'int4'"):
        run(formats=["int4"])
    with pytest.raises(UserError, match="int8 requires --calibration=RECORDS; set it, or remove int8"):
        run(formats=["float32", "int8"])
    with pytest.raises(UserError, match="no such model file"):
        run(model=tmp_path / "none.keras", formats=["float32"])
    for records, split, message in (
        (tmp_path, "train", "manifest"),
        (folder / "records", "test", "has no split 'test'; it has train"),
    ):
        with pytest.raises(UserError, match=message):
            list(
                tflite.export_tflite(source, tmp_path / "out", ["int8"], calibration=tflite.Calibration(records, split))
            )
    assert not (tmp_path / "out").exists()
