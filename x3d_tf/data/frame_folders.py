"""Videos that come as folders of images, one a frame, as AVA's are often kept. Imports no TensorFlow."""

import functools
import hashlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from x3d_tf.data.clips import resized_shape
from x3d_tf.data.sources import State
from x3d_tf.data.video import EncodedVideo, VideoError, encode_jpeg, first_from

FPS = 30.0  # at which frames are taken out of AVA's videos
SUFFIXES = (".jpg", ".jpeg", ".png")


def encode_folder(
    folder: Path, short_side: int = 256, quality: int = 95, start: float = 0.0, end: float | None = None
) -> EncodedVideo:
    """The frames of a folder as JPEG files; arguments as `video.encode_video`.

    Images in the order of the numbers that their names end with are the frames, 30 a second. JPEG files in RGB that
    need not be scaled are taken as they are.

    Raises:
        VideoError: a folder without images, or none between `start` and `end`; an image that cannot be read, or of
            another size than those before.
    """
    try:
        images = _images(folder, folder.stat().st_mtime_ns)
    except OSError as error:
        raise VideoError(folder, f"cannot be read: {error.strerror}") from error
    if not images:
        raise VideoError(folder, f"holds no images ({', '.join(SUFFIXES)})")
    frames: list[bytes] = []
    sizes: dict[tuple[int, int], None] = {}
    for path in images[_between(start, end)]:
        jpeg, size = _jpeg(path, short_side, quality)
        frames.append(jpeg)
        sizes.setdefault(size)
        if len(sizes) > 1:
            before, now = sizes
            raise VideoError(path, f"is of another size than the frames before, {now} instead of {before}")
    if not frames:
        raise VideoError(folder, f"ends before {start:g} s: it has {len(images)} frames, {FPS:g} a second")
    return EncodedVideo(frames, FPS)


def state_of(folder: Path) -> State:
    """Bytes of all images of a folder, and a number that stands for their names, sizes and times; raises OSError."""
    return _scan(folder).state


def is_unchanged(folder: Path, state: State, start: float, end: float | None) -> bool:
    """Whether the images between two seconds are still those that they were when `state_of` gave this state.

    A process lists a folder once: from then on it looks only at the images that it is asked about.
    """
    try:
        changed = folder.stat().st_mtime_ns
        listed, images = _listed(folder, changed), _images(folder, changed)[_between(start, end)]
        return listed.state == state and all(_state_of(path.stat()) == listed.images[path.name] for path in images)
    except VideoError:  # no order of the images
        return state_of(folder) == state
    except (OSError, KeyError):
        return False


def _between(start: float, end: float | None) -> slice:
    return slice(first_from(start, FPS), None if end is None else first_from(end, FPS))


class _Listing(NamedTuple):
    """The images of a folder by name, with size and time of each, and what stands for all of them."""

    images: dict[str, State]
    state: State


def _scan(folder: Path) -> _Listing:
    with os.scandir(folder) as entries:
        images = {entry.name: _state_of(entry.stat()) for entry in entries if _is_image(entry.name)}
    digest = hashlib.sha256()
    for name in sorted(images):
        digest.update(f"{os.fsencode(name)!r} {images[name]}\n".encode())
    return _Listing(images, (sum(size for size, _ in images.values()), int.from_bytes(digest.digest()[:7], "big")))


_listed = functools.lru_cache(maxsize=2)(lambda folder, changed: _scan(folder))


def _state_of(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@functools.lru_cache(maxsize=2)  # the key frames of a video are encoded one after the other
def _images(folder: Path, changed: int) -> list[Path]:
    """The images of a folder in their order.

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
    return [numbers[number] for number in sorted(numbers)]


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
