"""TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from x3d_tf.files import os_errors_as_write_error


class EventFile:
    """A new TensorBoard event file in a folder.

    Raises:
        WriteError: the file cannot be written; raised by all methods.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with os_errors_as_write_error(folder):
            self._writer = tf.summary.create_file_writer(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of a step, by name."""
        with os_errors_as_write_error(self._folder), self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Writes buffered scalars to the file."""
        with os_errors_as_write_error(self._folder):
            self._writer.flush()
