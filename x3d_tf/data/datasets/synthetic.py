"""Base class of synthetic data sets whose videos shift a picture.

A video shifts a picture by integer pixels from frame to frame, on a torus: what leaves at one edge enters at the
opposite one. The module imports no TensorFlow until records are created.
"""

import glob
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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

QUALITY = 95  # JPEG quality
ABANDONED_AFTER = 600.0  # seconds without a write; rendering all videos is much faster

Picture = NDArray[np.uint8]  # [side, side, 3], RGB


class ShiftedPictures:
    """Base class of synthetic data sets; see `base.SyntheticDataSet`. A subclass sets the attributes and two methods.

    Attributes:
        name: name in manifests and settings.
        flips: False if a horizontal flip changes the class of a video.
        side: side of the frames in pixels.
        frames: number of frames of each video.
        fps: frames per second.
        settings: settings of the build in the manifest. A folder with others is refused.
    """

    name: str
    flips: bool
    side: int
    frames: int
    fps: float
    settings: Mapping[str, int | float | str]

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, which the videos have in turn."""
        raise NotImplementedError

    @property
    def videos(self) -> Mapping[str, int]:
        """Number of videos of each split, multiples of the number of classes."""
        raise NotImplementedError

    def picture(self, seed: int, name: str) -> Picture:
        """Draws the picture of a video of the named class, uint8 RGB [side, side, 3]."""
        raise NotImplementedError

    def shifts(self, seed: int, name: str) -> NDArray[np.int64]:
        """Returns the shift of the picture in each frame, rows and columns, int64 [frames, 2]."""
        raise NotImplementedError

    def open(self, folder: Path) -> Manifest:
        """Opens the records in `folder`, and creates them first if they do not exist.

        Creation is atomic: an interrupted one starts again, and one of several concurrent processes wins.

        Raises:
            UserError: the folder holds other files.
        """
        if not (folder / MANIFEST_NAME).is_file():
            self._create(folder)
        manifest = Manifest.load(folder)
        if manifest.dataset != self.name:
            raise UserError(
                f"{folder} holds records other than {self.name}. To train on them, add "
                "--gin_file=gin/data/records.gin after the network's --gin_file"
            )
        rule = f"be {dict(self.settings)}"
        require(manifest.settings == self.settings, f"settings of {folder / MANIFEST_NAME}", rule, manifest.settings)
        return manifest

    def _create(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty and does not hold {self.name}; delete it or use another folder")
        print(f"{folder} does not exist: creating the synthetic dataset {self.name}. Your own: gin/data/records.gin")
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}.{self.name}_partial."
        _remove_abandoned(folder.parent, prefix)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            self._write(partial)
            partial.chmod(0o755)  # mkdtemp creates private folders
            partial.replace(folder)
        except OSError:
            if not (folder / MANIFEST_NAME).is_file():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        with starting_tensorflow():
            from x3d_tf.data.records.format import RecordSource, write_split

        splits, classes = {}, self.classes
        first_seed = 0
        total, action = sum(self.videos.values()), f"creating {self.name}"
        with tqdm(total=total, unit="video", desc=action, smoothing=0) as bar:
            for split, count in self.videos.items():
                seeds = range(first_seed, first_seed + count)
                sources = [RecordSource(f"{split}/{seed:04d}", (seed % len(classes),)) for seed in seeds]
                videos = self._encode([(seed, classes[source.labels[0]]) for seed, source in zip(seeds, sources)])
                splits[split] = write_split(folder, split, sources, videos, classes, lambda _: bar.update())
                first_seed += count
        splits = {split: replace(part, expected=self.videos[split]) for split, part in splits.items()}
        stored = Storage(self.side, QUALITY)
        Manifest(folder, self.name, tuple(classes), splits, dict(self.settings), stored).save()

    def _encode(self, videos: list[tuple[int, str]]) -> Iterator[EncodedVideo | VideoError]:
        """Encodes the videos for these seeds and classes, in parallel in TensorFlow's threads."""
        import tensorflow as tf

        def pictures() -> Iterator[tuple[Picture, NDArray[np.int64]]]:
            for seed, name in videos:
                yield self.picture(seed, name), self.shifts(seed, name)

        def encode(picture: "tf.Tensor", steps: "tf.Tensor") -> "tf.Tensor":
            def frame(step: "tf.Tensor") -> "tf.Tensor":
                return tf.io.encode_jpeg(tf.roll(picture, step, (0, 1)), quality=QUALITY)

            return tf.map_fn(frame, steps, fn_output_signature=tf.string)  # [frames]

        signature = (tf.TensorSpec((self.side, self.side, 3), tf.uint8), tf.TensorSpec((self.frames, 2), tf.int64))
        dataset = tf.data.Dataset.from_generator(pictures, output_signature=signature)
        for frames in dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).as_numpy_iterator():
            yield EncodedVideo(list(frames), self.fps)


def torus(side: int, centre: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rows and the columns of all pixels relative to a centre on the torus, in -side/2..side/2."""
    y, x = ((np.indices((side, side)) - centre[:, None, None] + side // 2) % side) - side // 2
    return y, x


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Deletes partial folders left by killed processes."""
    for other in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            last_write = max(path.stat().st_mtime for path in [other, *other.iterdir()])
        except OSError:  # a running process finished and removed it meanwhile
            continue
        if time.time() - last_write > ABANDONED_AFTER:
            shutil.rmtree(other, ignore_errors=True)
