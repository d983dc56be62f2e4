"""Decoding: rates, sizes, rotation, and damaged files."""

import csv
import io
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from video_fixtures import number_of, numbered_frames, rotate_mp4, write_video

from x3d_tf.data.video import decode
from x3d_tf.data.video.decode import VideoError, encode_video, probe, read_frames


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
@pytest.mark.parametrize("fps", [25, 30])
def test_frames_have_the_order_and_rate_of_the_source(tmp_path: Path, suffix: str, fps: int) -> None:
    path = write_video(tmp_path / f"a{suffix}", numbered_frames(40), fps)
    frames = list(read_frames(path))
    assert [number_of(frame.pixels) for frame in frames] == list(range(40))
    assert [frame.timestamp for frame in frames] == pytest.approx([index / fps for index in range(40)])
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames, info.variable_rate) == (64, 48, fps, 40, False)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((48, 64), 256, (48, 64)), ((48, 64), 30, (30, 40)), ((64, 48), 30, (40, 30)), ((100, 142), 50, (50, 71))],
)
def test_only_large_frames_are_scaled(
    tmp_path: Path, size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(3, *size))
    assert {frame.pixels.shape for frame in read_frames(path, short_side)} == {(*expected, 3)}


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path: Path, turns: int) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(3))
    stored = [frame.pixels for frame in read_frames(path)]
    rotate_mp4(path, turns)
    shown = [frame.pixels for frame in read_frames(path)]
    for before, after in zip(stored, shown, strict=True):
        np.testing.assert_array_equal(after, np.rot90(before, turns))
    assert (probe(path).height, probe(path).width) == shown[0].shape[:2]


def test_a_variable_rate_becomes_constant(tmp_path: Path) -> None:
    times = [0, 100, 200, 300, 650, 700, 800, 900, 1000, 1030, 1100, 1200]
    path = write_video(tmp_path / "a.mkv", numbered_frames(len(times)), 10, times_ms=times)
    info = probe(path)
    assert info.variable_rate
    slots = [round(time / 1000 * info.fps) for time in times]
    # The last picture due at each frame.
    expected = [max(i for i, slot in enumerate(slots) if slot <= point) for point in range(slots[-1] + 1)]
    frames = list(read_frames(path))
    assert [number_of(frame.pixels) for frame in frames] == expected
    assert len(set(expected)) < len(expected)  # some are repeated
    assert [frame.timestamp for frame in frames] == pytest.approx([k / info.fps for k in range(len(expected))])


def test_a_gap_of_minutes_is_an_error(tmp_path: Path) -> None:
    times = [0, 100, 200, 300, 400_000, 400_100]
    path = write_video(tmp_path / "a.mkv", numbered_frames(len(times)), 10, times_ms=times)
    with pytest.raises(VideoError, match=r"a\.mkv: its timestamps have a gap of more than 60 s"):
        list(read_frames(path))


def cut(path: Path, part: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return path


def broken_files(folder: Path) -> dict[str, Path]:
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_text("no video\n" * 200)
    (folder / "words.txt").write_text("no video\n" * 200)
    Image.new("RGB", (64, 48)).save(folder / "image.png")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with av.open(str(folder / "bare.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    random = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)  # packets of equal size
    return {
        "missing": folder / "nowhere.mp4",
        "folder": folder,
        "empty": folder / "empty.mp4",
        "words": folder / "words.mp4",
        "text": folder / "words.txt",
        "image": folder / "image.png",
        "sound": folder / "sound.wav",
        "bare": folder / "bare.avi",
        "cut mp4": cut(write_video(folder / "cut.mp4", random), 0.5),
        "cut avi": cut(write_video(folder / "cut.avi", random), 0.5),
        "cut mkv": cut(write_video(folder / "cut.mkv", random), 0.5),
    }


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("missing", "no such file"),
        ("folder", "no such file"),
        ("empty", "the file is empty"),
        ("words", "cannot be decoded"),
        ("text", "is not a video but"),
        ("image", "is not a video but"),
        ("sound", "has no video stream"),
        ("bare", "has no frame"),
        ("cut mp4", "cannot be decoded"),
        ("cut avi", "is truncated"),
        ("cut mkv", "is truncated"),
    ],
)
def test_invalid_files_are_reported(tmp_path: Path, which: str, reason: str) -> None:
    path = broken_files(tmp_path)[which]
    for read in (probe, lambda path: list(read_frames(path)), encode_video):
        with pytest.raises(VideoError) as caught:
            read(path)
        assert caught.value.path == str(path)
        assert caught.value.reason.startswith(reason)


def test_frames_lost_by_the_decoder_are_detected(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8))
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for start, size in places[30:]:
        content[start + 8 : start + 8 + size] = bytes(size)  # without the chunk's header
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"could be decoded|cannot be decoded"):
        list(read_frames(path))


def test_a_video_too_long_for_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_RECORD_BYTES", 5000)
    with pytest.raises(VideoError, match="its frames exceed 5000 bytes as JPEG; cut it"):
        encode_video(write_video(tmp_path / "a.mp4", numbered_frames(40)))


