"""Forms of a network that take turns, each framework in a process of its own.

In each round every form is called twice, one after the other, and only the second call is timed: threads of whatever
ran before may still spin, and caches are its. A short call is repeated, and its mean is taken. This module imports no
framework, nor does any script beside it: forms are named by text, and imported by the process that runs them.
"""

import importlib
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from x3d_tf.processes import Worker, WorkerDied

BOUND = 1e-5  # of a probability, between float32 forms of equal weights
SLOW_CALLS = 2  # of a form marked as slow
LEAST_SECONDS = 0.02  # that a timing takes
MATMUL_SIZE = 2048  # of the matrix product that stands for the machine's speed


@dataclass(frozen=True)
class Case:
    """What all forms of a table compute.

    Attributes:
        network: a variant's name.
        batch: clips of a call.
        threads: of each process.
        folder: for files, of this case alone.
        layer: what is computed instead of the whole network.
        verbose: whether frameworks may print to stderr.
    """

    network: str
    batch: int
    threads: int
    folder: str = ""
    layer: Any = None
    verbose: bool = False

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}{f', {self.layer}' if self.layer else ''}"


@dataclass(frozen=True)
class Work:
    """What a process is to do.

    Attributes:
        process: its name; what has the same name shares a process.
        function: "module:name"; gets the case, or whatever stands in its place.
        settings: its keyword arguments.
    """

    process: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A row of a table.

    Attributes:
        name: of the row.
        group: "ours" or "peers"; forms of a group have equal weights.
        run: its function makes the call that is measured: without arguments, returning probabilities (N, classes), a
            loss, or nothing.
        file: its function writes what `run` reads. It runs once for all forms that need it, before anything is
            measured, in a process that ends then.
        exact: whether it computes in float32, so that its outputs must be those of its group's first such form.
        reference: whether it may be what the others' speed is given in units of: the fastest one is.
        slow: called with one clip, and only `SLOW_CALLS` times after the first.
    """

    name: str
    group: str
    run: Work
    file: Work | None = None
    exact: bool = True
    reference: bool = False
    slow: bool = False


@dataclass
class Measured:
    """What was found of a form.

    Attributes:
        form: it.
        batch: clips of a call.
        seconds: of one call, in each round in which it took part.
        start: seconds until its first call had ended, compiling included.
        difference: largest, of an output from those of its group's first exact form; None before that.
        failure: why it was not measured; empty if it was.
    """

    form: Form
    batch: int
    seconds: list[float] = field(default_factory=list)
    start: float = math.nan
    difference: float | None = None
    failure: str = ""

    @property
    def differs(self) -> bool:
        """Whether it computes something else than it should."""
        return self.form.exact and self.difference is not None and not self.difference < BOUND


MATMUL = Work("matmul", "measuring:matrix_product")


class Failed(Exception):
    """Work that could not be done; says why in one line."""


class Processes:
    """Processes by name. They start when they are needed and end with the block.

    Args:
        threads: of each.
        verbose: whether what frameworks print reaches stderr.
    """

    def __init__(self, threads: int, verbose: bool = False) -> None:
        self._threads, self._verbose = threads, verbose
        self._processes: dict[str, Worker] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.end(name)

    def do(self, work: Work, case: Any) -> Any:
        """What the function gives; raises Failed, as the other methods do."""
        return self._ask(work.process, "do", work.function, work.settings, case)

    def open(self, name: str, work: Work, case: Any) -> Any:
        """Makes a call, keeps it by a name, and calls it once. Returns its outputs as an array, or None."""
        return self._ask(work.process, "open", name, work.function, work.settings, case)

    def seconds(self, name: str, process: str, *, warm: bool = True) -> float:
        """How long the call of this name takes, after another one unless `warm` is False."""
        return self._ask(process, "seconds", name, warm)

    def close(self, name: str, process: str) -> None:
        """Forgets the call of this name."""
        self._ask(process, "close", name)

    def end(self, process: str) -> None:
        """Ends a process, if there is one of this name."""
        if process in self._processes:
            self._processes.pop(process).end(grace=1)  # libraries clean up, unless it is busy

    def _ask(self, process: str, *question: Any) -> Any:
        if process not in self._processes:
            os.environ.update(_environment(self._threads))  # before any library of its is loaded, and inherited by it
            self._processes[process] = Worker(_serve, self._verbose)
        try:
            return self._processes[process].ask(*question)
        except WorkerDied as error:
            del self._processes[process]
            raise Failed(f"{error}; --verbose shows what it printed") from error


def _environment(threads: int) -> dict[str, str]:
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "CUDA_VISIBLE_DEVICES": "-1",  # all forms run on the CPU
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else torch keeps a pool of processes
    }


def _serve(pipe: Any, verbose: bool) -> None:
    """Answers until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted too, and ends this
    if not verbose:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # what frameworks print is not part of the table
    warnings.simplefilter("ignore")
    calls: dict[str, Callable[[], Any]] = {}
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:  # of a process that was killed
            return
        try:
            answer = _QUESTIONS[question](calls, *arguments)
        except ImportError as error:
            answer = Failed(f"not installed: {error}; pip install -e '.[bench]'")
        except Exception as error:  # of any kind: it is for the table
            answer = Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        pipe.send(answer)


