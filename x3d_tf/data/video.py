"""Reads video files with PyAV and turns them into JPEG frames. Imports no TensorFlow: worker processes stay small."""

import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from x3d_tf._checks import UserError
from x3d_tf.data.clips import resized_shape

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

DEFAULT_FPS = 30.0  # of a video whose file and timestamps give no rate: a single frame
RATE_TOLERANCE = 0.1  # a declared rate further than this from that of the timestamps is not believed
UNIFORM_TOLERANCE = 0.1  # of a frame's duration: steps that differ by more make a variable rate
LONGEST_HOLE = 60.0  # seconds without a frame; a longer hole is taken for damaged timestamps, not for a still picture
TIME_TOLERANCE = 1e-3  # of a frame's duration: how far a frame may lie before the second from which to keep
# FFmpeg's names of formats that store when each picture is shown. In others it is guessed, differently after a seek.
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
MISSING_TOLERANCE = 0.1  # part of the declared frames that may be missing before a file counts as truncated
MAX_RECORD_BYTES = 1 << 30  # a record is one protocol buffer message, which cannot exceed 2 GiB
# Titles and comments need not be UTF-8; PyAV 19 no longer asks what to do then.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(UserError):
    """A video that cannot be read.

    Attributes:
        path: the file.
        reason: one line.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # these arguments let it travel between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of its first video stream.

    Attributes:
        width, height: in pixels, as displayed (after rotation). Pixels count as square, as in PySlowFast.
        fps: frames per second that `read_frames` delivers.
        frames: pictures stored; with a variable rate, `read_frames` may deliver more or fewer.
        variable_rate: whether frames are repeated or dropped to make the rate constant.
        delivered: frames that `read_frames` delivers where all pictures can be decoded.
    """

    width: int
    height: int
    fps: float
    frames: int
    variable_rate: bool
    delivered: int


class Frame(NamedTuple):
    """One picture: its time in seconds from the first, and RGB pixels, uint8 [height, width, 3]."""

    timestamp: float
    pixels: Pixels


@dataclass(frozen=True)
class EncodedVideo:
    """A video as its record holds it.

    Attributes:
        frames: JPEG files, all of one size.
        fps: frames per second, rounded to float32 as records store it.
    """

    frames: list[bytes]
    fps: float


def probe(path: str | Path) -> VideoInfo:
    """Reads what a video is: its timestamps, and its first picture.

    Raises:
        VideoError: the file is missing, empty, not a video, has no video stream, is cut off, or holds no frame.
    """
    timing = _read_timing(path)
    with _opened(path) as container:
        for picture in container.decode(video=0):
            width, height = picture.width, picture.height
            if _quarter_turns(picture) % 2:
                width, height = height, width
            return VideoInfo(width, height, timing.fps, timing.pictures, timing.variable_rate, timing.slots)
    raise VideoError(path, "holds no frame that can be decoded")


def read_frames(path: str | Path, short_side: int = 256) -> Iterator[Frame]:
    """Decodes a video, one frame at a time.

    Frames come at the rate of `probe(path).fps`: a variable rate is made constant by repeating and dropping frames.
    Rotation that the file asks for is applied. Frames whose short side exceeds `short_side` pixels are scaled to it
    with the long side rounded down; smaller ones keep their size.

    Raises:
        VideoError: as `probe`; also a file that breaks off, or changes its size, midway.
    """
    return _frames(path, _read_timing(path), short_side)


def encode_video(
    path: str | Path, short_side: int = 256, quality: int = 95, start: float = 0.0, end: float | None = None
) -> EncodedVideo:
    """Decodes a video and stores its frames as JPEG.

    Args:
        path: the video.
        short_side: see `read_frames`.
        quality: of the JPEG files, 1..95.
        start: seconds to leave out at the beginning: the first frame is the first that is not before it.
        end: second to stop before. None, or what lies beyond the video, is its end.

    Raises:
        VideoError: as `read_frames`; also a video whose frames exceed 1 GiB, too long for one record, and one that has
            no frame between `start` and `end`.
    """
    timing = _read_timing(path)
    first = first_from(start, timing.fps)
    stop = None if end is None else first_from(end, timing.fps)
    if stop is not None and stop <= first:
        raise VideoError(path, f"has no frame between {start} s and {end} s: it has {timing.fps:g} a second")
    frames: list[bytes] = []
    total = 0
    previous: Pixels | None = None
    for _, pixels in _frames(path, timing, short_side, first, stop):
        if pixels is not previous:  # a repeated frame is the same array
            encoded, previous = encode_jpeg(pixels, quality), pixels
        frames.append(encoded)
        total += len(encoded)
        if total > MAX_RECORD_BYTES:
            raise VideoError(path, f"its frames exceed {MAX_RECORD_BYTES} bytes as JPEG; cut it into shorter clips")
    if not frames:
        raise VideoError(path, f"ends before {start} s, where it was to start")
    return EncodedVideo(frames, float(np.float32(timing.fps)))


