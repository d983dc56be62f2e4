"""Runs long jobs: after the first tenth, memory must grow by less than 2 %, and the number of open files not at all.

The jobs are 3,000 training steps, predictions for 300 videos by one command, and 2,000 requests to a served SavedModel
(through the loopback REST service of tests/helpers/rest_service.py, with the package's client). Memory is the resident
set size. The peak in the second tenth of a job is compared with the peak in the last tenth, because checkpoints and
decoded videos take more memory for a moment. Both the server and the client are measured.

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

MAX_GROWTH = 0.02
INTERVAL = 0.1  # seconds between samples


@dataclass
class Samples:
    """Memory and open files of a process over the progress of its job.

    Attributes:
        pid: process id.
        done: progress in [0, 1] at each sample.
        memory: memory in bytes at each sample.
        files: number of open files at each sample.
    """

    pid: int
    done: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self, done: float) -> None:
        """Takes a sample."""
        if memory := resident(self.pid):
            self.done.append(done)
            self.memory.append(memory)
            self.files.append(open_files(self.pid))

    def highest(self, values: list[int], low: float, high: float) -> int:
        """Returns the highest value while the progress was between `low` and `high`."""
        return max((value for done, value in zip(self.done, values) if low <= done <= high), default=0)

    def problem(self, report: Report, name: str) -> str | None:
        """Returns a message if the process has grown too much, or None."""
        early, late = (self.highest(self.memory, low, low + 0.1) for low in (0.1, 0.9))
        files, files_late = (self.highest(self.files, low, low + 0.1) for low in (0.1, 0.9))
        if not early or not late:
            return f"was not sampled in the second or the last tenth ({len(self.done)} samples)"
        growth = late / early - 1
        words = f"{early / 1e6:.1f} to {late / 1e6:.1f} MB ({growth:+.2%}), {files} to {files_late} open files"
        report.notes[name] = words
        return words if growth >= MAX_GROWTH or files_late > files else None


def training(report: Report, folder: Path) -> str | None:
    """Trains with five checkpoints in each tenth of the steps."""
    steps, workdir = report.chosen.steps, folder / "run"
    every = max(steps // 50, 1)
    config = folder / "tiny.gin"
    config.write_text(recipe(make_records(folder / "records"), steps=steps, checkpoint=every))
    words = (f"--gin_file={config}", f"--workdir={workdir}")
    command = Command("x3d_tf.train", *words, folder=folder, seconds=report.chosen.seconds)
    samples = Samples(command.process.pid)
    while command.process.poll() is None and not (workdir / "model.keras").exists():
        samples.take(_newest(workdir) / steps)
        time.sleep(INTERVAL)
        if time.monotonic() - command.started > report.chosen.seconds:
            break
    return succeeded(command.wait()) or samples.problem(report, f"training, {steps} steps")


def _newest(workdir: Path) -> int:
    names = [path.stem.removeprefix("ckpt-") for path in workdir.glob("checkpoints/ckpt-*.index")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def predicting(report: Report, folder: Path) -> str | None:
    """Predicts a folder of links to 30 videos; the command prints the name of each finished video."""
    count = report.chosen.videos
    originals = sorted(make_videos(folder / "originals", 30).rglob("*.mp4"))
    (folder / "videos").mkdir()
    for number in range(count):
        os.link(originals[number % len(originals)], folder / "videos" / f"{number:05d}.mp4")
    model = save_model_in_worker(folder / "model.keras")
    words = ("x3d_tf.predict", f"--model={model}", f"--csv={folder / 'out.csv'}", str(folder / "videos"))
    line = [sys.executable, "-u", "-m", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        timer = threading.Timer(report.chosen.seconds, process.kill)
        timer.start()
        samples, done = Samples(process.pid), 0
        for printed in process.stdout or ():
            if str(folder / "videos") in printed:
                done += 1
                samples.take(done / count)
        timer.cancel()
    if process.returncode or done < count:
        return f"exit status {process.returncode} after {done} videos"
    return samples.problem(report, f"predicting, {count} videos")


def serving(report: Report, folder: Path) -> str | None:
    """Sends JPEG files to a served model with the package's client in this process."""
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
    """Starts a process that serves a SavedModel; yields its address and process id."""
    line = [sys.executable, __file__, f"--serve={version}"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.kill()


def serve(version: str) -> None:
    """Serves a SavedModel until the process is killed; prints the address first."""
    import tensorflow as tf
    from rest_service import serve as serve_rest  # type: ignore[import-not-found]

    with serve_rest(tf.saved_model.load(version), "tiny") as address:
        print(address, flush=True)
        threading.Event().wait()


def save_model_in_worker(path: Path) -> Path:
    """Saves a tiny model file in another process, so that this process does not load TensorFlow."""
    if not path.exists():
        Worker(_saver, str(path)).close()
    return path


def _saver(path: str) -> Callable[..., None]:
    save_model(Path(path))
    return lambda: None


def main() -> None:
    """Runs the trials one at a time, so that they do not compete for memory."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("--serve="):
        serve(sys.argv[1].partition("=")[2])
        return
    chosen = arguments(__doc__ or "", count=1, seconds=1800, steps=3000, videos=300, requests=2000)
    report = Report("endurance", chosen)
    with scratch() as folder:
        for number in range(chosen.count):
            for name, trial in {"training": training, "predicting": predicting, "serving": serving}.items():
                trial_folder = folder / f"{name}{number}"
                trial_folder.mkdir()
                chosen.jobs = 1
                report.run([(f"{name} {number}", partial(trial, report, trial_folder))])
    report.close()


if __name__ == "__main__":
    main()
