"""The trace of a search: a file from which an interrupted search continues exactly. Imports no TensorFlow.

The first line holds the settings of the search; every other line holds the score of a candidate or a measured latency,
as JSON. Lines are only appended. The file is untrusted when it is read back.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError, require
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited, temporary_path
from x3d_tf.locks import locked
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.search import Latency, Search
from x3d_tf.terminal import tell

TRACE_NAME = "trace.jsonl"
LOCK_NAME = ".search.lock"

_LOCK_SECONDS = 1.0

_FORMAT = "x3d_tf expansion search, version 1"
_LARGEST_RESULT = 2**20  # bytes
_SCORE_COLUMNS = ("score", "standard_error", "seconds", "training_score", "reason")


class NotMeasured(Exception):
    """Raised when a trace does not hold the latency of a network (yet)."""


class Trace:
    """An open trace, from `open_trace`.

    Args:
        path: the file.
        lines: its lines after the first, with their numbers.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, lines: Mapping[int, dict[str, Any]]) -> None:
        self.path = path
        self._scores = {number: line for number, line in lines.items() if "latency_ms" not in line}
        latencies = [line for line in lines.values() if "latency_ms" in line]
        self._latencies = {Expansion(**line["factors"]): float(line["latency_ms"]) for line in latencies}

    def memoised(self, measure: Latency) -> Latency:
        """Returns a function that measures each latency once, also over interruptions, and records it."""

        def latency(expansion: Expansion) -> float:
            if expansion not in self._latencies:
                milliseconds = measure(expansion)
                line = {"latency_ms": milliseconds, "factors": vars(expansion)}
                _check_latency(line)
                self._append(line)
                self._latencies[expansion] = milliseconds
            return self._latencies[expansion]

        return latency

    def measured(self, expansion: Expansion) -> float:
        """Returns the recorded latency of a network in milliseconds; inf if it was not measured."""
        return self._latencies.get(expansion, math.inf)

    def known(self, expansion: Expansion) -> float:
        """Returns the recorded latency of a network in milliseconds; raises `NotMeasured` if there is none."""
        if expansion not in self._latencies:
            raise NotMeasured
        return self._latencies[expansion]

    @property
    def scores(self) -> int:
        """Number of scores that the file held when it was read."""
        return len(self._scores)

    def resume(self, search: Search) -> None:
        """Records the scores of the trace in a new search.

        Raises:
            UserError: a line is not the score of a candidate that the search asks for. Names the file and the line.
        """
        for number, line in self._scores.items():
            found = {name: value for name, value in line.items() if name not in _SCORE_COLUMNS}
            candidates = [candidate for candidate in search.pending() if _columns(candidate) == found]
            rule = "hold the score of a candidate that the search asks for (the file was edited)"
            summary = {name: found[name] for name in ("step", "axis", "seed", "share")}
            require(bool(candidates), f"{self.path}, line {number}", rule, summary)
            search.record(candidates[0], _score(line))

    def append(self, candidate: Candidate, score: Score) -> None:
        """Appends the score of a candidate and waits until it is on the disk.

        Raises:
            WriteError: the disk is full, or the file cannot be written. Earlier lines stay intact.
        """
        self._append(_score_line(candidate, score))

    def _append(self, line: Mapping[str, Any]) -> None:
        content = memoryview(_encoded(line))
        with os_errors_as_write_error(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)  # does not create a file without settings
            size = os.fstat(descriptor).st_size
            try:
                while content:
                    content = content[os.write(descriptor, content) :]
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            finally:
                os.close(descriptor)


def require_search_folder(folder: Path) -> None:
    """Raises `UserError` if a folder holds files, but not those of a search. It need not exist."""
    path = folder / TRACE_NAME
    ours = {temporary_path(path), folder / LOCK_NAME}  # of a search that was killed at once
    # listed once: another process may be creating the trace
    found = set(folder.iterdir()) if folder.is_dir() else set()
    foreign = folder.exists() and not folder.is_dir()
    if foreign or (found - ours and not (path in found and path.is_file())):
        raise UserError(f"{folder} exists and is not the folder of a search, with {TRACE_NAME}; choose another folder")


