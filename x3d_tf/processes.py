"""Processes that answer questions, one after the other, through a pipe."""

import os
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.context import SpawnProcess
from typing import Any

from x3d_tf.signals import without_interrupts


class _Child(SpawnProcess):
    """A process that never gets Ctrl-C: its parent does, and ends it.

    Spawned, not forked: the parent has TensorFlow's threads, which do not survive a fork.
    """

    def start(self) -> None:
        with without_interrupts():  # also while it imports, when a terminal's Ctrl-C would print a traceback of it
            super().start()


class WorkerDied(Exception):
    """The process is no more.

    Attributes:
        status: with which it ended; of one ended by a signal the signal's number, negative.
    """

    def __init__(self, status: int | None) -> None:
        super().__init__(f"its process ended with status {status}")
        self.status = status


class TimedOut(Exception):
    """The process did not answer in time."""


class Worker:
    """A process of its own that serves until it is ended, or brings itself down.

    Args:
        serve: what runs there, given its end of the pipe and the arguments. It sends one answer for each question that
            it receives; one that is an exception is raised where it was asked. A module's function.
        *arguments: of `serve`, such as can be pickled.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = Pipe()
        self._process = _Child(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def ask(self, *question: Any, timeout: float | None = None) -> Any:
        """The answer to a question; raises Ended, or TimedOut after so many seconds, and then can only be ended."""
        try:
            self._pipe.send(question)
            if not self._pipe.poll(timeout):
                raise TimedOut(f"its process did not answer within {timeout:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise WorkerDied(self._process.exitcode) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self, grace: float = 0) -> None:
        """Ends the process: closes the pipe, waits so many seconds for it to end by itself, and makes it end."""
        self._pipe.close()
        self._process.join(grace)
        self._process.terminate()
        self._process.join()

    def kill(self, grace: float = 5) -> None:
        """Ends the process at once, busy or not; who waits for its answer gets Ended.

        Waits so many seconds: one that hangs in the kernel, on a disk that does not answer, outlives even this.
        """
        self._process.kill()
        self._process.join(grace)


def available_cpus() -> int:
    """CPUs that this process may run on, which containers and schedulers make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
