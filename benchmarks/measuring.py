"""Measurement of several implementations in turns, with a separate process for each framework.

In each round every implementation is called twice in succession, and only the second call is timed: after the call of
another framework, its threads may still spin and the caches hold its data. A short call is repeated, and the mean is
taken. Neither this module nor the benchmark scripts import a framework: implementations are named by strings and
imported by the process that runs them.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from x3d_tf.processes import TimedOut, Worker, WorkerDied

BOUND = 1e-5  # maximum difference of probabilities between float32 implementations with equal weights
SLOW_CALLS = 2  # timed calls of a slow implementation
LEAST_SECONDS = 0.02  # minimum duration of a timing
MATMUL_SIZE = 2048  # of the matrix product that measures the speed of the CPU
OVER_BUDGET = "skipped: not ready within the time budget"


@dataclass(frozen=True)
class Case:
    """Computation that all implementations of a table perform.

    Attributes:
        network: name of the X3D variant.
        batch: batch size.
        threads: number of threads per process.
        folder: temporary folder of this case.
        layer: layer to compute instead of the complete network.
        verbose: whether to show the output of the frameworks on stderr.
        device: "cpu", which hides all GPUs from the processes, or "gpu".
        tf32: whether float32 products on a GPU are computed in TF32.
    """

    network: str
    batch: int
    threads: int
    folder: str = ""
    layer: Any = None
    verbose: bool = False
    device: str = "cpu"
    tf32: bool = False

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}{f', {self.layer}' if self.layer else ''}"


@dataclass(frozen=True)
class Budget:
    """Time limits of a table, as values of `time.monotonic`.

    Attributes:
        opening: no implementation is created that would be ready later, if it takes as long as the slowest one before
            it in its process.
        stop: processes that are still creating an implementation then are stopped, with all they have created.
        end: no round starts that would end later, if it takes as long as the longest one before it.
    """

    opening: float = math.inf
    stop: float = math.inf
    end: float = math.inf

    @classmethod
    def starting_now(cls, seconds: float) -> "Budget":
        """Returns the limits of a table that may take a number of seconds from now on: most of them to compile."""
        now = time.monotonic()
        return cls(now + 0.6 * seconds, now + 0.85 * seconds, now + seconds)


UNLIMITED = Budget()


@dataclass(frozen=True)
class Job:
    """A function call in a worker process.

    Attributes:
        process: name of the process; jobs with the same name share a process.
        function: function as "module:name". Its argument is the case.
        settings: keyword arguments of the function.
    """

    process: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """An implementation of the network, a row of a table.

    Attributes:
        name: name of the row.
        group: "ours" or "peers"; implementations in a group have equal weights.
        run: job that returns the function to measure, which has no arguments and returns probabilities (N, classes), a
            loss, or nothing. Its attribute `peak_bytes`, if it has one, is the peak of the device's memory in its first
            call.
        file: job that writes the file that `run` reads. It runs once for all implementations that share it, before the
            measurement, in a process that is stopped afterwards.
        exact: whether its outputs must match those of the first exact implementation in its group.
        bound: difference of the outputs from which they do not match.
        reference: whether it can be the unit of speed; the fastest such implementation is.
        slow: whether to call it with one clip, and only `SLOW_CALLS` times after the first call.
    """

    name: str
    group: str
    run: Job
    file: Job | None = None
    exact: bool = True
    bound: float = BOUND
    reference: bool = False
    slow: bool = False


@dataclass
class Result:
    """Measurements of an implementation.

    Attributes:
        implementation: the implementation.
        batch: batch size.
        seconds: duration of one call in each round.
        start: seconds until the end of the first call, including compilation.
        difference: maximum difference of the probabilities, or relative difference of the first loss, from those of the
            first exact implementation in the group; None if they were not compared.
        peak_bytes: peak of the device's memory in the first call; None if it is not known.
        failure: reason for a failed measurement; empty if it succeeded.
    """

    implementation: Implementation
    batch: int
    seconds: list[float] = field(default_factory=list)
    start: float = math.nan
    difference: float | None = None
    peak_bytes: int | None = None
    failure: str = ""

    @property
    def differs(self) -> bool:
        """True if the implementation is exact and its outputs differ by its bound or more."""
        within = self.difference is None or self.difference < self.implementation.bound
        return self.implementation.exact and not within


MATMUL = Job("matmul", "measuring:matrix_product")


class JobFailed(Exception):
    """Raised when a job fails; the message is one line."""


class Processes:
    """Context manager for named worker processes, which start on first use and are stopped on exit.

    The methods raise JobFailed if a job fails, and stop its process if it has not replied at a deadline, a value of
    `time.monotonic`.

    Args:
        threads: number of threads per process.
        verbose: whether to show the output of the frameworks on stderr.
        device: see `Case`.
    """

    def __init__(self, threads: int, verbose: bool = False, device: str = "cpu") -> None:
        self._threads, self._verbose, self._device, self._killed = threads, verbose, device, False
        self._processes: dict[str, Worker] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.end(name)

    def start(self, process: str) -> None:
        """Starts a process if it is not running."""
        if self._killed:
            raise JobFailed("interrupted")
        if process not in self._processes:
            # Inherited by the process, before it loads any library.
            os.environ.update(_environment(self._threads, self._device))
            self._processes[process] = Worker(_serve, self._verbose)

    def run(self, job: Job, case: Any, *, deadline: float = math.inf) -> Any:
        """Runs a job and returns its result."""
        return self._request(job.process, "run", job.function, job.settings, case, deadline=deadline)

    def open(self, name: str, job: Job, case: Any, *, deadline: float = math.inf) -> Any:
        """Creates the function to measure, stores it under a name and calls it once. Returns its outputs, or None."""
        return self._request(job.process, "open", name, job.function, job.settings, case, deadline=deadline)

    def peak_bytes(self, name: str, process: str) -> int | None:
        """Returns the peak of the device's memory in the first call of a stored function; None if it is not known."""
        return self._request(process, "peak_bytes", name)

    def seconds(self, name: str, process: str, *, warm: bool = True) -> float:
        """Returns the duration of a call of a stored function, after a warm-up call if `warm` is True."""
        if process not in self._processes:
            raise JobFailed("its process has ended")
        return self._request(process, "seconds", name, warm)

    def close(self, name: str, process: str) -> None:
        """Deletes a stored function, if its process is running."""
        if process in self._processes:
            self._processes[process].ask("close", name)

    def end(self, process: str) -> None:
        """Stops a process if it is running."""
        if process in self._processes:
            self._processes.pop(process).end(grace=1)  # lets libraries clean up

    def kill(self) -> None:
        """Kills all processes. Requests of other threads, and all later ones, raise JobFailed."""
        self._killed = True
        for worker in list(self._processes.values()):
            worker.kill(grace=1)

    def _request(self, process: str, *request: Any, deadline: float = math.inf) -> Any:
        self.start(process)
        timeout = max(deadline - time.monotonic(), 0) if math.isfinite(deadline) else None
        try:
            return self._processes[process].ask(*request, timeout=timeout)
        except WorkerDied as error:
            self._processes.pop(process, None)
            raise JobFailed(f"{error}; --verbose shows what it printed") from error
        except TimedOut as error:
            self._processes.pop(process).kill()
            raise JobFailed(OVER_BUDGET) from error


