"""Connection to a Ray cluster, which runs tasks on several machines. Imports Ray only inside functions, no TensorFlow.

Every machine of the cluster needs the same versions of Python, Ray and this package, and the same paths to shared
folders.
"""

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from x3d_tf import signals
from x3d_tf.errors import UserError, first_line, require
from x3d_tf.terminal import tell

CONNECT_SECONDS = 30.0  # Ray itself retries for minutes
_ADDRESS = re.compile(r"[\w.-]+:[0-9]{1,5}", re.ASCII)
_MAX_REASON = 300  # characters


def check_address(address: str) -> None:
    """Checks, without connecting, that Ray is installed and that an address is HOST:PORT.

    Raises:
        UserError: it is not. Names the flag `ray`.
    """
    require(bool(_ADDRESS.fullmatch(address)), "ray", "be HOST:PORT, the address of the cluster's head node", address)
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray: the package ray is not installed; pip install 'x3d_tf[cluster]'")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connects this process to a Ray cluster within the block, as a context manager that gives the module `ray`.

    Args:
        address: HOST:PORT of the cluster's head node, such as `ray start --head` prints.

    Raises:
        UserError: Ray is not installed, no cluster answers within `CONNECT_SECONDS`, or it has another version of
            Python or Ray. Names the flag `ray`.
    """
    check_address(address)
    tell(f"connecting to the Ray cluster at {address}")
    _require_answer(address)
    import ray

    try:
        with signals.restored():  # Ray replaces the handler of SIGTERM
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise UserError(f"ray: the cluster at {address} cannot be used: {first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raises `UserError` unless a cluster answers. In a process of its own, because Ray's client cannot be stopped."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", f"--address={address}"]
    check = "Check that it is the address of the head node and that its port is reachable"
    try:
        ended = subprocess.run(command, capture_output=True, timeout=CONNECT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"ray: no Ray cluster answers at {address} within {CONNECT_SECONDS:.0f} s. {check}") from error
    if ended.returncode != 0:
        lines = ended.stderr.decode(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {ended.returncode}")
        raise UserError(f"ray: the health check of the cluster at {address} fails: {reason[:_MAX_REASON]}. {check}")
