"""The figures printed in the paper, and the tables that compare them with the costs counted here. No TensorFlow."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from x3d_tf import VARIANTS, complexity
from x3d_tf.errors import UserError
from x3d_tf.evaluation.paper_tables import paper_tables
from x3d_tf.evaluation.published import (
    FIGURE_2_STEP_1,
    FIGURE_3,
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
    Row,
)
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.cost import cost
from x3d_tf.search.replay import PATH

Figures = set[tuple[str, ...]]


@pytest.fixture(scope="module")
def printed(shared_data: Path) -> list[dict[str, str]]:
    with (shared_data.parent / "paper" / "paper_results.csv").open() as file:
        return list(csv.DictReader(file))


def plain(model: str) -> str:
    """Returns the name of a method without what the two lists write differently."""
    return model.replace(",", "").replace(" + ", "+").replace(" ", "")


def figures(rows: Iterable[Row], table: str, **columns: str) -> Figures:
    """Returns the figures of some rows as (table, model, metric, value, pre-training, data set or split)."""
    found = set()
    for row in rows:
        metrics = {"top1": row.top1, "top5": row.top5, "test_avg": row.test, "mAP": row.map}
        metrics |= {"gflops": row.gmacs, "params": row.params, "regime_max_gflops": row.limit}
        pretrained = row.pretrained.replace("Kinetics-", "K")
        key = columns.get("split") or (f"AVA v{row.dataset}" if row.dataset else "")
        found |= {
            (table, plain(row.model), name, str(float(value)), pretrained, key)
            for name, value in metrics.items()
            if value is not None
        }
    return found


def of_csv(rows: list[dict[str, str]], table: str, keys: Callable[[dict[str, str]], str]) -> Figures:
    found = set()
    for row in rows:
        if (row["table"], row["source"]) == (table, "paper"):
            note = row["note"].partition(";")[0]
            pretrained = note.removeprefix("pretrain ") if note.startswith("pretrain ") else "-"
            value = str(float(row["value"]))
            found.add((table, plain(row["model"]), row["metric"], value, pretrained, keys(row)))
    return found


def test_the_rows_are_those_of_the_paper(printed: list[dict[str, str]]) -> None:
    assert figures(TABLE_2, "T2") == of_csv(printed, "T2", lambda row: "")
    halves = figures(TABLE_7_VALIDATION, "T7", split="val") | figures(TABLE_7_TEST, "T7", split="test")
    assert halves == of_csv(printed, "T7", lambda row: row["split"])
    assert figures(TABLE_5, "T5") == of_csv(printed, "T5", lambda row: "")
    assert figures(TABLE_6, "T6") == of_csv(printed, "T6", lambda row: "")
    assert figures(TABLE_8, "T8") == of_csv(printed, "T8", lambda row: row["dataset"])
    fourth = of_csv(printed, "T4", lambda row: "")
    # The list states the pre-training of top-1, top-5 and costs only.
    tests = {row[:4] for row in fourth if row[2] == "test_avg"}
    ours = figures(TABLE_4, "T4")
    assert {row for row in ours if row[2] != "test_avg"} == {row for row in fourth if row[2] != "test_avg"}
    assert {row[:4] for row in ours if row[2] == "test_avg"} == tests
    for name, metric, table in (("T4", "params", TABLE_4), ("T5", "top1", TABLE_5), ("T6", "mAP", TABLE_6)):
        rows = [row for row in printed if (row["table"], row["metric"]) == (name, metric)]
        views = {(plain(row["model"]), row["views"]) for row in rows}
        assert {(plain(row.model), str(row.views or "N/A")) for row in table} == views


def test_the_layers_are_those_of_the_paper(printed: list[dict[str, str]]) -> None:
    for table in TABLE_3:
        name = table.network.upper().replace("_", "-")
        rows = {row["metric"]: row["value"] for row in printed if row["table"] == "T3" and row["model"] == name}
        factors = [rows[f"gamma_{factor}"].replace("sqrt", "√") for factor in ("tau", "t", "s", "w", "b", "d")]
        assert list(table.factors) == factors
        layers = {"inner": table.inner, "out": table.outer, "depth": table.depths}
        assert {metric: "/".join(map(str, values)) for metric, values in layers.items()} == {
            metric: rows[metric] for metric in layers
        }
        assert (">".join(map(str, table.sides)), str(table.conv1)) == (rows["sizes"], rows["conv1"])
        costs = [float(rows[metric]) for metric in ("gflops", "params", "top1")]
        assert [table.gmacs, table.params, table.top1] == costs
    first = {(row["metric"], float(row["value"])) for row in printed if row["table"] == "T1"}
    assert first == {("mflops", round(1000 * TABLE_1.gmacs, 6)), ("params", TABLE_1.params)}


def test_the_points_of_figures_are_those_of_the_paper(printed: list[dict[str, str]]) -> None:
    def points(table: str, cost: str) -> set[tuple[str, str, float, float]]:
        rows = [row for row in printed if row["table"] == table and row["metric"] in ("top1", cost)]
        values = {(row["model"], row["views"], row["metric"]): float(row["value"]) for row in rows}
        keys = {(model, views) for model, views, metric in values if metric == "top1"}
        return {(*key, values[*key, "top1"], values[*key, cost]) for key in keys}

    first = {("X2D", "10-Center", TABLE_1.top1, TABLE_1.gmacs)}
    for row in FIGURE_2_STEP_1:
        first.add((f"X2D+step1 {row.model.replace('γ', 'gamma_')}", f"{row.views}-Center", row.top1, row.gmacs))
    assert first == {(*key, round(mmacs / 1000, 7)) for *key, mmacs in points("F2", "mflops")}
    ending = {True: "Center", False: "clip"}
    third = {(row.model, f"{row.views}-{ending[bool(row.network)]}", row.top1, row.video_gmacs) for row in FIGURE_3}
    assert third == points("F3", "gflops")
    for row in FIGURE_3[:2]:  # the printed costs of all clips are those of Table 2 times their number, rounded
        assert row.video_gmacs == round(1.963 * row.views, 1)


def test_the_ablations_are_those_of_the_paper(printed: list[dict[str, str]]) -> None:
    names = {
        "dense, equal GMACs": ("CSConv->Conv at equal FLOPs", "CSConv->Conv gamma_b=0.6"),
        "dense": ("CSConv->Conv at equal gamma_b", "CSConv->Conv"),
        "ReLU for swish": ("w/o Swish", "w/o Swish"),
        "no SE": ("w/o SE", "w/o SE"),
    }
    values = {(row["model"], row["metric"], row["source"]): row["value"] for row in printed}
    for ours in TABLE_A1:
        network = ours.network.upper().replace("_", "-")
        stated, recalled = (f"{network} {name}" for name in names[ours.change])
        recalled = recalled.replace("gamma_b=0.6", f"gamma_b={ours.gamma_b}")
        assert float(values[stated, "delta_top1", "paper"]) == ours.difference
        found = tuple(float(values[recalled, metric, "recalled"]) for metric in ("top1", "gflops", "params"))
        assert found == ours.recalled


def test_the_printed_costs_are_the_counted_ones() -> None:
    """All printed digits follow from the networks, except those that the specification lists."""
    for row in TABLE_2:
        counted = cost(row.network or "")
        if row.network != "x3d_xs":  # 0.605 is printed as 0.60
            assert row.gmacs == pytest.approx(counted.macs / 1e9, rel=0.0016)
        assert row.params == pytest.approx(counted.params_paper / 1e6, abs=0.051)
    for layers in (TABLE_1, *TABLE_3):
        expansion = VARIANTS[layers.network].expansion
        stages = plan(expansion).stages
        assert [(stage.width, stage.inner_width, stage.depth) for stage in stages] == list(
            zip(layers.outer, layers.inner, layers.depths)
        )
    for row in TABLE_A1:
        expansion = VARIANTS[row.network].expansion
        if row.gamma_b:
            expansion = replace(expansion, gamma_b=row.gamma_b)
        counted = cost(expansion, options=row.options)
        assert row.recalled[1:] == pytest.approx((counted.macs / 1e9, counted.params_paper / 1e6), rel=0.004)


def test_printed_differences_that_do_not_follow_are_marked() -> None:
    lines = paper_tables()
    marked = [word for line in lines for word in line.split() if word.endswith("!)")]
    assert marked == ["(-1.4!)", "(-1.4!)", "(+2.1!)"]


def test_the_command_prints_every_table(in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    in_process(complexity, "--paper")
    text = capsys.readouterr().out
    titles = [line.partition(":")[0] for line in text.splitlines() if line.startswith(("Table", "Figure"))]
    assert titles == [*(f"Table {name}" for name in ("1", "2", "3", "4", "5", "6", "7", "7", "8", "A.1")), "Figure 2"]
    for row in (*TABLE_2, *TABLE_4, *TABLE_5, *TABLE_6, *TABLE_7_VALIDATION, *TABLE_7_TEST, *TABLE_8):
        gmacs = "-" if row.gmacs is None else str(row.gmacs)
        line = next(line for line in text.splitlines() if row.model in line and gmacs in line.split())
        assert ("%" in line) == bool(row.network), line  # a counted cost, or only the printed one
    for value in (
        "4.1710",
        "11.4013",
        "10.4936",
        "17.604",
        "365.415",
        "34.803",
        "1.949",
        "0.6053",
        "6.1800",
        "10.3358",
    ):
        assert value in text
    assert "recalled from the public version" in text and "not verified" in text
    assert text.count("x3d_xxl") == 1 and len(text.partition("Figure 2")[2].splitlines()) == len(PATH) + 4
    assert max(map(len, text.splitlines())) <= 130
    with pytest.raises(UserError, match="--paper prints fixed tables; omit --gin_file and --layers"):
        in_process(complexity, "--paper", "--layers")
