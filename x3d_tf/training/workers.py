"""Agreement between the workers of a training run: settings before the first step, the chief's values, when to stop.

The workers take the same steps. Everything else, such as files and validations, is the work of the chief.
"""

import functools
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from x3d_tf.errors import UserError, first_line
from x3d_tf.signals import Terminated, default_actions, recorded
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.training.cluster import TF_CONFIG, Cluster, naming_absent_workers, require_free_port

_T = TypeVar("_T")
_SUM = tf.distribute.ReduceOp.SUM
_EXACT = {tf.uint32: tf.int64, tf.bool: tf.int32, tf.uint8: tf.int32}  # types that a sum over workers does not support
_TASK = re.compile(r"/job:(chief|worker)(?:/replica:0)?/task:([0-9]{1,5})")
_PEER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)
_OF_PEERS = ("ollective", "unhealthy", "heartbeat", "/job:worker", "/job:chief", "oordination service")


class Workers:
    """The processes that train a network together, each on the devices of its machine.

    All methods that exchange something must be called by all workers, in the same order.

    Args:
        strategy: the distribution strategy; one for a single machine has one worker.
        cluster: the workers; None for a single machine.

    Attributes:
        is_chief: True for the worker that writes the files.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster | None = None) -> None:
        self.strategy, self._cluster = strategy, cluster
        self.is_chief = cluster is None or cluster.is_chief
        self._stop: Callable[[], None] | None = None

    @property
    def count(self) -> int:
        """Number of workers."""
        return self._cluster.count if self._cluster else 1

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Gives variables of the strategy the values that they have on the chief."""
        if self._cluster is None:
            return
        by_type: dict[Any, list[Any]] = {}
        for variable in variables:
            by_type.setdefault(tf.as_dtype(variable.dtype), []).append(variable)
        for dtype, members in by_type.items():
            exchanged = _EXACT.get(dtype, dtype)
            parts = [tf.cast(tf.reshape(variable.read_value(), [-1]), exchanged) for variable in members]
            values = tf.cast(self._value_of_chief(tf.concat(parts, 0)), dtype)
            for variable, value in zip(members, tf.split(values, [int(tf.size(part)) for part in parts])):
                variable.assign(tf.reshape(value, variable.shape))

    def _value_of_chief(self, value: Any) -> Any:
        """Returns a tensor of the chief on all workers, bit-equal: the others add zeros."""
        return self.strategy.reduce(_SUM, value if self.is_chief else tf.zeros_like(value), axis=None)

    def number_of_chief(self, number: int) -> int:
        """Returns an integer of the chief on all workers."""
        return number if self._cluster is None else int(self._sum(int(number) if self.is_chief else 0))

    def gather(self, content: Any) -> list[Any]:
        """Returns what each worker contributes, in their order; contents are values that JSON can hold."""
        if self._cluster is None:
            return [content]
        encoded = np.frombuffer(json.dumps(content).encode(), np.uint8)
        lengths = self._sum(self._own_row(len(encoded)))
        # one row for each worker, to which the others add zeros
        rows = self._sum(self._own_row(np.pad(encoded.astype(np.int32), (0, lengths.max() - len(encoded)))))
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths)]

    def _own_row(self, value: Any) -> Any:
        """Returns zeros, [workers, ...], with the row of this worker set to a value."""
        assert self._cluster is not None
        rows = np.zeros((self.count, *np.shape(value)), np.int32)
        rows[self._cluster.index] = value
        return rows

    def _sum(self, value: Any) -> Any:
        """Returns the sum of a tensor over the workers, as an array."""
        return self.strategy.reduce(_SUM, tf.constant(value), axis=None).numpy()

    def require_equal(self, settings: Callable[[], dict[str, Any]]) -> None:
        """Checks that all workers have the same settings, which a function returns; one worker does not call it.

        Raises:
            UserError: they do not, on every worker. Names a setting and the values of two workers.
        """
        if self._cluster is None:
            return
        ours, *others = self.gather(settings())
        for number, theirs in enumerate(others, start=1):
            for name in [*ours, *theirs]:
                if ours.get(name) != theirs.get(name):
                    raise UserError(
                        f"{name} must be the same on all workers: {self._cluster.name(0)} has {ours.get(name)!r}, "
                        f"{self._cluster.name(number)} has {theirs.get(name)!r}. Start all workers with the same "
                        "command, records and versions"
                    )

    def chief_first(self, function: Callable[[], _T]) -> _T:
        """Calls a function on the chief, which may create files, and then on the other workers; returns its result."""
        result = [function()] if self.is_chief else []
        self.gather(None)
        return result[0] if self.is_chief else function()

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Delays Ctrl-C and SIGTERM of several workers in the block until `stop_if_asked`. One worker is unaffected."""
        if self._cluster is None:
            yield
            return
        with recorded() as received:
            self._stop = functools.partial(self._stop_if_any, received)
            yield

    def stop_if_asked(self) -> None:
        """Raises `KeyboardInterrupt` on all workers if one of them received Ctrl-C or SIGTERM, after the same step."""
        if self._stop is not None:
            self._stop()

    def _stop_if_any(self, received: list[int]) -> None:
        if self._sum(len(received)):
            raise KeyboardInterrupt if received[:1] == [signal.SIGINT] else Terminated

    @contextmanager
    def peer_errors_as_user_errors(self, advice: str) -> Iterator[None]:
        """Re-raises TensorFlow's error about a worker that ended or cannot be reached as a `UserError`.

        Args:
            advice: what to do, the last part of the message.
        """
        try:
            yield
        except _PEER_ERRORS as error:
            if self._cluster is None or not any(words in str(error) for words in _OF_PEERS):
                raise
            raise UserError(f"{self._describe(str(error))}. {advice}") from error

    def _describe(self, message: str) -> str:
        """Returns a sentence that names the worker which a message of TensorFlow is about."""
        assert self._cluster is not None
        found = (self._cluster.number_of(job, int(task)) for job, task in _TASK.findall(message))
        others = [number for number in found if number != self._cluster.index and number < self.count]
        who = self._cluster.name(others[0]) if others else "another worker"
        return f"{who} of {TF_CONFIG} has ended or cannot be reached"


def workers_of(strategy: tf.distribute.Strategy) -> Workers:
    """Returns the workers of a strategy, which has one unless it is a `MultiWorkerMirroredStrategy` with several."""
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict() if resolver is not None else {}
    addresses = [*jobs.get("chief", []), *jobs.get("worker", [])]
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) or len(addresses) < 2:
        return Workers(strategy)
    chiefs = len(jobs.get("chief", []))
    index = resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)
    return Workers(strategy, Cluster(tuple(addresses), index, chiefs))


def start_workers(cluster: Cluster) -> tf.distribute.Strategy:
    """Connects this process to the other workers, waits for them, and returns the strategy for `train`.

    Must be called before TensorFlow computes anything or initialises its devices. Ctrl-C and SIGTERM end the process
    while it waits: TensorFlow cannot be interrupted there.

    Raises:
        UserError: the port of this worker is in use, or the workers cannot connect.
    """
    require_free_port(cluster)
    tell(f"{cluster.name(cluster.index)} of {TF_CONFIG}: waiting for all {counted(cluster.count, 'worker')}")
    try:
        with default_actions(), naming_absent_workers(cluster):
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            Workers(strategy, cluster).gather(None)  # returns when all workers have arrived
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(f"{TF_CONFIG}: the workers cannot connect: {first_line(error)}") from error
    devices = strategy.num_replicas_in_sync
    tell(f"all {counted(cluster.count, 'worker')} are connected, with {counted(devices, 'device')} in total")
    return strategy
