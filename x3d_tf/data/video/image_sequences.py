"""Videos that come as folders of images, one a frame, as AVA's are often kept. Imports no TensorFlow."""

import functools
import hashlib
import io
import os
import re
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from x3d_tf.data.sampling import resized_shape
from x3d_tf.data.video.decode import MAX_RECORD_BYTES, EncodedVideo, VideoError, encode_jpeg, first_from
from x3d_tf.data.video.timeline import LONGEST_HOLE

FOLDER_FPS = 30.0  # images a second in folders of frames, as they are taken out of AVA's videos
FileState = tuple[int, int]  # size and time of a file, or what stands for them: equal while the content is
SUFFIXES = (".jpg", ".jpeg", ".png")


def encode_folder(
    folder: Path,
    short_side: int = 256,
    quality: int = 95,
    start: float = 0.0,
    end: float | None = None,
    fps: float = FOLDER_FPS,
) -> EncodedVideo:
    """The frames of a folder as JPEG files; arguments as `video.encode_video`, and the images a second.

    The numbers that names of images end with tell their times: the lowest is second 0, and where numbers are left out
    the image before them is repeated. JPEG files in RGB that need not be scaled are taken as they are.

    Raises:
        VideoError: a folder without images, none between `start` and `end`, or numbers that leave more than 60 s
            without one; an image that cannot be read, or of another size than those before; frames that exceed 1 GiB.
    """
    try:
        images = _images(folder, folder.stat().st_mtime_ns)
    except OSError as error:
        raise VideoError(folder, f"cannot be read: {error.strerror}") from error
    if not images:
        raise VideoError(folder, f"holds no images ({', '.join(SUFFIXES)})")
    frames: list[bytes] = []
    sizes: dict[tuple[int, int], None] = {}
    total = 0
    for path, count in _between(images, start, end, fps).items():
        jpeg, size = _jpeg(path, short_side, quality)
        sizes.setdefault(size)
        if len(sizes) > 1:
            before, now = sizes
            raise VideoError(path, f"is of another size than the frames before, {now} instead of {before}")
        total += count * len(jpeg)
        if total > MAX_RECORD_BYTES:
            raise VideoError(folder, f"its frames exceed {MAX_RECORD_BYTES} bytes as JPEG; use shorter parts of it")
        frames += [jpeg] * count
    if not frames:
        raise VideoError(folder, f"ends before {start:g} s: it has {len(images)} images, {fps:g} a second")
    return EncodedVideo(frames, float(np.float32(fps)), first_from(start, fps) / fps)


def folder_state(folder: Path) -> FileState:
    """Bytes of all images of a folder, and a number that stands for their names, sizes and times; raises OSError."""
    return _scan(folder).state


def is_unchanged(folder: Path, state: FileState, start: float, end: float | None, fps: float = FOLDER_FPS) -> bool:
    """Whether the images between two seconds are still those that they were when `folder_state` gave this state.

    A process lists a folder once: from then on it looks only at the images that it is asked about.
    """
    try:
        changed = folder.stat().st_mtime_ns
        listed, images = _listed(folder, changed), _between(_images(folder, changed), start, end, fps)
        return listed.state == state and all(_state_of(path.stat()) == listed.images[path.name] for path in images)
    except VideoError:  # no order of the images
        return folder_state(folder) == state
    except (OSError, KeyError):
        return False


def _between(images: list[tuple[int, Path]], start: float, end: float | None, fps: float) -> dict[Path, int]:
    """The images that are shown between two seconds, and for how many frames each."""
    numbers = [number - images[0][0] for number, _ in images]
    for (_, path), before, after in zip(images[1:], numbers, numbers[1:]):
        if after - before > LONGEST_HOLE * fps:
            raise VideoError(path, f"has a number that leaves more than {LONGEST_HOLE:.0f} s without an image")
    first = first_from(start, fps)
    stop = numbers[-1] + 1 if end is None else min(numbers[-1] + 1, first_from(end, fps))
    shown: dict[Path, int] = {}
    if first >= stop:
        return shown
    for place in range(max(bisect_right(numbers, first) - 1, 0), bisect_right(numbers, stop - 1)):
        until = min(numbers[place + 1], stop) if place + 1 < len(numbers) else stop
        shown[images[place][1]] = until - max(numbers[place], first)
    return shown


class _Listing(NamedTuple):
    """The images of a folder by name, with size and time of each, and what stands for all of them."""

    images: dict[str, FileState]
    state: FileState


def _scan(folder: Path) -> _Listing:
    with os.scandir(folder) as entries:
        images = {entry.name: _state_of(entry.stat()) for entry in entries if _is_image(entry.name)}
    digest = hashlib.sha256()
    for name in sorted(images):
        digest.update(f"{os.fsencode(name)!r} {images[name]}\n".encode())
    return _Listing(images, (sum(size for size, _ in images.values()), int.from_bytes(digest.digest()[:7], "big")))


_listed = functools.lru_cache(maxsize=2)(lambda folder, changed: _scan(folder))


def _state_of(status: os.stat_result) -> FileState:
    return status.st_size, status.st_mtime_ns


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@functools.lru_cache(maxsize=2)  # the key frames of a video are encoded one after the other
def _images(folder: Path, changed: int) -> list[tuple[int, Path]]:
    """The images of a folder in the order of their numbers, which come with them.

    Raises:
        VideoError: one whose name does not end with a number, which no other has.
    """
    numbers: dict[int, Path] = {}
    for path in folder.iterdir():
        if not _is_image(path.name):
            continue
        number = re.search(r"[0-9]+$", path.stem)
        if number is None or int(number.group()) in numbers:
            raise VideoError(path, "has a name that does not end with a number of its own, which orders the frames")
        numbers[int(number.group())] = path
    return sorted(numbers.items())


def _jpeg(path: Path, short_side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """A JPEG file of the image, and its height and width."""
    try:
        if not path.is_file():  # a pipe would never end
            raise VideoError(path, "is no file")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:  # no other decoder of Pillow
            height, width = image.height, image.width
            if min(height, width) <= short_side and image.format == "JPEG" and image.mode == "RGB":
                image.load()  # raises where it is damaged
                return content, (height, width)
            pixels = image.convert("RGB")
    except VideoError:
        raise
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise VideoError(path, f"cannot be read as an image: {error}") from error
    if min(height, width) > short_side:
        height, width = (int(side) for side in resized_shape(height, width, short_side))
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return encode_jpeg(np.asarray(pixels), quality), (height, width)
