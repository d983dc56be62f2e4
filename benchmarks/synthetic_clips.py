"""Synthetic input clips, and the preprocessing of the peers."""

import numpy as np
from numpy.typing import NDArray

import x3d_tf
from x3d_tf.modeling.expansion import as_expansion

MEAN, STD = 0.45, 0.225  # of RGB in 0..1, as in pytorchvideo's recipes


def squares(network: str, count: int) -> NDArray[np.uint8]:
    """Returns clips of 16 x 16 coloured squares: uint8 (count, T, S, S, 3). The i-th clip is the same for any count."""
    clip: x3d_tf.ClipSpec = as_expansion(network).clip
    side = -(-clip.size // 16)
    draw = np.random.default_rng(1)
    colours = np.stack([draw.integers(0, 256, (clip.frames, side, side, 3)).astype(np.uint8) for _ in range(count)])
    return colours.repeat(16, axis=2).repeat(16, axis=3)[:, :, : clip.size, : clip.size]


def normalized(clips: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Converts clips to the input of PyTorch's networks: float32 (count, 3, T, S, S), contiguous."""
    pixels = ((clips.astype(np.float32) / 255 - MEAN) / STD).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 4, 1, 2, 3))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the probabilities of logits (count, classes)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
