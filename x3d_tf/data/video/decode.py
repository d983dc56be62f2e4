"""Decodes video files with PyAV and encodes JPEG frames. Imports no TensorFlow, which keeps worker processes small."""

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
from x3d_tf.data.video.containers import VideoError, decoding_errors_as_video_error, open_container, packets
from x3d_tf.data.video.timeline import Timeline, check_complete, read_timeline
from x3d_tf.types import Storage

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

_UPRIGHT = (False, 1, 1)  # result of `_orientation` for pictures that are stored upright

TIME_TOLERANCE = 1e-3  # in frame durations: how much earlier than the start the first frame may be
MAX_RECORD_BYTES = 1 << 30  # a record is a protocol buffer message, which cannot exceed 2 GiB


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file's video stream: FFmpeg's best one, excluding cover pictures.

    Attributes:
        width, height: size as displayed, after rotation, in pixels. Pixels are assumed to be square, as in PySlowFast.
        fps: frames per second of `read_frames`: the rate of nearly all pictures if they have one.
        frames: number of stored pictures. With a variable rate, `read_frames` may yield more or fewer frames.
        variable_rate: True if frames are repeated or dropped to make the rate constant.
        delivered: number of frames that `read_frames` yields, if the last pictures can be decoded.
        start: time of the first frame in seconds of the file. As in players and in `ffmpeg -ss`, times count from the
            start of the first stream, which is the video or audio that begins before it.
    """

    width: int
    height: int
    fps: float
    frames: int
    variable_rate: bool
    delivered: int
    start: float = 0.0


class Frame(NamedTuple):
    """A frame: its time in seconds of the file (see `VideoInfo.start`), and RGB pixels, uint8 [height, width, 3]."""

    timestamp: float
    pixels: Pixels


@dataclass(frozen=True)
class EncodedVideo:
    """An encoded video, ready to be stored in a record.

    Attributes:
        frames: JPEG files, all of the same size.
        fps: frames per second, rounded to float32 as in records.
        start: time of the first frame in seconds of the file.
    """

    frames: list[bytes]
    fps: float
    start: float = 0.0


def probe(path: str | Path) -> VideoInfo:
    """Reads the properties of a video from its timestamps and its first picture.

    Raises:
        VideoError: the file is missing, empty, truncated or not a video, or has no video stream or no frame.
    """
    timeline = read_timeline(path)
    with open_container(path) as (container, stream):
        for picture in _decode_pictures(container, stream):
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
    raise VideoError(path, "has no frame that can be decoded")


def read_frames(path: str | Path, short_side: int = 256) -> Iterator[Frame]:
    """Decodes a video and yields its frames.

    Frames have the constant rate `probe(path).fps`; a variable rate is made constant by repeating and dropping frames.
    A picture is repeated until the next one is due, and in place of following ones that cannot be decoded. Recordings
    joined in one file follow each other. Rotation and mirroring from the metadata are applied, rounded to quarter
    turns. Frames whose short side exceeds `short_side` pixels are scaled to it with the long side rounded down;
    smaller frames are not upscaled.

    Raises:
        VideoError: see `probe`; also if more than a tenth of the pictures cannot be decoded, or the frame size changes.
    """
    return _read_range(path, read_timeline(path), short_side)


def encode_video(
    path: str | Path, short_side: int = 256, quality: int = 95, start: float = 0.0, end: float | None = None
) -> EncodedVideo:
    """Decodes a video and encodes its frames as JPEG.

    Args:
        path: video file.
        short_side: see `read_frames`.
        quality: JPEG quality, 1..95.
        start: start time in seconds of the file (see `VideoInfo.start`). The first frame is the first one at or after
            it.
        end: end time in seconds, exclusive. None, like a time beyond the video, means the end of the video.

    Raises:
        VideoError: see `read_frames`; also if the frames exceed 1 GiB, the limit of a record, or if no frame lies
            between `start` and `end`.
    """
    timeline = read_timeline(path)
    first = max(first_from(start - timeline.start, timeline.fps), 0)
    stop = None if end is None else first_from(end - timeline.start, timeline.fps)
    if stop is not None and stop <= first:
        begins = f" and begins at {timeline.start:.3f} s" if timeline.start else ""
        rate = f"it has {timeline.fps:g} frames per second{begins}"
        raise VideoError(path, f"has no frame between {start} s and {end} s: {rate}")
    try:
        frames = _encode_jpegs(path, _read_range(path, timeline, short_side, first, stop, seek=True), quality)
    except _InexactSeekError:
        frames = _encode_jpegs(path, _read_range(path, timeline, short_side, first, stop), quality)
    if not frames:
        raise VideoError(path, f"ends before the start time {start} s")
    return EncodedVideo(frames, float(np.float32(timeline.fps)), timeline.start + first / timeline.fps)


def _encode_jpegs(path: str | Path, frames: Iterator[Frame], quality: int) -> list[bytes]:
    """Encodes frames as JPEG files; raises VideoError if they are too large for a record."""
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
    """Returns the index of the first frame at or after a time, in seconds after frame 0."""
    return math.ceil(second * fps - TIME_TOLERANCE)


def frame_at(second: float, start: float, fps: float) -> int:
    """Returns the index of the frame nearest to a time, given the time of frame 0.

    Times up to half a second before frame 0, which happen if audio begins earlier, give frame 0.
    """
    index = round((second - start) * fps)
    return 0 if -fps / 2 <= index < 0 else index


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """Encodes RGB pixels as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def as_stored(pixels: Pixels, stored: Storage | None) -> Pixels:
    """Compresses a frame to JPEG and decodes it again, so that the network sees what it saw in training.

    Args:
        pixels: frame from `read_frames` with the short side from `sampling.decoded_short_side`.
        stored: storage format of the records that the network was trained on. None returns the frame unchanged.
    """
    if stored is None:
        return pixels
    with Image.open(io.BytesIO(encode_jpeg(pixels, stored.jpeg_quality)), formats=["JPEG"]) as image:
        return np.asarray(image)


