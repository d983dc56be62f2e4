"""Builds records from videos: decodes in parallel, writes shards and the manifest, resumes an interrupted build.

The shards of a build are a plan that follows from its videos and settings. `build_records` builds all of them,
`build_part` those of one machine, and `finish_records` writes the manifest once all shards exist. `distributed` builds
them on a Ray cluster. The files are the same in all cases.

Imports no TensorFlow at the top: commands that only read settings import this module.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tqdm import tqdm

from x3d_tf.data.building.encoding import Encode, Retryable, encode_all, encode_or_error
from x3d_tf.data.building.plan import BuildOptions, EncodingSettings, Plan, PlannedShard, plan_build
from x3d_tf.data.building.sources import Video
from x3d_tf.data.building.state import BuildFolder, Failure, FinishedShard, Part, open_build
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.files import WriteError
from x3d_tf.processes import available_cpus
from x3d_tf.startup import starting_tensorflow
from x3d_tf.text import counted

if TYPE_CHECKING:
    from x3d_tf.data.records.format import RecordSource

ESTIMATE_AFTER = 16  # number of videos after which the total size is estimated
AGAIN = "run the same command again"
_PARTS_AGAIN = "build the parts again, then finish"


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


@dataclass(frozen=True)
class PartResult:
    """Result of `build_part`.

    Attributes:
        part: the part.
        shards: number of its shards, all of which are finished.
        failures: number of its videos that were left out; `finish_records` lists them.
        to_retry: number of them that took too long or changed during the build; the next run of the part retries them.
        was_finished: True if the complete build was finished, so that this run did nothing.
    """

    part: Part
    shards: int
    failures: int
    to_retry: int
    was_finished: bool = False


def build_records(inputs: Inputs, output: str | Path, **options: Unpack[BuildOptions]) -> BuildResult:
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
        **options: see `BuildOptions`.

    Raises:
        UserError: a setting is out of range; there is no such data set, or its files differ from their description;
            `output` holds another build or other files, or another process builds into it; a split has no readable
            video; workers cannot start; or the disk is too small, full or not writable, in which case finished shards
            stay.
    """
    plan = plan_build(inputs, **options)
    shards = plan.shards
    with open_build(Path(output), plan.identity, plan.sources, names_of(shards)) as folder:
        if folder.is_finished:
            result = already_finished(folder)
        else:
            build = Build(folder, plan, shards, progress=options.get("progress", True))
            build.write_failures()
            write_missing(build, build.write_failures)
            result = build.conclude(AGAIN)
        folder.clean()
    return result


def build_part(
    inputs: Inputs, output: str | Path, part: tuple[int, int], **options: Unpack[BuildOptions]
) -> PartResult:
    """Builds the shards of one part of a data set's records, for a machine.

    Parts may be built at the same time, on machines that share the output folder, and in any order. Each machine must
    see the same videos. An interrupted part resumes after its last finished shard when it is started again. Once all
    parts are built, `finish_records` completes the records. Everything else is as for `build_records`.

    Args:
        inputs: what the data set is read from; the same for all parts.
        output: folder for the records, shared by all parts.
        part: number of the part and number of parts: (3, 16) builds the third of sixteen parts. Parts that are built
            at the same time must have the same number of parts.
        **options: see `BuildOptions`. Only `workers`, `timeout` and `progress` may differ between parts.

    Raises:
        UserError: as for `build_records`. Also if another process builds the same part, a part of another number of
            parts, or all shards; or if the parts that are being built have other videos or settings.
    """
    part = Part(*part)
    require(
        1 <= part.number <= part.total, "part", "be K/N with 1 <= K <= N, such as 3/16", f"{part.number}/{part.total}"
    )
    plan = plan_build(inputs, **options)
    shards = plan.shards[part.number - 1 :: part.total]
    with open_build(Path(output), plan.identity, plan.sources, names_of(shards), part=part) as folder:
        if folder.is_finished:
            return PartResult(part, len(shards), 0, 0, was_finished=True)
        build = Build(folder, plan, shards, f"{part}: ", progress=options.get("progress", True))
        write_missing(build, build.tell_progress)
        failures = [failure for note in build.finished.values() for failure in note.failures]
        return PartResult(part, len(shards), len(failures), sum(failure.retry for failure in failures))


