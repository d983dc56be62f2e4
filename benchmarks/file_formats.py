"""Implementations that run from a file: the formats of `export/`, and pytorchvideo's ONNX.

The writers write a file to the folder of a case. The openers return the function to measure.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import Case
from numpy.typing import NDArray
from synthetic_clips import normalized, softmax, squares

from x3d_tf.errors import require
from x3d_tf.runtimes.runners import Artefact, limit_tensorflow, open_artefact

if TYPE_CHECKING:
    from x3d_tf.export.onnx import Runtime

Call = Callable[[], NDArray[np.float32]]


def write_saved_model(case: Case) -> None:
    """Writes `serving/1`."""
    from x3d_tf.export.saved_model import export_saved_model

    export_saved_model(_open_source(case), Path(case.folder) / "serving")


def write_tflite(case: Case, file: str, format_name: str) -> None:
    """Writes a TFLite file for the case; int8 is calibrated on synthetic clips, which do not affect its speed."""
    from x3d_tf.export import tflite

    from x3d_tf.modeling.folded import fold

    inference = fold(_open_source(case).model, batch=case.batch)
    calls = -(-4 // case.batch)
    clips = squares(case.network, calls * case.batch)
    content = tflite.convert(inference, format_name, clips.reshape(calls, case.batch, *clips.shape[1:]))
    (Path(case.folder) / file).write_bytes(content)


def write_exported(case: Case, format_name: str, runtime: "Runtime", batch: int | None = None) -> None:
    """Writes `for_RUNTIME/NETWORK.onnx` or `for_RUNTIME/NETWORK.xml`.

    Args:
        case: the computation, whose batch size the file has by default.
        format_name: "onnx" or "openvino".
        runtime: the runtime that the file is intended for.
        batch: another batch size, which is then part of the folder's name: `for_RUNTIME_BATCH`.
    """
    from x3d_tf.export.onnx import export_formats

    folder = Path(case.folder) / (f"for_{runtime}_{batch}" if batch else f"for_{runtime}")
    export_formats(_open_source(case), folder, [format_name], runtime=runtime, batch=batch or case.batch)


def _open_source(case: Case) -> Any:
    """Opens the network for export, from a file that is written if it is missing."""
    from command import CLASSES
    from tensorflow_networks import limit_threads, network
    from x3d_tf.export.models import open_model

    import x3d_tf

    limit_threads(case.threads)
    file = Path(case.folder) / f"{case.network}.keras"
    if not file.exists():
        x3d_tf.save(network(case.network), file, [f"class {number}" for number in range(CLASSES)])
    return open_model(file)


def ours(case: Case, file: str, runtime: str) -> Call:
    """Runs an artefact as in `export.verify`. "{network}" in `file` is replaced by the name of the network."""
    if runtime == "tensorflow":
        limit_tensorflow(case.threads)
    runner = open_artefact(Artefact(_path(case, file), runtime), case.threads)
    require(runner.batch in (None, case.batch), f"the batch size of {file}", f"be {case.batch}", runner.batch)
    clips = squares(case.network, case.batch)
    return lambda: runner(clips)


def openvino(case: Case, file: str, precision: str, *, peer: bool = False) -> Call:
    """Runs an .xml or .onnx file, ours or pytorchvideo's, in OpenVINO with the precision "f32" or "bf16"."""
    model = _compile_openvino(case, file, precision, "LATENCY")
    clips = squares(case.network, case.batch)
    if not peer:
        return lambda: model(clips, share_inputs=True)[0]
    normalized_clips = normalized(clips)
    return lambda: softmax(model(normalized_clips, share_inputs=True)[0])


def openvino_throughput(case: Case, file: str, precision: str, *, peer: bool = False) -> Call:
    """Runs the clips of the case one by one in the throughput mode of OpenVINO, which computes several at a time.

    Args:
        case: the computation.
        file: .xml or .onnx file with a batch size of 1, ours or pytorchvideo's.
        precision: "f32" or "bf16".
        peer: whether the file is pytorchvideo's.
    """
    from x3d_tf.runtimes.runners import import_openvino

    queue = import_openvino().AsyncInferQueue(_compile_openvino(case, file, precision, "THROUGHPUT"))
    outputs: list[Any] = [None] * case.batch

    def keep(request: Any, number: int) -> None:
        outputs[number] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)
    clips = squares(case.network, case.batch)
    inputs = normalized(clips) if peer else clips

    def call() -> NDArray[np.float32]:
        for number in range(case.batch):
            queue.start_async([inputs[number : number + 1]], number, share_inputs=True)
        queue.wait_all()
        found = np.concatenate(outputs)
        return softmax(found) if peer else found

    return call


def _compile_openvino(case: Case, file: str, precision: str, hint: str) -> Any:
    """Compiles a file for the CPU, with a value of OpenVINO's PERFORMANCE_HINT."""
    from x3d_tf.runtimes.runners import import_openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": hint,
    }
    return import_openvino().Core().compile_model(str(_path(case, file)), "CPU", settings)


def onnxruntime(case: Case, file: str) -> Call:
    """Runs pytorchvideo's .onnx file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    session = onnxruntime.InferenceSession(str(_path(case, file)), options, providers=["CPUExecutionProvider"])
    (session_input,) = session.get_inputs()
    clips = normalized(squares(case.network, case.batch))
    return lambda: softmax(session.run(None, {session_input.name: clips})[0])


def _path(case: Case, file: str) -> Path:
    return Path(case.folder) / file.format(network=case.network)
