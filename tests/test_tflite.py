"""TFLite files: what is in them, and that LiteRT computes with them what the network does."""

import json
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
from x3d_tf.export import tflite
from x3d_tf.export.models import Source, open_model

import x3d_tf
from x3d_tf._checks import UserError
from x3d_tf.modeling.deployed import deployed

litert = pytest.importorskip("ai_edge_litert.interpreter")

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=32 / 112, gamma_b=2.25, gamma_d=0.2)
NAMES = ("left", "right", "störung")


def trained(**options: Any) -> x3d_tf.X3D:
    """A network none of whose batch norms is at its first values, and whose classes differ."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(TINY, num_classes=len(NAMES), **options)
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if hasattr(layer, "moving_mean"):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    model.get_layer("fc2").kernel.assign(draw.normal(0, 0.1, model.get_layer("fc2").kernel.shape))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file and records."""
    folder = tmp_path_factory.mktemp("tflite")
    x3d_tf.save(x3d_tf.portable(trained(), NAMES), folder / "model.keras")
    write_records(folder / "records", 3)
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return open_model(folder / "model.keras")


@pytest.fixture(scope="module")
def files(folder: Path, source: Source) -> dict[str, Path]:
    """All formats, for one clip a call."""
    calibration = tflite.Calibration(folder / "records", clips=4)
    paths = tflite.export_tflite(source, folder / "out", tflite.FORMATS, calibration=calibration)
    return dict(zip(tflite.FORMATS, paths))


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    tflite.define_flags()
    flags.FLAGS(["tflite", "--model=unset", "--output=unset"])

    def call(**settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            tflite.main()

    yield call


def clips(count: int) -> np.ndarray:
    """Coloured squares, others in each clip and frame."""
    squares = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 4, 3), dtype=np.uint8)
    return squares.repeat(8, axis=2).repeat(8, axis=3)


def interpreted(content: bytes | Path, calls: np.ndarray) -> np.ndarray:
    """What LiteRT makes of uint8 (calls, batch, ...)."""
    settings = {"model_path": str(content)} if isinstance(content, Path) else {"model_content": content}
    interpreter = litert.Interpreter(**settings, num_threads=1)
    runner = interpreter.get_signature_runner()
    return np.concatenate([runner(clips=call)["probabilities"] for call in calls])


@pytest.mark.parametrize(("form", "bound"), [("float32", 1e-5), ("float16", 5e-3), ("dynamic", 0.05), ("int8", 0.1)])
def test_litert_computes_what_the_network_does(files: dict[str, Path], source: Source, form: str, bound: float) -> None:
    pixels = clips(6)
    expected = np.asarray(keras.ops.softmax(source.model(pixels)))
    found = interpreted(files[form], pixels[:, None])
    assert found.dtype == np.float32
    assert np.ptp(expected, axis=0).max() > 2 * bound  # so that an answer that is always the same would show
    np.testing.assert_allclose(found, expected, atol=bound)
    if form != "float32":
        assert np.abs(found - expected).max() > 1e-6  # it is another file


@pytest.mark.parametrize("form", tflite.FORMATS)
def test_builtin_operators_only(files: dict[str, Path], form: str) -> None:
    """By the runtime's own list, which names a custom operator by its own name."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(str(files[form]), experimental_op_resolver_type=resolver)
    listed = Counter(entry["op_name"] for entry in interpreter._get_ops_details())
    builtin = {name for name in vars(tf_schema().BuiltinOperator) if not name.startswith("_")} - {"CUSTOM"}
    assert set(listed) <= builtin
    report = json.loads(files[form].with_suffix(".json").read_text(encoding="utf-8"))
    assert report["operators"] == listed


def tf_schema() -> Any:
    from tensorflow.lite.python import schema_py_generated

    return schema_py_generated


def test_no_convolution_of_an_int8_file_is_in_float(files: dict[str, Path]) -> None:
    """Seen by the interpreter: of each operator the types of what it reads and writes."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(str(files["int8"]), experimental_op_resolver_type=resolver)
    types = {entry["index"]: np.dtype(entry["dtype"]) for entry in interpreter.get_tensor_details()}
    convolutions = [entry for entry in interpreter._get_ops_details() if entry["op_name"] in tflite.CONVOLUTIONS]
    assert len(convolutions) > 20
    for entry in convolutions:
        kinds = [types.get(index) for index in (*entry["inputs"][:2], *entry["outputs"])]
        assert kinds == [np.dtype("int8")] * 3, entry
    report = json.loads(files["int8"].with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["operator"] for row in report["left_in_float"]] == ["DEQUANTIZE"]


