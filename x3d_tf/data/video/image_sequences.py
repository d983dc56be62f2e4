"""Reads videos stored as folders of images, one per frame, as AVA often is. Imports no TensorFlow."""

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
from x3d_tf.data.video.timeline import LONGEST_GAP
from x3d_tf.errors import require

FOLDER_FPS = 30.0  # default images per second, as extracted from AVA's videos
SLOWEST, FASTEST = 1 / LONGEST_GAP, 1000.0  # frames per second
FileState = tuple[int, int]  # size and modification time of a file, or a fingerprint of a folder
SUFFIXES = (".jpg", ".jpeg", ".png")


def encode_folder(
    folder: Path,
    short_side: int = 256,
    quality: int = 95,
    start: float = 0.0,
    end: float | None = None,
    fps: float = FOLDER_FPS,
) -> EncodedVideo:
    """Encodes a folder of images as JPEG frames; arguments as in `decode.encode_video`, plus the images per second.

    The number at the end of an image's name determines its time; the lowest number is second 0. A missing number
    repeats the image before it. RGB JPEG files that need no scaling are copied unchanged.

    Raises:
        VideoError: no image in the folder or between `start` and `end`; a gap of more than 60 s between numbers; an
            image that cannot be read or differs in size from the others; or frames that exceed 1 GiB.
    """
    try:
        images = _list_images(folder, folder.stat().st_mtime_ns)
    except OSError as error:
        raise VideoError(folder, f"cannot be read: {error.strerror}") from error
    if not images:
        raise VideoError(folder, f"has no images ({', '.join(SUFFIXES)})")
    frames: list[bytes] = []
    sizes: dict[tuple[int, int], None] = {}
    total = 0
    for path, count in _between(images, start, end, fps).items():
        jpeg, size = _image_to_jpeg(path, short_side, quality)
        sizes.setdefault(size)
        if len(sizes) > 1:
            before, now = sizes
            raise VideoError(path, f"has the size {now}, but the images before it have {before}")
        total += count * len(jpeg)
        if total > MAX_RECORD_BYTES:
            raise VideoError(folder, f"its frames exceed {MAX_RECORD_BYTES} bytes as JPEG; use shorter segments")
        frames += [jpeg] * count
    if not frames:
        raise VideoError(folder, f"ends before {start:g} s: it has {len(images)} images at {fps:g} per second")
    return EncodedVideo(frames, float(np.float32(fps)), first_from(start, fps) / fps)


def check_frame_rate(rate: float, where: str) -> None:
    """Raises `UserError` unless a frame rate is in 1/60..1000 per second; `where` begins the message."""
    rule = f"be in {SLOWEST:.3f}..{FASTEST:g} frames per second"
    require(SLOWEST <= rate <= FASTEST, where, rule, rate)


def folder_state(folder: Path) -> FileState:
    """Returns the total bytes of a folder's images, and a hash of their names, sizes and times; raises OSError."""
    return _scan(folder).state


def is_unchanged(folder: Path, state: FileState, start: float, end: float | None, fps: float = FOLDER_FPS) -> bool:
    """Returns True if the images between two times are unchanged since `folder_state` returned this state.

    A process lists a folder only once and then checks only the requested images.
    """
    try:
        changed = folder.stat().st_mtime_ns
        listed, images = _scan_once(folder, changed), _between(_list_images(folder, changed), start, end, fps)
        return listed.state == state and all(_file_state(path.stat()) == listed.images[path.name] for path in images)
    except VideoError:  # the images have no order
        return folder_state(folder) == state
    except (OSError, KeyError):
        return False


def _between(images: list[tuple[int, Path]], start: float, end: float | None, fps: float) -> dict[Path, int]:
    """Returns the images between two times, with the number of frames that each is shown for."""
    numbers = [number - images[0][0] for number, _ in images]
    for (_, path), before, after in zip(images[1:], numbers, numbers[1:]):
        if after - before > LONGEST_GAP * fps:
            raise VideoError(path, f"follows a gap of more than {LONGEST_GAP:.0f} s without images")
    first = first_from(start, fps)
    stop = numbers[-1] + 1 if end is None else min(numbers[-1] + 1, first_from(end, fps))
    shown: dict[Path, int] = {}
    if first >= stop:
        return shown
    for index in range(max(bisect_right(numbers, first) - 1, 0), bisect_right(numbers, stop - 1)):
        until = min(numbers[index + 1], stop) if index + 1 < len(numbers) else stop
        shown[images[index][1]] = until - max(numbers[index], first)
    return shown


class _Listing(NamedTuple):
    """The state of each image of a folder by name, and the state of the folder."""

    images: dict[str, FileState]
    state: FileState


def _scan(folder: Path) -> _Listing:
    with os.scandir(folder) as entries:
        images = {entry.name: _file_state(entry.stat()) for entry in entries if _is_image(entry.name)}
    digest = hashlib.sha256()
    for name in sorted(images):
        digest.update(f"{os.fsencode(name)!r} {images[name]}\n".encode())
    return _Listing(images, (sum(size for size, _ in images.values()), int.from_bytes(digest.digest()[:7], "big")))


_scan_once = functools.lru_cache(maxsize=2)(lambda folder, changed: _scan(folder))


def _file_state(status: os.stat_result) -> FileState:
    return status.st_size, status.st_mtime_ns


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@functools.lru_cache(maxsize=2)  # key frames of the same video are encoded consecutively
def _list_images(folder: Path, changed: int) -> list[tuple[int, Path]]:
    """Returns the numbers and paths of a folder's images, in the order of the numbers.

    Raises:
        VideoError: a name does not end with a number, or repeats one.
    """
    numbers: dict[int, Path] = {}
    for path in folder.iterdir():
        if not _is_image(path.name):
            continue
        number = re.search(r"[0-9]+$", path.stem)
        if number is None or int(number.group()) in numbers:
            raise VideoError(
                path, "has a name that does not end with a number, or shares its number with another image"
            )
        numbers[int(number.group())] = path
    return sorted(numbers.items())


def _image_to_jpeg(path: Path, short_side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """Returns an image file as `to_jpeg` does; raises VideoError."""
    try:
        if not path.is_file():  # reading a pipe may never end
            raise VideoError(path, "is not a file")
        return to_jpeg(path.read_bytes(), short_side, quality)
    except VideoError:
        raise
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be read as an image: {error}") from error


def to_jpeg(content: bytes, short_side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """Returns an image as an RGB JPEG file, with its height and width. A JPEG file that fits is returned unchanged.

    Args:
        content: JPEG or PNG file.
        short_side: largest short side in pixels; larger images are scaled down.
        quality: JPEG quality, 1..95.

    Raises:
        ValueError: the image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:  # excludes Pillow's other decoders
            height, width = image.height, image.width
            if min(height, width) <= short_side and image.format == "JPEG" and image.mode == "RGB":
                image.load()  # raises if the file is damaged
                return content, (height, width)
            pixels = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("it is not a JPEG or PNG image") from error
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    if min(height, width) > short_side:
        height, width = (int(side) for side in resized_shape(height, width, short_side))
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return encode_jpeg(np.asarray(pixels), quality), (height, width)
