import numpy as np
import pytest

from x3d_tf import VARIANTS, Expansion, ModelOptions
from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import plan, round_width, se_width

SMALL, LARGE = (24, 24, 48, 96, 192), (32, 32, 72, 136, 280)
TABLE = {  # widths of conv1 and res2..res5, inner widths, depths
    "x2d": (SMALL, (24, 48, 96, 192), (1, 2, 5, 3)),
    "x3d_xs": (SMALL, (54, 108, 216, 432), (3, 5, 11, 7)),
    "x3d_s": (SMALL, (54, 108, 216, 432), (3, 5, 11, 7)),
    "x3d_m": (SMALL, (54, 108, 216, 432), (3, 5, 11, 7)),
    "x3d_l": (SMALL, (54, 108, 216, 432), (5, 10, 25, 15)),
    "x3d_xl": (LARGE, (72, 162, 306, 630), (5, 10, 25, 15)),
    "x3d_xxl": (LARGE, (72, 162, 306, 630), (11, 21, 51, 31)),
}


@pytest.mark.parametrize("name", TABLE)
def test_plan_of_the_variants(name: str) -> None:
    widths, inner, depths = TABLE[name]
    architecture = plan(VARIANTS[name].expansion)
    assert (architecture.stem_width, *(stage.width for stage in architecture.stages)) == widths
    assert tuple(stage.inner_width for stage in architecture.stages) == inner
    assert tuple(stage.depth for stage in architecture.stages) == depths
    assert architecture.head_width == inner[-1]


def test_widths_are_rounded_as_published() -> None:
    assert [round_width(w, 1.45) for w in (24, 48, 96, 192)] == [32, 72, 136, 280]
    assert [se_width(w) for w in (24, 48, 96, 192)] == [8, 8, 8, 16]
    assert [se_width(w) for w in (54, 108, 216, 432)] == [8, 8, 16, 32]
    assert [se_width(w) for w in (72, 162, 306, 630)] == [8, 16, 24, 40]


def test_depth_is_robust_to_float32_rounding() -> None:
    depths = [stage.depth for stage in plan(Expansion(gamma_d=float(np.float32(2.2)))).stages]
    assert depths == [3, 5, 11, 7]


@pytest.mark.parametrize(("se", "expected"), [("alternate", [2, 3, 6, 4]), ("all", [3, 5, 11, 7]), ("none", [0] * 4)])
def test_squeeze_excitation_starts_with_each_stage(se: str, expected: list[int]) -> None:
    architecture = plan(VARIANTS["x3d_m"].expansion, ModelOptions(se=se))  # type: ignore[arg-type]
    blocks = [[architecture.has_se(index) for index in range(stage.depth)] for stage in architecture.stages]
    assert [sum(stage) for stage in blocks] == expected
    assert se != "alternate" or all(stage[0] and not stage[1] for stage in blocks)


def test_drop_connect_grows_with_the_stage() -> None:
    architecture = plan(Expansion(), ModelOptions(drop_connect=0.1))
    assert [architecture.drop_connect(stage) for stage in range(4)] == pytest.approx([0.04, 0.06, 0.08, 0.1])


@pytest.mark.parametrize(
    ("option", "value"),
    [("stem_kernel", 4), ("bn_group", 0), ("drop_connect", 1.0), ("dropout", -0.1), ("se", "some"), ("swish", 1)],
)
def test_invalid_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"ModelOptions\.{option} must .*{value!r}"):
        ModelOptions(**{option: value})  # type: ignore[arg-type]


def test_zero_inner_width_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"gamma_b must give at least 1 inner channel for a width of 24, got 0\.01"):
        plan(Expansion(gamma_b=0.01))


LIMITS = {"gamma_t": 1024, "gamma_s": 16, "gamma_tau": 1000, "gamma_w": 85.3, "gamma_b": 85.3, "gamma_d": 90.9}


@pytest.mark.parametrize("name", LIMITS)
def test_factors_have_limits(name: str) -> None:
    """Checks that `plan` accepts the limit, which is fast, and rejects values above it by name."""
    smallest = {"gamma_w": 0.1, "gamma_b": 1.0, "gamma_d": 0.1}
    plan(Expansion(**smallest | {"gamma_w": 1.0, name: LIMITS[name]}))
    for value in (LIMITS[name] + 1, 10**18, 1e300):
        value = int(value) if name == "gamma_t" else value
        with pytest.raises(UserError, match=rf"Expansion\.{name} must (be at most|give at most|fit into 64 bits)"):
            plan(Expansion(**{"gamma_w": 1.0, name: value}))
