"""Worker processes that run artefacts, one per runtime and thread count: TensorFlow's thread count is per process.

A runtime that is missing, rejects a file or crashes its process raises an error in the caller and affects nothing else.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf.processes import Worker, WorkerDied
from x3d_tf.runtimes.runners import EXTRAS, Artefact, Runner, limit_tensorflow, open_artefact, probabilities
from x3d_tf.startup import Mode, kept_back, mode, set_mode

_CLIPS_PER_MESSAGE = 16


@dataclass(frozen=True)
class ArtefactInfo:
    """Properties of an opened artefact; see `runtimes.Runner`."""

    format: str
    clip: tuple[int | None, ...]
    batch: int | None
    operators: Mapping[str, int]
    card: str


class RuntimeNotInstalled(Exception):
    """Raised when the runtime of an artefact is not installed."""


class ArtefactError(Exception):
    """Raised when an artefact cannot be opened or run; the message is one line."""


class Workers:
    """Context manager for worker processes, which start on first use and are stopped on exit.

    Every method raises RuntimeNotInstalled or ArtefactError if the artefact cannot be run.
    """

    def __init__(self) -> None:
        self._workers: dict[tuple[str, int], Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.end()  # without waiting: it has nothing to save

    def open(self, artefact: Artefact, threads: int) -> ArtefactInfo:
        """Opens an artefact in the worker with this thread count."""
        return self._request(artefact, threads, "open")

    def probabilities(self, artefact: Artefact, threads: int, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the probabilities of clips, (N, classes)."""
        size = _CLIPS_PER_MESSAGE
        parts = [clips[first : first + size] for first in range(0, len(clips), size)]
        return np.concatenate([self._request(artefact, threads, "probabilities", part) for part in parts])

    def seconds(self, artefact: Artefact, threads: int, clips: NDArray[np.uint8]) -> float:
        """Returns the time of one call per clip, after a warm-up call."""
        return self._request(artefact, threads, "seconds", clips)

    def _request(self, artefact: Artefact, threads: int, *request: Any) -> Any:
        key = (artefact.runtime, threads)
        if key not in self._workers:
            self._workers[key] = Worker(_serve, threads, mode())
        try:
            return self._workers[key].ask(artefact, *request)
        except WorkerDied as error:
            raise ArtefactError(str(error)) from error


def _serve(pipe: Any, threads: int, startup: Mode) -> None:
    """Serves requests until the pipe is closed."""
    set_mode(startup)
    runners: dict[Artefact, Runner] = {}
    while True:
        try:
            artefact, request, *arguments = pipe.recv()
        except EOFError:  # the parent process was killed
            return
        pipe.send(_respond(runners, threads, artefact, request, *arguments))


def _respond(runners: dict[Artefact, Runner], threads: int, artefact: Artefact, request: str, *arguments: Any) -> Any:
    """Returns the response to a request, or the exception to raise in the parent; caches artefacts in `runners`."""
    try:
        if artefact not in runners:
            with kept_back(show_on_failure=False):  # the table shows the error
                if artefact.runtime == "tensorflow":
                    limit_tensorflow(threads)  # the first artefact of a process determines them
                runners[artefact] = open_artefact(artefact, threads)
        return _HANDLERS[request](runners[artefact], *arguments)
    except ImportError as error:
        extra = EXTRAS.get(artefact.runtime)
        reason = " ".join(str(error).split())
        return RuntimeNotInstalled(f"{reason}; pip install 'x3d_tf[{extra}]'" if extra else reason)
    except Exception as error:  # runtimes raise errors of any type
        return ArtefactError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _info(runner: Runner) -> ArtefactInfo:
    return ArtefactInfo(runner.format, runner.clip, runner.batch, dict(runner.operators), runner.card)


def _seconds(runner: Runner, clips: NDArray[np.uint8]) -> float:
    batch = clips.take(range(runner.batch or 1), axis=0, mode="wrap")
    runner(batch)  # warm-up: the previous runtime may still hold the caches and spin its threads
    start = time.perf_counter()
    runner(batch)
    return (time.perf_counter() - start) / len(batch)


_HANDLERS: dict[str, Callable[..., Any]] = {"open": _info, "probabilities": probabilities, "seconds": _seconds}
