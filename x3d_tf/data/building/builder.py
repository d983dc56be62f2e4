"""Builds records from videos: decodes in parallel, writes shards and the manifest, resumes an interrupted build.

Imports no TensorFlow at the top: commands that only read settings import this module.
"""

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from x3d_tf.data.building import class_names
from x3d_tf.data.building.encoding import TIMEOUT, Encode, Retryable, encode_all, encode_or_error
from x3d_tf.data.building.sources import Sources, Video
from x3d_tf.data.building.state import BuildFolder, Failure, FinishedShard, open_build
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.records import index
from x3d_tf.data.records.manifest import Manifest, check_dataset_name
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError, require
from x3d_tf.files import WriteError
from x3d_tf.processes import available_cpus
from x3d_tf.startup import starting_tensorflow
from x3d_tf.text import counted
from x3d_tf.types import Storage

if TYPE_CHECKING:
    from x3d_tf.data.records.format import RecordSource

ESTIMATE_AFTER = 16  # number of videos after which the total size is estimated


@dataclass(frozen=True)
class _EncodingSettings:
    """Encoding settings: short side in pixels, JPEG quality, number of worker processes, seconds allowed per video."""

    short_side: int
    quality: int
    workers: int | None
    timeout: float

    def __post_init__(self) -> None:
        require(self.short_side >= 1, "short_side", "be at least 1 pixel", self.short_side)
        require(1 <= self.quality <= 95, "quality", "be in 1..95", self.quality)
        require(self.workers is None or self.workers >= 1, "workers", "be at least 1", self.workers)
        require(0 < self.timeout <= 1e6, "timeout", "be above 0 and at most 1,000,000 seconds", self.timeout)
        self.storage()  # checks the upper bound of short_side

    def storage(self) -> Storage:
        """Returns the manifest's entry on how frames are stored."""
        return Storage(self.short_side, self.quality)


@dataclass(frozen=True)
class BuildResult:
    """Result of a build.

    Attributes:
        manifest: manifest of the records.
        failures: number of files listed in `failures.csv`.
        was_finished: True if an earlier run had finished the build, so that this one did nothing.
        to_retry: number of videos that took too long or changed during the build; the next run retries them.
    """

    manifest: Manifest
    failures: int
    was_finished: bool = False
    to_retry: int = 0


