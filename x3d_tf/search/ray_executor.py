"""Scoring of candidates on the nodes of a Ray cluster. Imports Ray only inside functions, and no TensorFlow."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x3d_tf import registry, startup
from x3d_tf.errors import UserError, first_line
from x3d_tf.locks import Locked, is_locked, owner_of
from x3d_tf.processes import WorkerDied
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.executor import STOPPED_STATUSES, Remote
from x3d_tf.search.shared import SharedTraining
from x3d_tf.search.trace import LOCK_NAME
from x3d_tf.signals import held_back
from x3d_tf.terminal import tell
from x3d_tf.text import counted

_POLL = 0.5  # seconds
_CHECK_SECONDS = 120.0  # for a node to start a process that looks for the folders
_BUSY_SECONDS = 600.0  # that a training may wait for another process with the same candidate to end
_STOP_SECONDS = 300.0  # for trainings to save their checkpoints
_MOST_LOSSES = 20  # of the tasks of one candidate since its last checkpoint
_LONGEST_DELAY = 60.0  # seconds before a task that was lost is submitted again
_BAD_NODE_DELAY = 15.0  # seconds before a task that a node refused is submitted again
_SEES_SECONDS = 10.0  # after which a node must see the lock of the driver; NFS keeps attributes for some seconds


class RayExecutor:
    """Scores each candidate in a task of its own, on any node of a Ray cluster.

    A task trains in a child process, which sees the GPUs that Ray reserved, so that its memory is free afterwards. A
    task whose node or process dies is submitted again, and resumes from the last checkpoint in the work folder. See
    `SharedTraining` for candidates whose processes are killed again and again. On Ctrl-C and after errors the tasks are
    cancelled, so that they save checkpoints.

    Args:
        ray: the module, connected to a cluster; see `ray_cluster.connected`.
        training: trains a candidate; its paths are absolute.
        folder: the work folder, absolute.
        paths: other folders that each node must see, absolute, such as that of the records.
        cpus: CPU cores of a task.
        gpus: GPUs of a task.

    Raises:
        UserError: no node has these resources. Names the flags.
    """

    def __init__(
        self,
        ray: Any,
        training: SharedTraining,
        folder: Path,
        paths: Sequence[Path] = (),
        *,
        cpus: int,
        gpus: int = 0,
    ) -> None:
        self._ray, self._training, self._folder, self._paths = ray, training, folder, [folder, *paths]
        self._cpus, self._gpus = cpus, gpus
        self._checked = self._warned = False
        self._losses: dict[tuple[Candidate, int], int] = {}  # by candidate and checkpoint
        self._bad_nodes: set[str] = set()
        self._require_node()
        # A worker process of Ray has no TensorFlow. It is not used again, because the task changes its environment.
        self._task = ray.remote(max_calls=1, max_retries=0)(_score)

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score as soon as it is known.

        Raises:
            WriteError: a file of a training cannot be written.
            UserError: a node does not see the folders or cannot run tasks at the beginning, or too many tasks of a
                candidate were lost.
        """
        if not self._checked:
            self._check_nodes()
            self._checked = True
        tasks, waiting = dict[Any, Candidate](), dict.fromkeys(candidates, 0.0)  # with the times to submit them
        try:
            while tasks or waiting:
                for candidate in [candidate for candidate, start in waiting.items() if start <= time.monotonic()]:
                    del waiting[candidate]
                    tasks[self._submitted(candidate)] = candidate
                done = self._finished([*tasks])
                for task in done:
                    candidate = tasks.pop(task)
                    result = self._result(task, candidate)
                    if isinstance(result, Score):
                        yield candidate, result
                    else:
                        waiting[candidate] = time.monotonic() + result
                if not done:
                    self._warn_without_nodes()
        except BaseException:
            self._cancel([*tasks])
            raise

    def end(self) -> None:
        """Does nothing: the process of a task ends with it."""

    def _submitted(self, candidate: Candidate) -> Any:
        task = self._task.options(num_cpus=self._cpus, num_gpus=self._gpus, name=self._training.log(candidate).stem)
        hides_gpus = self._gpus == 0
        node = (self._paths, owner_of(self._folder / LOCK_NAME))
        return task.remote(self._training, candidate, node, startup.mode(), registry.plugins(), hides_gpus)

    def _result(self, task: Any, candidate: Candidate) -> Score | float:
        """Returns the score that a task has returned, or the seconds after which a task that was lost starts again.

        Raises:
            UserError: the task found an error that is not one of its candidate, or it was lost too often.
        """
        from ray import exceptions

        try:
            with held_back():
                reply = self._ray.get(task)
        except exceptions.RayTaskError as error:
            raise UserError(f"ray: a task failed: {first_line(error.cause or error)}") from error
        except exceptions.RayError as error:  # the node or Ray's process died, or is out of memory
            reply = first_line(error).partition(". ")[0]
            if isinstance(error, exceptions.OutOfMemoryError):  # Ray has killed the task before the system would
                self._training.count_kill(candidate)
        if isinstance(reply, Score):
            return reply
        if isinstance(reply, UserError):
            raise reply
        if isinstance(reply, _BadNode):
            if reply.name not in self._bad_nodes:
                tell(f"warning: ray: the node {reply.name} {reply.problem}. Its trainings are submitted again")
            self._bad_nodes.add(reply.name)
            return _BAD_NODE_DELAY
        return self._delay(candidate, str(reply))

    def _delay(self, candidate: Candidate, reason: str) -> float:
        """Counts a loss of a task, and returns the seconds after which it starts again."""
        key, name = (candidate, self._training.progress(candidate)), self._training.log(candidate).stem
        losses = self._losses[key] = self._losses.get(key, 0) + 1
        if losses > _MOST_LOSSES:
            raise UserError(f"ray: the training of {name} was lost {losses} times; the last time: {reason}")
        tell(f"the training of {name} was lost and starts again from its last checkpoint: {reason[:200]}")
        return min(_LONGEST_DELAY, 0.5 * 2**losses)

    def _cancel(self, tasks: Sequence[Any]) -> None:
        """Cancels tasks and waits until their processes have saved their checkpoints."""
        if not tasks:
            return
        tell(f"stopping {counted(len(tasks), 'training')}")
        for task in tasks:
            self._ray.cancel(task, recursive=False)
        until = time.monotonic() + _STOP_SECONDS
        while tasks and time.monotonic() < until:
            done = self._finished(tasks)
            tasks = [task for task in tasks if task not in done]
        if tasks:
            tell(f"warning: {counted(len(tasks), 'training')} did not stop within {_STOP_SECONDS:.0f} s")

    def _finished(self, tasks: Sequence[Any]) -> list[Any]:
        """Returns those of some tasks that have ended. Waits for a moment if there are none."""
        with held_back():  # Ray makes a plain KeyboardInterrupt of the exceptions of signal handlers
            done = self._ray.wait([*tasks], num_returns=len(tasks), timeout=0)[0] if tasks else []
        if not done:
            time.sleep(_POLL)
        return list(done)

    def _fitting(self) -> list[str]:
        """Returns the ids of the nodes that have the resources of a task."""
        nodes = _resources(self._ray).items()
        return [key for key, node in nodes if node.get("CPU", 0) >= self._cpus and node.get("GPU", 0) >= self._gpus]

    def _request(self) -> str:
        return f"{counted(self._cpus, 'CPU')} and {counted(self._gpus, 'GPU')}"

    def _require_node(self) -> None:
        """Raises `UserError` if no node has the resources of a task: Ray would wait for one forever."""
        if self._fitting():
            return
        sizes = [(int(node.get("GPU", 0)), int(node.get("CPU", 0))) for node in _resources(self._ray).values()]
        gpus, cpus = max(sizes, default=(0, 0))
        raise UserError(
            f"ray: no node of the cluster has {self._request()}, which a candidate needs; the largest of its "
            f"{counted(len(sizes), 'node')} has {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}. Set --cpus and "
            "--gpus to what a node has. A cluster that adds nodes by itself needs one of that size to begin with"
        )

    def _warn_without_nodes(self) -> None:
        """Prints a line when the last node with the resources of a task has gone. New ones may join the cluster."""
        lacking = not self._fitting()
        if lacking and not self._warned:
            tell(f"waiting: no node of the cluster has {self._request()} any more. Ctrl-C stops the search")
        self._warned = lacking

    def _check_nodes(self) -> None:
        """Raises `UserError` unless all nodes for tasks see the folders, and the lock of the work folder."""
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check, found = self._ray.remote(num_cpus=0, max_retries=0)(_problem), {}
        owner = owner_of(self._folder / LOCK_NAME)
        for key in self._fitting():
            strategy = NodeAffinitySchedulingStrategy(key, soft=False)
            found[key] = check.options(scheduling_strategy=strategy).remote(self._paths, owner)
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        for key, task in found.items():
            until = time.monotonic() + _CHECK_SECONDS
            problem: str | None = f"does not start a process within {_CHECK_SECONDS:.0f} s"
            while not (done := self._finished([task])) and time.monotonic() < until:
                pass
            try:
                problem = self._ray.get(task) if done else problem
            except RayError as error:
                problem = f"cannot run tasks: {first_line(getattr(error, 'cause', None) or error)}"
            if problem and key in _resources(self._ray):  # not if the node has died meanwhile
                raise UserError(f"ray: the node {addresses.get(key, key)} {problem}")


