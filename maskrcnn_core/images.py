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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

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

from maskrcnn_core.picture_damage import (
    jpeg_is_too_short,
    jpeg_lacks_rows,
    png_checksum_damage,
    png_lacks_rows,
)

MAX_PIXELS: Final = 64_000_000
"""Largest picture taken unless the caller says otherwise: 8000 × 8000; cameras go up to 61 megapixels."""

MAX_DECODE_BYTES: Final = 20 * MAX_PIXELS
"""What decoding a picture of MAX_PIXELS may take beside the file and the pixels that are given.

Measured with flat pictures of 64 megapixels (tests/chaos/test_hostile_images.py), per pixel: 4 bytes in most
formats, which is Pillow's own copy; 7 for a progressive JPEG with its coefficients, 12 with four inks; 16 for
WebP, whose library keeps the frame, the frame before, and a copy to hand out. The rest is room for error.
"""

_STRIP_PIXELS: Final = 640 * 480
"""Samples are converted about as many pixels at a time: most photographs of data sets at once, a larger one
in strips, so that no second copy of it is ever made.
"""

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
    picture = open_picture(data, max_pixels)
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    top = 0
    for strip in picture.strips():
        pixels[top : top + len(strip)] = strip
        top += len(strip)
    return pixels


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> "Picture":
    """The same as decode_image, with the pixels still in Pillow's hands: for who has a place for them.

    Raises:
        DecodeError: as decode_image; strips() may raise it too.
    """
    name, opener = _identify(data)
    if opener is PngImageFile and (place := png_checksum_damage(data)):
        raise DecodeError("corrupt", f"PNG is damaged: {place} has a wrong checksum; fetch it again")
    _ignore_pillow_warnings()
    with _refusing(name, data):
        if opener is WebPImageFile:  # whose decoder makes room for the pixels as it opens
            _check_size(name, _webp_size(data), max_pixels)
        with opener(io.BytesIO(data)) as image:
            _check_size(name, image.size, max_pixels)
            if isinstance(image, JpegImageFile) and jpeg_is_too_short(data, image):
                raise DecodeError(
                    "truncated",
                    f"JPEG of {len(data)} bytes cannot hold {image.width}×{image.height} pixels; "
                    "fetch it again",
                )
            orientation = _load(image)
            if (isinstance(image, JpegImageFile) and jpeg_lacks_rows(data, image)) or (
                isinstance(image, PngImageFile) and png_lacks_rows(data, image)
            ):
                raise DecodeError(
                    "truncated", f"{name} of {len(data)} bytes ends before its last row; fetch it again"
                )
            return Picture(name, data, image, orientation)


@dataclass(frozen=True)
class Picture:
    """A picture that decoded, as it is shown."""

    _name: str
    _data: bytes
    _image: ImageFile
    _orientation: int  # EXIF's, 1 to 8

    @property
    def height(self) -> int:
        return self._image.size[self._orientation < 5]

    @property
    def width(self) -> int:
        return self._image.size[self._orientation >= 5]

    def strips(self) -> Iterator[NDArray[np.uint8]]:
        """(h, W, 3) uint8 RGB from top to bottom, all heights together H; read-only where it may be.

        Raises:
            DecodeError: colours of a kind we do not take, or no memory for a strip.
        """
        with _refusing(self._name, self._data):
            to_rgb = _rgb_converter(self._image)
            for strip in _strips(self._image, self._orientation):
                yield to_rgb(strip)


@contextmanager
def _refusing(name: str, data: bytes) -> Iterator[None]:
    """Whatever goes wrong inside is a DecodeError outside."""
    try:
        yield
    except DecodeError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise DecodeError("too_large", f"{name} asks for too much memory: {_one_line(error)}") from error
    except Exception as error:  # Pillow's parsers raise whatever a malformed file makes them stumble over
        raise _refusal(name, data, error) from error


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
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


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas as the header gives them; 0×0 where it makes no sense.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return 0, 0


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


_UPRIGHT: Final = 1


def _load(image: ImageFile) -> int:
    """Decode; leaves the pixels as they are stored and gives the EXIF orientation, 1–8, they are shown in."""
    if isinstance(image, TiffImageFile):
        # Pillow would turn a TIFF as it loads, into a second copy: the orientation is taken from it before,
        # and its size, which is announced as if it were turned, set right.
        orientation = _pop_orientation(image)
        image.load()
        image._size = image.im.size
        return orientation
    image.load()
    return _pop_orientation(image)