def build_records(
    inputs: Inputs,
    output: str | Path,
    *,
    dataset: str | None = None,
    short_side: int = 256,
    quality: int = 95,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> BuildResult:
    """Builds the records of a data set.

    The same videos and settings always give the same bytes, for any number of workers. An interrupted build resumes
    after the last finished shard when it is started again. Files that cannot be decoded are listed in `failures.csv`
    with their reasons, and the build continues without them; so are missing videos. The next run retries videos that
    took too long or changed during the build; it retries other failures once their files have changed. After the
    first videos, the total size is estimated and compared with the free disk space. Suspicious class names ("hug" next
    to "Hug ", "nan") cause a warning. Worker processes are spawned, so a script that calls this function must guard its
    entry with `if __name__ == "__main__":`.

    Args:
        inputs: what the data set is read from.
        output: folder for the records: new, empty, or from the same build.
        dataset: name of the data set; see `datasets.base.choose`.
        short_side: short side of the stored frames in pixels; smaller videos are not upscaled.
        quality: JPEG quality of the stored frames, 1..95.
        workers: number of decoder processes. Defaults to the number of CPUs.
        timeout: seconds that decoding a video may take.
        progress: shows a progress bar and the estimated size.

    Raises:
        UserError: a setting is out of range; there is no such data set, or its files differ from their description;
            `output` holds another build or other files; a split has no readable video; workers cannot start; or the
            disk is too small, full or not writable, in which case finished shards stay.
    """
    encoding = _EncodingSettings(short_side, quality, workers, timeout)
    data_set = choose(dataset, inputs)
    check_dataset_name(data_set.name, "the name of a data set")
    sources = data_set.sources(inputs)
    for warning in class_names.suspicious_names(sources.classes):
        warnings.warn(warning, stacklevel=2)
    _check_splits(sources)
    if progress and [*sources.splits] == ["train"]:
        print('All videos get the split "train". Training also requires a test split.')
    identity = _identity(data_set.name, inputs, encoding, sources)
    with open_build(Path(output), identity, sources) as folder:
        if folder.is_finished:
            result = BuildResult(_load_manifest(folder), folder.count_failures(), was_finished=True)
        else:
            result = _Build(folder, sources, encoding, progress).run(data_set.name, _settings(inputs, sources))
        folder.clean()
    return result


def _identity(dataset: str, inputs: Inputs, encoding: _EncodingSettings, sources: Sources) -> dict[str, Any]:
    """Returns the settings that identify a build, besides its videos and classes."""
    key_frames = {} if sources.key_frames is None else asdict(sources.key_frames)
    settings = {
        "dataset": dataset,
        "seed": inputs.seed,
        "frame_rate": inputs.frame_rate,
        "splits": inputs.splits,
        "split": inputs.split,
        "expected": dict(sources.expected),
        **key_frames,
        "official_split": sources.official_split,
        "short_side": encoding.short_side,
        "quality": encoding.quality,
        "videos_per_shard": index.VIDEOS_PER_SHARD,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}  # as in JSON


def _settings(inputs: Inputs, sources: Sources) -> dict[str, int | float | str]:
    """Returns the settings that the manifest states."""
    official = sources.official_split
    splits = {} if official is None else {"official_split": official.number, "official_splits": official.total}
    return {"seed": inputs.seed, **splits}


def _check_splits(sources: Sources) -> None:
    """Raises if a split is empty, which training would report much later, or if a record is listed twice."""
    for name, videos in sources.splits.items():
        if not videos:
            unusable = sources.unusable
            why = f" ({counted(len(unusable), 'unusable entry')}; the first: {unusable[0]})" if unusable else ""
            raise UserError(f"split {name} has no videos{why}. Add videos to it, or leave it out of --splits")
    found: dict[str, str] = {}
    for name, videos in sources.splits.items():
        for video in videos:
            listed = video.media_id if video.key_frame is None else video.name  # near key frames show the same
            first = found.setdefault(listed, name)
            if first != name:
                where = f"in the splits {first} and {name}"
                raise UserError(f"{listed} is listed {where}; a video, or a part of it, must be in one split")
        twice = next((identity for identity, count in Counter(v.media_id for v in videos).items() if count > 1), None)
        require(twice is None, f"split {name}", "list each video, or part of it, once", twice)


class _Shard(NamedTuple):
    """A planned shard: its split, its file name and its videos."""

    split: str
    file: str
    videos: list[Video]


class _Build:
    """A run that writes the shards that are not finished yet."""

    def __init__(self, folder: BuildFolder, sources: Sources, encoding: _EncodingSettings, progress: bool) -> None:
        self.folder, self.sources, self.encoding, self.progress = folder, sources, encoding, progress
        self.shards = [
            _Shard(split, file, videos[part])
            for split, videos in sources.splits.items()
            for file, part in index.plan_shards(split, len(videos))
        ]
        found = {shard.file: folder.load_finished(shard.file) for shard in self.shards}
        self.finished = {file: finished for file, finished in found.items() if finished is not None}
        pending = [video for shard in self.shards if shard.file not in self.finished for video in shard.videos]
        self.pending = [video._replace(state=folder.states[video.path]) for video in pending]
        encode: Encode = partial(encode_or_error, short_side=encoding.short_side, quality=encoding.quality)
        self.encoded = encode_all(self.pending, encode, encoding.workers or available_cpus(), encoding.timeout)
        self.estimate = _Estimate(self.pending)

    def run(self, dataset: str, settings: dict[str, int | float | str]) -> BuildResult:
        """Writes the missing shards, then the manifest."""
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
                            f"{error}. {len(self.finished)} of {counted(len(self.shards), 'shard')} are finished; "
                            "run the same command again to resume"
                        ) from error
        splits = {
            name: join_shards([self.finished[shard.file].part for shard in self.shards if shard.split == name])
            for name in self.sources.splits
        }
        if not any(part.records for part in splits.values()):
            self.folder.clear()  # so that another build may use the folder
            raise UserError(f"no video can be read ({total} tried); see {self.folder.failures} for the reasons")
        for name, part in splits.items():
            count = len(self.sources.splits[name])
            if not part.records:
                raise UserError(
                    f"no video of split {name} can be read ({count} tried); see {self.folder.failures} for the "
                    "reasons. Repair or replace them and run the same command again"
                )
        sources, stored = self.sources, self.encoding.storage()
        splits = {name: replace(part, expected=sources.expected.get(name)) for name, part in splits.items()}
        root, task, key_frames = self.folder.root, sources.task, sources.key_frames
        manifest = Manifest(root, dataset, sources.classes, splits, settings, stored, task, key_frames)
        manifest.save()
        to_retry = sum(failure.retry for shard in self.finished.values() for failure in shard.failures)
        return BuildResult(manifest, failures, to_retry=to_retry)

    def _write_shard(self, shard: _Shard, bar: "tqdm[Any]") -> FinishedShard:
        from x3d_tf.data.records.format import write_shard

        labels = {name: label for label, name in enumerate(self.sources.classes)}
        sources = [
            _record_source(video, tuple(sorted(labels[name] for name in video.classes))) for video in shard.videos
        ]
        failed: list[Failure] = []

        def take(result: EncodedVideo | VideoError) -> None:
            bar.update()
            if isinstance(result, VideoError):
                failed.append(Failure(result.path, result.reason, isinstance(result, Retryable)))
            if self.estimate.add(result):
                self._check_disk(bar)

        part = write_shard(self.folder.root / shard.file, sources, self.encoded, self.sources.classes, take)
        finished = FinishedShard(part, tuple(failed))
        self.folder.save_finished(shard.file, finished)
        return finished

    def _check_disk(self, bar: "tqdm[Any]") -> None:
        """Prints the estimated size; raises if it exceeds the free disk space."""
        rest, free = self.estimate.rest, shutil.disk_usage(self.folder.root).free
        if self.progress:
            bar.write(
                f"estimated size: {_format_size(rest + self.estimate.bytes)} ({_format_size(free)} free on the disk)"
            )
        if rest > free:
            raise UserError(
                f"output: {self.folder.root} needs about {_format_size(rest)} more, estimated from the first "
                f"{ESTIMATE_AFTER} videos, but its disk has {_format_size(free)} free. Free disk space, use another "
                "disk, or lower --quality or --short_side"
            )

    def _write_failures(self) -> int:
        """Writes the failures so far, in the order of the videos; returns their number."""
        unusable = [Failure(error.path, error.reason) for error in self.sources.unusable]
        finished = [self.finished[shard.file] for shard in self.shards if shard.file in self.finished]
        return self.folder.write_failures([*unusable, *(failure for shard in finished for failure in shard.failures)])


