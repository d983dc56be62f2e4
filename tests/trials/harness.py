"""Shared code of the trials: commands and workers with limits, tiny videos, records and runs, and results.

Trials are stress tests that are run by hand, one at a time. They exercise the package of this checkout as users would:
through its commands, in processes with time and memory limits, and through its public functions.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # parallel trials would each allocate the complete GPU

SECONDS = 120.0  # default time limit of a command
MEGABYTES = 4000.0  # default memory limit of a command with all its processes
PAGE = os.sysconf("SC_PAGE_SIZE")

NETWORK = {  # the smallest: one block per stage, 4 frames of 32 x 32 pixels
    "Expansion.gamma_tau": 1,
    "Expansion.gamma_t": 4,
    "Expansion.gamma_s": 32 / 112,
    "Expansion.gamma_b": 1,
    "Expansion.gamma_d": 0.2,
}


CLEANUPS: dict[int, Callable[[], Any]] = {}  # functions that stop running processes, by object id


def _end_all(number: int, _: Any) -> None:
    """Stops all processes of a trial that a signal stops, because commands run in their own sessions."""
    for cleanup in [*CLEANUPS.values()][::-1]:  # the scratch folder last
        with suppress(OSError):
            cleanup()
    os._exit(128 + number)


# ---- The command line and the results of a trial


def arguments(text: str, *, count: int, seconds: float = SECONDS, **others: Any) -> argparse.Namespace:
    """Parses `--count`, `--seed`, `--jobs`, `--only`, `--seconds`, `--results` and the options in `others`.

    Args:
        text: docstring of the script, for --help.
        count: default of --count.
        seconds: default of --seconds, the time limit of one command.
        **others: defaults of further options, by name.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_all)
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help=f"Number of trials. Defaults to {count}.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed. Defaults to 0.")
    parser.add_argument("--jobs", type=int, default=2, help="Number of trials that run in parallel. Defaults to 2.")
    parser.add_argument(
        "--only", default="", help="Run only trials whose name contains this text. Defaults to all trials."
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"Time limit of a command. Defaults to {seconds:g}."
    )
    results = ROOT / "build" / "trials.jsonl"
    text = f"File to which a line of JSON is appended. Defaults to {results}."
    parser.add_argument("--results", type=Path, default=results, help=text)
    for name, default in others.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"Defaults to {default!r}.")
    return parser.parse_args()


@dataclass
class Report:
    """Counts trials, prints their outcome and writes the result.

    Attributes:
        name: name of the script, such as "kill_training".
        chosen: parsed command line.
        tried: number of finished trials.
        failed: reasons of the failed trials, by name.
        notes: counters stored with the result, by name.
    """

    name: str
    chosen: argparse.Namespace
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, trial: str, problem: str | None) -> None:
        """Counts a trial; `problem` is the reason of its failure, or None."""
        with self.lock:
            self.tried += 1
            if problem is not None:
                self.failed[trial] = problem
            print(f"{self.tried:5d}  {trial}: {'survived' if problem is None else 'FAILED: ' + problem}", flush=True)

    def note(self, name: str, amount: int = 1) -> None:
        """Adds to a counter that is stored with the result."""
        with self.lock:
            self.notes[name] = self.notes.get(name, 0) + amount

    def run(self, trials: Iterable[tuple[str, Callable[[], str | None]]]) -> None:
        """Runs named trials in parallel; a trial that raises has failed."""

        def one(trial: tuple[str, Callable[[], str | None]]) -> None:
            name, attempt = trial
            try:
                self.add(name, attempt())
            except Exception as error:
                self.add(name, f"the trial itself ended with {error!r}")

        chosen = [trial for trial in trials if self.chosen.only in trial[0]]
        with ThreadPoolExecutor(self.chosen.jobs) as pool:
            list(pool.map(one, chosen))

    def close(self) -> None:
        """Prints the failed trials and a summary, writes a line of JSON and exits."""
        for trial, problem in self.failed.items():
            print(f"  did not survive: {trial}: {problem}")
        survived = self.tried - len(self.failed)
        for name, value in self.notes.items():
            print(f"  {name}: {value}")
        print(f"{self.name}: tried {self.tried}, survived {survived}")
        line = {
            "trial": self.name,
            "tried": self.tried,
            "survived": survived,
            "failed": self.failed,
            "notes": self.notes,
            "seed": self.chosen.seed,
            "seconds": round(time.monotonic() - self.started),
            **_machine(),
        }
        self.chosen.results.parent.mkdir(parents=True, exist_ok=True)
        with self.chosen.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=True) + "\n")
        sys.exit(1 if self.failed or not self.tried else 0)