def _resources(ray: Any) -> Mapping[str, Mapping[str, float]]:
    """Returns the resources of the nodes that are alive, by their ids."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def default_gpus(ray: Any) -> int:
    """Returns the number of GPUs of a task: 1 if the cluster has GPUs, else 0."""
    return 1 if any(node.get("GPU", 0) >= 1 for node in _resources(ray).values()) else 0


@dataclass(frozen=True)
class _BadNode:
    """Reply of a node that cannot train for the driver."""

    name: str
    problem: str


def _problem(paths: Sequence[Path], owner: str) -> str | None:
    """Returns why this node cannot train for the process that holds the lock of a work folder; None if it can.

    Args:
        paths: the work folder, and other folders.
        owner: owner of the lock.
    """
    rule = "the work folder and the records must have the same path on all nodes, on a file system that they share"
    for path in paths:
        if not path.is_dir():
            return f"does not see {path}: {rule}"
    lock, until = paths[0] / LOCK_NAME, time.monotonic() + _SEES_SECONDS
    while owner_of(lock) != owner:
        if time.monotonic() > until:
            return f"sees another {paths[0]}: {rule}"
        time.sleep(_POLL)
    if not is_locked(lock):
        return f"does not see the locks of other nodes in {paths[0]}: mount it with locks (flock) that nodes share"
    return None


def _score(
    training: SharedTraining,
    candidate: Candidate,
    node: tuple[Sequence[Path], str],
    mode: startup.Mode,
    plugins: Sequence[str],
    hides_gpus: bool,
) -> Score | UserError | _BadNode | str:
    """Trains a candidate in a child process; the task of a node.

    Args:
        training: the training.
        candidate: the candidate.
        node: arguments of `_problem`, because nodes may join the cluster at any time.
        mode, plugins: those of the command.
        hides_gpus: the task has no GPUs. Ray itself would show all of them.

    Returns:
        The score, or an error that stops the search, or the reason why the training was lost.
    """
    if problem := _problem(*node):
        return _BadNode(socket.gethostname(), problem)
    startup.set_mode(mode)
    for plugin in plugins:
        registry.load_plugin(plugin)
    if hides_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    remote = Remote(training)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(_asked, remote, candidate)
        try:
            while not wait([asked], timeout=_POLL).done:  # Ray interrupts only Python code
                pass
            return asked.result()
        except UserError as error:
            return error
        except WorkerDied as error:
            if error.is_kill and error.status not in STOPPED_STATUSES:
                training.count_kill(candidate)
            return str(error)
        finally:  # cancelled: the child process saves its checkpoint
            remote.stop()


def _asked(remote: Remote, candidate: Candidate) -> Score:
    """Returns the score of a candidate. A process of a node that was lost may still train it for some seconds."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return remote.ask(candidate)
        except Locked:
            if time.monotonic() > until:
                raise
        time.sleep(_POLL)
