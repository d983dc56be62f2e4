"""The rounds and the table of benchmarks/first_answer.py. The times themselves are not checked."""

from first_answer import PEER, measure, table


def test_commands_take_turns_after_a_round_that_is_not_counted() -> None:
    called: list[str] = []
    times = measure({"a": ["a"], "b": ["b"]}, 2, lambda command: called.append(command[0]))
    assert called == ["a", "b"] * 3 and {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_speed_is_relative_to_the_peer_within_rounds() -> None:
    lines = table({"predict, onnx file": [1.0, 4.0], PEER: [2.0, 4.0]})
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    assert cells == [["predict, onnx file", "2.50", "1.00 - 4.00", "1.50"], [PEER, "3.00", "2.00 - 4.00", "1.00"]]
    assert "-" in table({"predict, onnx file": [1.0]})[2].split("|")[4]
