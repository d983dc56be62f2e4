"""Reads the display times of a video's pictures from its packets, without decoding. Imports no TensorFlow."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.video.containers import VideoError, open_container, packets
from x3d_tf.data.video.h264_fields import Field, FieldReader, second_fields

DEFAULT_FPS = 30.0  # for videos without any rate information, such as a single frame
LONGEST_GAP = 60.0  # seconds without a picture; a longer gap is taken for damaged timestamps
MISSING_TOLERANCE = 0.1  # fraction of frames that may be missing before a file counts as truncated
_LATEST_START = 3600.0  # seconds; a later start of the video relative to the audio is taken for damaged timestamps
MAX_FRAMES = 5_000_000  # about two days; damaged timestamps can lead to any number
_UNIFORM_TOLERANCE = 0.1  # in frame durations; steps that differ by more make the rate variable
_MOST = 2 / 3  # fraction of equal steps in a video with occasional dropped or repeated pictures
_NEARLY_ALL = 0.9  # fraction of steps that are multiples of one step in a video with many dropped pictures
_FASTEST = 240.0  # pictures per second; among longer steps, shorter ones are bursts of a recorder that was late
_GAP = 10.0  # in mean steps; longer steps are ignored in estimating the rate
_RATE_TOLERANCE = 0.1  # maximum relative difference of a declared rate from that of uneven timestamps
_EVEN_RATE_TOLERANCE = 0.002  # the same for even timestamps
_REORDERED = 8.0  # in steps; decoding times that go back by more begin another recording
# FFmpeg's names of formats with an index from times to pictures.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_ROUNDING = 1e-6  # seconds; FFmpeg reports the start of a file in microseconds
# FFmpeg's names of formats in which recordings can be joined by concatenating files with unrelated timestamps. A gap
# longer than LONGEST_GAP separates recordings there.
_JOINED = ("mpegts", "mpeg")
# GUID of the ASF object whose byte 40 begins the file size.
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EMPTY_MPEG4 = 4  # bytes; MPEG-4 packets of at most this size hold no picture


@dataclass(frozen=True)
class Timeline:
    """Mapping of a video's pictures to frames at a constant rate.

    Attributes:
        fps: frames per second.
        start: time of the first frame in seconds of the file, where 0 is the start of its first stream, video or audio.
        slots: index of the first frame that shows each picture, in display order; ascending.
        ticks: stored timestamps of the pictures in stream time units; None if they are not all reliable.
        variable_rate: True if frames are repeated or dropped.
        seekable: True if pictures can be found by their timestamps.
    """

    fps: float
    start: float
    slots: NDArray[np.int64]
    ticks: NDArray[np.float64] | None
    variable_rate: bool
    seekable: bool

    @property
    def pictures(self) -> int:
        """Number of stored pictures."""
        return len(self.slots)

    @property
    def frames(self) -> int:
        """Number of frames at the constant rate."""
        return int(self.slots[-1]) + 1

    def number(self, tick: int | None, following: int) -> int | None:
        """Returns the first picture from `following` on with the timestamp `tick`, or None."""
        if self.ticks is None or tick is None:
            return None
        if following < len(self.ticks) and self.ticks[following] == tick:
            return following
        found = np.flatnonzero(self.ticks[following:] == tick)
        return following + int(found[0]) if len(found) else None


def read_timeline(path: str | Path) -> Timeline:
    """Reads all packets of a video, because its rate depends on all timestamps.

    Raises:
        VideoError: see `containers.open_container`; also if the file has no frame or is truncated, or if its timestamps
            have a gap of more than 60 s or lead to millions of frames.
    """
    try:
        status = Path(path).stat()
    except OSError:
        return _timeline(path, None)
    return _timeline(path, (status.st_size, status.st_mtime_ns))


def check_complete(path: str | Path, found: float, expected: float, status: str) -> None:
    """Raises VideoError if more than a tenth of the frames is missing."""
    # Short files may lack two frames: AVI writers count empty packets, and encoders drop the last picture.
    if found < expected - max(2.0, MISSING_TOLERANCE * expected):
        raise VideoError(path, f"is truncated: only {found:.0f} of {expected:.0f} frames {status}")


@functools.lru_cache(maxsize=2)  # segments of the same video are often read consecutively
def _timeline(path: str | Path, state: tuple[int, int] | None) -> Timeline:
    with open_container(path) as (container, stream):
        scan = _scan(container, stream)
        tick = float(stream.time_base or 0)
        declared = float(stream.average_rate or stream.guessed_rate or 0)
        if not len(scan.pts):
            raise VideoError(path, "has no frame")
        nominal = 1 / (declared * tick) if declared and tick else 0.0
        times = _times(scan, container, tick, nominal)
        decodable = scan.keys.cumsum() > 0 if scan.keys.any() else np.ones(len(times), bool)
        shown = decodable & ~scan.second & ~scan.discarded
        if not shown.any():
            raise VideoError(path, "has no frame")
        order = np.flatnonzero(shown)[np.argsort(times[shown], kind="stable")]
        times, stored = _close_gaps_at_cut(times[order] * tick, order, tick), scan.pts[order]
        if scan.empty:  # empty packets only delay the following pictures
            times = times[: max(len(times) - scan.empty, 1)]
        fps, uniform = _rate(times, tick, declared)
        _check_length(path, container, stream, scan, len(times), fps)
        measured = bool(np.any(times != times[0]))
        guessed = container.format.name == "avi" and not np.array_equal(scan.pts, scan.dts)  # unordered
        known = measured and not np.isnan(stored).any() and not guessed and not scan.empty
        seekable = known and container.format.name in _SEEKABLE and bool(np.all(np.diff(stored) > 0))
        start = 0.0 if container.start_time is None else float(times[0]) - container.start_time / av.time_base
    if start > _LATEST_START:
        raise VideoError(path, f"its video starts at {start:.0f} s, more than {_LATEST_START:.0f} s after the file")
    slots = np.arange(len(times)) if uniform else _slots(path, times, fps)
    start = start if start > _ROUNDING else 0.0  # pictures that lead to the first key picture may precede it
    return Timeline(fps, start, slots, stored if known else None, not uniform, seekable)


class _Scan(NamedTuple):
    """The packets of the video stream in file order. Times are in stream time units, NaN if not stored."""

    pts: NDArray[np.float64]
    dts: NDArray[np.float64]
    keys: NDArray[np.bool_]
    discarded: NDArray[np.bool_]  # decoded but not shown
    second: NDArray[np.bool_]  # second field of the previous packet's picture
    empty: int  # number of packets without a picture
    first: float  # seconds; earliest time of the video
    end: float  # seconds; end of the video
    latest: float  # seconds; end of the longest stream


def _scan(container: "av.container.InputContainer", stream: "av.VideoStream") -> _Scan:
    units = {other.index: float(other.time_base or 0) for other in container.streams}
    codec = stream.codec_context.name
    reader = FieldReader(stream.codec_context.extradata) if codec == "h264" else None
    rows: list[tuple[float | None, float | None, bool, bool]] = []
    fields: list[Field | None] = []
    first, end, latest, empty = np.inf, 0.0, 0.0, 0
    for packet in packets(container):
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            seconds = units.get(packet.stream_index, 0.0)
            ends = (time + (packet.duration or 0)) * seconds
            latest = max(latest, ends)
        if packet.stream_index != stream.index:
            continue
        if time is not None and not packet.is_discard:
            first, end = min(first, time * seconds), max(end, ends)
        rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
        empty += codec == "mpeg4" and packet.size <= _EMPTY_MPEG4
        if reader is not None and reader.may_have_fields:
            fields.append(reader.field(bytes(packet)))
    columns = zip(*rows) if rows else ((), (), (), ())
    pts, dts, keys, discarded = (np.array(c, kind) for c, kind in zip(columns, (np.float64, np.float64, bool, bool)))
    second = second_fields(fields) if fields else np.zeros(len(rows), bool)
    unstated = second & np.isnan(pts)  # second fields need not have timestamps
    pts[unstated] = np.roll(pts, 1)[unstated]
    return _Scan(pts, dts, keys, discarded, second, empty, first, end, latest)


def _times(scan: _Scan, container: "av.container.InputContainer", tick: float, nominal: float) -> NDArray[np.float64]:
    """Returns the display time of each packet's picture in stream time units, all 0 if no timestamps exist.

    Recordings joined in one file follow each other. If some packets have no presentation time, decoding times are used,
    interpolated evenly.

    Args:
        scan: packets of the video stream.
        container: video file.
        tick: stream time unit in seconds.
        nominal: step between pictures at the declared rate in stream time units; 0 if no rate is declared.
    """
    times = scan.dts if np.isnan(scan.pts).any() or container.format.name == "avi" else scan.pts
    clock = times if np.isnan(scan.dts).all() else scan.dts
    stated = np.flatnonzero(~np.isnan(clock))
    jumps = np.diff(clock[stated])
    slopes = jumps / np.diff(stated)
    step = float(np.median(slopes[slopes > 0])) if (slopes > 0).any() else nominal
    if not step or not len(stated):
        return np.zeros(len(times))
    joined = jumps < -_REORDERED * step
    if container.format.name in _JOINED:
        joined |= jumps * tick > LONGEST_GAP
    times, end = times.copy(), None
    for part in np.split(np.arange(len(times)), stated[1:][joined]):
        filled = _fill_unknown(times[part], nominal or step)
        times[part] = filled if end is None else filled + (end + step - filled.min())
        end = times[part].max()
    return times


def _fill_unknown(times: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Fills the unknown times of a recording: `step` apart, or interpolated evenly."""
    known, indices = np.flatnonzero(~np.isnan(times)), np.arange(len(times))
    if len(known) == len(times):
        return times
    if len(known) == 0:
        return np.asarray(indices * step)
    even = times[known[0]] + (indices - known[0]) * step
    if np.max(np.abs(times[known] - even[known])) <= 2 * step:  # FFmpeg assigns some timestamps to the previous picture
        return np.asarray(even)
    between = np.interp(indices, known, times[known])
    outside = np.minimum(indices - known[0], 0) + np.maximum(indices - known[-1], 0)
    return np.asarray(between + outside * step)


