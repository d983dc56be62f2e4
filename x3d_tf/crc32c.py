"""CRC-32C (Castagnoli) of many spans of a buffer at once, in NumPy. Imports no TensorFlow.

A CRC without its initial value is linear over XOR, and leading zeros do not change it. Each span is therefore padded
with leading zeros to a whole number of chunks, the CRCs of all chunks are computed in parallel, two bytes per step, and
those of a span are joined: CRC(a + b) = shift(CRC(a)) ^ CRC(b), where `shift` appends the zeros that b is long.
"""

import functools

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # reversed
_CHUNK = 256  # bytes
_INITIAL = 0xFFFFFFFF


def crc32c(data: bytes, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Returns the CRC-32C of each span of `data`, uint32 [n].

    Args:
        data: the buffer.
        offsets, lengths: positions and numbers of bytes of the spans, which must lie inside the buffer, [n].
    """
    chunks = -(-lengths // _CHUNK)
    ends = np.cumsum(chunks) * _CHUNK
    padded = np.zeros(int(chunks.sum()) * _CHUNK, np.uint8)
    source = np.frombuffer(data, np.uint8)
    for end, offset, length in zip(ends.tolist(), offsets.tolist(), lengths.tolist()):
        padded[end - length : end] = source[offset : offset + length]
        padded[end - length : end][:4] ^= 0xFF  # equals the initial value of all ones, from 4 bytes on
    crcs = _of_chunks(padded)
    total = _joined(crcs, chunks)
    for i in np.flatnonzero(lengths < 4).tolist():
        total[i] = _of_few_bytes(data[int(offsets[i]) : int(offsets[i] + lengths[i])])
    return total ^ np.uint32(_INITIAL)


def _joined(crcs: NDArray[np.uint32], chunks: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Returns the CRC without initial value of each span, from those of its chunks, which follow one another."""
    order = np.argsort(-chunks, kind="stable")  # longest first: the spans that have a chunk left are always the first
    firsts, descending = (np.cumsum(chunks) - chunks)[order], chunks[order]
    folded = np.zeros(len(chunks), np.uint32)
    for number in range(int(chunks.max(initial=0))):
        active = int(np.searchsorted(-descending, -number))
        folded[:active] = _shift(folded[:active]) ^ crcs[firsts[:active] + number]
    total = np.zeros_like(folded)
    total[order] = folded
    return total


@functools.cache
def _table(bits: int) -> NDArray[np.uint32]:
    """Returns the CRC without initial value of each number of 8 or 16 bits."""
    table = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


def _of_chunks(padded: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Returns the CRC without initial value of each chunk."""
    words = np.ascontiguousarray(padded.view("<u2").reshape(-1, _CHUNK // 2).T)  # [words of a chunk, chunks]
    table, crcs = _table(16), np.zeros(words.shape[1], np.uint32)
    for row in words:
        crcs = (crcs >> np.uint32(16)) ^ table[(crcs & np.uint32(0xFFFF)) ^ row]
    return crcs


@functools.cache
def _shift_tables() -> NDArray[np.uint32]:
    """Returns the CRC after a chunk of zeros for each value of each of the four bytes of a CRC, uint32 [4, 256]."""
    crcs = (np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]).astype(np.uint32)
    for _ in range(_CHUNK):
        crcs = (crcs >> np.uint32(8)) ^ _table(8)[crcs & np.uint32(0xFF)]
    return crcs


def _shift(crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    tables = _shift_tables()
    shifted = np.zeros_like(crcs)
    for byte in range(4):
        shifted ^= tables[byte][(crcs >> np.uint32(8 * byte)) & np.uint32(0xFF)]
    return shifted


def _of_few_bytes(span: bytes) -> np.uint32:
    crc = np.uint32(_INITIAL)
    for byte in span:
        crc = (crc >> np.uint32(8)) ^ _table(8)[int(crc ^ np.uint32(byte)) & 0xFF]
    return crc
