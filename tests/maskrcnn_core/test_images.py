"""decode_image against hand-made files, torchvision's own decoders, and damage of every kind."""

import io
import pickle
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_gif, decode_jpeg, decode_png, decode_webp

from maskrcnn_core import images
from maskrcnn_core.images import DecodeError, DecodeErrorKind, decode_image, open_picture
from schemas.labels import ErrorKind
from tests.chaos.mutations import corpus, strangers, with_true_checksums

Pixels = NDArray[np.uint8]

# torchvision's decoders are an oracle here and nothing else; they will move to another package one day
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def make_photo(height: int = 40, width: int = 56) -> Pixels:
    """Ramps with a patch of noise: no two rows or columns are alike."""
    rows, columns = np.mgrid[:height, :width]
    photo = np.stack([columns * 4 % 256, rows * 5 % 256, (rows + columns) * 2 % 256], axis=-1).astype(
        np.uint8
    )
    photo[10:25, 15:40] = np.random.default_rng(0).integers(0, 256, photo[10:25, 15:40].shape)
    return photo


PHOTO = make_photo()
OTHER = PHOTO[::-1, ::-1].copy()


def encode(pixels: NDArray[Any] | Image.Image, format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_png(
    width: int, height: int, bit_depth: int, colour_type: int, rows: list[bytes], *extra: bytes
) -> bytes:
    """A PNG written by hand: rows are raw samples; extra chunks (name and body) come before the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [header, *extra, data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def make_interlaced_png(side: int, passes: bytes) -> bytes:
    """Square, 8-bit grey; passes are filter bytes and samples."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT" + zlib.compress(passes), b"IEND")
    )


def make_tiff(
    samples: NDArray[Any],
    bits: int,
    sample_format: int = 1,
    photometric: int = 1,
    order: Literal["<", ">"] = "<",
    raw: bytes = b"",
) -> bytes:
    """An uncompressed grey TIFF of one strip, written by hand."""
    height, width = samples.shape
    strip = raw or samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    entries |= {277: 1, 278: height, 279: len(strip), 339: sample_format}
    directory = struct.pack(f"{order}H", len(entries))
    for tag, value in entries.items():
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(strip))
    return header + strip + directory + bytes(4)


