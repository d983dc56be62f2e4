"""CRC-32C, against its definition bit by bit and against the checksums that TensorFlow writes."""

from pathlib import Path

import numpy as np
import pytest

from x3d_tf import crc32c as crc32c_module
from x3d_tf.crc32c import crc32c


def naive(data: bytes) -> int:
    """Divides by the polynomial bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def of(data: bytes, *pieces: tuple[int, int]) -> list[int]:
    offsets, lengths = (np.array(column, np.int64) for column in zip(*pieces))
    return crc32c(data, offsets, lengths).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0), (b"a", 0xC1D04330)],
)
def test_published_values(data: bytes, expected: int) -> None:
    """RFC 3720, appendix B.4, and the check value of the algorithm."""
    assert of(data, (0, len(data))) == [expected]
    assert naive(data) == expected


def test_pieces_of_all_lengths() -> None:
    """Lengths around a word and around the length of a chunk, at odd offsets; pieces may overlap."""
    data = np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
    pieces = [(3 * i % 97, length) for i, length in enumerate([*range(10), 255, 256, 257, 511, 512, 513, 1025, 2600])]
    assert of(data, *pieces) == [naive(data[offset : offset + length]) for offset, length in pieces]


def test_work_and_memory_follow_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long piece among many short ones: each chunk is folded once, whatever the number of pieces."""
    folded, real = [], crc32c_module._shift
    monkeypatch.setattr(crc32c_module, "_shift", lambda crcs: (folded.append(len(crcs)), real(crcs))[1])
    data = np.random.default_rng(2).integers(0, 256, 20_000, np.uint8).tobytes()
    pieces = [(i, 5) for i in range(3000)]
    pieces[1500] = (0, len(data))
    assert of(data, *pieces) == [naive(data[offset : offset + length]) for offset, length in pieces]
    assert sum(folded) == sum(-(-length // 256) for _, length in pieces)


def test_no_pieces() -> None:
    assert crc32c(b"abc", np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_it_is_the_checksum_of_tensorflow(tmp_path: Path) -> None:
    import tensorflow as tf

    record = np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes()
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
        writer.write(record)
    masked = int.from_bytes((tmp_path / "a").read_bytes()[-4:], "little")
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert of(record, (0, len(record))) == [((rotated << 15) | (rotated >> 17)) & 0xFFFFFFFF]
