"""Video files -> records: decodes them in parallel, writes whole shards and the manifest, goes on where it stopped.

Imports no TensorFlow at the top: commands that only read settings import this module.
"""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from x3d_tf.errors import UserError, require
from x3d_tf.files import WriteError
from x3d_tf.processes import available_cpus
from x3d_tf.startup import starting_tensorflow
from x3d_tf.text import counted
from x3d_tf.data.build import class_names
from x3d_tf.data.records import index
from x3d_tf.data.build.state import BuildFolder, Failure, Finished, open_build
from x3d_tf.data.build.encoding import TIMEOUT, Encode, Retryable, encode_all, encode_or_reason
from x3d_tf.data.build.key_frames import FIRST_MINUTE, MARGIN, find_key_frames
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.build.sources import (Sources, Video, find_videos, read_csv)
from x3d_tf.data.video.image_sequences import FOLDER_FPS
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.types import Storage

_FASTEST = 1000.0  # images a second that a folder of frames may have
ESTIMATE_FROM = 16  # videos, from which the size of all is estimated


@dataclass(frozen=True)
class _Coding:
    """How frames are stored: short side in pixels, quality of JPEG, the processes that do it and seconds a video."""

    short_side: int
    quality: int
    workers: int | None
    timeout: float

    def __post_init__(self) -> None:
        require(self.short_side >= 1, "short_side", "be at least 1 pixel", self.short_side)
        require(1 <= self.quality <= 95, "quality", "be in 1..95", self.quality)
        require(self.workers is None or self.workers >= 1, "workers", "be at least 1", self.workers)
        require(0 < self.timeout <= 1e6, "timeout", "be above 0 and at most 1,000,000 seconds", self.timeout)
        self.stored()  # has an upper bound of its own

    def stored(self) -> Storage:
        """What the manifest says of the frames."""
        return Storage(self.short_side, self.quality)


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote.

    Attributes:
        manifest: of the records.
        failures: how many files are listed in `failures.csv`.
        was_finished: whether an earlier run had written all, so that nothing was done now.
        to_retry: how many videos took too long, or changed meanwhile: the next run tries them again.
    """

    manifest: Manifest
    failures: int
    was_finished: bool = False
    to_retry: int = 0


def build_records(
    videos: str | Path | None,
    output: str | Path,
    *,
    csv: str | Path | None = None,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    classes: str | Path | None = None,
    short_side: int = 256,
    quality: int = 95,
    seed: int = 0,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> BuildResult:
    """Turns videos into records.

    Equal videos and settings give equal bytes, whatever the number of workers, and also where a build was stopped, even
    killed, and called again: it goes on after the last finished shard. Files that cannot be decoded are listed with
    their reasons in `failures.csv`, and the rest goes on; hidden files are ignored. Those that took too long or
    changed meanwhile are tried again when the same build is started again; others once their files have changed. After
    the first videos the size of all is estimated and compared with the free disk. Worker processes are spawned: a
    script that calls this guards its entry with `if __name__ == "__main__":`.

    Args:
        videos: holds a folder of videos for each class; or such folders below one folder for each split. With `csv`
            the folder that its paths are relative to; None is that of the csv file.
        output: folder for the records: new, empty, or of the same build.
        csv: instead of folders, a file that lists the videos, UTF-8, with the columns `path` and `label` and any of
            `split` ("train", "val", "test" or what `splits` names), `start` and `end` (the seconds to keep of the
            video; without them all of it), separated by commas, ";" or tabs. A file may be listed several times with
            different times. Several labels separated by ";" in any line (in quotes where ";" separates columns) make
            the records multi-label.
        splits: names of the split folders, or of what the csv file's column holds. By default the folders "train",
            "val" and "test" (also "training", "valid", "validate", "validation" and "testing", in any case), where
            there are "train" and another: they are the splits "train", "val" and "test". Else all is "train".
        split: instead, the part of each class's videos that becomes "test", in (0, 1); the others become "train".
            Where videos have several classes, the part of all videos.
        classes: text file with the name of a class on each line, in the order of their labels; a label may then also be
            the number of a line, from 0. By default the names found: by value where all are digits, else
            alphabetically. Names that look like a slip ("hug" beside "Hug ", "nan") get a warning.
        short_side: of the stored frames, in pixels; smaller videos keep their size.
        quality: of the JPEG files, 1..95.
        seed: of the order in the shards and of the choice of test videos.
        workers: processes that decode; one for each CPU by default.
        timeout: seconds that decoding one video may take.
        progress: whether to show a progress bar and the estimate.

    Raises:
        UserError: a setting out of range; folders, files or lines that are not as above; an `output` of another build
            or of something else; a split without a video that can be read; workers that cannot start; a disk too small,
            full or without permission: what is finished stays.
    """
    coding = _Coding(short_side, quality, workers, timeout)
    root = None if videos is None else Path(videos)
    names = None if classes is None else Path(classes)
    if csv is not None:
        sources = read_csv(Path(csv), videos=root, splits=splits, split=split, seed=seed, classes=names)
    elif root is not None:
        sources = find_videos(root, splits=splits, split=split, seed=seed, classes=names)
    else:
        raise UserError("videos or csv must be given")
    draw = {"splits": list(splits) if splits else None, "split": split}  # tell builds apart before their videos do
    return _build(sources, Path(output), "videos" if csv is None else "csv", coding, seed, draw, progress)


def build_key_frames(
    videos: str | Path,
    output: str | Path,
    boxes: Mapping[str, str | Path],
    *,
    proposals: Mapping[str, str | Path] | None = None,
    exclusions: Mapping[str, str | Path] | None = None,
    label_map: str | Path | None = None,
    starts_at: float = FIRST_MINUTE,
    frame_rate: float = FOLDER_FPS,
    short_side: int = 256,
    quality: int = 95,
    seed: int = 0,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> BuildResult:
    """Turns the key frames that AVA's files name into records of action detection, one with the frames around each.

    Otherwise as `build_records`.

    Args:
        videos: holds for each video a file `NAME.*`, or a folder `NAME` with its frames as images, whose names end
            with their numbers. Where numbers are left out, the image before them is repeated.
        output: folder for the records: new, empty, or of the same build.
        boxes: by split, the csv file of boxes and their actions; see `x3d_tf.data.datasets.ava.read_boxes`.
        proposals: by split, that of the boxes of a person detector, with scores.
        exclusions: by split, that of key frames to leave out.
        label_map: .pbtxt file of the actions; AVA's 80 unless given.
        starts_at: second of the film at which the files begin; AVA's are cut at minute 15.
        frame_rate: images a second in folders of frames.
        short_side, quality, seed, workers, timeout, progress: see `build_records`.

    Raises:
        UserError: see `build_records` and `key_frames.find_key_frames`. Videos that are missing, or end before a key
            frame, are listed in `failures.csv`.
    """
    coding = _Coding(short_side, quality, workers, timeout)
    require(0 <= starts_at < math.inf, "starts_at", "be seconds, at least 0", starts_at)
    require(
        0 < frame_rate <= _FASTEST, "frame_rate", f"be above 0 and at most {_FASTEST:g} images a second", frame_rate
    )

    def paths(given: Mapping[str, str | Path] | None) -> dict[str, Path]:
        return {split: Path(path) for split, path in (given or {}).items()}

    sources = find_key_frames(
        Path(videos),
        paths(boxes),
        proposals=paths(proposals),
        exclusions=paths(exclusions),
        label_map=None if label_map is None else Path(label_map),
        starts_at=starts_at,
        frame_rate=frame_rate,
        seed=seed,
    )
    margin = {"margin": MARGIN, "starts_at": starts_at}
    return _build(sources, Path(output), "key frames", coding, seed, margin, progress)


def _build(
    sources: Sources, output: Path, source: str, coding: _Coding, seed: int, draw: dict[str, Any], progress: bool
) -> BuildResult:
    settings: dict[str, int | float | str] = {"source": source, "seed": seed, **sources.facts}
    build = {"short_side": coding.short_side, "quality": coding.quality, "videos_per_shard": index.VIDEOS_PER_SHARD}
    for doubt in class_names.doubts(sources.classes):
        warnings.warn(doubt, stacklevel=3)
    _check_splits(sources)
    with open_build(output, settings | draw | build, sources) as folder:
        if folder.is_finished:
            result = BuildResult(_whole(folder), folder.count_failures(), was_finished=True)
        else:
            result = _Build(folder, sources, coding, progress).run(settings)
        folder.clean()
    return result


def _check_splits(sources: Sources) -> None:
    """Raises where a split has nothing to make records of: training would find that out much later."""
    for name, videos in sources.splits.items():
        if not videos:
            unusable = sources.unusable
            why = f": {counted(len(unusable), 'unusable entry')}, such as {unusable[0]}" if unusable else ""
            raise UserError(f"split {name} has no videos{why}. Give it some, or leave it out with --splits")


class _Shard(NamedTuple):
    """A shard to be made: its split, its file's name, and the videos it is to hold."""

    split: str
    file: str
    videos: list[Video]


