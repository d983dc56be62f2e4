"""Clips out of video files, cut while frames come: memory does not grow with length. Imports no TensorFlow."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.video.decode import Pixels, probe, read_frames

Keep = Callable[[Pixels], Any]  # from a frame to what clips hold of it


class Cut(NamedTuple):
    """A clip out of a stream.

    Attributes:
        part: the part that it is of.
        numbers: of its frames.
        clips: how many of the part's clips these frames are.
        frames: what was kept of them, T; clips share it.
    """

    part: int
    numbers: tuple[int, ...]
    clips: int
    frames: list[Any]


def cut_clips(
    frames: Iterable[Pixels], parts: Iterable[NDArray[np.int64]], keep: Keep = lambda pixels: pixels
) -> Iterator[Cut]:
    """Cuts clips out of a stream of frames, each as soon as its last frame has come.

    Clips of a part that have the same frames, as all of a short video do, are cut once. Holds the frames that clips
    under way have got so far, and no others. Where the stream ends too early its last frame is repeated; parts that it
    did not come to are left out.

    Args:
        frames: the stream, of one size; read to its end.
        parts: numbers of the frames of each part's clips, [clips, T], rising along T. Parts come in the order of their
            first frames, and are asked for when those come.
        keep: makes what clips hold of a frame, once for each frame that a clip has.
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
            kept = keep(pixels)
            for clip in wanting:
                clip.take(kept)
        done = [clip for clip in wanting if clip.complete]
        if done:
            waiting = [clip for clip in waiting if not clip.complete]
            yield from (clip.cut() for clip in done)
            done.clear()  # their frames are not needed any more
        wanting.clear()
    if waiting:
        kept = keep(pixels)
        for clip in waiting:
            clip.fill(kept, number)
            yield clip.cut()


def _distinct(clips: NDArray[np.int64]) -> list[tuple[list[int], int]]:
    """Each row once, with its count, in the order of the rows."""
    rows = [tuple(row) for row in clips.tolist()]
    return [(list(row), rows.count(row)) for row in dict.fromkeys(rows)]


@dataclass(eq=False)
class _OpenClip:
    """A clip of which some frames are still to come."""

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

    def take(self, kept: Any) -> None:
        number = self.next
        while not self.complete and self.next == number:  # short videos repeat frames
            self.frames.append(kept)

    def fill(self, kept: Any, last: int) -> None:
        self.frames += [kept] * (len(self.numbers) - len(self.frames))
        self.numbers = [min(number, last) for number in self.numbers]

    def cut(self) -> Cut:
        return Cut(self.part, tuple(self.numbers), self.clips, self.frames)


class VideoClips:
    """The clips of a whole video, each distinct one once, as soon as its frames have come.

    They are those of the video's record, which holds the frames that could be decoded. A file may promise another
    number of them. Clips are cut where the promised number puts them; where another number was decoded, only those that
    it puts elsewhere are cut again, in a second reading.

    Args:
        path: the video.
        clips_of: gives the numbers of the frames of the clips, int64 [K, T], for the number of frames of a video and
            its rate.
        short_side: see `video.read_frames`.
        keep: see `cut_clips`.
        on_frame: called for each frame that the first reading decodes.

    Attributes:
        fps: of the video, as its record states it.
        start: when its first frame is shown, see `video.VideoInfo`.
        promised: frames that the file says it has.
        frames: frames that were decoded; known after the iteration.
        chosen: `numbers` of the K clips; known after the iteration.

    Raises:
        VideoError: the file cannot be read; while iterating, also one that breaks off.
    """

    def __init__(
        self,
        path: Path,
        clips_of: Callable[[int, float], NDArray[np.int64]],
        short_side: int,
        keep: Keep,
        on_frame: Callable[[], object] = lambda: None,
    ) -> None:
        info = probe(path)
        self.fps, self.promised, self.frames = float(np.float32(info.fps)), info.delivered, 0
        self.start = info.start
        self.chosen: list[tuple[int, ...]] = []
        self._path, self._clips_of, self._short_side = path, clips_of, short_side
        self._keep, self._on_frame = keep, on_frame

    def __iter__(self) -> Iterator[Cut]:
        seen = set()
        for cut in cut_clips(self._counted(), [self._clips_of(self.promised, self.fps)], self._keep):
            seen.add(cut.numbers)
            yield cut
        self.chosen = [tuple(row) for row in self._clips_of(self.frames, self.fps).tolist()]
        missing = sorted(set(self.chosen) - seen)
        if missing:
            stream = (frame.pixels for frame in read_frames(self._path, self._short_side))
            yield from itertools.islice(cut_clips(stream, [np.array(missing)], self._keep), len(missing))

    def _counted(self) -> Iterator[Pixels]:
        for frame in read_frames(self._path, self._short_side):
            self.frames += 1
            yield frame.pixels
            self._on_frame()
