"""State of a build in its output folder: the settings and the finished shards, so that it can be resumed.

Imports no TensorFlow. Besides the records, the folder holds:

    build.json      settings and source files; written first and kept
    failures.csv    videos that were left out, with reasons; kept
    .build/         one JSON file per finished shard, with its index and failures; deleted when manifest.json exists,
                    unless a video failed

While a process builds, `.build` also holds its lock files and a folder of its own, `work-...`. Every file is written
there, and then renamed. So two processes that build the same shard cannot damage each other's files, also on file
systems whose locks do not reach other machines.

A complete build, and one that finishes a build, locks `.build/lock` for itself. Parts share it, and each locks a file
of its own. Parts that start wait for each other at `.build/opening.lock`: the first one writes build.json. A later one
changes it only for videos of its own shards, because the notes of the other shards belong to the state in it.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import csv_files
from x3d_tf.data.building.encoding import file_state
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.records.frames import frames_path, open_frames
from x3d_tf.data.records.index import Split, plan_shards
from x3d_tf.data.records.manifest import MANIFEST_NAME, split_from_json, split_to_json
from x3d_tf.data.video.image_sequences import FileState
from x3d_tf.errors import UserError
from x3d_tf.files import (
    LARGE,
    SMALL,
    WriteError,
    atomic_write,
    open_regular,
    os_errors_as_write_error,
    read_limited,
    temporary_path,
)
from x3d_tf.locks import is_locked, locked
from x3d_tf.text import whole
from x3d_tf.types import AnnotationKind

BUILD_NAME = "build.json"
FAILURES_NAME = "failures.csv"
STATE_NAME = ".build"

_LOCK_NAME = "lock"
_PARTS_NAME = "parts"  # the number of parts, for error messages
_OPENING_NAME = "opening.lock"
_PART_LOCK = re.compile(r"part-([0-9]{1,18})-of-([0-9]{1,18})\.lock", re.ASCII)
_WORK = re.compile(r"work-(?:all|part-[0-9]{1,18}-of-[0-9]{1,18})-.+", re.ASCII)
_PARTIAL = re.compile(r"\.(?:manifest\.json|.+\.tfrecord(?:\.frames)?)\.partial")
_OPENING_SECONDS = 3600.0  # a part holds the lock for less than a second, but thousands may start at the same time
_ADVICE = "wait for it, or use another folder"

_STAT_THREADS = 16  # hides the latency of network disks: AVA has 12 million frame files
_STATE = slice(5, 7)  # columns with file size and time in the rows of build.json
_MAX_SHOWN = 200  # characters of a value from build.json in a message

_Version = tuple[int, int, int]  # of a file that is only replaced: inode, size in bytes, time in nanoseconds


class Failure(NamedTuple):
    """A video that did not become a record: its path, the reason, and a flag for retrying it in the next run."""

    path: str
    reason: str
    retry: bool = False


class FinishedShard(NamedTuple):
    """A finished shard: its index as a split of one shard (empty if all its videos failed), and its failures."""

    part: Split
    failures: tuple[Failure, ...]


class Part(NamedTuple):
    """A part of a build, for a machine: every `total`th shard, beginning with the shard `number`, 1..`total`."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.total}"

    @property
    def flag(self) -> str:
        """The flag of `build_records` that builds the part."""
        return f"--part={self.number}/{self.total}"

    @property
    def id(self) -> str:
        """Name of the part in names of files."""
        return f"part-{self.number}-of-{self.total}"


class _Description(NamedTuple):
    """Content of build.json: as an object, and as the bytes of the file."""

    content: dict[str, Any]
    encoded: bytes

    @classmethod
    def of(cls, content: dict[str, Any]) -> "_Description":
        """Returns the description with this content."""
        return cls(content, json.dumps(content).encode())


