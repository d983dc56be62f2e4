"""Files that appear under their names only when complete, and reading of files from elsewhere.

Imports no TensorFlow.
"""

import codecs
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from x3d_tf.errors import UserError, require

SMALL = 16 * 2**20  # bytes: far above any settings, whose JSON takes about 24 times as much memory
LARGE = 2**30  # bytes: far above the tables of any data set


class WriteError(UserError):
    """A file or folder that cannot be written: a full disk, a missing permission."""


@contextmanager
def os_errors_as_write_error(path: Path) -> Iterator[None]:
    """Turns the errors of the operating system and of TensorFlow's file system within the block into a `WriteError`.

    Its message names `path`.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
            raise
        reason = error.message.partition("\n")[0].rpartition("; ")[2].partition(" [Op:")[0]
        raise WriteError(f"{path} cannot be written: {reason}") from error


def temporary_path(path: Path) -> Path:
    """Where a file lies until it is whole: hidden, beside its place."""
    return path.with_name(f".{path.name}.partial")


def commit_file(partial: Path, path: Path) -> None:
    """Gives a complete file its name once it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def atomic_path(path: Path, ending: str = "") -> Iterator[Path]:
    """Where to write a file that gets its name when the block has ended well, and is gone if it has not.

    Args:
        path: the file.
        ending: of the path to write to, for writers that insist on one.
    """
    partial = temporary_path(path)
    partial = partial.with_name(partial.name + ending)
    partial.unlink(missing_ok=True)  # a link in a foreign folder would lead to another file
    try:
        yield partial
        commit_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; what was there before stays until then.

    Raises:
        WriteError: it cannot be written; nothing is left behind.
    """
    with os_errors_as_write_error(path), atomic_path(path) as partial, partial.open("xb") as file:
        file.write(content)


def require_regular(path: Path) -> None:
    """Raises UserError for a pipe, a device or a folder, which might never end; OSError where nothing exists."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} must be a regular file, and is a folder, a pipe or a device")


def read_limited(path: Path, limit: int) -> bytes:
    """Returns the content of a file that may come from somebody else.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        UserError: it is larger, or no regular file.
        OSError: it does not exist, or cannot be read.
    """
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    require(len(content) <= limit, str(path), f"have at most {limit} bytes", path.stat().st_size)
    return content


def read_text(path: Path, setting: str) -> str:
    """The content of a text file, which may begin with a byte order mark."""
    try:
        content = read_limited(path, LARGE).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line} must be UTF-8, got the byte 0x{content[error.start]:02x}") from error
