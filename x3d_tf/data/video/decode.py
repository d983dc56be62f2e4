"""Reads video files with PyAV and turns them into JPEG frames. Imports no TensorFlow: worker processes stay small."""

import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from x3d_tf.data.sampling import resized_shape
from x3d_tf.data.video.containers import VideoError, open_container, packets, reported
from x3d_tf.data.video.timeline import Timeline, check_whole, read_timeline

__all__ = (
    "EncodedVideo",
    "Frame",
    "Pixels",
    "VideoError",
    "VideoInfo",
    "encode_jpeg",
    "encode_video",
    "first_from",
    "frame_at",
    "probe",
    "read_frames",
)

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

_UPRIGHT = (False, 1, 1)  # of `_orientation`: as stored

TIME_TOLERANCE = 1e-3  # of a frame's duration: how far a frame may lie before the second from which to keep
MAX_RECORD_BYTES = 1 << 30  # a record is one protocol buffer message, which cannot exceed 2 GiB


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video: of several streams, FFmpeg's best, and never a cover picture.

    Attributes:
        width, height: in pixels, as displayed (after rotation). Pixels count as square, as in PySlowFast.
        fps: frames per second that `read_frames` delivers: the rate of nearly all pictures where there is one.
        frames: pictures stored; with a variable rate, `read_frames` may deliver more or fewer.
        variable_rate: whether frames are repeated or dropped to make the rate constant.
        delivered: frames that `read_frames` delivers where the last pictures can be decoded.
        start: when the first frame is shown, in seconds of the file. These count, as in players and in `ffmpeg -ss`,
            from where its first stream begins: the video itself, or a sound that begins before it.
    """

    width: int
    height: int
    fps: float
    frames: int
    variable_rate: bool
    delivered: int
    start: float = 0.0


class Frame(NamedTuple):
    """One picture: its time in seconds of the file, see `VideoInfo.start`, and RGB pixels, uint8 [height, width, 3]."""

    timestamp: float
    pixels: Pixels


@dataclass(frozen=True)
class EncodedVideo:
    """A video as its record holds it.

    Attributes:
        frames: JPEG files, all of one size.
        fps: frames per second, rounded to float32 as records store it.
        start: when the first frame is shown, in seconds of the file.
    """

    frames: list[bytes]
    fps: float
    start: float = 0.0


def probe(path: str | Path) -> VideoInfo:
    """Reads what a video is: its timestamps, and its first picture.

    Raises:
        VideoError: the file is missing, empty, not a video, has no video stream, is cut off, or holds no frame.
    """
    timeline = read_timeline(path)
    with open_container(path) as (container, stream):
        for picture in _decoded(container, stream):
            width, height = picture.width, picture.height
            if _orientation(picture)[0]:
                width, height = height, width
            return VideoInfo(
                width,
                height,
                timeline.fps,
                timeline.pictures,
                timeline.variable_rate,
                timeline.frames,
                timeline.start,
            )
    raise VideoError(path, "holds no frame that can be decoded")


def read_frames(path: str | Path, short_side: int = 256) -> Iterator[Frame]:
    """Decodes a video, one frame at a time.

    Frames come at the rate of `probe(path).fps`: a variable rate is made constant by repeating and dropping frames. A
    picture is repeated while it stands still, and in place of those after it that cannot be decoded. Recordings joined
    in one file follow each other. Turns and mirrors that the file asks for are applied, to the nearest quarter turn.
    Frames whose short side exceeds `short_side` pixels are scaled to it with the long side rounded down; smaller ones
    keep their size.

    Raises:
        VideoError: as `probe`; also a file of which more than a tenth cannot be decoded, or that changes its size
            midway.
    """
    return _frames(path, read_timeline(path), short_side)


def encode_video(
    path: str | Path, short_side: int = 256, quality: int = 95, start: float = 0.0, end: float | None = None
) -> EncodedVideo:
    """Decodes a video and stores its frames as JPEG.

    Args:
        path: the video.
        short_side: see `read_frames`.
        quality: of the JPEG files, 1..95.
        start: second of the file, see `VideoInfo.start`: the first frame is the first that is not before it.
        end: second of the file to stop before. None, or what lies beyond the video, is its end.

    Raises:
        VideoError: as `read_frames`; also a video whose frames exceed 1 GiB, too long for one record, and one that has
            no frame between `start` and `end`.
    """
    timeline = read_timeline(path)
    first = max(first_from(start - timeline.start, timeline.fps), 0)
    stop = None if end is None else first_from(end - timeline.start, timeline.fps)
    if stop is not None and stop <= first:
        begins = f" and begins at {timeline.start:.3f} s" if timeline.start else ""
        raise VideoError(path, f"has no frame between {start} s and {end} s: it has {timeline.fps:g} a second{begins}")
    try:
        frames = _jpegs(path, _frames(path, timeline, short_side, first, stop, seek=True), quality)
    except _UnsureError:
        frames = _jpegs(path, _frames(path, timeline, short_side, first, stop), quality)
    if not frames:
        raise VideoError(path, f"ends before {start} s, where it was to start")
    return EncodedVideo(frames, float(np.float32(timeline.fps)), timeline.start + first / timeline.fps)


def _jpegs(path: str | Path, frames: Iterator[Frame], quality: int) -> list[bytes]:
    """Frames as JPEG files; raises VideoError if they are too large for a record."""
    jpegs: list[bytes] = []
    total = 0
    previous: Pixels | None = None
    for _, pixels in frames:
        if pixels is not previous:  # a repeated frame is the same array
            encoded, previous = encode_jpeg(pixels, quality), pixels
        jpegs.append(encoded)
        total += len(encoded)
        if total > MAX_RECORD_BYTES:
            raise VideoError(path, f"its frames exceed {MAX_RECORD_BYTES} bytes as JPEG; cut it into shorter clips")
    return jpegs


def first_from(second: float, fps: float) -> int:
    """The first frame that is not before a second after frame 0."""
    return math.ceil(second * fps - TIME_TOLERANCE)


def frame_at(second: float, start: float, fps: float) -> int:
    """Where the frame of a second lies among those whose first is shown at `start`: the nearest one.

    Up to half a second before, which is how much earlier a sound may begin, that is the first.
    """
    place = round((second - start) * fps)
    return 0 if -fps / 2 <= place < 0 else place


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """RGB pixels as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _frames(
    path: str | Path,
    timeline: Timeline,
    short_side: int,
    first: int = 0,
    stop: int | None = None,
    seek: bool = False,
) -> Iterator[Frame]:
    """Frames `first` to before `stop` of the constant rate.

    With `seek` what lies before them is decoded only where it has to be. Raises _UnsureError, perhaps after some of
    them, where they may then differ from the same frames of the video as a whole.
    """
    shown: av.VideoFrame | None = None  # what the frames from `upcoming` on show until the next picture's first
    pixels: Pixels | None = None  # the same, once it is needed
    upcoming, lost, number = first, 0, -1
    sizes: dict[tuple[int, ...], None] = {}
    orientation, angle = _UPRIGHT, None

    def show(picture: av.VideoFrame, slots: range) -> Iterator[Frame]:
        nonlocal pixels, orientation, angle
        for slot in slots:
            if pixels is None:
                if picture.rotation != angle:  # the matrix takes as long to read as a fifth of a small picture
                    orientation, angle = _orientation(picture), picture.rotation
                pixels = _upright_rgb(picture, short_side, orientation)
                sizes.setdefault(pixels.shape[:2])
                if len(sizes) > 1:
                    before, now = sizes
                    raise VideoError(path, f"changes its frame size midway, from {before} to {now}")
            yield Frame(timeline.start + slot / timeline.fps, pixels)

    wanted = max(int(np.searchsorted(timeline.slots, first, side="right")) - 1, 0)
    end = timeline.pictures if stop is None else int(np.searchsorted(timeline.slots, stop))
    sought = seek and wanted > 0 and timeline.seekable
    pictures = _pictures_between(path, timeline, wanted, end) if sought else _all_pictures(path, timeline)
    with reported(path):
        for number, skipped, picture in pictures:
            lost += skipped
            slot = int(timeline.slots[number])
            if shown is not None:  # else it is shown in place of those before it that cannot be decoded, too
                yield from show(shown, range(upcoming, slot if stop is None else min(slot, stop)))
                upcoming = max(upcoming, slot)
            if stop is not None and slot >= stop:
                return
            shown, pixels = picture, None
    if shown is None:
        raise VideoError(path, "holds no frame that can be decoded")
    lost += timeline.pictures - 1 - number
    check_whole(path, timeline.pictures - lost, timeline.pictures, "could be decoded")
    with reported(path):
        yield from show(shown, range(upcoming, int(timeline.slots[number]) + 1))


