"""Classifiers in exported files, called like the network that they were exported from. Imports no TensorFlow."""

import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import UserError, first_line, require
from x3d_tf.modeling.cards import SAVED_MODEL, read_exported_metadata
from x3d_tf.processes import available_cpus
from x3d_tf.runtimes.classifier_file import ClassifierFile
from x3d_tf.runtimes.runners import EXTRAS, Artefact, Runner, artefact_of, open_artefact, probabilities
from x3d_tf.startup import kept_back

_MOST_AT_ONCE = 8  # clips: LiteRT takes the memory of a network for each
_MOST_CLIPS = 64  # of a call: each takes 10 MB for X3D-M


def shares(cores: int) -> tuple[int, int]:
    """Returns the number of clips to process at once and the threads of each, for many clips."""
    threads = math.ceil(cores / _MOST_AT_ONCE)
    return cores // threads, threads


class ExportedClassifier(ClassifierFile):
    """A classifier in an exported file.

    Args:
        path: `.tflite`, `.onnx` or OpenVINO `.xml` file, or folder of a SavedModel. A SavedModel can execute arbitrary
            code: only load ones you trust.
        at_once: number of clips that are processed at once, each on an equal share of the CPU cores. Defaults to one
            per core on up to 8 cores, and to at most 8, each on several cores, on more. A SavedModel uses the devices
            and threads of TensorFlow; its default is one clip per core.

    Attributes:
        runtime: runtime and precision, such as "TFLite int8" or "OpenVINO float32".
        at_once: see above.

    Raises:
        UserError: the file does not exist, was not exported by this version of the package, is damaged, holds a
            detector, or does not fit its model card; its runtime is not installed.
    """

    def __init__(self, path: str | Path, at_once: int | None = None) -> None:
        super().__init__(Path(path), read_exported_metadata(path))
        artefact = artefact_of(self.path / SAVED_MODEL if self.path.is_dir() else self.path)
        if artefact is None:
            raise UserError(f"{path} is not an exported file")
        cores = available_cpus()
        at_once = cores if at_once is None and artefact.runtime == "tensorflow" else at_once  # its threads are fixed
        self.at_once, threads = (at_once, max(1, cores // at_once)) if at_once else shares(cores)
        self._first = _opened(artefact, threads, self.at_once)
        self._check_shapes(self._first)
        self.runtime = _with_precision(self._first.format)
        self._idle: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        self._idle.put(self._first)
        self._running = 1  # runners that exist
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.at_once, "clip")

    @property
    def batch(self) -> int:
        """Number of clips of a call of the file: its batch if that is fixed, otherwise 1."""
        return self._first.batch or 1

    @property
    def clips_a_call(self) -> int:  # type: ignore[override]  # the threads follow from the runtime
        """See `ClassifierFile`."""
        return self.batch * min(self.at_once, max(1, _MOST_CLIPS // self.batch))

    @property
    def pool(self) -> Executor:
        """Threads, as many as clips are processed at once."""
        return self._pool

    def probabilities(self, clips: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Returns the probabilities of clips, computed in the calling thread.

        Args:
            clips: uint8 (N, T, S, S, 3), RGB.

        Returns:
            float32 (N, classes).

        Raises:
            UserError: the runtime fails, or returns another number of classes.
        """
        try:
            runner = self._take()
            try:
                found = probabilities(runner, np.asarray(clips))
            finally:
                self._idle.put(runner)
        except Exception as error:  # runtimes raise errors of any type
            raise UserError(f"{self.path} cannot be run: {type(error).__name__}: {first_line(error)}") from error
        shape = (len(clips), self.num_classes)
        require(found.shape == shape, str(self.path), f"return probabilities of shape {shape}", found.shape)
        return found

    def _take(self) -> Runner:
        """Returns a runner that no other thread uses: an idle one, or a new one while there are fewer than threads."""
        with suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            if self._running < self.at_once:
                self._running += 1
                return self._first.for_another_thread()
        return self._idle.get()

    def for_crop(self, crop: int) -> Callable[[Any], NDArray[np.float32]]:
        """See `ClassifierFile`; the clips have a fixed size."""
        require(
            crop == self.clip.size,
            "the crop",
            f"be {self.clip.size} pixels, the size of the clips of {self.path}",
            crop,
        )
        return lambda clips: self(np.asarray(clips))

    def __call__(self, clips: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the probabilities of clips of unrounded pixels, computed in parallel.

        Pixels are rounded, because most exported files take integers.

        Args:
            clips: float32 (N, T, S, S, 3), RGB in 0..255.
        """
        if not len(clips):
            return np.zeros((0, self.num_classes), np.float32)
        whole = to_pixels(clips)
        parts = [whole[first : first + self.batch] for first in range(0, len(whole), self.batch)]
        return np.concatenate([*self._pool.map(self.probabilities, parts)])

    def _check_shapes(self, runner: Runner) -> None:
        wanted = (self.clip.frames, self.clip.size, self.clip.size, 3)
        fits = len(runner.clip) == 4 and all(size in (None, want) for size, want in zip(runner.clip, wanted))
        rule = f"take clips of the shape that its model card states, {wanted}"
        require(fits, str(self.path), rule, runner.clip)


def to_pixels(clips: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rounds pixels in 0..255 to integers."""
    return np.clip(np.rint(clips), 0, 255).astype(np.uint8)


def _opened(artefact: Artefact, threads: int, at_once: int) -> Runner:
    try:
        with kept_back(show_on_failure=False):  # the error is reported below
            return open_artefact(artefact, threads, at_once)
    except ImportError as error:
        extra = EXTRAS.get(artefact.runtime)
        install = f": pip install 'x3d_tf[{extra}]'" if extra else ""
        raise UserError(f"{artefact.path} requires {error.name or artefact.runtime}{install}") from error
    except UserError:
        raise
    except Exception as error:  # runtimes raise errors of any type
        raise UserError(f"{artefact.path} cannot be opened: {type(error).__name__}: {first_line(error)}") from error


def _with_precision(name: str) -> str:
    """Returns the format of a runner with its precision; those without one in their name compute in float32."""
    return name if name.startswith("TFLite") else f"{name} float32"