@contextmanager
def open_trace(folder: Path, settings: Mapping[str, Any], *, shared: bool = False) -> Iterator[Trace]:
    """Opens the trace of a search in its work folder, and locks the folder within the block.

    A trace without scores is replaced if its settings differ.

    Args:
        folder: the work folder, which is created if it does not exist.
        settings: everything that determines the result, as values that JSON can represent.
        shared: processes on several machines take part, so that the file system must support locks.

    Raises:
        Locked: another process is searching in the folder.
        UserError: the trace is of a search with other settings, a line other than the last is damaged (names the file,
            the line and the rule), or the folder is not that of a search. A damaged last line, which an interruption
            leaves, is removed with a warning, so that its candidate is scored again.
        WriteError: the folder cannot be written.
    """
    path = folder / TRACE_NAME
    require_search_folder(folder)
    with os_errors_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    conflict, advice = f"another process is searching in {folder}", "wait for it, or use another folder"
    # A node that looks whether it sees a lock holds it for a moment.
    with locked(folder / LOCK_NAME, conflict, advice, wait=_LOCK_SECONDS, required=shared):
        first, wanted = _encoded({"format": _FORMAT, "settings": settings}), json.loads(json.dumps(settings))
        if not path.exists():
            atomic_write(path, first)
        before, lines, intact = _read(path)
        if before != wanted and all("latency_ms" in line for line in lines.values()):
            atomic_write(path, first)  # nothing was scored: a setting may have been corrected
            before, lines, intact = _read(path)
        _require_settings(path, before, wanted)
        if intact < path.stat().st_size:
            _truncate(path, intact)
        yield Trace(path, lines)


def follow_trace(folder: Path, settings: Mapping[str, Any]) -> Trace | None:
    """Returns the trace of the search that another process runs in a folder; None if it does not exist yet.

    Args:
        folder: the work folder.
        settings: see `open_trace`.

    Raises:
        UserError: the trace is damaged, or of a search with other settings.
    """
    path = folder / TRACE_NAME
    if not path.exists():
        return None
    before, lines, _ = _read(path, warns=False)  # the last line may be incomplete because it is being written
    _require_settings(path, before, json.loads(json.dumps(settings)))
    return Trace(path, lines)


def read_trace(folder: Path) -> tuple[dict[str, Any], Trace]:
    """Returns the settings and the trace of a search, for reading only. A damaged last line is ignored with a warning.

    Raises:
        UserError: there is no trace, or another line is damaged.
    """
    path = folder / TRACE_NAME
    if not path.exists():
        raise UserError(f"{folder} must be the folder of a search, with {TRACE_NAME}")
    settings, lines, _ = _read(path)
    return settings, Trace(path, lines)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Returns a hash of the settings of a search."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_result(path: Path, search: str, candidate: Candidate, score: Score) -> None:
    """Writes the score of a candidate to a file, atomically, for the process that appends it to the trace.

    Args:
        path: the file.
        search: hash of the settings of the search, see `digest_of`.
        candidate: the candidate.
        score: its score.

    Raises:
        WriteError: the file cannot be written.
    """
    atomic_write(path, _encoded({"search": search, **_score_line(candidate, score)}))


def read_result(path: Path, search: str, candidate: Candidate) -> Score:
    """Reads the score of a candidate that another process has written. The file is untrusted.

    Raises:
        UserError: the file is damaged, or of another search or candidate.
        OSError: the file does not exist or cannot be read.
    """
    line = _parsed(read_limited(path, _LARGEST_RESULT))
    require("latency_ms" not in line, "it", "hold a score")
    require(line.pop("search", None) == search, "it", "be of this search")
    require({**_columns(candidate), **_scores_of(line)} == line, "it", "be of the candidate")
    return _score(line)


