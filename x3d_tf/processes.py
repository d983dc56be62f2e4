"""Worker processes that serve requests over a pipe, and the number of CPUs."""

import os
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.context import SpawnProcess
from typing import Any

from x3d_tf.signals import without_interrupts


class _Process(SpawnProcess):
    """A process that ignores Ctrl-C; its parent handles it and stops the process.

    It is spawned, not forked, because TensorFlow's threads in the parent do not survive a fork.
    """

    def start(self) -> None:
        with without_interrupts():  # covers imports too, where Ctrl-C would print a traceback
            super().start()


class WorkerDied(Exception):
    """Raised when the worker process has exited; the message gives its exit status.

    Attributes:
        status: exit status of the process; the negative signal number if a signal ended it.
        is_kill: True if a signal ended it, such as SIGKILL of a system without memory.
    """

    def __init__(self, status: int | None) -> None:
        super().__init__(f"its process ended with status {status}")
        self.status = status
        self.is_kill = status is not None and status < 0


class TimedOut(Exception):
    """Raised when the worker process does not reply in time."""


class Worker:
    """A worker process that serves requests until it is stopped.

    Args:
        serve: module-level function that runs in the process. It receives its end of the pipe and the arguments, and
            must send one reply for each request. A reply that is an exception is raised in the parent.
        *arguments: picklable arguments of `serve`.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        self._pipe, child_pipe = Pipe()
        self._process = _Process(target=serve, args=(child_pipe, *arguments), daemon=True)
        self._process.start()
        child_pipe.close()  # so that the exit of the process closes the pipe

    def ask(self, *request: Any, timeout: float | None = None) -> Any:
        """Sends a request and returns the reply.

        Raises:
            WorkerDied: the process has exited.
            TimedOut: no reply within `timeout` seconds; the worker can then only be stopped.
        """
        try:
            self._pipe.send(request)
            if not self._pipe.poll(timeout):
                raise TimedOut(f"its process did not reply within {timeout:g} s")
            reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise WorkerDied(self._process.exitcode) from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def end(self, grace: float = 0) -> None:
        """Closes the pipe, waits up to `grace` seconds for the process to exit, and then terminates it."""
        self._pipe.close()
        self._process.join(grace)
        self._process.terminate()
        self._process.join()

    def stop(self) -> None:
        """Sends SIGTERM to the process; a pending `ask` raises `WorkerDied` once it has exited."""
        self._process.terminate()

    def kill(self, grace: float = 5) -> None:
        """Kills the process immediately; a pending `ask` raises `WorkerDied`.

        Waits up to `grace` seconds for it to exit: a process that hangs in the kernel cannot be killed.
        """
        self._process.kill()
        self._process.join(grace)


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use, which containers and schedulers can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
