"""The axes of the expansion, and the solver of their factors against brute force. No TensorFlow."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from x3d_tf.modeling.architecture import plan, round_width
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.axes import AXES, contracted, expanded


@cache
def macs(network: Expansion) -> int:
    return cost(network, num_classes=7).macs


@cache
def paper_macs(network: Expansion) -> int:
    return cost(network).macs


def naive_settings(name: str, network: Expansion) -> Iterator[Expansion]:
    """Yields networks with each setting of an axis far beyond twice the cost, from definitions, not the solver's."""
    if name in ("fast", "temporal"):
        for frames in range(min(2, network.gamma_t), 4 * network.gamma_t + 1):
            yield replace(network, gamma_t=frames)
    elif name == "spatial":
        for side in range(2, 4 * network.clip.size + 1, 2):
            yield replace(network, gamma_s=side / 112)
    elif name == "depth":
        for index in range(1, 60 * 7):  # to 7, where also the smallest of these networks has twice its cost
            yield replace(network, gamma_d=index / 60)
    elif name == "width":
        for index in range(1, int(4 * network.gamma_w * 1728)):
            width = index / 1728
            if round_width(24, width) * network.gamma_b >= 1:
                yield replace(network, gamma_w=width)
    else:
        for index in range(1, int(4 * network.gamma_b * 1344)):
            bottleneck = (index + 0.5) / 1344  # finer than 1 / width for the widths of these networks
            if bottleneck * plan(network).stages[0].width >= 1:
                yield replace(network, gamma_b=bottleneck)


def key(network: Expansion) -> tuple[object, ...]:
    """Returns what distinguishes the settings of an axis: frames, size and layers."""
    return (network.gamma_t, network.clip.size, plan(network).stages)


def random_network(generator: random.Random) -> Expansion:
    return Expansion(
        gamma_tau=generator.choice([1.0, 3.0, 6.0]),
        gamma_t=generator.choice([1, 2, 3, 5]),
        gamma_s=generator.choice([32, 45, 64, 112]) / 112,
        gamma_w=generator.choice([0.4, 1.0, 1.3]),
        gamma_b=generator.choice([0.7, 1.0, 2.25]),
        gamma_d=generator.choice([0.2, 0.5, 1.0, 1.7]),
    )


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("seed", range(4))
def test_the_solver_finds_what_brute_force_finds(name: str, seed: int) -> None:
    network = random_network(random.Random(seed))
    before = macs(network)
    distinct = {key(setting): setting for setting in naive_settings(name, network)}
    larger = [setting for setting in distinct.values() if macs(setting) > before]
    closest = min(abs(macs(setting) - 2 * before) for setting in larger)
    best = [setting for setting in larger if abs(macs(setting) - 2 * before) == closest]
    found = expanded(AXES[name], network, macs, 2 * before)
    assert found is not None
    assert key(found) == key(min(best, key=macs)), (found, best)
    smaller = [setting for setting in distinct.values() if macs(setting) < before]
    for share in (0.5, 0.8, 0.97):
        fitting = [setting for setting in smaller if macs(setting) <= share * before]
        ours = contracted(AXES[name], network, macs, lambda setting, most=share * before: macs(setting) <= most)  # type: ignore[misc]
        assert (ours and key(ours)) == (key(max(fitting, key=macs)) if fitting else None), share


@pytest.mark.parametrize(("name", "expected"), [("fast", 1.940), ("temporal", 1.940), ("spatial", 1.884)])
def test_the_closest_settings_on_x2d_are_the_printed_operations(name: str, expected: float) -> None:
    x2d = Expansion()
    found = expanded(AXES[name], x2d, paper_macs, 2 * paper_macs(x2d))
    assert found is not None
    assert round(paper_macs(found) / paper_macs(x2d), 3) == expected
    assert found.clip.size == (160 if name == "spatial" else 112)


