"""Statistics, tables and commands of the benchmarks. The times themselves are not checked."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import command
import measuring
import pytest
import reporting

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)


def measured(name: str, seconds: list[float], *, reference: bool = False, failure: str = "") -> measuring.Result:
    implementation = measuring.Implementation(
        name, "ours", measuring.Job("process", "module:name"), reference=reference
    )
    return measuring.Result(implementation, 2, seconds, failure=failure)


def test_percentiles() -> None:
    assert reporting.percentiles([float(n) for n in range(11)]) == {"median": 5, "p10": 1, "p90": 9}
    assert reporting.percentiles([3.0]) == {"median": 3, "p10": 3, "p90": 3}


def test_ratios_are_taken_within_rounds() -> None:
    assert reporting.median_ratio([2, 40, 6], [1, 10, 2]) == 3
    assert reporting.median_ratio([2, 40], [1, 10, 2]) == 3  # measured in the first two rounds only


def test_the_reference_is_the_fastest_marked_implementation() -> None:
    fast, slow, other = measured("fast", [2.0], reference=True), measured("slow", [3.0], reference=True), [1.0]
    broken = measured("broken", [], reference=True, failure="why")
    assert reporting.find_reference([measured("other", other), slow, fast, broken]) is fast
    first = measured("first", [5.0])
    assert reporting.find_reference([broken, first, measured("other", other)]) is first
    assert reporting.find_reference([broken]) is None


def test_figures_and_their_table() -> None:
    rows = [measured("a", [0.2, 0.4]), measured("b", [0.4, 0.8], reference=True), measured("c", [], failure="why")]
    rows[1].difference = 1e-3
    measurement = measuring.Measurement(measuring.Case("x2d", 2, 1), rows, [4e9, 2e9])
    found = reporting.figures(measurement, 1e8)
    a, b, _ = found["forms"]
    assert found["reference"] == "b" and found["matmul_flops"]["median"] == 3e9
    assert a["ms_per_clip"]["median"] == pytest.approx(150) and a["clips_per_second"] == pytest.approx(1 / 0.15)
    assert a["share_of_peak"] == pytest.approx(0.25) and b["share_of_peak"] == pytest.approx(0.125)
    assert a["speed_over_reference"] == pytest.approx(2)
    title, _, *lines = reporting.network_table(found, 1)
    assert title == "x2d, batch 2, 1 threads, 2 rounds; peak 3 GFLOP/s (2 - 4); speed 1 is b"
    assert [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]] == [
        ["a", "150.0", "110.0 - 190.0", "6.67", "25.0%", "2.00", "-"],
        ["b", "300.0", "220.0 - 380.0", "3.33", "12.5%", "1.00", "1.0e-03", "DIFFERS"],
        ["c", "-", "-", "-", "-", "-", "-", "why"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_implementations_are_selected_by_pattern_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    implementations = [measured(name, []).implementation for name in ("TFLite int8", "TFLite float32", "folded")]
    selected = command.select(implementations, ["folded", "tflite*8"])
    assert [implementation.name for implementation in selected] == ["TFLite int8", "folded"]
    assert command.select(implementations, ["@ours"]) == command.select(implementations, None) == implementations
    with pytest.raises(SystemExit, match="--forms must name implementations, got 'none'"):
        command.select(implementations, ["none"])


def double(case: measuring.Case, by: int) -> int:
    return case.batch * by


def test_failed_jobs_are_reported_and_do_not_stop_the_others() -> None:
    with measuring.Processes(1) as processes:
        case = measuring.Case("x2d", 3, 1)
        for function, settings, message in (
            ("nothing:at_all", {}, r"not installed: No module named 'nothing'; pip install -e '\.\[bench\]'"),
            ("os:abort", {}, "TypeError"),
            ("os:_exit", {}, "TypeError"),
        ):
            with pytest.raises(measuring.JobFailed, match=message):
                processes.run(measuring.Job("one", function, settings), case)
        with pytest.raises(measuring.JobFailed, match="its process ended with status 3"):
            processes.run(measuring.Job("one", "os:_exit"), 3)
        assert processes.run(measuring.Job("one", "test_benchmarks:double", {"by": 2}), case) == 6


def test_short_calls_are_repeated() -> None:
    calls: list[str] = []
    found = measuring._seconds({"a": lambda: calls.append("a")}, "a", warm=True)
    assert len(calls) > 2 and 0 < found < measuring.LEAST_SECONDS / 2


def test_memory_of_the_process_and_of_the_model() -> None:
    job = measuring.Job("one", "memory:measure_peak", {"function": "measuring:matrix_product", "settings": {}})
    with measuring.Processes(1) as processes:
        found = processes.run(job, measuring.Case("x2d", 1, 1))
    assert 2 * 4 * measuring.MATMUL_SIZE**2 <= found["model"] <= found["process"]


SCRIPTS = ["forward.py", "train_step.py", "layers.py", "memory.py", "prediction_agreement.py"]


@pytest.mark.parametrize("script", [*SCRIPTS, pytest.param("input_pipeline.py", marks=pytest.mark.slow)])
def test_help_has_an_example(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0
    assert f"python benchmarks/{script}" in capsys.readouterr().out


@pytest.mark.slow
def test_predictions(tmp_path: Path) -> None:
    flags = ("--networks", "x2d", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "out.json"))
    done = run("forward.py", *flags, "--forms", "trainable", "folded")
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert [(row["name"], len(row["seconds_of_calls"])) for row in table["forms"]] == [
        ("trainable", 1),
        ("folded", 1),
    ]
    assert 0 < table["forms"][1]["max_difference"] < measuring.BOUND
    assert "| folded" in done.stdout


@pytest.mark.slow  # tracing a training step takes 30 s
def test_training_steps(tmp_path: Path) -> None:
    flags = ("--networks", "x2d", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "out.json"))
    done = run("train_step.py", *flags, "--batches", "2", "--forms", "ours")
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert [len(row["seconds_of_calls"]) for row in table["forms"]] == [1]
