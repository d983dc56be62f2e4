"""Deterministic weights and clips that any implementation can generate from names, so that only outputs are stored.

Batch norms get non-trivial statistics, scales and shifts, because initial values would hide wrongly assigned weights.
Imports no TensorFlow.
"""

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.pytorch.weight_names import Naming, WeightName, names, source_shape, to_ours, to_source

if TYPE_CHECKING:
    from x3d_tf import X3D

FLOAT64_BOUND = 1e-8  # relative to the largest entry


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def clips(name: str, *shape: int) -> np.ndarray:
    """Returns random clips (N, T, H, W, 3), RGB, uint8."""
    return rng(name).integers(0, 256, (*shape, 3), dtype=np.int64).astype(np.uint8)


def recipe_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the weight for a name in PySlowFast and a shape in PyTorch, float64."""
    draw = rng(name)
    if name.endswith("running_var"):
        return 0.5 + draw.random(shape)
    if name.endswith("running_mean"):
        return 0.1 * draw.standard_normal(shape)
    if len(shape) >= 2:
        return draw.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    if name.endswith("c_bn.weight"):
        return 0.1 + 0.2 * draw.random(shape)
    if name.endswith("bn.weight"):
        return 0.5 + draw.random(shape)
    return 0.1 * draw.standard_normal(shape)


def named_weights(model: "X3D", naming: Naming = "slowfast") -> list[tuple[WeightName, Any]]:
    """Returns the variables of a network with their names in another library."""
    named = names(plan(model.expansion, model.options), naming)
    return [(name, getattr(model.get_layer(name.layer), name.weight)) for name in named]


def give_recipe_weights(model: "X3D") -> None:
    for name, variable in named_weights(model):
        shape = source_shape(tuple(variable.shape), name.kind)
        variable.assign(to_ours(recipe_weight(name.source, shape), name.kind))


def difference(actual: Any, expected: np.ndarray) -> float:
    """Returns the largest difference of two arrays, relative to the largest expected entry."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"the shape is {actual.shape}, not {expected.shape}"
    largest = np.abs(expected).max()
    assert largest > 0, "nothing to compare with: the expected values are all zero"
    return float(np.abs(actual - expected).max() / largest)


def assert_close(actual: Any, expected: np.ndarray, bound: float = FLOAT64_BOUND, label: str = "the array") -> None:
    """Asserts that an array differs by at most `bound`, relative to the largest expected entry."""
    error = difference(actual, expected)
    assert error <= bound, f"{label} differs by {error:.1e} of its largest entry; {bound:.0e} is allowed"


def probes(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the norm and two random projections of an array in PyTorch's layout; `name` seeds the projections."""
    draws = [rng(f"{name}/probe{i}").standard_normal(array.shape) for i in (0, 1)]
    return np.array([np.linalg.norm(array), *(np.sum(draw * array) for draw in draws)])


def assert_probes(name: WeightName, array: Any, expected: np.ndarray) -> None:
    """Asserts that norm and projections of our array equal those of PySlowFast or pytorchvideo."""
    actual = probes(name.source, to_source(np.asarray(array), name.kind))
    assert expected[0] > 0, f"{name.source}: nothing to compare with"
    allowed = FLOAT64_BOUND * expected[0] * np.sqrt(np.size(array))
    assert np.abs(actual - expected).max() <= allowed, f"{name.source}: {actual}, expected {expected}"
