"""When each picture of a video is shown, from the packets of its file, without decoding. Imports no TensorFlow."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from x3d_tf.data.video.containers import VideoError, open_container, packets
from x3d_tf.data.video.h264_fields import Field, FieldReader, second_fields

DEFAULT_FPS = 30.0  # of a video whose file and timestamps give no rate: a single frame
LONGEST_HOLE = 60.0  # seconds without a frame; a longer hole is taken for damaged timestamps, not for a still picture
MISSING_TOLERANCE = 0.1  # part of the declared frames that may be missing before a file counts as truncated
_LATEST_START = 3600.0  # seconds: a picture that begins later after the sound is taken for damaged timestamps
MAX_FRAMES = 5_000_000  # of a constant rate, about two days: damaged timestamps could ask for any number
_UNIFORM_TOLERANCE = 0.1  # of a frame's duration: steps that differ by more make a variable rate
_MOST = 2 / 3  # of the steps, that are alike where pictures were left out now and then, or stood still
_NEARLY_ALL = 0.9  # of the steps, that are multiples of one where many pictures were left out
_FASTEST = 240.0  # pictures a second: shorter steps, where others are longer, are bursts of a recorder that was late
_HOLE = 10.0  # times the mean step: a step that says nothing of the rate
_RATE_TOLERANCE = 0.1  # a declared rate further than this from that of uneven timestamps is not believed
_EVEN_RATE_TOLERANCE = 0.002  # the same, of even ones
_REORDERED = 8.0  # steps: decoding times that go back by more begin a second recording, joined to the first
# FFmpeg's names of formats whose index leads to the picture of a time.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_ROUNDING = 1e-6  # seconds: FFmpeg states the start of a file in microseconds
# FFmpeg's names of formats in which recordings are joined by writing one file behind the other, each with times of its
# own: a longer hole than the longest is none.
_JOINED = ("mpegts", "mpeg")
# The identifier of the object of an ASF file that states its size, 40 bytes on.
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EMPTY_MPEG4 = 4  # bytes: a packet of MPEG-4 that is no longer has no room for a picture


@dataclass(frozen=True)
class Timeline:
    """When the pictures of a video are shown, at a constant rate of frames.

    Attributes:
        fps: frames per second.
        start: when the first is shown, in seconds of the file: 0 is where its first stream begins, be that the sound.
        slots: of each picture, in the order in which they are shown, the first frame that shows it; ascending.
        ticks: their timestamps as stored, in the stream's unit; None where they are not all known for sure.
        variable_rate: whether frames are repeated or dropped.
        seekable: whether a picture is found by its timestamp.
    """

    fps: float
    start: float
    slots: NDArray[np.int64]
    ticks: NDArray[np.float64] | None
    variable_rate: bool
    seekable: bool

    @property
    def pictures(self) -> int:
        """Pictures stored."""
        return len(self.slots)

    @property
    def frames(self) -> int:
        """Frames of the constant rate."""
        return int(self.slots[-1]) + 1

    def number(self, tick: int | None, following: int) -> int | None:
        """Which picture has a timestamp, from the one numbered `following` on; None if none has."""
        if self.ticks is None or tick is None:
            return None
        if following < len(self.ticks) and self.ticks[following] == tick:
            return following
        found = np.flatnonzero(self.ticks[following:] == tick)
        return following + int(found[0]) if len(found) else None


def read_timeline(path: str | Path) -> Timeline:
    """Reads all packets of a video: only all timestamps together tell its rate.

    Raises:
        VideoError: as `containers.opened`; also a file that holds no frame, or breaks off; timestamps that leave more
            than 60 s without a frame, or make millions of frames.
    """
    try:
        status = Path(path).stat()
    except OSError:
        return _timeline(path, None)
    return _timeline(path, (status.st_size, status.st_mtime_ns))


def check_whole(path: str | Path, found: float, expected: float, what: str) -> None:
    """Raises VideoError where more frames are missing than is forgiven: one in ten."""
    # Two frames are forgiven in short files too: AVI writers count empty packets, encoders drop the last picture.
    if found < expected - max(2.0, MISSING_TOLERANCE * expected):
        raise VideoError(path, f"breaks off: {found:.0f} of {expected:.0f} frames {what}")


@functools.lru_cache(maxsize=2)  # many segments of a video are often read one after the other
def _timeline(path: str | Path, state: tuple[int, int] | None) -> Timeline:
    with open_container(path) as (container, stream):
        scan = _scan(container, stream)
        tick = float(stream.time_base or 0)
        declared = float(stream.average_rate or stream.guessed_rate or 0)
        if not len(scan.pts):
            raise VideoError(path, "holds no frame")
        nominal = 1 / (declared * tick) if declared and tick else 0.0
        times = _times(scan, container, tick, nominal)
        decodable = scan.keys.cumsum() > 0 if scan.keys.any() else np.ones(len(times), bool)
        shown = decodable & ~scan.second & ~scan.discarded
        if not shown.any():
            raise VideoError(path, "holds no frame")
        order = np.flatnonzero(shown)[np.argsort(times[shown], kind="stable")]
        times, stored = _without_cut_pictures(times[order] * tick, order, tick), scan.pts[order]
        if scan.empty:  # they only delay the pictures behind them
            times = times[: max(len(times) - scan.empty, 1)]
        fps, uniform = _rate(times, tick, declared)
        _check_length(path, container, stream, scan, len(times), fps)
        measured = bool(np.any(times != times[0]))
        guessed = container.format.name == "avi" and not np.array_equal(scan.pts, scan.dts)  # it stores no order
        known = measured and not np.isnan(stored).any() and not guessed and not scan.empty
        seekable = known and container.format.name in _SEEKABLE and bool(np.all(np.diff(stored) > 0))
        start = 0.0 if container.start_time is None else float(times[0]) - container.start_time / av.time_base
    if start > _LATEST_START:
        raise VideoError(path, f"its picture begins {start:.0f} s after the file, more than {_LATEST_START:.0f} s")
    slots = np.arange(len(times)) if uniform else _slots(path, times, fps)
    start = start if start > _ROUNDING else 0.0  # pictures that lead up to the first key picture may come before it
    return Timeline(fps, start, slots, stored if known else None, not uniform, seekable)


class _Scan(NamedTuple):
    """The packets of the video stream in the order of the file; times in the stream's unit, NaN where not stored."""

    pts: NDArray[np.float64]
    dts: NDArray[np.float64]
    keys: NDArray[np.bool_]
    discarded: NDArray[np.bool_]  # of those that are decoded and not shown
    second: NDArray[np.bool_]  # of those that complete the picture of the packet before
    empty: int  # how many hold no picture
    first: float  # seconds: the earliest of the video
    end: float  # seconds: the end of the video
    latest: float  # seconds: the end of the stream that lasts longest


