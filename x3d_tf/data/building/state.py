"""FileState of a build in its output folder: the settings and the finished shards, so that it can be resumed.

Imports no TensorFlow. Besides the records, the folder holds:

    build.json      settings and source files; written first and kept
    failures.csv    videos that were left out, with reasons; kept
    .build/         one JSON file per finished shard, with its index and failures; deleted when manifest.json exists,
                    unless a video failed

While a process builds, `.build` also holds its lock files and a folder of its own, `work-...`. Every file is written
there, and then renamed. So two processes that build the same shard cannot damage each other's files, also on file
systems whose locks do not reach other machines.

A complete build, and one that finishes a build, locks `.build/lock` for itself. Parts share it, and each locks a file
of its own. Parts that start wait for each other at `.build/opening.lock`: the first one writes build.json.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import csv_files
from x3d_tf.data.building.encoding import file_state
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.records.frames import frames_path, open_frames
from x3d_tf.data.records.index import Record, Shard, Split, plan_shards
from x3d_tf.data.records.manifest import MANIFEST_NAME
from x3d_tf.data.video.image_sequences import FileState
from x3d_tf.errors import UserError
from x3d_tf.files import LARGE, SMALL, atomic_write, os_errors_as_write_error, read_limited, temporary_path
from x3d_tf.locks import is_locked, locked
from x3d_tf.text import whole

BUILD_NAME = "build.json"
FAILURES_NAME = "failures.csv"
STATE_NAME = ".build"

_LOCK_NAME = "lock"
_PARTS_NAME = "parts"  # the number of parts, for error messages
_WORK = "work-"
_PART_LOCK = re.compile(r"part-([0-9]{1,18})-of-([0-9]{1,18})\.lock", re.ASCII)
_OPENING_SECONDS = 300.0  # reading the build.json of millions of videos from a network disk takes seconds per part
_ADVICE = "wait for it, or use another folder"

_STAT_THREADS = 16  # hides the latency of network disks: AVA has 12 million frame files
_STATE = slice(5, 7)  # columns with file size and time in the rows of build.json


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


@dataclass(frozen=True)
class BuildFolder:
    """The output folder of a build, from `open_build`.

    Attributes:
        root: the folder.
        work: folder in it for the files of this process until they are complete.
        states: the source files when the build began.
        stale: shards whose failed videos have changed since they were finished; a process that finishes a build does
            not build them again.
    """

    root: Path
    work: Path
    states: Mapping[Path, FileState]
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
        try:
            content = json.loads(read_limited(self._state(shard), LARGE))
            shards = tuple(Shard(**entry) for entry in content["shards"])
            rows = [{**row, "labels": tuple(row["labels"])} for row in content["records"]]
            records = tuple(Record(**row) for row in rows)
            failures = tuple(
                Failure(str(path), str(reason), bool(retry)) for path, reason, retry in content["failures"]
            )
            is_complete = all(
                entry.file == shard
                and (self.root / shard).stat().st_size == entry.bytes
                and open_frames(self.root / shard, entry).records == len(records)
                for entry in shards
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return FinishedShard(Split(shards, records), failures) if is_complete else None

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
            "shards": [asdict(entry) for entry in finished.part.shards],
            "records": [record._asdict() for record in finished.part.records],
            "failures": finished.failures,
        }
        self._write(self._state(shard), json.dumps(content).encode())

    def build_again(self, shards: Iterable[str]) -> None:
        """Deletes the notes of shards, so that they are built again, and the manifest, which lists them."""
        for shard in shards:
            (self.root / MANIFEST_NAME).unlink(missing_ok=True)
            self._state(shard).unlink(missing_ok=True)

    def to_retry(self, shards: Iterable[str]) -> list[str]:
        """Returns the finished shards with videos to retry."""
        notes = ((shard, self.load_finished(shard)) for shard in shards)
        return [shard for shard, note in notes if note and any(failure.retry for failure in note.failures)]

    def noted(self) -> list[str]:
        """Returns the names of the shards that have a note, which may be damaged."""
        return sorted(path.stem for path in (self.root / STATE_NAME).glob("*.json"))

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
        (self.root / STATE_NAME / _PARTS_NAME).unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all notes."""
        for shard in self.noted():
            self._state(shard).unlink(missing_ok=True)

    def parts(self) -> int | None:
        """Returns the number of parts that the build was last divided into; None if it was not, or is not known."""
        try:
            return whole(read_limited(self.root / STATE_NAME / _PARTS_NAME, SMALL).decode("ascii"))
        except (OSError, ValueError):
            return None

    def describe(self, description: _Description, part: Part | None) -> None:
        """Writes build.json and the number of parts, unless they are up to date."""
        path = self.root / BUILD_NAME
        if not path.is_file() or read_limited(path, LARGE) != description.encoded:
            self._write(path, description.encoded)
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
            differs), or another process builds into it.
        WriteError: the folder cannot be written.
    """
    paths = list({video.path for videos in sources.splits.values() for video in videos})
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        states = dict(zip(paths, threads.map(file_state, paths), strict=True))
    wanted = {"settings": settings, "classes": list(sources.classes), "videos": _describe(sources, states)}
    description, state = _Description(wanted, json.dumps(wanted).encode()), root / STATE_NAME
    folder = BuildFolder(root, state, states)
    if root.exists() and not root.is_dir():
        raise UserError(f"output: {root} is a file, not a folder")
    if finish and not (root / BUILD_NAME).is_file():
        raise UserError(f"output: {root} holds no build; build its parts before --finish, with --part")
    with os_errors_as_write_error(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_content(folder, description, sources, strict=finish)
        if part is not None and folder.is_finished and not state.exists():
            yield folder  # nothing failed, so there is nothing to do
            return
        state.mkdir(exist_ok=True)

    def open_folder(alone: bool) -> BuildFolder:
        # again, because only the lock excludes other processes
        stale = _check_content(folder, description, sources, strict=finish or not alone)
        with os_errors_as_write_error(state):
            work = Path(tempfile.mkdtemp(prefix=_work_prefix(part), dir=state))
        opened = replace(folder, work=work, stale=frozenset(stale))
        if not finish:
            opened.build_again(stale)
            if not opened.is_finished:
                opened.describe(description, part)
        return opened

    try:
        with _alone(root, open_folder) if part is None else _as_part(root, part, open_folder) as opened:
            try:
                if not finish:
                    opened.build_again(opened.to_retry(shards))
                yield opened
            finally:
                shutil.rmtree(opened.work, ignore_errors=True)
    finally:
        if part is None:  # a part that starts may be about to lock a file in it
            with suppress(OSError):  # it still has notes
                state.rmdir()


@contextmanager
def _alone(root: Path, open_folder: Callable[[bool], BuildFolder]) -> Iterator[BuildFolder]:
    """Locks the folder for this process, and deletes what killed processes have left."""
    state = root / STATE_NAME
    running = _running_parts(state)
    conflict = f"output: another process is building {f'{running[0]} ' if running else ''}into {root}"
    with locked(state / _LOCK_NAME, conflict, _ADVICE):
        for partial in root.glob(temporary_path(Path("*")).name):
            partial.unlink()
        for entry in state.iterdir():
            if entry.name.startswith(_WORK):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".lock":
                entry.unlink()
        yield open_folder(True)


@contextmanager
def _as_part(root: Path, part: Part, open_folder: Callable[[bool], BuildFolder]) -> Iterator[BuildFolder]:
    """Locks a part for this process, and deletes what a killed process of the same part has left."""
    state = root / STATE_NAME
    all_of_it = f"output: another process is building all shards of {root}, or finishes them"
    opening = f"output: parts are being started in {root} for {_OPENING_SECONDS:.0f} s"
    with ExitStack() as stack:
        stack.enter_context(locked(state / _LOCK_NAME, all_of_it, _ADVICE, shared=True))
        with locked(state / "opening.lock", opening, "try again", wait=_OPENING_SECONDS):
            running = _running_parts(state)
            other = next((found for found in running if found.total != part.total), None)
            if other is not None:
                raise UserError(
                    f"output: another process is building {other} into {root}; all parts that are built at the same "
                    f"time must be parts of {other.total}, not of {part.total}. Wait for it, or use its number of parts"
                )
            conflict = f"output: another process is building {part} into {root}"
            advice = "wait for it, or build another part"
            # waits because a process that looks for running parts holds the lock for an instant
            stack.enter_context(locked(state / f"{part.id}.lock", conflict, advice, wait=1.0))
            for left in state.glob(_work_prefix(part) + "*"):
                shutil.rmtree(left, ignore_errors=True)
            opened = open_folder(not running)
        yield opened


def _running_parts(state: Path) -> list[Part]:
    """Returns the parts that processes are building."""
    found = [(match, path) for path in state.glob("part-*") if (match := _PART_LOCK.fullmatch(path.name))]
    return sorted(Part(int(match[1]), int(match[2])) for match, path in found if is_locked(path))


def _work_prefix(part: Part | None) -> str:
    return f"{_WORK}{'all' if part is None else part.id}-"


def _check_content(
    folder: BuildFolder, description: _Description, sources: Sources, *, strict: bool = False
) -> list[str]:
    """Raises unless the folder is empty, or holds this build or, if not `strict`, an unstarted one.

    Returns:
        The finished shards whose failed videos have changed since.
    """
    root = folder.root
    names = {entry.name for entry in root.iterdir() if not entry.match(temporary_path(Path("*")).name)}
    entries = sorted(names - {FAILURES_NAME, BUILD_NAME, STATE_NAME})
    started = strict or bool(entries or folder.noted())
    if BUILD_NAME not in names:
        if entries:
            raise UserError(
                f"output: {root} is not empty (it holds {entries[0]}); delete its contents or use another folder"
            )
        return []
    changed: set[tuple[str, str]] = set()
    try:
        content = read_limited(root / BUILD_NAME, LARGE)
        if content == description.encoded:  # as it is for most parts
            return []
        difference, changed = _difference(json.loads(content), description.content)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        difference = f"whose {BUILD_NAME} is damaged"
    stale: list[str] = []
    if started and not difference:
        difference, stale = _stale_shards(folder, sources, changed)
    if difference and started:
        raise UserError(
            f"output: {root} holds a build {difference}. Use its settings to resume it, delete the folder, or "
            "use another one"
        )
    return stale


def _stale_shards(folder: BuildFolder, sources: Sources, changed: set[tuple[str, str]]) -> tuple[str | None, list[str]]:
    """Returns a difference as `_difference` does, or else the finished shards whose failed videos have changed."""
    stale = []
    for split, videos in sources.splits.items() if changed else ():
        for shard, part in plan_shards(split, len(videos)):
            media_ids = [video.media_id for video in videos[part] if (split, video.media_id) in changed]
            note = folder.load_finished(shard) if media_ids else None
            stored = {record.media_id for record in note.part.records} if note else set()
            if note is None and folder.is_finished:
                stored = set(media_ids)
            for media_id in media_ids:
                if media_id in stored:
                    return f"of another video: {media_id} of split {split} has changed since", []
            stale += [shard] if note else []
    return None, stale


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


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str | None, set[tuple[str, str]]]:
    """Compares the earlier build with the wanted one.

    Returns:
        The difference, as words that follow "a build", or None; and the split and name of each video whose file has
        changed but whose other columns are the same.
    """
    for name, value in wanted["settings"].items():
        before = found["settings"].get(name)
        if before != value:
            return f"with {name} = {before!r}, not {value!r}", set()
    before, now = ({(row[0], row[1]): row for row in content["videos"]} for content in (found, wanted))
    changed: set[tuple[str, str]] = set()
    for key in [*before, *now]:
        if key not in now:
            return f"of other videos: {key[1]} of split {key[0]} is no longer among them", set()
        if key not in before:
            return f"of other videos: {key[1]} of split {key[0]} is new", set()
        if before[key] != now[key]:
            changed.add(key)
            if _without_state(before[key]) != _without_state(now[key]):
                return f"of another video: {key[1]} of split {key[0]} has changed since", set()
    same = list(before) == list(now) and found["classes"] == wanted["classes"]
    return None if same else "with other classes", changed


def _without_state(row: list[Any]) -> list[Any]:
    return [*row[: _STATE.start], *row[_STATE.stop :]]
