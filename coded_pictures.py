"""Packets that complete no frame of their own: second fields of H.264 frames, and frames that VP8 and VP9 never show.

A bitstream is read only as far as the header of a slice or frame (ITU-T H.264, 7.3; RFC 6386, 9.1; VP9 bitstream
specification, 7.2).
"""

from dataclasses import dataclass


SPS, PPS, SLICES = 7, 8, (1, 5)  # types of H.264 NAL units; data partitions (2) are used by no container
HEADER_BYTES = 64  # bytes of a slice that hold the header up to its field flags
PARAMETER_BYTES = 1024  # bytes of a parameter set that are read
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


class _Bits:
    """Bits of a NAL unit, without its emulation prevention bytes."""

    def __init__(self, data: bytes):
        data = data.replace(b"\0\0\3", b"\0\0")
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ValueError("the header is cut short")
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def unsigned(self) -> int:
        """An Exp-Golomb code."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 32:
                raise ValueError("the header is damaged")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


@dataclass(frozen=True)
class _Sequence:
    """What the slice header needs of a sequence parameter set."""

    has_fields: bool
    separate_planes: bool
    frame_number_bits: int

    @classmethod
    def read(cls, bits: _Bits) -> tuple[int, "_Sequence"]:
        """(its id, the parameters), from after the NAL header."""
        profile = bits.take(24) >> 16
        number, separate = bits.unsigned(), False
        if profile in HIGH_PROFILES:
            chroma = bits.unsigned()
            separate = chroma == 3 and bool(bits.take(1))
            bits.unsigned(), bits.unsigned(), bits.take(1)
            if bits.take(1):
                for which in range(12 if chroma == 3 else 8):
                    if bits.take(1):
                        cls._skip_scaling_list(bits, 16 if which < 6 else 64)
        frame_number_bits = bits.unsigned() + 4
        order_type = bits.unsigned()
        if order_type == 0:
            bits.unsigned()
        elif order_type == 1:
            bits.take(1), bits.signed(), bits.signed()
            for _ in range(min(255, bits.unsigned())):
                bits.signed()
        bits.unsigned(), bits.take(1), bits.unsigned(), bits.unsigned()  # references, gaps, width, height
        return number, cls(not bits.take(1), separate, frame_number_bits)

    @staticmethod
    def _skip_scaling_list(bits: _Bits, size: int) -> None:
        last = following = 8
        for _ in range(size):
            if following:
                following = (last + bits.signed()) % 256
            last = following or last


class PictureReader:
    """Looks at the packets of a stream in file order, and says which of them complete no frame of their own."""

    def __init__(self, codec: str, extradata: bytes | None):
        self._codec = codec
        self._sequences, self._sequence_of, self._length_bytes = {}, {}, 0
        self._has_fields = False
        self.has_recovery_points = False  # a keyframe of H.264 without an IDR picture: it may only begin a refresh
        self._open_field = None  # (frame number, bottom) of a first field whose second is awaited
        self.read_extradata(extradata)

    @property
    def reads_packets(self) -> bool:
        return self._codec in ("vp8", "vp9") or self._has_fields

    def read_extradata(self, data: bytes | None) -> None:
        if self._codec != "h264" or not data:
            return
        if data[0] != 1:  # Annex B
            self._length_bytes = 0
            self._read_parameters(_annex_b_units(data))
        elif len(data) > 6:  # avcC
            self._length_bytes = (data[4] & 3) + 1
            self._read_parameters(_avcc_units(data))

    def is_hidden(self, data: memoryview) -> bool:
        """Whether a packet never becomes a frame. All packets are passed if `reads_packets`."""
        if self._codec == "vp8":
            return not data[0] & 0x10
        return self._codec == "vp9" and _is_hidden_vp9(data)

    def is_second_field(self, data: memoryview, is_key: bool) -> bool:
        """Whether a packet holds only the field that completes the frame of the packet before it.

        Keyframes are passed, because they may bring parameters; all packets if `reads_packets`.
        """
        if self._codec != "h264":
            return False
        if is_key and not self.has_recovery_points:
            first = next((unit[0] & 31 for unit in self._units(data) if unit[0] & 31 in SLICES), 5)
            self.has_recovery_points = first != 5
        if is_key and not self._has_fields:
            self._read_parameters(self._units(data), until_slice=True)
        return self._has_fields and self._completes(self._units(data))

    def _units(self, data):
        return _length_units(data, self._length_bytes) if self._length_bytes else _annex_b_units(bytes(data))

    def _completes(self, units) -> bool:
        completes, is_first_picture = False, True
        for unit in units:
            kind = unit[0] & 31
            if kind in (SPS, PPS):
                self._read_parameters([unit])
            elif kind in SLICES:
                try:
                    is_start, field = self._read_slice(unit)
                except (ValueError, KeyError):
                    continue
                if not is_start:
                    continue
                if field is None:
                    self._open_field = None
                elif self._open_field is not None and field == (self._open_field[0], not self._open_field[1]):
                    completes, self._open_field = is_first_picture, None
                else:
                    self._open_field = field
                is_first_picture = False
        return completes

    def _read_slice(self, unit: bytes) -> tuple[bool, tuple[int, bool] | None]:
        """(whether a picture starts with it, (frame number, bottom) of a field or None of a frame)."""
        bits = _Bits(bytes(unit[1:HEADER_BYTES]))
        is_start = bits.unsigned() == 0
        bits.unsigned()
        sequence = self._sequences[self._sequence_of[bits.unsigned()]]
        if sequence.separate_planes:
            bits.take(2)
        number = bits.take(sequence.frame_number_bits)
        is_field = sequence.has_fields and bool(bits.take(1))
        return is_start, (number, bool(bits.take(1))) if is_field else None

    def _read_parameters(self, units, until_slice: bool = False) -> None:
        for unit in units:
            kind = unit[0] & 31
            if until_slice and kind in SLICES:
                return
            try:
                bits = _Bits(bytes(unit[1:PARAMETER_BYTES]))
                if kind == SPS:
                    number, sequence = _Sequence.read(bits)
                    self._sequences[number] = sequence
                    self._has_fields = self._has_fields or sequence.has_fields
                elif kind == PPS:
                    number = bits.unsigned()
                    self._sequence_of[number] = bits.unsigned()
            except ValueError:
                continue


def _length_units(data, length_bytes: int):
    """The NAL units of a packet that gives the length of each."""
    at = 0
    while at + length_bytes < len(data):
        length = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        if length:
            yield data[at : at + length]
        at += length


def _annex_b_units(data: bytes):
    """The NAL units of a packet that separates them by start codes."""
    at = data.find(b"\0\0\1")
    while at >= 0:
        following = data.find(b"\0\0\1", at + 3)
        unit = data[at + 3 : following if following >= 0 else len(data)]
        if unit:
            yield unit
        at = following


def _avcc_units(data: bytes):
    """The parameter sets of an AVC decoder configuration record."""
    at = 5
    for mask in (31, 255):
        if at >= len(data):
            return
        count, at = data[at] & mask, at + 1
        for _ in range(count):
            length = int.from_bytes(data[at : at + 2], "big")
            if length and at + 2 < len(data):
                yield data[at + 2 : at + 2 + length]
            at += 2 + length


def _is_hidden_vp9(data) -> bool:
    """Whether a packet is one frame that is not shown. A superframe always shows one."""
    if data[-1] & 0xE0 == 0xC0 or data[0] >> 6 != 2:
        return False
    profile = (data[0] >> 5 & 1) | (data[0] >> 4 & 1) << 1
    shift = 2 if profile == 3 else 3  # profile 3 is followed by a reserved bit
    shows_existing = data[0] >> shift & 1
    shown = data[0] >> (shift - 2) & 1
    return not shows_existing and not shown
