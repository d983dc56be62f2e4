"""Fields of serialized protocol buffers, as spans of their bytes. For untrusted bytes. Imports no TensorFlow."""

import sys
from collections.abc import Iterable, Iterator

_BYTES, _VARINT = 2, 0  # wire types
_SKIPPED = {1: 8, 5: 4}  # bytes of the wire types of fixed size

Span = tuple[int, int]  # first byte, and the one after the last


def inside(data: bytes, messages: Iterable[Span], wanted: int) -> Iterator[Span]:
    """Yields the fields of bytes with a number in each message.

    Raises:
        ValueError: a message is not a protocol buffer.
    """
    for begin, end in messages:
        yield from fields(data, begin, end, wanted)


def fields(data: bytes, begin: int, end: int, wanted: int, limit: int = sys.maxsize) -> Iterator[Span]:
    """Yields each field of bytes with a number in the message `data[begin:end]`.

    Args:
        data: bytes with the message.
        begin, end: where the message is.
        wanted: number of the fields.
        limit: maximum number of all fields of the message.

    Raises:
        ValueError: the message is not a protocol buffer, or has more fields.
    """
    count = 0
    while begin < end:
        count += 1
        if count > limit:
            raise ValueError(f"it has more than {limit} fields")
        tag, begin = varint(data, begin, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, begin = varint(data, begin, end)
            continue
        length, begin = varint(data, begin, end) if kind == _BYTES else (_SKIPPED.get(kind), begin)
        if length is None or length > end - begin:
            raise ValueError("it is not a protocol buffer")
        if kind == _BYTES and number == wanted:
            yield begin, begin + length
        begin += length


def varint(data: bytes, begin: int, end: int) -> tuple[int, int]:
    """Returns the number of variable length at a position, and the position after it.

    Raises:
        ValueError: the number does not end before `end`, or has more than ten bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        if begin >= end:
            break
        byte = data[begin]
        begin += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, begin
    raise ValueError("it is not a protocol buffer")


def to_varint(value: int) -> bytes:
    """Returns a number of at least 0 as a varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
