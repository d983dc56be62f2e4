"""Kills the building of records at random moments and starts it again: all bytes must equal those of a whole build.

The videos are synthetic: 10 splits of 8, each with a shard of its own. SIGKILL, SIGTERM or SIGINT comes at a random
moment: of two trials, one anywhere after the first file appeared, one within half a second after a random shard. The
same command is then given again. SIGTERM must end with status 143, SIGINT with 130; worker processes must end with the
command; nothing half-written may stay.

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
    """Waits until a file has appeared, and longer; or until the command has ended."""
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
    wanted: dict[str, bytes],
    report: Report,
) -> Iterator[str]:
    """One kill, so many seconds after a file appeared, and what came of it; yields the problems."""
    where = f"{sent.name} {moment[1]:.2f} s after {moment[0]}"
    command = building(videos, output, report.chosen.seconds)
    wait_for(output / moment[0], command, moment[1])
    was_running = command.signal(sent)
    ended = command.wait()
    print(f"       {output.name}: {where}: exit status {ended.status}", flush=True)
    finished = "classes" in ended.out  # Python may no longer handle signals then
    if not was_running or finished:
        report.note("kills that came after the end")
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
    found = contents(output)
    if found != wanted:
        differing = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
        yield f"{where}: {sorted(differing)[:4]} differ"
    if names := half_written(output):
        yield f"{where}: {names} are left behind"


def main() -> None:
    """Runs the trials."""
    report = Report("kill_building", arguments(__doc__ or "", count=20, seconds=180))
    with scratch() as folder:
        videos = make_videos(folder / "videos", VIDEOS, splits=SPLITS)
        print("building without interruption ...", flush=True)
        ended = building(videos, folder / "whole", 180).wait()
        if problem := succeeded(ended):
            raise SystemExit(f"the whole build: {problem}\n{ended.err[-2000:]}")
        length = time.time() - (folder / "whole" / "build.json").stat().st_mtime
        wanted = contents(folder / "whole")
        print(f"took {ended.seconds:.0f} s, of which {length:.1f} s after the first file", flush=True)

        def attempt(number: int) -> str | None:
            draw = random.Random(f"{report.chosen.seed}/{number}")
            shards = sorted(name for name in wanted if name.endswith(".tfrecord"))
            moments = (("build.json", draw.uniform(0, length)), (draw.choice(shards), draw.uniform(0, 0.5)))
            sent, moment = SIGNALS[number // 2 % len(SIGNALS)], moments[number % 2]
            return "; ".join(trial(videos, folder / f"build{number}", sent, moment, wanted, report)) or None

        report.run((f"build{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