class _Build:
    """One run over the shards that are not finished yet."""

    def __init__(self, folder: BuildFolder, sources: Sources, coding: _Coding, progress: bool) -> None:
        self.folder, self.sources, self.coding, self.progress = folder, sources, coding, progress
        self.shards = [
            _Shard(split, file, videos[part])
            for split, videos in sources.splits.items()
            for file, part in index.plan_shards(split, len(videos))
        ]
        found = {shard.file: folder.finished(shard.file) for shard in self.shards}
        self.finished = {file: finished for file, finished in found.items() if finished is not None}
        pending = [video for shard in self.shards if shard.file not in self.finished for video in shard.videos]
        self.pending = [video._replace(state=folder.states[video.path]) for video in pending]
        encode: Encode = partial(encode_or_reason, short_side=coding.short_side, quality=coding.quality)
        self.encoded = encode_all(self.pending, encode, coding.workers or available_cpus(), coding.timeout)
        self.estimate = _Estimate(self.pending)

    def run(self, settings: dict[str, int | float | str]) -> BuildResult:
        """Writes what is missing, then the manifest."""
        with starting_tensorflow(devices=False):
            from x3d_tf.data.records.format import join_shards

        total = sum(len(videos) for videos in self.sources.splits.values())
        if self.finished and self.progress:
            print(f"{len(self.finished)} of {counted(len(self.shards), 'shard')} exist already")
        failures = self._write_failures()
        done = total - len(self.pending)
        bar = tqdm(total=total, initial=done, unit="video", disable=not self.progress, smoothing=0)
        with closing(self.encoded), bar:
            for shard in self.shards:
                if shard.file not in self.finished:
                    try:
                        self.finished[shard.file] = self._write_shard(shard, bar)
                        failures = self._write_failures()
                    except WriteError as error:
                        raise UserError(
                            f"{error}; finished shards stay, {len(self.finished)} of {len(self.shards)}, and the same "
                            "command resumes from there"
                        ) from error
        splits = {
            name: join_shards([self.finished[shard.file].part for shard in self.shards if shard.split == name])
            for name in self.sources.splits
        }
        if not any(part.records for part in splits.values()):
            self.folder.clear()  # so that it makes way for another build
            raise UserError(f"no video can be read ({total} tried); the reasons are in {self.folder.failures}")
        for name, part in splits.items():
            count = len(self.sources.splits[name])
            if not part.records:
                raise UserError(
                    f"no video of split {name} can be read ({count} tried); the reasons are in "
                    f"{self.folder.failures}. Mend or replace them and give the same command again"
                )
        stored, task = self.coding.stored(), self.sources.task
        manifest = Manifest(self.folder.root, self.sources.classes, splits, settings, stored, task)
        manifest.save()
        notes = self.finished.values()
        to_retry = sum(failure.retry for note in notes for failure in note.failures)
        return BuildResult(manifest, failures, to_retry=to_retry)

    def _write_shard(self, shard: _Shard, bar: "tqdm[Any]") -> Finished:
        from x3d_tf.data.records.format import Source, write_shard

        labels = {name: label for label, name in enumerate(self.sources.classes)}
        sources = [
            Source(v.media_id, tuple(sorted(labels[name] for name in v.classes)), v.annotation) for v in shard.videos
        ]
        failed: list[Failure] = []

        def take(result: EncodedVideo | VideoError) -> None:
            bar.update()
            if isinstance(result, VideoError):
                failed.append(Failure(result.path, result.reason, isinstance(result, Retryable)))
            if self.estimate.add(result):
                self._check_disk(bar)

        part = write_shard(self.folder.root / shard.file, sources, self.encoded, self.sources.classes, take)
        finished = Finished(part, tuple(failed))
        self.folder.finish(shard.file, finished)
        return finished

    def _check_disk(self, bar: "tqdm[Any]") -> None:
        """Says how much is to come; raises if there is no room for it."""
        rest, free = self.estimate.rest, shutil.disk_usage(self.folder.root).free
        if self.progress:
            bar.write(f"about {_size(rest + self.estimate.bytes)} of records; {_size(free)} are free on the disk")
        if rest > free:
            raise UserError(
                f"output: {self.folder.root} needs about {_size(rest)} more, by the first {ESTIMATE_FROM} videos, and "
                f"its disk has {_size(free)} free: make room, name a folder on another disk, or store less with a "
                "lower --quality or --short_side"
            )

    def _write_failures(self) -> int:
        """Lists what failed so far, in the order of the videos."""
        unusable = [Failure(error.path, error.reason) for error in self.sources.unusable]
        finished = [self.finished[shard.file] for shard in self.shards if shard.file in self.finished]
        return self.folder.write_failures([*unusable, *(line for entry in finished for line in entry.failures)])


class _Estimate:
    """How many bytes are to come, from those of the first videos: they are in random order.

    Sizes are taken to be proportional to the seconds kept where all videos name them; else to the sizes of the files
    where whole files are kept; else equal.
    """

    def __init__(self, videos: Sequence[Video]) -> None:
        if all(video.end is not None for video in videos):
            self._weights = [(video.end or 0.0) - video.start for video in videos]
        elif all(video.start == 0.0 and video.end is None for video in videos):
            self._weights = [_file_size(video.path) for video in videos]
        else:
            self._weights = [1.0] * len(videos)
        self._taken = 0
        self.bytes = 0

    def add(self, result: EncodedVideo | VideoError) -> bool:
        """Takes the next video; returns whether it is the one after which to look at the estimate."""
        self._taken += 1
        if isinstance(result, EncodedVideo):
            self.bytes += sum(len(frame) for frame in result.frames)
        return self._taken == ESTIMATE_FROM < len(self._weights)

    @property
    def rest(self) -> float:
        """Bytes to come."""
        seen, rest = math.fsum(self._weights[: self._taken]), math.fsum(self._weights[self._taken :])
        return self.bytes * rest / seen if seen else 0.0


def _whole(folder: BuildFolder) -> Manifest:
    manifest = Manifest.load(folder.root)
    for name in manifest.splits:
        manifest.split(name)  # raises where a shard is gone
    return manifest


def _file_size(path: Path) -> float:
    try:
        return float(path.stat().st_size)
    except OSError:
        return 0.0


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
