"""Networks as ONNX graphs: two sets of parts that append ONNX operators; see `x3d_tf.modeling.parts.Parts`.

Batch norms and the normalization of the pixels are folded into the convolutions, as in `modeling.folded`. The forms
differ in the layout of the feature maps and in the channel-wise 3-D convolutions:

- "grouped", intended for OpenVINO: (N, C, T, H, W), and one grouped 3-D convolution.
- "taps", intended for ONNX Runtime: one image per frame, (T N, C, H, W), and one depthwise 2-D convolution per temporal
  tap, which are added. The blocked layout of ONNX Runtime (NCHWc) is for 2-D convolutions, and for depthwise ones only
  if the number of channels is a multiple of 4. All numbers of channels are therefore rounded up; the additional
  channels are zero.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from x3d_tf.modeling.architecture import MAP_STRIDE, REGION_BINS
from x3d_tf.modeling.folded import FoldedWeights, require_batch, size_and_options
from x3d_tf.modeling.parts import Function
from x3d_tf.modeling.x3d import Network, require_classifier

Form = Literal["grouped", "taps"]

OPSET, IR_VERSION = 17, 8  # of ONNX 1.12, which is older than the oldest runtimes that setup.cfg allows
CHANNEL_MULTIPLE = 4  # ONNX Runtime's blocked layout requires it of depthwise convolutions


def onnx_model(model: Network, form: Form, *, size: int | None = None, batch: int | None = 1) -> Any:
    """Converts a trained network to an ONNX model, an `onnx.ModelProto`.

    Args:
        model: the trainable network, with its classifier, or a detector.
        form: "grouped" or "taps".
        size: side of the clip in pixels. Defaults to that of `fold`.
        batch: batch size; None for a dynamic one.

    Returns:
        A model that maps `clips`, uint8 (N, T, size, size, 3), RGB, to `probabilities`, float32 (N, num_classes). For a
        detector, it maps `clips` and `boxes`, float32 (N, B, 4) of any B, to `scores`, float32 (N, B, num_classes).

    Raises:
        ValueError: see `fold`.
    """
    require_classifier(model)
    require_batch(batch)
    size, options = size_and_options(model, size)
    has_boxes, batch_size = isinstance(model.input, dict), batch or "N"
    parts = _FORMS[form](FoldedWeights.of(model), model.clip.frames, size, batch)
    clips, boxes = Value("clips", 3, (size, size)), Value("boxes")
    output = model.apply_parts({"clip": clips, "boxes": boxes} if has_boxes else clips, parts, options)
    tensor, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [tensor(clips.name, types.UINT8, [batch_size, model.clip.frames, size, size, 3])]
    if has_boxes:
        inputs.append(tensor(boxes.name, types.FLOAT, [batch_size, "B", 4]))
    shape = [batch_size, *(["B"] if has_boxes else []), model.num_classes]
    outputs = [tensor(output.name, types.FLOAT, shape)]
    graph = onnx.helper.make_graph(parts.nodes, model.name, inputs, outputs, parts.constants)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    converted = onnx.helper.make_model(graph, producer_name="x3d_tf", opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(converted, full_check=True)
    return converted


def shapes(model: Any) -> dict[str, list[int | str]]:
    """Returns the shapes of the inputs and outputs of an ONNX model by name; dynamic sizes are letters."""
    return {
        tensor.name: [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]
        for tensor in (*model.graph.input, *model.graph.output)
    }


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
        name: its name, which is also that of the node that computes it.
        channels: number of channels, including the additional ones that are zero.
        sides: height and width of feature maps; not kept up to date in the head.
    """

    name: str
    channels: int = 0
    sides: tuple[int, int] = (0, 0)


