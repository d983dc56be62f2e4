"""The inference form of a classifier for LiteRT's GPU delegate, which phones run instead of the CPU.

The delegate refuses tensors of more than four dimensions, CAST from uint8, and operators that it does not list.
Therefore the input is the frames of one clip in float32, the first axis of feature maps is time, and only `OPERATORS`
occur:

- An average is an AVERAGE_POOL_2D, first over space, then over time. MEAN is not listed.
- A dense layer is a 1x1 convolution. FULLY_CONNECTED without bias has a version above 1.
- A shift in time slices and pads the first axis. The delegate refuses the rank-2 PAD of `folded`.
- The first convolution pads with zeros, after the pixel that means zero is subtracted. PADV2 is not listed.

The list is that of LiteRT's page "GPU delegates for LiteRT", section "GPU ML operations support", of July 2025.
"""

from typing import Any

import keras
from keras import layers, ops
from tensorflow.lite.python.schema_py_generated import TensorType

from x3d_tf.modeling.folded import FoldedParts, FoldedWeights, size_and_options
from x3d_tf.modeling.parts import Function
from x3d_tf.modeling.x3d import Network, require_classifier

from .bias_correction import operator_name, read_model

MAX_RANK = 4
OPERATORS = {  # by highest version; the versions other than 1 are those that the list names
    "ADD": 1,
    "AVERAGE_POOL_2D": 1,
    "CONCATENATION": 1,
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 2,
    "EXP": 1,
    "FULLY_CONNECTED": 1,
    "LOGICAL_AND": 1,
    "LOGISTIC": 1,
    "LSTM": 2,
    "MAX_POOL_2D": 1,
    "MAXIMUM": 1,
    "MINIMUM": 1,
    "MUL": 1,
    "PAD": 1,
    "PRELU": 1,
    "RELU": 1,
    "RELU6": 1,
    "RESHAPE": 1,
    "RESIZE_BILINEAR": 3,
    "SOFTMAX": 1,
    "STRIDED_SLICE": 1,
    "SUB": 1,
    "TRANSPOSE_CONV": 1,
}


def fold_for_gpu(model: Network) -> keras.Model:
    """Converts a trained classifier to its inference form for GPU delegates; see `modeling.folded.fold`.

    Args:
        model: the trainable network, with its classifier.

    Returns:
        A model that maps the frames (T, S, S, 3) of one clip, RGB in 0..255, float32, to probabilities (1,
        num_classes). All tensors have at most four dimensions.

    Raises:
        ValueError: the model is not a trainable network or has no classifier.
    """
    require_classifier(model)
    size, options = size_and_options(model, None)
    frames = keras.Input((size, size, 3), batch_size=model.clip.frames, name="frames")
    return model.with_parts(frames, GpuParts(FoldedWeights.of(model), model.clip.frames), options)


def require_gpu_operators(content: bytes) -> None:
    """Raises `RuntimeError` if a TFLite file has a tensor of rank 5 or an operator that `OPERATORS` does not list.

    DEQUANTIZE is allowed for float16 weights, because the delegate reads them without this operator.
    """
    model = read_model(content)
    (graph,) = model.subgraphs
    wrong = {
        f"the tensor {tensor.name.decode()} of rank {len(tensor.shape)}"
        for tensor in graph.tensors
        if tensor.shape is not None and len(tensor.shape) > MAX_RANK
    }
    for operator in graph.operators:
        name, version = operator_name(model, operator), model.operatorCodes[operator.opcodeIndex].version
        source = graph.tensors[operator.inputs[0]]
        is_constant = model.buffers[source.buffer].data is not None
        reads_weights = name == "DEQUANTIZE" and source.type == TensorType.FLOAT16 and is_constant
        if version > OPERATORS.get(name, 0) and not reads_weights:
            wrong.add(f"{name} version {version}")
    if wrong:
        raise RuntimeError(f"GPU delegates refuse {', '.join(sorted(wrong))}")


class GpuParts(FoldedParts):
    """Creates stock Keras layers with folded weights for one clip, whose feature maps are (T, H, W, C).

    Values without time or space have size 1 there, such as (1, 1, 1, C). See `parts.Parts`.

    Args:
        weights: kernels and biases of the layers.
        frames: number of frames of the clip, T.
    """

    def __init__(self, weights: FoldedWeights, frames: int) -> None:
        super().__init__(weights, frames, batch=1)

    def normalize(self, x: Any, name: str) -> Any:
        return x  # folded into the first convolution

    def difference(self, x: Any, name: str) -> Any:
        self.frames -= 1
        return layers.Subtract(name=name)([x[1:, :], x[:-1, :]])

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        zero = self.weights.padding(name)
        if not zero:
            return super().conv(x, filters, kernel, name, stride)
        weights, bias = self.weights[name]
        pad = [(0, 0), *((size // 2, size // 2) for size in kernel[1:]), (0, 0)]
        return self._conv(ops.pad(x - zero, pad), weights[0], bias + zero * weights.sum((0, 1, 2, 3)), name, stride)

    def mean(self, x: Any, name: str) -> Any:
        return self.time_mean(self.spatial_mean(x))

    def excitation(self, x: Any, units: int, function: Function, name: str) -> Any:
        return self.dense(x, units, name, function=function)

    def head_input(self, x: Any) -> Any:
        return x

    def global_pool(self, x: Any, name: str) -> Any:
        return self.mean(x, name)

    def time_mean(self, x: Any) -> Any:
        _, h, w, c = x.shape
        return ops.reshape(ops.average_pool(self._to_time_rows(x), (self.frames, 1)), (1, h, w, c))

    def spatial_mean(self, x: Any) -> Any:
        return ops.average_pool(x, x.shape[1:3])

    def dense(self, x: Any, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Any:
        kernel, offsets = self.weights[name]
        y = self._conv(x, kernel[None, None], offsets, name)
        return self.activation(y, function, f"{name}_{function}") if function else y

    def probabilities(self, x: Any, function: Function, name: str) -> Any:
        return super().probabilities(ops.reshape(x, (1, x.shape[-1])), function, name)

    def _shift_frames(self, x: Any, shift: int) -> Any:
        before, after = max(shift, 0), max(-shift, 0)
        return ops.pad(x[after : self.frames - before, :], ((before, after), (0, 0), (0, 0), (0, 0))) if shift else x
