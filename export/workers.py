"""Processes that run artefacts: one for each runtime and number of threads, since TensorFlow counts threads by process.

A runtime that is missing, refuses a file or brings its process down gives an error to whoever asks, and no more.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf.processes import Worker, WorkerDied
from x3d_tf.startup import Mode, kept_back, mode, set_mode

from .runtimes import EXTRAS, Artefact, Runner, open_artefact, probabilities

_SENT = 16  # clips in one message


@dataclass(frozen=True)
class Opened:
    """What an artefact says of itself; see `runtimes.Runner`."""

    form: str
    clip: tuple[int | None, ...]
    batch: int | None
    operators: Mapping[str, int]
    card: str


class NotRun(Exception):
    """An artefact whose runtime is not installed."""


class Failed(Exception):
    """An artefact that its runtime cannot open or run; says why in one line."""


class Workers:
    """The processes. They start when they are needed and end with the block."""

    def __init__(self) -> None:
        self._workers: dict[tuple[str, int], Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.end()  # at once: it holds nothing that is to be written

    def open(self, artefact: Artefact, threads: int) -> Opened:
        """Opens an artefact; raises NotRun or Failed, as the other methods do."""
        return self._ask(artefact, threads, "open")

    def probabilities(self, artefact: Artefact, threads: int, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities of clips, (N, classes)."""
        parts = [clips[first : first + _SENT] for first in range(0, len(clips), _SENT)]
        return np.concatenate([self._ask(artefact, threads, "probabilities", part) for part in parts])

    def seconds(self, artefact: Artefact, threads: int, clips: NDArray[np.uint8]) -> float:
        """How long one call takes, for each of its clips, right after another one."""
        return self._ask(artefact, threads, "seconds", clips)

    def _ask(self, artefact: Artefact, threads: int, *question: Any) -> Any:
        key = (artefact.runtime, threads)
        if key not in self._workers:
            self._workers[key] = Worker(_serve, threads, mode())
        try:
            return self._workers[key].ask(artefact, *question)
        except WorkerDied as error:
            raise Failed(str(error)) from error


def _serve(pipe: Any, threads: int, startup: Mode) -> None:
    """Answers until it is ended."""
    set_mode(startup)
    runners: dict[Artefact, Runner] = {}
    while True:
        try:
            artefact, question, *arguments = pipe.recv()
        except EOFError:  # of a process that was killed
            return
        pipe.send(_answer(runners, threads, artefact, question, *arguments))


def _answer(runners: dict[Artefact, Runner], threads: int, artefact: Artefact, question: str, *arguments: Any) -> Any:
    """What a question gives, or the error to raise where it was asked; keeps what it opens in `runners`."""
    try:
        if artefact not in runners:
            with kept_back(show_on_failure=False):  # which the table tells
                runners[artefact] = open_artefact(artefact, threads)
        return _ANSWERS[question](runners[artefact], *arguments)
    except ImportError as error:
        extra = EXTRAS.get(artefact.runtime)
        told = " ".join(str(error).split())
        return NotRun(f"{told}; pip install 'x3d_tf[{extra}]'" if extra else told)
    except Exception as error:  # of any kind: it is for the table
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _opened(runner: Runner) -> Opened:
    return Opened(runner.form, runner.clip, runner.batch, dict(runner.operators), runner.card)


def _seconds(runner: Runner, clips: NDArray[np.uint8]) -> float:
    batch = clips.take(range(runner.batch or 1), axis=0, mode="wrap")
    runner(batch)  # not counted: threads of whatever ran before may still spin, and caches are its
    start = time.perf_counter()
    runner(batch)
    return (time.perf_counter() - start) / len(batch)


_ANSWERS: dict[str, Callable[..., Any]] = {"open": _opened, "probabilities": probabilities, "seconds": _seconds}
