"""Frames and times of files like those of cameras, downloads and editors, created by the tests.

In most files frame n has the grey level 16 + 4 * (n mod 50), which identifies decoded frames.
"""

import re
from bisect import bisect
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.stream import Disposition
from video_fixtures import (
    copied,
    field_coded,
    number_of,
    numbered_frames,
    set_display_matrix,
    with_cover,
    write_video,
    write_with_sound,
)

from x3d_tf.data.video.decode import VideoError, encode_video, probe, read_frames

REORDERED = {"bf": "2", "g": "15", "crf": "4"}
ALL = list(range(60))


class Right(NamedTuple):
    """Expected result: rate, frame numbers, number of stored pictures, second of the first frame."""

    fps: float
    numbers: list[int]
    pictures: int
    start: float = 0.0


def h264(path: Path, count: int = 60, fps: int = 30) -> Path:
    return write_video(path, numbered_frames(count), fps, codec="libx264", options=REORDERED)


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def joined_later(folder: Path) -> Path:
    """Joins two recordings, the first of whose clocks is 15 minutes ahead; the result has no gap."""
    late = at_times(folder / "late.ts", [900_000 + round(1000 * number / 30) for number in range(60)])
    return joined(folder / "b.ts", h264(folder / "a.ts"), late)


def at_times(path: Path, times_ms: list[int], codec: str = "libx264") -> Path:
    return write_video(path, numbered_frames(len(times_ms)), 30, times_ms, codec)


def beside_sound(name: str, codec: str, sound: str, seconds: float = 2.3, first: float = 0.0) -> Callable[[Path], Path]:
    return lambda folder: write_with_sound(folder / name, numbered_frames(60), codec, sound, seconds, first)


def beside_subtitles(folder: Path) -> Path:
    path = folder / "subtitles.mkv"
    with av.open(str(h264(folder / "plain.mkv"))) as given, av.open(str(path), "w") as container:
        copy = container.add_stream_from_template(given.streams.video[0])
        text = container.add_stream("ass")
        text.time_base = Fraction(1, 1000)
        packets = [packet for packet in given.demux() if packet.size]
        for packet in packets:
            packet.stream = copy
        line = av.Packet(b"hello")
        line.pts, line.dts, line.duration, line.time_base, line.stream = 0, 0, 10_000, Fraction(1, 1000), text
        for packet in [packets[0], line, *packets[1:]]:
            container.mux(packet)
    return path


def cut_by_copying(folder: Path) -> Path:
    """Keeps the complete audio and the video from a key frame on, like `ffmpeg -ss -c copy`.

    Keeps the last picture but not the one that is displayed before and decoded after it.
    """
    given = write_with_sound(
        folder / "long.mkv", numbered_frames(90), "libx264", "pcm_s16le", 3.0, options=REORDERED | {"sc_threshold": "0"}
    )
    places = iter(range(90))

    def keep(packet: "av.Packet") -> bool:
        return packet.stream.type == "audio" or 30 <= next(places) < 88

    return copied(given, folder / "cut.mkv", keep)


