"""Framing of records in TFRecord files, for untrusted files. Imports no TensorFlow."""

import os
from pathlib import Path

import google_crc32c

from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES
from x3d_tf.files import open_regular

LARGEST_RECORD = 2**31 - 1  # bytes of a protocol buffer
LENGTH_BYTES = 8  # of a record's length field, which is followed by its checksum


class RecordError(ValueError):
    """A record cannot be read. The message is a clause that does not name the file."""


def masked_crc32c(data: bytes) -> bytes:
    """Returns the CRC-32C of some bytes as TFRecord files store it."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def stated_length(header: bytes) -> int | None:
    """Returns the number of data bytes that a header states; None if the header does not match its checksum."""
    length, checksum = header[:LENGTH_BYTES], header[LENGTH_BYTES:HEADER_BYTES]
    return int.from_bytes(length, "little") if masked_crc32c(length) == checksum else None


def read_record(path: Path, offset: int, length: int) -> bytes:
    """Reads one record of a file and verifies both checksums. Reads no other byte of the file.

    Args:
        path: TFRecord file.
        offset, length: position and number of the record's data bytes. No more memory than this is allocated.

    Raises:
        RecordError: the record has another length or more than 2 GiB, or does not match its checksums.
        OSError: the file cannot be read.
    """
    if length > LARGEST_RECORD:
        raise RecordError(f"it has {length} bytes, more than a record may have")
    with open_regular(path) as file:
        content = os.pread(file.fileno(), HEADER_BYTES + length + FOOTER_BYTES, offset - HEADER_BYTES)
    stated = stated_length(content[:HEADER_BYTES])
    if stated is None:
        raise RecordError("its bytes do not match their checksum")
    if stated != length:
        raise RecordError(f"its header states {stated} bytes, but {length} are listed")
    data = content[HEADER_BYTES : HEADER_BYTES + length]
    if masked_crc32c(data) != content[HEADER_BYTES + length :]:  # also if the file ends before
        raise RecordError("its bytes do not match their checksum")
    return data
