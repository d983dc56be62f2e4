"""Shifts the biases of an 8-bit TFLite file so that each layer's outputs are right in the mean.

What rounding does to single values averages out over space and time; what it does to a channel's mean does not, and
the layers behind it all see the shift. So, layer by layer from the pixels on, the bias is changed by what the channel's
mean over calibration clips lacks, with all layers before it corrected already (Nagel et al. 2019, arXiv 1906.04721,
section 4.2, there without data). The file's size and speed stay as they are.
"""

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.processes import available_cpus
from x3d_tf.startup import kept_back

CONVOLUTIONS = ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # all that has trained weights


def read_model(content: bytes | bytearray) -> Any:
    """A TFLite file as objects that can be changed (`ModelT` of its schema)."""
    from tensorflow.lite.python import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def operator_name(model: Any, operator: Any) -> str:
    """Such as CONV_2D; a custom operator is CUSTOM and its own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    builtin = _operator_names()[
        max(code.builtinCode, code.deprecatedBuiltinCode)
    ]  # small codes may stand in either field
    return f"CUSTOM {code.customCode.decode()}" if builtin == "CUSTOM" else builtin


@functools.cache
def _operator_names() -> dict[int, str]:
    from tensorflow.lite.python import schema_py_generated as schema

    return {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def correct_biases(content: bytes, reference: bytes, clips: NDArray[np.uint8]) -> bytes:
    """Corrects the biases of an int8 file.

    Args:
        content: the file; its input is bytes.
        reference: the same network in float32, made by the same converter, so that layers have the same names; its
            input is float.
        clips: (calls, batch, T, S, S, 3); means are over all of them.

    Returns:
        The file with other biases.

    Raises:
        RuntimeError: a layer of one file is not in the other.
    """
    data = bytearray(content)
    model, original = read_model(data), read_model(reference)
    graph = model.subgraphs[0]
    layers = _with_bias(model)
    outputs = _outputs(original)
    wanted = dict(zip(outputs, _means(original, list(outputs.values()), clips)))
    for place in tqdm(layers, "correcting biases", leave=False, disable=None):
        operator = graph.operators[place]
        (output,) = operator.outputs
        name = graph.tensors[output].name
        if name not in wanted:
            raise RuntimeError(f"the float32 file has no layer {name.decode()}")
        (found,) = _means(model, [output], clips, operators=place + 1)
        bias = graph.tensors[operator.inputs[2]]
        values = model.buffers[bias.buffer].data.view(np.int32)  # of the file itself
        values += np.rint((wanted[name] - found) / bias.quantization.scale).astype(np.int32)
    return bytes(data)


def _with_bias(model: Any) -> list[int]:
    """Places of the 8-bit layers that have a bias of their own: equal ones, all zeros, are stored only once."""
    from tensorflow.lite.python import schema_py_generated as schema

    graph = model.subgraphs[0]
    biases = {
        place: graph.tensors[operator.inputs[2]]
        for place, operator in enumerate(graph.operators)
        if operator_name(model, operator) in CONVOLUTIONS and len(operator.inputs) > 2 and operator.inputs[2] >= 0
    }
    users = Counter(bias.buffer for bias in biases.values())
    return [place for place, bias in biases.items() if bias.type == schema.TensorType.INT32 and users[bias.buffer] == 1]


def _outputs(model: Any) -> dict[bytes, int]:
    """Tensors that layers with weights write: name to index."""
    graph = model.subgraphs[0]
    written = [operator.outputs[0] for operator in graph.operators if operator_name(model, operator) in CONVOLUTIONS]
    return {graph.tensors[index].name: index for index in written}


def _means(
    model: Any, tensors: Sequence[int], clips: NDArray[np.uint8], operators: int | None = None
) -> list[NDArray[np.float64]]:
    """Means over clips, time and space of a file's tensors, by channel; only so many operators are run."""
    probe = copy.copy(model)
    graph = copy.copy(model.subgraphs[0])
    graph.outputs, graph.operators = np.array(tensors, np.int32), graph.operators[:operators]
    probe.subgraphs, probe.signatureDefs = [graph], []
    sums = [
        np.sum([values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64) for values in found], axis=0)
        for found in zip(*_run(_packed(probe), clips))
    ]
    scales = [graph.tensors[index].quantization for index in tensors]
    means = [total / len(clips) for total in sums]
    return [
        mean if scale is None or scale.scale is None else (mean - scale.zeroPoint[0]) * scale.scale[0]
        for mean, scale in zip(means, scales)
    ]


def _run(content: bytes, clips: NDArray[np.uint8]) -> Iterator[list[NDArray[Any]]]:
    """All outputs for each call."""
    import tensorflow as tf

    with kept_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own copy of the interpreter is to go one day
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=available_cpus())
        interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    for call in clips:
        interpreter.set_tensor(given["index"], call.astype(given["dtype"]))
        interpreter.invoke()
        yield [interpreter.get_tensor(entry["index"]) for entry in interpreter.get_output_details()]


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
