"""Csv files: text is never a formula, and cells are read back unchanged."""

import io
import random
from pathlib import Path

import numpy as np
from report_settings import settings, write

from x3d_tf import csv_files
from x3d_tf.evaluation.classification_reports import Predictions
from x3d_tf.evaluation.comparison import compare
from x3d_tf.evaluation.reports import write_csv
from x3d_tf.runs.run_folder import HISTORY_FIELDS, RunFolder

FORMULAS = "=+-@\t\r\n＝＋－＠"
NASTY = ["", "'", "''", "'a", "plain", "a=b", " a", 'quo"ted', "a,b", "a;b", "p(=x)", "new\nline", "\0", "1_000", "ü跳"]


def names() -> list[str]:
    """Returns names with every sign that begins a formula, and random names of such signs."""
    systematic = [
        f"{before}{sign}{after}"
        for before in ("", "'", "''", " ", "\t", "' ")
        for sign in FORMULAS
        for after in ("", "1", "cmd|' /C calc'!A0")
    ]
    rng = random.Random(0)
    randoms = ["".join(rng.choices(FORMULAS + "'' \"a1,.", k=rng.randrange(6))) for _ in range(2000)]
    return [*NASTY, *systematic, *randoms]


def test_cells_are_read_back_unchanged(tmp_path: Path) -> None:
    cells = names()
    for line_end in ("\r\n", "\n"):
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv_files.Writer(file, line_end)
            for pair in zip(cells[::2], cells[1::2]):
                writer.row(pair)
        with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
            assert list(csv_files.Reader(file, strict=True)) == [list(pair) for pair in zip(cells[::2], cells[1::2])]


def test_no_cell_is_a_formula() -> None:
    for name in names():
        written = csv_files.escape_formula(name)
        assert not written.lstrip().startswith(tuple("=+-@＝＋－＠")), repr(name)
        assert not written.startswith(("\t", "\r", "\n")), repr(name)
        assert csv_files.unescape_formula(csv_files.escape_formula(name)) == name
    for name in NASTY:
        assert csv_files.escape_formula(name) == name
    assert csv_files.escape_formula("=1") == "'=1" and csv_files.escape_formula("'=1") == "''=1"


def test_numbers_stay_numbers() -> None:
    row = [-1, -0.5, np.float64(-2.5), csv_files.number(-0.25, ".3f"), float("-inf"), None, "-1"]
    assert csv_files.encoded([row]) == b"-1,-0.5,-2.5,-0.250,-inf,,'-1\r\n"


def test_rows_by_their_columns() -> None:
    rows = csv_files.dicts(io.StringIO("'=a,b\r\n'-1,-2\r\n\r\n3\r\n", newline=""))
    assert list(rows) == [{"=a": "-1", "b": "-2"}, {"=a": "3"}]
    assert list(csv_files.dicts(io.StringIO(""))) == []


def test_non_utf8_names_are_escaped(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["bad \udcff"]])
    assert (tmp_path / "a.csv").read_text() == "bad \\udcff\n"


def test_reports_have_no_formulas(tmp_path: Path) -> None:
    classes = ("=HYPERLINK(1)", "-x")
    chosen = settings(network="=n", records="@r", split="test", views="1 x 1", videos=2, classes=2)
    predictions = Predictions(("+a", "'=b"), classes, np.eye(2), np.eye(2, dtype=bool), exclusive=True)
    write(tmp_path / "report", chosen, predictions)
    compare([str(tmp_path / "report")], output=str(tmp_path))
    tables = {}
    for path in (tmp_path / "comparison.csv", *(tmp_path / "report").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
        formulas = [cell for cell in text.replace("\r\n", ",").split(",") if cell.startswith(tuple("=+-@"))]
        assert not formulas, (path, text)
        tables[path.name] = list(csv_files.Reader(io.StringIO(text, newline="")))
    assert [row[:3] for row in tables["predictions.csv"][1:]] == [["+a", classes[0], classes[0]], ["'=b", "-x", "-x"]]
    assert [row[0] for row in tables["per_class.csv"]] == ["class", *classes]
    assert tables["comparison.csv"][1][1:3] == ["=n", "@r"]


def test_the_history_of_a_run_is_read_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    row = dict.fromkeys((*HISTORY_FIELDS, "top1"), -1.5) | {"step": 2.0}
    columns = (*row, "validation_top1", "validation_loss")
    run.write_history(columns, [row])
    run.append_history(columns, row | {"step": 4.0, "validation_loss": 1e-9})
    assert run.read_history() == [row, row | {"step": 4.0, "validation_loss": 1e-9}]
    assert run.history.read_text().splitlines()[1] == "2,-1.5,-1.5,-1.5,-1.5,-1.5,,"
    with run.history.open("a") as file:
        file.write("1e999,1,1,1,1,1,,\n")
    assert len(run.read_history()) == 2
