import pytest

from x3d_tf import VARIANTS, ClipSpec, Expansion
from x3d_tf.modeling.expansion import as_expansion, name_of


@pytest.mark.parametrize(
    ("name", "clip", "test_size", "jitter"),
    [
        ("x2d", ClipSpec(1, 1, 112), 128, (128, 160)),
        ("x3d_xs", ClipSpec(4, 12, 160), 182, (182, 228)),
        ("x3d_s", ClipSpec(13, 6, 160), 182, (182, 228)),
        ("x3d_m", ClipSpec(16, 5, 224), 256, (256, 320)),
        ("x3d_l", ClipSpec(16, 5, 312), 356, (356, 446)),
        ("x3d_xl", ClipSpec(16, 5, 312), 356, (356, 446)),
        ("x3d_xxl", ClipSpec(32, 2.5, 312), 356, (356, 446)),
    ],
)
def test_sizes_of_the_variants(name: str, clip: ClipSpec, test_size: int, jitter: tuple[int, int]) -> None:
    expansion = VARIANTS[name].expansion
    assert (expansion.clip, expansion.test_size, expansion.jitter) == (clip, test_size, jitter)


def test_variants_are_found_by_name() -> None:
    assert name_of(as_expansion("x3d_m")) == "x3d_m"
    assert name_of(Expansion(gamma_b=1.5)) == "x3d(tau=1,t=1,s=1,w=1,b=1.5,d=1)"
    with pytest.raises(ValueError, match=r"unknown variant 'x3d_q'.*x3d_xxl"):
        as_expansion("x3d_q")
    with pytest.raises(TypeError, match="got 3"):
        as_expansion(3)  # type: ignore[arg-type]


def test_invalid_factors_are_named() -> None:
    with pytest.raises(ValueError, match=r"Expansion\.gamma_w must be positive, got -1"):
        Expansion(gamma_w=-1)
    with pytest.raises(TypeError, match=r"Expansion\.gamma_t must be int, got 1\.5"):
        Expansion(gamma_t=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma_d must be positive, got nan"):
        Expansion(gamma_d=float("nan"))