def make_files() -> dict[str, bytes]:
    """One small file of every format and of the kinds that take another way through its decoder."""
    photo, other = Image.fromarray(PHOTO), Image.fromarray(OTHER)
    rgba = Image.fromarray(np.dstack([PHOTO, PHOTO[..., 0]]))
    return {
        "jpeg": encode(photo, "JPEG", quality=90),
        "progressive jpeg": encode(photo, "JPEG", progressive=True),
        "cmyk jpeg": encode(photo.convert("CMYK"), "JPEG"),
        "png": encode(photo, "PNG"),
        "palette png": encode(rgba.quantize(32), "PNG"),
        "apng": encode(photo, "PNG", save_all=True, append_images=[other]),
        "webp": encode(photo, "WEBP"),
        "lossless webp": encode(rgba, "WEBP", lossless=True),
        "animated webp": encode(photo, "WEBP", save_all=True, append_images=[other], lossless=True),
        "gif": encode(photo, "GIF"),
        "animated gif": encode(photo, "GIF", save_all=True, append_images=[other]),
        "bmp": encode(photo, "BMP"),
        "rle bmp": encode(photo.quantize(16), "BMP"),
        "tiff": encode(photo, "TIFF"),
        "deflate tiff": encode(photo, "TIFF", compression="tiff_deflate"),
        "lzw tiff": encode(photo, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encode(photo, "TIFF", compression="jpeg"),
        "16-bit tiff": make_tiff(PHOTO[..., 0].astype(np.uint16) * 257, 16),
    }


FILES = make_files()


def error_of(data: bytes, **options: Any) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def outcome_of(data: bytes, **options: Any) -> Pixels | DecodeError:
    try:
        return decode_image(data, **options)
    except DecodeError as error:
        return error


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def pixels_of(tensor: torch.Tensor) -> Pixels:
    pixels: Pixels = tensor.permute(1, 2, 0).numpy()
    return pixels


class TestPictures:
    @pytest.mark.parametrize(
        ("format", "options"),
        [
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("BMP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_deflate"}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    def test_a_lossless_format_gives_back_every_pixel(self, format: str, options: dict[str, Any]) -> None:
        decoded = decode_image(encode(PHOTO, format, **options))
        np.testing.assert_array_equal(decoded, PHOTO)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        assert decoded.flags.writeable

    def test_a_gif_gives_back_every_pixel_of_a_palette(self) -> None:
        few_colours = np.array([[0, 0, 0], [255, 0, 0], [0, 200, 10], [9, 9, 9]], np.uint8)[PHOTO[..., 0] % 4]
        np.testing.assert_array_equal(decode_image(encode(few_colours, "GIF")), few_colours)

    @pytest.mark.parametrize("name", ["jpeg", "progressive jpeg"])
    def test_a_jpeg_is_what_torchvision_decodes(self, name: str) -> None:
        expected = pixels_of(decode_jpeg(tensor_of(FILES[name]), mode=ImageReadMode.RGB))
        np.testing.assert_array_equal(decode_image(FILES[name]), expected)

    @pytest.mark.parametrize("name", ["webp", "gif", "png", "apng"])
    def test_other_formats_are_what_torchvision_decodes(self, name: str) -> None:
        decoder = {"webp": decode_webp, "gif": decode_gif, "png": decode_png, "apng": decode_png}[name]
        expected = pixels_of(decoder(tensor_of(FILES[name])))
        np.testing.assert_array_equal(decode_image(FILES[name]), expected)

    def test_real_photographs_are_what_torchvision_decodes(self, shared_data: Path) -> None:
        photographs = sorted((shared_data / "coco_photos").glob("*/*.jpg"))[::8]
        assert photographs
        for path in photographs:
            data = path.read_bytes()
            expected = decode_jpeg(tensor_of(data), mode=ImageReadMode.RGB, apply_exif_orientation=True)
            np.testing.assert_array_equal(decode_image(data), pixels_of(expected))

    @pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
    @pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "JPEG"])
    def test_the_thinnest_pictures_decode(self, format: str, size: tuple[int, int]) -> None:
        assert decode_image(encode(Image.new("RGB", size), format)).shape == (size[1], size[0], 3)


class TestOrientation:
    # EXIF 2.3, tag 0x0112: which side of the scene row 0 and column 0 of the stored picture show
    SIDES: ClassVar = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }

    def stored_as(self, orientation: int, scene: Pixels) -> Pixels:
        """The scene as a camera with this orientation stores it."""
        row_side, column_side = self.SIDES[orientation]
        stored = scene if row_side in ("top", "bottom") else scene.transpose(1, 0, 2)
        if row_side in ("bottom", "right"):
            stored = stored[::-1]
        if column_side in ("bottom", "right"):
            stored = stored[:, ::-1]
        return np.ascontiguousarray(stored)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize(
        ("format", "options"),
        [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 100})],
    )
    def test_a_picture_comes_out_upright(
        self, orientation: int, format: str, options: dict[str, Any]
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(self.stored_as(orientation, PHOTO))
        decoded = decode_image(encode(stored, format, exif=exif, **options))
        if format == "JPEG":  # colours are stored at half resolution: judge by the scene's bright and dark
            assert decoded.shape == PHOTO.shape
            assert np.corrcoef(decoded.mean(-1).ravel(), PHOTO.mean(-1).ravel())[0, 1] > 0.95
        else:
            np.testing.assert_array_equal(decoded, PHOTO)

    def test_sixteen_bit_grey_is_turned_too(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        grey = Image.fromarray(self.stored_as(6, PHOTO)[..., 0].astype(np.uint16) * 257)
        for format in ("PNG", "TIFF"):
            np.testing.assert_array_equal(
                decode_image(encode(grey, format, exif=exif))[..., 0], PHOTO[..., 0]
            )

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_orientation_that_does_not_exist_is_ignored(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode_image(encode(PHOTO, "PNG", exif=exif)), PHOTO)

    @pytest.mark.parametrize(
        "damage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
    )
    def test_damaged_exif_does_not_spoil_a_picture(self, damage: bytes) -> None:
        plain = encode(PHOTO, "JPEG")
        segment = b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage
        np.testing.assert_array_equal(decode_image(plain[:2] + segment + plain[2:]), decode_image(plain))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_picture_too_large_for_one_strip_is_turned_strip_by_strip(
        self, orientation: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(self.stored_as(orientation, PHOTO))
        monkeypatch.setattr(images, "_STRIP_PIXELS", 5 * PHOTO.shape[1])
        for format in ("PNG", "TIFF", "BMP"):
            options = {} if format == "BMP" else {"exif": exif}
            picture = open_picture(encode(stored, format, **options))
            strips = list(picture.strips())
            expected = PHOTO if format != "BMP" else np.asarray(stored)
            assert len(strips) > 7
            assert (picture.height, picture.width) == expected.shape[:2]
            np.testing.assert_array_equal(np.concatenate(strips), expected)


class TestStrips:
    """A large picture is converted piece by piece; no piece may decide for itself what the whole shows."""

    @pytest.fixture(autouse=True)
    @staticmethod
    def _one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "_STRIP_PIXELS", 1)

    def test_floats_are_scaled_by_the_range_of_the_whole(self) -> None:
        tiff = make_tiff(np.array([[-1.0, 0.0], [0.5, 3.0]], np.float32), 32, sample_format=3)
        assert decode_image(tiff)[..., 0].tolist() == [[0, 64], [96, 255]]

    def test_alpha_counts_if_it_shows_anywhere(self) -> None:
        rgba = np.array([[[1, 2, 3, 0]], [[4, 5, 6, 255]]], np.uint8)
        assert decode_image(encode(rgba, "PNG")).tolist() == [[[255, 255, 255]], [[4, 5, 6]]]
        rgba[..., 3] = 0
        assert decode_image(encode(rgba, "PNG")).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]

    @pytest.mark.parametrize("name", FILES)
    def test_every_kind_of_file_gives_the_same_pixels(self, name: str) -> None:
        in_rows = decode_image(FILES[name])
        with pytest.MonkeyPatch.context() as whole:
            whole.setattr(images, "_STRIP_PIXELS", 1 << 20)
            np.testing.assert_array_equal(in_rows, decode_image(FILES[name]))


class TestColours:
    def test_grey_and_one_bit_become_equal_channels(self) -> None:
        grey = np.array([[0, 7], [200, 255]], np.uint8)
        for format in ("PNG", "TIFF", "BMP", "GIF"):
            np.testing.assert_array_equal(decode_image(encode(grey, format)), np.dstack([grey] * 3))
        bits = make_png(9, 2, 1, 0, [b"\x80\x80", b"\x01\x00"])
        np.testing.assert_array_equal(
            decode_image(bits)[..., 0], [[255, 0, 0, 0, 0, 0, 0, 0, 255], [0, 0, 0, 0, 0, 0, 0, 255, 0]]
        )

    def test_a_palette_is_looked_up(self) -> None:
        palette = b"PLTE" + bytes([10, 20, 30, 40, 50, 60])
        decoded = decode_image(make_png(2, 1, 8, 3, [b"\x01\x00"], palette))
        assert decoded.tolist() == [[[40, 50, 60], [10, 20, 30]]]

    def test_transparent_palette_entries_show_white(self) -> None:
        palette, alpha = b"PLTE" + bytes([10, 20, 30, 40, 50, 60]), b"tRNS" + bytes([255, 0])
        decoded = decode_image(make_png(2, 1, 8, 3, [b"\x01\x00"], palette, alpha))
        assert decoded.tolist() == [[[255, 255, 255], [10, 20, 30]]]

    def test_half_transparent_red_is_pink(self) -> None:
        rgba = np.array([[[255, 0, 0, 128], [1, 2, 3, 255], [9, 9, 9, 0]]], np.uint8)
        for data in (
            encode(rgba, "PNG"),
            encode(rgba, "TIFF"),
            encode(rgba, "WEBP", lossless=True, exact=True),
        ):
            assert decode_image(data).tolist() == [[[255, 127, 127], [1, 2, 3], [255, 255, 255]]]

    def test_grey_with_alpha_is_composited(self) -> None:
        decoded = decode_image(make_png(3, 1, 8, 4, [bytes([100, 255, 100, 0, 0, 128])]))
        assert decoded[..., 0].tolist() == [[100, 255, 127]]

    @pytest.mark.parametrize(
        ("colour_type", "row", "key"),
        [
            (0, bytes([50, 60]), struct.pack(">H", 50)),
            (2, bytes([5, 6, 7, 60, 60, 60]), struct.pack(">HHH", 5, 6, 7)),
        ],
    )
    def test_a_png_colour_key_shows_white(self, colour_type: int, row: bytes, key: bytes) -> None:
        decoded = decode_image(make_png(2, 1, 8, colour_type, [row], b"tRNS" + key))
        assert decoded.tolist() == [[[255, 255, 255], [60, 60, 60]]]

    def test_a_picture_without_one_visible_pixel_keeps_its_colours(self) -> None:
        invisible = np.dstack([PHOTO, np.zeros(PHOTO.shape[:2], np.uint8)])
        np.testing.assert_array_equal(decode_image(encode(invisible, "PNG")), PHOTO)

    @pytest.mark.parametrize(
        ("ink", "colour"),
        [
            ((0, 0, 0, 0), (255, 255, 255)),
            ((255, 0, 0, 0), (0, 255, 255)),
            ((0, 255, 0, 0), (255, 0, 255)),
            ((0, 0, 255, 0), (255, 255, 0)),
            ((0, 0, 0, 255), (0, 0, 0)),
            ((0, 0, 0, 100), (155, 155, 155)),
        ],
    )
    def test_cmyk_inks_take_light_away(self, ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
        sheet = Image.new("CMYK", (16, 16), ink)
        jpeg = encode(sheet, "JPEG", quality=100)
        assert b"Adobe" in jpeg  # the marker that says inks are inverted
        for data in (jpeg, encode(sheet, "TIFF")):
            assert np.abs(decode_image(data).astype(int) - colour).max() <= 2

    def test_ycck_jpeg_is_converted_by_way_of_cmyk(self) -> None:
        # Adobe's YCCK: the amounts of cyan, magenta and yellow as if they were R, G, B, and K inverted
        cyan, magenta, yellow = 25.0, 155.0, 215.0
        luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
        chroma = (128 + (yellow - luma) / 1.772, 128 + (cyan - luma) / 1.402)
        stored = [round(value) for value in (luma, *chroma, 255)]
        # Pillow inverts what it writes, and calls it CMYK (transform 0) in the Adobe marker's last byte
        jpeg = bytearray(
            encode(Image.new("CMYK", (16, 16), tuple(255 - v for v in stored)), "JPEG", quality=100)
        )
        transform = jpeg.index(b"Adobe") + 11
        assert jpeg[transform] == 0
        jpeg[transform] = 2
        decoded = decode_image(bytes(jpeg))
        assert np.abs(decoded.astype(int) - (255 - cyan, 255 - magenta, 255 - yellow)).max() <= 3
        assert (
            np.abs(
                decoded.astype(int) - pixels_of(decode_jpeg(tensor_of(bytes(jpeg)), mode=ImageReadMode.RGB))
            ).max()
            <= 1
        )


class TestDeepSamples:
    VALUES = np.array([[0x0000, 0x00FF, 0x0100], [0x80FF, 0xFEFF, 0xFFFF]], np.uint16)
    HIGH_BYTES: ClassVar = [[0x00, 0x00, 0x01], [0x80, 0xFE, 0xFF]]

    def test_sixteen_bit_grey_keeps_its_high_byte(self) -> None:
        rows = [row.astype(">u2").tobytes() for row in self.VALUES]
        files = [
            make_png(3, 2, 16, 0, rows),
            make_tiff(self.VALUES, 16),
            make_tiff(self.VALUES, 16, order=">"),
        ]
        for data in (*files, encode(self.VALUES, "TIFF", compression="tiff_lzw")):
            np.testing.assert_array_equal(decode_image(data), np.dstack([self.HIGH_BYTES] * 3))

    def test_sixteen_bit_colour_and_alpha_keep_their_high_bytes(self) -> None:
        rgb = make_png(1, 1, 16, 2, [struct.pack(">HHH", 0x12FF, 0x8000, 0xFFFF)])
        assert decode_image(rgb).tolist() == [[[0x12, 0x80, 0xFF]]]
        rgba = make_png(2, 1, 16, 6, [struct.pack(">8H", 0x12FF, 0x8000, 0xFFFF, 0xFFFF, 1, 1, 1, 0)])
        assert decode_image(rgba).tolist() == [[[0x12, 0x80, 0xFF], [255, 255, 255]]]
        grey_alpha = make_png(2, 1, 16, 4, [struct.pack(">4H", 0x80FF, 0xFFFF, 0x80FF, 0)])
        assert decode_image(grey_alpha)[..., 0].tolist() == [[0x80, 255]]

    def test_twelve_bit_grey_is_scaled_by_its_own_range(self) -> None:
        samples = np.array([[0x000, 0xFFF], [0x800, 0x7F0]], np.uint16)
        packed = bytes.fromhex("000fff") + bytes.fromhex("8007f0")
        assert decode_image(make_tiff(samples, 12, raw=packed))[..., 0].tolist() == [[0, 255], [0x80, 0x7F]]

    def test_thirty_two_bit_grey_keeps_its_highest_byte(self) -> None:
        samples = np.array([[0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]], np.uint32)
        assert decode_image(make_tiff(samples, 32))[..., 0].tolist() == [[0, 127, 128, 255]]

    def test_a_white_is_zero_tiff_is_inverted(self) -> None:
        decoded = decode_image(make_tiff(self.VALUES, 16, photometric=0))
        np.testing.assert_array_equal(decoded[..., 0], 255 - np.array(self.HIGH_BYTES))
        eight_bit = make_tiff(np.array([[0, 40]], np.uint8), 8, photometric=0)
        assert decode_image(eight_bit)[..., 0].tolist() == [[255, 215]]

    @pytest.mark.parametrize(
        ("samples", "levels"),
        [
            ([0.0, 0.5, 1.0], [0, 128, 255]),
            ([0.0, 0.2, 0.2], [0, 51, 51]),
            ([0.0, 100.4, 200.6], [0, 100, 201]),
            ([-1.0, 0.0, 1.0], [0, 128, 255]),
            ([1000.0, 2000.0, 3000.0], [0, 128, 255]),
            ([0.0, np.nan, 1.0], [0, 0, 255]),
            ([-np.inf, 0.5, np.inf], [0, 128, 255]),
            ([-3e38, 0.0, 3e38], [0, 128, 255]),
            ([np.nan, np.nan, np.nan], [0, 0, 0]),
            ([700.0, 700.0, 700.0], [0, 0, 0]),
        ],
    )
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_floats_are_scaled_to_eight_bits(
        self, samples: list[float], levels: list[int], order: Literal["<", ">"]
    ) -> None:
        tiff = make_tiff(np.array([samples], np.float32), 32, sample_format=3, order=order)
        assert decode_image(tiff)[..., 0].tolist() == [levels]

    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
    def test_signed_samples_are_refused(self, dtype: Any) -> None:
        tiff = make_tiff(np.zeros((2, 2), dtype), 8 * np.dtype(dtype).itemsize, sample_format=2)
        assert error_of(tiff).kind == "unsupported"

    def test_a_pixel_layout_that_pillow_does_not_know_is_unsupported(self) -> None:
        assert error_of(make_tiff(np.zeros((2, 2), np.float64), 64, sample_format=3)).kind == "unsupported"
        assert error_of(encode(Image.new("LAB", (4, 4)), "TIFF")).kind == "unsupported"


class TestFirstFrames:
    @pytest.mark.parametrize(
        ("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("GIF", {})]
    )
    def test_only_the_first_frame_is_taken(self, format: str, options: dict[str, Any]) -> None:
        red, blue = np.full((8, 9, 3), [200, 0, 0], np.uint8), np.full((8, 9, 3), [0, 0, 200], np.uint8)
        data = encode(red, format, save_all=True, append_images=[Image.fromarray(blue)], **options)
        np.testing.assert_array_equal(decode_image(data), red)


class TestSize:
    @pytest.fixture(scope="class")
    @staticmethod
    def bomb() -> bytes:
        """120 kB of PNG that unfold to 900 megapixels."""
        return make_png(30000, 30000, 1, 0, [bytes(3750)] * 30000)

    def test_a_png_bomb_is_refused_by_its_header(self, bomb: bytes) -> None:
        assert len(bomb) < 200_000
        error = error_of(bomb)
        assert error.kind == "too_large"
        assert "30000×30000" in str(error)
        assert "64 megapixels" in str(error)

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_the_ceiling_is_a_number_of_pixels_in_every_format(self, format: str) -> None:
        data = encode(PHOTO, format)
        num_pixels = PHOTO.shape[0] * PHOTO.shape[1]
        assert decode_image(data, max_pixels=num_pixels).shape == PHOTO.shape
        assert error_of(data, max_pixels=num_pixels - 1).kind == "too_large"

    def test_the_ceiling_holds_for_a_turned_picture(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(PHOTO, "JPEG", exif=exif)
        assert error_of(data, max_pixels=PHOTO.shape[0] * PHOTO.shape[1] - 1).kind == "too_large"

    def test_a_gif_that_claims_a_giant_frame_is_too_large(self) -> None:
        data = bytearray(encode(Image.new("P", (10, 10)), "GIF"))
        frame = data.index(b"\x2c\0\0\0\0")
        data[frame + 5 : frame + 9] = struct.pack("<HH", 65535, 65535)
        assert error_of(bytes(data)).kind == "too_large"


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    def test_a_file_cut_anywhere_is_truncated_or_still_whole(self, name: str) -> None:
        data, whole = FILES[name], decode_image(FILES[name])
        for length in [*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 20, len(data))]:
            outcome = outcome_of(data[:length])
            if isinstance(outcome, DecodeError):
                assert outcome.kind == "truncated", (length, outcome)
            else:
                np.testing.assert_array_equal(outcome, whole, err_msg=f"cut at {length}")

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_a_jpeg_with_its_lower_half_missing_is_not_half_grey(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(PHOTO, "JPEG", quality=90, exif=exif)
        error = error_of(
            data[: 2 * len(data) // 3] + b"\xff\xd9"
        )  # an end marker, as some downloaders put it
        assert error.kind == "truncated"

    def test_a_jpeg_that_is_grey_at_its_foot_is_whole(self) -> None:
        photo = PHOTO.copy()
        photo[-16:] = 128
        for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
            assert (decode_image(encode(photo, "JPEG", **options))[-4:] == 128).all()
        assert (decode_image(encode(Image.new("L", (50, 40), 128), "JPEG")) == 128).all()

    def test_a_jpeg_with_restart_markers_and_its_end_missing_is_truncated(self) -> None:
        data = encode(PHOTO, "JPEG", restart_marker_blocks=2)
        half = data.index(b"\xff\xd4")
        assert error_of(data[:half] + b"\xff\xd9").kind == "truncated"
        assert decode_image(data).shape == PHOTO.shape

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 1}])
    def test_a_jpeg_of_many_pixels_and_few_bytes_is_refused_before_it_is_decoded(
        self, options: dict[str, Any]
    ) -> None:
        flat = encode(Image.new("RGB", (3000, 2000), (9, 9, 9)), "JPEG", **options)
        assert decode_image(flat).shape == (2000, 3000, 3)
        error = error_of(flat[:3000])  # 3000 × 2000 pixels are 94,000 blocks, 11,750 bytes
        assert error.kind == "truncated"
        assert "3000 bytes cannot hold 3000×2000 pixels" in str(error)

    def test_a_single_row_that_stops_halfway_is_truncated(self) -> None:
        row = np.repeat(PHOTO[20:21], 20, axis=1)
        data = encode(row, "JPEG")
        assert error_of(data[: 3 * len(data) // 4] + b"\xff\xd9").kind == "truncated"

    @pytest.mark.parametrize(
        ("bit_depth", "colour_type", "samples"), [(8, 2, 3), (8, 0, 1), (1, 0, 1), (16, 6, 8)]
    )
    def test_a_png_whose_compressed_data_end_early_is_truncated(
        self, bit_depth: int, colour_type: int, samples: int
    ) -> None:
        row = bytes([77] * samples * 8)
        good = make_png(8 if bit_depth > 1 else 64 * samples, 4, bit_depth, colour_type, [row] * 4)
        assert decode_image(good).shape[0] == 4
        header = good[: 16 + 4] + struct.pack(">I", 6) + good[24:]
        assert error_of(with_true_checksums(header)).kind == "truncated"

    def test_a_png_that_is_black_at_its_foot_is_whole(self) -> None:
        photo = PHOTO.copy()
        photo[-5:] = 0
        np.testing.assert_array_equal(decode_image(encode(photo, "PNG")), photo)

    def test_an_interlaced_png_is_whole_with_all_its_passes_and_truncated_without(self) -> None:
        # Adam7 of 3 x 3 grey pixels: passes 1, 4, 5, 6 and 7 have rows, 2 and 3 have none
        passes = [b"\0\x01", b"\0\x03", b"\0\x07\x09", b"\0\x02", b"\0\x08", b"\0\x04\x05\x06"]
        whole = make_interlaced_png(3, b"".join(passes))
        assert decode_image(whole)[..., 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        assert error_of(make_interlaced_png(3, b"".join(passes[:-1]))).kind == "truncated"

    def test_every_flipped_bit_of_png_pixel_data_is_corrupt(self) -> None:
        data = make_png(4, 4, 8, 0, [bytes([k, 50, 90, 200]) for k in range(4)])
        start = data.index(b"IDAT") + 4
        for bit in range(8 * start, 8 * (data.index(b"IEND") - 4)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            error = error_of(bytes(flipped))
            assert error.kind == "corrupt"
            assert "IDAT" in str(error)

    def test_no_bytes_are_empty(self) -> None:
        assert error_of(b"").kind == "empty"

    def test_zero_bytes_only_are_corrupt(self) -> None:
        error = error_of(bytes(5000))
        assert error.kind == "corrupt"
        assert "5000 bytes are zero" in str(error)

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "an HTML page"),
            (b"\xef\xbb\xbf\r\n <html lang='en'>", "an HTML page"),
            (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "an XML document"),
            (
                b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
                "an SVG drawing",
            ),
            (b'{"message": "Not Found"}', "text"),
            ("Bild nicht gefunden – später nochmal".encode(), "text"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
            (b"\0\0\0\x20ftypavif" + bytes(40), "an AVIF image"),
            (b"\0\0\0\x20ftypheic" + bytes(40), "a HEIC image"),
            (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document"),
            (b"RIFF\x24\0\0\0WAVEfmt ", "no image format we know"),
            (np.random.default_rng(3).bytes(300), "no image format we know"),
        ],
    )
    def test_what_is_no_image_is_named(self, data: bytes, what: str) -> None:
        error = error_of(data)
        assert error.kind == "unsupported"
        assert f"looks like {what}" in str(error)
        assert "want JPEG, PNG, WebP, GIF, BMP or TIFF" in str(error)

    def test_an_image_format_beyond_the_six_is_not_opened(self) -> None:
        for format in ("PPM", "TGA", "ICO", "JPEG2000"):
            assert error_of(encode(PHOTO, format)).kind == "unsupported"


MUTANTS_PER_FILE = 30


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Bytes flipped, overwritten with extremes, cut out, repeated, and the end lost."""
    rng = np.random.default_rng(seed)
    for _ in range(MUTANTS_PER_FILE):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            # half of the damage goes to the header, where the decisions are
            at = int(rng.integers(0, len(mutant) if rng.random() < 0.5 else min(len(mutant), 120)))
            size = int(rng.integers(1, 9))
            match int(rng.integers(0, 5)):
                case 0:
                    mutant[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    mutant[at : at + size] = bytes([int(rng.choice([0, 1, 127, 128, 255]))]) * size
                case 2:
                    del mutant[at : at + size]
                case 3:
                    mutant[at:at] = mutant[at : at + size]
                case _:
                    mutant[at : at + size] = rng.bytes(size)
        yield bytes(mutant)
        if rng.random() < 0.2:
            yield bytes(mutant[: int(rng.integers(0, len(mutant)))])


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_ends_in_a_picture_or_a_decode_error(name: str) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for mutant in mutations(FILES[name], seed=len(name)):
            data = with_true_checksums(mutant) if name.endswith("png") else mutant
            outcome = outcome_of(data, max_pixels=4_000_000)
            if isinstance(outcome, DecodeError):
                assert outcome.kind in get_args(DecodeErrorKind)
                assert str(outcome)
                assert "\n" not in str(outcome)
            else:
                assert outcome.dtype == np.uint8
                assert outcome.shape[2] == 3
    assert not warned


def test_a_sample_of_the_hostile_corpus_ends_in_pictures_or_decode_errors() -> None:
    """All of it is tests/chaos/test_hostile_images.py's."""
    outcomes = [
        outcome_of(data, max_pixels=1_000_000) for _, data in [*corpus(150, seed=1), *strangers().items()]
    ]
    kinds = {outcome.kind for outcome in outcomes if isinstance(outcome, DecodeError)}
    assert kinds == {"empty", "truncated", "corrupt", "unsupported", "too_large"}
    assert sum(isinstance(outcome, np.ndarray) for outcome in outcomes) > 30


def test_the_kinds_are_those_of_the_label_table() -> None:
    assert set(get_args(DecodeErrorKind)) <= {kind.value for kind in ErrorKind}


def test_a_decode_error_survives_the_way_to_another_process() -> None:
    error = error_of(b"")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.kind, str(again)) == (DecodeError, "empty", str(error))


def test_threads_decode_the_same_pictures() -> None:
    expected = {name: decode_image(data) for name, data in FILES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, decoded in pool.map(
            lambda item: (item[0], decode_image(item[1])), list(FILES.items()) * 10
        ):
            np.testing.assert_array_equal(decoded, expected[name])


def test_warnings_turned_into_errors_elsewhere_do_not_decide_about_a_picture() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0"  # a value beyond the end
    plain = encode(PHOTO, "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_image(data), decode_image(plain))
