"""The workers of a training run as the environment variable TF_CONFIG lists them. Imports no TensorFlow.

TF_CONFIG is TensorFlow's convention, which the TFJob of Kubeflow's operator sets and scripts of a scheduler can write:

    {"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}
"""

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from x3d_tf.errors import UserError, require
from x3d_tf.terminal import tell
from x3d_tf.text import counted

TF_CONFIG = "TF_CONFIG"
_JOBS = ("chief", "worker")  # in the order in which TensorFlow numbers the tasks
_ADDRESS = re.compile(r"[\w.\-\[\]:]{1,255}:[0-9]{1,5}", re.ASCII)
_MOST_WORKERS = 10_000
_REMINDER_SECONDS = 30.0  # between two lines that name the absent workers
_MOST_NAMED = 5
_CONNECT_SECONDS = 2.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        addresses: HOST:PORT of each worker. The first one is the chief, which writes all files of the run.
        index: number of this worker, from 0.
        chiefs: number of workers, 0 or 1, that TF_CONFIG lists as "chief".
    """

    addresses: tuple[str, ...]
    index: int
    chiefs: int = 0

    @property
    def is_chief(self) -> bool:
        """True for the worker that writes the files of the run."""
        return self.index == 0

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.addresses)

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Names of the jobs that TF_CONFIG lists, with their numbers of workers."""
        return [job for job in (("chief", self.chiefs), ("worker", self.count - self.chiefs)) if job[1]]

    def name(self, index: int) -> str:
        """Returns the name of a worker for messages, such as "worker 1 (host1:12345)"."""
        return f"worker {index} ({self.addresses[index]})"

    def number_of(self, job: str, position: int) -> int:
        """Returns the number of a worker from its job and its position there, which TensorFlow's messages name."""
        return position + (self.chiefs if job == "worker" else 0)


def cluster_from_environment() -> Cluster | None:
    """Returns the workers that TF_CONFIG lists; None if it is not set or lists a single one.

    Raises:
        UserError: TF_CONFIG is not a JSON object of the form above, or does not list the task of this process.
    """
    text = os.environ.get(TF_CONFIG, "")
    if not text.strip():
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{TF_CONFIG} must be a JSON object, got {text[:100]!r} ({error})") from error
    jobs = content.get("cluster") if isinstance(content, dict) else None
    if content == {} or jobs == {}:
        return None
    if not isinstance(jobs, dict):
        rule = 'hold an object "cluster" with lists of HOST:PORT'
        raise UserError(f"{TF_CONFIG} must {rule}, got {text[:100]!r}")
    unknown = [name for name in jobs if name not in _JOBS]
    require(not unknown, f'"cluster" of {TF_CONFIG}', 'have no other jobs than "chief" and "worker"', unknown)
    addresses = tuple(_check_address(address) for job in _JOBS for address in _list_of(jobs, job))
    rule = f"list 1 to {_MOST_WORKERS} workers, each once"
    require(0 < len(set(addresses)) == len(addresses) <= _MOST_WORKERS, f'"cluster" of {TF_CONFIG}', rule, addresses)
    chiefs = len(jobs.get("chief", []))
    require(chiefs <= 1, f'"chief" of {TF_CONFIG}', "be a list of one HOST:PORT", jobs.get("chief"))
    job, index = _task_of(content.get("task"), jobs)
    cluster = Cluster(addresses, index + (chiefs if job == "worker" else 0), chiefs)
    return cluster if len(addresses) > 1 else None


def _list_of(jobs: dict[str, Any], job: str) -> list[Any]:
    tasks = jobs.get(job, [])
    require(isinstance(tasks, list), f'"{job}" of {TF_CONFIG}', "be a list of HOST:PORT", tasks)
    return list(tasks)


def _check_address(address: Any) -> str:
    valid = isinstance(address, str) and bool(_ADDRESS.fullmatch(address))
    valid = valid and 0 < int(address.rpartition(":")[2]) < 65536
    require(valid, f"an address of {TF_CONFIG}", "be HOST:PORT", address)
    return str(address)


def _task_of(task: Any, jobs: dict[str, Any]) -> tuple[str, int]:
    """Returns the job of this worker and its number in the job."""
    where = f'"task" of {TF_CONFIG}'
    require(isinstance(task, dict), where, 'be an object such as {"type": "worker", "index": 0}', task)
    job, index = task.get("type"), task.get("index")
    require(job in [*jobs], where, f'have a "type" of the "cluster", one of {", ".join(jobs)}', job)
    if isinstance(index, str) and index.isdecimal():
        index = int(index)  # some schedulers write it as text
    count = len(jobs[job])
    valid = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count
    require(valid, where, f'have an "index" in 0..{count - 1}, because the cluster has {counted(count, job)}', index)
    return str(job), int(index)


def wait_for_workers(cluster: Cluster) -> None:
    """Waits until all workers have arrived here, and prints every 30 seconds who is absent.

    Each worker listens on its port, on which TensorFlow listens afterwards, and is present once its port has answered
    the others. TensorFlow itself waits in a call that neither prints nor lets Python handle signals.

    Raises:
        UserError: the port of this worker is in use.
    """
    absent = [index for index in range(cluster.count) if index != cluster.index]
    with _listening(cluster):
        reminder = time.monotonic() + _REMINDER_SECONDS
        while absent:
            absent = [index for index in absent if not _answers(cluster.addresses[index])]
            if absent and time.monotonic() > reminder:
                first = ", ".join(cluster.name(index) for index in absent[:_MOST_NAMED])
                more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
                tell(f"still waiting for {first}{more}; see the output there")
                reminder = time.monotonic() + _REMINDER_SECONDS
            if absent:
                time.sleep(_POLL_SECONDS)


def _listening(cluster: Cluster) -> socket.socket:
    """Returns a socket that listens on the port of this worker. A context manager."""
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=cluster.count)
        return socket.create_server(("", port), backlog=cluster.count)
    except OSError as error:
        raise UserError(
            f"{TF_CONFIG}: port {port} of {cluster.name(cluster.index)} cannot be used ({error.strerror}). Is a worker "
            "of this run, or another program, still running on this machine? End it, or choose another port"
        ) from error


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            return True
    except (OSError, UnicodeError):  # UnicodeError: what no host can be called
        return False
