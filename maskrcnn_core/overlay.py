"""Instances drawn over their image: masks tinted and outlined, boxes with captions.

Enters: uint8 pixels with run-length encoded masks and boxes. Leaves: a picture of a given size.
Letters: N instances of one image, H×W its size, S longer side of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskrcnn_core.masks import decode_rle

Colour = tuple[int, int, int]

# Okabe and Ito's colours for the colour-blind, without black and grey, then others far from them.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (136, 34, 85),
    (170, 255, 60),
    (85, 50, 200),
    (0, 240, 240),
    (255, 30, 60),
)
MASK_OPACITY = 0.5
_DARK = (0, 0, 0)


def draw_masks(
    image: NDArray[np.uint8], rles: Sequence[bytes], colours: Sequence[Colour], side: int
) -> Image.Image:
    """The image with N masks tinted, each with an edge of its colour and a dark line around it.

    The line keeps masks of one colour apart, and a mask from an image of its own colour.

    Args:
        image: (H, W, 3) uint8 RGB; rles: N COCO compressed counts of (H, W); the first is drawn on top.
        side: S, pixels of the picture's longer side.

    Raises:
        ValueError: a mask is malformed or of another size.
    """
    height, width = image.shape[:2]
    shown_h, shown_w = picture_size(height, width, side)
    picture = Image.fromarray(image).resize((shown_w, shown_h))
    canvas = np.asarray(picture).astype(np.float32)
    rows = ((np.arange(shown_h) + 0.5) * height / shown_h).astype(np.int64)
    columns = ((np.arange(shown_w) + 0.5) * width / shown_w).astype(np.int64)
    for rle, colour in reversed(list(zip(rles, colours, strict=True))):
        mask = decode_rle(rle, height, width)[rows[:, None], columns]
        inner = _shrunk(mask)
        canvas[inner] += MASK_OPACITY * (np.array(colour, np.float32) - canvas[inner])
        canvas[mask & ~inner] = colour
        canvas[~_shrunk(~mask) & ~mask] = _DARK
    return Image.fromarray(canvas.astype(np.uint8))


def draw_boxes(
    picture: Image.Image, boxes: NDArray[np.float32], colours: Sequence[Colour], captions: Sequence[str]
) -> None:
    """Outline N boxes on a picture, each with its caption at its upper left corner; the first on top.

    Args:
        boxes: (N, 4) float32 x0 y0 x1 y1, in pixels of the picture.
    """
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), colour, caption in reversed(
        list(zip(boxes.tolist(), colours, captions, strict=True))
    ):
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=2)
        corner = (x0 + 3, max(0.0, y0 - 12))
        left, top, right, bottom = draw.textbbox(corner, caption)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=_DARK)
        draw.text(corner, caption, fill=(255, 255, 255))


def picture_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with the longer side `side` and the same shape, at least one pixel each."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrunk(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are in the mask, too; beyond the border all are."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
