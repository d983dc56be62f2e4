"""Finds packets of H.264 that hold a field, half a frame, without decoding them. Imports no TensorFlow.

Camcorders (AVCHD) and broadcasters code some frames as two fields, each a packet of its own, and others whole. Names of
syntax elements in the comments are those of Recommendation ITU-T H.264, sections 7.3.2.1 and 7.3.3.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SLICES = (1, 2, 5)  # nal_unit_type of what a picture consists of
_SEQUENCE = 7  # nal_unit_type of the parameters of a sequence
_EXTENDED = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)  # profile_idc with more parameters
_SLICE_BYTES = 32  # of a slice, that hold what is read of its header
_UNIT_BYTES = 1024  # of a unit, that hold what is read of parameters


class Field(NamedTuple):
    """Which half of which frame a packet holds."""

    bottom: int
    frame_num: int


class FieldReader:
    """Reads the fields of one stream."""

    def __init__(self, extradata: bytes | None) -> None:
        """Takes the stream's extradata: parameters behind start codes, or as mp4 and Matroska store them."""
        data = extradata or b""
        self._prefix = (data[4] & 3) + 1 if len(data) > 6 and data[0] == 1 else 0  # bytes of a length; 0: start codes
        units = iter([data[8:]]) if self._prefix else _behind_start_codes(data)
        self._sequence: _Sequence | None = None
        for unit in units:
            if unit and unit[0] & 31 == _SEQUENCE:
                with suppress(ValueError):  # damaged: each packet counts as a frame, as of other codecs
                    self._sequence = _read_sequence(unit[1:])
                break

    @property
    def may_have_fields(self) -> bool:
        """Whether packets are worth looking at."""
        return self._sequence is not None and not self._sequence.frames_only

    def field(self, packet: bytes) -> Field | None:
        """The field that a packet holds; None if it is a whole frame, or cannot be read."""
        units = _behind_lengths(packet, self._prefix) if self._prefix else _behind_start_codes(packet)
        for unit in units:
            if unit and unit[0] & 31 in _SLICES:
                try:
                    return self._field_of(_Bits(unit[1:_SLICE_BYTES]))
                except ValueError:
                    return None
        return None

    def _field_of(self, bits: "_Bits") -> Field | None:
        assert self._sequence is not None
        for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
            bits.exp_golomb()
        if self._sequence.separate_planes:
            bits.read(2)  # colour_plane_id
        frame_num = bits.read(self._sequence.frame_num_bits)
        return Field(bits.read(1), frame_num) if bits.read(1) else None  # field_pic_flag, bottom_field_flag


def second_fields(fields: Sequence[Field | None]) -> NDArray[np.bool_]:
    """Which packets complete the frame of the packet before them, from the fields of all packets in their order."""
    second = np.zeros(len(fields), bool)
    first: Field | None = None
    for place, field in enumerate(fields):
        second[place] = (
            first is not None
            and field is not None
            and field.bottom != first.bottom
            and field.frame_num == first.frame_num
        )
        first = None if second[place] else field
    return second


class _Sequence(NamedTuple):
    frame_num_bits: int
    separate_planes: bool
    frames_only: bool


def _read_sequence(data: bytes) -> _Sequence:
    """Reads seq_parameter_set_data; raises ValueError where it ends too early."""
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
    return _Sequence(frame_num_bits, separate, bool(bits.read(1)))


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
            raise ValueError("ends too early")
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def exp_golomb(self) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _behind_lengths(data: bytes, prefix: int) -> Iterator[bytes]:
    """The beginnings of units that follow their length each."""
    place = 0
    while place + prefix < len(data):
        length = int.from_bytes(data[place : place + prefix], "big")
        place += prefix
        yield data[place : place + min(length, _UNIT_BYTES)]
        place += length


def _behind_start_codes(data: bytes) -> Iterator[bytes]:
    """The beginnings of units that follow a start code each; what is read of one does not reach its end."""
    place = data.find(b"\0\0\1")
    while place >= 0:
        yield data[place + 3 : place + 3 + _UNIT_BYTES]
        place = data.find(b"\0\0\1", place + 3)
