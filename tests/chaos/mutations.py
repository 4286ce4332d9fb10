"""Thousands of damaged and hostile image files, made from pictures that are rendered here.

Enters: a seed. Leaves: names and bytes; a name says what was done to what, so that one file can be made again
alone. All is drawn from the seed and the place in the corpus.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn_core.images import MAX_PIXELS

Mutation = Callable[[random.Random, bytes, bytes], bytes]


def corpus(num: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`num` mutated files, each of another draw; then nothing repeats but by chance."""
    bases = base_files()
    names = list(bases)
    for index in range(num):
        rng = random.Random(f"{seed}/{index}")
        base, other = names[index % len(names)], rng.choice(names)
        mutation = list(MUTATIONS)[index // len(names) % len(MUTATIONS)]
        data = MUTATIONS[mutation](rng, bases[base], bases[other])
        if base.startswith("png") and rng.random() < 0.7:  # or nothing but the checksums would ever be tried
            data = with_true_checksums(data)
        yield f"{index:05d}-{mutation}-{base}", data


# --- What is mutated


def render(height: int = 72, width: int = 96) -> Image.Image:
    """Ramps with two discs and a patch of noise."""
    rows, columns = np.mgrid[:height, :width]
    scene = np.stack([columns * 2 % 256, rows * 3 % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)
    for y, x, radius, colour in ((24, 30, 14, (220, 40, 30)), (50, 66, 18, (20, 180, 90))):
        scene[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = colour
    scene[8:20, 60:90] = np.random.default_rng(0).integers(0, 256, scene[8:20, 60:90].shape)
    return Image.fromarray(scene)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def base_files() -> dict[str, bytes]:
    """A file of each format and of the kinds that take another way through its decoder."""
    scene, other = render(), render().transpose(Image.Transpose.ROTATE_180)
    grey = scene.convert("L")
    alpha = scene.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = np.asarray(grey).astype(np.float32) / 255
    floats[::7, ::5] = np.nan
    floats[3, 3] = np.inf
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "a camera " * 20
    profile = bytes(range(256)) * 8
    palette = scene.quantize(32)
    frames = {"save_all": True, "append_images": [other]}
    return {
        "jpeg": encode(scene, "JPEG", quality=90),
        "jpeg-progressive": encode(scene, "JPEG", progressive=True),
        "jpeg-restart": encode(scene, "JPEG", restart_marker_blocks=3, subsampling=0),
        "jpeg-grey": encode(grey, "JPEG"),
        "jpeg-cmyk": encode(scene.convert("CMYK"), "JPEG"),
        "jpeg-exif-icc": encode(scene, "JPEG", exif=turned, icc_profile=profile, comment=b"hello"),
        "png": encode(scene, "PNG"),
        "png-palette-alpha": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "png-rgba": encode(alpha, "PNG"),
        "png-la": encode(alpha.convert("LA"), "PNG"),
        "png-16": encode(deep, "PNG"),
        "png-1": encode(scene.convert("1"), "PNG"),
        "png-exif-icc": encode(scene, "PNG", exif=turned, icc_profile=profile),
        "png-animated": encode(scene, "PNG", **frames),
        "webp": encode(scene, "WEBP"),
        "webp-lossless": encode(scene, "WEBP", lossless=True),
        "webp-alpha": encode(alpha, "WEBP", exif=turned, icc_profile=profile),
        "webp-animated": encode(scene, "WEBP", **frames),
        "gif": encode(scene, "GIF"),
        "gif-transparent": encode(palette, "GIF", transparency=3, interlace=1),
        "gif-animated": encode(scene, "GIF", **frames),
        "tiff": encode(scene, "TIFF"),
        "tiff-lzw": encode(scene, "TIFF", compression="tiff_lzw"),
        "tiff-deflate-turned": encode(scene, "TIFF", compression="tiff_adobe_deflate", exif=turned),
        "tiff-jpeg": encode(scene, "TIFF", compression="jpeg"),
        "tiff-packbits-cmyk": encode(scene.convert("CMYK"), "TIFF", compression="packbits"),
        "tiff-fax": encode(scene.convert("1"), "TIFF", compression="group4"),
        "tiff-16": encode(deep, "TIFF", compression="tiff_lzw"),
        "tiff-float-nan": encode(Image.fromarray(floats), "TIFF"),
        "tiff-pages": encode(scene, "TIFF", **frames),
        "bmp": encode(scene, "BMP"),
        "bmp-palette": encode(palette, "BMP"),
        "bmp-1": encode(scene.convert("1"), "BMP"),
    }


# --- What is done to them


def _truncate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 12)):
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def _damage_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Extremes within the first bytes, where the decisions are."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(mutant), 160))
        mutant[at] = rng.choice([0, 1, 2, 127, 128, 254, 255, rng.randrange(256)])
    return bytes(mutant)


def _absurd_size(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another width and height in every place where a format says them."""
    mutant = bytearray(data)
    places = list(_size_fields(data))
    sizes = [0, 1, 300, 4000, 7999, 8000, 8001, 16383, 30000, 65535, 2**31 - 1, 2**32 - 1]
    width, height = rng.choice(sizes), rng.choice(sizes)
    for at, layout in places:
        most = 2 ** (8 * struct.calcsize(layout)) - 1
        value = height if rng.random() < 0.5 else width
        struct.pack_into(layout, mutant, at, min(value, most))
    return with_true_checksums(bytes(mutant)) if data.startswith(b"\x89PNG") else bytes(mutant)


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))] + other[rng.randrange(len(other)) :]


def _zero_run(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 8, 64, 512, 4096]), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def _insert_garbage(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 3, 100, 5000])) + data[at:]


def _overwrite_run(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    garbage = rng.randbytes(min(rng.choice([2, 16, 256]), len(data) - start))
    return data[:start] + garbage + data[start + len(garbage) :]


def _remove_run(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 2, 31, 700]) :]


def _repeat_run(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data))
    run = data[start : start + rng.choice([1, 4, 60, 2000])]
    return data[:start] + run * rng.choice([2, 10, 200]) + data[start + len(run) :]


def _wrong_magic(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """What it is not, by its first bytes."""
    return other[: rng.choice([2, 3, 4, 8, 12, 16])] + data[rng.choice([2, 3, 4, 8, 12, 16]) :]


def _damage_metadata(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Within EXIF, ICC, TIFF directories or text, as far as there are any; else anywhere."""
    marks = [b"Exif\0\0", b"ICC_PROFILE", b"iCCP", b"eXIf", b"EXIF", b"ICCP", b"II*\0", b"ANIM", b"acTL"]
    starts = [data.index(mark) + len(mark) for mark in marks if mark in data] or [0]
    mutant = bytearray(data)
    start = rng.choice(starts)
    for _ in range(rng.randint(1, 20)):
        at = min(len(mutant) - 1, start + rng.randrange(200))
        mutant[at] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(mutant)


MUTATIONS: dict[str, Mutation] = {
    "truncate": _truncate,
    "flip-bits": _flip_bits,
    "damage-header": _damage_header,
    "absurd-size": _absurd_size,
    "splice": _splice,
    "zero-run": _zero_run,
    "insert-garbage": _insert_garbage,
    "overwrite-run": _overwrite_run,
    "remove-run": _remove_run,
    "repeat-run": _repeat_run,
    "wrong-magic": _wrong_magic,
    "damage-metadata": _damage_metadata,
}


def _size_fields(data: bytes) -> Iterator[tuple[int, str]]:
    """Where a whole file says how large its picture is, and how the number is written."""
    if data.startswith(b"\x89PNG"):
        yield from ((16, ">I"), (20, ">I"))
    elif data.startswith(b"GIF"):
        yield from ((6, "<H"), (8, "<H"))
        frame = data.find(b"\x2c\0\0\0\0")
        if frame > 0:
            yield from ((frame + 5, "<H"), (frame + 7, "<H"))
    elif data.startswith(b"BM"):
        yield from ((18, "<I"), (22, "<I"))
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while data[at + 1] not in (0xC0, 0xC1, 0xC2):
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield from ((at + 5, ">H"), (at + 7, ">H"))
    elif data.startswith(b"RIFF"):
        kind = data[12:16]
        yield from {b"VP8X": ((24, "<H"), (27, "<H")), b"VP8L": ((21, "<I"),)}.get(
            kind, ((26, "<H"), (28, "<H"))
        )
    else:  # a little-endian TIFF: rows and columns, and rows of a strip
        (directory,) = struct.unpack_from("<I", data, 4)
        (num_entries,) = struct.unpack_from("<H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind, _ = struct.unpack_from("<HHI", data, entry)
            if tag in (256, 257, 278):
                yield entry + 8, "<H" if kind == 3 else "<I"


def with_true_checksums(png: bytes) -> bytes:
    """Damage that has got past the checksums: what a hostile writer makes."""
    out, start = bytearray(png), 8
    while start + 12 <= len(out):
        end = start + 12 + int.from_bytes(out[start : start + 4], "big")
        if end <= len(out):
            out[end - 4 : end] = struct.pack(">I", zlib.crc32(out[start + 4 : end - 4]))
        start = end
    return bytes(out)


# --- What was never a picture, or is too much of one


def strangers() -> dict[str, bytes]:
    """Files that people find among their images."""
    html = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>"
    return {
        "zero-byte": b"",
        "zeros": bytes(10_000),
        "html": html,
        "svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "json": b'{"error": "AccessDenied"}',
        "heic": struct.pack(">I", 24) + b"ftypheic" + bytes(300),
        "avif": struct.pack(">I", 32) + b"ftypavif" + bytes(300),
        "mp4": struct.pack(">I", 32) + b"ftypisom" + bytes(300),
        "jpeg-2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(300),
        "jpeg-xl": b"\xff\x0a" + bytes(300),
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "riff-wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        **{f"random-{n}": random.Random(n).randbytes(n * 37) for n in range(1, 20)},
    }


def bombs() -> Iterator[tuple[str, bytes]]:
    """Little files of many pixels, which decode: as many as are taken at all, and one more row.

    WebP, progressive JPEG and a TIFF of a single strip are smaller: their decoders keep the picture more than
    once, so that 64 megapixels take up to a gigabyte (see MAX_DECODE_BYTES).
    """
    side = int(MAX_PIXELS**0.5)
    for rows in (side, side + 1):
        flat = Image.new("RGB", (side, rows), (90, 120, 150))
        palette = Image.new("P", (side, rows), 3)
        palette.putpalette([7, 8, 9] * 256)
        yield f"png-{rows}", encode(flat, "PNG", compress_level=1)
        yield f"png-palette-alpha-{rows}", encode(palette, "PNG", transparency=3, compress_level=1)
        yield f"gif-{rows}", encode(palette, "GIF")
        yield f"jpeg-{rows}", encode(flat, "JPEG", quality=50)
        yield f"tiff-{rows}", encode(flat, "TIFF", compression="tiff_lzw")
        floats = Image.new("F", (side, rows), 0.5)
        yield f"tiff-float-{rows}", encode(floats, "TIFF", compression="tiff_adobe_deflate")
        del flat, palette, floats
    yield "jpeg-cmyk", encode(Image.new("CMYK", (side, side), (9, 9, 9, 9)), "JPEG", quality=50)
    yield "png-rgba", encode(Image.new("RGBA", (side, side), (9, 9, 9, 90)), "PNG", compress_level=1)
    yield "webp", encode(Image.new("RGB", (4000, 4000), (90, 120, 150)), "WEBP", method=0)
    yield "webp-lossless", encode(Image.new("RGBA", (4000, 4000), (9, 9, 9, 9)), "WEBP", lossless=True)
    flat = Image.new("RGB", (6000, 5500), (90, 120, 150))
    yield "jpeg-progressive", encode(flat, "JPEG", progressive=True)
    yield "tiff-one-strip", encode(flat, "TIFF", compression="tiff_lzw", tiffinfo={278: 5500})
    yield "png-900-megapixels", encode(Image.new("1", (30000, 30000)), "PNG")
    yield "webp-268-megapixels", encode(Image.new("RGB", (16383, 16383)), "WEBP", lossless=True, method=0)
