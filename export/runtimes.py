"""Artefacts and what runs them: each form of a model as a function from clips to probabilities.

A form's runtime is imported when the first artefact of it is opened, so that one that is not installed is an
ImportError there and nowhere else.
"""

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import UserError, require

CARD = "model_card.json"  # in a SavedModel's folder and in a .tflite file
SIGNATURE, OUTPUT = "serving_default", "probabilities"  # of a SavedModel


class Runner(Protocol):
    """An opened artefact.

    Attributes:
        form: what it is, such as "TFLite int8"; the name of its bounds.
        clip: frames, height, width and channels of its clips; None where any number will do.
        batch: clips of a call; None where any number will do.
        operators: how often each operator is in its graph; empty where the runtime does not tell.
        card: the model card that the exporter put into it, JSON; empty where there is none.
    """

    form: str
    clip: tuple[int | None, ...]
    batch: int | None
    operators: Mapping[str, int]
    card: str

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (N, classes) of clips (N, T, H, W, 3)."""


@dataclass(frozen=True)
class Artefact:
    """Where a form of a model lies.

    Attributes:
        path: the file, or the folder of a SavedModel.
        runtime: a key of `RUNTIMES`.
    """

    path: Path
    runtime: str

    @property
    def bytes(self) -> int:
        """Its size: of a folder that of all files in it, of OpenVINO's .xml together with its .bin."""
        if self.path.is_dir():
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        files = [self.path, self.path.with_suffix(".bin")] if self.runtime == "openvino" else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


def find_artefacts(folder: Path) -> list[Artefact]:
    """All artefacts in a folder and below, or the one that is named, sorted by path.

    Hidden files and folders are left out: what is being written is hidden.

    Raises:
        UserError: there is none.
    """
    if folder.is_file():
        paths: Iterable[Path] = [folder]
    else:
        hidden = (path for path in folder.rglob("*") if not path.relative_to(folder).as_posix().startswith("."))
        paths = sorted(path for path in hidden if "/." not in path.relative_to(folder).as_posix())
    found = [artefact for path in paths if (artefact := _artefact(path))]
    if not found:
        raise UserError(
            f"--artefacts={folder} holds no artefact: no saved_model.pb, *.tflite, *.onnx or OpenVINO *.xml, "
            "nor does any folder below"
        )
    return found


