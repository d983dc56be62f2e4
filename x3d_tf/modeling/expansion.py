"""The six expansion factors of X3D and the networks published in the paper. Imports no TensorFlow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from x3d_tf.errors import check_field_types, require
from x3d_tf.types import ClipSpec

BASE_CROP = 112  # crop of X2D in pixels, paper Table 1
BASE_SCALE = (128, 160)  # smallest and largest short side of X2D's training frames, in pixels

# The factors may come from an untrusted file, so they have limits, far above the published networks.
MAX_FRAMES = 1024
MAX_SIDE = 2048  # pixels
MAX_STRIDE = 1000  # source frames

Family = Literal["x3d", "efficientnet3d", "efficientnet3d_matched"]


@dataclass(frozen=True)
class Expansion:
    """The factors that expand X2D, in the units of the paper's Table 1 (X2D has 1 for all of them).

    Clips have at most 1,024 frames of 2,048 x 2,048 pixels, at most 1,000 source frames apart. `architecture.plan`
    checks the limits of the other factors.

    In EfficientNet3D (see `ModelOptions.family`), γw and γd are EfficientNet's coefficients of width and depth, and γb
    is the expansion of its inverted bottlenecks.

    Attributes:
        gamma_tau: temporal stride, in source frames.
        gamma_t: number of frames per clip.
        gamma_s: spatial resolution; the crop is 112 times this.
        gamma_w: width of all layers. The paper's "2.9" for X3D-XL is relative to half the base width; here it is 1.45.
        gamma_b: inner width of the bottlenecks.
        gamma_d: number of blocks per stage.

    Raises:
        TypeError, ValueError: a factor is invalid. Names the factor, the rule and the value received.
    """

    gamma_tau: float = 1.0
    gamma_t: int = 1
    gamma_s: float = 1.0
    gamma_w: float = 1.0
    gamma_b: float = 1.0
    gamma_d: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        for factor in ("gamma_tau", "gamma_t", "gamma_s", "gamma_w", "gamma_b", "gamma_d"):
            value = getattr(self, factor)
            require(0 < value < math.inf, f"Expansion.{factor}", "be positive", value)
        for factor, limit in (
            ("gamma_tau", MAX_STRIDE),
            ("gamma_t", MAX_FRAMES),
            ("gamma_s", MAX_SIDE / BASE_SCALE[0]),
        ):
            value = getattr(self, factor)
            require(value <= limit, f"Expansion.{factor}", f"be at most {limit:g}", value)

    @property
    def clip(self) -> ClipSpec:
        """Training clip: T = γt frames at stride γτ, cropped to round(112γs) pixels."""
        return ClipSpec(self.gamma_t, self.gamma_tau, round(BASE_CROP * self.gamma_s))

    @property
    def test_size(self) -> int:
        """Short side of evaluation frames in pixels, floor(128γs); also the crop of three-crop evaluation."""
        return math.floor(BASE_SCALE[0] * self.gamma_s + 1e-6)

    @property
    def jitter(self) -> tuple[int, int]:
        """Smallest and largest short side of training frames in pixels, floor(128γs) and round(160γs)."""
        if self.clip.size == 160:  # the published recipe of X3D-XS and S rounds 228.57 down
            return self.test_size, 228
        return self.test_size, round(BASE_SCALE[1] * self.gamma_s)


@dataclass(frozen=True)
class Variant:
    """A published network: its factors and its cost as printed in the paper.

    Attributes:
        name: name of the network, as passed to `build_x3d`.
        expansion: the six factors.
        published_macs: multiply-adds for one clip of training size, in units of 1e9.
        published_params: parameters in units of 1e6, in the paper's convention (see `cost`).
        source: table of the paper that prints both.
        published_test_macs: multiply-adds for one clip of 30-view evaluation, in units of 1e9, if Table 4 prints them.
        family: family of networks that the factors expand; see `ModelOptions.family`.
    """

    name: str
    expansion: Expansion
    published_macs: float
    published_params: float
    source: str
    published_test_macs: float | None = None
    family: Family = "x3d"


_XS_S, _L_XXL = 160 / 112, 312 / 112  # published crops of 160 and 312 pixels; 112√2 and 112·2√2 are 158.4 and 316.8

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant("x2d", Expansion(), 0.02067, 1.63, "Table 1"),
        Variant("x3d_xs", Expansion(12.0, 4, _XS_S, 1.0, 2.25, 2.2), 0.60, 3.76, "Table 2"),
        Variant("x3d_s", Expansion(6.0, 13, _XS_S, 1.0, 2.25, 2.2), 1.96, 3.76, "Table 2"),
        Variant("x3d_m", Expansion(5.0, 16, 2.0, 1.0, 2.25, 2.2), 4.73, 3.76, "Table 2", 6.2),
        Variant("x3d_l", Expansion(5.0, 16, _L_XXL, 1.0, 2.25, 5.0), 18.37, 6.08, "Table 2", 24.8),
        Variant("x3d_xl", Expansion(5.0, 16, _L_XXL, 1.45, 2.25, 5.0), 35.84, 10.99, "Table 3", 48.4),
        # The paper does not print these factors: they are the only ones within 0.1 % of both 143.5 and 194.1 G.
        Variant("x3d_xxl", Expansion(2.5, 32, _L_XXL, 1.45, 2.25, 10.1), 143.5, 20.3, "Table 2", 194.1),
    )
}


def _efficientnet(
    size: str, expansion: Expansion, macs: float, params: float, family: Family = "efficientnet3d"
) -> Variant:
    return Variant(f"{family}_{size}", expansion, macs, params, "Table 7", family=family)


# The paper prints costs, but neither clips nor layers. The clips here bring the multiply-adds near the printed ones and
# span about 80 source frames, as those of X3D-M; width and depth are the official coefficients.
_MATCHED: Family = "efficientnet3d_matched"
EFFICIENTNETS: dict[str, Variant] = {
    row.name: row
    for row in (
        _efficientnet("b0", Expansion(16.0, 5, 128 / 112, 1.0, 6.0, 1.0), 0.74, 3.30),
        _efficientnet("b3", Expansion(8.0, 10, 164 / 112, 1.2, 6.0, 1.4), 6.91, 8.19),
        _efficientnet("b4", Expansion(6.0, 14, 220 / 112, 1.4, 6.0, 1.8), 23.80, 12.16),
        _efficientnet("b0", Expansion(10.0, 8, 1.0, 1.0, 4.0, 1.0), 0.74, 3.30, _MATCHED),
        _efficientnet("b3", Expansion(6.0, 13, 172 / 112, 1.2, 4.0, 1.4), 6.91, 8.19, _MATCHED),
        _efficientnet("b4", Expansion(5.0, 16, 232 / 112, 1.4, 4.0, 1.8), 23.80, 12.16, _MATCHED),
    )
}


def as_expansion(network: "str | Expansion", variants: Mapping[str, Variant] = VARIANTS) -> Expansion:
    """Returns the expansion of a variant by its name; an `Expansion` is returned unchanged.

    Args:
        network: the name, or the expansion.
        variants: the known variants by name. Defaults to those of X3D.

    Raises:
        ValueError: unknown name. The message lists the known ones.
        TypeError: neither a name nor an `Expansion`.
    """
    if isinstance(network, Expansion):
        return network
    if not isinstance(network, str):
        raise TypeError(f"a network must be the name of a variant or an Expansion, got {network!r}")
    if network not in variants:
        raise ValueError(f"unknown variant {network!r}; known: {', '.join(variants)}, or any Expansion(...)")
    return variants[network].expansion


def name_of(expansion: Expansion, family: Family = "x3d") -> str:
    """Returns the name of the variant, or the factors: `x3d(tau=6,t=13,s=1.429,w=1,b=1.5,d=2.2)`."""
    for variant in (*VARIANTS.values(), *EFFICIENTNETS.values()):
        if (variant.expansion, variant.family) == (expansion, family):
            return variant.name
    factors = (f"{key.removeprefix('gamma_')}={value:.4g}" for key, value in vars(expansion).items())
    return f"{family}({','.join(factors)})"
