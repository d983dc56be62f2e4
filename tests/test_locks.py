"""Lock files: one process at a time, links, and file systems without locks."""

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from x3d_tf import locks
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError


def test_the_text_of_a_lock_is_not_repeated_unseen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path, "taken", "wait"):
        path.write_text("\x1b[2Jprocess 1 on evil")
        with pytest.raises(locks.Locked, match=r"^taken; wait$"), locks.locked(path, "taken", "wait"):
            pass


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="lock cannot be written"), locks.locked(tmp_path / "lock", "taken", "wait"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pipe_is_no_lock_file(tmp_path: Path) -> None:
    """Reading its owner would wait for a writer."""
    path = tmp_path / "lock"
    os.mkfifo(path)
    with (
        pytest.raises(WriteError, match="lock cannot be written: it is not a regular file"),
        locks.locked(path, "", ""),
    ):
        pass
    assert locks.owner_of(path) == ""


def test_the_owner_of_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path, "taken", "wait"):
        assert locks.owner_of(path) == f"process {os.getpid()} on {socket.gethostname()}"
        path.write_text(" " * 1000 + "process 1 on host")
        assert locks.owner_of(path) == ""
    assert locks.owner_of(path) == ""


def test_other_machines_see_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends the text of an open file when it is flushed."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.pread(descriptor, 100, 0)))
    with locks.locked(tmp_path / "lock", "taken", "wait"):
        assert flushed == [(tmp_path / "lock").read_bytes()]


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.locked(tmp_path / "lock", "taken", "wait"):
        assert f"the file system of {tmp_path} does not support locks (No locks available)" in capsys.readouterr().err
    rule = f"the file system of {tmp_path} must support locks .*, got 'No locks available'"
    with pytest.raises(UserError, match=rule), locks.locked(tmp_path / "lock", "taken", "wait", required=True):
        pass


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "lock", locks._lock
    removals = [path, path]

    def removed_first(descriptor: int, lock_path: Path, shared: bool, required: bool) -> bool:
        if removals:
            removals.pop().unlink()
        return lock(descriptor, lock_path, shared, required)

    monkeypatch.setattr(locks, "_lock", removed_first)
    with (
        locks.locked(path, "taken", "wait"),
        pytest.raises(UserError, match="taken"),
        locks.locked(path, "taken", "wait"),
    ):
        pass


def test_a_shared_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path, "taken", "wait", shared=True), locks.locked(path, "taken", "wait", shared=True):
        assert not locks.is_locked(path)  # such a process does not exclude others
        with pytest.raises(UserError, match=r"^taken; wait$"), locks.locked(path, "taken", "wait"):
            pass
    assert path.exists()  # another process may hold it
    with locks.locked(path, "taken", "wait"):
        assert locks.is_locked(path)
        with pytest.raises(UserError, match="taken"), locks.locked(path, "taken", "wait", shared=True):
            pass
    assert not path.exists() and not locks.is_locked(path)


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def second() -> None:
        with locks.locked(path, "taken", "wait", wait=60):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.locked(path, "taken", "wait"):
        thread.start()
        with pytest.raises(UserError, match="taken"), locks.locked(path, "taken", "wait", wait=0.1):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
