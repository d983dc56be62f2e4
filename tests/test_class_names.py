"""What is said of names of classes that look like a slip. Their order is tried in test_sources.py."""

import pytest

from x3d_tf.data.build.class_names import doubts


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("hug", "Hug "), ["'hug', 'Hug ' differ only in case", "'Hug ' begin or end with spaces"]),
        (("1", "1.0"), ["'1', '1.0' differ only", "'1.0' are what pandas and spreadsheets make of a whole number"]),
        (("1", "01", "+1"), ["'1', '01', '+1' differ only"]),
        (("1,5", "1.50"), ["'1,5', '1.50' differ only"]),
        (("push up", "push-up", "Push_Up", "pushup"), ["'push up', 'push-up', 'Push_Up', 'pushup' differ only"]),
        (("caf\u00e9", "cafe\u0301"), ["differ only"]),
        (("hug\u200b", "hug", "kick", "KICK"), [r"'hug\u200b', 'hug' differ only", "'kick', 'KICK' differ only"]),
        (("nan", "hug"), ["'nan' are what pandas"]),
        (("NaN", "N/A", "NA", "NULL", "None", "#N/A"), ["'NaN', 'N/A', 'NA', 'NULL', 'None', '#N/A' are what pandas"]),
        (("#REF!", "#DIV/0!"), ["'#REF!', '#DIV/0!' are an error of a spreadsheet's formula"]),
        (("TRUE", "false"), ["'TRUE', 'false' are what spreadsheets and pandas turn into a truth value"]),
        (("1E+05", "12345678901234567"), ["are a number that spreadsheets round"]),
        (("3-Mar", "Mar-03", "1/2", "2024-01-02"), ["'3-Mar', 'Mar-03', '1/2', '2024-01-02' are what spreadsheets"]),
    ],
)
def test_slips_are_told(names: tuple[str, ...], expected: list[str]) -> None:
    told = doubts(names)
    assert len(told) == len(expected)
    for sentence, part in zip(told, expected):
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
def test_other_names_are_not(names: tuple[str, ...]) -> None:
    assert doubts(names) == []


def test_many_slips_take_few_lines() -> None:
    names = [name for number in range(200) for name in (f"class {number} a", f"Class {number} A")]
    told = doubts(names)
    assert len(told) == 11
    assert told[-1] == "190 more groups of classes differ only so"
    assert len("".join(doubts([f"{number}.0" for number in range(400)]))) < 300
