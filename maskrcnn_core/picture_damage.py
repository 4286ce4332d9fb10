"""Damage that Pillow lets pass: a picture comes out, and part of it was never in the file.

Enters: a file's bytes, and what Pillow made of them. Leaves: whether something is missing. No more memory is
taken than for one picture.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

_CHECKED_PNG_CHUNKS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")

# Bytes that decode to something; then, for a decoder that waits for a restart marker, one that it may take.
_JPEG_FILLER: Final = b"\x5a" * 4096 + b"".join(
    b"\xff" + bytes([0xD0 + number]) + b"\x5a" * 512 for number in range(8)
)


def png_checksum_damage(data: bytes) -> str | None:
    """The first chunk that decides about pixels and has a wrong CRC; Pillow skips those of the pixel data."""
    start = 8
    for chunk, body in _png_chunks(data):
        if chunk in _CHECKED_PNG_CHUNKS:
            (checksum,) = struct.unpack_from(">I", data, start + 8 + len(body))
            if zlib.crc32(body, zlib.crc32(chunk)) != checksum:
                return f"chunk {chunk.decode()} at byte {start}"
        start += 12 + len(body)
    return None


def jpeg_is_too_short(data: bytes, image: JpegImageFile) -> bool:
    """Whether a JPEG that is not decoded yet cannot hold as many pixels as its header says.

    A block of 8×8 pixels takes a bit at the least, for no Huffman code is shorter (arithmetic coding is not
    judged). Spares the memory: of a progressive JPEG, all coefficients are kept.
    """
    if b"\xff\xc9" in data or b"\xff\xca" in data or not image.layer:
        return False
    width, height = image.size
    most_columns = max(columns for _, columns, _, _ in image.layer)
    most_rows = max(rows for _, _, rows, _ in image.layer)
    num_blocks = max(
        -(-width * columns // (8 * most_columns)) * -(-height * rows // (8 * most_rows))
        for _, columns, rows, _ in image.layer
    )
    return 8 * len(data) < num_blocks


def jpeg_lacks_rows(data: bytes, image: JpegImageFile) -> bool:
    """Whether a JPEG's data stop before its last row although it has an end marker.

    libjpeg then paints the rest mid-grey, and Pillow says nothing. A picture may be grey in its last corner
    by itself; so put bytes before the end marker: they change nothing behind a complete picture and show up
    in another. Leaves `image` with the pixels of that second look, which are the same if it is complete: two
    pictures at a time would take twice the memory.
    """
    width, height = image.size
    corner = np.asarray(image.crop((max(0, width - 8), height - 1, width, height)))
    if not np.isin(corner, (127, 128)).all() or (corner != corner[0, 0]).any():  # inks may be inverted
        return False
    digest = _digest(image)
    end = data.rfind(b"\xff\xd9")
    image.close()
    with JpegImageFile(io.BytesIO(data[:end] + _JPEG_FILLER + data[end:])) as longer:
        longer.load()
        if _digest(longer) != digest:
            return True
        image.im = longer.im
        return False


def png_lacks_rows(data: bytes, image: PngImageFile) -> bool:
    """Whether a PNG's compressed data end, as they say themselves, before its last row.

    Pillow leaves the rest zero. Only what is zero there, or interlaced, is unpacked once more to be counted.
    """
    width, height = image.size
    bit_depth, colour_type, interlaced = data[24], data[25], data[28]
    foot = np.asarray(image.crop((0, height - 1, width, height)))
    if foot.any() and not interlaced:
        return False
    bits = bit_depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    missing = sum(
        rows * (1 + -(-columns * bits // 8))
        for columns, rows in (_adam7_sizes(width, height) if interlaced else [(width, height)])
        if columns
    )
    unpacker = zlib.decompressobj()
    for chunk, body in _png_chunks(data):
        rest = bytes(body) if chunk == b"IDAT" else b""
        while rest and missing > 0 and not unpacker.eof:
            missing -= len(unpacker.decompress(rest, 1 << 20))
            rest = unpacker.unconsumed_tail
    return missing > 0


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of each chunk that is there whole."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return  # cut short, which the decoder will find
        yield kind, view[start + 8 : end - 4]
        start = end


def _adam7_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Columns and rows of each of the seven passes. Source: PNG specification, section 8.2."""
    first_and_step = (
        (0, 8, 0, 8),
        (4, 8, 0, 8),
        (0, 4, 4, 8),
        (2, 4, 0, 4),
        (0, 2, 2, 4),
        (1, 2, 0, 2),
        (0, 1, 1, 2),
    )
    return [
        (-(-(width - x) // dx) if width > x else 0, -(-(height - y) // dy) if height > y else 0)
        for x, dx, y, dy in first_and_step
    ]


def _digest(image: Image.Image) -> bytes:
    digest = hashlib.blake2b()
    for top in range(0, image.height, 64):
        digest.update(image.crop((0, top, image.width, min(image.height, top + 64))).tobytes())
    return digest.digest()
