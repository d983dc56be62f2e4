"""Runs a search to its end, with a trace in a work folder. Imports no TensorFlow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import Executor
from x3d_tf.search.reports import reported
from x3d_tf.search.search import Latency, Search
from x3d_tf.search.shared import SharedTraining
from x3d_tf.search.trace import Trace, open_trace, read_trace
from x3d_tf.signals import held_back
from x3d_tf.terminal import tell
from x3d_tf.text import counted

OnScore = Callable[[Search, Candidate, Score], None]


def run_search(
    folder: Path,
    config: ExpandConfig,
    executor: Executor,
    start: Expansion | None = None,
    *,
    options: ModelOptions | None = None,
    num_classes: int = 400,
    latency: Latency | None = None,
    settings: Mapping[str, Any] | None = None,
    on_score: OnScore | None = None,
    on_scored: Callable[[], None] | None = None,
    on_end: Callable[[Search], None] | None = None,
    shared: SharedTraining | None = None,
    followed: int | None = None,
) -> Search:
    """Runs a search, or continues the one that the trace in a folder holds, and returns it finished.

    Args:
        folder: work folder, which gets the trace.
        config: settings of the search.
        executor: scores the candidates.
        start: network to start from. Defaults to X2D.
        options: options of the networks. Defaults to `ModelOptions()`.
        num_classes: number of classes, for the cost.
        latency: measures the latency of a network in milliseconds; required by the cost "latency".
            With other costs, it is measured at the end, for the tables.
        settings: further settings that determine the scores, such as those of the training, by name. A trace with
            others is not continued.
        on_score: called after each score is recorded, for example to print `search.steps`.
        on_scored: called after the last score, before latencies are measured, for example to free devices.
        on_end: called with the finished search while the folder is still locked, for example to write reports.
        shared: the training that processes on several machines share. The file system must support locks.
        followed: number of scores in the trace when this process began to follow the search of another one. Failures
            in later ones are not repeated: if all networks of the last round failed, it is an error.

    Raises:
        Locked: another process is searching in the folder.
        UserError: the trace is damaged or of another search (see `open_trace`), or all networks of a round failed.
        WriteError: the trace cannot be written.
    """
    start, options = start or Expansion(), options or ModelOptions()
    identity = identity_of(config, start, options, num_classes, settings)
    with open_trace(folder, identity, shared=shared is not None) as trace:
        measured = trace.memoised(latency) if latency else None
        search = Search(config, start, options=options, num_classes=num_classes, latency=measured)
        trace.resume(search)
        if followed is not None and trace.scores > followed:
            require_successes(search)
        elif shared:
            shared.forget_failures(search.pending())
        drive(search, executor, trace, on_score)
        if on_scored:
            on_scored()
        if measured:
            measure_reported(search, measured)
        if on_end:
            on_end(search)
    return search


def identity_of(
    config: ExpandConfig,
    start: Expansion,
    options: ModelOptions,
    num_classes: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the settings of a search by name, which the trace holds; see `run_search`."""
    identity = {"num_classes": num_classes, **(settings or {})}
    for part in (config, start, options):
        identity |= {f"{type(part).__name__}.{name}": value for name, value in vars(part).items()}
    return identity


def measure_reported(search: Search, latency: Latency) -> None:
    """Measures the latency of the networks in the tables of a finished search, so that the trace holds it."""
    networks = dict.fromkeys(result.network.expansion for result in reported(search))
    tell(f"measuring the latency of {counted(len(networks), 'network')}")
    for expansion in networks:
        latency(expansion)


def load_search(folder: Path) -> Search:
    """Returns a search from its trace, finished or not, for tables and pictures. Nothing is scored or written.

    Raises:
        UserError: the folder holds no trace, or a damaged one.
    """
    return search_of(*read_trace(folder))


def search_of(settings: Mapping[str, Any], trace: Trace) -> Search:
    """Returns the search of a trace that `read_trace` has read.

    Raises:
        UserError: the trace is damaged.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, setting = name.rpartition(".")
        groups.setdefault(group, {})[setting] = tuple(value) if isinstance(value, list) else value
    try:
        config, start = ExpandConfig(**groups["ExpandConfig"]), Expansion(**groups["Expansion"])
        options, classes = ModelOptions(**groups["ModelOptions"]), groups[""]["num_classes"]
        search = Search(config, start, options=options, num_classes=classes, latency=trace.measured)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{trace.path}, line 1 must hold the settings of a search: {error}") from error
    trace.resume(search)
    return search


def drive(search: Search, executor: Executor, trace: Trace, on_score: OnScore | None = None) -> None:
    """Has the pending candidates of a search scored until it is finished.

    Args:
        search: a search into which the trace was resumed.
        executor: scores the candidates.
        trace: file to which each score is appended before the search uses it.
        on_score: called after each score is recorded.

    Raises:
        UserError: all networks of a round failed. Continuing the search scores them again.
        WriteError: the trace cannot be written.
    """
    while pending := search.pending():
        for candidate, score in executor.scores(pending):
            search.check(score)
            with held_back():  # Ctrl-C must not tear the line
                trace.append(candidate, score)
            search.record(candidate, score)
            if on_score:
                on_score(search, candidate, score)
        if search.pending() == pending and not search.failures:
            raise RuntimeError("the executor scored no candidate")
        require_successes(search)


def require_successes(search: Search) -> None:
    """Raises `UserError` with the reasons if all networks of the last round failed."""
    if search.failures:
        reasons = "; ".join(f"{axis}: {reason}" for axis, reason in search.failures.items())
        raise UserError(
            f"every candidate of step {search.pending()[0].step} failed ({reasons}). Correct the cause and repeat the "
            "command, which scores them again"
        )