def _read_range(
    path: str | Path,
    timeline: Timeline,
    short_side: int,
    first: int = 0,
    stop: int | None = None,
    seek: bool = False,
) -> Iterator[Frame]:
    """Yields the frames `first` to `stop`, exclusive, at the constant rate.

    With `seek`, earlier pictures are decoded only if required. Raises _InexactSeekError, possibly after some frames,
    if frames may differ from those of decoding the complete video.
    """
    shown: av.VideoFrame | None = None  # shown from frame `upcoming` to the next picture
    pixels: Pixels | None = None  # of `shown`, converted when first needed
    upcoming, lost, number = first, 0, -1
    sizes: dict[tuple[int, ...], None] = {}
    orientation, angle = _UPRIGHT, None

    def show(picture: av.VideoFrame, slots: range) -> Iterator[Frame]:
        nonlocal pixels, orientation, angle
        for slot in slots:
            if pixels is None:
                if picture.rotation != angle:  # reading the matrix is slow: a fifth of decoding a small picture
                    orientation, angle = _orientation(picture), picture.rotation
                pixels = _upright_rgb(picture, short_side, orientation)
                sizes.setdefault(pixels.shape[:2])
                if len(sizes) > 1:
                    before, now = sizes
                    raise VideoError(path, f"changes its frame size from {before} to {now}")
            yield Frame(timeline.start + slot / timeline.fps, pixels)

    wanted = max(int(np.searchsorted(timeline.slots, first, side="right")) - 1, 0)
    end = timeline.pictures if stop is None else int(np.searchsorted(timeline.slots, stop))
    use_seek = seek and wanted > 0 and timeline.seekable
    pictures = _pictures_between(path, timeline, wanted, end) if use_seek else _all_pictures(path, timeline)
    with decoding_errors_as_video_error(path):
        for number, skipped, picture in pictures:
            lost += skipped
            slot = int(timeline.slots[number])
            if shown is not None:  # otherwise the first picture also replaces earlier ones that cannot be decoded
                yield from show(shown, range(upcoming, slot if stop is None else min(slot, stop)))
                upcoming = max(upcoming, slot)
            if stop is not None and slot >= stop:
                return
            shown, pixels = picture, None
    if shown is None:
        raise VideoError(path, "has no frame that can be decoded")
    lost += timeline.pictures - 1 - number
    check_complete(path, timeline.pictures - lost, timeline.pictures, "could be decoded")
    with decoding_errors_as_video_error(path):
        yield from show(shown, range(upcoming, int(timeline.slots[number]) + 1))


