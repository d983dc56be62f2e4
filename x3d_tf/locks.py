"""Lock files for folders that only one process may write to at a time. Imports no TensorFlow."""

import contextlib
import errno
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from x3d_tf.errors import UserError, require
from x3d_tf.files import os_errors_as_write_error, read_limited

_OWNER = re.compile(r"process [0-9]{1,19} on [\w.-]{1,255}", re.ASCII)
_OWNER_BYTES = 1000  # limit of the text that is read
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_POLL = 0.05  # seconds between attempts to take a lock


class Locked(UserError):
    """Raised when another process holds a lock."""


@contextmanager
def locked(
    path: Path, conflict: str, advice: str, *, shared: bool = False, wait: float = 0.0, required: bool = False
) -> Iterator[None]:
    """Locks a file for the duration of the block and removes it at the end.

    Uses flock, so that the lock of a killed process is released. The text of the file only names the owner. If the file
    system does not support locks, a warning is printed and the block runs without one.

    Args:
        path: lock file in an existing folder. Symbolic links, which may point to another file, and pipes are rejected.
        conflict: first part of the message if another process holds the lock: "another process is ... RUN".
        advice: second part of the message.
        shared: any number of processes may hold the lock at the same time, but none together with a process that locks
            the file without `shared`. The file is not removed at the end and names no owner.
        wait: seconds to wait for another process to release the lock.
        required: a file system without locks is an error, for processes that divide work by locks.

    Raises:
        Locked: another process holds the lock.
        UserError: the file system does not support locks, and they are required.
        WriteError: the file cannot be written.
    """
    until = time.monotonic() + wait
    with os_errors_as_write_error(path):
        while (descriptor := _acquire(path, shared, required)) is None and time.monotonic() < until:
            time.sleep(_POLL)
    if descriptor is None:
        owner = owner_of(path)
        raise Locked(f"{conflict}{f' ({owner})' if owner else ''}; {advice}")
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock works without the text
            os.ftruncate(descriptor, 0)
            if not shared:
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                os.fsync(descriptor)  # other machines read it
        yield
    finally:
        if not shared:
            with contextlib.suppress(OSError):
                path.unlink()  # before the lock is released: later the file may belong to another process
        os.close(descriptor)


def owner_of(path: Path) -> str:
    """Returns "process ID on HOST" of the process that holds a lock; "" if there is no file with such a text."""
    try:
        owner = _OWNER.fullmatch(read_limited(path, _OWNER_BYTES).decode("utf-8", "replace").strip())
    except (OSError, UserError):
        return ""
    return owner.group() if owner else ""


def is_locked(path: Path) -> bool:
    """Returns True if a process holds the lock of a file that it does not share; False if the file does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        return False
    try:
        return not _lock(descriptor, path, shared=True)
    finally:
        os.close(descriptor)


def _acquire(path: Path, shared: bool, required: bool) -> int | None:
    """Returns the descriptor of the locked file, or None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            taken = _lock(descriptor, path, shared, required)
        except (OSError, UserError):
            os.close(descriptor)
            raise
        if not taken:
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # removed by its owner between opening and locking: retry with a new file


def _lock(descriptor: int, path: Path, shared: bool, required: bool = False) -> bool:
    """Tries to take the lock; returns True if this process may write."""
    try:
        import fcntl
    except ImportError:  # not available on Windows
        require(not required, "the operating system", "support locks of files")
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        rule = "support locks (flock) that all machines see"
        require(not required, f"the file system of {path.parent}", rule, error.strerror)
        _warn(path.parent, error.strerror)
    return True


@cache  # a folder may have several locks
def _warn(folder: Path, reason: str) -> None:
    print(
        f"warning: the file system of {folder} does not support locks ({reason}); make sure that no other process "
        "writes to this folder",
        file=sys.stderr,
    )
