"""Prediction on video files, which are decoded as a stream: memory does not grow with their length.

Frames go through what the records went through that the network was trained on, and clips are sampled, scaled and
cropped as testing does it, so that a video's probabilities are those of testing its record.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf import csv_files
from x3d_tf.data import transforms
from x3d_tf.data.records.format import as_stored
from x3d_tf.data.sampling import FrameSampling, decoded_short_side, require_windows, view_indices
from x3d_tf.data.video.clip_reader import Cut, VideoClips, cut_clips
from x3d_tf.data.video.decode import Pixels, VideoError, first_from, probe, read_frames
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.multiview import CLIPS_A_CALL, probabilities_of
from x3d_tf.files import WriteError, commit_file, os_errors_as_write_error, temporary_path
from x3d_tf.locks import locked
from x3d_tf.modeling.saving import load_classifier
from x3d_tf.modeling.x3d import X3D
from x3d_tf.text import counted
from x3d_tf.types import MAX_VIEWS, ClipSpec, Storage, ViewSpec

_BAR = "{percentage:3.0f}% |{bar:20}| {whole} of {videos}, {remaining} left{postfix}"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of a video, or of one window of it.

    Attributes:
        path: the file.
        start, end: the part that this is of, in seconds of the file, see `video.VideoInfo.start`; all of it unless
            windows were asked for.
        probabilities: one a class, float32: they add up to 1, but for a multi-label network, where each class has its
            own.
        thumbnails: some of the frames as the network saw them, spread evenly over the part, uint8 [n, S, S, 3].
        times: of the thumbnails, in seconds of the file, float64 [n].
    """

    path: Path
    start: float
    end: float
    probabilities: NDArray[np.float32]
    thumbnails: NDArray[np.uint8]
    times: NDArray[np.float64]

    def top(self, count: int = 5) -> list[int]:
        """The most probable classes, highest first; of equal ones the lower comes first."""
        return [int(index) for index in np.argsort(-self.probabilities, kind="stable")[:count]]


def predict_videos(
    model: X3D | str | Path,
    files: str | Path | Iterable[str | Path],
    *,
    temporal_views: int | None = None,
    window: float | None = None,
    hop: float | None = None,
    thumbnails: int = 0,
    progress: bool = True,
) -> Iterator[Prediction | VideoError]:
    """Predicts the classes of video files by K-Center testing: the mean of clips spread evenly over each.

    Frames are scaled and stored as JPEG first, in memory, as those that the network was trained on were (`stored`).

    With `window` each video gives a prediction for each of its windows, as if that were a video of its own: windows
    begin `hop` seconds apart, and the last one ends with the video. A video shorter than a window is one.

    Args:
        model: from `x3d_tf.load`, with its classifier; or the run folder or `.keras` file itself.
        files: one or several; a folder stands for the files in it and below, see `list_videos`.
        temporal_views: clips that a prediction is the mean of, K, 1..1000. Defaults to the number that the network is
            tested with, `test_views`; of each window to 1, its middle.
        window: seconds, no shorter than a clip of the network.
        hop: seconds from the start of one window to that of the next; the length of the window unless given.
        thumbnails: frames to keep with each prediction; fewer of a part that has fewer.
        progress: whether to show a progress bar.

    Yields:
        Predictions in the order of the files and of time; for a file that cannot be read the VideoError that says why,
        which after some of its windows says that it breaks off.

    Raises:
        UserError: no such model or no files; a setting out of range; a network without classifier, or one that gives
            no numbers.

    Example:
        >>> for result in x3d_tf.predict_videos("runs/mine", ["party.mp4", "holidays/"]):
        ...     print(result.path, result.top(1) if isinstance(result, x3d_tf.Prediction) else result.reason)
    """
    paths = list_videos([files] if isinstance(files, str | Path) else files)
    model = load_classifier(model) if isinstance(model, str | Path) else model
    require(model.include_top, "the network", "have its classifier (include_top)", model.include_top)
    clip = model.clip
    require_windows(clip, window, hop)
    require(thumbnails >= 0, "thumbnails", "be at least 0", thumbnails)
    resize = model.expansion.test_size
    if temporal_views is None:
        temporal_views = model.test_views if window is None else 1
    require(temporal_views <= MAX_VIEWS, "temporal_views", f"be at most {MAX_VIEWS}", temporal_views)
    sampler = _Sampler(
        clip,
        ViewSpec(temporal_views=temporal_views, resize=resize, crop=clip.size, stretch=model.stretch),
        window,
        hop or window,
        model.frame_sampling,
        model.stored,
    )
    return _predict(_Network(model, sampler.views), sampler, paths, thumbnails, progress)