def test_a_byte_is_its_own_quantised_value(files: dict[str, Path]) -> None:
    (entry,) = litert.Interpreter(str(files["int8"])).get_input_details()
    assert entry["dtype"] == np.uint8
    assert entry["quantization"] == (1.0, 0)


def test_what_goes_with_a_file(files: dict[str, Path], source: Source) -> None:
    for form, path in files.items():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert archive.read("labels.txt").decode() == "left\nright\nstörung\n"
            card = json.loads(archive.read("model_card.json"))
        report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert card == report["card"] == json.loads(json.dumps(source.card()))
        assert report["format"] == form
        assert report["file"] == path.name
        assert report["bytes"] == path.stat().st_size
        assert (report["calibration"] is not None) == (form == "int8")
    assert report["calibration"]["clips"] == 4
    sizes = [files[form].stat().st_size for form in ("float32", "float16", "dynamic")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"input": "difference", "task": "multi_label", "se": "none"},
        {"separable": False, "se": "all"},
    ],
    ids=str,
)
def test_other_networks_are_integer_throughout(options: dict[str, Any]) -> None:
    model = trained(**options)
    pixels = clips(6).reshape(3, 2, 4, 32, 32, 3)
    pixels[0, 0, :, 0, :2] = [[0] * 3, [255] * 3]
    content = tflite.convert(deployed(model, batch=2), "int8", pixels)
    assert set(tflite.in_float(content)) == {"DEQUANTIZE"}
    function = keras.ops.sigmoid if model.task == "multi_label" else keras.ops.softmax
    expected = np.asarray(function(model(pixels.reshape(6, 4, 32, 32, 3))))
    np.testing.assert_allclose(interpreted(content, pixels), expected, atol=0.1)


def test_several_clips_a_call(source: Source, tmp_path: Path) -> None:
    (path,) = tflite.export_tflite(source, tmp_path, ["float32"], batch=3)
    pixels = clips(6)
    expected = np.asarray(keras.ops.softmax(source.model(pixels)))
    np.testing.assert_allclose(interpreted(path, pixels.reshape(2, 3, 4, 32, 32, 3)), expected, atol=1e-5)


def test_float_operators_of_an_int8_file_are_noticed(files: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"the int8 file computes these in float: .*CONV_2D"):
        tflite._check(files["float32"].read_bytes(), "int8")


def test_operators_of_tensorflow_are_noticed() -> None:
    function = tf.function(tf.linalg.det, input_signature=[tf.TensorSpec((2, 2))]).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    with pytest.raises(RuntimeError, match=r"not TFLite's own: CUSTOM Flex.*, CUSTOM FlexMatrixDeterminant"):
        tflite._check(converter.convert(), "float32")


def test_the_command(run: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(model=folder / "model.keras", output=tmp_path / "out", formats=["float16"])
    (path,) = (tmp_path / "out").glob("*.tflite")
    assert f"written: {path} (" in capsys.readouterr().out
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"_float16\.tflite exists; give another --output, or replace it with --force"):
        run(model=folder / "model.keras", output=tmp_path / "out", formats=["float16"])
    assert path.read_bytes() == before


def test_bad_input(run: Any, source: Source, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--formats must be of float32, float16, dynamic, int8, got 'int4'"):
        run(formats=["int4"])
    with pytest.raises(UserError, match="give --calibration=RECORDS, or leave int8 out"):
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
