"""Kills training at random moments and resumes it: the result must equal that of an uninterrupted run.

Each trial is a tiny run of 45 steps with a checkpoint every 3 steps. SIGKILL, SIGTERM or SIGINT is sent at a random
moment: in one of three trials any time after the run folder exists, otherwise within a second after a random
checkpoint. The same command then runs again. All arrays of model.keras must be bit-equal to those of the uninterrupted
run, and so must the rows of history.csv except for the throughput. SIGTERM must give exit status 143, SIGINT 130. No
partial file and at most two checkpoints may remain.

A run stopped by SIGTERM or SIGINT has an additional history row for the steps up to the signal. Such rows are merged,
weighted by their steps, and compared with a relative tolerance of 1e-6.

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


def moment(rng: random.Random, seconds: float, anywhere: bool) -> tuple[str, Callable[[Path, Command], None]]:
    """Returns a random moment as text, and a function that waits for it."""
    if anywhere:
        delay = rng.uniform(0, seconds)
        return f"{delay:.1f} s into the run", partial(_wait_for, "config.json", delay)
    checkpoint, delay = rng.randrange(EVERY, STEPS + 1, EVERY), rng.uniform(0, 1)
    return f"{delay:.2f} s after checkpoint {checkpoint}", partial(
        _wait_for, f"checkpoints/ckpt-{checkpoint}.index", delay
    )


def _wait_for(name: str, delay: float, workdir: Path, command: Command) -> None:
    """Waits until a file exists and `delay` seconds have passed, or until the command ends or exceeds its limit."""
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


def difference_of_history(actual: list[dict[str, str]], expected: list[dict[str, str]], exact: bool) -> str | None:
    """Returns a message if two histories differ, or None; unless `exact`, additional rows are merged first."""
    if exact:
        return None if actual == expected else f"history.csv differs: {actual[-2:]}, expected {expected[-2:]}"
    last, index = 0, 0
    for row in expected:
        step, total, start = int(row["step"]), 0.0, last
        while index < len(actual) and int(actual[index]["step"]) <= step:
            total += float(actual[index]["loss"]) * (int(actual[index]["step"]) - last)
            last, index = int(actual[index]["step"]), index + 1
        if last != step or not math.isclose(total / (step - start), float(row["loss"]), rel_tol=1e-6):
            return (
                f"history.csv differs up to step {step}: the loss is {total / (step - start)}, expected {row['loss']}"
            )
    return None


def differences(workdir: Path, reference: Path, *, exact: bool) -> Iterator[str]:
    """Yields how a resumed run differs from an uninterrupted one; `exact` as for `difference_of_history`."""
    for problem in (
        difference_of_weights(workdir / "model.keras", reference / "model.keras"),
        difference_of_history(rows(workdir), rows(reference), exact),
        f"{left} were left behind" if (left := half_written(workdir)) else None,
        f"{count} checkpoints are left" if (count := len([*workdir.glob("checkpoints/*.index")])) > 2 else None,
    ):
        if problem:
            yield problem


def trial(
    config: Path, reference: Path, number: int, rng: random.Random, length: float, report: Report
) -> Iterator[str]:
    """Kills and resumes one run; yields the problems."""
    workdir, sent = config.parent / f"run{number}", SIGNALS[number % len(SIGNALS)]
    words, wait = moment(rng, length, number % 3 == 0)
    command = training(config, workdir, report.chosen.seconds)
    wait(workdir, command)
    was_running = command.signal(sent)
    ended = command.wait()
    print(f"       run{number}: {sent.name} {words}: exit status {ended.status}", flush=True)
    if not was_running or "results:" in ended.out:
        report.note("kills after the end")
    finished = "results:" in ended.out  # Python may no longer handle signals at its end
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
    for problem in differences(workdir, reference, exact=sent == signal.SIGKILL):
        yield f"{sent.name} {words}: {problem}"


def main() -> None:
    """Runs the trials."""
    report = Report("kill_training", arguments(__doc__ or "", count=20, seconds=300))
    with scratch() as folder:
        config, reference = folder / "tiny.gin", folder / "reference"
        config.write_text(recipe(make_records(folder / "records"), steps=STEPS, checkpoint=EVERY))
        print("training without interruption ...", flush=True)
        started = time.time()
        ended = run("x3d_tf.train", f"--gin_file={config}", f"--workdir={reference}", folder=folder, seconds=300)
        if problem := succeeded(ended):
            raise SystemExit(f"the uninterrupted run: {problem}\n{ended.err[-2000:]}")
        length = time.time() - (reference / "config.json").stat().st_mtime
        print(
            f"took {time.time() - started:.0f} s, of which {length:.0f} s after the run folder was created", flush=True
        )

        def attempt(number: int) -> str | None:
            rng = random.Random(f"{report.chosen.seed}/{number}")
            return "; ".join(trial(config, reference, number, rng, length, report)) or None

        report.run((f"run{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
