"""Weights and clips that two implementations make alike from their names, so that only outputs need storing.

The recipe gives batch norms statistics, scales and shifts that matter: fresh ones would hide a weight that went astray.
Imports no TensorFlow.
"""

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.pytorch.weight_names import Naming, WeightName, names, source_shape, to_ours, to_source

if TYPE_CHECKING:
    from x3d_tf import X3D

FLOAT64_BOUND = 1e-8  # of the largest entry


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def clips(name: str, *shape: int) -> np.ndarray:
    """Clips (N, T, H, W, 3), RGB, uint8."""
    return rng(name).integers(0, 256, (*shape, 3), dtype=np.int64).astype(np.uint8)


def recipe_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that both sides make from its name in PySlowFast and its shape in PyTorch, float64."""
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
    """Each of a network's variables with its name elsewhere."""
    named = names(plan(model.expansion, model.options), naming)
    return [(name, getattr(model.get_layer(name.layer), name.weight)) for name in named]


def give_recipe_weights(model: "X3D") -> None:
    for name, variable in named_weights(model):
        shape = source_shape(tuple(variable.shape), name.kind)
        variable.assign(to_ours(recipe_weight(name.source, shape), name.kind))


def difference(actual: Any, expected: np.ndarray) -> float:
    """The largest difference of two arrays over the largest entry of the expected one."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"the shape is {actual.shape}, not {expected.shape}"
    largest = np.abs(expected).max()
    assert largest > 0, "nothing to compare with: the expected values are all zero"
    return float(np.abs(actual - expected).max() / largest)


def assert_close(actual: Any, expected: np.ndarray, bound: float = FLOAT64_BOUND, what: str = "the array") -> None:
    """Holds an array within `bound` of the largest entry of the expected one."""
    found = difference(actual, expected)
    assert found <= bound, f"{what} differs by {found:.1e} of its largest entry, and {bound:.0e} is allowed"


def probes(name: str, array: np.ndarray) -> np.ndarray:
    """Norm and two random projections of an array in PyTorch's layout; `name` makes the projections."""
    draws = [rng(f"{name}/probe{i}").standard_normal(array.shape) for i in (0, 1)]
    return np.array([np.linalg.norm(array), *(np.sum(draw * array) for draw in draws)])


def assert_probes(name: WeightName, array: Any, expected: np.ndarray) -> None:
    """Holds norm and projections of an array of ours to those of PySlowFast's or pytorchvideo's."""
    actual = probes(name.source, to_source(np.asarray(array), name.kind))
    assert expected[0] > 0, f"{name.source}: nothing to compare with"
    allowed = FLOAT64_BOUND * expected[0] * np.sqrt(np.size(array))
    assert np.abs(actual - expected).max() <= allowed, f"{name.source}: {actual}, expected {expected}"