def function_of(name: str) -> Callable[..., Any]:
    """The function that a text "module:name" means."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _do(calls: dict[str, Any], function: str, settings: Mapping[str, Any], case: Any) -> Any:
    return function_of(function)(case, **settings)


def _open(calls: dict[str, Any], name: str, function: str, settings: Mapping[str, Any], case: Any) -> Any:
    calls[name] = function_of(function)(case, **settings)
    outputs = calls[name]()
    if outputs is not None and not np.all(np.isfinite(outputs)):
        raise ValueError("its outputs are not finite")
    return outputs


def _seconds(calls: dict[str, Any], name: str, warm: bool) -> float:
    if warm:
        calls[name]()
    start, elapsed, count = time.perf_counter(), 0.0, 0
    while elapsed < LEAST_SECONDS:
        calls[name]()
        elapsed, count = time.perf_counter() - start, count + 1
    return elapsed / count


def _close(calls: dict[str, Any], name: str) -> None:
    del calls[name]


_QUESTIONS: dict[str, Callable[..., Any]] = {"do": _do, "open": _open, "seconds": _seconds, "close": _close}


@dataclass
class Measurement:
    """A table's figures: of the forms, and of the matrix product that took its turn among them, in FLOP/s."""

    case: Case
    forms: list[Measured]
    flops: list[float]


def measure(forms: Sequence[Form], case: Case, rounds: int) -> Measurement:
    """Measures forms in turns.

    Processes are fresh: what torch compiled for another batch would make it compile for any batch now.
    """
    with tempfile.TemporaryDirectory() as folder, Processes(case.threads, case.verbose) as processes:
        return measure_in(processes, forms, replace(case, folder=folder), rounds)


def measure_in(processes: Processes, forms: Sequence[Form], case: Case, rounds: int) -> Measurement:
    """The same in processes that may have measured other cases before."""
    failures = write_files(processes, forms, case)
    found = _open_forms(processes, forms, case, failures)
    processes.open("matmul", MATMUL, case)
    flops = []
    for number in tqdm(range(rounds), f"{case}, rounds", leave=False, file=sys.stderr):
        flops.append(2 * MATMUL_SIZE**3 / processes.seconds("matmul", MATMUL.process))
        for row in found:
            if not row.failure and not (row.form.slow and number >= SLOW_CALLS):
                _take_turn(row, processes)
    for row in found:
        if not row.failure:
            processes.close(row.form.name, row.form.run.process)
    return Measurement(case, found, flops)


def _take_turn(row: Measured, processes: Processes) -> None:
    try:
        row.seconds.append(processes.seconds(row.form.name, row.form.run.process, warm=not row.form.slow))
    except Failed as error:
        row.failure = str(error)


def write_files(processes: Processes, forms: Sequence[Form], case: Case) -> dict[str, str]:
    """Writes the forms' files; returns why those that could not be written could not, by `repr` of the work."""
    failures: dict[str, str] = {}
    first: dict[str, Form] = {}  # that needs a file
    for form in forms:
        if form.file is not None:
            first.setdefault(repr(form.file), form)
    for key, form in first.items():
        start = time.monotonic()
        try:
            processes.do(form.file, case)
        except Failed as error:
            failures[key] = str(error)
        say(f"{case}: file of {form.name} {'failed' if key in failures else 'written'}, {_since(start)}")
    for form in first.values():
        processes.end(form.file.process)
    return failures


def _open_forms(processes: Processes, forms: Sequence[Form], case: Case, failures: Mapping[str, str]) -> list[Measured]:
    """Makes and calls every form for the first time, and compares what they put out."""
    found, expected = [], {}
    for form in forms:
        row = Measured(form, 1 if form.slow else case.batch, failure=failures.get(repr(form.file), ""))
        found.append(row)
        if row.failure:
            continue
        start = time.monotonic()
        try:
            outputs = processes.open(form.name, form.run, replace(case, batch=row.batch))
        except Failed as error:
            row.failure = str(error)
        else:
            row.start = time.monotonic() - start
            if form.exact:
                expected.setdefault(form.group, outputs)
            row.difference = _difference(outputs, expected.get(form.group))
        say(f"{case}: {form.name} {'failed' if row.failure else 'ready'}, {_since(start)}")
    return found


def _difference(actual: Any, expected: Any) -> float | None:
    """Largest difference of probabilities (N, classes), of as many clips as there are of both; None of losses."""
    if np.ndim(actual) != 2 or np.ndim(expected) != 2:
        return None
    clips = min(len(actual), len(expected))
    return float(np.abs(actual[:clips] - expected[:clips]).max())


def matrix_product(case: Any) -> Callable[[], None]:
    """A large float32 matrix product, for the machine's speed."""
    draw = np.random.default_rng(0)
    matrix = draw.random((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    result = np.empty_like(matrix)

    def call() -> None:
        np.matmul(matrix, matrix, out=result)

    return call


def say(text: str) -> None:
    """Tells of progress, away from the tables."""
    tqdm.write(text, file=sys.stderr)


def _since(start: float) -> str:
    return f"{time.monotonic() - start:.1f} s"
