"""The table of benchmarks/multigrid.py. The times themselves are not checked."""

from multigrid import Training, table


def test_times_are_compared_within_seeds() -> None:
    rows = [
        Training("none", 0, 960, 1, 300.0, 0.99),
        Training("long", 0, 400, 4, 100.0, 0.98),
        Training("none", 1, 960, 1, 200.0, 1.0),
        Training("long", 1, 400, 4, 200.0, 0.25),
    ]
    _, _, *lines, empty, last = table(rows)
    assert lines[1] == "| long | 0 | 400 | 4 | 100 | 98.0% |" and len(lines) == 4 and empty == ""
    assert last == "multigrid training is 2.00 times as fast (1.00 to 3.00)"
