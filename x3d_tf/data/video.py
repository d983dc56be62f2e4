"""Reads video files with PyAV and turns them into JPEG frames. Imports no TensorFlow: worker processes stay small."""

import io
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


def encode_video(path: str | Path, short_side: int = 256, quality: int = 95) -> EncodedVideo:
    """Decodes a video and stores its frames as JPEG.

    Args:
        path: the video.
        short_side: see `read_frames`.
        quality: of the JPEG files, 1..95.

    Raises:
        VideoError: as `read_frames`; also a video whose frames exceed 1 GiB, too long for one record.
    """
    timing = _read_timing(path)
    frames: list[bytes] = []
    total = 0
    previous: Pixels | None = None
    for _, pixels in _frames(path, timing, short_side):
        if pixels is not previous:  # a repeated frame is the same array
            encoded, previous = encode_jpeg(pixels, quality), pixels
        frames.append(encoded)
        total += len(encoded)
        if total > MAX_RECORD_BYTES:
            raise VideoError(path, f"its frames exceed {MAX_RECORD_BYTES} bytes as JPEG; cut it into shorter clips")
    return EncodedVideo(frames, float(np.float32(timing.fps)))


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

    @property
    def slots(self) -> int:
        """Frames at the constant rate `fps`."""
        return round((self.last - self.start) * self.fps) + 1 if self.variable_rate else self.pictures


def _read_timing(path: str | Path) -> _Timing:
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
        return _Timing(declared_fps or DEFAULT_FPS, len(packets), False, float(times[0]), float(times[-1]))
    measured_fps = 1.0 / float(np.mean(steps))
    believable = abs(declared_fps / measured_fps - 1) <= RATE_TOLERANCE
    fps = declared_fps if believable else measured_fps
    _check_whole(path, max(end - times[0], len(packets) / fps) * fps, declared_seconds * fps, "are stored")
    slack = max(UNIFORM_TOLERANCE / measured_fps, 1.01 * tick)  # containers round times to their ticks
    variable = bool(np.max(np.abs(steps - np.median(steps))) > slack)
    return _Timing(fps, len(packets), variable, float(times[0]), float(times[-1]))


def _frames(path: str | Path, timing: _Timing, short_side: int) -> Iterator[Frame]:
    shown: Pixels | None = None  # what the slots from `delivered` on show until the next picture's slot
    decoded = delivered = 0
    with _opened(path) as container:
        for picture in container.decode(video=0):
            slot = decoded
            if timing.variable_rate and picture.time is not None:
                slot = round((picture.time - timing.start) * timing.fps)
            decoded += 1
            if slot < delivered:
                continue  # its time has passed: pictures out of order
            if slot - delivered > LONGEST_HOLE * timing.fps:
                raise VideoError(path, f"its timestamps leave more than {LONGEST_HOLE:.0f} s without a frame")
            if shown is not None:
                for index in range(delivered, slot):
                    yield Frame(index / timing.fps, shown)
                delivered = slot
            pixels = _upright_rgb(picture, short_side)
            if shown is not None and pixels.shape != shown.shape:
                raise VideoError(path, f"changes its frame size midway, from {shown.shape[:2]} to {pixels.shape[:2]}")
            shown = pixels
    if shown is None:
        raise VideoError(path, "holds no frame that can be decoded")
    _check_whole(path, decoded, timing.pictures, "could be decoded")
    yield Frame(delivered / timing.fps, shown)


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