def _pop_orientation(image: ImageFile) -> int:
    try:
        orientation = image.getexif().pop(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # damaged metadata, of which Pillow's parser raises anything, do not spoil a picture
        return _UPRIGHT
    return orientation if isinstance(orientation, int) and orientation in _TRANSPOSITIONS else _UPRIGHT


def _strips(image: Image.Image, orientation: int) -> Iterator[Image.Image]:
    """The picture as it is shown, cut into strips of about _STRIP_PIXELS from top to bottom."""
    width, height = image.size
    if orientation >= 5:  # rows that are shown are columns as stored
        width, height = height, width
    num_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        foot = min(height, top + num_rows)
        # Rows counted from the other end, for what is shown upside down or from the right.
        low, high = (height - foot, height - top) if orientation in (3, 4, 7, 8) else (top, foot)
        box = (0, low, width, high) if orientation < 5 else (low, 0, high, width)
        strip = image if num_rows >= height else image.crop(box)
        yield strip if orientation == _UPRIGHT else strip.transpose(_TRANSPOSITIONS[orientation])


def _rgb_converter(image: ImageFile) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """How strips of a decoded picture, of any of Pillow's modes, become (h, W, 3) uint8."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise DecodeError(
            "unsupported", "signed samples do not say what is black; convert the image to 8-bit RGB"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        to_grey = _grey_converter(image, num_bits=12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16)
        white_is_zero = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

        def from_grey(strip: Image.Image) -> NDArray[np.uint8]:
            grey = to_grey(np.asarray(strip))
            return np.repeat((255 - grey if white_is_zero else grey)[:, :, np.newaxis], 3, axis=2)

        return from_grey
    if image.has_transparency_data:
        return _on_white if _shows_alpha(image) else _without_alpha
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        raise DecodeError(
            "unsupported", f"colour mode {image.mode} is not taken; convert the image to 8-bit RGB"
        )
    return _opaque


def _opaque(strip: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _with_alpha(strip: Image.Image) -> Image.Image:
    if strip.mode == "La":  # grey premultiplied by alpha, which Pillow converts in two steps only
        strip = strip.convert("LA")
    return strip.convert("RGBA")


def _shows_alpha(image: Image.Image) -> bool:
    """Whether some pixels are seen through or not seen, and not all of them not at all."""
    lowest, highest = 255, 0
    for strip in _strips(image, _UPRIGHT):
        alpha = np.asarray(_with_alpha(strip).getchannel("A"))
        lowest, highest = min(lowest, int(alpha.min())), max(highest, int(alpha.max()))
    return (lowest, highest) not in ((255, 255), (0, 0))


def _without_alpha(strip: Image.Image) -> NDArray[np.uint8]:
    return _opaque(_with_alpha(strip))


def _on_white(strip: Image.Image) -> NDArray[np.uint8]:
    strip = _with_alpha(strip)
    canvas = Image.new("RGB", strip.size, "white")
    canvas.paste(strip, mask=strip.getchannel("A"))
    return np.asarray(canvas)


def _grey_converter(image: Image.Image, num_bits: int) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
    """Float, 32-bit or num_bits grey samples to 8 bits, which Pillow would clip instead of scale."""
    if image.mode == "F":
        return partial(_from_floats, *_float_range(image))
    if image.mode == "I":  # 32 unsigned bits, which Pillow takes for signed ones
        return lambda samples: (samples.view(np.uint32) >> 24).astype(np.uint8)
    return lambda samples: (samples >> (num_bits - 8)).astype(np.uint8)


def _float_range(image: Image.Image) -> tuple[float, float]:
    """The values that become 0 and 255."""
    low, high = np.inf, -np.inf
    for strip in _strips(image, _UPRIGHT):
        samples = np.asarray(strip)
        is_finite = np.isfinite(samples)
        low = min(low, float(np.min(samples, where=is_finite, initial=np.inf)))
        high = max(high, float(np.max(samples, where=is_finite, initial=-np.inf)))
    if low >= 0 and high <= 255:
        return 0.0, 1.0 if high <= 1 else 255.0
    return low, high


def _from_floats(low: float, high: float, samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale = 255 / (high - low) if high > low else 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        levels = (samples - np.float32(low)) * np.float32(scale)
    np.nan_to_num(levels, copy=False, nan=0.0).clip(0, 255, out=levels)
    grey: NDArray[np.uint8] = np.rint(levels, out=levels).astype(np.uint8)
    return grey
