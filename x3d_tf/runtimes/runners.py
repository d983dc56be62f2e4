"""Runtimes of exported artefacts: every format becomes a function from clips to probabilities.

A runtime is imported when its first artefact is opened, so that a missing runtime raises an ImportError only then.
Imports no TensorFlow.
"""

import copy
import functools
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import UserError, require
from x3d_tf.modeling.cards import CARD, SAVED_MODEL, card_in_zip, files_of

SIGNATURE, OUTPUT = "serving_default", "probabilities"  # names in a SavedModel


class Runner(Protocol):
    """An opened artefact.

    Attributes:
        format: format of the artefact, such as "TFLite int8"; a key of `verify.BOUNDS`.
        clip: frames, height, width and channels of the input; None for dynamic sizes.
        batch: batch size; None if it is dynamic.
        operators: number of occurrences of each operator in the graph; empty if the runtime does not report it.
        card: model card of the exporter, JSON; empty if the artefact has none.
    """

    format: str
    clip: tuple[int | None, ...]
    batch: int | None
    operators: Mapping[str, int]
    card: str

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the probabilities (N, classes) of clips (N, T, H, W, 3)."""

    def for_another_thread(self) -> "Runner":
        """Returns a runner that may be called while this one is; it shares what the runtime can share."""


@dataclass(frozen=True)
class Artefact:
    """An exported model on disk.

    Attributes:
        path: file, or folder of a SavedModel.
        runtime: key of `RUNTIMES`.
    """

    path: Path
    runtime: str

    @property
    def bytes(self) -> int:
        """Size of the file, of all files in a folder, or of an OpenVINO .xml file with its .bin file."""
        return sum(file.stat().st_size for file in files_of(self.path))


def find_artefacts(folder: Path) -> list[Artefact]:
    """Returns the artefacts in a folder and its subfolders, sorted by path; or the artefact itself, given a file.

    Hidden files and folders are ignored, because unfinished exports are hidden.

    Raises:
        UserError: no artefact was found.
    """
    if folder.is_file():
        paths: Iterable[Path] = [folder]
    else:
        entries = (path for path in folder.rglob("*") if not path.relative_to(folder).as_posix().startswith("."))
        paths = sorted(path for path in entries if "/." not in path.relative_to(folder).as_posix())
    found = [artefact for path in paths if (artefact := artefact_of(path))]
    if not found:
        raise UserError(
            f"--artefacts={folder} and its subfolders contain no artefact: "
            "no saved_model.pb, *.tflite, *.onnx or OpenVINO *.xml file"
        )
    return found


def artefact_of(path: Path) -> Artefact | None:
    """Returns the artefact in a file, or the SavedModel that a file belongs to; None for any other file."""
    if path.name == SAVED_MODEL:
        return Artefact(path.parent, "tensorflow")
    if path.suffix.lower() == ".xml" and not _is_openvino(path):  # XML of another program
        return None
    runtime = {".tflite": "litert", ".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix.lower())
    return Artefact(path, runtime) if runtime else None


def _is_openvino(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<net" in file.read(1000)


def open_artefact(artefact: Artefact, threads: int, at_once: int = 1) -> Runner:
    """Opens an artefact for inference: on the CPU, or for a SavedModel on the devices that TensorFlow uses.

    Args:
        artefact: the artefact.
        threads: number of threads of a call; no effect in TensorFlow, see `limit_tensorflow`.
        at_once: number of runners that will be called at once; see `Runner.for_another_thread`.

    Raises:
        ImportError: the runtime is not installed.
        Exception: the runtime cannot read the file.
    """
    return RUNTIMES[artefact.runtime](artefact.path, threads, at_once)


class _TensorFlow:
    """Runs the default signature of a SavedModel, or a `.keras` file of this package as applications run it."""

    def __init__(self, path: Path, threads: int, at_once: int = 1) -> None:
        import tensorflow as tf

        card = path / CARD
        self.card = card.read_text(encoding="utf-8") if card.is_file() else ""
        self._to_tensor = tf.constant
        if path.is_dir():
            self.format = "SavedModel"
            self._module = tf.saved_model.load(str(path))  # keeps the variables of the signature alive
            require(SIGNATURE in self._module.signatures, str(path), f"have a signature named {SIGNATURE}")
            self._function = concrete = self._module.signatures[SIGNATURE]
            outputs = concrete.structured_outputs
            require(OUTPUT in outputs, str(path), f"have an output named {OUTPUT}", [*outputs])
        else:
            self.format = "Keras"
            self._function = _keras_function(path)
            concrete = self._function.get_concrete_function()
        inputs, named = concrete.structured_input_signature
        ((self._input, spec),) = {**named, **{spec.name: spec for spec in inputs}}.items()
        self.batch, *clip = spec.shape
        self.clip, self._dtype = tuple(clip), spec.dtype.as_numpy_dtype
        self.operators: Mapping[str, int] = _graph_operators(concrete.graph.as_graph_def())

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._function(**{self._input: self._to_tensor(clips.astype(self._dtype))})[OUTPUT].numpy()

    def for_another_thread(self) -> "Runner":
        return self


def limit_tensorflow(threads: int) -> None:
    """Restricts TensorFlow, in the complete process, to the CPU and a number of threads, unless it has computed."""
    import tensorflow as tf

    with suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.set_visible_devices([], "GPU")


def _keras_function(path: Path) -> Any:
    import tensorflow as tf

    import x3d_tf

    model = x3d_tf.load(path)
    portable = x3d_tf.portable(model, model.class_names)
    spec = tf.TensorSpec((None, *portable.input_shape[1:]), tf.uint8, name="clips")
    return tf.function(lambda clips: {OUTPUT: portable(clips, training=False)}, input_signature=[spec])


def _graph_operators(graph: Any) -> Counter[str]:
    nodes = Counter(node.op for node in graph.node)
    for function in graph.library.function:
        nodes.update(node.op for node in function.node_def)
    return nodes


class _LiteRT:
    """Runs a .tflite file in LiteRT's interpreter with XNNPACK, its default on CPUs."""

    def __init__(self, path: Path, threads: int, at_once: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.card = _zipped_card(path)
        plain = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
        self.operators: Mapping[str, int] = Counter(entry["op_name"] for entry in plain._get_ops_details())
        self.format = f"TFLite {_precision(plain)}"
        self._new_interpreter = functools.partial(Interpreter, str(path), num_threads=threads)
        self._start()
        shape = [None if size < 0 else int(size) for size in self._input["shape_signature"]]
        self._takes_frames = len(shape) == 4  # of one clip, as files for GPUs
        self.batch, *clip = [1, *shape] if self._takes_frames else shape
        self.clip = tuple(clip)

    def _start(self) -> None:
        self._interpreter = self._new_interpreter()
        self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.batch is None and tuple(self._input["shape"]) != clips.shape:
            self._interpreter.resize_tensor_input(self._input["index"], clips.shape)
            self._interpreter.allocate_tensors()
            (self._input,) = self._interpreter.get_input_details()
        pixels = clips[0] if self._takes_frames else clips
        self._interpreter.set_tensor(self._input["index"], _quantize(pixels, self._input))
        self._interpreter.invoke()
        output = self._interpreter.get_tensor(self._output["index"])
        scale, zero = self._output["quantization"]
        return (output.astype(np.float32) - zero) * np.float32(scale) if scale else output

    def for_another_thread(self) -> "Runner":
        other = copy.copy(self)
        other._start()
        return other


def _zipped_card(path: Path) -> str:
    """Returns the card of a .tflite file; "" if it has none, as files of other programs."""
    try:
        return card_in_zip(path).decode()
    except (KeyError, zipfile.BadZipFile):
        return ""


def _quantize(clips: NDArray[np.uint8], details: Mapping[str, Any]) -> NDArray[Any]:
    """Converts pixels to the type and the quantization of an input tensor."""
    dtype, (scale, zero) = np.dtype(details["dtype"]), details["quantization"]
    if not scale:
        return clips.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(clips / scale + zero), limits.min, limits.max).astype(dtype)


