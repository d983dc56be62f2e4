"""Files that runtimes run: those that `export/` writes, and pytorchvideo's ONNX.

The writers get a case and put a file into its folder; the openers give the call to measure.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from clips import normalized, softmax, squares
from measuring import Case
from numpy.typing import NDArray
from x3d_tf.export.runtimes import Artefact, open_artefact

from x3d_tf.errors import require

Call = Callable[[], NDArray[np.float32]]


def write_saved_model(case: Case) -> None:
    """Writes `serving/1`."""
    from x3d_tf.export.saved_model import export_saved_model

    export_saved_model(_source(case), Path(case.folder) / "serving")


def write_tflite(case: Case, file: str, form: str) -> None:
    """Writes a TFLite file of the case's batch, int8 ones calibrated on made-up clips: speed depends on none."""
    from x3d_tf.export import tflite

    from x3d_tf.modeling.folded import deployed

    app = deployed(_source(case).model, batch=case.batch)
    calls = -(-4 // case.batch)
    clips = squares(case.network, calls * case.batch)
    content = tflite.convert(app, form, clips.reshape(calls, case.batch, *clips.shape[1:]))
    (Path(case.folder) / file).write_bytes(content)


def write_exported(case: Case, form: str) -> None:
    """Writes `NETWORK.onnx` or `NETWORK.xml` of the case's batch."""
    from x3d_tf.export.onnx import export_formats

    export_formats(_source(case), Path(case.folder), [form], batch=case.batch)


def _source(case: Case) -> Any:
    """The network as the exporters take it: from a file, which is written where it is missing."""
    from command import CLASSES
    from tensorflow_forms import limit_threads, network
    from x3d_tf.export.models import open_model

    import x3d_tf

    limit_threads(case.threads)
    file = Path(case.folder) / f"{case.network}.keras"
    if not file.exists():
        x3d_tf.save(network(case.network), file, [f"class {number}" for number in range(CLASSES)])
    return open_model(file)


def ours(case: Case, file: str, runtime: str) -> Call:
    """An artefact, run as `export.verify` runs it. In `file`, "{network}" is the case's."""
    runner = open_artefact(Artefact(_path(case, file), runtime), case.threads)
    require(runner.batch in (None, case.batch), f"the batch of {file}", f"be {case.batch}", runner.batch)
    clips = squares(case.network, case.batch)
    return lambda: runner(clips)


def openvino(case: Case, file: str, precision: str, *, peer: bool = False) -> Call:
    """An .xml or .onnx file, ours or pytorchvideo's, in OpenVINO, which computes in `precision`: "f32" or "bf16"."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(str(_path(case, file)), "CPU", settings)
    clips = squares(case.network, case.batch)
    if not peer:
        return lambda: model(clips, share_inputs=True)[0]
    given = normalized(clips)
    return lambda: softmax(model(given, share_inputs=True)[0])


def onnxruntime(case: Case, file: str) -> Call:
    """pytorchvideo's .onnx file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    session = onnxruntime.InferenceSession(str(_path(case, file)), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    clips = normalized(squares(case.network, case.batch))
    return lambda: softmax(session.run(None, {given.name: clips})[0])


def _path(case: Case, file: str) -> Path:
    return Path(case.folder) / file.format(network=case.network)