def _environment(threads: int, device: str) -> dict[str, str]:
    shared = {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if device == "cpu":
        return shared | {
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_PLATFORMS": "cpu",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # without it torch keeps a pool of processes
        }
    return shared | {
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        # The processes share the memory of the GPU.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }


def _serve(pipe: Any, verbose: bool) -> None:
    """Serves requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and stops this process
    if not verbose:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # keeps the output of the frameworks out of the table
    warnings.simplefilter("ignore")
    calls: dict[str, Callable[[], Any]] = {}
    while True:
        try:
            request, *arguments = pipe.recv()
        except EOFError:  # the parent process was killed
            return
        try:
            response = _HANDLERS[request](calls, *arguments)
        except ImportError as error:
            response = JobFailed(f"not installed: {error}; pip install -e '.[bench]'")
        except Exception as error:  # frameworks raise errors of any type
            response = JobFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        pipe.send(response)


def function_of(name: str) -> Callable[..., Any]:
    """Imports the function named by "module:name"."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _run(calls: dict[str, Any], function: str, settings: Mapping[str, Any], case: Any) -> Any:
    return function_of(function)(case, **settings)


def _open(calls: dict[str, Any], name: str, function: str, settings: Mapping[str, Any], case: Any) -> Any:
    calls[name] = function_of(function)(case, **settings)
    outputs = calls[name]()
    if outputs is not None and not np.all(np.isfinite(outputs)):
        raise ValueError("its outputs are not finite")
    return outputs


def _peak_bytes(calls: dict[str, Any], name: str) -> int | None:
    return getattr(calls[name], "peak_bytes", None)


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


_HANDLERS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "open": _open,
    "peak_bytes": _peak_bytes,
    "seconds": _seconds,
    "close": _close,
}


@dataclass
class Measurement:
    """Measurements of a table: the results of the implementations, and the speed of the matrix product in FLOP/s.

    `flops` has one value for each round; it is empty if the device is a GPU.
    """

    case: Case
    results: list[Result]
    flops: list[float]


def measure(
    implementations: Sequence[Implementation], case: Case, rounds: int, budget: Budget = UNLIMITED
) -> Measurement:
    """Measures implementations in turns, in new processes.

    In a process that has compiled for another batch size, torch would compile for dynamic batch sizes.
    """
    with tempfile.TemporaryDirectory() as folder, Processes(case.threads, case.verbose, case.device) as processes:
        return measure_in_processes(processes, implementations, replace(case, folder=folder), rounds, budget)


def measure_in_processes(
    processes: Processes,
    implementations: Sequence[Implementation],
    case: Case,
    rounds: int,
    budget: Budget = UNLIMITED,
) -> Measurement:
    """Measures implementations in turns, in processes that may have measured other cases before."""
    failures = write_files(processes, implementations, case)
    results = _open_all(processes, implementations, case, failures, budget)
    has_peak = case.device == "cpu"
    if has_peak:
        processes.open("matmul", MATMUL, case)
    flops, longest = [], 0.0
    for number in tqdm(range(rounds), f"{case}, rounds", leave=False, file=sys.stderr):
        start = time.monotonic()
        if number and start + longest > budget.end:
            break
        if has_peak:
            flops.append(2 * MATMUL_SIZE**3 / processes.seconds("matmul", MATMUL.process))
        for result in results:
            if not result.failure and not (result.implementation.slow and number >= SLOW_CALLS):
                _time_once(result, processes, budget)
        longest = max(longest, time.monotonic() - start)
    for result in results:
        if not result.failure:
            processes.close(result.implementation.name, result.implementation.run.process)
    return Measurement(case, results, flops)


def _time_once(result: Result, processes: Processes, budget: Budget) -> None:
    implementation = result.implementation
    if not result.seconds and time.monotonic() > budget.end:
        result.failure = OVER_BUDGET
        return
    try:
        seconds = processes.seconds(implementation.name, implementation.run.process, warm=not implementation.slow)
        result.seconds.append(seconds)
    except JobFailed as error:
        result.failure = str(error)


def write_files(processes: Processes, implementations: Sequence[Implementation], case: Case) -> dict[str, str]:
    """Writes the files of the implementations; returns the reasons for failures, by `repr` of the job."""
    failures: dict[str, str] = {}
    first: dict[str, Implementation] = {}  # of those that share a file
    for implementation in implementations:
        if implementation.file is not None:
            first.setdefault(repr(implementation.file), implementation)
    for key, implementation in first.items():
        start = time.monotonic()
        try:
            processes.run(implementation.file, case)
        except JobFailed as error:
            failures[key] = str(error)
        log(f"{case}: file of {implementation.name} {'failed' if key in failures else 'written'}, {_since(start)}")
    for implementation in first.values():
        processes.end(implementation.file.process)
    return failures


def _open_all(
    processes: Processes,
    implementations: Sequence[Implementation],
    case: Case,
    failures: Mapping[str, str],
    budget: Budget,
) -> list[Result]:
    """Creates and calls every implementation once, and compares the outputs.

    For a GPU, the processes do so in parallel: their time is mostly that of compilers, which run on the CPU.
    """
    results = []
    for implementation in implementations:
        batch, failure = 1 if implementation.slow else case.batch, failures.get(repr(implementation.file), "")
        results.append(Result(implementation, batch, failure=failure))
    if case.device == "cpu":
        outputs = [_open_rows(processes, results, case, budget)]
    else:
        outputs = _open_in_parallel(processes, results, case, budget)
    _compare(results, {name: output for opened in outputs for name, output in opened.items()})
    return results


def _open_in_parallel(
    processes: Processes, results: Sequence[Result], case: Case, budget: Budget
) -> list[dict[str, Any]]:
    by_process: dict[str, list[Result]] = {}
    for result in results:
        by_process.setdefault(result.implementation.run.process, []).append(result)
    for name in by_process:
        processes.start(name)  # here, because only the main thread can delay signals
    with ThreadPoolExecutor(len(by_process)) as pool:
        opening = [pool.submit(_open_rows, processes, rows, case, budget) for rows in by_process.values()]
        try:
            return [future.result() for future in opening]
        except KeyboardInterrupt:
            processes.kill()  # else the threads would wait for them
            raise


def _open_rows(processes: Processes, results: Sequence[Result], case: Case, budget: Budget) -> dict[str, Any]:
    """Creates and calls implementations once, in their order; returns the outputs by name."""
    outputs: dict[str, Any] = {}
    longest: dict[str, float] = {}  # by process
    for result in results:
        implementation, start = result.implementation, time.monotonic()
        process = implementation.run.process
        if not result.failure and start + longest.get(process, 0) > budget.opening:
            result.failure = OVER_BUDGET
        if result.failure:
            continue
        try:
            own_case = replace(case, batch=result.batch)
            outputs[implementation.name] = processes.open(
                implementation.name, implementation.run, own_case, deadline=budget.stop
            )
            result.peak_bytes = processes.peak_bytes(implementation.name, process)
            result.start = time.monotonic() - start
        except JobFailed as error:
            result.failure = str(error)
        longest[process] = max(longest.get(process, 0), time.monotonic() - start)
        log(f"{case}: {implementation.name} {'failed' if result.failure else 'ready'}, {_since(start)}")
    return outputs


def _compare(results: Sequence[Result], outputs: Mapping[str, Any]) -> None:
    """Sets the differences from the first exact implementation of each group that has outputs."""
    expected: dict[str, Any] = {}
    for result in results:
        implementation = result.implementation
        if implementation.name in outputs:
            if implementation.exact:
                expected.setdefault(implementation.group, outputs[implementation.name])
            result.difference = _difference(outputs[implementation.name], expected.get(implementation.group))


def _difference(actual: Any, expected: Any) -> float | None:
    """Returns the maximum difference of probabilities (N, classes) over the common clips, or that of losses, relative.

    None if there is nothing to compare.
    """
    if actual is None or expected is None:
        return None
    if np.ndim(actual) != 2:
        return abs(actual - expected) / abs(expected)
    clips = min(len(actual), len(expected))
    return float(np.abs(actual[:clips] - expected[:clips]).max())


def matrix_product(case: Any) -> Callable[[], None]:
    """Returns a function that computes a large float32 matrix product, to measure the speed of the CPU."""
    draw = np.random.default_rng(0)
    matrix = draw.random((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    result = np.empty_like(matrix)

    def call() -> None:
        np.matmul(matrix, matrix, out=result)

    return call


def log(text: str) -> None:
    """Prints a progress message to stderr."""
    tqdm.write(text, file=sys.stderr)


def _since(start: float) -> str:
    return f"{time.monotonic() - start:.1f} s"
