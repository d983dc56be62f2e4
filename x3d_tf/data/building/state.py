"""FileState of a build in its output folder: the settings and the finished shards, so that it can be resumed.

Imports no TensorFlow. Besides the records, the folder holds:

    build.json      settings and source files; written first and kept
    failures.csv    videos that were left out, with reasons; kept
    .build/         one JSON file per finished shard, with its index and failures; deleted when manifest.json exists,
                    unless a video failed
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
from x3d_tf.data.building.encoding import file_state
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.records.frames import open_frames
from x3d_tf.data.records.index import Record, Shard, Split, plan_shards
from x3d_tf.data.records.manifest import MANIFEST_NAME
from x3d_tf.data.video.image_sequences import FileState
from x3d_tf.errors import UserError
from x3d_tf.files import LARGE, atomic_write, os_errors_as_write_error, read_limited, temporary_path
from x3d_tf.locks import locked

BUILD_NAME = "build.json"
FAILURES_NAME = "failures.csv"
STATE_NAME = ".build"

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


@dataclass(frozen=True)
class BuildFolder:
    """The output folder of a build, from `open_build`."""

    root: Path
    states: Mapping[Path, FileState]  # the source files when the build began

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
        """Saves the note of a finished shard. Call it once the shard has its final name."""
        content = {
            "shards": [asdict(entry) for entry in finished.part.shards],
            "records": [record._asdict() for record in finished.part.records],
            "failures": finished.failures,
        }
        atomic_write(self._state(shard), json.dumps(content).encode())

    def delete_note(self, shard: str) -> None:
        """Deletes the note of a shard, so that it is built again."""
        self._state(shard).unlink(missing_ok=True)

    def to_retry(self) -> list[str]:
        """Returns the finished shards with videos to retry."""
        return [shard for shard, note in self._notes() if any(failure.retry for failure in note.failures)]

    def _notes(self) -> Iterator[tuple[str, FinishedShard]]:
        for path in sorted((self.root / STATE_NAME).glob("*.json")):
            note = self.load_finished(path.stem)
            if note is not None:
                yield path.stem, note

    def write_failures(self, failures: Sequence[Failure]) -> int:
        """Replaces `failures.csv` and returns its number of rows, without duplicates for segments of a file."""
        lines = list(dict.fromkeys((failure.path, failure.reason) for failure in failures))
        atomic_write(self.failures, csv_files.encoded([("path", "reason"), *lines]))
        return len(lines)

    def count_failures(self) -> int:
        """Returns the number of failures in `failures.csv`, 0 if it does not exist."""
        if not self.failures.is_file():
            return 0
        with self.failures.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv_files.Reader(file)) - 1

    def clean(self) -> None:
        """Deletes the notes unless a video failed: a later run may build its shard again."""
        if not any(note.failures for _, note in self._notes()):
            self.clear()

    def clear(self) -> None:
        """Deletes all notes."""
        shutil.rmtree(self.root / STATE_NAME, ignore_errors=True)

    def _state(self, shard: str) -> Path:
        return self.root / STATE_NAME / f"{shard}.json"


@contextmanager
def open_build(root: Path, settings: dict[str, Any], sources: Sources) -> Iterator[BuildFolder]:
    """Opens the output folder of a new or an interrupted build, and locks it within the block.

    A build without finished shards is replaced by the new one. A finished shard is built again, and the manifest with
    it, only if one of its failed videos is to be retried or has changed since.

    Raises:
        UserError: the folder is a file, holds other files or another build (the message names the setting or video that
            differs), or another process builds into it.
        WriteError: the folder cannot be written.
    """
    paths = list({video.path for videos in sources.splits.values() for video in videos})
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        states = dict(zip(paths, threads.map(file_state, paths), strict=True))
    wanted = {"settings": settings, "classes": list(sources.classes), "videos": _describe(sources, states)}
    folder = BuildFolder(root, states)
    if root.exists() and not root.is_dir():
        raise UserError(f"output: {root} is a file, not a folder")
    with os_errors_as_write_error(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_content(folder, wanted, sources)
        (root / STATE_NAME).mkdir(exist_ok=True)
    advice = "wait for it, or use another folder"
    with locked(root / STATE_NAME / "lock", f"output: another process is building into {root}", advice):
        stale = _check_content(folder, wanted, sources)  # again, because only the lock excludes other processes
        for shard in {*stale, *folder.to_retry()}:
            (root / MANIFEST_NAME).unlink(missing_ok=True)
            folder.delete_note(shard)
        if not folder.is_finished:
            for partial in root.glob(temporary_path(Path("*")).name):  # left by a killed run
                partial.unlink()
            atomic_write(root / BUILD_NAME, json.dumps(wanted).encode())
        yield folder


def _check_content(folder: BuildFolder, wanted: dict[str, Any], sources: Sources) -> list[str]:
    """Raises unless the folder is empty, or holds this build or an unstarted one.

    Returns:
        The finished shards whose failed videos have changed since.
    """
    root = folder.root
    names = (entry.name for entry in root.iterdir() if not entry.match(temporary_path(Path("*")).name))
    entries = sorted(name for name in names if name not in (FAILURES_NAME, BUILD_NAME, STATE_NAME))
    state = root / STATE_NAME
    started = bool(entries) or any(entry.suffix == ".json" for entry in (state.iterdir() if state.is_dir() else ()))
    if not (root / BUILD_NAME).is_file():
        if entries:
            raise UserError(
                f"output: {root} is not empty (it holds {entries[0]}); delete its contents or use another folder"
            )
        return []
    changed: set[tuple[str, str]] = set()
    try:
        found = json.loads(read_limited(root / BUILD_NAME, LARGE))
        difference, changed = _difference(found, wanted)
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