class _Earlier(NamedTuple):
    """The build.json in the folder, compared with the build that is opened.

    Attributes:
        version: version of the file; None if it does not exist.
        difference: the difference between the builds, as words that follow "a build", or None.
        changed: earlier rows of the videos whose files have changed since, by shard and name; other columns are equal.
    """

    version: _Version | None
    difference: str | None
    changed: dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class BuildFolder:
    """The output folder of a build, from `open_build`.

    Attributes:
        root: the folder.
        work: folder in it for the files of this process until they are complete.
        states: the source files when the build began.
        classes: number of classes.
        task: kind of annotation.
        stale: shards whose failed videos have changed since they were finished; a process that finishes a build does
            not build them again.
    """

    root: Path
    work: Path
    states: Mapping[Path, FileState]
    classes: int
    task: AnnotationKind
    stale: frozenset[str] = frozenset()

    @property
    def failures(self) -> Path:
        """Path of the list of failures."""
        return self.root / FAILURES_NAME

    @property
    def is_finished(self) -> bool:
        """True once the manifest exists."""
        return (self.root / MANIFEST_NAME).is_file()

    def load_finished(self, shard: str) -> FinishedShard | None:
        """Returns the note of an earlier run on a shard; None if it is unfinished or a file is missing or resized."""
        path = self._state(shard)
        try:
            content = json.loads(read_limited(path, SMALL))
            part = split_from_json(path, "part", content["part"], self.classes, self.task)
            failures = tuple(map(_failure, content["failures"]))
            is_complete = len(part.shards) == bool(part.records) and all(
                entry.file == shard
                and (self.root / shard).stat().st_size == entry.bytes
                and open_frames(self.root / shard, entry).records == len(part.records)
                for entry in part.shards
            )
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        is_complete = is_complete and bool(part.records or failures)
        return FinishedShard(Split(part.shards, part.records), failures) if is_complete else None

    def save_finished(self, shard: str, finished: FinishedShard) -> None:
        """Moves a finished shard and the file of its frames from `work` to their final names, then saves its note."""
        target = self.root / shard
        with os_errors_as_write_error(target):
            for path in (target, frames_path(target)):
                if finished.part.shards:
                    (self.work / path.name).replace(path)
                else:  # of an earlier build, in which a video could be read
                    path.unlink(missing_ok=True)
        content = {
            "part": split_to_json(finished.part),
            "failures": finished.failures,
        }
        self._write(self._state(shard), json.dumps(content).encode())

    def build_again(self, shards: Iterable[str]) -> None:
        """Deletes the notes of shards, so that they are built again, and the manifest, which lists them."""
        for shard in shards:
            _delete(self.root / MANIFEST_NAME)
            _delete(self._state(shard))

    def to_retry(self, shards: Iterable[str]) -> list[str]:
        """Returns the finished shards with videos to retry."""
        notes = ((shard, self.load_finished(shard)) for shard in shards)
        return [shard for shard, note in notes if note and any(failure.retry for failure in note.failures)]

    def noted(self) -> list[str]:
        """Returns the names of the shards that have a note, which may be damaged."""
        return sorted(path.stem for path in (self.root / STATE_NAME).glob("*.tfrecord.json"))

    def write_failures(self, failures: Sequence[Failure]) -> int:
        """Replaces `failures.csv` and returns its number of rows, without duplicates for segments of a file."""
        lines = list(dict.fromkeys((failure.path, failure.reason) for failure in failures))
        self._write(self.failures, csv_files.encoded([("path", "reason"), *lines]))
        return len(lines)

    def count_failures(self) -> int:
        """Returns the number of failures in `failures.csv`, 0 if it does not exist."""
        if not self.failures.is_file():
            return 0
        with self.failures.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv_files.Reader(file)) - 1

    def clean(self) -> None:
        """Deletes the notes unless a video failed: a later run may build its shard again."""
        notes = map(self.load_finished, self.noted())
        if not any(note.failures for note in notes if note):
            self.clear()
        _delete(self.root / STATE_NAME / _PARTS_NAME)

    def clear(self) -> None:
        """Deletes all notes."""
        for shard in self.noted():
            _delete(self._state(shard))

    def parts(self) -> int | None:
        """Returns the number of parts that the build was last divided into; None if it was not, or is not known."""
        try:
            return whole(read_limited(self.root / STATE_NAME / _PARTS_NAME, SMALL).decode("ascii"))
        except (OSError, ValueError):
            return None

    def describe(self, description: _Description | None, part: Part | None) -> None:
        """Writes build.json unless the description is None, and the number of parts unless it is up to date."""
        if description is not None:
            self._write(self.root / BUILD_NAME, description.encoded)
        if part is not None and part.total != self.parts():
            self._write(self.root / STATE_NAME / _PARTS_NAME, str(part.total).encode())

    def _state(self, shard: str) -> Path:
        return self.root / STATE_NAME / f"{shard}.json"

    def _write(self, path: Path, content: bytes) -> None:
        """Writes a file atomically; several processes may write it at the same time."""
        atomic_write(self.work / path.name, content)
        with os_errors_as_write_error(path):
            (self.work / path.name).replace(path)