def first_from(second: float, fps: float) -> int:
    """The first frame that is not before a second of the video."""
    return math.ceil(second * fps - TIME_TOLERANCE)


def frame_at(second: float, start: float, fps: float) -> int:
    """Where the frame of a second lies among those from `start` on: the nearest one."""
    return round(second * fps) - first_from(start, fps)


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """RGB pixels as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@contextmanager
def _opened(path: str | Path) -> Iterator["av.container.InputContainer"]:
    """The opened file, with every failure of decoding inside the block turned into a VideoError."""
    file = Path(path)
    try:
        if not file.is_file():
            raise VideoError(path, "no such file")
        if file.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        # "file:" keeps FFmpeg from taking a name such as "concat:a|b" for a protocol; a playlist in disguise is not
        # allowed to reach for other files or the network.
        with av.open(f"file:{file}", options={"protocol_whitelist": "file"}, **_LENIENT) as container:
            if _not_video(container.format.name):
                raise VideoError(path, f"is not a video but {container.format.long_name}")
            if not container.streams.video:
                raise VideoError(path, "has no video stream")
            yield container
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(path, f"cannot be decoded ({reason})") from error


def _not_video(format_name: str) -> bool:
    """Whether FFmpeg's format is one that shows text files and single images as videos."""
    return format_name in ("tty", "image2") or format_name.endswith("_pipe")


@dataclass(frozen=True)
class _Timing:
    """When the pictures of a video are shown, from its packets."""

    fps: float
    pictures: int
    variable_rate: bool
    start: float  # seconds
    last: float  # seconds: the last picture's
    ticks: NDArray[np.float64] | None  # when pictures are shown, ascending, in the stream's unit; None where not known

    @property
    def slots(self) -> int:
        """Frames at the constant rate `fps`."""
        return round((self.last - self.start) * self.fps) + 1 if self.variable_rate else self.pictures


def _read_timing(path: str | Path) -> _Timing:
    try:
        status = Path(path).stat()
    except OSError:
        return _timing(path, None)
    return _timing(path, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=2)  # many pieces of a video are often read one after the other
