"""Atomic file writes, also on a full disk, and limited reads of untrusted files."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from x3d_tf import plots
from x3d_tf.errors import UserError
from x3d_tf.evaluation.reports import read_results
from x3d_tf.files import (
    WriteError,
    atomic_path,
    atomic_write,
    os_errors_as_write_error,
    read_limited,
    read_text,
    temporary_path,
)
from x3d_tf.runs.run_folder import HISTORY_FIELDS, RunFolder


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a disk that is full when a file is flushed."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_failed_write_keeps_the_previous_file(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"before")
    with pytest.raises(WriteError, match=r"a\.txt cannot be written: No space left on device$"):
        atomic_write(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_pictures_are_complete_or_absent(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(WriteError, match=r"a\.png cannot be written: No space left on device$"):
        plots.save_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "a.png", "title")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_to_the_history_names_its_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.history.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"history\.csv cannot be written: No space left on device$"):
        run.append_history(HISTORY_FIELDS, dict.fromkeys(HISTORY_FIELDS, 1.0))


def test_tensorflow_errors_name_the_file() -> None:
    import tensorflow as tf

    message = "{{function_node f}} /a/b; No space left on device [Op:A]\n\tFailed to flush 11 events to /a/b"
    with (
        pytest.raises(WriteError, match=r"^events cannot be written: No space left on device$"),
        os_errors_as_write_error(Path("events")),
    ):
        raise tf.errors.ResourceExhaustedError(None, None, message)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), os_errors_as_write_error(Path("a")):
        raise ZeroDivisionError


def test_oversized_and_endless_files_are_rejected(tmp_path: Path) -> None:
    file, pipe = tmp_path / "a", tmp_path / "pipe"
    file.write_bytes(bytes(9))
    os.mkfifo(pipe)
    assert read_limited(file, 9) == bytes(9)
    with pytest.raises(UserError, match="a must have at most 8 bytes, got 9"):
        read_limited(file, 8)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"{path} must be a regular file"):
            read_limited(path, 8)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "b", 8)
    for read in (read_results, lambda path: read_text(path, "csv")):
        with pytest.raises(UserError, match="must be a regular file"):
            read(pipe)


def test_a_file_is_not_written_through_a_link_at_its_partial_name(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("a", "b"):
        temporary_path(tmp_path / name).symlink_to(tmp_path / "precious")
    atomic_write(tmp_path / "a", b"new")
    with atomic_path(tmp_path / "b") as path:
        path.write_bytes(b"new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"new"
