"""Scoring of the candidates of a search: in this process, in worker processes, or by another executor.

Imports no TensorFlow.
"""

import errno
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from x3d_tf import registry, signals, startup
from x3d_tf.errors import UserError, first_line
from x3d_tf.files import WriteError, os_errors_as_write_error
from x3d_tf.locks import Locked
from x3d_tf.processes import Worker, WorkerDied
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.terminal import Terminal

_OF_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOLCK)
_LONGEST_REASON = 1000  # characters, so that the trace stays below its size limit
TRAININGS_PER_PROCESS = 10  # TensorFlow keeps about 180 MB of each training (measured) until its process ends
_GRACE = 5.0  # seconds that an idle process may take to exit
_STOPPED = 143  # exit status of a worker that was asked to stop by SIGTERM
STOPPED_STATUSES = (_STOPPED, -signal.SIGTERM)


class Executor(Protocol):
    """Scores the candidates of a round."""

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score as soon as it is known, in any order."""


class Training(Protocol):
    """Trains and validates candidates; picklable."""

    def __call__(self, candidate: Candidate) -> Score:
        """Returns the score. An exception is a failure of the candidate, except `WriteError`."""

    def log(self, candidate: Candidate) -> Path:
        """Returns the file, in an existing folder, that gets the output of the process during the training."""

    def progress(self, candidate: Candidate) -> int:
        """Returns a number that grows with each checkpoint of the training; 0 without one."""


class SerialExecutor:
    """Scores candidates one after another in this process.

    Args:
        score: trains and validates a candidate. An exception is a failure of the candidate, except `WriteError`: the
            others would also fail on a full disk.
    """

    def __init__(self, score: Callable[[Candidate], Score]) -> None:
        self._score = score

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score, in the given order."""
        for candidate in candidates:
            yield candidate, scored(self._score, candidate)


def scored(score: Callable[[Candidate], Score], candidate: Candidate) -> Score:
    """Returns the score of a candidate; that of a failure if `score` raises an exception.

    Long reasons of failures are shortened.

    Raises:
        WriteError: a file cannot be written, or the file system has an error, which the other candidates would get too.
        Locked: another process trains the candidate.
    """
    started = time.monotonic()
    try:
        found = score(candidate)
    except (WriteError, Locked):
        raise
    except Exception as error:  # training can raise anything, such as errors of the device's memory
        if isinstance(error, OSError) and error.errno in _OF_STORAGE:
            raise WriteError(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}") from error
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        found = Score(None, seconds=time.monotonic() - started, reason=f"{kind}{first_line(error)}")
    return replace(found, reason=found.reason[:_LONGEST_REASON]) if found.reason else found


@dataclass(frozen=True)
class Scored:
    """A training whose exceptions are failures of the candidate, except those that `scored` raises; picklable.

    Attributes:
        training: the training.
    """

    training: Training

    def __call__(self, candidate: Candidate) -> Score:
        """Returns the score of a candidate; see `scored`."""
        return scored(self.training, candidate)

    def log(self, candidate: Candidate) -> Path:
        """Returns the file for the output of the training."""
        return self.training.log(candidate)

    def progress(self, candidate: Candidate) -> int:
        """Returns a number that grows with each checkpoint of the training."""
        return self.training.progress(candidate)


class ProcessExecutor:
    """Scores candidates in worker processes, each of which scores one after another. A context manager.

    After every `TRAININGS_PER_PROCESS` candidates, a new process takes the place of an old one.
    A process that dies, for example because the system is out of memory, is a failure of its candidate; a new process
    scores the next one. On Ctrl-C and after errors the processes are asked to stop, so that they save checkpoints.

    Args:
        trainings: the trainings, one for each process.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self._remotes = [Remote(Scored(training)) for training in trainings]
        self._free: queue.SimpleQueue[Remote] = queue.SimpleQueue()
        for remote in self._remotes:
            self._free.put(remote)

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        for remote in self._remotes:
            remote.stop()

    def end(self) -> None:
        """Ends the processes, which must not be scoring, so that they free the memory of their devices."""
        for remote in self._remotes:
            remote.end()

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score as soon as it is known.

        Raises:
            WriteError: a file of a training cannot be written.
            Terminated: a process got SIGTERM, which schedulers send to all processes.
        """
        with ThreadPoolExecutor(len(self._remotes)) as threads:  # they wait for the replies
            futures = {threads.submit(self._score, candidate): candidate for candidate in candidates}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for remote in self._remotes:
                    remote.stop()
                raise

    def _score(self, candidate: Candidate) -> Score:
        remote, started = self._free.get(), time.monotonic()
        try:
            return remote.ask(candidate)
        except WorkerDied as error:
            if error.status in STOPPED_STATUSES:
                raise signals.Terminated from error
            hint = " (out of memory?)" if error.status == -signal.SIGKILL else ""
            return Score(None, seconds=time.monotonic() - started, reason=f"{error}{hint}")
        finally:
            self._free.put(remote)