@contextmanager
def open_build(
    root: Path,
    settings: dict[str, Any],
    sources: Sources,
    shards: Sequence[str],
    *,
    part: Part | None = None,
    finish: bool = False,
) -> Iterator[BuildFolder]:
    """Opens the output folder of a new or an interrupted build, and locks it within the block.

    A build without finished shards is replaced by the new one. A finished shard is built again, and the manifest with
    it, only if one of its failed videos is to be retried or has changed since.

    Args:
        root: the folder.
        settings: settings that identify the build, besides its sources.
        sources: the videos.
        shards: the shards that this process builds if they are not finished.
        part: the part that they are; other parts may be built at the same time. None for all shards.
        finish: the folder must hold this build, and no note is deleted.

    Raises:
        UserError: the folder is a file, holds other files or another build (the message names the setting or video that
            differs), its `.build` is a symbolic link, or another process builds into it.
        WriteError: the folder cannot be written.
    """
    states = _states(sources)
    content = {"settings": settings, "classes": list(sources.classes), "videos": _describe(sources, states)}
    folder = BuildFolder(root, root / STATE_NAME, states, len(sources.classes), sources.task)
    opening = _Opening(folder, _Description.of(content), sources, frozenset(shards), part, finish)
    earlier = opening.check()
    if part is not None and opening.is_done(earlier):
        yield folder
        return
    with ExitStack() as stack:
        opened = opening.alone(stack, earlier) if part is None else opening.as_part(stack, part, earlier)
        if not finish:
            opened.build_again(opened.to_retry(shards))
        yield opened


