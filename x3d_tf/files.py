"""Atomic file writes, and size-limited reads of untrusted files.

Imports no TensorFlow.
"""

import codecs
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from x3d_tf.errors import UserError, require

SMALL = 16 * 2**20  # bytes: limit for settings; parsed JSON takes about 24 times as much memory
LARGE = 2**30  # bytes: limit for the tables of a dataset


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.ASCII | re.IGNORECASE)


class WriteError(UserError):
    """Raised when a file or folder cannot be written, for example because the disk is full."""


@contextmanager
def os_errors_as_write_error(path: Path) -> Iterator[None]:
    """Re-raises errors of the operating system and of TensorFlow's file system as a `WriteError` that names `path`."""
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


def require_local(path: str, setting: str) -> None:
    """Raises `UserError` for an address such as `gs://bucket/run`, which `Path` would take for a local folder `gs:`."""
    rule = (
        "be a path of a mounted file system, because object storage has neither locks nor atomic renames: copy the "
        "files, or mount the bucket to read from it (docs/cluster.md)"
    )
    require(not _ADDRESS.match(path), setting, rule, path)


def temporary_path(path: Path) -> Path:
    """Returns the path of a file until it is complete: a hidden file in the same folder."""
    return path.with_name(f".{path.name}.partial")


def commit_file(partial: Path, path: Path) -> None:
    """Flushes a complete file to disk and renames it to `path`."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def atomic_path(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` on success and deleted on failure.

    Args:
        path: final path of the file.
        suffix: suffix of the temporary path, for writers that require one.
    """
    partial = temporary_path(path)
    partial = partial.with_name(partial.name + suffix)
    partial.unlink(missing_ok=True)  # a symbolic link here could point to another file
    try:
        yield partial
        commit_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file atomically; an existing file is replaced only when the new content is complete.

    Raises:
        WriteError: the file cannot be written. No partial file is left.
    """
    with os_errors_as_write_error(path), atomic_path(path) as partial, partial.open("xb") as file:
        file.write(content)


def require_regular(path: Path) -> None:
    """Raises `UserError` for a folder, pipe or device, which may never end, and `OSError` for a missing file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} must be a regular file, not a folder, pipe or device")


def open_regular(path: Path) -> io.FileIO:
    """Opens an untrusted file for `os.pread`. A pipe is an error, where `open` would wait for a writer.

    Raises:
        OSError: the file does not exist, cannot be read, or is not a regular file.
    """
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def read_limited(path: Path, limit: int) -> bytes:
    """Returns the content of an untrusted file.

    Args:
        path: file to read.
        limit: maximum size in bytes.

    Raises:
        UserError: the file is larger than `limit`, or not a regular file.
        OSError: the file does not exist or cannot be read.
    """
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    require(len(content) <= limit, str(path), f"have at most {limit} bytes", path.stat().st_size)
    return content


def read_text(path: Path, setting: str) -> str:
    """Returns the content of a UTF-8 text file without its byte order mark, if it has one."""
    try:
        content = read_limited(path, LARGE).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line} must be UTF-8, got the byte 0x{content[error.start]:02x}") from error
