"""Prediction on video files, which are decoded as a stream: memory does not grow with their length.

Frames are scaled as records store them, and clips are sampled, scaled and cropped as testing does it, so that a video's
probabilities are those of testing its record but for the loss of JPEG.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf import _csv
from x3d_tf._checks import UserError, require
from x3d_tf._files import WriteError, partial_of, put_in_place, writing
from x3d_tf._locks import locked
from x3d_tf.data import transforms
from x3d_tf.data.clips import STRIDE_FPS, FrameSampling, ViewSpec, frame_indices, view_starts
from x3d_tf.data.video import Pixels, VideoError, probe, read_frames
from x3d_tf.evaluation.views import CLIPS_A_CALL, probabilities_of
from x3d_tf.modeling.expansion import ClipSpec
from x3d_tf.modeling.x3d import X3D

RECORD_SHORT_SIDE = 256  # pixels, of the frames that build_records stores by default
DEFAULT_VIEWS = 10  # of a whole video; of a window, one
_BAR = "{percentage:3.0f}% |{bar:20}| {n:.1f}/{total} videos, {remaining} left{postfix}"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of a video, or of one window of it.

    Attributes:
        path: the file.
        start, end: the part that this is of, in seconds of the file, see `video.VideoInfo.start`; all of it unless
            windows were asked for.
        probabilities: one a class, float32: they add up to 1, but for a multi-label network, where each class has its
            own.
        thumbnails: some of the frames as the network saw them, evenly chosen, uint8 [n, S, S, 3].
    """

    path: Path
    start: float
    end: float
    probabilities: NDArray[np.float32]
    thumbnails: NDArray[np.uint8]

    def top(self, count: int = 5) -> list[int]:
        """The most probable classes, highest first; of equal ones the lower comes first."""
        return [int(index) for index in np.argsort(-self.probabilities, kind="stable")[:count]]


def predict_videos(
    model: X3D,
    paths: Iterable[str | Path],
    *,
    temporal_views: int | None = None,
    window: float | None = None,
    hop: float | None = None,
    short_side: int | None = None,
    frame_sampling: FrameSampling = "slowfast",
    thumbnails: int = 0,
    progress: bool = True,
) -> Iterator[Prediction | VideoError]:
    """Predicts the classes of video files by K-Center testing: the mean of clips spread evenly over each.

    With `window` each video gives a prediction for each of its windows, as if that were a video of its own: windows
    begin `hop` seconds apart, and the last one ends with the video. A video shorter than a window is one.

    Args:
        model: from `x3d_tf.load`, with its classifier.
        paths: the files.
        temporal_views: clips that a prediction is the mean of, K; 10 unless given, or 1, the middle, of each window.
        window: seconds, no shorter than a clip of the network.
        hop: seconds from the start of one window to that of the next; the length of the window unless given.
        short_side: pixels to which larger frames are scaled first, as records have them; 256, or what the network
            looks at where that is larger, unless given.
        frame_sampling: see `clips.frame_indices`.
        thumbnails: frames to keep with each prediction.
        progress: whether to show a progress bar.

    Yields:
        Predictions in the order of the files and of time; for a file that cannot be read the VideoError that says why,
        which after some of its windows says that it breaks off.

    Raises:
        UserError: a setting out of range; a network without classifier, or one that gives no numbers.
    """
    require(model.include_top, "the network", "have its classifier (include_top)", model.include_top)
    clip = model.clip
    span = clip.stride * clip.frames / STRIDE_FPS
    require(window is None or window >= span, "window", f"be at least {span:g} s, a clip of the network", window)
    require(hop is None or window is not None, "hop", "come with a window", hop)
    require(hop is None or hop > 0, "hop", "be positive", hop)
    require(short_side is None or short_side >= 1, "short_side", "be at least 1 pixel", short_side)
    require(thumbnails >= 0, "thumbnails", "be at least 0", thumbnails)
    resize = model.expansion.test_size
    if temporal_views is None:
        temporal_views = DEFAULT_VIEWS if window is None else 1
    sampler = _Sampler(
        clip,
        ViewSpec(temporal_views=temporal_views, resize=resize, crop=clip.size, squeeze=model.squeeze),
        window,
        hop or window,
        frame_sampling,
        short_side or max(RECORD_SHORT_SIDE, resize),
    )
    return _predict(_Network(model, sampler.views), sampler, [Path(path) for path in paths], thumbnails, progress)