def _scan(container: "av.container.InputContainer", stream: "av.VideoStream") -> _Scan:
    units = {each.index: float(each.time_base or 0) for each in container.streams}
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
    unstated = second & np.isnan(pts)  # a field that completes a frame need not have a timestamp
    pts[unstated] = np.roll(pts, 1)[unstated]
    return _Scan(pts, dts, keys, discarded, second, empty, first, end, latest)


def _times(scan: _Scan, container: "av.container.InputContainer", tick: float, nominal: float) -> NDArray[np.float64]:
    """When the picture of each packet is shown, in the stream's unit; all 0 where nothing is known of that.

    Recordings that are joined in one file follow each other. Where some packets have no timestamp to be shown at,
    pictures are shown evenly between those that have one to be decoded at.

    Args:
        scan: the packets.
        container: the file.
        tick: seconds, the stream's unit.
        nominal: the step from one picture to the next by the declared rate, in that unit; 0 if there is none.
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
        joined |= jumps * tick > LONGEST_HOLE
    times, end = times.copy(), None
    for part in np.split(np.arange(len(times)), stated[1:][joined]):
        own = _without_gaps(times[part], nominal or step)
        times[part] = own if end is None else own + (end + step - own.min())
        end = times[part].max()
    return times


def _without_gaps(times: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Times of one recording with the unknown ones, `step` apart or evenly between their neighbours."""
    known, places = np.flatnonzero(~np.isnan(times)), np.arange(len(times))
    if len(known) == len(times):
        return times
    if len(known) == 0:
        return np.asarray(places * step)
    even = times[known[0]] + (places - known[0]) * step
    if np.max(np.abs(times[known] - even[known])) <= 2 * step:  # FFmpeg gives some timestamps to the picture before
        return np.asarray(even)
    between = np.interp(places, known, times[known])
    outside = np.minimum(places - known[0], 0) + np.maximum(places - known[-1], 0)
    return np.asarray(between + outside * step)


