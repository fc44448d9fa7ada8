"""The first bytes of media files: which are still images, and which are animated images."""

import os
import struct

from PIL import Image


HEAD = 2**16  # bytes at the start of a file that show what it is
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # formats of Pillow
STILL_BOXES = (b"avif", b"heic", b"heix", b"mif1")  # ISO-BMFF brands; "avis" is an image sequence
STILL_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"BM",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    *(b"P%d%c" % (number, space) for number in range(1, 7) for space in b" \t\r\n"),  # PNM
)


def image_kind(head: bytes) -> str | None:
    """ "still" or "animated" for a file that begins with these bytes; None if it is no image.

    A GIF is animated, also with one frame.
    """
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "animated"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "animated" if head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2 else "still"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "animated" if _has_animation_chunk(head) else "still"
    if head[4:8] == b"ftyp":
        return "still" if head[8:12] in STILL_BOXES else None
    return "still" if head.startswith(STILL_SIGNATURES) else None


def begins_as_video(head: bytes) -> bool:
    """Whether a file begins as an mp4, Matroska or AVI does, so that no FFmpeg takes it for a playlist.

    An mp4 may begin with a box of any name, such as one that spells #EXTM3U.
    """
    is_mp4 = head[:1] == b"\0" and head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
    return is_mp4 or head[:4] == b"\x1a\x45\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")


def _has_animation_chunk(head: bytes) -> bool:
    """Whether a PNG has the chunk acTL, which comes before its pixels."""
    position = 8
    while position + 8 <= len(head):
        length, kind = struct.unpack_from(">I4s", head, position)
        if kind in (b"acTL", b"IDAT"):
            return kind == b"acTL"
        position += 12 + length
    return False


def is_animated(image: Image.Image) -> bool:
    """Whether a PIL image has frames with times. Multi-picture JPEGs and the pages of a TIFF are none."""
    try:
        return image.format in ANIMATIONS and bool(getattr(image, "is_animated", False))
    except Exception:  # damaged and closed files raise all kinds of errors
        return False


def read_head(source) -> bytes:
    """The first bytes of a path, bytes, or a binary file that can seek, whose position is restored; else b""."""
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            return bytes(source[:HEAD])
        if isinstance(source, (str, os.PathLike)):
            if not os.path.isfile(source):
                return b""
            with open(source, "rb") as file:
                return file.read(HEAD)
        position = source.tell()
        source.seek(0)
        try:
            head = source.read(HEAD)
        finally:
            source.seek(position)
        return head if isinstance(head, bytes) else b""
    except (AttributeError, OSError, TypeError, ValueError):  # ValueError: closed, or a path with a null character
        return b""
