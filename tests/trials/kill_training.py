"""Kills training at random moments and resumes it: the result must equal that of an uninterrupted run.

Each trial is a tiny run of its own of 45 steps with a checkpoint every 3. SIGKILL, SIGTERM or SIGINT comes at a random
moment: of three trials, one anywhere after the run folder appeared, two within a second after a random checkpoint. The
same command is then given again until it is done. Compared are all arrays of model.keras, bit by bit, and the rows of
history.csv but for the speed. SIGTERM must end with status 143, SIGINT with 130. Nothing half-written may stay, nor
more checkpoints than two.

A run that was stopped by SIGTERM or SIGINT has a row more, of the steps up to the signal: such rows are merged,
weighted by their steps, and compared within 1e-6 of their value.

  python tests/trials/kill_training.py --count=20 --seed=0
"""

import csv
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from harness import (
    Command,
    Report,
    arguments,
    difference_of_weights,
    half_written,
    make_records,
    recipe,
    run,
    scratch,
    succeeded,
)

STEPS, EVERY = 45, 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)  # in turn
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
Moment = Callable[[Path], bool]


def training(config: Path, workdir: Path, seconds: float) -> Command:
    return Command(
        "x3d_tf.train", f"--gin_file={config}", f"--workdir={workdir}", folder=config.parent, seconds=seconds
    )


def moment(draw: random.Random, seconds: float, anywhere: bool) -> tuple[str, Callable[[Path, Command], None]]:
    """A random moment in words, and what waits for it."""
    if anywhere:
        delay = draw.uniform(0, seconds)
        return f"{delay:.1f} s into the run", partial(_wait_for, "config.json", delay)
    checkpoint, delay = draw.randrange(EVERY, STEPS + 1, EVERY), draw.uniform(0, 1)
    return f"{delay:.2f} s after checkpoint {checkpoint}", partial(
        _wait_for, f"checkpoints/ckpt-{checkpoint}.index", delay
    )


def _wait_for(name: str, delay: float, workdir: Path, command: Command) -> None:
    """Waits until a file has appeared, and longer; or until the command has ended or used up its time."""
    until = math.inf
    while command.process.poll() is None and time.monotonic() < min(until, command.started + command.seconds):
        if until == math.inf and (workdir / name).exists():
            until = time.monotonic() + delay
        time.sleep(0.002)


def rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "history.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "clips_per_second"} for row in csv.DictReader(file)
        ]


def difference_of_history(found: list[dict[str, str]], wanted: list[dict[str, str]], exact: bool) -> str | None:
    """Where two histories differ; not `exact`, rows in between are merged into the expected ones first."""
    if exact:
        return None if found == wanted else f"history.csv differs: {found[-2:]}, expected {wanted[-2:]}"
    last, place = 0, 0
    for row in wanted:
        step, total, start = int(row["step"]), 0.0, last
        while place < len(found) and int(found[place]["step"]) <= step:
            total += float(found[place]["loss"]) * (int(found[place]["step"]) - last)
            last, place = int(found[place]["step"]), place + 1
        if last != step or not math.isclose(total / (step - start), float(row["loss"]), rel_tol=1e-6):
            return f"history.csv differs up to step {step}: it gives {total / (step - start)}, expected {row['loss']}"
    return None


def trial(config: Path, whole: Path, number: int, draw: random.Random, length: float, report: Report) -> Iterator[str]:
    """One kill and what came of it; yields the problems."""
    workdir, sent = config.parent / f"run{number}", SIGNALS[number % len(SIGNALS)]
    words, wait = moment(draw, length, number % 3 == 0)
    command = training(config, workdir, report.chosen.seconds)
    wait(workdir, command)
    was_running = command.signal(sent)
    ended = command.wait()
    print(f"       run{number}: {sent.name} {words}: exit status {ended.status}", flush=True)
    if not was_running or "results:" in ended.out:
        report.note("kills that came after the end")
    finished = "results:" in ended.out  # Python may no longer handle signals then
    if was_running and ended.status != STATUS[sent] and not (finished and ended.status in (0, -sent)):
        yield f"{sent.name} {words} ended with status {ended.status}, not {STATUS[sent]}: {ended.last[:200]}"
    if "Traceback (most recent call last)" in ended.err:
        yield f"{sent.name} {words} ended in a traceback: {ended.last[:200]}"
    again = training(config, workdir, report.chosen.seconds).wait()
    if problem := succeeded(again):
        yield f"{sent.name} {words}, then the same command: {problem}"
        return
    if "from the checkpoint of step" in again.out:
        report.note("resumed from a checkpoint")
    for problem in (
        difference_of_weights(workdir / "model.keras", whole / "model.keras"),
        difference_of_history(rows(workdir), rows(whole), sent == signal.SIGKILL),
        f"{left} are left behind" if (left := half_written(workdir)) else None,
        f"{count} checkpoints are left" if (count := len([*workdir.glob("checkpoints/*.index")])) > 2 else None,
    ):
        if problem:
            yield f"{sent.name} {words}: {problem}"


def main() -> None:
    """Runs the trials."""
    report = Report("kill_training", arguments(__doc__ or "", count=20, seconds=300))
    with scratch() as folder:
        config, whole = folder / "tiny.gin", folder / "whole"
        config.write_text(recipe(make_records(folder / "records"), steps=STEPS, checkpoint=EVERY))
        print("training without interruption ...", flush=True)
        started = time.time()
        ended = run("x3d_tf.train", f"--gin_file={config}", f"--workdir={whole}", folder=folder, seconds=300)
        if problem := succeeded(ended):
            raise SystemExit(f"the uninterrupted run: {problem}\n{ended.err[-2000:]}")
        length = time.time() - (whole / "config.json").stat().st_mtime
        print(f"took {time.time() - started:.0f} s, of which {length:.0f} s after the run folder appeared", flush=True)

        def attempt(number: int) -> str | None:
            own = random.Random(f"{report.chosen.seed}/{number}")
            return "; ".join(trial(config, whole, number, own, length, report)) or None

        report.run((f"run{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