def _machine() -> dict[str, Any]:
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("+" if changes.stdout else ""),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "tensorflow": version("tensorflow"),
        "keras": version("keras"),
    }


@contextmanager
def scratch() -> Iterator[Path]:
    """Yields a temporary folder that is deleted at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as folder:
        CLEANUPS[-1] = lambda: shutil.rmtree(folder, ignore_errors=True)
        yield Path(folder)
        del CLEANUPS[-1]


# ---- Commands


class Ended(NamedTuple):
    """Outcome of a command.

    Attributes:
        status: exit status; negative if a signal ended the command.
        out: standard output.
        err: standard error.
        seconds: run time.
        broke: limit for which the command was killed: "time", "memory", or "" if none.
        peak: peak memory of the command and its children in bytes.
    """

    status: int
    out: str
    err: str
    seconds: float
    broke: str
    peak: int

    @property
    def last(self) -> str:
        """Last line of standard error, which holds the error message of a command."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


class Command:
    """A command that runs in its own process group with time and memory limits.

    Args:
        *words: module or script, and arguments: ("x3d_tf.train", "--gin_file=..."), ("/path/to/script.py", ...).
        folder: working folder.
        seconds, megabytes: limits.
        env: additional environment variables.
    """

    def __init__(
        self,
        *words: str,
        folder: Path,
        seconds: float = SECONDS,
        megabytes: float = MEGABYTES,
        env: dict[str, str] | None = None,
    ) -> None:
        line = [sys.executable, *([] if words[0].endswith(".py") else ["-m"]), *words]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.started, self.seconds, self.megabytes = time.monotonic(), seconds, megabytes
        self.process = subprocess.Popen(
            line,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            start_new_session=True,
        )
        CLEANUPS[id(self)] = self.end

    def signal(self, number: signal.Signals) -> bool:
        """Sends a signal to the command; returns True if it was still running."""
        running = self.process.poll() is None
        self.process.send_signal(number)
        return running

    def errors_so_far(self) -> str:
        """Returns what the command has written to standard error until now."""
        descriptor = self._err.fileno()  # read without a seek, because the command shares the position
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="backslashreplace")

    def wait(self) -> Ended:
        """Waits for the command, and kills its process group if it exceeds a limit."""
        broke, peak = "", 0
        while self.process.poll() is None and not broke:
            peak = max(peak, sum(resident(pid) for pid in group(self.process.pid)))
            if time.monotonic() - self.started > self.seconds:
                broke = "time"
            elif peak > self.megabytes * 1e6:
                broke = "memory"
            time.sleep(0.02)
        if broke:
            self.end()
        self.process.wait()
        CLEANUPS.pop(id(self), None)
        seconds = time.monotonic() - self.started
        return Ended(self.process.returncode, self._read(self._out), self._read(self._err), seconds, broke, peak)

    def left_behind(self, grace: float = 10.0) -> list[int]:
        """Returns the processes of its group that still run `grace` seconds after its end, and kills them."""
        until = time.monotonic() + grace
        while (left := group(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        self.end()
        return left

    def end(self) -> None:
        """Kills the command and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @staticmethod
    def _read(file: Any) -> str:
        file.seek(0)
        return str(file.read().decode(errors="backslashreplace"))


def run(*words: str, folder: Path, **limits: Any) -> Ended:
    """Runs a command to its end; takes the arguments of `Command`."""
    command = Command(*words, folder=folder, **limits)
    ended = command.wait()
    command.end()
    return ended


def refused(ended: Ended, *, says: str = "") -> str | None:
    """Checks that a command rejected its input; returns the problem, or None.

    Requires exit status 1, a last line "error: ..." that contains `says`, no traceback, and no exceeded limit.
    """
    if ended.broke:
        return f"broke its limit of {ended.broke} ({ended.seconds:.0f} s, {ended.peak / 1e6:.0f} MB)"
    if "Traceback (most recent call last)" in ended.err:
        return f"ended in a traceback: {ended.last[:200]}"
    if ended.status != 1:
        return f"exit status {ended.status}, not 1: {ended.last[:200]!r}"
    if not ended.last.startswith("error: "):
        return f"the last line is not an error: {ended.last[:200]!r}"
    if says not in ended.last:
        return f"the error does not contain {says!r}: {ended.last[:300]!r}"
    if not (ended.err + ended.out).replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"control characters reach the terminal: {ended.last[:200]!r}"
    return None


def succeeded(ended: Ended) -> str | None:
    """Checks that a command succeeded; returns the problem, or None."""
    if ended.broke:
        return f"broke its limit of {ended.broke} ({ended.seconds:.0f} s, {ended.peak / 1e6:.0f} MB)"
    return None if ended.status == 0 else f"exit status {ended.status}: {ended.last[:300]}"


def group(leader: int) -> list[int]:
    """Returns the running processes of a process group."""
    running = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == leader and fields[0] not in "ZX":
                    running.append(int(entry.name))
    return running


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def open_files(pid: int) -> int:
    """Returns the number of open files of a process; 0 if it has ended."""
    try:
        return len([*Path(f"/proc/{pid}/fd").iterdir()])
    except OSError:
        return 0


# ---- Workers, for trials that are too many for a process each


class Broke(Exception):
    """Raised when a worker exceeded a limit or exited; the message gives the reason."""


class Worker:
    """A worker process that serves requests; it is restarted after a request that exceeded a limit.

    Args:
        make: module-level function that is called once in the process and returns the function that serves requests.
        *arguments: arguments of `make`.
        seconds, megabytes: limits of a request.
        starting: time limit of `make` in seconds.
    """

    def __init__(
        self,
        make: Callable[..., Callable[..., Any]],
        *arguments: Any,
        seconds: float = 20.0,
        megabytes: float = MEGABYTES,
        starting: float = 300.0,
    ) -> None:
        self._make, self._arguments, self.seconds, self.megabytes = make, arguments, seconds, megabytes
        self._starting, self._lives = starting, False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_pipe, self._make, self._arguments), daemon=True)
        self._process.start()
        CLEANUPS[id(self)] = self._process.kill
        child_pipe.close()
        self._receive(self._starting)
        self._lives = True

    def ask(self, *request: Any) -> Any:
        """Returns the reply to a request; raises `Broke` if a limit was exceeded or the process exited."""
        if not self._lives:  # only now, because the caller repairs the damaged file after the previous request
            self._start()
        self._pipe.send(request)
        try:
            return self._receive(self.seconds)
        except Broke:
            self.close()
            raise

    def _receive(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while not self._pipe.poll(0.02):
            memory = resident(self._process.pid or 0)
            if time.monotonic() > until:
                raise Broke(f"took more than {seconds:g} s")
            if memory > self.megabytes * 1e6:
                raise Broke(f"used {memory / 1e6:.0f} MB")
        try:
            reply = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Broke(f"its process ended with status {self._process.exitcode}") from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Kills the process."""
        self._lives = False
        CLEANUPS.pop(id(self), None)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    serve = make(*arguments)
    pipe.send("ready")
    while True:
        request = pipe.recv()
        try:
            pipe.send(serve(*request))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def outcome_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Returns ("gives", result), ("refuses", message) or ("breaks", error) for a call of the package.

    "refuses" stands for errors that commands print in one line; any other error would be a traceback.
    """
    from x3d_tf.errors import UserError

    try:
        return "gives", str(act())
    except (UserError, OSError) as error:
        return "refuses", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "breaks", f"{type(error).__name__}: {str(error)[:300]}"


# ---- Small inputs


def make_videos(folder: Path, count: int, classes: Sequence[str] = ("left", "right"), splits: int = 1) -> Path:
    """Writes `count` synthetic mpeg4 videos per split, 12 frames of 64 x 48 pixels: `splitN/CLASS/NUMBER.mp4`."""
    import numpy as np
    from video_fixtures import write_video  # type: ignore[import-not-found]

    for split in range(splits):
        for number in range(count):
            rng = np.random.default_rng([split, number])
            coarse = rng.integers(0, 256, (12, 12, 16, 3), np.uint8)
            path = folder / f"split{split}" / classes[number % len(classes)] / f"{number:04d}.mp4"
            write_video(path, coarse.repeat(4, 1).repeat(4, 2))
    return folder


def make_records(folder: Path, train: int = 12, test: int = 4) -> Path:
    """Writes records of smooth random frames with two classes and a training and a test split."""
    from video_fixtures import noise_video, write_records

    splits = {"train": range(train), "test": range(train, train + test)}
    videos = {name: [noise_video(number, 10) for number in numbers] for name, numbers in splits.items()}
    write_records(folder, videos, classes=2)
    return folder


def recipe(records: Path, *, steps: int = 9, checkpoint: int = 3, others: dict[str, Any] | None = None) -> str:
    """Returns the text of a .gin file for a tiny run; `others` are further settings by name."""
    settings = {
        **NETWORK,
        "DatasetSpec.records": str(records),
        "DatasetSpec.flip": False,
        "Recipe.batch": 3,  # odd, so that two cores use one slice, which halves the compilation
        "Recipe.reference_batch": 3,
        "ModelOptions.bn_group": 3,
        "Recipe.learning_rate": 0.01,
        "Recipe.steps": steps,
        "Recipe.warmup_fraction": 0.1,
        "TrainConfig.checkpoint_steps": checkpoint,
        "TrainConfig.test_views": 1,
        **(others or {}),
    }
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


def save_model(path: Path, classes: int = 2) -> Path:
    """Saves a model file of the smallest network; imports TensorFlow."""
    import x3d_tf

    factors: dict[str, Any] = {name.partition(".")[2]: value for name, value in NETWORK.items()}
    expansion = x3d_tf.Expansion(**factors)
    model = x3d_tf.build_x3d(expansion, num_classes=classes)
    x3d_tf.save(x3d_tf.portable(model, tuple(f"class {number}" for number in range(classes))), path)
    return path


# ---- Comparisons


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files below a folder by path, including hidden files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def weights_of(path: Path) -> dict[str, Any]:
    """Returns the arrays of a `.keras` file by path, read without this package."""
    import io

    import h5py  # type: ignore[import-untyped]
    import numpy as np

    arrays: dict[str, Any] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(keep)
    return arrays


def difference_of_weights(path: Path, expected: Path) -> str | None:
    """Returns a message about the first array that differs between two `.keras` files, or None."""
    import numpy as np

    actual, reference = weights_of(path), weights_of(expected)
    if actual.keys() != reference.keys():
        return f"{path.name} has other arrays: {sorted(actual.keys() ^ reference.keys())[:3]}"
    for name, array in reference.items():
        if not np.array_equal(array, actual[name]) or array.dtype != actual[name].dtype:
            return f"{name} of {path.name} is not bit-equal"
    return None


def half_written(folder: Path) -> list[str]:
    """Returns the temporary files below a folder: partial files and temporary checkpoints."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if ".partial" in name or "_temp" in name or name.endswith(".replaced")]


# ---- Damage


def damaged(content: bytes, kind: str, rng: random.Random) -> tuple[str, bytes]:
    """Flips one bit ("flip") or truncates the content ("cut"); returns a description and the new content."""
    place = rng.randrange(len(content))
    if kind == "cut":
        return f"cut to {place} of {len(content)} bytes", content[:place]
    bit = rng.randrange(8)
    return f"bit {bit} of byte {place} flipped", content[:place] + bytes([content[place] ^ 1 << bit]) + content[
        place + 1 :
    ]


def copy(folder: Path, target: Path) -> Path:
    """Copies a folder with its symbolic links and returns the copy."""
    shutil.copytree(folder, target, symlinks=True)
    return target