def _timing(path: str | Path, state: tuple[int, int] | None) -> _Timing:
    """Reads all packets without decoding them: only all timestamps together tell whether the rate is constant."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        tick = float(stream.time_base or 0)
        packets = [(p.pts, p.dts, p.duration or 0) for p in container.demux(stream) if p.size and not p.is_discard]
        declared_fps = float(stream.average_rate or stream.guessed_rate or 0)
        declared_seconds = stream.duration * tick if stream.duration else (container.duration or 0) / av.time_base
        if container.format.name == "avi" and declared_fps:  # there FFmpeg guesses durations from the file's size
            declared_seconds = stream.frames / declared_fps
    if not packets:
        raise VideoError(path, "holds no frame")
    column = 0 if all(packet[0] is not None for packet in packets) else 1  # presentation times, else decoding times
    ticks = np.array([packet[column] or 0 for packet in packets], np.float64)
    end = float(np.max(ticks + np.array([packet[2] for packet in packets]))) * tick
    times = np.sort(ticks) * tick  # seconds
    steps = np.diff(times)
    if len(steps) == 0 or not steps.any():  # nothing to measure: trust the header
        return _Timing(declared_fps or DEFAULT_FPS, len(packets), False, float(times[0]), float(times[-1]), None)
    measured_fps = 1.0 / float(np.mean(steps))
    believable = abs(declared_fps / measured_fps - 1) <= RATE_TOLERANCE
    fps = declared_fps if believable else measured_fps
    _check_whole(path, max(end - times[0], len(packets) / fps) * fps, declared_seconds * fps, "are in the file")
    slack = max(UNIFORM_TOLERANCE / measured_fps, 1.01 * tick)  # containers round times to their ticks
    variable = bool(np.max(np.abs(steps - np.median(steps))) > slack)
    shown = np.sort(ticks) if column == 0 else None
    return _Timing(fps, len(packets), variable, float(times[0]), float(times[-1]), shown)


def _frames(
    path: str | Path, timing: _Timing, short_side: int, first: int = 0, stop: int | None = None
) -> Iterator[Frame]:
    """Frames `first` to before `stop` of the constant rate; what lies outside is decoded only where it has to be."""
    shown: av.VideoFrame | None = None  # what the slots from `delivered` on show until the next picture's slot
    pixels: Pixels | None = None  # the same, once it is needed
    decoded = delivered = 0

    def show(picture: av.VideoFrame, slots: range) -> Iterator[Frame]:
        nonlocal pixels
        for slot in slots:
            if pixels is None:
                pixels = _upright_rgb(picture, short_side)
                sizes.setdefault(pixels.shape[:2])
                if len(sizes) > 1:
                    before, now = sizes
                    raise VideoError(path, f"changes its frame size midway, from {before} to {now}")
            yield Frame(slot / timing.fps, pixels)

    sizes: dict[tuple[int, ...], None] = {}
    with _opened(path) as container:
        for number, picture in _pictures(container, timing, first):
            slot = number
            if timing.variable_rate and picture.time is not None:
                slot = round((picture.time - timing.start) * timing.fps)
            if decoded == 0:
                delivered = min(slot, first)  # nothing before is shown
            decoded = number + 1
            if slot < delivered:
                continue  # its time has passed: pictures out of order
            if slot - delivered > LONGEST_HOLE * timing.fps:
                raise VideoError(path, f"its timestamps leave more than {LONGEST_HOLE:.0f} s without a frame")
            if shown is not None:
                yield from show(shown, range(max(delivered, first), slot if stop is None else min(slot, stop)))
                delivered = slot
            if stop is not None and slot >= stop:
                return
            shown, pixels = picture, None
    if shown is None:
        raise VideoError(path, "holds no frame that can be decoded")
    _check_whole(path, decoded, timing.pictures, "could be decoded")
    yield from show(shown, range(max(delivered, first), delivered + 1))


def _pictures(
    container: "av.container.InputContainer", timing: _Timing, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Pictures and their numbers, all that are shown from the frame `first` on and perhaps some before it.

    Starts at a key picture before that frame, where timestamps say for sure which one that is, else at the first.
    """
    ticks, stream = timing.ticks, container.streams.video[0]
    known = ticks is not None and len(np.unique(ticks)) == len(ticks) and container.format.name in SEEKABLE
    if first and known and ticks is not None:
        seconds = timing.start + first / timing.fps
        wanted = int(np.searchsorted(ticks * float(stream.time_base or 0), seconds)) if timing.variable_rate else first
        wanted = min(wanted, len(ticks)) - 1  # the one before may be shown still
        container.seek(int(ticks[wanted]), stream=stream)
        after = _after_key(container, ticks)
        head = next(after, None)
        if head is not None and head[0] <= wanted:
            yield head
            yield from after
            return
        container.seek(int(ticks[0]), stream=stream)
    yield from enumerate(container.decode(video=0))


def _after_key(
    container: "av.container.InputContainer", ticks: NDArray[np.float64]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Pictures from the next key picture on, and their numbers by their timestamps; none if that one's is unknown."""
    number = None
    for picture in container.decode(video=0):
        if number is None and not picture.key_frame:
            continue  # needs pictures from before
        place = len(ticks) if picture.pts is None else int(np.searchsorted(ticks, picture.pts))
        if place < len(ticks) and ticks[place] == picture.pts:
            number = place
        elif number is None:
            return
        else:
            number += 1
        yield number, picture


def _check_whole(path: str | Path, found: float, expected: float, what: str) -> None:
    # Two frames are forgiven in short files too: AVI writers count empty packets, encoders drop the last picture.
    if found < expected - max(2.0, MISSING_TOLERANCE * expected):
        raise VideoError(path, f"breaks off: {found:.0f} of {expected:.0f} frames {what}")


def _quarter_turns(picture: av.VideoFrame) -> int:
    """Counterclockwise quarter turns that bring the picture upright."""
    return round(picture.rotation / 90) % 4


def _upright_rgb(picture: av.VideoFrame, short_side: int) -> Pixels:
    height, width = picture.height, picture.width
    if min(height, width) > short_side:
        height, width = resized_shape(height, width, short_side)
    pixels = picture.reformat(int(width), int(height), "rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, _quarter_turns(picture)))
