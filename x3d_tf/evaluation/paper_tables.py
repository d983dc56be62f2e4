"""The paper's tables, with the costs counted here beside the printed ones. Imports no TensorFlow."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from x3d_tf.evaluation.published import (
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7_TEST,
    TABLE_7_VALIDATION,
    TABLE_8,
    TABLE_A1,
    Ablation,
    Layers,
    Row,
)
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.cost import Cost, cost, layer_costs
from x3d_tf.modeling.expansion import EFFICIENTNETS, VARIANTS

_COUNTED = ("counted", "diff")  # columns after a printed cost
EFFICIENTNET_NOTE = (
    "The paper's definition of EfficientNet3D cannot be recovered from its text. efficientnet3d is faithful to the\n"
    "name, efficientnet3d_matched is nearer to the printed parameters; neither reproduces them."
)


def paper_tables() -> list[str]:
    """Returns the lines of Tables 1 to 8 and A.1; the costs of other methods are only printed."""
    sections = (
        ("Table 1: X2D", _layers([TABLE_1])),
        ("Table 2: Kinetics-400, validation videos, 10-Center; one clip of training size", _regimes()),
        ("Table 3: three networks", _layers(TABLE_3)),
        ("Table 4: Kinetics-400, 10-LeftCenterRight; one view of test size", _state_of_the_art()),
        ("Table 5: Kinetics-600, 10-LeftCenterRight; one view of test size", _other_data(TABLE_5, 600, "top1", "top5")),
        ("Table 6: Charades, 10-LeftCenterRight; one view of test size", _other_data(TABLE_6, 157, "map")),
        ("Table 7: EfficientNet3D, Kinetics-400, validation videos, 10-Center", _differences(TABLE_7_VALIDATION)),
        ("Table 7: EfficientNet3D, Kinetics-400, test videos, 10-Center", _differences(TABLE_7_TEST)),
        ("EfficientNet3D: two definitions beside the costs of Table 7", _efficientnets()),
        ("Table 8: AVA, validation videos, one centre crop of test size", _detection()),
        ("Table A.1: ablations on Kinetics-400, 10-Center; one clip of training size", _ablations()),
    )
    return [line for title, lines in sections for line in (title, *lines, "")] + [
        "GMACs are the paper's GFLOPs. Parameters are counted as in the paper, in units of 1e6.",
    ]


def _regimes() -> list[str]:
    head = ("network", "top-1", "top-5", "limit", "GMACs", *_COUNTED, "M params", *_COUNTED)
    rows = []
    for row in TABLE_2:
        counted = cost(row.network or "")
        limit = f"≤ {row.limit:g}"
        rows.append((row.model, _text(row.top1), _text(row.top5), limit, *_costs(row, counted)))
    return _aligned(head, rows)


def _layers(tables: Sequence[Layers]) -> list[str]:
    lines: list[str] = []
    for printed in tables:
        expansion = VARIANTS[printed.network].expansion
        stages, counted = plan(expansion).stages, cost(expansion)
        sides = [row.shape[1] for row in layer_costs(expansion) if row.shape[1] > 1]
        factors = [f"{value:.4g}" for value in vars(expansion).values()]
        columns = (
            ("γτ γt γs γw γb γd", printed.factors, factors),
            ("conv1", [printed.conv1], [plan(expansion).stem_width]),
            ("inner widths", printed.inner, [stage.inner_width for stage in stages]),
            ("widths", printed.outer, [stage.width for stage in stages]),
            ("blocks", printed.depths, [stage.depth for stage in stages]),
            ("sides", printed.sides, dict.fromkeys([expansion.clip.size, *sides])),
            ("GMACs", [printed.gmacs], [f"{counted.macs / 1e9:.5g}"]),
            ("M params", [printed.params], [f"{counted.params_paper / 1e6:.4f}"]),
            ("top-1", [printed.top1], ["-"]),
        )
        rows = [(name, " ".join(map(str, paper)), " ".join(map(str, here))) for name, paper, here in columns]
        lines += _aligned((printed.network, "printed", "here"), rows)
    if tables is TABLE_3:
        lines.append(
            "The printed γw of X3D-XL is relative to half the base width; the sides follow from 160/112, 312/112."
        )
    return lines


def _state_of_the_art() -> list[str]:
    head = ("network", "pre-training", "top-1", "top-5", "test", "GMACs", *_COUNTED, "x views", "M params", *_COUNTED)
    rows = []
    for row in TABLE_4:
        gmacs, params = _split(_costs(row, _test_cost(row)))
        accuracies = (_text(row.top1), _text(row.top5), _text(row.test))
        rows.append((row.model, row.pretrained, *accuracies, *gmacs, _text(row.views), *params))
    return [*_aligned(head, rows), "test: mean of top-1 and top-5 on the test videos"]


def _other_data(table: Sequence[Row], num_classes: int, *metrics: str) -> list[str]:
    labels = {"top1": "top-1", "top5": "top-5", "map": "mAP"}
    names = [labels[metric] for metric in metrics]
    head = ("network", "pre-training", *names, "GMACs", *_COUNTED, "x views", "M params", *_COUNTED)
    rows = []
    for row in table:
        gmacs, params = _split(_costs(row, _test_cost(row, num_classes)))
        figures = [_text(getattr(row, metric)) for metric in metrics]
        rows.append((row.model, row.pretrained, *figures, *gmacs, _text(row.views), *params))
    return [*_aligned(head, rows), "The printed parameters of X3D are those for the 400 classes of Kinetics-400."]


def _differences(table: Sequence[Row]) -> list[str]:
    head = ("network", "top-1", "", "top-5", "", "GMACs", "", *_COUNTED, "M params", "", *_COUNTED)
    rows, before = [], table[0]
    for row in table:
        counted = cost(row.network) if row.network else None
        gmacs, params = _split(_costs(row, counted))
        names = ("top1", "top5", "gmacs", "params")
        differences = [_difference(row, before, index, name) for index, name in enumerate(names)]
        rows.append(
            (
                *(row.model, _text(row.top1), differences[0], _text(row.top5), differences[1]),
                *(gmacs[0], differences[2], *gmacs[1:], params[0], differences[3], *params[1:]),
            )
        )
        before = row
    return [*_aligned(head, rows), "!: the printed difference from the row above does not follow from the two figures"]


def _difference(row: Row, before: Row, index: int, name: str) -> str:
    """Returns a printed difference, with a mark if it is not that of the printed figures."""
    if row.printed_differences is None:
        return ""
    printed, exact = row.printed_differences[index], getattr(row, name) - getattr(before, name)
    return f"({printed:+.1f}{'' if abs(printed - exact) <= 0.0501 else '!'})"


def _efficientnets() -> list[str]:
    head = ("network", "T x S²", "GMACs", *_COUNTED, "M params", *_COUNTED)
    rows = []
    for variant in EFFICIENTNETS.values():
        clip, counted = variant.expansion.clip, cost(variant.name)
        macs = _beside(variant.published_macs, counted.macs / 1e9)
        params = _beside(variant.published_params, counted.params_paper / 1e6)
        rows.append((variant.name, f"{clip.frames} x {clip.size}²", *macs, *params))
    return [*_aligned(head, rows), *EFFICIENTNET_NOTE.splitlines()]


def _detection() -> list[str]:
    head = ("backbone", "AVA", "pre-training", "mAP", "GMACs", *_COUNTED, "M params", *_COUNTED)
    rows = []
    for row in TABLE_8:
        costs = _costs(row, _test_cost(row, num_classes=80))
        rows.append((row.model, row.dataset, row.pretrained, _text(row.map), *costs))
    note = "X3D-XL's 11.0 is the number of its classifier for Kinetics-400; 10.3 follows the rule of X3D-M's 3.1"
    return [*_aligned(head, rows), note]


def _ablations() -> list[str]:
    head = ("network", "change", "γb", "GMACs", "M params", "top-1", "top-1*", "GMACs*", "M params*")
    rows: list[tuple[str, ...]] = []
    for network, table in itertools.groupby(TABLE_A1, key=lambda row: row.network):
        baseline = next(row for row in TABLE_2 if row.network == network)
        rows.append((network, "-", *_ablated(network), f"{baseline.top1}", "", "", ""))
        rows += [
            ("", row.change, *_ablated(network, row), f"{row.difference:+.1f}", *map(_text, row.recalled))
            for row in table
        ]
    note = "*: recalled from the public version of the paper, absent from the text used here, and not verified"
    return [*_aligned(head, rows), note]


def _ablated(network: str, row: Ablation | None = None) -> tuple[str, str, str]:
    """Returns γb, GMACs and parameters of a network of Table A.1."""
    expansion = VARIANTS[network].expansion
    if row and row.gamma_b:
        expansion = replace(expansion, gamma_b=row.gamma_b)
    counted = cost(expansion, options=row.options if row else None)
    return f"{expansion.gamma_b:g}", f"{counted.macs / 1e9:.3f}", f"{counted.params_paper / 1e6:.3f}"


def _test_cost(row: Row, num_classes: int = 400) -> Cost | None:
    """Returns the cost of a network for one view of test size."""
    if row.network is None:
        return None
    expansion = VARIANTS[row.network].expansion
    return cost(expansion, replace(expansion.clip, size=expansion.test_size), num_classes=num_classes)


def _costs(row: Row, counted: Cost | None) -> tuple[str, ...]:
    """Returns printed GMACs, the counted ones, their relative difference, and the same for the parameters."""
    pairs = (
        (row.gmacs, counted.macs / 1e9 if counted else None),
        (row.params, counted.params_paper / 1e6 if counted else None),
    )
    return tuple(cell for printed, value in pairs for cell in _beside(printed, value))


def _beside(printed: float | None, value: float | None) -> tuple[str, str, str]:
    if printed is None or value is None:
        return _text(printed), "-", "-"
    return _text(printed), f"{value:.4g}" if value >= 100 else f"{value:.4f}", f"{value / printed - 1:+.2%}"


def _split(cells: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return cells[:3], cells[3:]


def _text(value: float | None) -> str:
    return "-" if value is None else str(value)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: text columns aligned left, others right."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    left = [_is_text(column) for column in zip(*rows)]

    def line(cells: Sequence[str]) -> Iterator[str]:
        for cell, width, is_text in zip(cells, widths, left):
            yield cell.ljust(width) if is_text else cell.rjust(width)

    return ["  " + "  ".join(line(cells)).rstrip() for cells in table]


def _is_text(column: Sequence[str]) -> bool:
    return any(cell[:1].isalpha() for cell in column) or all(" " in cell for cell in column)
