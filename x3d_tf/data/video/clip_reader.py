"""Cuts clips from a stream of video frames, in memory independent of its length. Imports no TensorFlow."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.video.decode import Pixels, probe, read_frames

FrameTransform = Callable[[Pixels], Any]


class Cut(NamedTuple):
    """A clip cut from a stream.

    Attributes:
        part: index of its part.
        numbers: frame numbers, T.
        clips: number of the part's clips that have these frames.
        frames: transformed frames, T, shared between clips.
    """

    part: int
    numbers: tuple[int, ...]
    clips: int
    frames: list[Any]


def cut_clips(
    frames: Iterable[Pixels], parts: Iterable[NDArray[np.int64]], transform: FrameTransform = lambda pixels: pixels
) -> Iterator[Cut]:
    """Cuts clips from a stream of frames, and yields each as soon as its last frame has been read.

    Clips of a part with identical frames, as in short videos, are cut once. Only the frames of unfinished clips are
    held in memory. If the stream ends early, its last frame is repeated; parts that it does not reach are left out.

    Args:
        frames: stream of frames of the same size; read to its end.
        parts: frame numbers of each part's clips, [clips, T], ascending along T. Parts are ordered by their first
            frames, and requested when these are read.
        transform: function applied once to each frame that belongs to a clip.
    """
    upcoming = enumerate(parts)
    following = next(upcoming, None)
    waiting: list[_OpenClip] = []
    for number, pixels in enumerate(frames):
        while following is not None and following[1].min() <= number:
            part, clips = following
            waiting += [_OpenClip(part, *clip) for clip in _distinct(clips)]
            following = next(upcoming, None)
        wanting = [clip for clip in waiting if clip.next == number]
        if wanting:
            transformed = transform(pixels)
            for clip in wanting:
                clip.append(transformed)
        done = [clip for clip in wanting if clip.complete]
        if done:
            waiting = [clip for clip in waiting if not clip.complete]
            yield from (clip.cut() for clip in done)
            done.clear()  # releases their frames
        wanting.clear()
    if waiting:
        transformed = transform(pixels)
        for clip in waiting:
            clip.fill(transformed, number)
            yield clip.cut()


def _distinct(clips: NDArray[np.int64]) -> list[tuple[list[int], int]]:
    """Returns the distinct rows with their counts, in the order of the rows."""
    rows = [tuple(row) for row in clips.tolist()]
    return [(list(row), rows.count(row)) for row in dict.fromkeys(rows)]


@dataclass(eq=False)
class _OpenClip:
    """A clip with frames still to be read."""

    part: int
    numbers: list[int]
    clips: int
    frames: list[Any] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.frames) == len(self.numbers)

    @property
    def next(self) -> int:
        return self.numbers[len(self.frames)]

    def append(self, frame: Any) -> None:
        number = self.next
        while not self.complete and self.next == number:  # short videos repeat frames
            self.frames.append(frame)

    def fill(self, frame: Any, last: int) -> None:
        self.frames += [frame] * (len(self.numbers) - len(self.frames))
        self.numbers = [min(number, last) for number in self.numbers]

    def cut(self) -> Cut:
        return Cut(self.part, tuple(self.numbers), self.clips, self.frames)


class VideoClips:
    """Iterable over the distinct clips of a complete video, each as soon as its frames have been read.

    The clips equal those of the video's record, whose length is the number of decoded frames. That number is known only
    at the end, so clips are first placed by the number in the file. If the numbers differ, the clips that move are cut
    in a second pass.

    Args:
        path: video file.
        clips_of: function from the number of frames and the frame rate to the frame numbers of the clips, int64 [K, T].
        short_side: see `decode.read_frames`.
        transform: see `cut_clips`.
        on_frame: called for each frame in the first pass.

    Attributes:
        fps: frames per second, as in the video's record.
        start: time of the first frame; see `decode.VideoInfo`.
        promised: number of frames according to the file.
        frames: number of decoded frames; available after the iteration.
        chosen: `numbers` of the K clips; available after the iteration.

    Raises:
        VideoError: the file cannot be read or, during iteration, is truncated.
    """

    def __init__(
        self,
        path: Path,
        clips_of: Callable[[int, float], NDArray[np.int64]],
        short_side: int,
        transform: FrameTransform,
        on_frame: Callable[[], object] = lambda: None,
    ) -> None:
        info = probe(path)
        self.fps, self.promised, self.frames = float(np.float32(info.fps)), info.delivered, 0
        self.start = info.start
        self.chosen: list[tuple[int, ...]] = []
        self._path, self._clips_of, self._short_side = path, clips_of, short_side
        self._transform, self._on_frame = transform, on_frame

    def __iter__(self) -> Iterator[Cut]:
        seen = set()
        for cut in cut_clips(self._count_frames(), [self._clips_of(self.promised, self.fps)], self._transform):
            seen.add(cut.numbers)
            yield cut
        self.chosen = [tuple(row) for row in self._clips_of(self.frames, self.fps).tolist()]
        missing = sorted(set(self.chosen) - seen)
        if missing:
            stream = (frame.pixels for frame in read_frames(self._path, self._short_side))
            yield from itertools.islice(cut_clips(stream, [np.array(missing)], self._transform), len(missing))

    def _count_frames(self) -> Iterator[Pixels]:
        for frame in read_frames(self._path, self._short_side):
            self.frames += 1
            yield frame.pixels
            self._on_frame()
