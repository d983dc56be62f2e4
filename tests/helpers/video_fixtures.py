"""Small videos and records for the tests of the data modules."""

import json
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from x3d_tf.data.building.encoding import encode_or_error
from x3d_tf.data.building.sources import Video
from x3d_tf.data.records import index
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest, checksum
from x3d_tf.data.video.decode import EncodedVideo, VideoError, encode_jpeg
from x3d_tf.types import AnnotationKind, Storage

if TYPE_CHECKING:  # the trials use this module without pytest
    import pytest

BY_DEFAULT = Storage(256, 95)  # default of build_records


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Returns frames with grey level 16 + 4 * number and a bright block at the top left."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (16 + 4 * np.arange(count) % 200)[:, None, None, None]
    frames[:, : height // 3, : width // 4] = (250, 30, 30)
    return frames


def smooth_frames(count: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Returns frames that differ from one another and survive encoding: large blocks, slowly changing."""
    coarse = np.random.default_rng(count).integers(0, 256, (count // 5 + 2, height // 20, width // 20, 3))
    times = np.arange(count) / 5
    part = (times % 1)[:, None, None, None]
    mixed = coarse[times.astype(int)] * (1 - part) + coarse[times.astype(int) + 1] * part
    return mixed.astype(np.uint8).repeat(20, 1).repeat(20, 2)


def number_of(pixels: np.ndarray) -> int:
    """Returns the number of one of `numbered_frames`, from its lower right quarter."""
    return round((float(pixels[pixels.shape[0] // 2 :, pixels.shape[1] // 2 :].mean()) - 16) / 4)


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: int = 30,
    times_ms: Sequence[int] | None = None,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames as a video; `times_ms` sets the display time of each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.bit_rate = 4_000_000
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts = index if times_ms is None else times_ms[index]
            picture.time_base = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_class_folders(folder: Path) -> Path:
    """Writes class folders with 4 videos of run, 3 of jump, a broken file and a hidden file."""
    for number in range(7):
        name = f"{'run' if number < 4 else 'jump'}/clip {number}.mp4"
        write_video(folder / name, numbered_frames(6 + number))
    (folder / "run" / "broken.mp4").write_text("no video")
    (folder / "run" / ".hidden").write_text("no video")
    (folder / "notes.txt").write_text("no video")
    return folder


def write_with_sound(
    path: Path,
    frames: np.ndarray,
    codec: str,
    sound_codec: str,
    seconds: float,
    first: float = 0.0,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames at 30 per second from the second `first` on, with silent audio from 0 to `seconds`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 4_000_000
        sound = container.add_stream(sound_codec, rate=48000, layout="mono")
        sound.bit_rate = 64_000
        for index, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = round(first * 30) + index, Fraction(1, 30)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        size = sound.codec_context.frame_size or 1024
        for place in range(0, round(seconds * 48000), size):
            silence = av.AudioFrame(format=sound.format.name, layout="mono", samples=size)
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            silence.rate, silence.pts, silence.time_base = 48000, place, Fraction(1, 48000)
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return path


def copied(source: Path, path: Path, keep: Callable[[Any], bool] = lambda packet: True) -> Path:
    """Copies selected packets of a file into another, possibly in another format.

    Packets without timestamps get consecutive ones.
    """
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in given.streams}
        now = 0
        for packet in given.demux():
            if packet.size and keep(packet):
                if packet.pts is None and packet.dts is None:
                    packet.pts = packet.dts = now
                    now += packet.duration or 0
                packet.stream = streams[packet.stream_index]
                container.mux(packet)
    return path


def set_display_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Sets the display matrix of an mp4 file, which maps (x, y) to (ax + cy, bx + dy)."""
    one = 1 << 16
    matrix = struct.pack(">9i", round(a * one), round(b * one), 0, round(c * one), round(d * one), 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the matrix follows 40 bytes of other fields
    content[start : start + 36] = matrix
    path.write_bytes(content)
    return path


def rotate_mp4(path: Path, quarter_turns: int) -> None:
    """Sets the display matrix of an mp4 file to counterclockwise quarter turns."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns]
    set_display_matrix(path, cosine, -sine, sine, cosine)


def with_cover(path: Path) -> Path:
    """Inserts a cover picture into an mp4 file before its tracks, which makes it FFmpeg's first stream."""

    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), name) + content

    image = encode_jpeg(np.full((300, 300, 3), (250, 0, 0), np.uint8))
    cover = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + image)))
    handler = box(b"hdlr", struct.pack(">II4s12x", 0, 0, b"mdir") + b"\0")
    content = path.read_bytes()
    start = content.index(b"moov") - 4  # after the pictures, whose offsets stay valid
    size = struct.unpack(">I", content[start : start + 4])[0]
    head = start + 8 + struct.unpack(">I", content[start + 8 : start + 12])[0]
    meta = box(b"udta", box(b"meta", bytes(4) + handler + cover))
    movie = box(b"moov", content[start + 8 : head] + meta + content[head : start + size])
    path.write_bytes(content[:start] + movie + content[start + size :])
    return path