def finish_records(inputs: Inputs, output: str | Path, **options: Unpack[BuildOptions]) -> BuildResult:
    """Writes the manifest and `failures.csv` of records whose parts are built, see `build_part`.

    Builds nothing, and retries no video.

    Args:
        inputs, output, **options: as for `build_part`.

    Raises:
        UserError: a shard is missing (the message lists the parts to build), a split has no readable video, a part is
            being built, or the folder holds another build.
    """
    plan = plan_build(inputs, **options)
    shards = plan.shards
    with open_build(Path(output), plan.identity, plan.sources, names_of(shards), finish=True) as folder:
        build = Build(folder, plan, shards)
        if folder.is_finished and not folder.stale:
            result = already_finished(folder)
        else:
            _require_all(folder, build)
            result = build.conclude(_PARTS_AGAIN)
        folder.clean()
    return result


def _require_all(folder: BuildFolder, build: "Build") -> None:
    """Raises `UserError` unless all shards are finished."""
    names = names_of(build.shards)
    missing = [number for number, name in enumerate(names) if name in folder.stale or name not in build.finished]
    if not missing:
        return
    listed, count = first_few([names[number] for number in missing]), folder.parts()
    parts = sorted({number % count + 1 for number in missing}) if count else []
    flags = first_few([Part(number, count).flag for number in parts]) if count else "--part, or without it"
    raise UserError(
        f"output: {folder.root} lacks {counted(len(missing), 'shard')} of {len(names)}: {listed}. Run the same command "
        f"with {flags} instead of --finish, then with --finish again"
    )


def already_finished(folder: BuildFolder) -> BuildResult:
    """Returns the result of a build that an earlier run has finished."""
    manifest = Manifest.load(folder.root)
    for name in manifest.splits:
        manifest.split(name)  # raises if a shard is missing
    return BuildResult(manifest, folder.count_failures(), was_finished=True)


def names_of(shards: Sequence[PlannedShard]) -> list[str]:
    """Returns the file names of shards."""
    return [shard.file for shard in shards]


class Build:
    """State of a build: its shards, and those that are finished.

    Attributes:
        folder: the opened output folder.
        plan: what is built.
        shards: the shards that this process builds.
        finished: those of them that are finished, by file name.
        title: begin of the lines about progress.
        shows_progress: shows a progress bar and the estimated size.
    """

    def __init__(
        self, folder: BuildFolder, plan: Plan, shards: list[PlannedShard], title: str = "", *, progress: bool = False
    ) -> None:
        self.folder, self.plan, self.shards, self.title, self.shows_progress = folder, plan, shards, title, progress
        found = {shard.file: folder.load_finished(shard.file) for shard in shards}
        self.finished = {file: finished for file, finished in found.items() if finished is not None}

    @property
    def missing(self) -> list[PlannedShard]:
        """The shards that are not finished, with the states of their videos when the build began."""
        return [
            shard._replace(videos=[video._replace(state=self.folder.states[video.path]) for video in shard.videos])
            for shard in self.shards
            if shard.file not in self.finished
        ]

    @property
    def progress(self) -> str:
        """The number of finished shards, as text."""
        return f"{self.title}{len(self.finished)} of {counted(len(self.shards), 'shard')}"

    def tell_existing(self) -> None:
        """Prints the number of shards that an earlier run has finished, if any."""
        if self.finished and self.shows_progress:
            print(f"{self.progress} exist already")

    def bar(self) -> "tqdm[Any]":
        """Returns a progress bar over the videos."""
        total = sum(len(shard.videos) for shard in self.shards)
        done = sum(len(shard.videos) for shard in self.shards if shard.file in self.finished)
        return tqdm(total=total, initial=done, unit="video", disable=not self.shows_progress, smoothing=0)

    def tell_progress(self, bar: "tqdm[Any]") -> None:
        """Prints the number of finished shards."""
        if self.shows_progress:
            bar.write(self.progress)

    def write_failures(self, _: object = None) -> int:
        """Writes the failures so far, in the order of the videos; returns their number."""
        unusable = [Failure(error.path, error.reason) for error in self.plan.sources.unusable]
        finished = [self.finished[shard.file] for shard in self.shards if shard.file in self.finished]
        return self.folder.write_failures([*unusable, *(failure for shard in finished for failure in shard.failures)])

    def cannot_write(self, error: WriteError) -> UserError:
        """Returns the error for a full disk or a missing permission."""
        return UserError(f"{error}. {self.progress} are finished; {AGAIN} to resume")

    def conclude(self, again: str) -> BuildResult:
        """Writes the failures and the manifest of a build whose shards are all finished.

        Args:
            again: what to do to build the shards of repaired videos again.
        """
        with starting_tensorflow(devices=False):
            from x3d_tf.data.records.format import join_shards

        failures, sources = self.write_failures(), self.plan.sources
        splits = {
            name: join_shards([self.finished[shard.file].part for shard in self.shards if shard.split == name])
            for name in sources.splits
        }
        total = sum(map(len, sources.splits.values()))
        if not any(part.records for part in splits.values()):
            self.folder.clear()  # so that another build may use the folder
            raise UserError(f"no video can be read ({total} tried); see {self.folder.failures} for the reasons")
        for name, part in splits.items():
            count = len(sources.splits[name])
            if not part.records:
                raise UserError(
                    f"no video of split {name} can be read ({count} tried); see {self.folder.failures} for the "
                    f"reasons. Repair or replace them and {again}"
                )
        splits = {name: replace(part, expected=sources.expected.get(name)) for name, part in splits.items()}
        plan, root, stored = self.plan, self.folder.root, self.plan.encoding.storage()
        task, key_frames = sources.task, sources.key_frames
        manifest = Manifest(root, plan.dataset, sources.classes, splits, plan.settings, stored, task, key_frames)
        manifest.save()
        to_retry = sum(failure.retry for shard in self.finished.values() for failure in shard.failures)
        return BuildResult(manifest, failures, to_retry=to_retry)