def _without_cut_pictures(times: NDArray[np.float64], decoded: NDArray[np.int64], tick: float) -> NDArray[np.float64]:
    """Times of which the last ones follow each other, where a file was cut without being coded again.

    Such a file may lack pictures that are shown before its last ones, but decoded after them.

    Args:
        times: seconds, in the order in which pictures are shown.
        decoded: of each, its place in the order in which they are decoded.
        tick: seconds to which times are rounded.
    """
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    late = steps > usual + max(_UNIFORM_TOLERANCE * usual, 1.01 * tick)
    if np.all(np.diff(decoded) > 0) or np.mean(~late) < _MOST:
        return times
    for count in range(min(int(_REORDERED), len(steps)), 0, -1):
        if late[-count] and decoded[-count:].min() > decoded[:-count].max():  # none of them is decoded before others
            steps[-count:] = np.where(steps[-count:] <= _REORDERED * usual, usual, steps[-count:])
            return np.concatenate([times[:1], times[0] + np.cumsum(steps)])
    return times


def _rate(times: NDArray[np.float64], tick: float, declared: float) -> tuple[float, bool]:
    """The rate of frames that pictures shown at these seconds, ascending, make; and whether all lie evenly."""
    steps = np.diff(times)
    if len(steps) == 0 or not steps.any():  # nothing to measure: trust the header
        return declared or DEFAULT_FPS, True
    even = _alike(steps, float(np.median(steps)), tick)
    uniform, steady = bool(even.all()), np.mean(even) >= _MOST
    if not steady:  # perhaps multiples of a shorter one
        short = float(np.quantile(steps, 0.25, method="lower"))
        even = _alike(steps, short, tick)
        whole = np.maximum(np.round(steps / short), 1) if short else 1
        steady = np.mean(_alike(steps / whole, short, tick)) >= _NEARLY_ALL
    step = float(np.mean(steps[even]))
    if uniform or (steady and step * _FASTEST >= 1):
        rounding = 1.01 * tick / int(np.sum(even))
        tolerance = _EVEN_RATE_TOLERANCE + rounding / step
    else:
        step = float(np.mean(steps[steps <= _HOLE * np.mean(steps)]))
        tolerance = _RATE_TOLERANCE
    believable = declared > 0 and abs(1 / (declared * step) - 1) <= tolerance
    return (declared if believable else float(f"{1 / step:.9g}")), uniform


def _alike(steps: NDArray[np.float64], step: float, tick: float) -> NDArray[np.bool_]:
    """Which steps are of this length, but for the rounding of containers to ticks."""
    return np.abs(steps - step) <= max(_UNIFORM_TOLERANCE * step, 1.01 * tick)


def _slots(path: str | Path, times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """The first frame, at a constant rate, of each picture."""
    places = (times - times[0]) * fps
    if np.max(np.diff(places)) > LONGEST_HOLE * fps:
        raise VideoError(path, f"its timestamps leave more than {LONGEST_HOLE:.0f} s without a frame")
    if places[-1] > MAX_FRAMES:
        raise VideoError(
            path,
            f"its timestamps spread {len(times)} pictures over {places[-1]:.0f} frames, {fps:g} a second; at most "
            f"{MAX_FRAMES} can be read",
        )
    return np.round(places).astype(np.int64)


def _check_length(
    path: str | Path,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    scan: _Scan,
    pictures: int,
    fps: float,
) -> None:
    """Raises VideoError where the file ends before the length that it states, of the video or else of all streams."""
    length = (container.duration or 0) / av.time_base
    own = _tagged_seconds(stream)
    if container.format.name in _JOINED:  # nor does it state a length
        return
    if container.format.name == "avi" and stream.average_rate:  # there FFmpeg guesses durations from the file's size
        found, expected = scan.end - scan.first, stream.frames / float(stream.average_rate)
    elif stream.frames and stream.duration:
        found, expected = scan.end - scan.first, stream.duration * float(stream.time_base or 0)
    elif own is not None:
        found, expected = scan.end, min(own, length)
    else:
        found, expected = scan.latest, length
    check_whole(path, max(found * fps, pictures), expected * fps, "are in the file")
    if container.format.name == "asf":  # of a file that is too short FFmpeg does not believe the length
        size, whole = Path(path).stat().st_size, _asf_bytes(path)
        if size < (1 - MISSING_TOLERANCE) * whole:
            raise VideoError(path, f"breaks off: {size} of {whole} bytes are in the file")


def _asf_bytes(path: str | Path) -> int:
    """The size of an ASF or WMV file by its header, 0 if it does not say."""
    with Path(path).open("rb") as file:
        head = file.read(1 << 16)
    place = head.find(_ASF_PROPERTIES)
    return int.from_bytes(head[place + 40 : place + 48], "little") if place >= 0 else 0


def _tagged_seconds(stream: Any) -> float | None:
    """The length of a stream of Matroska, which writers of such files note in a tag; None if there is none."""
    try:
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds
