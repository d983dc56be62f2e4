"""Processes that answer questions, one after the other, through a pipe; and how child processes are started."""

from collections.abc import Callable
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from x3d_tf._signals import without_interrupts


class _Child(SpawnProcess):
    def start(self) -> None:
        with without_interrupts():  # also while it imports, when a terminal's Ctrl-C would print a traceback of it
            super().start()


class Children(SpawnContext):
    """Starts processes that never get Ctrl-C: their parent does, and ends them.

    Spawned, not forked: the parent has TensorFlow's threads, which do not survive a fork.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Child] = []

    def Process(self, *arguments: Any, **named: Any) -> _Child:  # type: ignore[override]
        """A process that is still to be started."""
        child = _Child(*arguments, **named)
        self._started.append(child)
        return child

    def terminate(self) -> None:
        """Ends those that run, whatever they are at."""
        for child in self._started:
            if child.is_alive():
                child.terminate()


class Ended(Exception):
    """The process is no more; says with which status it ended."""


class Answering:
    """A process of its own that serves until it is ended, or brings itself down.

    Args:
        serve: what runs there, given its end of the pipe and the arguments. It sends one answer for each question that
            it receives; one that is an exception is raised where it was asked. A module's function.
        *arguments: of `serve`, such as can be pickled.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = Children()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def ask(self, *question: Any) -> Any:
        """The answer to a question; raises Ended."""
        try:
            self._pipe.send(question)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise Ended(f"its process ended with status {self._process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self, grace: float = 0) -> None:
        """Ends the process: closes the pipe, waits so many seconds for it to end by itself, and makes it end."""
        self._pipe.close()
        self._process.join(grace)
        self._process.terminate()
        self._process.join()