def list_videos(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and all files below the folders that are, sorted within each folder.

    Hidden files and folders are left out unless named themselves. A folder that links lead to twice is searched once.

    Raises:
        UserError: there is none.
        OSError: a folder that may not be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def search(folder: Path) -> None:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # links may lead in circles
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                search(entry)
            elif entry.is_file() or entry.is_symlink():  # a link to nothing will be reported; a pipe would never end
                found.append(entry)

    given = [Path(path) for path in paths]
    for path in given:
        if path.is_dir():
            search(path)
        else:
            found.append(path)
    require(bool(found), "the videos", "be files, or folders that hold some", [str(path) for path in given])
    return list(dict.fromkeys(found))


class Cut(NamedTuple):
    """A clip out of a stream: which part it is of, which of that part's clips, and its frames [T, height, width, 3]."""

    part: int
    view: int
    pixels: Pixels


def cut_clips(frames: Iterable[Pixels], parts: Iterable[NDArray[np.int64]]) -> Iterator[Cut]:
    """Cuts clips out of a stream of frames, each as soon as its last frame has come.

    Holds the frames that clips under way have got so far, and no others. Where the stream ends too early its last frame
    is repeated; parts that it did not come to are left out.

    Args:
        frames: the stream, of one size; read to its end.
        parts: numbers of the frames of each part's clips, [clips, T], rising along T. Parts come in the order of their
            first frames, and are asked for when those come.
    """
    upcoming = enumerate(parts)
    following = next(upcoming, None)
    waiting: list[_OpenClip] = []
    for number, pixels in enumerate(frames):
        while following is not None and following[1].min() <= number:
            part, clips = following
            waiting += [_OpenClip(part, view, clip) for view, clip in enumerate(clips)]
            following = next(upcoming, None)
        for clip in waiting:
            clip.take(number, pixels)
        done = [clip for clip in waiting if clip.complete]
        if done:
            waiting = [clip for clip in waiting if not clip.complete]
            yield from (clip.cut() for clip in done)
            done.clear()  # their frames are not needed any more
    for clip in waiting:
        clip.fill(pixels)
        yield clip.cut()


@dataclass(eq=False)
class _OpenClip:
    """A clip of which some frames are still to come."""

    part: int
    view: int
    numbers: NDArray[np.int64]
    pixels: list[Pixels] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.pixels) == len(self.numbers)

    def take(self, number: int, pixels: Pixels) -> None:
        while not self.complete and self.numbers[len(self.pixels)] == number:  # short videos repeat frames
            self.pixels.append(pixels)

    def fill(self, pixels: Pixels) -> None:
        self.pixels += [pixels] * (len(self.numbers) - len(self.pixels))

    def cut(self) -> Cut:
        return Cut(self.part, self.view, np.stack(self.pixels))


def windows(frames: int, fps: float, window: float | None, hop: float | None) -> Iterator[tuple[int, int]]:
    """First frame and end (the frame after the last) of each window; `window` and `hop` in seconds.

    Windows begin every `hop` while they fit; the rest of the video, if any, is in a last one that ends with it.
    """
    length = frames if window is None else max(round(window * fps), 1)
    if hop is None or length >= frames:
        yield 0, frames
        return
    number = start = end = 0
    while start + length <= frames:
        end = start + length
        yield start, end
        number += 1
        start = max(round(number * hop * fps), start + 1)
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
    short_side: int

    def windows(self, frames: int, fps: float) -> Iterator[tuple[int, int]]:
        return windows(frames, fps, self.window, self.hop)

    def clips(self, frames: int, fps: float) -> Iterator[NDArray[np.int64]]:
        """Frame numbers [K, T] of the clips of each window."""
        for first, end in self.windows(frames, fps):
            starts = view_starts(end - first, fps, self.clip, self.views.temporal_views)
            yield first + frame_indices(starts, end - first, fps, self.clip, self.frame_sampling)


class _Network:
    """A network and what comes before it, each of one trace."""

    def __init__(self, model: X3D, views: ViewSpec) -> None:
        self.classes = model.num_classes
        self.probabilities = probabilities_of(model, views.crop)

        @tf.function(input_signature=[tf.TensorSpec((model.clip.frames, None, None, 3), tf.uint8)])
        def prepare(clip: tf.Tensor) -> tf.Tensor:
            with tf.device("cpu"):  # where the clips of records are scaled too
                return transforms.crops(transforms.resize(clip, views.resize, views.squeeze), views.crop, 1)[0]

        self.prepare = prepare

    def __call__(self, clips: Sequence[Any], path: Path) -> NDArray[np.float32]:
        """Probabilities of prepared clips, [clips, classes]."""
        found = self.probabilities(tf.stack(clips)).numpy()
        if not np.isfinite(found).all():
            raise UserError(f"the network gives probabilities that are not numbers for {path}")
        return found


def _predict(
    network: _Network, sampler: _Sampler, paths: Sequence[Path], thumbnails: int, progress: bool
) -> Iterator[Prediction | VideoError]:
    with tqdm(total=len(paths), bar_format=_BAR, disable=not progress, mininterval=1.0) as bar:
        for done, path in enumerate(paths):
            bar.set_postfix_str(path.name.encode("utf-8", "replace").decode())
            try:
                # never past the whole video, whatever the sum of its parts rounds to
                advance = lambda part, end=done + 1: bar.update(min(part, end - bar.n))  # noqa: E731
                yield from _predict_video(network, sampler, path, thumbnails, advance)
            except VideoError as error:
                yield error
            bar.update(done + 1 - bar.n)  # whole again


