"""Bytes that the test process reads."""

from pathlib import Path

import pytest

counts_bytes = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count the bytes that are read"
)


def bytes_read() -> int:
    """Returns the bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])