@dataclass(frozen=True)
class _Opening:
    """Opening of an output folder by a process; see `open_build`.

    Attributes:
        folder: the folder, whose `work` does not exist yet.
        description: the build that it must hold.
        sources: its videos.
        shards: the shards that this process builds.
        part: the part that they are, or None.
        finish: True for a process that only finishes the build.
    """

    folder: BuildFolder
    description: _Description
    sources: Sources
    shards: frozenset[str]
    part: Part | None
    finish: bool

    @property
    def state(self) -> Path:
        """Path of the folder `.build`."""
        return self.folder.root / STATE_NAME

    def check(self) -> _Earlier:
        """Creates the folder, or raises if it holds something else; returns its build.json."""
        root = self.folder.root
        if root.exists() and not root.is_dir():
            raise UserError(f"output: {root} is a file, not a folder")
        if self.finish and not (root / BUILD_NAME).is_file():
            raise UserError(f"output: {root} holds no build; build its parts before --finish, with --part")
        with os_errors_as_write_error(root):
            root.mkdir(parents=True, exist_ok=True)
        earlier = self.compare()
        self.stale(earlier, strict=self.finish)
        return earlier

    def is_done(self, earlier: _Earlier) -> bool:
        """Returns True if the manifest exists and no shard is to be built again, so that no lock is needed."""
        if not self.folder.is_finished:
            return False
        again = self.shards.intersection(self.stale(earlier, strict=True))
        return not again and not self.folder.to_retry(self.shards)

    def alone(self, stack: ExitStack, earlier: _Earlier) -> BuildFolder:
        """Locks the folder for this process until the stack ends, and deletes what killed processes have left."""
        running = next(_running_parts(self.state), None)
        stack.callback(_remove_if_empty, self.state)
        self._lock(stack, f"output: another process is building {f'{running} ' if running else ''}into")
        with os_errors_as_write_error(self.state):
            for entry in [*self.folder.root.iterdir()]:
                if _PARTIAL.fullmatch(entry.name):
                    entry.unlink()
            for entry in [*self.state.iterdir()]:
                if _WORK.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name == _OPENING_NAME or _PART_LOCK.fullmatch(entry.name):
                    entry.unlink()
        if earlier.version != _version(self.folder.root / BUILD_NAME):
            earlier = self.compare()
        return self._open(stack, earlier, alone=True)

    def as_part(self, stack: ExitStack, part: Part, earlier: _Earlier) -> BuildFolder:
        """Locks a part for this process until the stack ends, and deletes what a killed one of the same part has left.

        Compares build.json before it locks `opening.lock`, because that takes seconds for millions of videos.
        """
        root, state = self.folder.root, self.state
        self._lock(stack, "output: another process is building all shards of", ", or finishes them", shared=True)
        conflict = f"output: parts are being started in {root} for {_OPENING_SECONDS:.0f} s"
        while True:
            with locked(state / _OPENING_NAME, conflict, "try again", wait=_OPENING_SECONDS):
                if earlier.version == _version(root / BUILD_NAME):
                    running = next(_running_parts(state, part.total), None)
                    self._lock_part(stack, part, running)
                    for left in state.glob(_work_prefix(part) + "*"):
                        shutil.rmtree(left, ignore_errors=True)
                    return self._open(stack, earlier, alone=running is None)
            earlier = self.compare()  # another part has written it

    def compare(self) -> _Earlier:
        """Returns the build.json in the folder, compared with this build."""
        path = self.folder.root / BUILD_NAME
        with os_errors_as_write_error(path):
            version = _version(path)
            if version is None:
                return _Earlier(None, None, {})
            changed: dict[tuple[str, str], list[Any]] = {}
            try:
                content = read_limited(path, LARGE)
                if content == self.description.encoded:  # as it is for most parts
                    return _Earlier(version, None, {})
                difference, changed = _difference(json.loads(content), self.description.content)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
                difference = f"whose {BUILD_NAME} is damaged"
            return _Earlier(version, difference, _by_shard(self.sources, changed))

    def stale(self, earlier: _Earlier, *, strict: bool) -> list[str]:
        """Raises unless the folder is empty, or holds this build or, if not `strict`, an unstarted one.

        Returns:
            The finished shards, of all parts, whose failed videos have changed since.
        """
        root = self.folder.root
        if earlier.version is None:
            if entries := self._entries():
                raise UserError(
                    f"output: {root} is not empty (it holds {entries[0]}); delete its contents or use another folder"
                )
            return []
        difference, stale = earlier.difference, list[str]()
        if difference is None:
            difference, stale = _stale_shards(self.folder, earlier.changed)
        if difference and (strict or self._entries() or self.folder.noted()):
            raise UserError(
                f"output: {root} holds a build {difference}. Use its settings to resume it, delete the folder, or "
                "use another one"
            )
        return stale

    def _entries(self) -> list[str]:
        """Returns the names in the folder, without those of a build that has no shard."""
        with os_errors_as_write_error(self.folder.root):
            entries = [*self.folder.root.iterdir()]
        names = {entry.name for entry in entries if not entry.match(temporary_path(Path("*")).name)}
        return sorted(names - {FAILURES_NAME, BUILD_NAME, STATE_NAME})

    def _lock(self, stack: ExitStack, conflict: str, rest: str = "", *, shared: bool = False) -> None:
        """Creates `.build` and locks it until the stack ends.

        Args:
            stack: holds the lock.
            conflict, rest: message if another process holds it, before and after the path of the output folder.
            shared: parts share the lock.
        """
        conflict = f"{conflict} {self.folder.root}{rest}"
        for retry in (True, False):
            if self.state.is_symlink():
                raise UserError(f"output: {self.state} must be a folder, not a symbolic link; remove the link")
            try:
                with os_errors_as_write_error(self.state):
                    self.state.mkdir(exist_ok=True)
                stack.enter_context(locked(self.state / _LOCK_NAME, conflict, _ADVICE, shared=shared))
                return
            except WriteError as error:  # a process that ends may have removed the folder at this moment
                if not retry or not isinstance(error.__cause__, FileNotFoundError | FileExistsError):
                    raise

    def _lock_part(self, stack: ExitStack, part: Part, running: Part | None) -> None:
        """Locks the file of a part until the stack ends; raises if a part of another number of parts is running."""
        root = self.folder.root
        if running is not None and running.total != part.total:
            raise UserError(
                f"output: another process is building {running} into {root}; all parts that are built at the same "
                f"time must be parts of {running.total}, not of {part.total}. Wait for it, or use its number of parts"
            )
        conflict = f"output: another process is building {part} into {root}"
        advice = "wait for it, or build another part"
        # waits because a process that looks for running parts holds the lock for an instant
        stack.enter_context(locked(self.state / f"{part.id}.lock", conflict, advice, wait=1.0))

    def _open(self, stack: ExitStack, earlier: _Earlier, *, alone: bool) -> BuildFolder:
        """Checks the folder again, because only the lock excludes other processes, and creates the work folder."""
        stale = self.stale(earlier, strict=self.finish or not alone)
        with os_errors_as_write_error(self.state):
            work = Path(tempfile.mkdtemp(prefix=_work_prefix(self.part), dir=self.state))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        opened = replace(self.folder, work=work, stale=frozenset(stale))
        if not self.finish:
            opened.build_again(self.shards.intersection(stale))
            if not opened.is_finished:
                opened.describe(self._to_write(earlier), self.part)
        return opened

    def _to_write(self, earlier: _Earlier) -> _Description | None:
        """Returns the new build.json; None if it needs no change.

        The rows of shards of other parts stay: their notes belong to them.
        """
        if earlier.version is None or earlier.difference:
            return self.description
        if not self.shards.intersection(earlier.changed):
            return None
        others = [rows for shard, rows in earlier.changed.items() if shard not in self.shards]
        kept = {(row[0], row[1]): row for rows in others for row in rows.values()}
        content = self.description.content
        return _Description.of(content | {"videos": [kept.get((row[0], row[1]), row) for row in content["videos"]]})


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it still has notes, or a part that starts has locked a file in it
        folder.rmdir()


