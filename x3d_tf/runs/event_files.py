"""Event files, which TensorBoard reads."""

from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from x3d_tf.files import os_errors_as_write_error


class EventFile:
    """Writes figures of steps for TensorBoard into a file of its own in a folder.

    Raises:
        WriteError: by all methods: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with os_errors_as_write_error(folder):
            self._writer = tf.summary.create_file_writer(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the figures of a step, by their names."""
        with os_errors_as_write_error(self._folder), self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Writes what was added."""
        with os_errors_as_write_error(self._folder):
            self._writer.flush()