def _predict_video(
    network: _Network, sampler: _Sampler, path: Path, thumbnails: int, advance: Callable[[float], Any]
) -> Iterator[Prediction]:
    info = probe(path)
    fps = float(np.float32(info.fps))  # as records store it
    read = 0

    def stream() -> Iterator[Pixels]:
        nonlocal read
        for read, frame in enumerate(read_frames(path, sampler.short_side), start=1):
            yield frame.pixels
            if read <= info.delivered:
                advance(1 / info.delivered)

    def predictions(frames: int) -> Iterator[Prediction]:
        cuts = cut_clips(stream(), sampler.clips(frames, fps))
        # Windows are of one length, so that they are finished in the order in which they begin.
        for (first, end), found in zip(
            sampler.windows(frames, fps), _averages(network, cuts, sampler, path, thumbnails)
        ):
            yield Prediction(path, info.start + first / fps, info.start + end / fps, *found)

    if sampler.window is not None:
        # Windows come out while the video is read. If it then lacks some of the frames that it promised, too few to
        # count as broken off, the last windows repeat the last frame for those.
        yield from predictions(info.delivered)
        return
    found = list(predictions(info.delivered))
    if read != info.delivered:  # some pictures were lost: the clips are spread over what there is
        found = list(predictions(read))
    yield from found


def _averages(
    network: _Network, cuts: Iterable[Cut], sampler: _Sampler, path: Path, thumbnails: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Mean probabilities and thumbnails of each part, once all of its clips have come."""
    views, frames, crop = sampler.views.temporal_views, sampler.clip.frames, sampler.views.crop
    shown = np.unique(np.linspace(0, views * frames - 1, thumbnails).round().astype(int))  # of a part's frames
    parts: dict[int, _Part] = {}
    for batch in _batches(cut._replace(pixels=network.prepare(cut.pixels)) for cut in cuts):
        for cut, probabilities in zip(batch, network([cut.pixels for cut in batch], path), strict=True):
            part = parts.setdefault(cut.part, _Part(np.zeros(network.classes, np.float32)))
            part.total += probabilities
            part.clips += 1
            chosen = shown[shown // frames == cut.view] % frames
            part.thumbnails += [np.clip(cut.pixels[place].numpy().round(), 0, 255) for place in chosen]
            if part.clips == views:
                del parts[cut.part]
                seen = np.array(part.thumbnails, np.uint8).reshape(-1, crop, crop, 3)
                yield part.total / np.float32(views), seen


@dataclass(eq=False)
class _Part:
    """What the clips of a part have given so far."""

    total: NDArray[np.float32]
    clips: int = 0
    thumbnails: list[Any] = field(default_factory=list)


def _batches(cuts: Iterable[Cut]) -> Iterator[list[Cut]]:
    cuts = iter(cuts)
    while batch := list(itertools.islice(cuts, CLIPS_A_CALL)):
        yield batch


@contextmanager
def csv_table(
    path: str | Path, class_names: Sequence[str], *, overwrite: bool = False
) -> Iterator[Callable[[Prediction | VideoError], None]]:
    """A CSV file of predictions: gives the function that adds one.

    Columns: video, start and end in seconds of the file (see `video.VideoInfo.start`), predicted (the most probable
    class), error, and p(CLASS) for each class.
    Text that a spreadsheet would take for a formula gets a leading `'`; `x3d_tf._csv` reads it back.
    The file appears when the block ends, complete. Where the block is left early, `unfinished(path)` gets the rows so
    far.

    Raises:
        UserError: the file is there and may not be replaced.
        WriteError: it cannot be written; nothing is left behind.
    """
    with _results_file(Path(path), overwrite) as file:
        table = _csv.Writer(file)
        table.row(["video", "start", "end", "predicted", "error", *(f"p({name})" for name in class_names)])

        def add(result: Prediction | VideoError) -> None:
            if isinstance(result, VideoError):
                table.row([result.path, "", "", "", result.reason, *("" for _ in class_names)])
                return
            times = (_csv.number(result.start, ".3f"), _csv.number(result.end, ".3f"))
            predicted = class_names[result.top(1)[0]]
            table.row([str(result.path), *times, predicted, "", *(_csv.number(p, ".6g") for p in result.probabilities)])

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
            with writing(self._path):
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
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    conflict = f"another process is writing {path}"
    with locked(lock, conflict, "wait for it, or give another path"), _written(path, end) as results:
        yield results


@contextmanager
def _written(path: Path, end: str) -> Iterator[_Results]:
    partial = partial_of(path)
    with writing(path):
        partial.unlink(missing_ok=True)  # a link would lead to another file
        # file names that are no UTF-8 come out as escapes
        file = partial.open("x", newline="", encoding="utf-8", errors="backslashreplace")

    def finish(place: Path) -> None:
        with writing(place):
            file.write(end)
            file.close()
            put_in_place(partial, place)

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
