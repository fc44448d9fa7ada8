"""Opening image files: the formats that are read, and checks of a file's structure before Pillow reads it.

The checks refuse small files that would make Pillow work or allocate far out of proportion to their size.
"""

import contextlib
import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from .signatures import begins_as_video


# In the order in which they are tried: TGA has no signature. HEIF is there if a plugin of Pillow adds it.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "AVIF",
    "HEIF",
    "JPEG2000",
    "ICO",
    "QOI",
    "PCX",
    "SGI",
    "TGA",
)
ORIENTATION = 0x0112  # EXIF tag
MAX_TAG_NUMBERS = 2**18  # in one tag of a TIFF or EXIF directory that does not hold bytes or text
MAX_PROFILE_CHARACTERS = 2**18  # of EXIF data as text in a PNG
MAX_SCANS = 100  # of a progressive JPEG; the usual scripts make about ten
MAX_SEGMENTS = 4096  # of a JPEG before its pixels
MAX_EXIF_SEGMENTS = 64
MAX_GIF_EXTENSIONS = 2**20  # bytes before the first frame
MAX_GIF_BLOCKS = 2**14
MAX_ICON_SIDE = 1024
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
BYTE_TYPES = (1, 2, 6, 7)


@contextlib.contextmanager
def open_image(file: str | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """Opens an image whose pixels are not decoded yet; the file is closed at the end, decoded pixels stay.

    Pillow's own limit of pixels does not apply, so that the caller checks the size first.

    Raises ValueError if the file cannot be opened, has none of the `FORMATS` or is damaged.
    """
    try:
        opened = open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue())
    except OSError as error:
        raise ValueError(f"{name} cannot be opened: {error}") from error
    with opened as stream:
        try:
            image = _identify(stream, file if isinstance(file, str) else "")
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise all kinds of errors on damaged files
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name} is not an image that Pillow can read: {reason}") from error
        yield image


def _identify(stream: BinaryIO, path: str) -> Image.Image:
    prefix = stream.read(16)
    Image.preinit()
    if any(kind not in Image.OPEN for kind in FORMATS):
        Image.init()
    hints = []
    for kind in FORMATS:
        if kind not in Image.OPEN:
            continue
        make, accepts = Image.OPEN[kind]
        accepted = not accepts or accepts(prefix)
        if isinstance(accepted, str):
            hints.append(accepted)
        elif accepted:
            if kind in CHECKS:
                stream.seek(0)
                CHECKS[kind](stream)
            stream.seek(0)
            try:
                return make(stream, path)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accepts:
                    hints.append(f"{kind}: {error}")
    if begins_as_video(prefix):
        raise ValueError("it begins as a video does; videos are given as videos, not as images")
    raise ValueError(f"expected one of {', '.join(FORMATS)}" + "".join(f"; {hint}" for hint in hints))


def orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8; None if there is none or if the EXIF data are damaged."""
    try:
        exif = image.info.get("exif")
        if isinstance(exif, bytes):
            check_directory(io.BytesIO(exif[6:] if exif[:6] == b"Exif\0\0" else exif))
        elif len(image.info.get("Raw profile type exif", "")) > MAX_PROFILE_CHARACTERS:
            return None
        found = image.getexif().get(ORIENTATION)
        return found if found in range(1, 9) else None
    except Exception:  # damaged EXIF data do not make the pixels unreadable
        return None


# checks of the structure


def check_directory(stream: BinaryIO) -> None:
    """ValueError if the first directory of a TIFF structure declares more data than it can hold.

    Entries may overlap, so that 65535 of them could each name the whole file.
    """
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return
    is_big = struct.unpack(order + "H", head[2:4])[0] == 43
    if is_big and len(head) < 16:
        return
    offset = struct.unpack(order + "Q", head[8:16])[0] if is_big else struct.unpack(order + "L", head[4:8])[0]
    size = stream.seek(0, io.SEEK_END)
    if offset >= size:
        return
    stream.seek(offset)
    count_format, entry_format = (order + "Q", order + "HHQ8x") if is_big else (order + "H", order + "HHL4x")
    raw = stream.read(struct.calcsize(count_format))
    count = struct.unpack(count_format, raw)[0] if len(raw) == struct.calcsize(count_format) else 0
    entry_size = struct.calcsize(entry_format)
    entries = stream.read(min(count, 2**16) * entry_size)
    declared = 0
    for first in range(0, len(entries) - entry_size + 1, entry_size):
        tag, kind, number = struct.unpack_from(entry_format, entries, first)
        if kind not in BYTE_TYPES and number > MAX_TAG_NUMBERS:
            raise ValueError(f"tag {tag} has {number} numbers; expected at most {MAX_TAG_NUMBERS}")
        declared += min(TYPE_BYTES.get(kind, 0) * number, size)
    if declared > 2 * size + 2**16:
        raise ValueError(f"its tags declare {declared} bytes in a file of {size}")


def _check_jpeg(stream: BinaryIO) -> None:
    """ValueError for too many segments or scans: each scan of a few bytes may cover the whole picture."""
    stream.seek(2)
    exif, exif_segments, progressive = b"", 0, False
    for _ in range(MAX_SEGMENTS):
        byte = stream.read(1)
        while byte and byte != b"\xff":  # as Pillow, which skips what is not a marker
            byte = stream.read(1)
        marker = stream.read(1)
        while marker == b"\xff":
            marker = stream.read(1)
        if not marker or marker in b"\xda\xd9":
            break
        if marker in b"\x00\x01" or 0xD0 <= marker[0] <= 0xD8:
            continue
        raw = stream.read(2)
        if len(raw) < 2:
            return
        body = stream.read(max(0, int.from_bytes(raw, "big") - 2))
        progressive = progressive or marker[0] in (0xC2, 0xC6, 0xCA, 0xCE)
        if marker == b"\xe1" and body[:6] == b"Exif\0\0":
            exif, exif_segments = exif + body[6:], exif_segments + 1
            if exif_segments > MAX_EXIF_SEGMENTS:
                raise ValueError(f"it has more than {MAX_EXIF_SEGMENTS} segments of EXIF data")
        elif marker == b"\xe2" and body[:4] == b"MPF\0":
            check_directory(io.BytesIO(body[4:]))
    else:
        raise ValueError(f"it has more than {MAX_SEGMENTS} segments before its pixels")
    check_directory(io.BytesIO(exif))
    if progressive and marker == b"\xda":
        _check_scans(stream.read())


def _check_scans(data: bytes) -> None:
    """`data`: what follows the first SOS marker of a progressive JPEG."""
    scans, offset, find = 1, 0, re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL).search
    while match := find(data, offset):
        marker = data[match.start() + 1]
        if marker == 0xD9:
            return
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
        offset = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")


def _check_gif(stream: BinaryIO) -> None:
    """ValueError for too many comments before the first frame: Pillow joins them in quadratic time."""
    head = stream.read(13)
    if len(head) < 13:
        return
    if head[10] & 128:
        stream.seek(3 << ((head[10] & 7) + 1), io.SEEK_CUR)
    total, blocks = 0, 0
    while (kind := stream.read(1)) and kind != b",":
        blocks += 1
        if kind == b"!":
            stream.read(1)
            while (size := stream.read(1)) and size[0]:
                stream.seek(size[0], io.SEEK_CUR)
                total, blocks = total + size[0], blocks + 1
                if max(total / MAX_GIF_EXTENSIONS, blocks / MAX_GIF_BLOCKS) > 1:
                    break
        if max(total / MAX_GIF_EXTENSIONS, blocks / MAX_GIF_BLOCKS) > 1:
            raise ValueError(
                f"it has more than {MAX_GIF_EXTENSIONS} bytes or {MAX_GIF_BLOCKS} blocks before its first frame"
            )


def _check_icon(stream: BinaryIO) -> None:
    """ValueError if an icon holds a larger picture than icons have: Pillow decodes it when it opens the file."""
    head = stream.read(6)
    for index in range(min(struct.unpack("<H", head[4:6])[0], 256) if len(head) == 6 else 0):
        stream.seek(6 + 16 * index)
        entry = stream.read(16)
        if len(entry) < 16:
            return
        stream.seek(struct.unpack("<L", entry[12:16])[0])
        picture = stream.read(24)
        is_png = picture[:8] == b"\x89PNG\r\n\x1a\n"
        if len(picture) < 24:
            continue
        sides = struct.unpack(">LL", picture[16:24]) if is_png else struct.unpack("<ll", picture[4:12])
        if max(map(abs, sides)) > MAX_ICON_SIDE * (1 if is_png else 2):  # a bitmap counts its mask as rows
            raise ValueError(f"its picture {index} is {sides[0]} x {sides[1]}; an icon has at most {MAX_ICON_SIDE}")


CHECKS = {
    "JPEG": _check_jpeg,
    "TIFF": check_directory,
    "GIF": _check_gif,
    "ICO": _check_icon,
}
