"""Video files -> records: finds the videos, decodes them in parallel, writes whole shards and the manifest.

Imports no TensorFlow at the top: worker processes import this module and only decode.
"""

import csv
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from x3d_tf._checks import UserError, require
from x3d_tf.data.manifest import Manifest
from x3d_tf.data.video import EncodedVideo, VideoError, encode_video

FAILURES_NAME = "failures.csv"

Encode = Callable[[Path], EncodedVideo | VideoError]


class Video(NamedTuple):
    """A file to be read, the name that its record gets, and its class."""

    path: Path
    media_id: str
    class_name: str


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote: the records, and how many files are listed in `failures.csv`."""

    manifest: Manifest
    failures: int


def build_records(
    videos: str | Path,
    output: str | Path,
    *,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    short_side: int = 256,
    quality: int = 95,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> BuildResult:
    """Turns a folder of videos into records.

    Equal videos and settings give equal bytes, whatever the number of workers. Files that cannot be decoded are listed
    with their reasons in `failures.csv`, and the rest goes on; hidden files are ignored. Worker processes are spawned:
    a script that calls this guards its entry with `if __name__ == "__main__":`.

    Args:
        videos: holds a folder of videos for each class; or such folders below one folder for each split.
        output: new or empty folder for the records.
        splits: names of the split folders. By default "train" and "test" where both exist; else all is "train".
        split: instead, the part of each class's videos that becomes "test", in (0, 1); the others become "train".
        short_side: of the stored frames, in pixels; smaller videos keep their size.
        quality: of the JPEG files, 1..95.
        seed: of the order in the shards and of the choice of test videos.
        workers: processes that decode; one for each CPU by default.
        progress: whether to show a progress bar.

    Raises:
        UserError: a setting out of range, folders that do not exist or are not laid out so, an `output` that is not
            empty, or no video that can be read.
    """
    require(short_side >= 1, "short_side", "be at least 1 pixel", short_side)
    require(1 <= quality <= 95, "quality", "be in 1..95", quality)
    require(workers is None or workers >= 1, "workers", "be at least 1", workers)
    source, target = Path(videos), Path(output)
    found, unplaced = find_videos(source, splits=splits, split=split, seed=seed)
    if not any(found.values()):
        beside = f"; {len(unplaced)} files lie beside where those should be" if unplaced else ""
        raise UserError(f"videos: {source} holds no folder with files for each class{beside}")
    _make_empty(target)
    return _write(
        target,
        found,
        unplaced,
        partial(_encode_or_reason, short_side=short_side, quality=quality),
        {"source": "videos", "short_side": short_side, "quality": quality, "seed": seed},
        workers or _cpus(),
        progress,
    )


def find_videos(
    videos: Path, *, splits: Sequence[str] | None = None, split: float | None = None, seed: int = 0
) -> tuple[dict[str, list[Video]], list[VideoError]]:
    """Finds the videos of each split, in the order in which they will lie in its shards; arguments as `build_records`.

    Returns:
        The videos of each split by its name, and the files that lie outside the class folders.
    """
    if not videos.is_dir():
        raise UserError(f"videos: {videos} is not a folder")
    require(splits is None or split is None, "splits and split", "not be given together", (splits, split))
    if split is not None:
        require(0 < split < 1, "split", "be between 0 and 1", split)
    if splits is None and split is None:
        splits = default_splits(videos)
    unplaced: list[VideoError] = []
    if splits is None:
        everything = _videos_by_class(videos, videos, unplaced)
        return _by_fraction(everything, split or 0.0, seed), unplaced
    require(
        len(set(splits)) == len(splits) > 0 and all(_is_plain(name) for name in splits),
        "splits",
        "be distinct names of folders",
        tuple(splits),
    )
    found = {}
    for name in splits:
        if not (videos / name).is_dir():
            raise UserError(f"splits: {videos / name} is not a folder")
        everything = _videos_by_class(videos / name, videos, unplaced)
        found[name] = _in_order(everything, seed)
    return found, unplaced


def default_splits(videos: Path) -> tuple[str, str] | None:
    """The split folders that are used without being named: "train" and "test", where both exist."""
    names = ("train", "test")
    return names if all((videos / name).is_dir() for name in names) else None


def encode_all(paths: Sequence[Path], encode: Encode, workers: int) -> Iterator[EncodedVideo | VideoError]:
    """Applies `encode` to each path in worker processes; results come in the order of the paths, few at a time.

    A file on which a worker process dies gives a VideoError like other unreadable files.
    """
    done = 0
    while done < len(paths):
        try:
            for result in _in_parallel(paths[done:], encode, workers):
                done += 1
                yield result
        except BrokenProcessPool:
            # One of the files in flight killed its process, and all of them are lost with it. Alone, the next file
            # either passes or turns out to be the one.
            yield _alone(paths[done], encode)
            done += 1


def _write(
    target: Path,
    found: dict[str, list[Video]],
    unplaced: list[VideoError],
    encode: Encode,
    settings: dict[str, int | float | str],
    workers: int,
    progress: bool,
) -> BuildResult:
    from x3d_tf.data.records import Source, write_split

    classes = sorted({video.class_name for videos in found.values() for video in videos})
    labels = {name: label for label, name in enumerate(classes)}
    paths = [video.path for videos in found.values() for video in videos]
    failures = 0
    with (
        (target / FAILURES_NAME).open("w", newline="", encoding="utf-8", errors="backslashreplace") as failures_file,
        tqdm(total=len(paths), unit="video", disable=not progress, smoothing=0) as bar,
    ):
        table = csv.writer(failures_file)
        table.writerow(("path", "reason"))

        def note(result: EncodedVideo | VideoError) -> None:
            nonlocal failures
            if isinstance(result, VideoError):
                table.writerow((result.path, result.reason))
                failures_file.flush()
                failures += 1

        def advance(result: EncodedVideo | VideoError) -> None:
            note(result)
            bar.update()

        for stray in unplaced:
            note(stray)
        encoded = encode_all(paths, encode, workers)
        parts = {}
        for name, videos in found.items():
            sources = [Source(video.media_id, (labels[video.class_name],)) for video in videos]
            parts[name] = write_split(target, name, sources, encoded, classes, advance)
    if not any(part.records for part in parts.values()):
        raise UserError(f"none of the {len(paths)} videos can be read; the reasons are in {target / FAILURES_NAME}")
    manifest = Manifest(target, tuple(classes), parts, settings)
    manifest.save()
    return BuildResult(manifest, failures)


def _videos_by_class(folder: Path, root: Path, unplaced: list[VideoError]) -> dict[str, list[Video]]:
    """The files of each class folder; what lies beside the class folders goes to `unplaced`."""
    classes: dict[str, list[Video]] = {}
    for class_folder in sorted(_visible(folder)):
        if not class_folder.is_dir():
            unplaced.append(VideoError(class_folder, "is not in a class folder"))
            continue
        name = _text(class_folder.name)
        for file in sorted(_visible(class_folder)):
            if file.is_dir():
                raise UserError(
                    f"{file} is a folder, but class folders hold video files; if {folder.name}/ holds a folder for "
                    f"each split, give their names: --splits={','.join(sorted(p.name for p in _visible(folder)))}"
                )
            classes.setdefault(name, []).append(Video(file, _text(file.relative_to(root).as_posix()), name))
    return classes


def _by_fraction(classes: dict[str, list[Video]], part: float, seed: int) -> dict[str, list[Video]]:
    if part == 0.0:
        return {"train": _in_order(classes, seed)}
    train, test = {}, {}
    for name, videos in classes.items():
        shuffled = _in_order({name: videos}, seed)
        # Rounded, but each side gets a video where there are two.
        count = min(max(round(part * len(videos)), 1), len(videos) - 1)
        test[name], train[name] = shuffled[:count], shuffled[count:]
    return {"train": _in_order(train, seed), "test": _in_order(test, seed)}


def _in_order(classes: dict[str, list[Video]], seed: int) -> list[Video]:
    """All videos, shuffled by a hash of seed and name: classes mix, and one video more or less moves no other."""
    videos = [video for members in classes.values() for video in members]
    return sorted(videos, key=lambda video: hashlib.sha256(f"{seed}:{video.media_id}".encode()).digest())


def _make_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(entry.name for entry in folder.iterdir() if entry.name != FAILURES_NAME)
    if entries:
        raise UserError(
            f"output: {folder} is not empty (it holds {entries[0]}); delete its content or name another folder"
        )


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and os.sep not in name


def _text(name: str) -> str:
    """A file name as text that can be stored: file systems also hold names that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_or_reason(path: Path, short_side: int, quality: int) -> EncodedVideo | VideoError:
    try:
        return encode_video(path, short_side, quality)
    except VideoError as error:
        return error


def _in_parallel(paths: Sequence[Path], encode: Encode, workers: int) -> Iterator[EncodedVideo | VideoError]:
    waiting: deque[Future[EncodedVideo | VideoError]] = deque()
    pool = _pool(min(workers, len(paths)))
    try:
        for path in paths:
            waiting.append(pool.submit(encode, path))
            if len(waiting) > 2 * workers:  # results wait for their turn in memory, so only a few may be under way
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(path: Path, encode: Encode) -> EncodedVideo | VideoError:
    with _pool(1) as pool:
        try:
            return pool.submit(encode, path).result()
        except BrokenProcessPool:
            return VideoError(path, "kills the process that decodes it")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the parent has TensorFlow's threads, which do not survive a fork.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles the keyboard, and ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot end its workers: each watches for that itself
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
