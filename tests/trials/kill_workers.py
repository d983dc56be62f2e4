"""Kills training with two workers at random moments and resumes it: the result must equal an uninterrupted run.

Each trial is a tiny run of two workers on this machine, of 45 steps with a checkpoint every 3 steps. One of them gets
SIGKILL, SIGTERM or SIGINT at a random moment: in one of three trials any time after both began to start TensorFlow,
also while one waits for the other or the chief evaluates, otherwise within a second after a random checkpoint. Both
must end by themselves: after SIGKILL the other one with status 1 and an error that names the killed worker. The same
commands then run again. All arrays of model.keras must be bit-equal to those of the uninterrupted run, and so must the
rows of history.csv except for the throughput (after SIGTERM and SIGINT see kill_training). The run must resume from the
last checkpoint that was complete when the signal was sent, or from a later one. No partial file and at most two
checkpoints may remain.

  python tests/trials/kill_workers.py --count=10 --seed=0
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from harness import (
    Command,
    Ended,
    Report,
    arguments,
    make_records,
    recipe,
    scratch,
    succeeded,
)
from kill_training import EVERY, SIGNALS, STATUS, STEPS, differences
from workers import free_ports, tf_config

RESUMED = "from the checkpoint of step "


def start(config: Path, workdir: Path, seconds: float) -> list[Command]:
    """Starts both workers of a run."""
    ports, words = free_ports(2), (f"--gin_file={config}", f"--workdir={workdir}")
    return [
        Command(
            "x3d_tf.train", *words, folder=config.parent, seconds=seconds, env={"TF_CONFIG": tf_config(ports, index)}
        )
        for index in range(2)
    ]


def wait(commands: list[Command]) -> list[Ended]:
    return [command.wait() for command in commands]


def wait_until(ready: Callable[[], bool], commands: list[Command]) -> None:
    """Waits until a condition is met, a command has ended or exceeded its limit."""
    while not ready() and all(command.process.poll() is None for command in commands):
        if time.monotonic() > commands[0].started + commands[0].seconds:
            return
        time.sleep(0.002)


def newest(workdir: Path) -> int:
    """Returns the step of the newest complete checkpoint, 0 if there is none."""
    return max((int(path.stem.partition("-")[2]) for path in workdir.glob("checkpoints/ckpt-*.index")), default=0)


def moment(
    rng: random.Random, seconds: float, anywhere: bool, workdir: Path, commands: list[Command]
) -> tuple[str, Callable[[], bool]]:
    """Returns a random moment as text, and a function that returns True from that moment on."""
    delay = rng.uniform(0, seconds) if anywhere else rng.uniform(0, 1)
    checkpoint = 0 if anywhere else rng.randrange(EVERY, STEPS + 1, EVERY)
    name = "the start of TensorFlow" if anywhere else f"checkpoint {checkpoint}"
    index = workdir / "checkpoints" / f"ckpt-{checkpoint}.index"
    since: list[float] = []

    def ready() -> bool:
        started = all("starting TensorFlow" in command.errors_so_far() for command in commands)
        if not since and (started if anywhere else index.exists()):
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + delay

    return f"{delay:.2f} s after {name}", ready


def end_if_waiting(command: Command, report: Report) -> None:
    """Ends a worker that waits for the other one to arrive, as it should, until that is started again."""
    until = time.monotonic() + 30
    while command.process.poll() is None and "connecting" not in command.errors_so_far():
        if time.monotonic() > until:
            report.note("killed while the other worker waited for it")
            command.signal(signal.SIGTERM)
            return
        time.sleep(0.1)


def problems_of_end(ended: list[Ended], victim: int, sent: signal.Signals) -> Iterator[str]:
    """Yields what is wrong with how both workers ended after a signal to one of them."""
    for index, worker in enumerate(ended):
        if worker.broke:
            yield f"worker {index} was stopped for its {worker.broke}"
        if "Traceback (most recent call last)" in worker.err:
            yield f"worker {index} ended in a traceback: {worker.last[:200]}"
    other = ended[1 - victim]
    if ended[victim].status != STATUS[sent]:
        status = ended[victim].status
        yield f"worker {victim} ended with status {status}, not {STATUS[sent]}: {ended[victim].last[:200]}"
    if other.status == 1 and f"worker {victim} (" not in other.last:
        yield f"worker {1 - victim} does not name worker {victim}: {other.last[:200]}"
    expected = {1} | ({143} if sent != signal.SIGKILL or "connecting" not in other.err else set())
    if other.status not in expected:
        yield f"worker {1 - victim} ended with status {other.status}: {other.last[:200]}"


def trial(
    config: Path, reference: Path, number: int, rng: random.Random, length: float, report: Report
) -> Iterator[str]:
    """Kills one worker of a run and resumes the run; yields the problems."""
    workdir, sent, victim = config.parent / f"run{number}", SIGNALS[number % len(SIGNALS)], rng.randrange(2)
    commands = start(config, workdir, report.chosen.seconds)
    words, ready = moment(rng, length, number % 3 == 0, workdir, commands)
    where = f"{sent.name} to worker {victim} {words}"
    wait_until(ready, commands)
    before = newest(workdir)
    was_running = commands[victim].signal(sent)
    end_if_waiting(commands[1 - victim], report)
    ended = wait(commands)
    print(f"       run{number}: {where}: exit statuses {[worker.status for worker in ended]}", flush=True)
    if not was_running or ended[victim].status == 0:  # Python may no longer handle signals at its end
        report.note("signals after the end")
    else:
        yield from problems_of_end(ended, victim, sent)
    again = wait(start(config, workdir, report.chosen.seconds))
    for worker in again:
        if problem := succeeded(worker):
            yield f"{where}, then the same commands: {problem}"
            return
    step = int(again[0].out.partition(RESUMED)[2].partition("\n")[0] or 0)
    report.note("resumed from a checkpoint", step > 0)
    if step < before and "already finished" not in again[0].out:
        yield f"{where}: checkpoint {before} was complete, but training resumed from step {step}"
    for problem in differences(workdir, reference, exact=sent == signal.SIGKILL):
        yield f"{where}: {problem}"


def main() -> None:
    """Runs the trials."""
    chosen = arguments(__doc__ or "", count=10, seconds=400)
    chosen.jobs = 1  # a run has two processes
    report = Report("kill_workers", chosen)
    with scratch() as folder:
        config, reference = folder / "tiny.gin", folder / "reference"
        others = {"Recipe.batch": 4, "Recipe.reference_batch": 4, "ModelOptions.bn_group": 2}
        text = recipe(make_records(folder / "records"), steps=STEPS, checkpoint=EVERY, others=others)
        config.write_text(text)
        print("training with two workers without interruption ...", flush=True)
        ended = wait(start(config, reference, report.chosen.seconds))
        for worker in ended:
            if problem := succeeded(worker):
                raise SystemExit(f"the uninterrupted run: {problem}\n{worker.err[-2000:]}")
        print(f"took {ended[0].seconds:.0f} s", flush=True)

        def attempt(number: int) -> str | None:
            rng = random.Random(f"{report.chosen.seed}/{number}")
            return "; ".join(trial(config, reference, number, rng, ended[0].seconds, report)) or None

        report.run((f"run{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
