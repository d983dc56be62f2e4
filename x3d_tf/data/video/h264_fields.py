"""Finds H.264 packets that hold a field, which is half a frame, without decoding. Imports no TensorFlow.

Camcorders (AVCHD) and broadcasters encode some frames as two fields in separate packets, and others as one packet. The
comments name the syntax elements of Recommendation ITU-T H.264, sections 7.3.2.1 and 7.3.3.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SLICES = (1, 2, 5)  # nal_unit_type of slices
_SEQUENCE = 7  # nal_unit_type of a sequence parameter set
_EXTENDED = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)  # profile_idc with more parameters
_SLICE_BYTES = 32  # enough of a slice for the header fields that are read
_UNIT_BYTES = 1024  # enough of a unit for the parameters that are read


class Field(NamedTuple):
    """The field in a packet: bottom_field_flag and frame_num."""

    bottom: int
    frame_num: int


class FieldReader:
    """Reads the fields of a stream."""

    def __init__(self, extradata: bytes | None) -> None:
        """Reads the stream's extradata, with start codes or in the form of mp4 and Matroska."""
        data = extradata or b""
        self._prefix = (data[4] & 3) + 1 if len(data) > 6 and data[0] == 1 else 0  # bytes; 0 for start codes
        units = iter([data[8:]]) if self._prefix else _start_code_units(data)
        self._sequence: _SequenceParameters | None = None
        for unit in units:
            if unit and unit[0] & 31 == _SEQUENCE:
                with suppress(ValueError):  # if damaged, each packet counts as a frame, as for other codecs
                    self._sequence = _read_sequence(unit[1:])
                break

    @property
    def may_have_fields(self) -> bool:
        """True if packets may hold fields."""
        return self._sequence is not None and not self._sequence.frames_only

    def field(self, packet: bytes) -> Field | None:
        """Returns the field in a packet, or None for a complete frame or unreadable data."""
        units = _length_prefixed_units(packet, self._prefix) if self._prefix else _start_code_units(packet)
        for unit in units:
            if unit and unit[0] & 31 in _SLICES:
                try:
                    return self._parse_slice(_Bits(unit[1:_SLICE_BYTES]))
                except ValueError:
                    return None
        return None

    def _parse_slice(self, bits: "_Bits") -> Field | None:
        assert self._sequence is not None
        for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
            bits.exp_golomb()
        if self._sequence.separate_planes:
            bits.read(2)  # colour_plane_id
        frame_num = bits.read(self._sequence.frame_num_bits)
        return Field(bits.read(1), frame_num) if bits.read(1) else None  # field_pic_flag, bottom_field_flag


def second_fields(fields: Sequence[Field | None]) -> NDArray[np.bool_]:
    """Returns a mask of the packets that hold the second field of the previous packet's frame."""
    second = np.zeros(len(fields), bool)
    first: Field | None = None
    for index, field in enumerate(fields):
        second[index] = (
            first is not None
            and field is not None
            and field.bottom != first.bottom
            and field.frame_num == first.frame_num
        )
        first = None if second[index] else field
    return second


class _SequenceParameters(NamedTuple):
    frame_num_bits: int
    separate_planes: bool
    frames_only: bool


def _read_sequence(data: bytes) -> _SequenceParameters:
    """Reads seq_parameter_set_data; raises ValueError if it is truncated."""
    bits = _Bits(data)
    profile, separate = bits.read(8), False
    bits.read(16)  # constraints, level_idc
    bits.exp_golomb()  # seq_parameter_set_id
    if profile in _EXTENDED:
        chroma = bits.exp_golomb()
        separate = chroma == 3 and bool(bits.read(1))
        bits.exp_golomb()  # bit_depth_luma_minus8
        bits.exp_golomb()  # bit_depth_chroma_minus8
        bits.read(1)  # qpprime_y_zero_transform_bypass_flag
        if bits.read(1):  # seq_scaling_matrix_present_flag
            for index in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_num_bits = bits.exp_golomb() + 4
    order = bits.exp_golomb()  # pic_order_cnt_type
    if order == 0:
        bits.exp_golomb()  # log2_max_pic_order_cnt_lsb_minus4
    elif order == 1:
        bits.read(1)
        for _ in range(2):  # offset_for_non_ref_pic, offset_for_top_to_bottom_field
            bits.exp_golomb()
        for _ in range(bits.exp_golomb()):  # offset_for_ref_frame
            bits.exp_golomb()
    bits.exp_golomb()  # max_num_ref_frames
    bits.read(1)  # gaps_in_frame_num_value_allowed_flag
    for _ in range(2):  # pic_width_in_mbs_minus1, pic_height_in_map_units_minus1
        bits.exp_golomb()
    return _SequenceParameters(frame_num_bits, separate, bool(bits.read(1)))


def _skip_scaling_list(bits: "_Bits", size: int) -> None:
    last = 8
    for _ in range(size):
        code = bits.exp_golomb()
        delta = (code + 1) // 2 if code % 2 else -(code // 2)
        if (last + delta) % 256 == 0:
            return
        last = (last + delta) % 256


class _Bits:
    """Reads bits, most significant first; raises ValueError past the end."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")  # emulation_prevention_three_byte
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        if count > self._left:
            raise ValueError("truncated")
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def exp_golomb(self) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _length_prefixed_units(data: bytes, prefix: int) -> Iterator[bytes]:
    """Yields the beginning of each unit in length-prefixed data."""
    position = 0
    while position + prefix < len(data):
        length = int.from_bytes(data[position : position + prefix], "big")
        position += prefix
        yield data[position : position + min(length, _UNIT_BYTES)]
        position += length


def _start_code_units(data: bytes) -> Iterator[bytes]:
    """Yields the beginning of each unit in data with start codes; it may extend into the next unit."""
    position = data.find(b"\0\0\1")
    while position >= 0:
        yield data[position + 3 : position + 3 + _UNIT_BYTES]
        position = data.find(b"\0\0\1", position + 3)
