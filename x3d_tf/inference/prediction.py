"""Predicts the classes of video files. Imports TensorFlow only for networks that run in it.

Videos are decoded as a stream, so memory does not grow with their length.

Frames are scaled and compressed like the frames of the training records, and clips are sampled, scaled and cropped as
in evaluation. A video therefore gets the probabilities that the evaluation of its record gives.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.data.numpy_transforms import resized_centre_crop
from x3d_tf.data.sampling import FrameSampling, decoded_short_side, require_windows, view_indices
from x3d_tf.data.video.clip_reader import Cut, VideoClips, cut_clips
from x3d_tf.data.video.decode import Pixels, VideoError, as_stored, first_from, probe, read_frames
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.views import CombinedViews
from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL, ClassifierFile
from x3d_tf.runtimes.exported import ExportedClassifier, to_pixels
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.text import counted, distinct_ends
from x3d_tf.types import MAX_VIEWS, ClipSpec, Combine, Storage, ViewSpec

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import X3D

    Classifier = X3D | ClassifierFile

_Predicted = tuple[Cut, NDArray[np.float32]]  # a clip, with its frames where they are shown, and its probabilities
Probabilities = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_ONLY = np.zeros(1, np.int64)  # index of the only video
_BAR = "{percentage:3.0f}% |{bar:20}| {whole} of {videos}, {remaining} left{postfix}"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for a video, or for one window of it.

    Attributes:
        path: the file.
        start, end: the predicted part in seconds of the file, see `VideoInfo.start`; all of it without windows.
        probabilities: float32 (classes,). They add up to 1, except for a multi-label network, where each class has a
            probability of its own.
        thumbnails: uint8 (n, S, S, 3), frames as the network received them, spread evenly over the part.
        times: float64 (n,), the times of the thumbnails in seconds of the file.
    """

    path: Path
    start: float
    end: float
    probabilities: NDArray[np.float32]
    thumbnails: NDArray[np.uint8]
    times: NDArray[np.float64]

    def top(self, count: int = 5) -> list[int]:
        """Returns the indices of the most probable classes, highest first; ties are in the order of the classes."""
        return [int(index) for index in np.argsort(-self.probabilities, kind="stable")[:count]]


def predict_videos(
    model: "Classifier | str | Path",
    files: str | Path | Iterable[str | Path],
    *,
    temporal_views: int | None = None,
    window: float | None = None,
    hop: float | None = None,
    thumbnails: int = 0,
    progress: bool = True,
) -> Iterator[Prediction | VideoError]:
    """Predicts the classes of video files by K-Center evaluation: the mean over clips spread evenly in time.

    A network trained with `TrainConfig.combine="max"` gives the maximum for each class instead.

    Frames are first scaled and compressed as JPEG in memory, like the frames that the network was trained on.

    With `window` each video is split into windows, each of which is predicted like a separate video. Windows start
    `hop` seconds apart, and the last one ends with the video. A video shorter than a window is one window.

    Args:
        model: a model from `x3d_tf.load` with its classifier, or the path of a run folder, of a `.keras` file or of an
            exported file. An exported file needs TensorFlow only if it is a SavedModel.
        files: one or several files or folders. Folders are searched recursively, see `list_videos`.
        temporal_views: number of clips per prediction, K, 1..1000. Defaults to the number of the network's evaluation,
            `test_views`, and to 1 (the middle clip) for windows.
        window: window length in seconds, at least that of a clip.
        hop: seconds between the starts of two windows. Defaults to the window length.
        thumbnails: number of frames to keep with each prediction, or all frames of shorter parts.
        progress: whether to show a progress bar.

    Yields:
        Predictions in the order of the files and of time. For a file that cannot be read, a VideoError with the reason;
        it may follow predictions for the first windows of a truncated file.

    Raises:
        UserError: the model or the files do not exist, a setting is out of range, or the network has no classifier or
            returns values that are not finite.

    Example:
        >>> for result in x3d_tf.predict_videos("runs/mine", ["party.mp4", "holidays/"]):
        ...     print(result.path, result.top(1) if isinstance(result, x3d_tf.Prediction) else result.reason)
    """
    paths = list_videos([files] if isinstance(files, str | Path) else files)
    model = open_classifier(model) if isinstance(model, str | Path) else model
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
        model.combine,
    )
    network = _Network(model, sampler.views, shows=thumbnails > 0)
    return _predict(network, sampler, paths, thumbnails, progress)


