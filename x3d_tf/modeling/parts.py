"""The operations that a network consists of, as a protocol. Imports no TensorFlow.

`graph` defines the networks as calls of these methods. Each form of a network is a class that implements them for
tensors of its own kind: `keras_parts.TrainableParts`, `portable.PortableParts`, `folded.FoldedParts`,
`folded.FoldedOperations`, `cost.CountingParts`, `export/tflite_gpu.GpuParts`, and the two of `export/onnx_parts.py`.
"""

from typing import Literal, Protocol, TypeVar

Tensor = TypeVar("Tensor")  # the graph passes tensors on and reads none of their attributes
Function = Literal["relu", "silu", "sigmoid", "softmax"]


class Parts(Protocol[Tensor]):
    """A set of parts.

    Shapes are logical: (N, T, H, W, C) for feature maps of N clips, and B boxes per clip. The memory layout, the
    precision, and the initial values of weights belong to the set of parts. `name` is the name of the layer, whose
    weights have the same name in every set. Convolutions have odd kernels (frames, rows, columns), no bias, and a
    stride along both spatial axes; they pad by half the kernel on every side.
    """

    def normalize(self, x: Tensor, name: str) -> Tensor:
        """Normalizes clips, RGB in 0..255, and converts them to the set's memory layout."""

    def difference(self, x: Tensor, name: str) -> Tensor:
        """Subtracts each frame from the next: (N, T, H, W, C) to (N, T - 1, H, W, C)."""

    def conv(self, x: Tensor, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Tensor:
        """Applies a dense convolution over time (kt, 1, 1) or over space (1, kh, kw)."""

    def pointwise(self, x: Tensor, filters: int, name: str, stride: int = 1) -> Tensor:
        """Applies a dense 1x1x1 convolution."""

    def channelwise(self, x: Tensor, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Tensor:
        """Applies a channel-wise convolution (kt, 1, 1) or (kt, kh, kw)."""

    def norm(self, x: Tensor, name: str, *, ends_branch: bool = False) -> Tensor:
        """Applies batch norm to the output of a convolution.

        Args:
            x: output of the convolution.
            name: name of the layer.
            ends_branch: whether it ends a residual branch. Its scale is then initially zero, so that each new block
                equals its shortcut.
        """

    def activation(self, x: Tensor, function: Function, name: str) -> Tensor:
        """Applies a function to each element."""

    def add(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """Adds two feature maps of the same shape."""

    def drop_branch(self, x: Tensor, rate: float, name: str) -> Tensor:
        """Drops the residual branch of complete clips in training."""

    def mean(self, x: Tensor, name: str) -> Tensor:
        """Averages each channel of a clip: (N, T, H, W, C) to (N, 1, 1, 1, C)."""

    def excitation(self, x: Tensor, units: int, function: Function, name: str) -> Tensor:
        """Applies a dense layer of a squeeze-excitation, with bias: (N, 1, 1, 1, C) to (N, 1, 1, 1, units)."""

    def scale(self, x: Tensor, factors: Tensor, name: str) -> Tensor:
        """Multiplies feature maps by factors (N, 1, 1, 1, C)."""

    def head_input(self, x: Tensor) -> Tensor:
        """Converts feature maps to the memory layout and precision of the head, which the following methods take."""

    def global_pool(self, x: Tensor, name: str) -> Tensor:
        """Averages over all positions: (N, T, H, W, C) to (N, C)."""

    def time_mean(self, x: Tensor) -> Tensor:
        """Averages over the frames: (N, T, H, W, C) to (N, H, W, C)."""

    def window_pool(self, x: Tensor, window: int, name: str) -> Tensor:
        """Averages over each window of `window` x `window` positions: (N, H, W, C) to (N, H', W', C)."""

    def spatial_mean(self, x: Tensor) -> Tensor:
        """Averages over the positions: (N, H, W, C) to (N, C)."""

    def spatial_max(self, x: Tensor) -> Tensor:
        """Takes the maximum over the positions: (..., H, W, C) to (..., C)."""

    def regions(self, x: Tensor, boxes: Tensor, clips: Tensor, name: str) -> Tensor:
        """Pools feature maps (N, H, W, C) in boxes (N, B, 4) of the input clips to (N, B, 7, 7, C), by RoIAlign."""

    def per_box(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Repeats (N, C) for each box: (N, B, C)."""

    def dense(self, x: Tensor, units: int, name: str, *, function: Function | None = None, bias: bool = True) -> Tensor:
        """Applies a dense layer of the head along the last axis."""

    def dropout(self, x: Tensor, rate: float, name: str) -> Tensor:
        """Drops elements in training."""

    def mean_probability(self, x: Tensor, function: Function) -> Tensor:
        """Averages the probabilities of all positions: logits (N, H, W, C) to the logits (N, C) of the mean.

        Args:
            x: logits of each position.
            function: converts logits to probabilities: "softmax" or "sigmoid".
        """

    def probabilities(self, x: Tensor, function: Function, name: str) -> Tensor:
        """Converts logits to probabilities, in single precision."""