@pytest.mark.parametrize(
    ("size", "pix_fmt"),
    [((48, 64), "gray"), ((48, 64), "gray10le"), ((48, 64), "yuv420p10le"), ((48, 64), "bgr0"), ((47, 63), "yuv420p")],
)
def test_greyscale_ten_bits_and_odd_sizes(tmp_path: Path, size: tuple[int, int], pix_fmt: str) -> None:
    path = write_video(tmp_path / "a.mkv", numbered_frames(5, *size), codec="ffv1", pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == pix_fmt
    frames = [frame.pixels for frame in read_frames(path)]
    levels = [pixels[size[0] // 2 :, size[1] // 2 :].mean() for pixels in frames]
    # FFmpeg converts ten bits up to two levels too dark; other formats are exact up to rounding.
    assert levels == pytest.approx([16 + 4 * number for number in range(5)], abs=2.1)
    assert levels == sorted(set(levels))
    assert {pixels.shape for pixels in frames} == {(*size, 3)}
    assert len(encode_video(path, short_side=20).frames) == 5


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_single_frame_is_a_video(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", numbered_frames(1), 25)
    assert [number_of(frame.pixels) for frame in read_frames(path)] == [0]
    assert len(encode_video(path).frames) == 1


@pytest.mark.parametrize("size", [(2304, 4096), (16, 4000), (4000, 16)])
def test_very_large_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(2, *size))
    short_side = min(256, *size)
    with Image.open(io.BytesIO(encode_video(path).frames[1])) as picture:
        assert min(picture.size) == short_side
        assert max(picture.size) == int(max(size) * short_side / min(size))
        assert number_of(np.asarray(picture)) == 1


def test_segments_have_the_right_frames(tmp_path: Path) -> None:
    b_pictures = {"bf": "2", "g": "12"}
    times = np.cumsum(np.random.default_rng(0).integers(20, 80, 60)).tolist()
    paths = [
        write_video(tmp_path / "a.mp4", numbered_frames(45), 25, codec="libx264", options=b_pictures),
        write_video(tmp_path / "a.mkv", numbered_frames(45), 25, codec="libx264", options=b_pictures),
        write_video(tmp_path / "a.avi", numbered_frames(45), 25),
        write_video(tmp_path / "b.mp4", numbered_frames(45), 25),
        write_video(tmp_path / "variable.mkv", numbered_frames(60), 25, times_ms=times, codec="libx264"),
    ]
    for path in paths:
        whole, fps = encode_video(path, 32), probe(path).fps
        shown = [index / fps for index in range(len(whole.frames))]
        pieces = [(0.0, 0.52), (0.52, 1.04), (1.0, None), (1.31, 1.37), (0.001, 0.7), (1.7, 99.0), (shown[-1], None)]
        for start, end in pieces:
            kept = [i for i, time in enumerate(shown) if time > start - 1e-5 and (end is None or time < end - 1e-5)]
            found = encode_video(path, 32, start=start, end=end)
            assert found.frames == [whole.frames[i] for i in kept], (path.name, start, end)
            assert found.fps == whole.fps


def test_segments_without_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(20), 20)
    with pytest.raises(VideoError, match=r"a\.mp4: ends before the start time 1\.0 s"):
        encode_video(path, start=1.0)
    with pytest.raises(VideoError, match="ends before the start time 1000"):
        encode_video(path, start=1000.0, end=1001.0)
    with pytest.raises(VideoError, match=r"has no frame between 0\.51 s and 0\.54 s: it has 20 frames per second"):
        encode_video(path, start=0.51, end=0.54)


def test_segments_are_not_decoded_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(200), 25, options={"g": "10"})
    shown: list[Any] = []
    upright = decode._upright_rgb
    monkeypatch.setattr(decode, "_upright_rgb", lambda *given: shown.append(1) or upright(*given))
    after_key = decode._after_key
    read: list[int] = []
    monkeypatch.setattr(decode, "_after_key", lambda *given: (read.append(p[0]) or p for p in after_key(*given)))
    assert len(encode_video(path, start=4.0, end=4.4).frames) == 10
    assert len(shown) == 10
    assert 90 <= read[0] <= 100
    assert read[-1] == 110


def test_encoded_frames_equal_the_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(10), 25)
    encoded = encode_video(path, short_side=40)
    assert encoded.fps == 25.0
    for jpeg, frame in zip(encoded.frames, read_frames(path, 40), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
        assert np.abs(decoded.astype(int) - frame.pixels).mean() < 2


def test_workers_load_no_tensorflow() -> None:
    code = (
        "import sys; import x3d_tf.data.building.builder, x3d_tf.data.video.decode; "
        "import x3d_tf.data.records.manifest, x3d_tf.data.datasets.spec; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_clips(shared_data: Path) -> None:
    expected = {  # frames, rate, size as stored
        "apply_eye_makeup.avi": (164, 25.0, (240, 320)),
        "arm_wrestling.mp4": (280, 28.0, (256, 340)),
        "flipping_pancake.mkv": (310, 30.0, (240, 426)),
        "deadlifting.mp4": (360, 30.0, (256, 144)),
    }
    for name, (count, fps, size) in expected.items():
        frames = list(read_frames(shared_data / "clips" / name))
        assert (len(frames), probe(shared_data / "clips" / name).fps) == (count, fps)
        assert min(frames[0].pixels.shape[:2]) == min(256, *size)


def test_real_clips_with_reordered_timestamps(shared_data: Path) -> None:
    folder = shared_data / "ut_interaction"
    with (folder / "manifest.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))[::40]
    for row in rows:
        frames = list(read_frames(folder / row["path"]))
        assert len(frames) == int(row["frames"])
        assert probe(folder / row["path"]).fps == float(row["fps"])
