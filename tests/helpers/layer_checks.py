"""A naive convolution, and comparison with it."""

from typing import Any

import numpy as np

TOLERANCE = 1e-5


def naive_channelwise(x: np.ndarray, kernel: np.ndarray, stride: int, upstream: np.ndarray | None = None) -> Any:
    """Computes the convolution, and with `upstream` the gradients of sum(upstream * convolution), by naive loops."""
    kt, kh, kw, _ = kernel.shape
    padded = np.pad(x, [(0, 0), (kt // 2,) * 2, (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)])
    n, t, h, w, c = x.shape
    y = np.zeros((n, t, -(-h // stride), -(-w // stride), c))
    x_gradient, kernel_gradient = np.zeros_like(padded), np.zeros_like(kernel)
    for i, ti, hi, wi in np.ndindex(y.shape[:4]):
        for a, b, d in np.ndindex(kt, kh, kw):
            position = (i, ti + a, hi * stride + b, wi * stride + d)
            y[i, ti, hi, wi] += padded[position] * kernel[a, b, d]
            if upstream is not None:
                x_gradient[position] += upstream[i, ti, hi, wi] * kernel[a, b, d]
                kernel_gradient[a, b, d] += upstream[i, ti, hi, wi] * padded[position]
    if upstream is None:
        return y
    x_gradient = x_gradient[:, kt // 2 : kt // 2 + t, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w]
    return y, x_gradient, kernel_gradient


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())