class OnnxParts:
    """Appends operators with folded weights to an ONNX graph: the parts that do not depend on the form.

    The head computes on (N, C, H, W) up to the pooling, and with the channels last from then on.

    Args:
        weights: kernels and biases of the layers.
        frames: number of frames of the clips, T.
        size: side of the clips in pixels.
        batch: batch size N; None for a dynamic one.

    Attributes:
        nodes: the operators so far.
        constants: the weights and other constants so far.
    """

    channel_multiple = 1

    def __init__(self, weights: FoldedWeights, frames: int, size: int, batch: int | None) -> None:
        self.weights, self.frames, self.size, self.batch = weights, frames, size, batch
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def norm(self, x: Value, name: str, *, ends_branch: bool = False) -> Value:
        return x  # folded into the convolution before it

    def activation(self, x: Value, function: Function, name: str) -> Value:
        if function == "silu":  # both runtimes fuse the pair
            gate = self._append("Sigmoid", f"{name}/sigmoid", x)
            return self._append("Mul", name, x, gate, like=x)
        if function == "softmax":
            return self._append("Softmax", name, x, like=x, axis=-1)
        return self._append({"relu": "Relu", "sigmoid": "Sigmoid"}[function], name, x, like=x)

    def add(self, x: Value, y: Value, name: str) -> Value:
        return self._append("Add", name, x, y, like=x)

    def drop_branch(self, x: Value, rate: float, name: str) -> Value:
        return x

    def mean(self, x: Value, name: str) -> Value:
        raise NotImplementedError

    def excitation(self, x: Value, units: int, function: Function, name: str) -> Value:
        y = self.pointwise(x, units, name)
        return self.activation(y, function, f"{name}/{function}")

    def head_input(self, x: Value) -> Value:
        return x  # each pooling reads the layout of the form

    def global_pool(self, x: Value, name: str) -> Value:
        return self._append("Flatten", name, self.mean(x, f"{name}/mean"), like=x, axis=1)

    def window_pool(self, x: Value, window: int, name: str) -> Value:
        y = self._append("AveragePool", f"{name}/windows", x, kernel_shape=[window, window])
        return self._append("Transpose", name, y, like=x, perm=[0, 2, 3, 1])

    def spatial_mean(self, x: Value) -> Value:
        return self._append("ReduceMean", "spatial_mean", x, like=x, axes=[1, 2], keepdims=0)

    def spatial_max(self, x: Value) -> Value:
        return self._append("ReduceMax", "spatial_max", x, like=x, axes=[-2, -1], keepdims=0)

    def regions(self, x: Value, boxes: Value, clips: Value, name: str) -> Value:
        # [N, B] with N of the maps, so that boxes of another number of clips cannot name maps that do not exist
        number = self._append("Shape", f"{name}/number", x, end=1)
        count = self._append("Shape", f"{name}/count", boxes, start=1, end=2)
        grid = self._append("Concat", f"{name}/grid", number, count, axis=0)
        shape = self._append("Concat", f"{name}/boxes_shape", grid, np.array([4]), axis=0)
        checked = self._append("Reshape", f"{name}/checked", boxes, shape, allowzero=1)
        flat_boxes = self._append("Reshape", f"{name}/boxes", checked, np.array([-1, 4]))
        unit = self._append("Clip", f"{name}/unit", flat_boxes, np.float32(0), np.float32(1))
        valid = self._have_area(flat_boxes, unit, name)
        safe = self._append("Where", f"{name}/safe", valid, unit, np.array([[0, 0, 1, 1]], np.float32))
        pixels = self._append("Mul", f"{name}/pixels", safe, np.float32(self.size))
        clip = self._append("Expand", f"{name}/clip", self._clip_numbers(number, name), grid)
        clip = self._append("Reshape", f"{name}/clips", clip, np.array([-1]))
        y = self._append(
            "RoiAlign",
            f"{name}/align",
            x,
            pixels,
            clip,
            coordinate_transformation_mode="half_pixel",
            output_height=REGION_BINS,
            output_width=REGION_BINS,
            spatial_scale=1 / MAP_STRIDE,
        )
        valid = self._append("Unsqueeze", f"{name}/valid", valid, np.array([2, 3]))
        y = self._append("Where", f"{name}/masked", valid, y, np.float32(0))
        bins = np.array([x.channels, REGION_BINS, REGION_BINS])
        shape = self._append("Concat", f"{name}/shape", grid, bins, axis=0)
        return self._append("Reshape", name, y, shape, like=x, allowzero=1)  # there may be no boxes

    def per_box(self, x: Value, boxes: Value) -> Value:
        row = self._append("Unsqueeze", "per_box/row", x, np.array([1]))
        count = self._append("Shape", "per_box/count", boxes, start=1, end=2)
        shape = self._append("Concat", "per_box/shape", np.array([1]), count, np.array([1]), axis=0)
        return self._append("Expand", "per_box", row, shape, like=x)

    def dense(self, x: Value, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Value:
        kernel, offset = self.weights[name]
        y = self._append("MatMul", name, x, _zero_pad(kernel, 0, x.channels), like=Value("", units))
        if bias:
            y = self._append("Add", f"{name}/bias", y, offset, like=y)
        return self.activation(y, function, f"{name}/{function}") if function else y

    def dropout(self, x: Value, rate: float, name: str) -> Value:
        return x

    def mean_probability(self, x: Value, function: Function) -> Value:
        if function == "softmax":
            return self._log_mean(self._append("LogSoftmax", "log_probabilities", x, like=x, axis=-1), "log_mean")
        # The logit of the mean probability p is log p - log(1 - p); the logarithm of sigmoid(x) is -softplus(-x).
        negative = self._append("Neg", "negative", x, like=x)
        logs = []
        for name, value in (("log_p", negative), ("log_1_p", x)):
            softplus = self._append("Softplus", f"{name}/softplus", value, like=x)
            logs.append(self._log_mean(self._append("Neg", f"{name}/windows", softplus, like=x), name))
        return self._append("Sub", "mean_logits", *logs, like=x)

    def probabilities(self, x: Value, function: Function, name: str) -> Value:
        return self.activation(x, function, name)

    def pointwise(self, x: Value, filters: int, name: str, stride: int = 1) -> Value:
        raise NotImplementedError

    def _append(
        self,
        operator: str,
        name: str,
        *inputs: "Value | NDArray[Any] | np.float32",
        like: Value | None = None,
        **settings: Any,
    ) -> Value:
        """Appends a node with one output. Inputs that are arrays become constants.

        Args:
            operator: ONNX operator.
            name: name of the node and its output.
            inputs: inputs of the operator.
            like: value with the channels and sides of the output.
            settings: attributes of the operator.
        """
        names = [
            value.name if isinstance(value, Value) else self._constant(f"{name}/{number}", np.asarray(value))
            for number, value in enumerate(inputs)
        ]
        self.nodes.append(onnx.helper.make_node(operator, names, [name], name, **settings))
        return Value(name, like.channels, like.sides) if like else Value(name)

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        """Adds a constant, of 32-bit floats or 64-bit integers on any platform, and returns its name."""
        dtype = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array, dtype, order="C"), name))
        return name

    def _convolve(
        self,
        x: Value,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        name: str,
        *,
        stride: int = 1,
        channelwise: bool = False,
        padding: float = 0.0,
    ) -> Value:
        """Appends a convolution that pads by half the kernel on every side.

        Args:
            x: input, channels first.
            kernel: (outputs, inputs, ...), or (channels, 1, ...) for a channel-wise convolution.
            bias: one value per output; None for zeros.
            name: name of the node.
            stride: stride along the last two axes.
            channelwise: whether each output depends on one channel.
            padding: value to pad with.
        """
        outputs = -(-len(kernel) // self.channel_multiple) * self.channel_multiple
        kernel = _zero_pad(kernel, 0, outputs)
        kernel = kernel if channelwise else _zero_pad(kernel, 1, x.channels)
        spatial = kernel.shape[2:]
        half, value = [side // 2 for side in spatial], x
        if padding:  # the operator pads with zeros
            pads = np.array([0, 0, *half] * 2)
            value = self._append("Pad", f"{name}/pad", x, pads, np.float32(padding))
            half = [0] * len(spatial)
        weights = [self._constant(f"{name}/kernel", kernel)]
        if bias is not None and bias.any():
            weights.append(self._constant(f"{name}/bias", _zero_pad(bias, 0, outputs)))
        sides = tuple(-(-side // stride) for side in x.sides)
        return self._append(
            "Conv",
            name,
            value,
            *map(Value, weights),
            like=Value("", outputs, (sides[0], sides[1])),
            kernel_shape=list(spatial),
            pads=half * 2,
            strides=[1] * (len(spatial) - 2) + [stride] * 2,
            group=outputs if channelwise else 1,
        )

    def _have_area(self, boxes: Value, unit: Value, name: str) -> Value:
        """Computes which boxes (K, 4), clipped to `unit`, have an area: (K, 1); false for NaN and swapped corners.

        RoIAlign of the runtimes is not defined for the others; OpenVINO may return NaN.
        """
        masks = []
        for which, value in (("raw", boxes), ("unit", unit)):  # clipping may replace NaN by a number
            start = self._append("Slice", f"{name}/{which}_start", value, np.array([0]), np.array([2]), np.array([1]))
            end = self._append("Slice", f"{name}/{which}_end", value, np.array([2]), np.array([4]), np.array([1]))
            less = self._append("Less", f"{name}/{which}_less", start, end)
            masks.append(self._append("Cast", f"{name}/{which}_mask", less, to=onnx.TensorProto.FLOAT))
        both = self._append("Mul", f"{name}/masks", *masks)
        smallest = self._append("ReduceMin", f"{name}/smallest", both, axes=[1], keepdims=1)
        return self._append("Cast", f"{name}/have_area", smallest, to=onnx.TensorProto.BOOL)

    def _clip_numbers(self, number: Value, name: str) -> "Value | NDArray[Any]":
        """Returns the numbers of the clips, int64 (N, 1), given [N]."""
        if self.batch:
            return np.arange(self.batch)[:, None]
        limit = self._append("Gather", f"{name}/limit", number, np.array(0))
        numbers = self._append("Range", f"{name}/numbers", np.array(0), limit, np.array(1))
        return self._append("Unsqueeze", f"{name}/column", numbers, np.array([1]))

    def _subtract_frames(self, x: Value, name: str, *, axis: int) -> Value:
        """Subtracts each frame from the next; frames are numbered along `axis`."""
        axes, end = np.array([axis]), np.array([np.iinfo(np.int64).max])
        later = self._append("Slice", f"{name}/later", x, np.array([1]), end, axes)
        earlier = self._append("Slice", f"{name}/earlier", x, np.array([0]), np.array([-1]), axes)
        return self._append("Sub", name, later, earlier, like=x)

    def _log_mean(self, x: Value, name: str) -> Value:
        """Computes the logarithm of the mean over all positions, (N, C), given logarithms (N, H, W, C)."""
        # The peak is subtracted so that no class underflows in all windows.
        peak = self._append("ReduceMax", f"{name}/peak", x, axes=[1, 2], keepdims=1)
        scaled = self._append("Exp", f"{name}/exp", self._append("Sub", f"{name}/difference", x, peak))
        mean = self._append("ReduceMean", f"{name}/mean", scaled, axes=[1, 2], keepdims=1)
        logs = self._append("Add", f"{name}/sum", self._append("Log", f"{name}/log", mean), peak)
        return self._append("Flatten", name, logs, like=x, axis=1)


class GroupedParts(OnnxParts):
    """Appends grouped 3-D convolutions, for feature maps (N, C, T, H, W)."""

    def normalize(self, x: Value, name: str) -> Value:
        y = self._append("Transpose", f"{name}/transpose", x, perm=[0, 4, 1, 2, 3])
        return self._append("Cast", name, y, like=x, to=onnx.TensorProto.FLOAT)

    def difference(self, x: Value, name: str) -> Value:
        return self._subtract_frames(x, name, axis=2)

    def conv(self, x: Value, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        padding = self.weights.padding(name)
        return self._convolve(x, weights.transpose(4, 3, 0, 1, 2), bias, name, stride=stride, padding=padding)

    def pointwise(self, x: Value, filters: int, name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        return self._convolve(x, weights.T[:, :, None, None, None], bias, name, stride=stride)

    def channelwise(self, x: Value, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        kernels = np.moveaxis(weights, -1, 0)[:, None]
        return self._convolve(x, kernels, bias, name, stride=stride, channelwise=True)

    def mean(self, x: Value, name: str) -> Value:
        return self._append("GlobalAveragePool", name, x, like=Value("", x.channels, (1, 1)))

    def scale(self, x: Value, factors: Value, name: str) -> Value:
        return self._append("Mul", name, x, factors, like=x)

    def time_mean(self, x: Value) -> Value:
        return self._append("ReduceMean", "time_mean", x, like=x, axes=[2], keepdims=0)


class TapsParts(OnnxParts):
    """Appends 2-D convolutions, for feature maps (T N, C, H, W): the first frames of all clips, then the second ones.

    A convolution over time alone is one over the rows of (N, C, T, H W).
    """

    channel_multiple = CHANNEL_MULTIPLE

    def normalize(self, x: Value, name: str) -> Value:
        y = self._append("Transpose", f"{name}/transpose", x, like=x, perm=[1, 0, 4, 2, 3])
        return self._append("Cast", name, self._to_images(y, f"{name}/images"), like=x, to=onnx.TensorProto.FLOAT)

    def difference(self, x: Value, name: str) -> Value:
        rows = self._append("Reshape", f"{name}/frames", x, np.array([self.frames, -1]), like=x)
        y = self._subtract_frames(rows, f"{name}/rows", axis=0)
        self.frames -= 1
        return self._to_images(y, name)

    def conv(self, x: Value, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        if kernel[0] > 1:
            return self._convolve_over_time(x, weights[:, 0, 0].transpose(2, 1, 0)[..., None], bias, name)
        padding = self.weights.padding(name)
        return self._convolve(x, weights[0].transpose(3, 2, 0, 1), bias, name, stride=stride, padding=padding)

    def pointwise(self, x: Value, filters: int, name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        return self._convolve(x, weights.T[:, :, None, None], bias, name, stride=stride)

    def channelwise(self, x: Value, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Value:
        weights, bias = self.weights[name]
        kernels = np.moveaxis(weights, -1, 0)[:, None]
        if kernel[1:] == (1, 1):
            return self._convolve_over_time(x, kernels[..., 0], bias, name, channelwise=True)
        terms = []
        for tap in range(kernel[0]):
            shift = kernel[0] // 2 - tap
            if abs(shift) >= self.frames:
                continue  # this tap sees only padding
            offset = None if shift else bias
            y = self._convolve(x, kernels[:, :, tap], offset, f"{name}/{tap}", stride=stride, channelwise=True)
            terms.append(self._shift_frames(y, shift))
        return self._append("Sum", name, *terms, like=terms[0])

    def mean(self, x: Value, name: str) -> Value:
        frames = self._append("GlobalAveragePool", f"{name}/frames", x)
        shape = np.array([self.frames, self.batch or -1, x.channels, 1, 1])
        return self._mean_over_frames(frames, shape, name, Value("", x.channels, (1, 1)))

    def scale(self, x: Value, factors: Value, name: str) -> Value:
        if self.batch != 1:
            factors = self._append("Tile", f"{name}/factors", factors, np.array([self.frames, 1, 1, 1]))
        return self._append("Mul", name, x, factors, like=x)

    def time_mean(self, x: Value) -> Value:
        shape = np.array([self.frames, self.batch or -1, x.channels, *x.sides])
        return self._mean_over_frames(x, shape, "time_mean", x)

    def _mean_over_frames(self, x: Value, shape: NDArray[Any], name: str, like: Value) -> Value:
        frames = self._append("Reshape", f"{name}/split", x, shape)
        return self._append("ReduceMean", name, frames, like=like, axes=[0], keepdims=0)

    def _to_images(self, x: Value, name: str) -> Value:
        """Reshapes to (T N, C, H, W)."""
        return self._append("Reshape", name, x, np.array([-1, x.channels, *x.sides]), like=x)

    def _convolve_over_time(
        self, x: Value, kernel: np.ndarray, bias: np.ndarray, name: str, *, channelwise: bool = False
    ) -> Value:
        """Convolves with (outputs, inputs, T, 1)."""
        shape = np.array([self.frames, self.batch or -1, x.channels, math.prod(x.sides)])
        frames = self._append("Reshape", f"{name}/split", x, shape)
        rows = self._append("Transpose", f"{name}/rows", frames, like=x, perm=[1, 2, 0, 3])
        y = self._convolve(rows, kernel, bias, name, channelwise=channelwise)
        frames = self._append("Transpose", f"{name}/frames", y, like=y, perm=[2, 0, 1, 3])
        return self._to_images(frames, f"{name}/images")

    def _shift_frames(self, x: Value, shift: int) -> Value:
        """Shifts the tensor forward in time by `shift` frames; negative padding removes frames."""
        if shift == 0:
            return x
        name = f"{x.name}/shift"
        if self.batch:
            rows = shift * self.batch
            return self._append("Pad", name, x, np.array([rows, 0, 0, 0, -rows, 0, 0, 0]), like=x)
        frames = self._append("Reshape", f"{name}/frames", x, np.array([self.frames, -1]))
        shifted = self._append("Pad", f"{name}/pad", frames, np.array([shift, 0, -shift, 0]), like=x)
        return self._to_images(shifted, name)


_FORMS: dict[Form, type[GroupedParts] | type[TapsParts]] = {"grouped": GroupedParts, "taps": TapsParts}


def _zero_pad(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Appends zeros along an axis until it has `size` entries."""
    missing = size - array.shape[axis]
    return np.pad(array, [(0, missing if number == axis else 0) for number in range(array.ndim)])
