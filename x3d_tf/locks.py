"""Locks on folders that only one process at a time may write to. Imports no TensorFlow."""

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from x3d_tf.errors import UserError
from x3d_tf.files import os_errors_as_write_error

_OWNER = re.compile(r"process [0-9]{1,19} on [\w.-]{1,255}", re.ASCII)


@contextmanager
def locked(path: Path, conflict: str, advice: str) -> Iterator[None]:
    """Holds a lock file within the block, and removes it at the end.

    The operating system decides (flock), so that the file of a killed process locks nothing. Its text only says who
    holds it. Where the file system has no locks, a warning is printed and the block runs unprotected.

    Args:
        path: the lock file, in a folder that exists. A link is refused: it could lead to a file of somebody else.
        conflict: the first part of the message where another process holds it, "another process is ... RUN".
        advice: what to do then.

    Raises:
        UserError: another process holds it.
        WriteError: the file cannot be written.
    """
    with os_errors_as_write_error(path):
        descriptor = _acquired(path)
    if descriptor is None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            owner = _OWNER.fullmatch(path.read_text(encoding="utf-8").strip())
            conflict += f" ({owner.group()})" if owner else ""
        raise UserError(f"{conflict}; {advice}")
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock is free: afterwards the file may be another process's
        os.close(descriptor)


def _acquired(path: Path) -> int | None:
    """The descriptor of the locked file; None where another process holds it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        descriptor = os.open(path, flags, 0o644)
        if not _lock(descriptor, path):
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner removed it between the opening and the lock: another one may be locked now


def _lock(descriptor: int, path: Path) -> bool:
    """Takes the lock; returns whether this process may write."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        print(
            f"warning: the file system of {path.parent} has no locks ({error.strerror}): make sure that no other "
            "process writes to this folder",
            file=sys.stderr,
        )
    return True
