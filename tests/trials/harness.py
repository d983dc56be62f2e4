"""What the trials share: commands with limits, workers that a watchdog ends, tiny videos, records and runs, results.

Trials are run by hand, one after the other. They attack the package of the checkout they lie in, as users would: by its
commands, in processes with limits of time and memory, and by its public functions.
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
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # of two trials at a time, each would take the whole GPU

SECONDS = 120.0  # that a command may take unless told otherwise
MEGABYTES = 4000.0  # that it may hold, all its processes together
PAGE = os.sysconf("SC_PAGE_SIZE")

NETWORK = {  # the smallest: one block a stage, 4 frames of 32 x 32
    "Expansion.gamma_tau": 1,
    "Expansion.gamma_t": 4,
    "Expansion.gamma_s": 32 / 112,
    "Expansion.gamma_b": 1,
    "Expansion.gamma_d": 0.2,
}


TO_END: dict[int, Callable[[], Any]] = {}  # how to end what is under way, by object


def _end_all(number: int, _: Any) -> None:
    """Ends with the trial, stopped by a signal, whatever it has started: commands have sessions of their own."""
    for end in [*TO_END.values()][::-1]:  # the scratch folder last
        with suppress(OSError):
            end()
    os._exit(128 + number)


# ---- The command line and the results of a trial


def arguments(text: str, *, count: int, seconds: float = SECONDS, **others: Any) -> argparse.Namespace:
    """Parses `--count`, `--seed`, `--jobs`, `--only`, `--results` and further options, which `others` gives defaults.

    Args:
        text: the script's docstring, for --help.
        count: default of --count.
        seconds: default of --seconds, the limit of one command.
        **others: further options by name, with defaults.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_all)
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help=f"Trials. Defaults to {count}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random choices. Defaults to 0.")
    parser.add_argument("--jobs", type=int, default=2, help="Trials that run in parallel. Defaults to 2.")
    parser.add_argument("--only", default="", help="Run only trials whose name contains this text.")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"Limit of a command. Defaults to {seconds:g}.")
    where = ROOT / "build" / "trials.jsonl"
    parser.add_argument("--results", type=Path, default=where, help=f"File that gets a line of JSON. {where}")
    for name, default in others.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"Defaults to {default!r}.")
    return parser.parse_args()


@dataclass
class Report:
    """Counts trials, prints what happens, and writes the result.

    Attributes:
        name: of the trial, such as "kill_training".
        chosen: the parsed command line.
        tried: trials that have ended.
        failed: what did not survive, and why.
        notes: facts to keep with the result, by name.
    """

    name: str
    chosen: argparse.Namespace
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, trial: str, problem: str | None) -> None:
        """Counts a trial; `problem` says why it did not survive, None that it did."""
        with self.lock:
            self.tried += 1
            if problem is not None:
                self.failed[trial] = problem
            print(f"{self.tried:5d}  {trial}: {'survived' if problem is None else 'FAILED: ' + problem}", flush=True)

    def note(self, name: str, amount: int = 1) -> None:
        """Adds to a counter that is stated beside the result."""
        with self.lock:
            self.notes[name] = self.notes.get(name, 0) + amount

    def run(self, trials: Iterable[tuple[str, Callable[[], str | None]]]) -> None:
        """Runs named trials, some in parallel; one that raises has failed."""

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
        """Prints the list of what did not survive and the closing line, writes the line of JSON, ends the process."""
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
    """A temporary folder, deleted when the block ends."""
    with tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as folder:
        TO_END[-1] = lambda: shutil.rmtree(folder, ignore_errors=True)
        yield Path(folder)
        del TO_END[-1]


# ---- Commands


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        status: its exit status; negative where a signal ended it.
        out: its stdout.
        err: its stderr.
        seconds: that it took.
        broke: the limit that it broke, for which it was ended: "time", "memory", or "".
        peak: bytes that it and its children held at most.
    """

    status: int
    out: str
    err: str
    seconds: float
    broke: str
    peak: int

    @property
    def last(self) -> str:
        """The last line of stderr, where commands say what went wrong."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


