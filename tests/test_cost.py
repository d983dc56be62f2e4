import pytest

from x3d_tf import VARIANTS, ClipSpec, Expansion, ModelOptions, cost
from x3d_tf.modeling.cost import Cost, layer_costs

EXACT = {
    "x2d": (20_662_304, 1_633_560),
    "x3d_xs": (605_256_512, 3_794_322),
    "x3d_s": (1_962_892_112, 3_794_322),
    "x3d_m": (4_732_468_736, 3_794_322),
    "x3d_l": (18_367_710_176, 6_153_432),
    "x3d_xl": (35_837_627_616, 11_095_904),
    "x3d_xxl": (143_541_630_016, 20_474_404),
}


@pytest.mark.parametrize("name", EXACT)
def test_cost_of_the_variants_is_exact(name: str) -> None:
    count = cost(name)
    assert (count.macs, count.params) == EXACT[name]
    # The paper prints 0.605 as 0.60.
    published = VARIANTS[name]
    assert count.macs / 1e9 == pytest.approx(published.published_macs, rel=0.009 if name == "x3d_xs" else 0.002)
    digits = len(str(published.published_params).split(".")[1])
    assert round(count.params_paper / 1e6, digits) == published.published_params


@pytest.mark.parametrize(
    ("name", "head_pool", "gmacs"),
    [
        ("x3d_m", "global", 6.1806),
        ("x3d_m", "fixed_logits", 6.1857),
        ("x3d_l", "global", 24.7640),
        ("x3d_l", "fixed_probabilities", 24.7776),
        ("x3d_xl", "global", 48.4068),
        ("x3d_xxl", "global", 194.0565),
        ("x3d_xxl", "fixed_logits", 194.0734),
    ],
)
def test_cost_at_the_thirty_view_size(name: str, head_pool: str, gmacs: float) -> None:
    expansion = VARIANTS[name].expansion
    clip = ClipSpec(expansion.gamma_t, expansion.gamma_tau, expansion.test_size)
    options = ModelOptions(head_pool=head_pool)  # type: ignore[arg-type]
    assert round(cost(name, clip, options=options).macs / 1e9, 4) == gmacs


def test_macs_are_linear_in_the_frames() -> None:
    for frames in (1, 7, 16):
        assert cost("x3d_m", ClipSpec(frames, 5, 224)).macs == frames * 295_662_864 + 1_862_912


@pytest.mark.parametrize(
    ("name", "changes", "options", "gmacs", "params"),
    [  # as printed in the paper's appendix B, or else from an independent count
        ("x3d_s", {}, {"separable": False}, "17.6", "22.1"),
        ("x3d_xl", {}, {"separable": False}, "365.4", "95.1"),
        ("x3d_s", {"gamma_b": 0.6}, {"separable": False}, "1.949", "3.161"),
        ("x3d_xl", {"gamma_b": 0.56}, {"separable": False}, "34.803", "9.732"),
        ("x3d_s", {}, {"se": "none"}, "1.96", "3.602"),
        ("x3d_xl", {}, {"se": "none"}, "35.84", "10.368"),
    ],
)
def test_cost_of_the_ablations(name: str, changes: dict, options: dict, gmacs: str, params: str) -> None:
    expansion = Expansion(**{**vars(VARIANTS[name].expansion), **changes})
    count = cost(expansion, options=ModelOptions(**options))
    for value, printed in ((count.macs / 1e9, gmacs), (count.params_paper / 1e6, params)):
        assert f"{value:.{len(printed.split('.')[1])}f}" == printed


@pytest.mark.parametrize(
    ("name", "classes", "params"),
    [("x3d_m", 600, 4.171), ("x3d_xl", 600, 11.401), ("x3d_xl", 157, 10.494), ("x3d_m", 80, 3.106)],
)
def test_cost_with_other_numbers_of_classes(name: str, classes: int, params: float) -> None:
    assert round(cost(name, num_classes=classes).params_paper / 1e6, 3) == params


def test_cost_of_a_stem_kernel_of_three_frames() -> None:
    three = cost("x2d", options=ModelOptions(stem_kernel=3)).macs
    assert three / cost("x2d").macs - 1 == pytest.approx(-0.0077 + 0.0004, abs=1e-3)
    assert cost("x2d").macs - three == 2 * 24 * 56 * 56


def test_cost_of_a_detector() -> None:
    """With one box, the full head costs what the classifier's does; the simple head has one layer, on res5."""
    clip = ClipSpec(16, 5, 256)
    full = cost("x3d_m", clip, num_classes=80, head="full")
    simple = cost("x3d_m", clip, num_classes=80, head="simple")
    assert full == cost("x3d_m", clip, num_classes=80) == cost("x3d_m", clip, num_classes=80, head="frame")
    positions = 16 * 8 * 8
    assert full.macs - simple.macs == 192 * 432 * positions + 432 * 2048 + (2048 - 192) * 80
    assert full.params - simple.params == 192 * 432 + 2 * 432 + 432 * 2048 + (2048 - 192) * 80
    assert full.params_paper - simple.params_paper == 192 * 432 + (432 + 1) * 2048 + (2048 - 192) * 80
    assert full.activations - simple.activations == 432 * positions + 2048


def test_rows_add_up_and_have_unique_names() -> None:
    rows = layer_costs("x3d_s")
    assert sum((row.cost for row in rows), Cost()) == cost("x3d_s")
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0].shape == (13, 80, 80, 24)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="head must be one of full, simple, frame, got 'large'"):
        cost("x3d_s", head="large")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_classes must be in \[1, 100000\], got 0"):
        cost("x3d_s", num_classes=0)
