"""Bias correction of an 8-bit TFLite file: each layer's mean output is made to match the float network's.

The rounding errors of single values average out over space and time, but an error in a channel's mean does not, and it
affects all following layers. Therefore the bias of each layer is changed by the error of the channel's mean over the
calibration clips. Layers are corrected in execution order, so that each one sees the corrected outputs of the previous
ones (Nagel et al. 2019, arXiv 1906.04721, section 4.2, which uses no data). The size and the speed of the file do not
change.
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

CONVOLUTIONS = ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # the operators with trained weights


def read_model(content: bytes | bytearray) -> Any:
    """Parses a TFLite file into mutable objects (`ModelT` of its schema)."""
    from tensorflow.lite.python import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def operator_name(model: Any, operator: Any) -> str:
    """Returns the type of an operator, such as CONV_2D, or "CUSTOM" and the name of a custom operator."""
    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)  # small codes may be stored in either field
    builtin = _operator_names()[number]
    return f"CUSTOM {code.customCode.decode()}" if builtin == "CUSTOM" else builtin


@functools.cache
def _operator_names() -> dict[int, str]:
    from tensorflow.lite.python import schema_py_generated as schema

    return {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def correct_biases(content: bytes, reference: bytes, clips: NDArray[np.uint8]) -> bytes:
    """Corrects the biases of an int8 file.

    Args:
        content: the int8 file, with uint8 input.
        reference: the same network in float32, with float32 input. It must be made by the same converter, which gives
            its layers the same names.
        clips: (calls, batch, T, S, S, 3); the means are taken over all clips.

    Returns:
        The file with corrected biases.

    Raises:
        RuntimeError: a layer of the int8 file does not exist in the float32 file.
    """
    data = bytearray(content)
    model, original = read_model(data), read_model(reference)
    graph = model.subgraphs[0]
    layers = _layers_with_bias(model)
    outputs = _layer_outputs(original)
    expected = dict(zip(outputs, _channel_means(original, list(outputs.values()), clips)))
    for index in tqdm(layers, "correcting biases", leave=False, disable=None):
        operator = graph.operators[index]
        (output,) = operator.outputs
        name = graph.tensors[output].name
        if name not in expected:
            raise RuntimeError(f"the float32 file has no layer {name.decode()}")
        (actual,) = _channel_means(model, [output], clips, num_operators=index + 1)
        bias = graph.tensors[operator.inputs[2]]
        values = model.buffers[bias.buffer].data.view(np.int32)  # a view of `data`
        values += np.rint((expected[name] - actual) / bias.quantization.scale).astype(np.int32)
    return bytes(data)


def _layers_with_bias(model: Any) -> list[int]:
    """Returns the indices of the 8-bit layers whose bias is not shared: equal biases (zeros) are stored only once."""
    from tensorflow.lite.python import schema_py_generated as schema

    graph = model.subgraphs[0]
    biases = {
        index: graph.tensors[operator.inputs[2]]
        for index, operator in enumerate(graph.operators)
        if operator_name(model, operator) in CONVOLUTIONS and len(operator.inputs) > 2 and operator.inputs[2] >= 0
    }
    users = Counter(bias.buffer for bias in biases.values())
    return [index for index, bias in biases.items() if bias.type == schema.TensorType.INT32 and users[bias.buffer] == 1]


def _layer_outputs(model: Any) -> dict[bytes, int]:
    """Returns the indices of the output tensors of layers with weights, by name."""
    graph = model.subgraphs[0]
    outputs = [operator.outputs[0] for operator in graph.operators if operator_name(model, operator) in CONVOLUTIONS]
    return {graph.tensors[index].name: index for index in outputs}


def _channel_means(
    model: Any, tensors: Sequence[int], clips: NDArray[np.uint8], num_operators: int | None = None
) -> list[NDArray[np.float64]]:
    """Returns the mean of each channel of tensors over clips, time and space; runs the first `num_operators` only."""
    probe = copy.copy(model)
    graph = copy.copy(model.subgraphs[0])
    graph.outputs, graph.operators = np.array(tensors, np.int32), graph.operators[:num_operators]
    probe.subgraphs, probe.signatureDefs = [graph], []
    sums = [
        np.sum([values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64) for values in outputs], axis=0)
        for outputs in zip(*_run(_pack(probe), clips))
    ]
    scales = [graph.tensors[index].quantization for index in tensors]
    means = [total / len(clips) for total in sums]
    return [
        mean if scale is None or scale.scale is None else (mean - scale.zeroPoint[0]) * scale.scale[0]
        for mean, scale in zip(means, scales)
    ]


def _run(content: bytes, clips: NDArray[np.uint8]) -> Iterator[list[NDArray[Any]]]:
    """Yields the outputs of each call."""
    import tensorflow as tf

    with kept_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf.lite.Interpreter is deprecated
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=available_cpus())
        interpreter.allocate_tensors()
    (input_details,) = interpreter.get_input_details()
    for call in clips:
        interpreter.set_tensor(input_details["index"], call.astype(input_details["dtype"]))
        interpreter.invoke()
        yield [interpreter.get_tensor(entry["index"]) for entry in interpreter.get_output_details()]


def _pack(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
