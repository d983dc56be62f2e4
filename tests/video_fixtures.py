"""Small videos and records that the tests of the data modules share."""

import json
import os
import signal
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from x3d_tf.data.encoding import encode_or_reason
from x3d_tf.data.manifest import MANIFEST_NAME, Manifest, checksum
from x3d_tf.data.sources import Video
from x3d_tf.data.video import EncodedVideo, VideoError, encode_jpeg
from x3d_tf.modeling.expansion import Task
from x3d_tf.types import Storage

BY_DEFAULT = Storage(256, 95)  # of build_records


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that tell their number: grey level 16 + 4 times the number, a bright block at the top left."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (16 + 4 * np.arange(count) % 200)[:, None, None, None]
    frames[:, : height // 3, : width // 4] = (250, 30, 30)
    return frames


def number_of(pixels: np.ndarray) -> int:
    """Which of `numbered_frames` this is, from its lower right quarter, which rotation by 0 or 180 keeps in place."""
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
    """Encodes frames; with `times_ms` each is shown at its own time."""
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


def rotate_mp4(path: Path, quarter_turns: int) -> None:
    """Makes an mp4 file ask its player for counterclockwise quarter turns, by its track's display matrix."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns]
    one = 1 << 16
    matrix = np.array([cosine * one, -sine * one, 0, sine * one, cosine * one, 0, 0, 0, 1 << 30], ">i4")
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # 40 bytes of other fields come before the matrix
    content[start : start + 36] = matrix.tobytes()
    path.write_bytes(content)


def noise_video(seed: int, frames: int, height: int = 40, width: int = 52) -> EncodedVideo:
    """Smooth random frames as JPEG, at 30 frames a second."""
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
    """Records of which each has a class of its own in its split, unless there are fewer `classes`.

    With `labels` of each video of a split, given together with `classes`, the records are multi-label. `stored` says
    how the videos were encoded.
    """
    from x3d_tf.data.records import Source, write_split

    folder.mkdir(parents=True, exist_ok=True)
    count = classes or max(len(members) for members in videos.values())
    names = [f"class {label:03d}" for label in range(count)]
    splits = {}
    for split, members in videos.items():
        chosen = labels or [(index % count,) for index in range(len(members))]
        sources = [Source(f"{split}/{index}", chosen[index]) for index in range(len(members))]
        splits[split] = write_split(folder, split, sources, iter(members), names, lambda _: None)
    task: Task = "multi_label" if labels else "single_label"
    manifest = Manifest(folder, tuple(names), splits, {"source": "test"}, stored, task)
    manifest.save()
    return manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    """Writes the entries of a `manifest.json` with their right checksum, and loads it."""
    entries = {name: value for name, value in content.items() if name != "sha256"}
    (folder / MANIFEST_NAME).write_text(json.dumps(entries | {"sha256": checksum(entries)}))
    return Manifest.load(folder)


def die_on_three(video: Video) -> EncodedVideo | VideoError:
    """What a worker does on a file that crashes the decoder, and on one for which the system ends it.

    Here, where workers find it without TensorFlow.
    """
    if video.path.name == "3":
        os._exit(1)
    if video.path.name == "5":
        os.kill(os.getpid(), signal.SIGKILL)
    return EncodedVideo([video.path.name.encode()], 30.0)


def trouble_by_name(video: Video) -> EncodedVideo | VideoError:
    """What a worker does on files that hang, change, take all memory, or meet a fault of the package."""
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
    """Encodes a video, but hangs at `hangs.mp4` while there is a file `.hang` in the folder of the class folders."""
    if video.path.stem == "hangs" and (video.path.parents[1] / ".hang").exists():
        time.sleep(600)
    return encode_or_reason(video, short_side, quality)


class DiesAtStart:
    """An `encode` that ends the process in which it arrives."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)

    def __call__(self, video: Video) -> EncodedVideo | VideoError:
        raise NotImplementedError