class Remote:
    """A training in a worker process, which starts on first use and again after it has died.

    Args:
        training: the training. Its exceptions are raised in this process, those that are not ours as `UserError`.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._worker: Worker | None = None
        self._trainings = 0  # of the process
        self._stopped, self._lock = False, threading.Lock()

    def ask(self, candidate: Candidate) -> Score:
        """Returns the score of a candidate.

        Raises:
            UserError: the training raised an exception, such as `WriteError` and `Locked`.
            WorkerDied: the process has died.
        """
        if self._trainings == TRAININGS_PER_PROCESS:
            self.end()
        score: Score = self._request("", candidate)
        self._trainings += 1
        return score

    def call(self, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of the training.

        Raises:
            UserError: the method raised an exception, or the process has died.
        """
        try:
            return self._request(method, *arguments)
        except WorkerDied as error:
            raise UserError(f"{method}: {error}") from error

    def _request(self, *request: Any) -> Any:
        with self._lock:
            if self._stopped:
                raise WorkerDied(_STOPPED)
            if self._worker is None:
                mode, plugins = startup.mode(), registry.plugins()
                self._worker, self._trainings = Worker(_serve, self._training, mode, plugins), 0
            worker = self._worker
        try:
            return worker.ask(*request)
        except WorkerDied:
            self._worker = None
            raise

    def end(self) -> None:
        """Ends the process, which must be idle, and waits for it. It starts again on the next use."""
        if self._worker is not None:
            self._worker.end(_GRACE)
            self._worker = None

    def stop(self) -> None:
        """Asks the process to stop; a pending request raises `WorkerDied` when it has saved its checkpoint."""
        with self._lock:
            self._stopped = True
            if self._worker is not None:
                self._worker.stop()


def _serve(pipe: Any, training: Training, mode: startup.Mode, plugins: Sequence[str]) -> None:
    """Serves requests (method, arguments) until the pipe is closed or the process is asked to stop."""
    startup.set_mode(mode)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signals.install_stop_handlers()
    tqdm.set_lock(threading.RLock())  # the default lock is shared by processes, and leaks if this one is killed
    for plugin in plugins:
        registry.load_plugin(plugin)
    try:
        while True:
            method, *arguments = pipe.recv()
            pipe.send(_reply(training, method, arguments))
    except (EOFError, ConnectionError):  # the parent has exited; killed in between, it resets the connection
        return
    except KeyboardInterrupt:
        os._exit(_STOPPED)  # without waiting for TensorFlow's threads


def _reply(training: Training, method: str, arguments: Sequence[Any]) -> Any:
    """Returns the reply to a request, or the exception to raise in the parent."""
    try:
        if not method:
            with _output_to(training.log(arguments[0])):
                return training(arguments[0])
        with _output_to(Path(os.devnull)):
            return getattr(training, method)(*arguments)
    except UserError as error:
        return error
    except Exception as error:  # training code can raise anything, also what cannot be pickled
        return UserError(f"{method or 'training'}: {type(error).__name__}: {first_line(error)}")


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Appends the output of this process to a file within the block, also that of TensorFlow's C++ code."""
    before = sys.stdout, sys.stderr
    with open(_opened(path), "a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        # A full disk is noticed where checkpoints are written, not where messages are.
        sys.stdout = sys.stderr = Terminal(file, bars=True)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            with suppress(OSError):
                file.flush()


def _opened(path: Path) -> int:
    """Returns the descriptor of a log file, or of the null device, for appending.

    Raises:
        WriteError: it cannot be written. A symbolic link, which could point to another file, and a pipe are rejected.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os_errors_as_write_error(path):
        descriptor = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) and path != Path(os.devnull):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def _exit_with_parent() -> None:
    """Ends this process when its parent has died: it would train on, and lock the run folder of its candidate."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