def spread_frames(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Chooses frames of several clips that lie evenly in time: the nearest to the middles of `count` equal spans.

    Args:
        numbers: of the clips' frames, [clips, T].
        count: frames to choose; all where there are fewer.

    Returns:
        Their places in the flattened `numbers`, in the order of time, each frame once.
    """
    seen, places = np.unique(numbers, return_index=True)
    chosen: list[int] = []
    for part in range(min(count, len(seen))):
        distances = np.abs(seen - seen[0] - (part + 0.5) * (seen[-1] - seen[0]) / count)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))
    return places[np.sort(np.array(chosen, np.int64))]


def windows(frames: int, fps: float, window: float | None, hop: float | None) -> Iterator[tuple[int, int]]:
    """First frame and end (the frame after the last) of each window; `window` and `hop` in seconds.

    Windows begin every `hop` while they fit, at the first frame that is not before that second, as segments of records
    do; the rest of the video, if any, is in a last one that ends with it.
    """
    length = frames if window is None else max(first_from(window, fps), 1)
    if hop is None or length >= frames:
        yield 0, frames
        return
    number = start = end = 0
    while start + length <= frames:
        end = start + length
        yield start, end
        number += 1
        start = max(first_from(number * hop, fps), start + 1)
    if end < frames:
        yield frames - length, frames


@dataclass(frozen=True)
class _Sampler:
    """Which frames of a video the network sees."""

    clip: ClipSpec
    views: ViewSpec
    window: float | None
    hop: float | None
    frame_sampling: FrameSampling
    stored: Storage | None

    @property
    def short_side(self) -> int:
        return decoded_short_side(self.stored, self.views.resize)

    def windows(self, frames: int, fps: float) -> Iterator[tuple[int, int]]:
        return windows(frames, fps, self.window, self.hop)

    def whole(self, frames: int, fps: float) -> NDArray[np.int64]:
        """Frame numbers [K, T] of the clips of a video."""
        return view_indices(frames, fps, self.clip, self.views.temporal_views, self.frame_sampling)

    def clips(self, frames: int, fps: float) -> Iterator[NDArray[np.int64]]:
        """Frame numbers [K, T] of the clips of each window."""
        for first, end in self.windows(frames, fps):
            yield first + self.whole(end - first, fps)

    def keep(self, pixels: Pixels) -> Pixels:
        return as_stored(pixels, self.stored)


class _Network:
    """A network and what comes before it, each of one trace."""

    def __init__(self, model: X3D, views: ViewSpec) -> None:
        self.classes, self.crop = model.num_classes, views.crop
        self.probabilities = probabilities_of(model, views.crop)

        @tf.function(input_signature=[tf.TensorSpec((model.clip.frames, None, None, 3), tf.uint8)])
        def prepare(clip: tf.Tensor) -> tf.Tensor:
            with tf.device("cpu"):  # where the clips of records are scaled too
                return transforms.crops(transforms.resize(clip, views.resize, views.stretch), views.crop, 1)[0]

        self.prepare = prepare

    def __call__(self, cuts: Iterable[Cut], path: Path) -> Iterator[tuple[Cut, NDArray[np.float32]]]:
        """Each clip, its frames as the network sees them, float32 [T, S, S, 3], with its probabilities, [classes]."""
        prepared = (cut._replace(frames=self.prepare(np.stack(cut.frames))) for cut in cuts)
        while batch := list(itertools.islice(prepared, CLIPS_A_CALL)):
            found = self.probabilities(tf.stack([cut.frames for cut in batch])).numpy()
            if not np.isfinite(found).all():
                raise UserError(f"the network gives probabilities that are not numbers for {path}")
            yield from zip(batch, found, strict=True)


class _VideoBar(tqdm):
    """A bar that moves on within a video, and counts whole ones."""

    @property
    def format_dict(self) -> dict[str, Any]:
        counts = {"whole": int(self.n + 1e-6), "videos": counted(int(self.total or 0), "video")}
        return {**super().format_dict, **counts}


def _predict(
    network: _Network, sampler: _Sampler, paths: Sequence[Path], thumbnails: int, progress: bool
) -> Iterator[Prediction | VideoError]:
    predict_video = _predict_whole if sampler.window is None else _predict_windows
    with _VideoBar(total=len(paths), bar_format=_BAR, disable=not progress, mininterval=1.0) as bar:
        for done, path in enumerate(paths):
            bar.set_postfix_str(path.name.encode("utf-8", "replace").decode())
            try:
                # never past the whole video, whatever the sum of its parts rounds to
                advance = lambda part, end=done + 1: bar.update(min(part, end - bar.n))  # noqa: E731
                yield from predict_video(network, sampler, path, thumbnails, advance)
            except VideoError as error:
                yield error
            bar.update(done + 1 - bar.n)  # whole again


def _predict_whole(
    network: _Network, sampler: _Sampler, path: Path, thumbnails: int, advance: Callable[[float], Any]
) -> Iterator[Prediction]:
    video = VideoClips(
        path, sampler.whole, sampler.short_side, sampler.keep, lambda: advance(1 / max(video.promised, 1))
    )
    shown = _Thumbnails(sampler.whole(video.promised, video.fps), thumbnails)
    found = {}
    for cut, probabilities in network(video, path):
        found[cut.numbers] = probabilities
        shown.take(cut)
    total = np.zeros(network.classes, np.float32)
    for numbers in video.chosen:
        total += found[numbers]
    mean = total / np.float32(len(video.chosen))
    end = video.start + video.frames / video.fps
    yield Prediction(path, video.start, end, mean, *shown.taken(network.crop, video.fps, video.start))


def _predict_windows(
    network: _Network, sampler: _Sampler, path: Path, thumbnails: int, advance: Callable[[float], Any]
) -> Iterator[Prediction]:
    """Windows come out while the video is read.

    If it then lacks some of the frames that it promised, too few to count as broken off, the last windows repeat the
    last frame for those.
    """
    info = probe(path)
    fps = float(np.float32(info.fps))  # as records store it

    def stream() -> Iterator[Pixels]:
        for read, frame in enumerate(read_frames(path, sampler.short_side), start=1):
            yield frame.pixels
            if read <= info.delivered:
                advance(1 / info.delivered)

    cuts = cut_clips(stream(), sampler.clips(info.delivered, fps), sampler.keep)
    # Windows are of one length, so that they begin and are finished in their order.
    upcoming = zip(sampler.windows(info.delivered, fps), sampler.clips(info.delivered, fps))
    begun: dict[int, _Window] = {}
    for cut, probabilities in network(cuts, path):
        if cut.part not in begun:
            (first, end), clips = next(upcoming)
            total = np.zeros(network.classes, np.float32)
            begun[cut.part] = _Window(
                info.start + first / fps, info.start + end / fps, _Thumbnails(clips, thumbnails), total
            )
        window = begun[cut.part]
        window.total += cut.clips * probabilities
        window.clips += cut.clips
        window.shown.take(cut)
        if window.clips == sampler.views.temporal_views:
            del begun[cut.part]
            mean = window.total / np.float32(window.clips)
            yield Prediction(path, window.start, window.end, mean, *window.shown.taken(network.crop, fps, info.start))


@dataclass(eq=False)
class _Window:
    """What the clips of a window have given so far."""

    start: float
    end: float
    shown: "_Thumbnails"
    total: NDArray[np.float32]
    clips: int = 0


class _Thumbnails:
    """Some of the frames that the network sees of clips, spread evenly in time.

    Args:
        clips: numbers of their frames, int64 [clips, T].
        count: frames at most.
    """

    def __init__(self, clips: NDArray[np.int64], count: int) -> None:
        numbers = clips.ravel()[spread_frames(clips, count)]
        self._pixels: dict[int, NDArray[np.uint8] | None] = dict.fromkeys(numbers.tolist())

    def take(self, cut: Cut) -> None:
        """Keeps the frames of a clip, [T, S, S, 3], that were chosen."""
        for number, frame in zip(cut.numbers, cut.frames):
            if number in self._pixels and self._pixels[number] is None:
                self._pixels[number] = np.clip(frame.numpy().round(), 0, 255).astype(np.uint8)

    def taken(self, side: int, fps: float, start: float) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Those that came, [n, side, side, 3], and their times in seconds, [n]."""
        came = {number: pixels for number, pixels in self._pixels.items() if pixels is not None}
        return np.array(list(came.values()), np.uint8).reshape(-1, side, side, 3), start + np.array(list(came)) / fps


@contextmanager
def csv_table(
    path: str | Path, class_names: Sequence[str], *, overwrite: bool = False
) -> Iterator[Callable[[Prediction | VideoError], None]]:
    """A CSV file of predictions: gives the function that adds one.

    Columns: video, start and end in seconds of the file (see `video.VideoInfo.start`), predicted (the most probable
    class), error, and p(CLASS) for each class.
    Text that a spreadsheet would take for a formula gets a leading `'`; `x3d_tf.csv_files` reads it back.
    The file appears when the block ends, complete. Where the block is left early, `unfinished(path)` gets the rows so
    far.

    Raises:
        UserError: the file is there and may not be replaced.
        WriteError: it cannot be written; nothing is left behind.
    """
    with _results_file(Path(path), overwrite) as file:
        table = csv_files.Writer(file)
        table.row(["video", "start", "end", "predicted", "error", *(f"p({name})" for name in class_names)])

        def add(result: Prediction | VideoError) -> None:
            if isinstance(result, VideoError):
                table.row([result.path, "", "", "", result.reason, *("" for _ in class_names)])
                return
            times = (csv_files.number(result.start, ".3f"), csv_files.number(result.end, ".3f"))
            predicted = class_names[result.top(1)[0]]
            table.row(
                [str(result.path), *times, predicted, "", *(csv_files.number(p, ".6g") for p in result.probabilities)]
            )

        yield add


@contextmanager
def json_document(
    path: str | Path, about: Mapping[str, Any], class_names: Sequence[str], *, overwrite: bool = False
) -> Iterator[Callable[[Prediction | VideoError], None]]:
    """A JSON file of predictions: gives the function that adds one.

    One object: what `about` says, `classes`, and `predictions`, a list in the order of the videos and of time. Each has
    `video` and either `error` or `start` and `end` in seconds, `top` (classes with their probabilities, highest first)
    and `probabilities` in the order of `classes`. The file appears when the block ends, complete. Where the block is
    left early, `unfinished(path)` gets the predictions so far.

    Raises:
        UserError: the file is there and may not be replaced.
        WriteError: it cannot be written; nothing is left behind.
    """
    with _results_file(Path(path), overwrite, end="\n ]\n}\n") as file:
        head = json.dumps({**about, "classes": list(class_names)}, ensure_ascii=False, indent=1)
        file.write(head.removesuffix("\n}") + ',\n "predictions": [')
        separator = "\n  "

        def add(result: Prediction | VideoError) -> None:
            nonlocal separator
            file.write(separator + json.dumps(_entry(result, class_names), ensure_ascii=False))
            separator = ",\n  "

        yield add


def _entry(result: Prediction | VideoError, class_names: Sequence[str]) -> dict[str, Any]:
    if isinstance(result, VideoError):
        return {"video": result.path, "error": result.reason}
    probabilities = [float(f"{p:.6g}") for p in result.probabilities]
    return {
        "video": str(result.path),
        "start": round(result.start, 3),
        "end": round(result.end, 3),
        "top": [{"class": class_names[index], "probability": probabilities[index]} for index in result.top()],
        "probabilities": probabilities,
    }


def unfinished(path: Path) -> Path:
    """Where the results of a prediction lie that was stopped before its last video: `out.partial.csv` of `out.csv`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class _Results:
    """Text file that is written a result at a time; the first text is its head."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self.texts, self.broken = 0, False

    def write(self, text: str) -> None:
        try:
            with os_errors_as_write_error(self._path):
                self._file.write(text)
        except WriteError:
            self.broken = True
            raise
        self.texts += 1


@contextmanager
def _results_file(path: Path, overwrite: bool, end: str = "") -> Iterator[_Results]:
    """A file to write that appears under its name when the block has ended well, else as `unfinished`.

    Within the block no other process may write it.

    Args:
        path: of the file.
        overwrite: whether it may be replaced.
        end: text that closes it.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another path, or overwrite=True")
    with os_errors_as_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    conflict = f"another process is writing {path}"
    with locked(lock, conflict, "wait for it, or give another path"), _written(path, end) as results:
        yield results


@contextmanager
def _written(path: Path, end: str) -> Iterator[_Results]:
    partial = temporary_path(path)
    with os_errors_as_write_error(path):
        partial.unlink(missing_ok=True)  # a link would lead to another file
        # file names that are no UTF-8 come out as escapes
        file = partial.open("x", newline="", encoding="utf-8", errors="backslashreplace")

    def finish(place: Path) -> None:
        with os_errors_as_write_error(place):
            file.write(end)
            file.close()
            commit_file(partial, place)

    results = _Results(path, file)
    try:
        try:
            yield results
        except BaseException:
            if results.texts > 1 and not results.broken:
                finish(unfinished(path))
            raise
        finish(path)
    finally:
        with suppress(OSError):  # of a full disk, which has been told
            file.close()
        partial.unlink(missing_ok=True)
