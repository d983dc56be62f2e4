"""Files that appear under their names only when whole. Imports no TensorFlow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from x3d_tf._checks import UserError


class WriteError(UserError):
    """A file or folder that cannot be written: a full disk, a missing permission."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors within the block into a `WriteError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def partial_of(path: Path) -> Path:
    """Where a file lies until it is whole: hidden, beside its place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when the block has ended well, and is gone if it has not."""
    partial = partial_of(path)
    partial.unlink(missing_ok=True)  # a link in a foreign folder would lead to another file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; what was there before stays until then.

    Raises:
        WriteError: it cannot be written; nothing is left behind.
    """
    partial = partial_of(path)
    with writing(path):
        try:
            partial.unlink(missing_ok=True)  # a link in a foreign folder would lead to another file
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