def _precision(interpreter: Any) -> str:
    """Infers the format of a TFLite file from the tensor types of its convolutions."""
    dtypes = {entry["index"]: np.dtype(entry["dtype"]).name for entry in interpreter.get_tensor_details()}
    pairs = {
        tuple(dtypes.get(index, "") for index in entry["inputs"][:2])
        for entry in interpreter._get_ops_details()
        if entry["op_name"] in ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    }
    inputs, weights = ({pair[index] for pair in pairs} for index in (0, 1))
    if "int16" in inputs:
        return "int16x8"
    if "int8" in inputs:
        return "int8"
    if "int8" in weights:
        return "dynamic"
    return "float16" if "float16" in dtypes.values() else "float32"


class _OnnxRuntime:
    """Runs an .onnx file in ONNX Runtime on the CPU."""

    format = "ONNX"

    def __init__(self, path: Path, threads: int, at_once: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # The calling threads compute too, and share the other threads of the session.
        options.intra_op_num_threads, options.inter_op_num_threads = 1 + at_once * (threads - 1), 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input, *others = self._session.get_inputs()
        require(not others, str(path), "have one input, clips", [self._input.name, *(entry.name for entry in others)])
        batch, *clip = (size if isinstance(size, int) else None for size in self._input.shape)
        self.batch, self.clip = batch, tuple(clip)
        self._dtype = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[self._input.type]
        self.operators: Mapping[str, int] = _onnx_operators(path)
        self.card = self._session.get_modelmeta().custom_metadata_map.get("card", "")

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._session.run(None, {self._input.name: clips.astype(self._dtype)})[0]

    def for_another_thread(self) -> "Runner":
        return self


def _onnx_operators(path: Path) -> Counter[str]:
    try:
        import onnx
    except ImportError:  # the runtime does not require it
        return Counter()
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def import_openvino() -> Any:
    """Imports OpenVINO without its telemetry, which sends usage data on import unless the user has opted out."""
    name = "openvino_telemetry"
    before = {key: sys.modules.pop(key) for key in [*sys.modules] if key.partition(".")[0] == name}
    sys.modules[name] = None  # type: ignore[assignment]  # the import fails, and OpenVINO uses a stub
    try:
        import openvino
    finally:
        del sys.modules[name]
        sys.modules.update(before)
    return openvino


class _OpenVINO:
    """Runs an .xml file and its .bin file in OpenVINO on the CPU, in float32.

    By default OpenVINO computes in bfloat16 on CPUs that support it, which changes the probabilities.
    """

    format = "OpenVINO"

    def __init__(self, path: Path, threads: int, at_once: int = 1) -> None:
        openvino = import_openvino()
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads * at_once}
        settings |= {"PERFORMANCE_HINT": "LATENCY"} if at_once == 1 else {"NUM_STREAMS": at_once}
        weights = path.with_suffix(".bin")
        require(weights.is_file(), str(path), f"have its weights file {weights.name} in the same folder")
        core = openvino.Core()
        model = core.read_model(path)
        names = [port.any_name for port in model.inputs]
        require(len(names) == 1, str(path), "have one input, clips", names)
        has_card = model.has_rt_info(["x3d_tf", "card"])
        self.card = str(model.get_rt_info(["x3d_tf", "card"]).astype(str)) if has_card else ""
        self.operators: Mapping[str, int] = Counter(node.get_type_name() for node in model.get_ordered_ops())
        self._model = core.compile_model(model, "CPU", settings)
        self._request = self._model.create_infer_request()
        shape = self._model.input(0).get_partial_shape()
        batch, *clip = (None if size.is_dynamic else size.get_length() for size in shape)
        self.batch, self.clip = batch, tuple(clip)
        self._dtype = self._model.input(0).get_element_type().to_dtype()

    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._request.infer([clips.astype(self._dtype)])[0]

    def for_another_thread(self) -> "Runner":
        other = copy.copy(self)
        other._request = self._model.create_infer_request()
        return other


RUNTIMES: dict[str, Any] = {
    "tensorflow": _TensorFlow,
    "litert": _LiteRT,
    "onnxruntime": _OnnxRuntime,
    "openvino": _OpenVINO,
}
EXTRAS = {
    "litert": "tflite",
    "onnxruntime": "onnx",
    "openvino": "openvino",
}  # extras of this package that install a runtime


def probabilities(runner: Runner, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the probabilities of any number of clips; pads the last batch if the batch size is fixed."""
    size = runner.batch or 8
    outputs = []
    for first in range(0, len(clips), size):
        part = clips[first : first + size]
        missing = (runner.batch or len(part)) - len(part)
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        outputs.append(np.asarray(runner(padded))[: len(part)])
    return np.concatenate(outputs)
