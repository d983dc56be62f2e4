"""Warnings about class names that look like mistakes. test_sources.py tests their order."""

import pytest

from x3d_tf.data.building.class_names import suspicious_names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("hug", "Hug "), ["'hug', 'Hug ' differ only in case", "'Hug ' begin or end with spaces"]),
        (("1", "1.0"), ["'1', '1.0' differ only", "'1.0' are integers as pandas and spreadsheets write them"]),
        (("1", "01", "+1"), ["'1', '01', '+1' differ only"]),
        (("1,5", "1.50"), ["'1,5', '1.50' differ only"]),
        (("push up", "push-up", "Push_Up", "pushup"), ["'push up', 'push-up', 'Push_Up', 'pushup' differ only"]),
        (("caf\u00e9", "cafe\u0301"), ["differ only"]),
        (("hug\u200b", "hug", "kick", "KICK"), [r"'hug\u200b', 'hug' differ only", "'kick', 'KICK' differ only"]),
        (("nan", "hug"), ["'nan' are read as missing values"]),
        (
            ("NaN", "N/A", "NA", "NULL", "None", "#N/A"),
            ["'NaN', 'N/A', 'NA', 'NULL', 'None', '#N/A' are read as missing values"],
        ),
        (("#REF!", "#DIV/0!"), ["'#REF!', '#DIV/0!' are errors of spreadsheet formulas"]),
        (("TRUE", "false"), ["'TRUE', 'false' are read as truth values by spreadsheets and pandas"]),
        (("1E+05", "12345678901234567"), ["are numbers that spreadsheets round"]),
        (
            ("3-Mar", "Mar-03", "1/2", "2024-01-02"),
            ["'3-Mar', 'Mar-03', '1/2', '2024-01-02' are read as dates by spreadsheets"],
        ),
    ],
)
def test_suspicious_names_are_reported(names: tuple[str, ...], expected: list[str]) -> None:
    warnings = suspicious_names(names)
    assert len(warnings) == len(expected)
    for sentence, part in zip(warnings, expected):
        assert part in sentence


@pytest.mark.parametrize(
    "names",
    [
        ("hug", "kick", "shake hands", "push-up", "pull_up"),
        ("0", "1", "2", "10", "11"),
        ("-1", "1", "1.5"),
        ("May", "march", "nano", "nancy", "true love", "1-2-3 go", "прыжок", "跳"),
    ],
)
def test_ordinary_names_are_not_reported(names: tuple[str, ...]) -> None:
    assert suspicious_names(names) == []


def test_many_suspicious_names_give_few_warnings() -> None:
    names = [name for number in range(200) for name in (f"class {number} a", f"Class {number} A")]
    warnings = suspicious_names(names)
    assert len(warnings) == 11
    assert warnings[-1] == "190 more groups of classes differ only in this way"
    assert len("".join(suspicious_names([f"{number}.0" for number in range(400)]))) < 300
