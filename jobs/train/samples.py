"""Samples of a training run: ground truth beside what the model finds, image by image, in one picture.

Enters: a model and labelled images. Leaves: a PNG. A colour is a category; what it means
stands below.
"""

from __future__ import annotations

import io
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jobs.train.evaluation import LabelledImages, Read, predict_images
from maskrcnn_core.augment import Annotations
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.overlay import PALETTE, Colour, draw_masks, picture_size
from maskrcnn_core.predictor import Detections, Predictor

MIN_SCORE = 0.5
TILE_PX = 480
_GAP_PX = 12
_LINE_PX = 22
_FONT_PX = 15
_SWATCH_PX = 14
_MAX_CHARS = 200  # of a name; no tile has room for more
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_IGNORED: Colour = (128, 128, 128)


@dataclass(frozen=True)
class Sample:
    """One image. name: to be shown; pixels: (H, W, 3) uint8."""

    name: str
    pixels: NDArray[np.uint8]
    truth: Annotations
    found: Detections


def take_samples(
    model: MaskRCNN, data: LabelledImages, read: Read, *, num_images: int = 6, device: str = "cpu"
) -> list[Sample]:
    """Images from all over the set, with what the model finds in them, in float32; unreadable ones are left
    out.

    Raises:
        StorageError: storage cannot be reached. NonFiniteError: the model gives NaN or infinity.
    """
    indices = sorted({index * len(data) // num_images for index in range(num_images)}) if len(data) else []
    images = predict_images(Predictor(model, device=device), data, read, indices, window=1, num_threads=1)
    return [
        Sample(data.name(image.index), image.pixels, data.annotations(image.index), image.detections)
        for image in images
        if image.pixels is not None
    ]


def samples_png(samples: Sequence[Sample], config: MaskRCNNConfig, min_score: float = MIN_SCORE) -> bytes:
    """PNG: a row for each sample, ground truth left, detections of at least min_score right; a legend below.

    With no sample it says so.
    """
    shown = [_Row.of(sample, config, min_score) for sample in samples]
    present = sorted({category for row in shown for category in (*row.true_ids, *row.found_ids)})
    colours = {category: PALETTE[rank % len(PALETTE)] for rank, category in enumerate(present)}
    names = dict(config.categories)
    legend = [(names[category], colours[category]) for category in present]
    if any(row.is_ignored.any() for row in shown):
        legend.append(("ignored", _IGNORED))

    width = 2 * TILE_PX + 3 * _GAP_PX
    font = ImageFont.load_default(_FONT_PX)
    lines = _wrap(legend, width - 2 * _GAP_PX, font)
    heights = [row.height for row in shown]
    header = _GAP_PX + _LINE_PX
    body = sum(heights) + len(heights) * (_LINE_PX + _GAP_PX)
    sheet = Image.new("RGB", (width, header + body + len(lines) * _LINE_PX + 2 * _GAP_PX), _WHITE)
    draw = ImageDraw.Draw(sheet)
    left, right = _GAP_PX, TILE_PX + 2 * _GAP_PX
    if not shown:
        draw.text((left, _GAP_PX), "no image to show", fill=_BLACK, font=font)
        return _png(sheet)
    draw.text((left, _GAP_PX), "Ground truth", fill=_BLACK, font=font)
    draw.text((right, _GAP_PX), f"Predictions, score at least {min_score:g}", fill=_BLACK, font=font)
    top = header
    for row, height in zip(shown, heights, strict=True):
        truth, found = row.draw(colours)
        for picture, x in ((truth, left), (found, right)):
            sheet.paste(picture, (x + (TILE_PX - picture.width) // 2, top))
        instances = _count(len(row.true_ids), "instance")
        if num_ignored := int(row.is_ignored.sum()):
            instances += f", {_count(num_ignored, 'region')} ignored"
        name = _fitted(row.sample.name, TILE_PX - font.getlength(f"{instances} · "), font)
        draw.text((left, top + height), f"{instances} · {name}", fill=_BLACK, font=font)
        draw.text((right, top + height), _count(len(row.found_ids), "detection"), fill=_BLACK, font=font)
        top += height + _LINE_PX + _GAP_PX
    for line in lines:
        entry_left = float(left)
        for name, colour in line:
            box = (entry_left, top + 3, entry_left + _SWATCH_PX, top + 3 + _SWATCH_PX)
            draw.rectangle(box, fill=colour, outline=_BLACK)
            draw.text((entry_left + _SWATCH_PX + 6, top), name, fill=_BLACK, font=font)
            entry_left += _entry_px(name, font)
        top += _LINE_PX
    return _png(sheet)


@dataclass(frozen=True)
class _Row:
    """A sample with category ids: true_ids of instances that are not ignored, found_ids of what is shown."""

    sample: Sample
    is_ignored: NDArray[np.bool_]
    true_ids: list[int]
    is_shown: NDArray[np.bool_]
    found_ids: list[int]

    @classmethod
    def of(cls, sample: Sample, config: MaskRCNNConfig, min_score: float) -> _Row:
        is_ignored = sample.truth.ignored
        true_ids = [config.category_ids[index - 1] for index in sample.truth.class_indices[~is_ignored]]
        is_shown = sample.found.scores >= min_score
        return cls(sample, is_ignored, true_ids, is_shown, sample.found.category_ids[is_shown].tolist())

    @property
    def height(self) -> int:
        """Of its pictures, in pixels."""
        height, width = self.sample.pixels.shape[:2]
        return picture_size(height, width, TILE_PX)[0]

    def draw(self, colours: dict[int, Colour]) -> tuple[Image.Image, Image.Image]:
        """Ground truth and detections, small ones on top of large ones."""
        truth, found = self.sample.truth, self.sample.found
        of_instance = iter(self.true_ids)
        true_colours = [_IGNORED if ignored else colours[next(of_instance)] for ignored in self.is_ignored]
        chosen = np.flatnonzero(self.is_shown).tolist()
        return (
            _draw(self.sample.pixels, truth.boxes, truth.rles, true_colours),
            _draw(
                self.sample.pixels,
                found.boxes[chosen],
                [found.rles[i] for i in chosen],
                [colours[category] for category in self.found_ids],
            ),
        )


def _draw(
    pixels: NDArray[np.uint8], boxes: NDArray[np.float32], rles: Sequence[bytes], colours: Sequence[Colour]
) -> Image.Image:
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = np.argsort(areas, kind="stable").tolist()
    return draw_masks(pixels, [rles[i] for i in order], [colours[i] for i in order], TILE_PX)


def _wrap(
    entries: Sequence[tuple[str, Colour]], width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[tuple[str, Colour]]]:
    """The legend's entries in lines."""
    lines: list[list[tuple[str, Colour]]] = []
    room = 0.0  # in the last line; there is none yet
    for name, colour in entries:
        name = _fitted(name, width / 2, font)
        needed = _entry_px(name, font)
        if needed > room:
            lines.append([])
            room = width
        lines[-1].append((name, colour))
        room -= needed
    return lines


def _entry_px(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    return _SWATCH_PX + 6 + font.getlength(name) + 18


def _fitted(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """One printable line of at most `width` pixels, cut in its middle where it is longer."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= _MAX_CHARS and font.getlength(text) <= width:
        return text

    def cut(kept: int) -> str:
        return f"{text[:kept]}…{text[len(text) - kept :]}"

    fits = bisect(range(_MAX_CHARS // 2), width, key=lambda kept: font.getlength(cut(kept)))
    return cut(max(0, fits - 1))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