_NumberedPicture = tuple[int, int, av.VideoFrame]  # its number, the number of lost pictures before it, the picture


class _InexactSeekError(Exception):
    """Pictures after a seek may differ from those of decoding the complete video."""


def _all_pictures(path: str | Path, timeline: Timeline) -> Iterator[_NumberedPicture]:
    with open_container(path) as (container, stream):
        yield from _number_pictures(_decode_pictures(container, stream), timeline)


def _pictures_between(path: str | Path, timeline: Timeline, first: int, end: int) -> Iterator[_NumberedPicture]:
    """Yields the pictures `first` to `end`, inclusive, decoding from a key picture on.

    Raises:
        _InexactSeekError: a picture is missing or damaged, so that FFmpeg's output depends on earlier pictures.
    """
    assert timeline.ticks is not None
    started = False
    with open_container(path) as (container, stream):
        # Only the first picture tells decoders about encoder bugs to work around.
        next(_decode_pictures(container, stream), None)
        container.seek(int(timeline.ticks[first]), stream=stream)
        for number, lost, picture in _after_key(
            _number_pictures(_decode_pictures(container, stream, strict=True), timeline)
        ):
            if picture.is_corrupt or not (started or number <= first):
                raise _InexactSeekError
            if number >= end and any(later.is_corrupt for later in _flush(stream)):
                raise _InexactSeekError
            if number >= first:
                yield number, lost if started else 0, picture
                started = True
            if number >= end:
                return
    if not started:
        raise _InexactSeekError


def _flush(stream: "av.VideoStream") -> list[av.VideoFrame]:
    """Ends the decoding and returns the pictures still in the decoder, which earlier ones may depend on."""
    try:
        return stream.decode(None)
    except av.EOFError:
        return []


def _after_key(pictures: Iterator[_NumberedPicture]) -> Iterator[_NumberedPicture]:
    """Drops the pictures before the first key picture, which depend on pictures that were not decoded."""
    return itertools.dropwhile(lambda numbered: not numbered[2].key_frame, pictures)


def _number_pictures(pictures: Iterator[av.VideoFrame], timeline: Timeline) -> Iterator[_NumberedPicture]:
    """Numbers pictures by their timestamps if these are known, else consecutively."""
    following, started = 0, timeline.ticks is None
    for picture in pictures:
        number = timeline.number(picture.pts, following)
        if number is None and not started:
            continue  # precedes the first picture of the timeline
        if number is None:
            number = following
        if number >= timeline.pictures:
            return  # more pictures than packets
        yield number, number - following, picture
        following, started = number + 1, True


def _decode_pictures(
    container: "av.container.InputContainer", stream: "av.VideoStream", strict: bool = False
) -> Iterator[av.VideoFrame]:
    """Yields pictures in display order; skips packets that cannot be decoded.

    With `strict`, such packets raise _InexactSeekError.
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
                raise _InexactSeekError from error
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
    frame = _progressive(picture) if picture.interlaced_frame else picture
    pixels = frame.reformat(int(width), int(height), "rgb24").to_ndarray()
    turned, rows, columns = orientation
    return np.ascontiguousarray((pixels.transpose(1, 0, 2) if turned else pixels)[::rows, ::columns])


def _progressive(picture: av.VideoFrame) -> av.VideoFrame:
    """Marks a picture as progressive, because FFmpeg scales the two fields of interlaced pictures separately."""
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
    """Returns how to turn a picture upright: a flag to swap its axes, then row and column direction, 1 or -1.

    A display matrix with any other angle is rounded to the nearest of these eight. A singular matrix is ignored.
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
