"""Encoded bytes of a photograph -> its pixels, 8-bit RGB, upright.

Enters: one file's bytes, from anywhere. Leaves: a uint8 array, or a DecodeError that says what is wrong.

Bytes from storage are hostile until decoded: a cut, flipped or crafted file must end in a DecodeError and
nothing else. Pillow decodes; which of its decoders is decided here, by the first bytes, so that no other is
reachable.
"""

import io
import re
import struct
import warnings
import zlib
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS: Final = 64_000_000
"""Largest picture taken unless the caller says otherwise. It takes 0.6 GB to decode, 1.3 GB as float TIFF."""

DecodeErrorKind = Literal["empty", "truncated", "corrupt", "unsupported", "too_large"]


class DecodeError(ValueError):
    """Bytes that are no picture we take. Its str is one line that a person can act on.

    Attributes:
        kind: `empty`, zero bytes; `truncated`, the data end early; `corrupt`, a decoder or checksum refuses
            them; `unsupported`, not an image, or a kind we do not take; `too_large`, over the pixel ceiling.
    """

    def __init__(self, kind: DecodeErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that a pickle can be read back
        self.kind: DecodeErrorKind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode one JPEG, PNG, WebP, GIF, BMP or TIFF file, whatever its name says.

    - Of an animation or a multi-page TIFF, the first frame.
    - EXIF orientation is applied. Damaged metadata are ignored; damaged pixels are not.
    - Transparency is composited on white, which is how viewers and annotation tools show it: the colour
      stored under a transparent pixel is whatever an editor left there. A picture without a single visible
      pixel is taken for one whose alpha was never set, and its alpha is dropped.
    - Integer samples of more than 8 bits keep their high byte. TIFF does not say which float is white:
      samples within 0–1 are scaled by 255, within 0–255 are rounded, any other range is stretched from its
      minimum to its maximum; NaN is black.
    - CMYK inks are taken for inverted in JPEG, as Adobe writes them. Colour profiles are not applied.

    Thread-safe. From the first call on, the process ignores Pillow's own warnings: they are about metadata,
    and whether a picture decodes must not depend on the warning filters that happen to be set.

    Args:
        data: the whole file.
        max_pixels: a picture of more pixels is refused before any is decoded. (Pillow by itself refuses more
            than 178 megapixels in some formats.)

    Returns:
        (H, W, 3) uint8, RGB, C-contiguous, writable, not shared.

    Raises:
        DecodeError: for every file that is not decoded whole; nothing else is raised for what the bytes are.
    """
    name, opener = _identify(data)
    if opener is PngImageFile:
        _check_png_checksums(data)
    _ignore_pillow_warnings()
    try:
        with opener(io.BytesIO(data)) as image:
            _check_size(name, image, max_pixels)
            image.load()
            pixels = _to_rgb(_upright(image))
        if opener is JpegImageFile and _lacks_rows(data, pixels):
            raise DecodeError(
                "truncated", f"JPEG of {len(data)} bytes ends before its last row; fetch it again"
            )
        return pixels
    except DecodeError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise DecodeError("too_large", f"{name} asks for too much memory: {_one_line(error)}") from error
    except Exception as error:  # Pillow's parsers raise whatever a malformed file makes them stumble over
        raise _refusal(name, data, error) from error


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            "too_large",
            f"{name} of {width}×{height} pixels is over the ceiling of {max_pixels / 1e6:g} megapixels; "
            "shrink it, or raise the ceiling if it is meant",
        )


# --- What the bytes are

_OPENERS: Final[tuple[tuple[bytes, str, type[ImageFile]], ...]] = (
    (b"\xff\xd8\xff", "JPEG", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (b"GIF87a", "GIF", GifImageFile),
    (b"GIF89a", "GIF", GifImageFile),
    (b"BM", "BMP", BmpImageFile),
    (b"II*\0", "TIFF", TiffImageFile),
    (b"MM\0*", "TIFF", TiffImageFile),
    (b"II+\0", "TIFF", TiffImageFile),  # BigTIFF
    (b"MM\0+", "TIFF", TiffImageFile),
)

_OTHERS: Final = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), name)
    for pattern, name in (
        (rb"....ftypavi[fs]", "an AVIF image"),
        (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC image"),
        (rb"....ftyp", "an MP4 or QuickTime video"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
        (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image"),
        (rb"8BPS", "a Photoshop document"),
        (rb"%PDF", "a PDF document"),
        (rb"PK\x03\x04", "a ZIP archive"),
        (rb"\x1f\x8b", "gzip data"),
        (rb"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
        (rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", "an HTML page"),
        (rb"\s*(<\?xml.*?>\s*)?(<!--.*?-->\s*)?(<!doctype svg.*?>\s*)?<svg", "an SVG drawing"),
        (rb"\s*<(\?xml|error>)", "an XML document"),
        (rb"[^\0-\x08\x0e-\x1a\x1c-\x1f\x7f]*$", "text"),
    )
)


def _identify(data: bytes) -> tuple[str, type[ImageFile]]:
    """The format's name and Pillow's class for it."""
    if not data:
        raise DecodeError("empty", "the file holds no bytes; fetch it again from where it came from")
    for magic, name, opener in _OPENERS:
        if data.startswith(magic):
            return name, opener
        if magic.startswith(data):
            raise DecodeError("truncated", f"the file ends after {len(data)} bytes, in a {name} header")
    if b"RIFF".startswith(data[:4]) and b"WEBP".startswith(data[8:12]):
        return "WebP", WebPImageFile
    if not data.strip(b"\0"):
        raise DecodeError(
            "corrupt", f"all {len(data)} bytes are zero, as after a failed copy; fetch it again"
        )
    head = data[:512].removeprefix(b"\xef\xbb\xbf")
    name = next((name for pattern, name in _OTHERS if pattern.match(head)), "no image format we know")
    raise DecodeError(
        "unsupported",
        f"the file looks like {name} (it begins {head[:40]!r}); want JPEG, PNG, WebP, GIF, BMP or TIFF",
    )


def _refusal(name: str, data: bytes, error: Exception) -> DecodeError:
    """What to say about a file with an image's first bytes that its decoder refuses."""
    reason = _one_line(error)
    if "truncated" in reason.lower() or _ends_early(name, data):
        return DecodeError(
            "truncated", f"{name} ends early, after {len(data)} bytes ({reason}); fetch it again"
        )
    if re.search(r"unsupported|not (yet )?supported|unknown pixel mode|cannot handle", reason, re.IGNORECASE):
        return DecodeError(
            "unsupported", f"{name} of a kind we do not take ({reason}); convert it to 8-bit RGB"
        )
    return DecodeError("corrupt", f"{name} is damaged ({reason}); fetch it again or replace it")


def _ends_early(name: str, data: bytes) -> bool:
    """Whether a refused file is shorter than it should be, as far as that can be told at a glance."""
    match name:
        case "JPEG":
            return b"\xff\xd9" not in data[-64:]
        case "PNG":
            return b"IEND" not in data[-64:]
        case "GIF":
            return b";" not in data[-4:]
        case "WebP":
            return len(data) < 8 + int.from_bytes(data[4:8], "little")
        case "BMP":
            return len(data) < max(54, int.from_bytes(data[2:6], "little"))
        case _:
            return _tiff_ends_early(data)


def _tiff_ends_early(data: bytes) -> bool:
    """Whether a TIFF's directory, which usually stands behind the pixels, or a value of it is missing."""
    order = "<" if data.startswith(b"II") else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}I", data, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", data, directory)
        entries = [
            struct.unpack_from(f"{order}HHII", data, directory + 2 + 12 * k) for k in range(num_entries)
        ]
    except struct.error:
        return True
    sizes = {
        3: 2,
        4: 4,
        5: 8,
        8: 2,
        9: 4,
        10: 8,
        11: 4,
        12: 8,
    }  # bytes of a value, by type; the others have one
    return any(
        count * sizes.get(value_type, 1) > 4 and place + count * sizes.get(value_type, 1) > len(data)
        for _, value_type, count, place in entries
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- Damage that Pillow lets pass

_CHECKED_PNG_CHUNKS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")


def _check_png_checksums(data: bytes) -> None:
    """Compare the CRC of every PNG chunk that decides about pixels; Pillow skips those of the pixel data."""
    view = memoryview(data)
    start = 8
    while start + 12 <= len(data):
        length, chunk = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return  # cut short, which the decoder will find
        if chunk in _CHECKED_PNG_CHUNKS:
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(view[start + 4 : end - 4]) != checksum:
                place = f"chunk {chunk.decode()} at byte {start}"
                raise DecodeError("corrupt", f"PNG is damaged: {place} has a wrong checksum; fetch it again")
        start = end


def _lacks_rows(data: bytes, pixels: NDArray[np.uint8]) -> bool:
    """Whether a JPEG's data stop before its last row although it has an end marker.

    libjpeg then paints the rest mid-grey, and Pillow says nothing. A picture may be grey at a border by
    itself; so put bytes before the end marker: they change nothing behind a complete picture and show up in
    another.
    """
    borders = (pixels[-1], pixels[0], pixels[:, -1], pixels[:, 0])  # which is last depends on the orientation
    if not any((border == 128).all() for border in borders):
        return False
    end = data.rfind(b"\xff\xd9")
    with JpegImageFile(io.BytesIO(data[:end] + b"\x5a" * 4096 + data[end:])) as image:
        return not np.array_equal(pixels, _to_rgb(_upright(image)))


def _ignore_pillow_warnings() -> None:
    """Put a filter for Pillow's warnings before all others, unless it is there already.

    Not with `warnings.catch_warnings`: it swaps the filters of the whole process, and where two threads
    overlap the wrong ones stay behind.
    """
    ours = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if not warnings.filters or warnings.filters[0] != ours:
        warnings.filterwarnings("ignore", module=r"PIL\.")


# --- Samples to 8-bit RGB

_TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of the last two


def _upright(image: ImageFile) -> Image.Image:
    """The picture as EXIF orientation 1–8 wants it shown. (Pillow has turned a TIFF by itself.)"""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata, of which Pillow's parser raises anything, do not spoil a picture
        return image
    transposition = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a decoded picture in any of Pillow's modes."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise DecodeError(
            "unsupported", "signed samples do not say what is black; convert the image to 8-bit RGB"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _deep_grey(image, num_bits=12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.has_transparency_data:
        image = _on_white(image)
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        raise DecodeError(
            "unsupported", f"colour mode {image.mode} is not taken; convert the image to 8-bit RGB"
        )
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white; drop an alpha that shows nothing at all."""
    if image.mode == "La":  # grey premultiplied by alpha, which Pillow converts in two steps only
        image = image.convert("LA")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() in ((255, 255), (0, 0)):
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=alpha)
    return canvas


def _deep_grey(image: Image.Image, num_bits: int) -> NDArray[np.uint8]:
    """(H, W) uint8 of float, 32-bit or num_bits grey samples, which Pillow would clip instead of scale."""
    samples = np.asarray(image)
    if image.mode == "F":
        return _from_floats(samples)
    if image.mode == "I":  # 32 unsigned bits, which Pillow takes for signed ones
        return (samples.view(np.uint32) >> 24).astype(np.uint8)
    return (samples >> (num_bits - 8)).astype(np.uint8)


def _from_floats(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    is_finite = np.isfinite(samples)
    low = float(np.min(samples, where=is_finite, initial=np.inf))
    high = float(np.max(samples, where=is_finite, initial=-np.inf))
    if low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scale = 255 / (high - low) if high > low else 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        levels = (samples - np.float32(low)) * np.float32(scale)
    levels = np.nan_to_num(levels, nan=0.0).clip(0, 255)
    grey: NDArray[np.uint8] = np.rint(levels).astype(np.uint8)
    return grey
