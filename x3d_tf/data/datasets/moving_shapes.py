"""Synthetic dataset moving_shapes, whose classes are directions of motion and differ in nothing else.

A video shifts a picture by integer pixels from frame to frame, on a torus: what leaves at one edge enters at the
opposite one. Frame t is therefore a shifted copy of frame t of the same video in any other direction. The shift of the
middle frame is uniform over the torus, so that single frames have the same distribution in all classes: a network that
sees no motion stays at chance. The module imports no TensorFlow until records are created.
"""

import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError, require
from x3d_tf.startup import starting_tensorflow
from x3d_tf.types import Storage

if TYPE_CHECKING:
    import tensorflow as tf

DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}  # rows and columns per step
VIDEOS = {"train": 800, "test": 100}
FRAMES, FPS, SIDE = 90, 30.0, 128
SPEEDS = (0.4, 0.8)  # range in pixels per frame; each frame's shift is rounded to integers
# Ranges of red, green and blue values, exclusive. Shapes are brighter than the ground: with arbitrary colours, the sign
# of an edge would be needed to see its motion, and short runs would stay at chance.
GROUND_LEVELS, SHAPE_LEVELS = (0, 64), (160, 256)
SHAPES = (3, 5)  # range of shapes per video
RADII = (10, 20)  # pixels
QUALITY = 95  # JPEG quality

NAME = "moving_shapes"
SETTINGS: dict[str, int | float | str] = {"version": 1}
ABANDONED_AFTER = 600.0  # seconds without a write; rendering all videos is much faster


class MovingShapes:
    """The synthetic data set, created on first use."""

    name = NAME
    flips = False  # left and right are classes

    def open(self, folder: Path) -> Manifest:
        """Opens the records, and creates them first if they do not exist; see `open_moving_shapes`."""
        return open_moving_shapes(folder)


DATASETS = (MovingShapes(),)

Picture = NDArray[np.uint8]  # [SIDE, SIDE, 3], RGB


def draw_picture(seed: int) -> Picture:
    """Draws the picture of a video: bright circles, squares and triangles on a dark ground, uint8 RGB."""
    random = np.random.default_rng(seed)
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = random.integers(*GROUND_LEVELS, 3)
    for _ in range(random.integers(SHAPES[0], SHAPES[1] + 1)):
        centre = random.integers(0, SIDE, 2)
        radius = random.integers(RADII[0], RADII[1] + 1)
        # Distances on the torus, in -SIDE/2..SIDE/2.
        y, x = ((np.indices((SIDE, SIDE)) - centre[:, None, None] + SIDE // 2) % SIDE) - SIDE // 2
        inside = (
            x**2 + y**2 <= radius**2,
            np.maximum(abs(x), abs(y)) <= radius,
            (abs(y) <= radius) & (2 * abs(x) <= y + radius),
        )[random.integers(3)]
        picture[inside] = random.integers(*SHAPE_LEVELS, 3)
    return picture


def shifts(seed: int, direction: str) -> NDArray[np.int64]:
    """Returns the shift of the picture in each frame, rows and columns, int64 [FRAMES, 2].

    Shifts are relative to the middle of the video, so that reversing a video gives the one in the opposite direction.
    """
    random = np.random.default_rng((seed, 1))  # independent of the random stream for the picture
    middle, speed = random.integers(0, SIDE, 2), random.uniform(*SPEEDS)
    distance = np.round(speed * (np.arange(FRAMES) - (FRAMES - 1) / 2)).astype(np.int64)
    return middle + distance[:, None] * np.array(DIRECTIONS[direction])


def open_moving_shapes(folder: Path) -> Manifest:
    """Opens the records in `folder`, and creates them first if they do not exist.

    Creation is atomic: an interrupted one starts again, and one of several concurrent processes wins.

    Raises:
        UserError: the folder holds other files.
    """
    if not (folder / MANIFEST_NAME).is_file():
        _create(folder)
    manifest = Manifest.load(folder)
    if manifest.dataset != NAME:
        raise UserError(
            f"{folder} holds records other than moving_shapes. To train on them, add --gin_file=gin/data/records.gin "
            "after the network's --gin_file"
        )
    require(manifest.settings == SETTINGS, f"settings of {folder / MANIFEST_NAME}", f"be {SETTINGS}", manifest.settings)
    return manifest


def _create(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and does not hold moving_shapes; delete it or use another folder")
    print(f"{folder} does not exist: creating the synthetic dataset moving_shapes. Your own: gin/data/records.gin")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(folder), dir=folder.parent))
    try:
        _write(partial)
        partial.chmod(0o755)  # mkdtemp creates private folders
        partial.replace(folder)
    except OSError:
        if not (folder / MANIFEST_NAME).is_file():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.moving_shapes_partial."


def _remove_abandoned(folder: Path) -> None:
    """Deletes partial folders left by killed processes."""
    for other in folder.parent.glob(f"{glob.escape(_partial_prefix(folder))}*"):
        try:
            last_write = max(path.stat().st_mtime for path in [other, *other.iterdir()])
        except OSError:  # a running process finished and removed it meanwhile
            continue
        if time.time() - last_write > ABANDONED_AFTER:
            shutil.rmtree(other, ignore_errors=True)


def _write(folder: Path) -> None:
    with starting_tensorflow():
        from x3d_tf.data.records.format import RecordSource, write_split

    classes = sorted(DIRECTIONS)
    splits = {}
    first_seed = 0
    with tqdm(total=sum(VIDEOS.values()), unit="video", desc="creating moving_shapes", smoothing=0) as bar:
        for split, count in VIDEOS.items():
            seeds = range(first_seed, first_seed + count)
            sources = [RecordSource(f"{split}/{seed:04d}", (seed % len(classes),)) for seed in seeds]
            videos = _encode([(seed, classes[source.labels[0]]) for seed, source in zip(seeds, sources, strict=True)])
            splits[split] = write_split(folder, split, sources, videos, classes, lambda _: bar.update())
            first_seed += count
    splits = {split: replace(part, expected=VIDEOS[split]) for split, part in splits.items()}
    Manifest(folder, NAME, tuple(classes), splits, SETTINGS, Storage(SIDE, QUALITY)).save()


def _encode(videos: list[tuple[int, str]]) -> Iterator[EncodedVideo | VideoError]:
    """Encodes the videos for these seeds and directions, in parallel in TensorFlow's threads."""
    import tensorflow as tf

    def pictures() -> Iterator[tuple[Picture, NDArray[np.int64]]]:
        for seed, direction in videos:
            yield draw_picture(seed), shifts(seed, direction)

    def encode(picture: "tf.Tensor", steps: "tf.Tensor") -> "tf.Tensor":
        def frame(step: "tf.Tensor") -> "tf.Tensor":
            return tf.io.encode_jpeg(tf.roll(picture, step, (0, 1)), quality=QUALITY)

        return tf.map_fn(frame, steps, fn_output_signature=tf.string)  # [FRAMES]

    signature = (tf.TensorSpec((SIDE, SIDE, 3), tf.uint8), tf.TensorSpec((FRAMES, 2), tf.int64))
    dataset = tf.data.Dataset.from_generator(pictures, output_signature=signature)
    for frames in dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).as_numpy_iterator():
        yield EncodedVideo(list(frames), FPS)
