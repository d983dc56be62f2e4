"""The folder that a build writes to: of which build it is, and which shards are finished, so that it can go on.

Imports no TensorFlow. While a build goes on its folder holds:

    build.json      settings and source files; written first, stays
    failures.csv    what was left out, and why; stays
    .build/         for each finished shard a JSON file with its index and failures; goes once manifest.json is there
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from x3d_tf._checks import UserError
from x3d_tf._files import partial_of, write_whole, writing
from x3d_tf._locks import locked
from x3d_tf.data.index import Record, Shard, Split
from x3d_tf.data.manifest import MANIFEST_NAME
from x3d_tf.data.sources import Sources

BUILD_NAME = "build.json"
FAILURES_NAME = "failures.csv"
STATE_NAME = ".build"

Failure = tuple[str, str]  # path, reason


class Finished(NamedTuple):
    """A shard that is done: the split it makes by itself (empty where all its videos failed), and what failed."""

    part: Split
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class BuildFolder:
    """The output folder of one build, from `opened`."""

    root: Path

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
            content = json.loads(self._state(shard).read_text(encoding="utf-8"))
            shards = tuple(Shard(**entry) for entry in content["shards"])
            rows = [{**row, "labels": tuple(row["labels"])} for row in content["records"]]
            records = tuple(Record(**row) for row in rows)
            failures = tuple((str(path), str(reason)) for path, reason in content["failures"])
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
        write_whole(self._state(shard), json.dumps(content).encode())

    def write_failures(self, failures: Sequence[Failure]) -> int:
        """Replaces `failures.csv`; returns its number of lines. A file that fails in several pieces is there once."""
        table = io.StringIO(newline="")
        lines = list(dict.fromkeys(failures))
        csv.writer(table).writerows([("path", "reason"), *lines])
        write_whole(self.failures, table.getvalue().encode("utf-8", "backslashreplace"))
        return len(lines)

    def count_failures(self) -> int:
        """The lines of `failures.csv` below the first, if it is still there."""
        if not self.failures.is_file():
            return 0
        with self.failures.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.reader(file)) - 1

    def clean(self) -> None:
        """Removes what only an unfinished build needs."""
        shutil.rmtree(self.root / STATE_NAME, ignore_errors=True)

    def _state(self, shard: str) -> Path:
        return self.root / STATE_NAME / f"{shard}.json"


@contextmanager
def opened(root: Path, settings: dict[str, Any], sources: Sources) -> Iterator[BuildFolder]:
    """The folder of the build with these settings and sources: begun, or as an earlier run left it.

    A build of which no shard is finished yet makes way for another one. Within the block no other process may build
    into the folder.

    Raises:
        UserError: the folder is a file, holds something else or another build (names the setting or file that differs),
            or another process builds into it.
        WriteError: it cannot be written.
    """
    wanted = {"settings": settings, "classes": list(sources.classes), "videos": _described(sources)}
    if root.exists() and not root.is_dir():
        raise UserError(f"output: {root} is a file, not a folder")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_content(root, wanted)
        (root / STATE_NAME).mkdir(exist_ok=True)
    advice = "wait for it, or name another folder"
    with locked(root / STATE_NAME / "lock", f"output: another process is building into {root}", advice):
        _check_content(root, wanted)  # again: now nobody else changes it
        if not (root / MANIFEST_NAME).is_file():
            for partial in root.glob(partial_of(Path("*")).name):  # of a run that was killed
                partial.unlink()
            write_whole(root / BUILD_NAME, json.dumps(wanted).encode())
        yield BuildFolder(root)


def _check_content(root: Path, wanted: dict[str, Any]) -> None:
    """Raises unless the folder is as good as empty, or holds this very build."""
    names = (entry.name for entry in root.iterdir() if not entry.match(partial_of(Path("*")).name))
    entries = sorted(name for name in names if name not in (FAILURES_NAME, BUILD_NAME, STATE_NAME))
    state = root / STATE_NAME
    started = bool(entries) or any(entry.suffix == ".json" for entry in (state.iterdir() if state.is_dir() else ()))
    if not (root / BUILD_NAME).is_file():
        if entries:
            raise UserError(
                f"output: {root} is not empty (it holds {entries[0]}); delete its content or name another folder"
            )
        return
    try:
        found = json.loads((root / BUILD_NAME).read_text(encoding="utf-8"))
        difference = _difference(found, wanted)
    except (ValueError, TypeError, KeyError, AttributeError):
        difference = f"that {BUILD_NAME} no longer describes"
    if difference and started:
        raise UserError(
            f"output: {root} holds a build {difference}; give its settings again to go on with it, delete the folder, "
            "or name another one"
        )


def _described(sources: Sources) -> list[list[Any]]:
    """What a record is made of, for each in order: split, name, classes, seconds, and size and time of the file."""
    rows = []
    for split, videos in sources.splits.items():
        for video in videos:
            row = [split, video.media_id, list(video.classes), video.start, video.end, *_state_of(video.path)]
            known = [] if video.annotation is None else [hashlib.sha256(repr(video.annotation).encode()).hexdigest()]
            rows.append([*row, *known])
    return rows


def _state_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; of a file that is not there -1."""
    try:
        status = path.stat()
    except OSError:  # a link to nowhere
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What an earlier build had that this one has not, in words that follow "a build"."""
    for name, value in wanted["settings"].items():
        before = found["settings"].get(name)
        if before != value:
            return f"with {name} = {before!r}, not {value!r}"
    before, now = ({(row[0], row[1]): row for row in content["videos"]} for content in (found, wanted))
    for key in [*before, *now]:
        if key not in now:
            return f"of another list of videos: {key[1]} of split {key[0]} is no longer there"
        if key not in before:
            return f"of another list of videos: {key[1]} of split {key[0]} is new"
        if before[key] != now[key]:
            return f"of other content: {key[1]} of split {key[0]} has changed since"
    return None if found == wanted else "of other classes"