def _close_gaps_at_cut(times: NDArray[np.float64], decoded: NDArray[np.int64], tick: float) -> NDArray[np.float64]:
    """Removes gaps before the last pictures of a file that was cut without re-encoding.

    Such a file may lack pictures that are displayed before its last ones but decoded after them.

    Args:
        times: times in seconds, in display order.
        decoded: position of each picture in decoding order.
        tick: rounding of the times in seconds.
    """
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    late = steps > usual + max(_UNIFORM_TOLERANCE * usual, 1.01 * tick)
    if np.all(np.diff(decoded) > 0) or np.mean(~late) < _MOST:
        return times
    for count in range(min(int(_REORDERED), len(steps)), 0, -1):
        if late[-count] and decoded[-count:].min() > decoded[:-count].max():  # they are decoded last
            steps[-count:] = np.where(steps[-count:] <= _REORDERED * usual, usual, steps[-count:])
            return np.concatenate([times[:1], times[0] + np.cumsum(steps)])
    return times


def _rate(times: NDArray[np.float64], tick: float, declared: float) -> tuple[float, bool]:
    """Returns the frame rate for ascending display times in seconds, and a flag for evenly spaced times."""
    steps = np.diff(times)
    if len(steps) == 0 or not steps.any():
        return declared or DEFAULT_FPS, True
    even = _alike(steps, float(np.median(steps)), tick)
    uniform, steady = bool(even.all()), np.mean(even) >= _MOST
    if not steady:  # steps may be multiples of a shorter one
        short = float(np.quantile(steps, 0.25, method="lower"))
        even = _alike(steps, short, tick)
        multiples = np.maximum(np.round(steps / short), 1) if short else 1
        steady = np.mean(_alike(steps / multiples, short, tick)) >= _NEARLY_ALL
    step = float(np.mean(steps[even]))
    if uniform or (steady and step * _FASTEST >= 1):
        rounding = 1.01 * tick / int(np.sum(even))
        tolerance = _EVEN_RATE_TOLERANCE + rounding / step
    else:
        step = float(np.mean(steps[steps <= _GAP * np.mean(steps)]))
        tolerance = _RATE_TOLERANCE
    believable = declared > 0 and abs(1 / (declared * step) - 1) <= tolerance
    return (declared if believable else float(f"{1 / step:.9g}")), uniform