def _record_source(video: Video, labels: tuple[int, ...]) -> "RecordSource":
    from x3d_tf.data.records.format import RecordSource

    if video.key_frame is not None:  # names the record alone, because its segment follows from it
        key_frame, annotation = video.key_frame, video.annotation
        return RecordSource(video.name, labels, key_frame=key_frame, annotation=annotation, recording=video.recording)
    return RecordSource(video.name, labels, video.start, video.end, timed=video.timed, recording=video.recording)


class _Estimate:
    """Estimate of the bytes still to write, from the first videos, whose order is random.

    Assumes that sizes are proportional to durations if all videos have end times, to stored sizes if all videos are
    complete files or records, and equal otherwise.
    """

    def __init__(self, videos: Sequence[Video]) -> None:
        if all(video.end is not None for video in videos):
            self._weights = [(video.end or 0.0) - video.start for video in videos]
        elif all(video.start == 0.0 and video.end is None for video in videos):
            self._weights = [_stored_size(video) for video in videos]
        else:
            self._weights = [1.0] * len(videos)
        self._count = 0
        self.bytes = 0

    def add(self, result: EncodedVideo | VideoError) -> bool:
        """Adds the next video; returns True once, when the estimate is ready to use."""
        self._count += 1
        if isinstance(result, EncodedVideo):
            self.bytes += sum(len(frame) for frame in result.frames)
        return self._count == ESTIMATE_AFTER < len(self._weights)

    @property
    def rest(self) -> float:
        """Bytes still to write."""
        seen, rest = math.fsum(self._weights[: self._count]), math.fsum(self._weights[self._count :])
        return self.bytes * rest / seen if seen else 0.0


def _load_manifest(folder: BuildFolder) -> Manifest:
    manifest = Manifest.load(folder.root)
    for name in manifest.splits:
        manifest.split(name)  # raises if a shard is missing
    return manifest


def _stored_size(video: Video) -> float:
    if video.example is not None:
        return float(video.example.length)
    try:
        return float(video.path.stat().st_size)
    except OSError:
        return 0.0


def _format_size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