def spread_frames(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Chooses frames that are spread evenly in time: those nearest to the middles of `count` equal spans.

    Args:
        numbers: frame numbers of clips, (clips, T).
        count: number of frames to choose; all if the clips have fewer.

    Returns:
        Indices into the flattened `numbers`, in the order of time, each frame once.
    """
    seen, places = np.unique(numbers, return_index=True)
    chosen: list[int] = []
    for part in range(min(count, len(seen))):
        distances = np.abs(seen - seen[0] - (part + 0.5) * (seen[-1] - seen[0]) / count)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))
    return places[np.sort(np.array(chosen, np.int64))]


def windows(frames: int, fps: float, window: float | None, hop: float | None) -> Iterator[tuple[int, int]]:
    """Yields the first frame and the end (the frame after the last) of each window.

    A window starts every `hop` seconds while it fits, at the first frame that is not before that time, like segments
    of records. If frames remain, a last window ends with the video.
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
    """Chooses the frames of a video that the network receives."""

    clip: ClipSpec
    views: ViewSpec
    window: float | None
    hop: float | None
    frame_sampling: FrameSampling
    stored: Storage | None
    combine: Combine

    @property
    def short_side(self) -> int:
        return decoded_short_side(self.stored, self.views.resize)

    def windows(self, frames: int, fps: float) -> Iterator[tuple[int, int]]:
        return windows(frames, fps, self.window, self.hop)

    def whole(self, frames: int, fps: float) -> NDArray[np.int64]:
        """Returns the frame numbers (K, T) of the clips of a complete video."""
        return view_indices(frames, fps, self.clip, self.views.temporal_views, self.frame_sampling)

    def clips(self, frames: int, fps: float) -> Iterator[NDArray[np.int64]]:
        """Yields the frame numbers (K, T) of the clips of each window."""
        for first, end in self.windows(frames, fps):
            yield first + self.whole(end - first, fps)

    def keep(self, pixels: Pixels) -> Pixels:
        return as_stored(pixels, self.stored)


class _Network:
    """A network with its preprocessing. It processes clips in threads while the next ones are decoded.

    Args:
        model: the network.
        views: size and crop of the clips.
        shows: whether the frames of the clips are wanted, which takes memory.
    """

    def __init__(self, model: "Classifier", views: ViewSpec, *, shows: bool) -> None:
        self.classes, self.crop, self._views, self._shows = model.num_classes, views.crop, views, shows
        if isinstance(model, ExportedClassifier):
            run = model.probabilities
            self._probabilities: Probabilities = lambda clips: run(to_pixels(clips))
            self._pool, self._threads, self._batch = model.pool, model.at_once, model.batch
            return
        compiled = _compiled(model, views.crop)
        self._probabilities = lambda clips: compiled(clips).numpy()
        self._pool, self._threads, self._batch = ThreadPoolExecutor(1, "network"), 1, CLIPS_A_CALL
        self._pool.submit(compiled.get_concrete_function)  # traces while the first video is decoded

    def __call__(self, cuts: Iterable[Cut], path: Path) -> Iterator[_Predicted]:
        """Yields each clip and its probabilities; its frames are uint8 (S, S, 3), as the network receives them.

        Raises:
            VideoError: the video is truncated; raised after the clips before the damage.
        """
        running: deque[Future[list[_Predicted]]] = deque()
        try:
            for batch in _batches(cuts, self._batch):
                if isinstance(batch, VideoError):
                    yield from itertools.chain.from_iterable(future.result() for future in running)
                    raise batch
                running.append(self._pool.submit(self._run, batch, path))
                while running and (running[0].done() or len(running) > self._threads):
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:  # after an error, or where the caller stops
            for future in running:
                future.cancel()

    def _run(self, batch: Sequence[Cut], path: Path) -> list[_Predicted]:
        views = self._views
        clips = np.stack(
            [resized_centre_crop(np.stack(cut.frames), views.resize, views.crop, views.stretch) for cut in batch]
        )
        found = self._probabilities(clips)
        if not np.isfinite(found).all():
            raise UserError(f"the network returns probabilities that are not finite for {path}")
        shown = map(list, to_pixels(clips)) if self._shows else itertools.repeat([])
        return [(cut._replace(frames=frames), row) for cut, frames, row in zip(batch, shown, found)]


def _compiled(model: "Classifier", crop: int) -> Any:
    """Returns the `tf.function` from clips to probabilities."""
    from x3d_tf.evaluation.multiview import probabilities_of
    from x3d_tf.runtimes.stored import StoredClassifier

    return model.compiled(crop) if isinstance(model, StoredClassifier) else probabilities_of(model, crop)  # type: ignore[arg-type]


def _batches(cuts: Iterable[Cut], size: int) -> Iterator[list[Cut] | VideoError]:
    """Yields the clips in batches. An error of the video is yielded after the clips that precede it."""
    batch: list[Cut] = []
    try:
        for cut in cuts:
            batch.append(cut)
            if len(batch) == size:
                yield batch
                batch = []
    except VideoError as error:
        yield from [batch] if batch else []
        yield error
        return
    if batch:
        yield batch


class _VideoBar(tqdm):
    """A progress bar that advances within a video and counts complete videos."""

    @property
    def format_dict(self) -> dict[str, Any]:
        counts = {"whole": int(self.n + 1e-6), "videos": counted(int(self.total or 0), "video")}
        return {**super().format_dict, **counts}


def _predict(
    network: _Network, sampler: _Sampler, paths: Sequence[Path], thumbnails: int, progress: bool
) -> Iterator[Prediction | VideoError]:
    predict_video = _predict_whole if sampler.window is None else _predict_windows
    ends = distinct_ends(paths)
    with _VideoBar(total=len(paths), bar_format=_BAR, disable=not progress, mininterval=1.0) as bar:
        for done, path in enumerate(paths):
            bar.set_postfix_str(ends[path].encode("utf-8", "replace").decode())
            try:
                # rounding must not move the bar past the end of this video
                advance = lambda part, end=done + 1: bar.update(min(part, end - bar.n))  # noqa: E731
                yield from predict_video(network, sampler, path, thumbnails, advance)
            except VideoError as error:
                yield error
            bar.update(done + 1 - bar.n)


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
    combined = CombinedViews(sampler.combine, 1, network.classes)
    for numbers in video.chosen:
        combined.add(_ONLY, found[numbers][None])
    probabilities = combined.result()[0]
    end = video.start + video.frames / video.fps
    yield Prediction(path, video.start, end, probabilities, *shown.taken(network.crop, video.fps, video.start))


def _predict_windows(
    network: _Network, sampler: _Sampler, path: Path, thumbnails: int, advance: Callable[[float], Any]
) -> Iterator[Prediction]:
    """Predicts windows while the video is read.

    If fewer frames can be decoded than the file promises, but too few are missing to count as truncated, the last
    windows repeat the last frame.
    """
    info = probe(path)
    fps = float(np.float32(info.fps))  # records store float32

    def stream() -> Iterator[Pixels]:
        for read, frame in enumerate(read_frames(path, sampler.short_side), start=1):
            yield frame.pixels
            if read <= info.delivered:
                advance(1 / info.delivered)

    cuts = cut_clips(stream(), sampler.clips(info.delivered, fps), sampler.keep)
    # All windows have the same length, so they start and end in the same order.
    pending = zip(sampler.windows(info.delivered, fps), sampler.clips(info.delivered, fps))
    open_windows: dict[int, _Window] = {}
    for cut, probabilities in network(cuts, path):
        if cut.part not in open_windows:
            (first, end), clips = next(pending)
            combined = CombinedViews(sampler.combine, 1, network.classes)
            open_windows[cut.part] = _Window(
                info.start + first / fps, info.start + end / fps, _Thumbnails(clips, thumbnails), combined
            )
        window = open_windows[cut.part]
        window.combined.add(_ONLY, probabilities[None], cut.clips)
        window.shown.take(cut)
        if window.combined.views[0] == sampler.views.temporal_views:
            del open_windows[cut.part]
            shown = window.shown
            found = window.combined.result()[0]
            yield Prediction(path, window.start, window.end, found, *shown.taken(network.crop, fps, info.start))


@dataclass(eq=False)
class _Window:
    """The clips of a window that were predicted so far."""

    start: float
    end: float
    shown: "_Thumbnails"
    combined: CombinedViews


class _Thumbnails:
    """Frames of clips as the network receives them, spread evenly in time.

    Args:
        clips: frame numbers, int64 (clips, T).
        count: maximum number of frames.
    """

    def __init__(self, clips: NDArray[np.int64], count: int) -> None:
        numbers = clips.ravel()[spread_frames(clips, count)]
        self._pixels: dict[int, NDArray[np.uint8] | None] = dict.fromkeys(numbers.tolist())

    def take(self, cut: Cut) -> None:
        """Keeps the chosen frames of a clip, uint8 (S, S, 3), if it has any."""
        for number, frame in zip(cut.numbers, cut.frames):
            if number in self._pixels and self._pixels[number] is None:
                self._pixels[number] = frame

    def taken(self, side: int, fps: float, start: float) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Returns the frames that were decoded, (n, side, side, 3), and their times in seconds, (n,)."""
        decoded = {number: pixels for number, pixels in self._pixels.items() if pixels is not None}
        return np.array(list(decoded.values()), np.uint8).reshape(-1, side, side, 3), start + np.array(
            list(decoded)
        ) / fps