def _delete(path: Path) -> None:
    with os_errors_as_write_error(path):
        path.unlink(missing_ok=True)


def _version(path: Path) -> _Version | None:
    """Returns the version of a file, None if it does not exist."""
    try:
        with open_regular(path) as file:  # which makes network file systems look at the disk
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except OSError:  # not a file, or not readable
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _running_parts(state: Path, total: int = 0) -> Iterator[Part]:
    """Yields the parts that processes are building, those of another number of parts than `total` first."""
    matches = [match for path in state.glob("part-*") if (match := _PART_LOCK.fullmatch(path.name))]
    found = sorted((int(match[2]) == total, Part(int(match[1]), int(match[2])), match[0]) for match in matches)
    return (part for _, part, name in found if is_locked(state / name))


def _work_prefix(part: Part | None) -> str:
    return f"work-{'all' if part is None else part.id}-"


def _failure(row: Any) -> Failure:
    """Returns a failure from a note; raises `ValueError` for anything else."""
    path, reason, retry = row
    if type(row) is not list or type(path) is not str or type(reason) is not str or type(retry) is not bool:
        raise ValueError("a failure must be a path, a reason and a flag")
    return Failure(path, reason, retry)


def _by_shard(sources: Sources, changed: Mapping[tuple[str, str], list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Returns the rows of videos, by split and name, as rows by shard and name."""
    found: dict[str, dict[str, list[Any]]] = {}
    for split, videos in sources.splits.items() if changed else ():
        for shard, part in plan_shards(split, len(videos)):
            for video in videos[part]:
                if (row := changed.get((split, video.media_id))) is not None:
                    found.setdefault(shard, {})[video.media_id] = row
    return found


def _stale_shards(folder: BuildFolder, changed: Mapping[str, dict[str, list[Any]]]) -> tuple[str | None, list[str]]:
    """Returns a difference as `_difference` does, or else the finished shards whose failed videos have changed."""
    stale = []
    for shard, rows in changed.items():
        note = folder.load_finished(shard)
        stored = {record.media_id for record in note.part.records} if note else set()
        if note is None and folder.is_finished:
            stored = {*rows}
        for media_id, row in rows.items():
            if media_id in stored:
                return f"of another video: {media_id} of split {row[0]} has changed since", []
        stale += [shard] if note else []
    return None, stale


def _states(sources: Sources) -> dict[Path, FileState]:
    """Returns the states of all source files."""
    paths = list({video.path for videos in sources.splits.values() for video in videos})
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        return dict(zip(paths, threads.map(file_state, paths), strict=True))


def _describe(sources: Sources, states: Mapping[Path, FileState]) -> list[list[Any]]:
    """Returns a row for each record: split, name, classes, times, file size and time, annotations, recording."""
    rows = []
    for split, videos in sources.splits.items():
        for video in videos:
            row = [split, video.media_id, list(video.classes), video.start, video.end, *states[video.path]]
            if video.annotation is not None:
                row.append(hashlib.sha256(repr(video.annotation).encode()).hexdigest())
            if video.timed:
                row.append(hashlib.sha256(repr(video.timed).encode()).hexdigest())
            if video.recording:
                row.append(video.recording)
            rows.append(row)
    return rows


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str | None, dict[tuple[str, str], list[Any]]]:
    """Compares the earlier build with the wanted one.

    Returns:
        The difference, as words that follow "a build", or None; and the earlier row of each video whose file has
        changed but whose other columns are the same, by split and name.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError: the earlier one is damaged.
    """
    for name, value in wanted["settings"].items():
        before = found["settings"].get(name)
        if before != value:
            return f"with {name} = {_shown(repr(before))}, not {value!r}", {}
    before, now = ({(row[0], row[1]): row for row in content["videos"]} for content in (found, wanted))
    changed: dict[tuple[str, str], list[Any]] = {}
    for key in [*before, *now]:
        if key not in now:
            name, split = map(_shown, (key[1], key[0]))
            return f"of other videos: {name} of split {split} is no longer among them", {}
        if key not in before:
            return f"of other videos: {key[1]} of split {key[0]} is new", {}
        if before[key] != now[key]:
            changed[key] = before[key]
            if _without_state(before[key]) != _without_state(now[key]):
                return f"of another video: {key[1]} of split {key[0]} has changed since", {}
            if [type(value) for value in before[key][_STATE]] != [int, int]:
                raise ValueError("size and time must be whole numbers")
    same = list(before) == list(now) and found["classes"] == wanted["classes"]
    return None if same else "with other classes", changed


def _without_state(row: list[Any]) -> list[Any]:
    return [*row[: _STATE.start], *row[_STATE.stop :]]


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
