"""The expansion path published in the paper, as factors, and its costs. Imports no TensorFlow."""

from dataclasses import dataclass, replace

from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import BASE_CROP, VARIANTS, Expansion
from x3d_tf.search.axes import AXES


@dataclass(frozen=True)
class PublishedStep:
    """A step of the published path.

    Attributes:
        label: number of the step; "7c" is the contraction of step 7.
        axis: name of the expanded or contracted axis; None for X2D.
        expansion: factors after the step.
        parent: label of the step that it changes; None for X2D.
        printed: printed multiply-adds in units of 1e9, if any.
    """

    label: str
    axis: str | None
    expansion: Expansion
    parent: str | None
    printed: float | None


_XS, _L, _XL = (VARIANTS[name].expansion for name in ("x3d_xs", "x3d_l", "x3d_xl"))
_STEP_2 = Expansion(gamma_tau=16.0, gamma_t=2, gamma_b=2.25)

# Section 4.1, Figure 2 and Table 2. The text gives neither the order of steps 6 and 7 nor the strides before X3D-S.
# They follow from those of X3D-XS (12) and X3D-M (5) by the operations of appendix A.3.
PATH = (
    PublishedStep("0", None, Expansion(), None, 0.02067),
    PublishedStep("1", "bottleneck", Expansion(gamma_b=2.25), "0", 0.0414),
    PublishedStep("2", "fast", _STEP_2, "1", 0.08),
    PublishedStep("3", "spatial", replace(_STEP_2, gamma_s=160 / BASE_CROP), "2", 0.15),
    PublishedStep("4", "depth", replace(_XS, gamma_tau=16.0, gamma_t=2), "3", 0.30),
    PublishedStep("5", "temporal", _XS, "4", 0.60),
    PublishedStep("6", "fast", replace(_XS, gamma_tau=6.0, gamma_t=8), "5", None),
    PublishedStep("7", "temporal", replace(_XS, gamma_tau=5.0, gamma_t=16), "6", None),
    PublishedStep("7c", "temporal", VARIANTS["x3d_s"].expansion, "7", 1.96),
    PublishedStep("8", "spatial", VARIANTS["x3d_m"].expansion, "7", 4.73),
    PublishedStep("9", "spatial", replace(_L, gamma_d=2.2), "8", None),
    PublishedStep("10", "depth", _L, "9", 18.37),
    PublishedStep("11", "width", _XL, "10", 35.84),
    PublishedStep("12", "fast", replace(_XL, gamma_tau=2.5, gamma_t=32), "11", None),
    PublishedStep("13", "depth", VARIANTS["x3d_xxl"].expansion, "12", 143.5),
)


def path_table() -> list[str]:
    """Returns the lines of a table with one row for each step of the published path and the costs counted here."""
    names = {variant.expansion: name for name, variant in VARIANTS.items()}
    macs = {step.label: cost(step.expansion).macs for step in PATH}
    lines = [
        f"{'step':>4}  {'axis':13} {'T':>3} {'τ':>4} {'S':>4} {'γw':>5} {'γb':>5} {'γd':>5} {'GMACs':>9} {'paper':>7}"
        f" {'ratio':>6}  network"
    ]
    for step in PATH:
        x = step.expansion
        axis = f"{AXES[step.axis].symbol} {step.axis}" if step.axis else "-"
        stride = f"{x.gamma_tau:g}" if x.gamma_t > 1 else "-"
        printed = "-" if step.printed is None else str(step.printed)
        ratio = f"{macs[step.label] / macs[step.parent]:.3f}" if step.parent else "-"
        lines.append(
            f"{step.label:>4}  {axis:13} {x.gamma_t:3} {stride:>4} {x.clip.size:4} {x.gamma_w:5g} {x.gamma_b:5g} "
            f"{x.gamma_d:5g} {macs[step.label] / 1e9:9.4f} {printed:>7} {ratio:>6}  {names.get(x, '')}".rstrip()
        )
    return [*lines, "", "Steps 6 and 7 may be in the other order. 7c contracts step 7; step 8 expands step 7 itself."]