def _require_settings(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `UserError` unless the settings in a trace are those wanted. Names the setting and both values."""
    for name in (*wanted, *before):
        rule = f"have the settings of this search, {name} = {wanted.get(name)!r} (continue it with its settings)"
        require(before.get(name) == wanted.get(name), f"{path}, line 1", rule, before.get(name))


def _read(path: Path, *, warns: bool = True) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """Returns the settings of a trace, its other lines by their numbers, and the size without a damaged last line."""
    content = read_limited(path, SMALL)
    complete, _, torn = content.rpartition(b"\n")
    first, *texts = [*complete.split(b"\n"), *([torn] if torn else [])]
    settings, lines, intact = _settings(f"{path}, line 1", first), dict[int, dict[str, Any]](), len(content)
    for number, text in enumerate(texts, start=2):
        is_last = number == len(texts) + 1
        try:
            require(not (torn and is_last), "it", "end with a line break")
            lines[number] = _parsed(text)
        except UserError as error:
            place = f"{path}, line {number}"
            if not is_last:
                raise UserError(f"{place} is damaged: {error}; restore the file, or use another folder") from None
            if warns:
                again = "it is dropped, and its candidate scored again"
                tell(f"warning: {place}, the last one, is damaged: {error}; {again}")
            intact -= len(text) + (not torn)
    return settings, lines, intact


def _settings(place: str, text: bytes) -> dict[str, Any]:
    """Returns the settings in the first line of a trace."""
    try:
        line = _json(text)
    except UserError as error:
        raise UserError(f"{place} must hold the settings of a search: {error}") from None
    require(line.get("format") == _FORMAT, place, f'have the format "{_FORMAT}"', line.get("format"))
    settings = line.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{place} must hold the settings of a search")
    return settings


def _parsed(text: bytes) -> dict[str, Any]:
    """Parses and checks a line after the first.

    Raises:
        UserError: the line is damaged. States the rule.
    """
    line = _json(text)
    if "latency_ms" in line:
        _check_latency(line)
        return line
    missing = {"step", "axis", "seed", "share", *_SCORE_COLUMNS} - set(line)
    require(not missing, "it", f"have the columns {', '.join(sorted(missing))}" if missing else "")
    _score(line)
    return line


def _json(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text, parse_constant=_reject)
    except (ValueError, RecursionError):  # includes text that is not UTF-8
        raise UserError("it must be a JSON object with finite numbers") from None
    require(isinstance(line, dict), "it", "be a JSON object with finite numbers", line)
    return dict(line)


def _reject(constant: str) -> None:
    raise ValueError(constant)


def _check_latency(line: Mapping[str, Any]) -> None:
    """Raises `UserError` unless a line holds a positive latency and the factors of a network."""
    value, factors = line["latency_ms"], line.get("factors")
    positive = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12
    require(positive, "a latency", "be a positive number of milliseconds", value)
    known = isinstance(factors, dict) and set(factors) == set(Expansion.__dataclass_fields__)
    require(known and set(line) == {"latency_ms", "factors"}, "factors", "be those of a network", factors)
    Expansion(**(factors or {}))


def _score(line: Mapping[str, Any]) -> Score:
    return Score(*(line[name] for name in _SCORE_COLUMNS))


def _scores_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in _SCORE_COLUMNS}


def _score_line(candidate: Candidate, score: Score) -> dict[str, Any]:
    values = (score.value, score.standard_error, score.seconds, score.training, score.reason)
    return {**_columns(candidate), **dict(zip(_SCORE_COLUMNS, values))}


def _columns(candidate: Candidate) -> dict[str, Any]:
    """Returns the columns of a line that identify its candidate."""
    network = candidate.network
    return {
        "step": network.step,
        "axis": network.axis,
        "contracts": network.contracts,
        "parent": vars(network.parent),
        "factors": vars(network.expansion),
        "macs": network.cost.macs,
        "ratio": network.ratio,
        "params": network.cost.params,
        "seed": candidate.seed,
        "share": candidate.share,
        **vars(candidate.phase),
    }


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _truncate(path: Path, size: int) -> None:
    with os_errors_as_write_error(path), path.open("rb+") as file:
        file.truncate(size)
        os.fsync(file.fileno())
