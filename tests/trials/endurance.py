"""Lets processes work for long: after the first tenth, memory grows by less than 2 % and open files by none.

3,000 steps of training, 300 videos predicted by one command, 2,000 requests to a served SavedModel (behind the loopback
REST service of tests/rest_service.py, asked by the package's client). Memory is the process's resident set and is
sampled as it works; compared are the highest of the second tenth and the highest of the last, because a checkpoint or
a video that is decoded holds more for a moment. Servers are measured, and so is the client that asks.

  python tests/trials/endurance.py
  python tests/trials/endurance.py --only=training --steps=3000  # or predicting, --videos=300; serving, --requests=2000
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness import (
    Command,
    Report,
    Worker,
    arguments,
    make_records,
    make_videos,
    open_files,
    recipe,
    resident,
    run,
    save_model,
    scratch,
    succeeded,
)

MOST_GROWTH = 0.02
EVERY = 0.1  # seconds between two samples


@dataclass
class Samples:
    """What a process held as its work went on.

    Attributes:
        pid: of the process.
        done: parts of the work, in [0, 1], at each sample.
        memory: bytes.
        files: open files.
    """

    pid: int
    done: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self, done: float) -> None:
        """Looks at the process."""
        if held := resident(self.pid):
            self.done.append(done)
            self.memory.append(held)
            self.files.append(open_files(self.pid))

    def highest(self, values: list[int], low: float, high: float) -> int:
        """The highest value while so much of the work had been done."""
        return max((value for done, value in zip(self.done, values) if low <= done <= high), default=0)

    def problem(self, report: Report, name: str) -> str | None:
        """Why the process has grown too much."""
        early, late = (self.highest(self.memory, low, low + 0.1) for low in (0.1, 0.9))
        files, files_late = (self.highest(self.files, low, low + 0.1) for low in (0.1, 0.9))
        if not early or not late:
            return f"was not sampled in the second or the last tenth ({len(self.done)} samples)"
        growth = late / early - 1
        words = f"{early / 1e6:.1f} to {late / 1e6:.1f} MB ({growth:+.2%}), {files} to {files_late} open files"
        report.notes[name] = words
        return words if growth >= MOST_GROWTH or files_late > files else None


def training(report: Report, folder: Path) -> str | None:
    """A run with five checkpoints in each tenth of its steps."""
    steps, workdir = report.chosen.steps, folder / "run"
    every = max(steps // 50, 1)
    config = folder / "tiny.gin"
    config.write_text(recipe(make_records(folder / "records"), steps=steps, checkpoint=every))
    words = (f"--gin_file={config}", f"--workdir={workdir}")
    command = Command("x3d_tf.train", *words, folder=folder, seconds=report.chosen.seconds)
    samples = Samples(command.process.pid)
    while command.process.poll() is None and not (workdir / "model.keras").exists():
        samples.take(_newest(workdir) / steps)
        time.sleep(EVERY)
        if time.monotonic() - command.started > report.chosen.seconds:
            break
    return succeeded(command.wait()) or samples.problem(report, f"training, {steps} steps")


def _newest(workdir: Path) -> int:
    names = [path.stem.removeprefix("ckpt-") for path in workdir.glob("checkpoints/ckpt-*.index")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def predicting(report: Report, folder: Path) -> str | None:
    """A folder of links to 30 videos; each video that is done prints its name."""
    count = report.chosen.videos
    originals = sorted(make_videos(folder / "originals", 30).rglob("*.mp4"))
    (folder / "videos").mkdir()
    for number in range(count):
        os.link(originals[number % len(originals)], folder / "videos" / f"{number:05d}.mp4")
    model = save_model_in_worker(folder / "model.keras")
    words = ("x3d_tf.predict", f"--model={model}", f"--csv={folder / 'out.csv'}", str(folder / "videos"))
    line = [sys.executable, "-u", "-m", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        ends = threading.Timer(report.chosen.seconds, process.kill)
        ends.start()
        samples, done = Samples(process.pid), 0
        for printed in process.stdout or ():
            if str(folder / "videos") in printed:
                done += 1
                samples.take(done / count)
        ends.cancel()
    if process.returncode or done < count:
        return f"exit status {process.returncode} after {done} videos"
    return samples.problem(report, f"predicting, {count} videos")


def serving(report: Report, folder: Path) -> str | None:
    """Requests of JPEG files to a served model, by the package's client in this process."""
    from video_fixtures import numbered_frames  # type: ignore[import-not-found]

    from export.serving.client import rest_classifier
    from x3d_tf.data.video.decode import encode_jpeg

    count = report.chosen.requests
    model = save_model_in_worker(folder / "model.keras")
    words = (f"--model={model}", f"--output={folder / 'served' / 'tiny'}")
    if problem := succeeded(run("export.saved_model", *words, folder=folder, seconds=300)):
        return problem
    frames = [encode_jpeg(frame) for frame in numbered_frames(4)]
    with served(folder / "served" / "tiny" / "1") as (address, pid):
        classify = rest_classifier(address, "tiny", 60.0)
        server, client = Samples(pid), Samples(os.getpid())
        for number in range(count):
            classify(frames)
            server.take(number / count)
            client.take(number / count)
    problems = [
        server.problem(report, f"serving, {count} requests: the server"),
        client.problem(report, f"serving, {count} requests: the client"),
    ]
    return "; ".join(filter(None, problems)) or None


@contextmanager
def served(version: Path) -> Iterator[tuple[str, int]]:
    """A process that serves a SavedModel; gives its address and its id."""
    line = [sys.executable, __file__, f"--serve={version}"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.kill()


def serve(version: str) -> None:
    """What the server's process does: prints its address, and serves until it is ended."""
    import tensorflow as tf
    from rest_service import serve as serve_rest  # type: ignore[import-not-found]

    with serve_rest(tf.saved_model.load(version), "tiny") as address:
        print(address, flush=True)
        threading.Event().wait()


def save_model_in_worker(path: Path) -> Path:
    """A tiny model file, made in another process, whose memory goes with it."""
    if not path.exists():
        Worker(_saver, str(path)).close()
    return path


def _saver(path: str) -> Callable[..., None]:
    save_model(Path(path))
    return lambda: None


def main() -> None:
    """Runs the trials, one after the other: others would disturb the memory of the machine."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("--serve="):
        serve(sys.argv[1].partition("=")[2])
        return
    chosen = arguments(__doc__ or "", count=1, seconds=1800, steps=3000, videos=300, requests=2000)
    report = Report("endurance", chosen)
    with scratch() as folder:
        for number in range(chosen.count):
            for name, trial in {"training": training, "predicting": predicting, "serving": serving}.items():
                own = folder / f"{name}{number}"
                own.mkdir()
                chosen.jobs = 1
                report.run([(f"{name} {number}", partial(trial, report, own))])
    report.close()


if __name__ == "__main__":
    main()