_Numbered = tuple[int, int, av.VideoFrame]  # a picture's number, how many before it were lost, and the picture


class _UnsureError(Exception):
    """Pictures after a seek may not be those of the whole video."""


def _all_pictures(path: str | Path, timeline: Timeline) -> Iterator[_Numbered]:
    with open_container(path) as (container, stream):
        yield from _numbered(_decoded(container, stream), timeline)


def _pictures_between(path: str | Path, timeline: Timeline, first: int, end: int) -> Iterator[_Numbered]:
    """Pictures from the number `first` to `end`, both included, decoded from a key picture on.

    Raises:
        _UnsureError: pictures cannot be found, or are damaged: what FFmpeg shows then depends on those before.
    """
    assert timeline.ticks is not None
    begun = False
    with open_container(path) as (container, stream):
        # Decoders learn from the first picture what later ones do not tell: faults of encoders, to make up for.
        next(_decoded(container, stream), None)
        container.seek(int(timeline.ticks[first]), stream=stream)
        for number, lost, picture in _after_key(_numbered(_decoded(container, stream, strict=True), timeline)):
            if picture.is_corrupt or not (begun or number <= first):
                raise _UnsureError
            if number >= end and any(each.is_corrupt for each in _waiting(stream)):
                raise _UnsureError
            if number >= first:
                yield number, lost if begun else 0, picture
                begun = True
            if number >= end:
                return
    if not begun:
        raise _UnsureError


