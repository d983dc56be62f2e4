"""Kills parts of a record build at random moments and starts them again: all bytes must equal those of one process.

The videos are synthetic: 12 splits of 60 videos, one shard per split. Three parts run at the same time, each in a
process. At a random moment, one of them, or in every third trial all, receive SIGKILL, SIGTERM or SIGINT: in every
other trial any time after the first file exists, otherwise within half a second after a random shard that is not the
last of its part. Those that were killed start again while the others still run, and --finish follows. No shard that was
finished may be built again, worker processes must exit with the command, and no partial file may remain.

  python tests/trials/kill_parts.py --count=10 --seed=0
"""

import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harness import Command, Ended, Report, arguments, contents, half_written, make_videos, scratch, succeeded

SPLITS, VIDEOS, PARTS = 12, 60, 3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)  # in turn
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def building(videos: Path, output: Path, seconds: float, *flags: str) -> Command:
    splits = ",".join(f"split{number}" for number in range(SPLITS))
    words = (f"--videos={videos}", f"--output={output}", f"--splits={splits}", "--short_side=32", "--workers=1")
    return Command("x3d_tf.build_records", *words, *flags, folder=videos, seconds=seconds)


def wait_for(file: Path, commands: list[Command], delay: float) -> None:
    """Waits until a file exists and `delay` seconds have passed, or until all commands have ended."""
    while running(commands) and not file.exists():
        time.sleep(0.002)
    until = time.monotonic() + delay
    while running(commands) and time.monotonic() < until:
        time.sleep(0.002)


def running(commands: list[Command]) -> bool:
    return any(command.process.poll() is None for command in commands)


def finished(output: Path) -> dict[str, int]:
    """Returns the inode of each finished shard, which changes when the shard is built again."""
    notes = (output / ".build").glob("*.json")
    return {note.stem: (output / note.stem).stat().st_ino for note in notes}


def problems_of(ended: Ended, command: Command, sent: signal.Signals, was_running: bool) -> Iterator[str]:
    """Yields what is wrong with the end of a killed command."""
    had_ended = "are finished" in ended.out  # Python may no longer handle signals at its end
    if was_running and ended.status != STATUS[sent] and not (had_ended and ended.status in (0, -sent)):
        yield f"ended with status {ended.status}, not {STATUS[sent]}: {ended.last[:200]}"
    if "Traceback (most recent call last)" in ended.err:
        yield f"ended in a traceback: {ended.last[:200]}"
    if left := command.left_behind():
        yield f"{len(left)} processes still run"


def trial(
    videos: Path,
    output: Path,
    killed: list[int],
    sent: signal.Signals,
    moment: tuple[str, float],
    expected: dict[str, bytes],
    report: Report,
) -> Iterator[str]:
    """Kills and restarts parts; yields the problems. `moment` is a file and the delay in seconds after it."""
    seconds = report.chosen.seconds
    where = f"{sent.name} to {', '.join(map(str, killed))} {moment[1]:.2f} s after {moment[0]}"
    parts = {k: building(videos, output, seconds, f"--part={k}/{PARTS}") for k in range(1, PARTS + 1)}
    wait_for(output / moment[0], [*parts.values()], moment[1])
    was_running = {k: parts[k].signal(sent) for k in killed}
    statuses = []
    for k in killed:
        ended = parts[k].wait()
        statuses.append(ended.status)
        report.note("kills" if was_running[k] else "kills after the end")
        for problem in problems_of(ended, parts[k], sent, was_running[k]):
            yield f"{where}: part {k} {problem}"
    before = finished(output)
    print(f"       {output.name}: {where}: exit status {statuses}; {len(before)} shards are finished", flush=True)
    for k in killed:
        parts[k] = building(videos, output, seconds, f"--part={k}/{PARTS}")
    for k, command in parts.items():
        ended = command.wait()
        if problem := succeeded(ended):
            yield f"{where}: part {k}, then the same command: {problem}"
            return
        if k in killed and "exist already" in ended.out:
            report.note("parts resumed after finished shards")
    after = finished(output)
    if again := [name for name, inode in before.items() if after[name] != inode]:
        yield f"{where}: {len(again)} finished shards were built again, such as {again[0]}"
    if problem := succeeded(building(videos, output, seconds, "--finish").wait()):
        yield f"{where}, then --finish: {problem}"
        return
    actual = contents(output)
    if actual != expected:
        differing = [name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)]
        yield f"{where}: {sorted(differing)[:4]} differ"
    if names := half_written(output):
        yield f"{where}: {names} were left behind"


def uninterrupted(videos: Path, output: Path) -> float:
    """Builds all parts at the same time; returns the seconds from the first file to the last one."""
    parts = [building(videos, output, 180, f"--part={k}/{PARTS}") for k in range(1, PARTS + 1)]
    for command in parts:
        if problem := succeeded(command.wait()):
            raise SystemExit(f"the uninterrupted parts: {problem}")
    last = max(note.stat().st_mtime for note in (output / ".build").glob("*.json"))
    return last - (output / "build.json").stat().st_mtime


def main() -> None:
    """Runs the trials."""
    report = Report("kill_parts", arguments(__doc__ or "", count=10, seconds=300))
    with scratch() as folder:
        videos = make_videos(folder / "videos", VIDEOS, splits=SPLITS)
        (videos / "split0" / "left" / "broken.mp4").write_text("no video")  # keeps the notes of the shards
        print("building in one process without interruption ...", flush=True)
        ended = building(videos, folder / "reference", 180).wait()
        if problem := succeeded(ended):
            raise SystemExit(f"the uninterrupted build: {problem}\n{ended.err[-2000:]}")
        expected = contents(folder / "reference")
        length = uninterrupted(videos, folder / "parts")
        print(f"took {ended.seconds:.0f} s; three parts take {length:.1f} s after the first file", flush=True)

        def attempt(number: int) -> str | None:
            rng = random.Random(f"{report.chosen.seed}/{number}")
            shard = f"split{rng.randrange(SPLITS - PARTS)}-00000-of-00001.tfrecord"
            moments = (("build.json", rng.uniform(0, length)), (shard, rng.uniform(0, 0.5)))
            killed = [rng.randint(1, PARTS)] if number % 3 else [*range(1, PARTS + 1)]
            sent, moment = SIGNALS[number // 2 % len(SIGNALS)], moments[number % 2]
            return "; ".join(trial(videos, folder / f"build{number}", killed, sent, moment, expected, report)) or None

        report.run((f"build{number}", partial(attempt, number)) for number in range(report.chosen.count))
    report.close()


if __name__ == "__main__":
    main()