def _artefact(path: Path) -> Artefact | None:
    if path.name == "saved_model.pb":
        return Artefact(path.parent, "tensorflow")
    if path.suffix == ".xml" and not _is_openvino(path):  # some other XML
        return None
    runtime = {".tflite": "litert", ".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix)
    return Artefact(path, runtime) if runtime else None


def _is_openvino(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<net" in file.read(1000)


def open_artefact(artefact: Artefact, threads: int) -> Runner:
    """Opens an artefact, to be run on so many threads of the CPU.

    TensorFlow counts threads by process: those of the first artefact hold for all.

    Raises:
        ImportError: its runtime is not installed.
        Exception: whatever the runtime makes of a file that it cannot read.
    """
    return RUNTIMES[artefact.runtime](artefact.path, threads)


class _TensorFlow:
    """A SavedModel, asked by its default signature; or a model file of ours, as an application runs it."""

    def __init__(self, path: Path, threads: int) -> None:
        import tensorflow as tf

        _limit_threads(threads)
        card = path / CARD
        self.card = card.read_text(encoding="utf-8") if card.is_file() else ""
        self._tensor_of = tf.constant
        if (path / "saved_model.pb").is_file():
            self.form = "SavedModel"
            self._module = tf.saved_model.load(str(path))  # what a signature's variables live by
            require(SIGNATURE in self._module.signatures, str(path), f"have the signature {SIGNATURE}", "none")
            self._function = concrete = self._module.signatures[SIGNATURE]
            require(
                OUTPUT in concrete.structured_outputs, str(path), f"put out {OUTPUT}", [*concrete.structured_outputs]
            )
        else:
            self.form = "Keras"
            self._function = _keras_function(path)
            concrete = self._function.get_concrete_function()
        inputs, named = concrete.structured_input_signature
        ((self._input, spec),) = {**named, **{spec.name: spec for spec in inputs}}.items()
        self.batch, *clip = spec.shape
        self.clip, self._dtype = tuple(clip), spec.dtype.as_numpy_dtype
        self.operators = _graph_operators(concrete.graph.as_graph_def())

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._function(**{self._input: self._tensor_of(clips.astype(self._dtype))})[OUTPUT].numpy()


def _limit_threads(threads: int) -> None:
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.set_visible_devices([], "GPU")


def _keras_function(path: Path) -> Any:
    import tensorflow as tf

    import x3d_tf

    model = x3d_tf.load(path)
    app = x3d_tf.portable(model, model.class_names)
    spec = tf.TensorSpec((None, *app.input_shape[1:]), tf.uint8, name="clips")
    return tf.function(lambda clips: {OUTPUT: app(clips, training=False)}, input_signature=[spec])


def _graph_operators(graph: Any) -> Counter[str]:
    nodes = Counter(node.op for node in graph.node)
    for function in graph.library.function:
        nodes.update(node.op for node in function.node_def)
    return nodes


class _LiteRT:
    """A .tflite file, in LiteRT's interpreter with XNNPACK, its default on CPUs."""

    def __init__(self, path: Path, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.card = _packed_card(path)
        plain = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
        self.operators = Counter(entry["op_name"] for entry in plain._get_ops_details())
        self.form = f"TFLite {_precision(plain)}"
        self._interpreter = Interpreter(str(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()
        batch, *clip = (None if size < 0 else int(size) for size in self._input["shape_signature"])
        self.batch, self.clip = batch, tuple(clip)

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.batch is None and tuple(self._input["shape"]) != clips.shape:
            self._interpreter.resize_tensor_input(self._input["index"], clips.shape)
            self._interpreter.allocate_tensors()
            (self._input,) = self._interpreter.get_input_details()
        self._interpreter.set_tensor(self._input["index"], _quantised(clips, self._input))
        self._interpreter.invoke()
        found = self._interpreter.get_tensor(self._output["index"])
        scale, zero = self._output["quantization"]
        return (found.astype(np.float32) - zero) * np.float32(scale) if scale else found


def _packed_card(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        return archive.read(CARD).decode() if CARD in archive.namelist() else ""


def _quantised(clips: NDArray[np.uint8], details: Mapping[str, Any]) -> NDArray[Any]:
    """Pixels as an input tensor holds them."""
    dtype, (scale, zero) = np.dtype(details["dtype"]), details["quantization"]
    if not scale:
        return clips.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(clips / scale + zero), limits.min, limits.max).astype(dtype)


def _precision(interpreter: Any) -> str:
    """What the convolutions of a TFLite file compute with, told from the types of their tensors."""
    dtypes = {entry["index"]: np.dtype(entry["dtype"]).name for entry in interpreter.get_tensor_details()}
    pairs = {
        tuple(dtypes.get(index, "") for index in entry["inputs"][:2])
        for entry in interpreter._get_ops_details()
        if entry["op_name"] in ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    }
    inputs, weights = ({pair[place] for pair in pairs} for place in (0, 1))
    if "int16" in inputs:
        return "int16x8"
    if "int8" in inputs:
        return "int8"
    if "int8" in weights:
        return "dynamic"
    return "float16" if "float16" in dtypes.values() else "float32"


class _OnnxRuntime:
    """An .onnx file, in ONNX Runtime on the CPU."""

    form = "ONNX"

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (self._input,) = self._session.get_inputs()
        batch, *clip = (size if isinstance(size, int) else None for size in self._input.shape)
        self.batch, self.clip = batch, tuple(clip)
        self._dtype = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[self._input.type]
        self.operators = _onnx_operators(path)
        self.card = self._session.get_modelmeta().custom_metadata_map.get("card", "")

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._session.run(None, {self._input.name: clips.astype(self._dtype)})[0]


def _onnx_operators(path: Path) -> Counter[str]:
    try:
        import onnx
    except ImportError:  # the runtime does without it
        return Counter()
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


class _OpenVINO:
    """An .xml file with its .bin, in OpenVINO on the CPU, in float32.

    By itself OpenVINO computes in bfloat16 on CPUs that have it: faster, and with other probabilities.
    """

    form = "OpenVINO"

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        weights = path.with_suffix(".bin")
        require(weights.is_file(), str(path), f"have its weights beside it, in {weights.name}", "no such file")
        core = openvino.Core()
        read = core.read_model(path)
        known = read.has_rt_info(["x3d_tf", "card"])
        self.card = str(read.get_rt_info(["x3d_tf", "card"]).astype(str)) if known else ""
        self.operators = Counter(node.get_type_name() for node in read.get_ordered_ops())
        self._model = core.compile_model(read, "CPU", settings)
        shape = self._model.input(0).get_partial_shape()
        batch, *clip = (None if size.is_dynamic else size.get_length() for size in shape)
        self.batch, self.clip = batch, tuple(clip)
        self._dtype = self._model.input(0).get_element_type().to_dtype()

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._model(clips.astype(self._dtype))[0]


RUNTIMES: dict[str, Any] = {
    "tensorflow": _TensorFlow,
    "litert": _LiteRT,
    "onnxruntime": _OnnxRuntime,
    "openvino": _OpenVINO,
}
EXTRAS = {"litert": "tflite", "onnxruntime": "onnx", "openvino": "openvino"}  # of this package, that install a runtime


def probabilities(runner: Runner, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities of any number of clips, in as many calls as an artefact needs; the last one is filled up."""
    size = runner.batch or 8
    found = []
    for first in range(0, len(clips), size):
        part = clips[first : first + size]
        missing = (runner.batch or len(part)) - len(part)
        filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        found.append(np.asarray(runner(filled))[: len(part)])
    return np.concatenate(found)