class Command:
    """A command of the package that runs in a process group of its own, watched for time and memory.

    Args:
        *words: module and arguments, or a script: ("x3d_tf.train", "--gin_file=..."), ("/path/of/script.py", ...).
        folder: where it runs.
        seconds, megabytes: its limits.
        env: further environment variables.
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
        TO_END[id(self)] = self.end

    def signal(self, number: signal.Signals) -> bool:
        """Sends a signal to the command itself; says whether it was still running."""
        running = self.process.poll() is None
        self.process.send_signal(number)
        return running

    def wait(self) -> Ended:
        """Waits for the end, or makes it end where it breaks a limit; nothing of its group stays."""
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
        TO_END.pop(id(self), None)
        seconds = time.monotonic() - self.started
        return Ended(self.process.returncode, self._read(self._out), self._read(self._err), seconds, broke, peak)

    def left_behind(self, grace: float = 10.0) -> list[int]:
        """The processes of its group that still run so many seconds after its end; they are ended."""
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
    """Runs a command to its end; arguments as `Command`."""
    command = Command(*words, folder=folder, **limits)
    ended = command.wait()
    command.end()
    return ended


def refused(ended: Ended, *, says: str = "") -> str | None:
    """Why a command did not refuse as it should: exit status 1, a last line "error: ...", no traceback, within limits.

    `says` is a text that the line must contain.
    """
    if ended.broke:
        return f"broke its limit of {ended.broke} ({ended.seconds:.0f} s, {ended.peak / 1e6:.0f} MB)"
    if "Traceback (most recent call last)" in ended.err:
        return f"ended in a traceback: {ended.last[:200]}"
    if ended.status != 1:
        return f"exit status {ended.status}, not 1: {ended.last[:200]!r}"
    if not ended.last.startswith("error: "):
        return f"the last line is no error: {ended.last[:200]!r}"
    if says not in ended.last:
        return f"the error does not say {says!r}: {ended.last[:300]!r}"
    if not (ended.err + ended.out).replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"control characters reach the terminal: {ended.last[:200]!r}"
    return None


def succeeded(ended: Ended) -> str | None:
    """Why a command did not do its work."""
    if ended.broke:
        return f"broke its limit of {ended.broke} ({ended.seconds:.0f} s, {ended.peak / 1e6:.0f} MB)"
    return None if ended.status == 0 else f"exit status {ended.status}: {ended.last[:300]}"


def group(leader: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def open_files(pid: int) -> int:
    """Files that a process has open; 0 where it has ended."""
    try:
        return len([*Path(f"/proc/{pid}/fd").iterdir()])
    except OSError:
        return 0


# ---- Workers, for trials too many for a process each


class Broke(Exception):
    """A worker that broke a limit or ended by itself, with what happened."""


class Worker:
    """A process that answers questions, ended and started again where one takes too long or too much memory.

    Args:
        make: a module's function that is called there once and returns the function that answers.
        *arguments: of `make`.
        seconds, megabytes: limits of a question.
        starting: seconds that `make` may take.
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
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make, self._arguments), daemon=True)
        self._process.start()
        TO_END[id(self)] = self._process.kill
        theirs.close()
        self._answer(self._starting)
        self._lives = True

    def ask(self, *question: Any) -> Any:
        """What the function says; raises Broke where a limit was broken or the process ended."""
        if not self._lives:  # not at once, for the file that ended it is mended only afterwards
            self._start()
        self._pipe.send(question)
        try:
            return self._answer(self.seconds)
        except Broke:
            self.close()
            raise

    def _answer(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while not self._pipe.poll(0.02):
            held = resident(self._process.pid or 0)
            if time.monotonic() > until:
                raise Broke(f"took more than {seconds:g} s")
            if held > self.megabytes * 1e6:
                raise Broke(f"held {held / 1e6:.0f} MB")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Broke(f"ended its process with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._lives = False
        TO_END.pop(id(self), None)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, make: Callable[..., Callable[..., Any]], given: tuple[Any, ...]) -> None:
    answer = make(*given)
    pipe.send("ready")
    while True:
        question = pipe.recv()
        try:
            pipe.send(answer(*question))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def outcome_of(act: Callable[[], Any]) -> tuple[str, str]:
    """What a function of the package does, in two words: ("gives", result), ("refuses", line) or ("breaks", error).

    To refuse is to raise what commands print in one line; anything else would be a traceback.
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
    """Synthetic mpeg4 videos of 12 frames of 64 x 48 pixels, `split N/CLASS/NUMBER.mp4`, `count` a split."""
    import numpy as np
    from video_fixtures import write_video  # type: ignore[import-not-found]

    for split in range(splits):
        for number in range(count):
            draw = np.random.default_rng([split, number])
            coarse = draw.integers(0, 256, (12, 12, 16, 3), np.uint8)
            path = folder / f"split{split}" / classes[number % len(classes)] / f"{number:04d}.mp4"
            write_video(path, coarse.repeat(4, 1).repeat(4, 2))
    return folder


def make_records(folder: Path, train: int = 12, test: int = 4) -> Path:
    """Records of smooth random frames with a split to train and one to test on, of two classes."""
    from video_fixtures import noise_video, write_records

    splits = {"train": range(train), "test": range(train, train + test)}
    videos = {name: [noise_video(number, 10) for number in numbers] for name, numbers in splits.items()}
    write_records(folder, videos, classes=2)
    return folder


def recipe(records: Path, *, steps: int = 9, checkpoint: int = 3, others: dict[str, Any] | None = None) -> str:
    """The text of a .gin file of a tiny run; `others` are further settings by name."""
    settings = {
        **NETWORK,
        "DatasetSpec.records": str(records),
        "DatasetSpec.flip": False,
        "Recipe.batch": 3,  # odd, so that it is one part on two cores: half as much to compile
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
    """A model file of the smallest network; imports TensorFlow."""
    import x3d_tf

    factors: dict[str, Any] = {name.partition(".")[2]: value for name, value in NETWORK.items()}
    expansion = x3d_tf.Expansion(**factors)
    model = x3d_tf.build_x3d(expansion, num_classes=classes)
    x3d_tf.save(x3d_tf.portable(model, tuple(f"class {number}" for number in range(classes))), path)
    return path


# ---- What is compared


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their paths, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def weights_of(path: Path) -> dict[str, Any]:
    """The arrays of a `.keras` file by their paths in it, read without the package."""
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
    """Which array of a `.keras` file is not bit-equal to that of another."""
    import numpy as np

    found, wanted = weights_of(path), weights_of(expected)
    if found.keys() != wanted.keys():
        return f"{path.name} has other arrays: {sorted(found.keys() ^ wanted.keys())[:3]}"
    for name, array in wanted.items():
        if not np.array_equal(array, found[name]) or array.dtype != found[name].dtype:
            return f"{name} of {path.name} is not bit-equal"
    return None


def half_written(folder: Path) -> list[str]:
    """The files below a folder that only a write under way has: partial files, temporary checkpoints."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if ".partial" in name or "_temp" in name or name.endswith(".replaced")]


# ---- Damage


def damaged(content: bytes, kind: str, draw: random.Random) -> tuple[str, bytes]:
    """A file with one bit flipped ("flip") or cut off ("cut"), and in words what was done."""
    place = draw.randrange(len(content))
    if kind == "cut":
        return f"cut to {place} of {len(content)} bytes", content[:place]
    bit = draw.randrange(8)
    return f"bit {bit} of byte {place} flipped", content[:place] + bytes([content[place] ^ 1 << bit]) + content[
        place + 1 :
    ]


def copy(folder: Path, target: Path) -> Path:
    """A copy of a folder, with its links."""
    shutil.copytree(folder, target, symlinks=True)
    return target