def _alike(steps: NDArray[np.float64], step: float, tick: float) -> NDArray[np.bool_]:
    """Returns a mask of the steps that equal `step`, up to rounding to ticks."""
    return np.abs(steps - step) <= max(_UNIFORM_TOLERANCE * step, 1.01 * tick)


def _slots(path: str | Path, times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Returns the first frame of each picture at a constant rate."""
    positions = (times - times[0]) * fps
    if np.max(np.diff(positions)) > LONGEST_GAP * fps:
        raise VideoError(path, f"its timestamps have a gap of more than {LONGEST_GAP:.0f} s")
    if positions[-1] > MAX_FRAMES:
        raise VideoError(
            path,
            f"its timestamps spread {len(times)} pictures over {positions[-1]:.0f} frames at {fps:g} per second; at "
            f"most {MAX_FRAMES} can be read",
        )
    return np.round(positions).astype(np.int64)


def _check_length(
    path: str | Path,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    scan: _Scan,
    pictures: int,
    fps: float,
) -> None:
    """Raises VideoError if the file is shorter than its stated length, of the video or else of all streams."""
    length = (container.duration or 0) / av.time_base
    tagged = _tagged_seconds(stream)
    if container.format.name in _JOINED:  # these formats state no length
        return
    if container.format.name == "avi" and stream.average_rate:  # FFmpeg guesses the duration of AVI from the file size
        found, expected = scan.end - scan.first, stream.frames / float(stream.average_rate)
    elif stream.frames and stream.duration:
        found, expected = scan.end - scan.first, stream.duration * float(stream.time_base or 0)
    elif tagged is not None:
        found, expected = scan.end, min(tagged, length)
    else:
        found, expected = scan.latest, length
    check_complete(path, max(found * fps, pictures), expected * fps, "are in the file")
    if container.format.name == "asf":  # FFmpeg ignores the stated length of truncated ASF files
        size, stated = Path(path).stat().st_size, _asf_bytes(path)
        if size < (1 - MISSING_TOLERANCE) * stated:
            raise VideoError(path, f"is truncated: only {size} of {stated} bytes are in the file")


def _asf_bytes(path: str | Path) -> int:
    """Returns the file size in the header of an ASF or WMV file, or 0 if it states none."""
    with Path(path).open("rb") as file:
        head = file.read(1 << 16)
    position = head.find(_ASF_PROPERTIES)
    return int.from_bytes(head[position + 40 : position + 48], "little") if position >= 0 else 0


def _tagged_seconds(stream: Any) -> float | None:
    """Returns the length of a Matroska stream in its DURATION tag, in seconds, or None without such a tag."""
    try:
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds
