"""Kills record building at random moments and resumes it: all bytes must equal those of an uninterrupted build.

The videos are synthetic: 10 splits of 8 videos, one shard per split. SIGKILL, SIGTERM or SIGINT is sent at a random
moment: in every other trial any time after the first file exists, otherwise within half a second after a random shard.
The same command then runs again. SIGTERM must give exit status 143, SIGINT 130. Worker processes must exit with the
command, and no partial file may remain.

  python tests/trials/kill_building.py --count=20 --seed=0
"""

import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harness import Command, Report, arguments, contents, half_written, make_videos, scratch, succeeded

SPLITS, VIDEOS = 10, 8
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)  # in turn
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def building(videos: Path, output: Path, seconds: float) -> Command:
    splits = ",".join(f"split{number}" for number in range(SPLITS))
    words = (f"--videos={videos}", f"--output={output}", f"--splits={splits}", "--short_side=32", "--workers=2")
    return Command("x3d_tf.build_records", *words, folder=videos, seconds=seconds)


def wait_for(file: Path, command: Command, delay: float) -> None:
    """Waits until a file exists and `delay` seconds have passed, or until the command has ended."""
    while command.process.poll() is None and not file.exists():
        time.sleep(0.002)
    until = time.monotonic() + delay
    while command.process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


def trial(
    videos: Path,
    output: Path,
    sent: signal.Signals,
    moment: tuple[str, float],
    expected: dict[str, bytes],
    report: Report,
) -> Iterator[str]:
    """Kills and resumes one build; yields the problems. `moment` is a file and the delay in seconds after it."""
    where = f"{sent.name} {moment[1]:.2f} s after {moment[0]}"
    command = building(videos, output, report.chosen.seconds)
    wait_for(output / moment[0], command, moment[1])
    was_running = command.signal(sent)
    ended = command.wait()
    print(f"       {output.name}: {where}: exit status {ended.status}", flush=True)
    finished = "classes" in ended.out  # Python may no longer handle signals at its end
    if not was_running or finished:
        report.note("kills after the end")
    if was_running and ended.status != STATUS[sent] and not (finished and ended.status in (0, -sent)):
        yield f"{where} ended with status {ended.status}, not {STATUS[sent]}: {ended.last[:200]}"
    if "Traceback (most recent call last)" in ended.err:
        yield f"{where} ended in a traceback: {ended.last[:200]}"
    if left := command.left_behind():
        yield f"{where}: {len(left)} processes still run"
    again = building(videos, output, report.chosen.seconds).wait()
    if problem := succeeded(again):
        yield f"{where}, then the same command: {problem}"
        return
    if "exist already" in again.out:
        report.note("resumed after finished shards")
    actual = contents(output)
    if actual != expected:
        differing = [name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)]
        yield f"{where}: {sorted(differing)[:4]} differ"
    if names := half_written(output):
        yield f"{where}: {names} were left behind"


def main() -> None:
    """Runs the trials."""
    report = Report("kill_building", arguments(__doc__ or "", count=20, seconds=180))
    with scratch() as folder:
        videos = make_videos(folder / "videos", VIDEOS, splits=SPLITS)
        print("building without interruption ...", flush=True)
        ended = building(videos, folder / "reference", 180).wait()
        if problem := succeeded(ended):
            raise SystemExit(f"the uninterrupted build: {problem}\n{ended.err[-2000:]}")
        length = time.time() - (folder / "reference" / "build.json").stat().st_mtime
        expected = contents(folder / "reference")
        print(f"took {ended.seconds:.0f} s, of which {length:.1f} s after the first file", flush=True)

        def attempt(number: int) -> str | None:
            rng = random.Random(f"{report.chosen.seed}/{number}")
            shards = sorted(name for name in expected if name.endswith(".tfrecord"))
            moments = (("build.json", rng.uniform(0, length)), (rng.choice(shards), rng.uniform(0, 0.5)))
            sent, moment = SIGNALS[number // 2 % len(SIGNALS)], moments[number % 2]
            return "; ".join(trial(videos, folder / f"build{number}", sent, moment, expected, report)) or None

        report.run((f"build{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
