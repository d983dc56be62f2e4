"""Runs training commands of several workers on this machine."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 300.0  # limit of a command


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback interface that nobody uses at this moment.

    The system gives none of them to other programs, because they are below its range for clients.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found += [port] if port not in found else []
    return found


def tf_config(ports: list[int], index: int) -> str:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


class TrainingWorkers:
    """The processes of all workers of a run.

    Args:
        flags: the flags of each worker.
        program: what Python runs with the flags. Defaults to the command.
    """

    def __init__(self, *flags: list[str], program: tuple[str, str] = ("-m", "x3d_tf.train")) -> None:
        ports = free_ports(len(flags))
        self._files: list[tuple[Any, Any]] = []  # not pipes: a full one would stop a worker
        self.processes = []
        for index, own in enumerate(flags):
            self._files.append((tempfile.TemporaryFile(), tempfile.TemporaryFile()))  # noqa: SIM115
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *program, *own],
                    env={**os.environ, "TF_CONFIG": tf_config(ports, index)},
                    stdout=self._files[-1][0],
                    stderr=self._files[-1][1],
                    cwd=ROOT,
                )
            )

    def __enter__(self) -> "TrainingWorkers":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for file in itertools.chain(*self._files):
            file.close()

    def errors(self, index: int) -> str:
        """Returns what a process has written to standard error until now."""
        return _content(self._files[index][1])

    def wait(self) -> list[tuple[int, str, str]]:
        """Waits for all processes; returns their exit statuses, outputs and error outputs.

        Processes that take longer than `SECONDS` are aborted, so that their stacks are in the error output.
        """
        until = time.monotonic() + SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 1))
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
        return [(process.wait(10), *map(_content, files)) for process, files in zip(self.processes, self._files)]


def _content(file: Any) -> str:
    descriptor = file.fileno()  # read without a seek, because the process shares the position
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()