def _waiting(stream: "av.VideoStream") -> list[av.VideoFrame]:
    """Pictures that are decoded already and shown later, which those before them may be made of; ends the decoding."""
    try:
        return stream.decode(None)
    except av.EOFError:  # it has ended
        return []


def _after_key(pictures: Iterator[_Numbered]) -> Iterator[_Numbered]:
    """From the first key picture on: those before it need pictures that were not decoded."""
    return itertools.dropwhile(lambda each: not each[2].key_frame, pictures)


def _numbered(pictures: Iterator[av.VideoFrame], timeline: Timeline) -> Iterator[_Numbered]:
    """Pictures with their numbers: by their timestamps, else one after the other."""
    following, started = 0, timeline.ticks is None
    for picture in pictures:
        number = timeline.number(picture.pts, following)
        if number is None and not started:
            continue  # from before the first picture that the timeline has
        if number is None:
            number = following
        if number >= timeline.pictures:
            return  # more than there are packets
        yield number, number - following, picture
        following, started = number + 1, True


def _decoded(
    container: "av.container.InputContainer", stream: "av.VideoStream", strict: bool = False
) -> Iterator[av.VideoFrame]:
    """Pictures in the order in which they are shown; packets that cannot be decoded give none.

    With `strict` they raise _UnsureError.
    """
    damage: av.FFmpegError | None = None
    found = False
    for packet in itertools.chain(packets(container, stream), (None,)):
        try:
            pictures = stream.decode(packet)
        except av.MemoryError:
            raise
        except av.FFmpegError as error:
            if strict:
                raise _UnsureError from error
            damage = damage or error
            continue
        found = found or bool(pictures)
        yield from pictures
    if damage is not None and not found:
        raise damage


def _upright_rgb(picture: av.VideoFrame, short_side: int, orientation: tuple[bool, int, int]) -> Pixels:
    height, width = picture.height, picture.width
    if min(height, width) > short_side:
        height, width = resized_shape(height, width, short_side)
    whole = _progressive(picture) if picture.interlaced_frame else picture
    pixels = whole.reformat(int(width), int(height), "rgb24").to_ndarray()
    turned, rows, columns = orientation
    return np.ascontiguousarray((pixels.transpose(1, 0, 2) if turned else pixels)[::rows, ::columns])


def _progressive(picture: av.VideoFrame) -> av.VideoFrame:
    """The same picture, not marked as interlaced: FFmpeg would scale its two fields apart."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base=Fraction(1))
    marked, sink = graph.add("setfield", "prog"), graph.add("buffersink")
    source.link_to(marked)
    marked.link_to(sink)
    graph.configure()
    graph.push(picture)
    result = graph.pull()
    assert isinstance(result, av.VideoFrame)
    return result


def _orientation(picture: av.VideoFrame) -> tuple[bool, int, int]:
    """How to bring a picture upright: whether to swap its axes, then the directions of its rows and columns, 1 or -1.

    Of a display matrix of any other angle the nearest of these eight; a matrix that makes a line of a picture has none.
    """
    matrix: Any = picture.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32, 5).tolist()  # x' = ax + cy, y' = bx + dy
    if a * d == b * c:
        return _UPRIGHT
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    rows, columns = (b, c) if turned else (d, a)
    return turned, -1 if rows < 0 else 1, -1 if columns < 0 else 1