def id3_cover() -> bytes:
    """Returns the header of an mp3 file with a cover picture."""
    image = encode_jpeg(np.full((300, 300, 3), (250, 0, 0), np.uint8))
    content = b"\0image/jpeg\0\x03\0" + image
    frame = b"APIC" + struct.pack(">I2x", len(content)) + content
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + size + frame


class _Bits:
    """Bit writer for an H.264 unit."""

    def __init__(self) -> None:
        self.text = ""

    def put(self, width: int, value: int) -> "_Bits":
        self.text += f"{value:0{width}b}"
        return self

    def code(self, *values: int) -> "_Bits":
        """Appends numbers in exponential Golomb code."""
        for value in values:
            self.put(2 * (value + 1).bit_length() - 1, value + 1)
        return self

    def align(self, bit: str = "0") -> "_Bits":
        self.text += bit * (-len(self.text) % 8)
        return self

    def unit(self, head: int) -> bytes:
        self.text += "1"
        data, zeros, escaped = self.align().packed(), 0, bytearray()
        for byte in data:
            if zeros >= 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = 0 if byte else zeros + 1
        return b"\0\0\0\1" + bytes([head]) + bytes(escaped)

    def packed(self) -> bytes:
        return int("1" + self.text, 2).to_bytes(len(self.text) // 8 + 1, "big")[1:]


def field_coded(count: int, progressive: Callable[[int], bool] = lambda number: False) -> bytes:
    """Returns 64x64 H.264 at 25 frames per second with the levels of `numbered_frames` and two field packets per frame.

    Frames for which `progressive` is True are one packet; encoders choose per frame. The stream is written bit by bit,
    with uncompressed samples (I_PCM), because PyAV's encoders produce no fields.
    """
    parameters = _Bits().put(8, 77).put(8, 0).put(8, 30).code(0, 0, 0, 0, 1).put(1, 0).code(3, 1)
    parameters.put(4, 0b0010).put(3, 0b100).put(3, 0b001).put(32, 1).put(32, 50).put(5, 0b10000)
    picture = _Bits().code(0, 0).put(2, 0).code(0, 0, 0).put(3, 0).code(0, 0, 0).put(3, 0b100)
    heads = parameters.unit(0x67) + picture.unit(0x68)

    def coded(number: int, level: int, field: int | None) -> bytes:
        key = field != 1
        bits = _Bits().code(0, 7, 0).put(4, 0)
        bits.put(1, 0) if field is None else bits.put(2, 2 + field)
        if key:
            bits.code(number % 2)
        bits.put(4, field or 0).put(2 if key else 1, 0).code(0, 1)
        samples = "".join(f"{value:08b}" for value in [level] * 256 + [128] * 128)
        for _ in range(16 if field is None else 8):
            bits.code(25).align().text += samples
        return b"\0\0\0\1\x09\x10" + bits.unit(0x65 if key else 0x21)

    film = b""
    for number in range(count):
        level = round(16 + (16 + 4 * number % 200) * 219 / 255)
        fields: tuple[int | None, ...] = (None,) if progressive(number) else (0, 1)
        pictures = [coded(number, level, field) for field in fields]
        film += pictures[0][:6] + heads + pictures[0][6:] + b"".join(pictures[1:])
    return film


def noise_video(seed: int, frames: int, height: int = 40, width: int = 52) -> EncodedVideo:
    """Returns smooth random frames as JPEG, at 30 frames per second."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (frames, height // 4, width // 4, 3), np.uint8)
    return EncodedVideo([encode_jpeg(frame.repeat(4, 0).repeat(4, 1)) for frame in coarse], 30.0)


def write_records(
    folder: Path,
    videos: dict[str, list[EncodedVideo]],
    classes: int | None = None,
    labels: Sequence[tuple[int, ...]] | None = None,
    stored: Storage = BY_DEFAULT,
) -> Manifest:
    """Writes records, each with its own class in its split unless `classes` is smaller.

    `labels` of the videos in a split make the records multi-label, and require `classes`. `stored` is the storage
    format.
    """
    from x3d_tf.data.records.format import RecordSource, write_split

    folder.mkdir(parents=True, exist_ok=True)
    count = classes or max(len(members) for members in videos.values())
    names = [f"class {label:03d}" for label in range(count)]
    splits = {}
    for split, members in videos.items():
        chosen = labels or [(index % count,) for index in range(len(members))]
        sources = [RecordSource(f"{split}/{index}", chosen[index]) for index in range(len(members))]
        splits[split] = write_split(folder, split, sources, iter(members), names, lambda _: None)
    task: AnnotationKind = "multi_label" if labels else "single_label"
    manifest = Manifest(folder, "noise", tuple(names), splits, {"source": "test"}, stored, task)
    manifest.save()
    return manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    """Writes a `manifest.json` with the correct checksum and loads it."""
    entries = {name: value for name, value in content.items() if name != "sha256"}
    (folder / MANIFEST_NAME).write_text(json.dumps(entries | {"sha256": checksum(entries)}))
    return Manifest.load(folder)


def die_on_three(video: Video) -> EncodedVideo | VideoError:
    """Encodes videos, but crashes at number 3 and is killed at number 5.

    Defined in this module so that workers do not import TensorFlow.
    """
    if video.path.name == "3":
        os._exit(1)
    if video.path.name == "5":
        os.kill(os.getpid(), signal.SIGKILL)
    return EncodedVideo([video.path.name.encode()], 30.0)


def trouble_by_name(video: Video) -> EncodedVideo | VideoError:
    """Encodes videos, or hangs, changes the file, runs out of memory or fails, by the name of the file."""
    match video.path.name:
        case "hangs":
            time.sleep(600)
        case "changes":
            video.path.write_text("longer than before")
        case "memory":
            raise MemoryError
        case "fault":
            raise ZeroDivisionError("a fault")
    return EncodedVideo([video.path.name.encode()], 30.0)


def hang_where_marked(video: Video, short_side: int, quality: int) -> EncodedVideo | VideoError:
    """Encodes a video, but hangs at `hangs.mp4` while a file `.hang` exists beside the class folders."""
    if video.path.stem == "hangs" and (video.path.parents[1] / ".hang").exists():
        time.sleep(600)
    return encode_or_error(video, short_side, quality)


class DiesAtStart:
    """`encode` function that ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)

    def __call__(self, video: Video) -> EncodedVideo | VideoError:
        raise NotImplementedError


def write_small_shards(folder: Path, monkeypatch: "pytest.MonkeyPatch") -> Manifest:
    """Writes records of five noise videos of 3 to 7 frames: three in train and two in test, two videos per shard."""
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 2)
    videos = [noise_video(seed, 3 + seed) for seed in range(5)]
    return write_records(folder, {"train": videos[:3], "test": videos[3:]})