@pytest.mark.parametrize(
    ("factor", "value", "expected"),
    [
        ("gamma_t", 2, 1.940),
        ("gamma_s", 160 / 112, 1.884),
        ("gamma_d", 2.2, 1.849),
        ("gamma_w", 2.0, 3.425),
        ("gamma_w", 1.45, 1.840),
        ("gamma_w", 1.5, 2.136),
        ("gamma_b", 2.25, 1.984),
    ],
)
def test_the_printed_operations_multiply_the_cost_of_x2d(factor: str, value: float, expected: float) -> None:
    """The figures are those of the specification; printed X-Width more than triples the cost, so factors are solved."""
    expansion = replace(Expansion(), **{factor: value})  # type: ignore[arg-type]
    assert round(paper_macs(expansion) / paper_macs(Expansion()), 3) == expected


def test_the_printed_operations_are_the_papers() -> None:
    printed = {name: (axis.factor, round(axis.printed, 4), axis.stride) for name, axis in AXES.items()}
    assert printed == {
        "fast": ("gamma_t", 2.0, 0.5),
        "temporal": ("gamma_t", 2.0, 0.75),
        "spatial": ("gamma_s", 1.4142, None),
        "depth": ("gamma_d", 2.2, None),
        "width": ("gamma_w", 2.0, None),
        "bottleneck": ("gamma_b", 2.25, None),
    }


def test_strides_follow_the_number_of_frames() -> None:
    x = Expansion()
    fast, temporal = AXES["fast"], AXES["temporal"]
    assert fast.applied(x, 2) == temporal.applied(x, 2) == replace(x, gamma_t=2, gamma_tau=16.0)
    assert fast.applied(x, 2, first_stride=4.0).gamma_tau == 4.0
    two = fast.applied(x, 2)
    assert (fast.applied(two, 4).gamma_tau, temporal.applied(two, 4).gamma_tau) == (8.0, 12.0)
    for frames in (3, 5, 8):
        assert math.isclose(fast.applied(two, frames).gamma_tau * frames, 32)


def test_a_contraction_of_the_frames_keeps_the_duration() -> None:
    network = Expansion(5.0, 16, 160 / 112, 1.0, 2.25, 2.2)
    found = contracted(AXES["temporal"], network, paper_macs, lambda x: paper_macs(x) <= 1.01 * 2e9)
    assert found is not None
    assert (found.gamma_t, found.gamma_t * found.gamma_tau) == (13, 80.0)


def test_factors_have_few_decimals() -> None:
    """The solver names a setting by its shortest factor, so that the published ones keep their names."""
    l_before = Expansion(5.0, 16, 312 / 112, 1.0, 2.25, 2.2)
    found = expanded(AXES["depth"], l_before, paper_macs, 2 * paper_macs(l_before))
    assert found == replace(l_before, gamma_d=5.0)
    before = Expansion(16.0, 2, 160 / 112, 1.0, 2.25)
    assert expanded(AXES["depth"], before, paper_macs, 2 * paper_macs(before)) == replace(before, gamma_d=2.2)
    x = expanded(AXES["bottleneck"], Expansion(), paper_macs, 2 * paper_macs(Expansion()))
    assert x is not None and x.gamma_b == 2.28
    large = expanded(AXES["width"], replace(found, gamma_d=5.0), paper_macs, 2 * paper_macs(found))
    assert large is not None and large.gamma_w == 1.46


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("fast", Expansion(gamma_t=1024, gamma_s=0.2, gamma_d=0.2)),
        ("temporal", Expansion(gamma_t=1024, gamma_s=0.2, gamma_d=0.2)),
        ("spatial", Expansion(gamma_s=16.0, gamma_d=0.2)),
        ("depth", Expansion(gamma_s=0.2, gamma_d=1000 / 11)),
        ("width", Expansion(gamma_s=0.2, gamma_w=16384 / 192, gamma_d=0.2)),
        ("bottleneck", Expansion(gamma_s=0.2, gamma_b=16384 / 192, gamma_d=0.2)),
    ],
)
def test_limits_of_the_factors_end_an_axis(name: str, network: Expansion) -> None:
    assert expanded(AXES[name], network, macs, 2 * macs(network)) is None


def test_nothing_smaller_fits() -> None:
    for axis, network in itertools.product(AXES.values(), (Expansion(), Expansion(gamma_d=0.2, gamma_b=0.2))):
        assert contracted(axis, network, macs, lambda _: False) is None