def write_missing(build: Build, on_shard: Callable[["tqdm[Any]"], object]) -> None:
    """Writes the shards of a build that are not finished, and adds them to it.

    Args:
        build: the build.
        on_shard: called after each shard, with the progress bar.
    """
    build.tell_existing()
    shards, settings = build.missing, build.plan.encoding
    if not shards:
        return
    with starting_tensorflow(devices=False):
        import x3d_tf.data.records.format  # noqa: F401  # takes seconds, in which the workers would be idle

    pending = [video for shard in shards for video in shard.videos]
    estimate = _Estimate([*pending, *_pending_elsewhere(build)])
    encoded = encode_all(pending, encoder(settings), settings.workers or available_cpus(), settings.timeout)
    with closing(encoded), build.bar() as bar:

        def take(result: EncodedVideo | VideoError) -> None:
            bar.update()
            if estimate.add(result):
                check_disk(build.folder.root, estimate.rest, estimate.bytes, bar)

        for shard in shards:
            try:
                classes = build.plan.sources.classes
                build.finished[shard.file] = write_shard(build.folder, shard, classes, encoded, take)
                on_shard(bar)
            except WriteError as error:
                raise build.cannot_write(error) from error


def encoder(settings: EncodingSettings) -> Encode:
    """Returns the function that encodes a video."""
    return partial(encode_or_error, short_side=settings.short_side, quality=settings.quality)


def write_shard(
    folder: BuildFolder,
    shard: PlannedShard,
    classes: Sequence[str],
    encoded: Iterator[EncodedVideo | VideoError],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> FinishedShard:
    """Writes a shard, the file of its frames and its note.

    Args:
        folder: the opened output folder.
        shard: the shard.
        classes: names of all classes.
        encoded: encoded video or error of each video, in their order; further elements are left.
        on_result: called with each of them.

    Raises:
        WriteError: a file cannot be written.
    """
    from x3d_tf.data.records import format as record_format

    labels = {name: label for label, name in enumerate(classes)}
    sources = [_record_source(video, tuple(sorted(labels[name] for name in video.classes))) for video in shard.videos]
    failed: list[Failure] = []

    def take(result: EncodedVideo | VideoError) -> None:
        if isinstance(result, VideoError):
            failed.append(Failure(result.path, result.reason, isinstance(result, Retryable)))
        on_result(result)

    part = record_format.write_shard(folder.work / shard.file, sources, encoded, classes, take)
    finished = FinishedShard(part, tuple(failed))
    folder.save_finished(shard.file, finished)
    return finished


def check_disk(root: Path, rest: float, written: float, bar: "tqdm[Any]") -> None:
    """Prints the estimated size; raises if it exceeds the free disk space.

    Args:
        root: folder of the records.
        rest: bytes still to write.
        written: bytes of the videos that the estimate is made from.
        bar: the progress bar.
    """
    free = shutil.disk_usage(root).free
    if not bar.disable:
        bar.write(f"estimated size: {_format_size(rest + written)} ({_format_size(free)} free on the disk)")
    if rest > free:
        raise UserError(
            f"output: {root} needs about {_format_size(rest)} more, estimated from the first "
            f"{ESTIMATE_AFTER} videos, but its disk has {_format_size(free)} free. Free disk space, use another "
            "disk, or lower --quality or --short_side"
        )


def _pending_elsewhere(build: Build) -> list[Video]:
    """Returns the videos of the shards that other parts have not finished."""
    done = {*names_of(build.shards), *build.folder.noted()}
    return [video for shard in build.plan.shards if shard.file not in done for video in shard.videos]


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


def _stored_size(video: Video) -> float:
    if video.example is not None:
        return float(video.example.length)
    try:
        return float(video.path.stat().st_size)
    except OSError:
        return 0.0


def _format_size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
