"""The folder that a build writes to: of which build it is, and which shards are finished, so that it can go on.

Imports no TensorFlow. While a build goes on its folder holds:

    build.json      settings and source files; written first, stays
    failures.csv    what was left out, and why; stays
    .build/         for each finished shard a JSON file with its index and failures; goes once manifest.json is there
                    and no video has failed
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf import csv_files
from x3d_tf.errors import UserError
from x3d_tf.files import LARGE, temporary_path, read_limited, atomic_write, os_errors_as_write_error
from x3d_tf.locks import locked
from x3d_tf.data.build.encoding import state_of
from x3d_tf.data.records.index import Record, Shard, Split, plan_shards
from x3d_tf.data.records.manifest import MANIFEST_NAME
from x3d_tf.data.build.sources import Sources
from x3d_tf.data.video.image_sequences import State

BUILD_NAME = "build.json"
FAILURES_NAME = "failures.csv"
STATE_NAME = ".build"

_STAT_THREADS = 16  # a network disk answers late; AVA's frames are 12 million files
_STATE = slice(5, 7)  # where size and time of its file stand in the description of a record


class Failure(NamedTuple):
    """A video that did not become a record: its path, the reason, and whether the next run tries it again."""

    path: str
    reason: str
    retry: bool = False


class Finished(NamedTuple):
    """A shard that is done: the split it makes by itself (empty where all its videos failed), and what failed."""

    part: Split
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class BuildFolder:
    """The output folder of one build, from `open_build`."""

    root: Path
    states: Mapping[Path, State]  # of the source files when the build began

    @property
    def failures(self) -> Path:
        """The list of what was left out."""
        return self.root / FAILURES_NAME

    @property
    def is_finished(self) -> bool:
        """Whether the build came to its end."""
        return (self.root / MANIFEST_NAME).is_file()

    def finished(self, shard: str) -> Finished | None:
        """What an earlier run noted of a shard, if it finished it and the file is still there as it was."""
        try:
            content = json.loads(read_limited(self._state(shard), LARGE))
            shards = tuple(Shard(**entry) for entry in content["shards"])
            rows = [{**row, "labels": tuple(row["labels"])} for row in content["records"]]
            records = tuple(Record(**row) for row in rows)
            failures = tuple(
                Failure(str(path), str(reason), bool(retry)) for path, reason, retry in content["failures"]
            )
            whole = all(entry.file == shard and (self.root / shard).stat().st_size == entry.bytes for entry in shards)
        except (OSError, ValueError, TypeError, KeyError):
            return None  # to be made again
        return Finished(Split(shards, records), failures) if whole else None

    def finish(self, shard: str, finished: Finished) -> None:
        """Notes that a shard is done; to be called once it lies under its name."""
        content = {
            "shards": [asdict(entry) for entry in finished.part.shards],
            "records": [record._asdict() for record in finished.part.records],
            "failures": finished.failures,
        }
        atomic_write(self._state(shard), json.dumps(content).encode())

    def forget(self, shard: str) -> None:
        """Removes the note of a shard, which is to be made again."""
        self._state(shard).unlink(missing_ok=True)

    def to_retry(self) -> list[str]:
        """The finished shards that lack a video which is to be tried again."""
        return [shard for shard, note in self._notes() if any(failure.retry for failure in note.failures)]

    def _notes(self) -> Iterator[tuple[str, Finished]]:
        for path in sorted((self.root / STATE_NAME).glob("*.json")):
            note = self.finished(path.stem)
            if note is not None:
                yield path.stem, note

    def write_failures(self, failures: Sequence[Failure]) -> int:
        """Replaces `failures.csv`; returns its number of lines. A file that fails in several pieces is there once."""
        lines = list(dict.fromkeys((failure.path, failure.reason) for failure in failures))
        atomic_write(self.failures, csv_files.encoded([("path", "reason"), *lines]))
        return len(lines)

    def count_failures(self) -> int:
        """The lines of `failures.csv` below the first, if it is still there."""
        if not self.failures.is_file():
            return 0
        with self.failures.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv_files.Reader(file)) - 1

    def clean(self) -> None:
        """Removes the notes unless a video has failed: a later run may make its shard again."""
        if not any(note.failures for _, note in self._notes()):
            self.clear()

    def clear(self) -> None:
        """Removes all notes."""
        shutil.rmtree(self.root / STATE_NAME, ignore_errors=True)

    def _state(self, shard: str) -> Path:
        return self.root / STATE_NAME / f"{shard}.json"


@contextmanager
def open_build(root: Path, settings: dict[str, Any], sources: Sources) -> Iterator[BuildFolder]:
    """The folder of the build with these settings and sources: begun, or as an earlier run left it.

    A build of which no shard is finished yet makes way for another one. Of a finished shard nothing is left to be made
    unless it lacks a video that is to be tried again, or whose file has changed since it failed: then the shard, and
    with it the manifest, is made again. Within the block no other process may build into the folder.

    Raises:
        UserError: the folder is a file, holds something else or another build (names the setting or file that differs),
            or another process builds into it.
        WriteError: it cannot be written.
    """
    paths = list({video.path for videos in sources.splits.values() for video in videos})
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        states = dict(zip(paths, threads.map(state_of, paths), strict=True))
    wanted = {"settings": settings, "classes": list(sources.classes), "videos": _described(sources, states)}
    folder = BuildFolder(root, states)
    if root.exists() and not root.is_dir():
        raise UserError(f"output: {root} is a file, not a folder")
    with os_errors_as_write_error(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_content(folder, wanted, sources)
        (root / STATE_NAME).mkdir(exist_ok=True)
    advice = "wait for it, or name another folder"
    with locked(root / STATE_NAME / "lock", f"output: another process is building into {root}", advice):
        stale = _check_content(folder, wanted, sources)  # again: now nobody else changes it
        for shard in {*stale, *folder.to_retry()}:
            (root / MANIFEST_NAME).unlink(missing_ok=True)
            folder.forget(shard)
        if not folder.is_finished:
            for partial in root.glob(temporary_path(Path("*")).name):  # of a run that was killed
                partial.unlink()
            atomic_write(root / BUILD_NAME, json.dumps(wanted).encode())
        yield folder


def _check_content(folder: BuildFolder, wanted: dict[str, Any], sources: Sources) -> list[str]:
    """Raises unless the folder is as good as empty, or holds this very build.

    Returns:
        The finished shards that lack videos which failed and have changed since.
    """
    root = folder.root
    names = (entry.name for entry in root.iterdir() if not entry.match(temporary_path(Path("*")).name))
    entries = sorted(name for name in names if name not in (FAILURES_NAME, BUILD_NAME, STATE_NAME))
    state = root / STATE_NAME
    started = bool(entries) or any(entry.suffix == ".json" for entry in (state.iterdir() if state.is_dir() else ()))
    if not (root / BUILD_NAME).is_file():
        if entries:
            raise UserError(
                f"output: {root} is not empty (it holds {entries[0]}); delete its content or name another folder"
            )
        return []
    changed: set[tuple[str, str]] = set()
    try:
        found = json.loads(read_limited(root / BUILD_NAME, LARGE))
        difference, changed = _difference(found, wanted)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        difference = f"that {BUILD_NAME} no longer describes"
    stale: list[str] = []
    if started and not difference:
        difference, stale = _stale_shards(folder, sources, changed)
    if difference and started:
        raise UserError(
            f"output: {root} holds a build {difference}; give its settings again to go on with it, delete the folder, "
            "or name another one"
        )
    return stale


def _stale_shards(folder: BuildFolder, sources: Sources, changed: set[tuple[str, str]]) -> tuple[str | None, list[str]]:
    """The finished shards without records of the changed videos, which are their own; or the difference, as below."""
    stale = []
    for split, videos in sources.splits.items() if changed else ():
        for shard, part in plan_shards(split, len(videos)):
            own = [video.media_id for video in videos[part] if (split, video.media_id) in changed]
            note = folder.finished(shard) if own else None
            kept = {record.media_id for record in note.part.records} if note else set(own if folder.is_finished else ())
            for media_id in own:
                if media_id in kept:
                    return f"of other content: {media_id} of split {split} has changed since", []
            stale += [shard] if note else []
    return None, stale


def _described(sources: Sources, states: Mapping[Path, State]) -> list[list[Any]]:
    """What a record is made of, for each in order: split, name, classes, seconds, and size and time of the file."""
    rows = []
    for split, videos in sources.splits.items():
        for video in videos:
            row = [split, video.media_id, list(video.classes), video.start, video.end, *states[video.path]]
            known = [] if video.annotation is None else [hashlib.sha256(repr(video.annotation).encode()).hexdigest()]
            rows.append([*row, *known])
    return rows


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str | None, set[tuple[str, str]]]:
    """What an earlier build had that this one has not, in words that follow "a build".

    Beside it the videos, by split and name, whose files alone are no longer as they were.
    """
    for name, value in wanted["settings"].items():
        before = found["settings"].get(name)
        if before != value:
            return f"with {name} = {before!r}, not {value!r}", set()
    before, now = ({(row[0], row[1]): row for row in content["videos"]} for content in (found, wanted))
    changed: set[tuple[str, str]] = set()
    for key in [*before, *now]:
        if key not in now:
            return f"of another list of videos: {key[1]} of split {key[0]} is no longer there", set()
        if key not in before:
            return f"of another list of videos: {key[1]} of split {key[0]} is new", set()
        if before[key] != now[key]:
            changed.add(key)
            if _without_state(before[key]) != _without_state(now[key]):
                return f"of other content: {key[1]} of split {key[0]} has changed since", set()
    same = list(before) == list(now) and found["classes"] == wanted["classes"]
    return None if same else "of other classes", changed


def _without_state(row: list[Any]) -> list[Any]:
    return [*row[: _STATE.start], *row[_STATE.stop :]]
