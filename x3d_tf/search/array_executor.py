"""Scoring of candidates by equal processes over a shared folder, such as the tasks of a SLURM array. No TensorFlow.

All processes run the same command, at any time and in any number. The one that holds the lock of the trace coordinates:
it asks for the candidates of a round, and appends their scores to the trace. The others read the trace, from which the
candidates follow. Each of them, also the coordinator, trains candidates that no other one has claimed; see
`SharedTraining`. If the coordinator dies, another process takes its place. Imports no TensorFlow.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from x3d_tf import signals
from x3d_tf.errors import UserError, first_few
from x3d_tf.locks import Locked, owner_of
from x3d_tf.processes import WorkerDied
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.executor import STOPPED_STATUSES, Remote
from x3d_tf.search.loop import require_successes
from x3d_tf.search.search import Latency, Search
from x3d_tf.search.shared import MOST_KILLS, SharedTraining
from x3d_tf.search.trace import TRACE_NAME, NotMeasured, follow_trace
from x3d_tf.terminal import tell
from x3d_tf.text import counted

POLL = 2.0  # seconds

_T = TypeVar("_T")


class ArrayExecutor:
    """Trains candidates that no other process trains, and collects the scores of all processes. A context manager.

    On Ctrl-C and after errors the training is asked to stop, so that it saves a checkpoint.

    Args:
        training: the training.
    """

    def __init__(self, training: SharedTraining) -> None:
        self._training, self._remote = training, Remote(training)
        self._offered: tuple[Candidate, ...] = ()
        self._error: BaseException | None = None
        self._changed, self._idle, self._stops = threading.Event(), threading.Event(), threading.Event()
        self._deaths: dict[tuple[Candidate, int], int] = {}
        self._waiting: tuple[Candidate, ...] = ()  # those that other processes were seen to train
        self._thread = threading.Thread(target=self._train, daemon=True)

    def __enter__(self) -> "ArrayExecutor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        self._changed.set()
        self._remote.stop()
        self._thread.join()

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score as soon as a process has written it; for the coordinator.

        Raises:
            WriteError: a file of a training cannot be written.
            Terminated: the training process got SIGTERM, which schedulers send to all processes.
        """
        left = [*candidates]
        while left:
            self.offer(left)
            for candidate in [*left]:
                score = self._training.result(candidate)
                if score is not None:
                    left.remove(candidate)
                    yield candidate, score
            if left:
                self.wait()

    def offer(self, candidates: Sequence[Candidate]) -> None:
        """Sets the candidates that this process may train from now on."""
        if self._offered != tuple(candidates):
            self._offered = tuple(candidates)
            self._changed.set()

    def wait(self) -> None:
        """Waits for some seconds; raises the error of a training in this process, if any."""
        self._stops.wait(POLL)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Ends the training process when it has finished, so that it frees the memory of its devices."""
        self._offered = ()
        self._idle.clear()
        self._changed.set()
        while not self._idle.wait(POLL):
            self.wait()
        self._remote.end()

    def _train(self) -> None:
        """Trains offered candidates until the executor is stopped; the body of the thread."""
        try:
            while not self._stops.is_set():
                self._changed.clear()
                if not self._train_next():
                    self._idle.set()
                    self._changed.wait(POLL)
        except Exception as error:
            self._error = error
        except KeyboardInterrupt as error:
            self._error = error

    def _train_next(self) -> bool:
        """Trains the first offered candidate that has no score and that no other process trains; False without one."""
        left = tuple(candidate for candidate in self._offered if self._training.result(candidate) is None)
        for candidate in left:
            if self._ask(candidate) or self._changed.is_set():
                return True
        if left and left != self._waiting:
            claims = [self._training.claim(candidate) for candidate in left]
            owners = first_few([f"{claim} ({owner_of(claim) or 'not locked any more'})" for claim in claims])
            tell(f"waiting for {counted(len(left), 'training')} of other processes: {owners}")
            self._waiting = left
        return False

    def _ask(self, candidate: Candidate) -> bool:
        """Trains a candidate in the child process; returns False if it has no score afterwards."""
        name = self._training.log(candidate).stem
        try:
            score = self._remote.ask(candidate)
        except WorkerDied as error:
            if self._stops.is_set() or error.status in STOPPED_STATUSES:
                raise signals.Terminated from error
            if error.is_kill:
                self._training.count_kill(candidate)
            else:
                self._count_death(candidate, error)
            tell(f"the training of {name} starts again from its last checkpoint: {error}")
            return False
        except Locked:
            return False
        tell(f"{name}: {f'failed: {score.reason}' if score.reason else 'trained'}")
        return self._training.result(candidate) is not None  # else waits: the file system may have an error

    def _count_death(self, candidate: Candidate, error: WorkerDied) -> None:
        """Raises `UserError` if too many processes exited by themselves since the last checkpoint of a candidate."""
        key = candidate, self._training.progress(candidate)
        self._deaths[key] = self._deaths.get(key, 0) + 1
        if self._deaths[key] > MOST_KILLS:
            name = self._training.log(candidate).stem
            raise UserError(f"the process that trains {name} cannot be started: {error}") from error


def take_part(coordinate: Callable[[int | None], _T], follow: Callable[[], "Follower"]) -> _T:
    """Coordinates a search as soon as no other process does, and follows it until then.

    A process that followed a search to its end also coordinates it, because the one before may have died before it
    wrote the reports.

    Args:
        coordinate: runs the search to its end, or raises `Locked` if another process coordinates it. It receives
            `followed` of `run_search`.
        follow: returns the follower.

    Returns:
        The result of `coordinate`.
    """
    follower = None
    while True:
        try:
            return coordinate(follower.first_scores if follower else None)
        except Locked as error:
            if follower is None:
                tell(f"{str(error).partition(';')[0]} and coordinates the search; this process trains candidates")
                follower = follow()
        follower.follow()


class Follower:
    """A process of an array that does not coordinate the search.

    Args:
        folder: the work folder.
        settings: the settings of the search; see `open_trace`.
        new_search: returns the search before its first score, with a function that tells latencies.
        executor: trains the candidates.

    Attributes:
        first_scores: number of scores in the trace when it was first read; None before.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        new_search: Callable[[Latency], Search],
        executor: ArrayExecutor,
    ) -> None:
        self._path, self._settings = folder / TRACE_NAME, settings
        self._new_search, self._executor = new_search, executor
        self._size = -1
        self.first_scores: int | None = None

    def follow(self) -> None:
        """Offers the candidates that follow from the trace to the executor, and waits for some seconds.

        Raises:
            UserError: the trace is damaged or of a search with other settings, a training in this process found an
                error, or all networks of a round failed since this object was created.
        """
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size != self._size:
            self._executor.offer(self._pending())
            self._size = size
        self._executor.wait()

    def _pending(self) -> tuple[Candidate, ...]:
        """Returns the candidates of the round; none if they do not follow from the trace yet, or after the last one."""
        trace = follow_trace(self._path.parent, self._settings)
        scores = trace.scores if trace else 0
        if self.first_scores is None:
            self.first_scores = scores
        if trace is None:
            return ()
        try:
            search = self._new_search(trace.known)
            trace.resume(search)
        except NotMeasured:
            return ()
        if scores > self.first_scores:  # earlier failures are those that the repeated command scores again
            require_successes(search)
        return search.pending()
