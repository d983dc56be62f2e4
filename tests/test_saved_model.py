"""The SavedModel: compared with the network, run from C and without this package, and given invalid input."""

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from exported_model import NAMES, TINY, model_file, opened_model, random_network, served_folder
from PIL import Image
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from test_transforms import naive_resize
from x3d_tf.export import models
from x3d_tf.export import saved_model as command
from x3d_tf.export.models import ExportableModel, open_model
from x3d_tf.export.signatures import MAX_PIXELS, decode_clips

import x3d_tf
from x3d_tf.files import WriteError
from x3d_tf.types import ViewSpec

pytestmark = pytest.mark.usefixtures("uncompiled_module")

ROOT = Path(__file__).parents[1]
SIZE, FRAMES = TINY.clip.size, TINY.clip.frames
VIEWS = ViewSpec(resize=TINY.test_size, crop=SIZE)


@pytest.fixture(scope="module")
def source() -> ExportableModel:
    return opened_model()


@pytest.fixture(scope="module")
def network(source: ExportableModel) -> x3d_tf.X3D:
    return source.model


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tf.saved_model.load(str(served_folder()))


def clips(count: int) -> np.ndarray:
    """Returns random coarse images; networks cannot distinguish noise."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, FRAMES, 4, 4, 3), np.uint8)
    return coarse.repeat(SIZE // 4, 2).repeat(SIZE // 4, 3)


def expected(network: x3d_tf.X3D, clips: Any) -> np.ndarray:
    return tf.nn.softmax(network(tf.cast(clips, tf.float32))).numpy()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def encoded(pixels: np.ndarray, file_format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


# ---- Outputs of the signatures


@pytest.mark.parametrize("count", [1, 3])
def test_clips_of_both_types(loaded: Any, network: x3d_tf.X3D, count: int) -> None:
    given = clips(count)
    probabilities = expected(network, given)
    assert np.ptp(probabilities) > 0.1
    for name, tensor in (("serving_default", tf.constant(given)), ("float_clips", tf.cast(given, tf.float32))):
        answer = {key: value.numpy() for key, value in loaded.signatures[name](clips=tensor).items()}
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-5)
        order = np.argsort(-probabilities, axis=1)[:, :5]
        assert [[name.decode() for name in row] for row in answer["top_classes"]] == np.array(NAMES)[order].tolist()
        np.testing.assert_allclose(answer["top_probabilities"], np.take_along_axis(probabilities, order, 1), atol=1e-5)


def test_gpus_compute_a_request_as_one_batch(source: ExportableModel, network: x3d_tf.X3D, tmp_path: Path) -> None:
    loops = {"While", "StatelessWhile"}
    folder = command.export_saved_model(source, tmp_path / "mine", device="gpu")
    given = clips(3)
    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](clips=tf.constant(given))
    np.testing.assert_allclose(answer["probabilities"], expected(network, given), atol=1e-5)
    assert not loops & network_operations(folder)
    assert loops & network_operations(served_folder())


def network_operations(folder: Path) -> set[str]:
    """Returns the operations of the functions that contain or call the network."""
    functions = graph_of(folder).graph_def.library.function
    return {node.op for f in functions if "classify" in f.signature.name for node in f.node_def}


def test_float_pixels_are_not_rounded(loaded: Any, network: x3d_tf.X3D) -> None:
    given = clips(1).astype(np.float32) * 0.5 + 0.25
    answer = loaded.signatures["float_clips"](clips=tf.constant(given))["probabilities"]
    np.testing.assert_allclose(answer, expected(network, given), atol=1e-5)


def naive_clip(frames: list[np.ndarray], views: ViewSpec) -> np.ndarray:
    """Scales and crops the frames one by one."""
    cropped = []
    for frame in frames:
        height, width = frame.shape[:2]
        short = min(height, width)
        target = (height * views.resize // short, width * views.resize // short)
        scaled = naive_resize(frame[None], *((views.resize, views.resize) if views.stretch else target))[0]
        top, left = ((side - views.crop + 1) // 2 for side in scaled.shape[:2])
        cropped.append(scaled[top : top + views.crop, left : left + views.crop])
    return np.stack(cropped)


def test_frames_of_any_size(loaded: Any, network: x3d_tf.X3D) -> None:
    sizes = [(60, 80), (80, 60), (40, 41), (54, 54), (30, 90), (200, 100), (55, 70), (49, 48)]
    frames = [picture(*size, seed) for seed, size in enumerate(sizes)]
    given = np.array([encoded(frame) for frame in frames], object).reshape(2, FRAMES)
    answer = loaded.signatures["encoded_frames"](frames=tf.constant(given))
    naive = np.stack([naive_clip(frames[:FRAMES], VIEWS), naive_clip(frames[FRAMES:], VIEWS)])
    np.testing.assert_allclose(answer["probabilities"], expected(network, naive), atol=1e-4)


def test_frames_are_stretched_if_the_model_was_trained_so() -> None:
    views = ViewSpec(resize=20, crop=16, stretch=True)
    frames = [picture(30, 50), picture(50, 30)]
    decoded = tf.function(decode_clips)(tf.constant([[encoded(frame) for frame in frames]]), views)
    np.testing.assert_allclose(decoded[0], naive_clip(frames, views), atol=2e-3)


@pytest.mark.parametrize(
    ("file_format", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")]
)
@pytest.mark.parametrize("trailing", [b"", b"a maker's note"])
def test_image_formats(file_format: str, mode: str, trailing: bytes) -> None:
    pixels = picture(16, 16)
    file = encoded(pixels, file_format, mode)
    seen = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    found = decode_clips(tf.constant([[file + trailing]]), ViewSpec(resize=16, crop=16))
    np.testing.assert_allclose(found[0, 0], seen, atol=3 if file_format == "JPEG" else 0)  # chroma subsampling


# ---- Invalid input


def png_head(width: int, height: int) -> bytes:
    """Returns the header of a PNG file of this size, followed by its end marker."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\2\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"", "neither a JPEG nor a PNG file:.*clip 1, frame 2"),
        (b"not an image", "neither a JPEG nor a PNG file:.*clip 1, frame 2"),
        (encoded(picture(60, 80), "GIF"), "neither a JPEG nor a PNG file:.*clip 1, frame 2"),
        (encoded(picture(60, 80), "JPEG")[:700], "a frame is truncated:.*clip 1, frame 2"),
        (encoded(picture(60, 80), "JPEG")[:-2], "a frame is truncated:.*clip 1, frame 2"),
        (b"\xff\xd8\xff", "a frame is truncated:.*clip 1, frame 2"),
        (encoded(picture(60, 80))[:-30], "a frame is truncated:.*clip 1, frame 2"),
        (png_head(1, 1)[:16], "a frame is truncated:.*clip 1, frame 2"),
        (png_head(100_000, 100_000), f"a frame has more than {MAX_PIXELS} pixels.*clip 1, frame 2"),
        (png_head(100_000, 1), "one side is more than 16 times the other.*clip 1, frame 2"),
        (b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9", "Invalid JPEG data"),
        (png_head(60, 80), "Invalid PNG"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_broken_images_are_errors(loaded: Any, broken: bytes, message: str) -> None:
    given = np.full((2, FRAMES), encoded(picture(60, 80)), object)
    given[1, 2] = broken
    signature = loaded.signatures["encoded_frames"]
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        signature(frames=tf.constant(given))
    given[1, 2] = given[0, 0]
    assert signature(frames=tf.constant(given))["probabilities"].shape == (2, 6)  # still serves


@pytest.mark.parametrize(
    ("signature", "given", "message"),
    [
        ("serving_default", np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8), r"Shape of tensor clips \[4,48,48,3\]"),
        ("serving_default", np.zeros((1, FRAMES, SIZE + 8, SIZE + 8, 3), np.uint8), r"\[1,4,56,56,3\]"),
        ("serving_default", np.zeros((1, FRAMES, SIZE, SIZE, 3), np.float32), "expected to be a uint8 tensor"),
        ("float_clips", np.zeros((1, FRAMES + 1, SIZE, SIZE, 3), np.float32), r"\[1,5,48,48,3\]"),
        ("float_clips", np.zeros((1, FRAMES, SIZE, SIZE, 3), np.uint8), "expected to be a float tensor"),
        ("float_clips", np.full((1, FRAMES, SIZE, SIZE, 3), np.nan, np.float32), "pixels must be finite numbers"),
        ("serving_default", np.zeros((0, FRAMES, SIZE, SIZE, 3), np.uint8), "clips must not be empty"),
        ("encoded_frames", np.full((0, FRAMES), b""), "clips must not be empty"),
        ("encoded_frames", np.full((FRAMES,), b""), r"Shape of tensor frames \[4\]"),
        ("encoded_frames", np.full((1, FRAMES - 1), b""), r"Shape of tensor frames \[1,3\]"),
    ],
)
def test_other_shapes_and_types_are_errors(loaded: Any, signature: str, given: np.ndarray, message: str) -> None:
    name = "frames" if signature == "encoded_frames" else "clips"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        loaded.signatures[signature](**{name: tf.constant(given)})


# ---- Loading


def graph_of(folder: Path) -> Any:
    return SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs[0]


def test_only_stock_operations_are_used() -> None:
    graph = graph_of(served_folder()).graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    functions = {function.signature.name for function in graph.library.function}
    operations = {node.op for node in nodes} - functions
    assert {"Conv2D", "DecodeJpeg", "EnsureShape", "Assert"} <= operations  # the right graph
    assert not {op for op in operations if "PyFunc" in op or ">" in op}  # Python and custom operations
    assert not [node.name for node in nodes if "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b]
    assert not [f.signature.name for f in graph.library.function if f.attr["_XlaMustCompile"].b]


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs the C program on a signature of the exported model."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    program = tmp_path_factory.mktemp("c") / "run_saved_model"
    home = Path(tf.sysconfig.get_lib())
    build = [
        "gcc",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(ROOT / "tests" / "helpers" / "run_saved_model.c"),
        "-o",
        str(program),
    ]
    build += ["-I", tf.sysconfig.get_include(), "-L", str(home), f"-Wl,-rpath,{home}"]
    build += ["-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    build += ["-fuse-ld=gold"] if shutil.which("ld.gold") else []  # four times faster
    subprocess.run(build, check=True)

    def call(signature: str, *arguments: Any) -> Any:
        found = graph_of(served_folder()).signature_def[signature]
        (fed,) = (tensor.name for tensor in found.inputs.values())
        names = [fed, found.outputs["probabilities"].name, found.outputs["top_classes"].name]
        line = [str(program), str(served_folder()), *names, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env={})

    return call


def test_loads_and_runs_from_c(c_program: Any, network: x3d_tf.X3D, tmp_path: Path) -> None:
    given = clips(2)
    (tmp_path / "clips").write_bytes(given.tobytes())
    done = c_program("serving_default", "uint8", tmp_path / "clips", *given.shape)
    assert done.returncode == 0, done.stderr
    first, *names = done.stdout.splitlines()
    probabilities = expected(network, given)
    np.testing.assert_allclose(np.array(first.split(), float).reshape(2, 6), probabilities, atol=1e-5)
    assert names == np.array(NAMES)[np.argsort(-probabilities, axis=1)[:, :5]].ravel().tolist()


def test_encoded_frames_from_c(c_program: Any, network: x3d_tf.X3D, tmp_path: Path) -> None:
    frames = [picture(60, 80, seed) for seed in range(FRAMES)]
    files = [tmp_path / str(place) for place in range(FRAMES)]
    for file, frame in zip(files, frames):
        file.write_bytes(encoded(frame))
    done = c_program("encoded_frames", "string", f"1,{FRAMES}", *files)
    assert done.returncode == 0, done.stderr
    naive = expected(network, naive_clip(frames, VIEWS)[None])[0]
    np.testing.assert_allclose(np.array(done.stdout.split("\n")[0].split(), float), naive, atol=1e-4)
    files[3].write_bytes(b"no image")
    done = c_program("encoded_frames", "string", f"1,{FRAMES}", *files)
    assert done.returncode == 3
    assert "clip 0, frame 3" in done.stderr


def test_loads_without_this_package_and_keras(network: x3d_tf.X3D, without_modules: Callable[..., None]) -> None:
    given = clips(2)
    folder, probabilities = served_folder(), expected(network, given)
    without_modules("x3d_tf", "keras")
    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](clips=tf.constant(given))
    np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-5)
    assert not {"x3d_tf", "keras"} & set(sys.modules)


# ---- The folder


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces TensorFlow's files by a text file."""

    def save(source: ExportableModel, signatures: Any, folder: Path) -> dict[str, Any]:
        (folder / "saved_model.pb").write_text("new")
        return source.card() | {"signatures": {}}

    monkeypatch.setattr(command, "_save", save)


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    command.define_flags()
    flags.FLAGS(["saved_model", "--model=unset", "--output=unset"])

    def call(**settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            command.main()

    yield call


def test_labels_and_model_card() -> None:
    folder = served_folder()
    assert (folder / "assets" / "labels.txt").read_text("utf-8").splitlines() == list(NAMES)
    card = json.loads((folder / "model_card.json").read_text("utf-8"))
    assert card["classes"] == list(NAMES)
    assert (card["input"]["frames"], card["input"]["resize"], card["input"]["crop"]) == (FRAMES, 54, SIZE)
    assert card["gmacs_per_clip"] > 0
    assert card["signatures"]["serving_default"] == {"clips": {"dtype": "uint8", "shape": ["N", FRAMES, SIZE, SIZE, 3]}}
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_warmup_requests_are_valid(loaded: Any) -> None:
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    file = served_folder() / "assets.extra" / "tf_serving_warmup_requests"
    records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    signatures = []
    for record in records:
        log = logs.PredictionLog.FromString(record)
        assert log.SerializeToString(deterministic=True) == record
        request = log.predict_log.request
        assert request.model_spec.name == "tiny"
        signature = request.model_spec.signature_name
        ((name, tensor),) = request.inputs.items()
        dtype = tf.as_dtype(tensor.dtype)
        given = tf.io.parse_tensor(tensor.SerializeToString(), dtype)  # as servers parse it
        signatures.append(signature)
        assert loaded.signatures[signature](**{name: given})["probabilities"].shape == (1, 6)
    assert signatures == ["serving_default", "float_clips", "encoded_frames"]
    assert file.stat().st_size < 10_000


def test_long_fields_of_a_message() -> None:
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    tensor = tf.make_tensor_proto(np.arange(100_000, dtype=np.uint8))
    written = command.prediction_log("m" * 127, "s" * 128, {"clips": tensor.SerializeToString()})
    request = logs.PredictionLog.FromString(written).predict_log.request
    assert request.model_spec.name == "m" * 127
    assert request.model_spec.signature_name == "s" * 128
    np.testing.assert_array_equal(tf.make_ndarray(request.inputs["clips"]), tf.make_ndarray(tensor))


def test_versions(
    run: Any,
    source: ExportableModel,
    without_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "open_model", lambda path, inputs: {str(model_file()): source}[path])
    output = tmp_path / "serving" / "hugs"
    run(model=model_file(), output=output)
    assert f"written: {output / '1'}" in capsys.readouterr().out
    run(model=model_file(), output=output, version=9)
    (output / "notes").mkdir()
    run(model=model_file(), output=output)
    assert sorted(path.name for path in output.iterdir()) == ["1", "10", "9", "notes"]

    (output / "9" / "saved_model.pb").write_text("old")
    with pytest.raises(ValueError, match=r"hugs/9 exists; omit --version to write the next one, or .* --overwrite"):
        run(model=model_file(), output=output, version=9)
    assert (output / "9" / "saved_model.pb").read_text() == "old"
    run(model=model_file(), output=output, version=9, overwrite=True)
    assert (output / "9" / "saved_model.pb").read_text() == "new"
    assert sorted(path.name for path in output.iterdir()) == ["1", "10", "9", "notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "file"}, "--output must be a folder"),
        ({"output": "mine/1"}, "--output must end in the model's name, .* got '1'"),
        ({"output": "my model"}, "--output must end in the model's name"),
        (
            {"output": "mine", "overwrite": True},
            "--overwrite must be used together with --version, the version to replace$",
        ),
        ({"output": "mine", "model": "missing.keras"}, "missing.keras: no such model file"),
    ],
)
def test_bad_settings(
    run: Any, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=message):
        run(**{"model": model_file(), **settings})
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), tf.errors.ResourceExhaustedError(None, None, "full")]
)
def test_a_failed_export_keeps_the_existing_version(
    error: Exception,
    source: ExportableModel,
    without_network: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = command.export_saved_model(source, tmp_path / "mine")

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(command, "_write_warmup", fail)
    for settings in ({}, {"version": 1, "overwrite": True}):
        with pytest.raises(WriteError, match=r"mine/\d cannot be written: (No space left on device|full)"):
            command.export_saved_model(source, tmp_path / "mine", **settings)
        assert list((tmp_path / "mine").iterdir()) == [folder]
        assert (folder / command.CARD).is_file()


def test_a_model_without_names_has_numbered_classes(without_network: None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="classes numbered from 0"):
        x3d_tf.save(random_network(classes=3), tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="has no class names: 3 classes numbered from 0"):
        source = open_model(tmp_path / "model.keras")
    assert json.loads((command.export_saved_model(source, tmp_path / "m") / command.CARD).read_text())["classes"] == [
        "0",
        "1",
        "2",
    ]
