"""Agreement between the workers of a training run: settings before the first step, the chief's values, when to stop.

The workers take the same steps. Everything else, such as files and validations, is the work of the chief.
"""

import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.python.eager import context as tf_context

from x3d_tf.errors import UserError, first_line
from x3d_tf.signals import Terminated, recorded, restored
from x3d_tf.startup import tell_devices
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.training.cluster import TF_CONFIG, Cluster, wait_for_workers

_T = TypeVar("_T")
_SUM = tf.distribute.ReduceOp.SUM
_BITS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}  # by the size of a type in bytes
_CONNECT_SECONDS = 120  # for TensorFlow to connect workers that are all present
_POLL_MILLISECONDS = 500
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
_exchanges = itertools.count()  # all workers make the same exchanges in the same order


class Workers:
    """The processes that train a network together, each on the devices of its machine.

    All methods that exchange something must be called by all workers, in the same order. With a single worker they do
    nothing.

    Args:
        strategy: the distribution strategy; one for a single machine has one worker.
        cluster: the workers; None for a single machine.

    Attributes:
        is_chief: True for the worker that writes the files.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster | None = None) -> None:
        self.strategy, self._cluster = strategy, cluster
        self.is_chief = cluster is None or cluster.is_chief
        self._received: list[int] = []

    @property
    def count(self) -> int:
        """Number of workers."""
        return self._cluster.count if self._cluster else 1

    # Exchanges of values that JSON can hold, through the store of TensorFlow's coordination service.

    def gather(self, content: Any) -> list[Any]:
        """Returns what each worker contributes, in their order, when all have contributed."""
        if self._cluster is None:
            return [content]
        number = next(_exchanges)
        _put(f"{number}/{self._cluster.index}", content)
        return [self._get(f"{number}/{index}") for index in range(self.count)]

    def of_chief(self, content: Any) -> Any:
        """Returns what the chief contributes."""
        if self._cluster is None:
            return content
        number = next(_exchanges)
        if self.is_chief:
            _put(f"{number}/0", content)
        return self._get(f"{number}/0")

    def wait(self) -> None:
        """Returns when all workers have arrived here."""
        self.gather(None)

    def chief_first(self, function: Callable[[], _T]) -> _T:
        """Calls a function on the chief, which may create files, and then on the other workers; returns its result."""
        result = [function()] if self.is_chief else []
        self.wait()
        return result[0] if self.is_chief else function()

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

    def leave_together(self) -> None:
        """Waits until the chief has done all of its work and all others know, before this process ends.

        If one worker fails before, all do: otherwise its supervisor would start it again without the others.
        """
        if self._cluster is None:
            return
        self.of_chief(None)
        number = next(_exchanges)
        if not self.is_chief:
            _put(f"{number}/{self._cluster.index}", None)
            return
        for index in range(1, self.count):  # the chief has the store, so it ends last
            self._get(f"{number}/{index}", of=index)

    def _get(self, key: str, of: int | None = None) -> Any:
        """Waits for the value of a key. Python handles signals while it waits.

        Raises:
            UnavailableError: a worker has ended, or the worker `of`, if it is given.
        """
        assert self._cluster is not None
        context = tf_context.context()
        while True:
            with suppress(tf.errors.DeadlineExceededError):
                return json.loads(context.get_config_key_value(f"x3d_tf/{key}", _POLL_MILLISECONDS))
            # a call that waits for a key does not notice the end of a worker
            errors = context.get_task_states(self._cluster.jobs)
            for error in filter(None, errors if of is None else [errors[of]]):
                raise error

    # Collective operations of the strategy.

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Gives variables of the strategy the values that they have on the chief, bit-equal."""
        if self._cluster is None:
            return
        by_type: dict[Any, list[Any]] = {}
        for variable in variables:
            by_type.setdefault(tf.as_dtype(variable.dtype), []).append(variable)
        for dtype, members in by_type.items():
            parts = [tf.reshape(variable.read_value(), [-1]) for variable in members]
            values = self._of_chief_by_sum(tf.concat(parts, 0), dtype)
            for variable, value in zip(members, tf.split(values, [int(tf.size(part)) for part in parts])):
                variable.assign(tf.reshape(value, variable.shape))

    def _of_chief_by_sum(self, values: Any, dtype: Any) -> Any:
        """Returns a tensor of the chief on all workers. The others add zeros to its bits, taken as integers."""
        kind = _BITS[dtype.size]
        bits = tf.cast(tf.bitcast(values, kind), tf.int64)
        total = self.strategy.reduce(_SUM, bits if self.is_chief else tf.zeros_like(bits), axis=None)
        return tf.bitcast(tf.cast(total, kind), dtype)

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Delays Ctrl-C and SIGTERM of several workers in the block until `stop_if_asked`. One worker is unaffected."""
        if self._cluster is None:
            yield
            return
        with recorded() as self._received:
            yield

    def stop_if_asked(self) -> None:
        """Raises `KeyboardInterrupt` on all workers if one of them received Ctrl-C or SIGTERM, after the same step."""
        if self._cluster is None:
            return
        asked = self.strategy.reduce(_SUM, tf.constant(len(self._received), tf.int64), axis=None)
        if int(asked):
            if not self._received:
                tell("stopping, because another worker received Ctrl-C or SIGTERM")
            raise KeyboardInterrupt if self._received[:1] == [signal.SIGINT] else Terminated

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
            raise UserError(f"{_cause(self._cluster, str(error))}. {advice}") from error


def _cause(cluster: Cluster, message: str) -> str:
    """Returns a sentence that names the worker which a message of TensorFlow is about."""
    found = (cluster.number_of(job, int(position)) for job, position in _TASK.findall(message))
    others = [number for number in found if number != cluster.index and number < cluster.count]
    if others:
        return f"{cluster.name(others[0])} of {TF_CONFIG} has ended or cannot be reached; see its own error"
    detail = first_line(Exception(re.sub(r"\{\{.*?\}\}", "", message).strip()))[:200]
    return f"another worker of {TF_CONFIG} has ended or cannot be reached ({detail}); see its own error"


def _put(key: str, content: Any) -> None:
    tf_context.context().set_config_key_value(f"x3d_tf/{key}", json.dumps(content))


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
    """Waits for the other workers, connects this process to them, and returns the strategy for `train`.

    Must be called before TensorFlow computes anything or initialises its devices.

    Raises:
        UserError: the port of this worker is in use, the workers cannot connect, or they differ in the number of
            devices.
    """
    tell(f"{cluster.name(cluster.index)} of {TF_CONFIG}: waiting for all {counted(cluster.count, 'worker')}")
    wait_for_workers(cluster)
    tell(f"connecting; gives up after {_CONNECT_SECONDS} s, with the signal SIGALRM")
    try:
        with restored():  # TensorFlow replaces the handler of SIGTERM
            signal.alarm(_CONNECT_SECONDS)  # TensorFlow may wait forever, and lets Python do nothing meanwhile
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            signal.alarm(0)
        workers = Workers(strategy, cluster)
        # before any collective operation, which would wait forever if the numbers differ
        workers.require_equal(lambda: {"the number of devices": len(strategy.extended.worker_devices)})
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(f"the workers cannot connect: {_cause(cluster, str(error))}") from error
    tell_devices()
    devices = counted(strategy.num_replicas_in_sync, "device")
    tell(f"all {counted(cluster.count, 'worker')} are connected, with {devices} in total")
    return strategy