def two_streams(folder: Path) -> Path:
    path = folder / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=rate) for rate in (1, 30)]
        for stream, (height, width) in zip(streams, ((24, 32), (48, 64))):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        streams[0].disposition = Disposition(0)
        streams[1].disposition = Disposition.default
        for stream, count in zip(streams, (2, 60)):
            for pixels in numbered_frames(count, stream.height, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return path


def from_the_middle(folder: Path) -> Path:
    """Broadcast recorded from an arbitrary moment: its first pictures cannot be decoded."""
    content = h264(folder / "whole.ts").read_bytes()
    with av.open(str(folder / "whole.ts")) as container:
        places = [(packet.is_keyframe, packet.pos) for packet in container.demux(video=0) if packet.size]
    second_key = [index for index, (key, _) in enumerate(places) if key][1]
    start = places[second_key - 4][1]
    (folder / "middle.ts").write_bytes(content[: 3 * 188] + content[start // 188 * 188 :])
    return folder / "middle.ts"


def fields(name: str, whole: Callable[[int], bool] = lambda number: False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        raw = folder / "fields.h264"
        raw.write_bytes(field_coded(30, whole))
        return raw if name.endswith("h264") else copied(raw, folder / name)

    return make


def damaged(name: str, codec: str) -> Callable[[Path], Path]:
    """Inserts a packet in the middle that no decoder accepts."""

    def make(folder: Path) -> Path:
        path = write_video(folder / name, numbered_frames(60), codec=codec, options={"g": "10"})
        with av.open(str(path)) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][34]
            assert packet.pos is not None
            content = bytearray(path.read_bytes())
            start = content.index(bytes(packet), packet.pos)
        content[start : start + packet.size] = bytes(packet.size)
        path.write_bytes(content)
        return path

    return make


STILL = [*range(0, 1000, 40), *range(20_000, 21_000, 40)]  # milliseconds: one second, a gap of 19 seconds, one second
LEFT = [n for n in range(60) if n % 7 not in (2, 5, 6)]  # steps of one, two and three frames
STOOD = [*range(25), *[24] * (500 - 25), *range(25, 50)]
GOOD: dict[str, tuple[Callable[[Path], Path], Right]] = {
    "sound longer, mkv": (beside_sound("a.mkv", "libx264", "aac"), Right(30, ALL, 60)),
    "sound longer, webm": (beside_sound("a.webm", "libvpx", "libopus"), Right(30, ALL, 60)),
    "sound longer, flv": (beside_sound("a.flv", "libx264", "aac"), Right(30, ALL, 60)),
    "sound longer, wmv": (beside_sound("a.wmv", "wmv2", "wmav2"), Right(30, ALL, 60)),
    "sound longer, nut": (beside_sound("a.nut", "mpeg4", "mp2"), Right(30, ALL, 60)),
    "sound longer, mp4": (beside_sound("a.mp4", "libx264", "aac"), Right(30, ALL, 60)),
    "sound much longer": (beside_sound("a.mkv", "libx264", "aac", 8.0), Right(30, ALL, 60)),
    "sound earlier, mkv": (beside_sound("a.mkv", "libx264", "pcm_s16le", 4.0, 2.0), Right(30, ALL, 60, 2.0)),
    "sound earlier, mp4": (beside_sound("a.mp4", "mpeg4", "mp2", 4.0, 2.0), Right(30, ALL, 60, 2.0)),
    "sound earlier, ts": (beside_sound("a.ts", "libx264", "mp2", 4.0, 2.0), Right(30, ALL, 60, 2.0)),
    "cut by copying": (cut_by_copying, Right(30, [*range(30, 87), 88], 58, 1.0)),
    "subtitles longer": (beside_subtitles, Right(30, ALL, 60)),
    "fields, h264": (fields("a.h264"), Right(25, ALL[:30], 30)),
    "fields, ts": (fields("a.ts"), Right(25, ALL[:30], 30)),
    "fields, mkv": (fields("a.mkv"), Right(25, ALL[:30], 30)),
    "fields, mp4": (fields("a.mp4"), Right(25, ALL[:30], 30)),
    "fields and frames, ts": (fields("a.ts", lambda number: number % 3 == 1), Right(25, ALL[:30], 30)),
    "fields and frames, mp4": (fields("a.mp4", lambda number: number > 10), Right(25, ALL[:30], 30)),
    "cover first": (lambda folder: with_cover(h264(folder / "a.mp4")), Right(30, ALL, 60)),
    "two streams": (two_streams, Right(30, ALL, 60)),
    "joined, ts": (lambda folder: joined(folder / "b.ts", *[h264(folder / "a.ts")] * 3), Right(30, ALL * 3, 180)),
    "joined, mpg": (lambda folder: joined(folder / "b.mpg", *[h264(folder / "a.mpg")] * 2), Right(30, ALL * 2, 120)),
    "joined, later": (joined_later, Right(30, ALL * 2, 120)),
    "no times": (
        lambda folder: write_video(
            folder / "a.mpg", numbered_frames(45), 25, codec="libx264", options={"bf": "2", "b": "60000"}
        ),
        Right(25, ALL[:45], 45),
    ),
    "a hole, ts": (lambda folder: at_times(folder / "a.ts", STILL), Right(25, STOOD, 50)),
    "a hole, webm": (lambda folder: at_times(folder / "a.webm", STILL, "libvpx"), Right(25, STOOD, 50)),
    "a hole, mp4": (lambda folder: at_times(folder / "a.mp4", STILL), Right(25, STOOD, 50)),
    "pictures left out": (
        lambda folder: at_times(folder / "a.mp4", [40 * n for n in LEFT]),
        Right(25, [bisect(LEFT, n) - 1 for n in range(LEFT[-1] + 1)], len(LEFT)),
    ),
    "damaged packet, avi": (damaged("a.avi", "mpeg4"), Right(30, [*ALL[:34], 33, *ALL[35:]], 60)),
    "damaged packet, mp4": (damaged("a.mp4", "mpeg4"), Right(30, [*ALL[:34], 33, *ALL[35:]], 60)),
    "from the middle": (from_the_middle, Right(30, ALL[15:], 45, 0.15)),
}


@pytest.fixture(scope="module")
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Right]:
    make, right = GOOD[request.param]
    return make(tmp_path_factory.mktemp("film")), right


@pytest.mark.parametrize("file", GOOD, indirect=True)
def test_files_and_their_segments_give_the_right_frames(file: tuple[Path, Right]) -> None:
    path, right = file
    info, frames = probe(path), list(read_frames(path))
    assert [number_of(frame.pixels) for frame in frames] == [number % 50 for number in right.numbers]
    assert (info.fps, info.frames, info.delivered) == (right.fps, right.pictures, len(right.numbers))
    assert info.start == pytest.approx(right.start, abs=0.05)  # audio is delayed by the look-ahead of its codec
    times = [info.start + number / right.fps for number in range(len(frames))]
    assert [frame.timestamp for frame in frames] == pytest.approx(times)
    whole, length = encode_video(path).frames, len(frames) / right.fps
    for begin, end in ((0.0, 0.4), (0.35, 0.7), (0.5, 0.53), (0.8, None)):
        start, stop = info.start + begin * length, None if end is None else info.start + end * length
        found = encode_video(path, start=start, end=stop)
        kept = [n for n, time in enumerate(times) if time > start - 1e-5 and (stop is None or time < stop - 1e-5)]
        assert found.frames == [whole[number] for number in kept], (begin, end)
        assert found.start == pytest.approx(times[kept[0]])
    if info.start > 0.5:
        with pytest.raises(VideoError, match=rf"has no frame between .* and begins at {info.start:.3f} s"):
            encode_video(path, end=0.5)


@pytest.mark.parametrize("part", [0.5, 0.8])
@pytest.mark.parametrize(
    "name", ["sound longer, mkv", "sound longer, webm", "sound longer, flv", "sound longer, wmv", "subtitles longer"]
)
def test_truncated_video_is_an_error_with_longer_audio(tmp_path: Path, name: str, part: float) -> None:
    path = GOOD[name][0](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    for read in (probe, lambda path: list(read_frames(path)), encode_video):
        with pytest.raises(VideoError, match="is truncated"):
            read(path)


def row_difference(pixels: np.ndarray) -> float:
    """Returns the mean distance of rows from the mean of their neighbours."""
    rows = pixels[..., 0].astype(float)
    return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())


def test_interlaced_frames_are_scaled_as_progressive(tmp_path: Path) -> None:
    times, columns = np.arange(60), np.arange(320)
    moving = np.where((columns[None] + 8 * times[:, None]) % 160 < 80, 235, 16).astype(np.uint8)
    frames = np.empty((30, 240, 320, 3), np.uint8)
    frames[:, 0::2], frames[:, 1::2] = (moving[start::2, None, :, None] for start in (0, 1))
    path = write_video(
        tmp_path / "a.mp4", frames, codec="libx264", options={"flags": "+ilme+ildct", "x264-params": "tff=1"}
    )
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    scaled = [frame.pixels for frame in read_frames(path, 96)]
    assert {pixels.shape for pixels in scaled} == {(96, 128, 3)}
    assert np.mean([row_difference(pixels) for pixels in scaled]) < 2  # 22 if fields are scaled separately


ORIENTATIONS = {  # transform of the stored pixels for the matrix a, b, c, d
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, 3),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    (0.9, 0.4, -0.4, 0.9): lambda x: x,  # 24 degrees
    (0.4, 0.9, -0.9, 0.4): lambda x: np.rot90(x, 3),
    (0, 0, 0, 0): lambda x: x,
    (0, 1, 0, 1): lambda x: x,  # singular
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_rotation_and_mirroring_are_applied(tmp_path: Path, matrix: tuple[float, float, float, float]) -> None:
    random = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path = write_video(tmp_path / "a.mp4", random)
    stored = [frame.pixels for frame in read_frames(path)]
    shown = [frame.pixels for frame in read_frames(set_display_matrix(path, *matrix))]
    for before, after in zip(stored, shown, strict=True):
        np.testing.assert_array_equal(after, ORIENTATIONS[matrix](before))
    assert (probe(path).height, probe(path).width) == shown[0].shape[:2]


def test_segments_of_old_444_files_equal_the_complete_video(tmp_path: Path) -> None:
    """Decodes 4:4:4 as x264 encoded it before build 151, which FFmpeg detects only in the first picture.

    The test file is a new one labelled as old, so that FFmpeg conceals damage.
    """
    colours = np.random.default_rng(0).integers(0, 256, (90, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path = write_video(tmp_path / "a.mp4", colours, codec="libx264", pix_fmt="yuv444p", options={"g": "15"})
    content = path.read_bytes()
    path.write_bytes(re.sub(rb"x264 - core \d{3}", b"x264 - core 142", content))
    assert path.read_bytes() != content
    whole = encode_video(path).frames
    for start, end in ((0.9, 2.1), (1.0, 1.3), (2.5, None)):
        first, stop = round(start * 30), None if end is None else round(end * 30)
        assert encode_video(path, start=start, end=end).frames == whole[first:stop]
