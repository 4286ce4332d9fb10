"""`masklake report`: a contact sheet of images with their masks, boxes and names drawn over them.

Enters: a lake and a number of images. Leaves: one PNG.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from duckdb import ColumnExpression, ConstantExpression
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jobs.lake.labels_table import LabelsTable
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from maskrcnn_core.images import DecodeError, decode_image
from maskrcnn_core.masks import decode_rle
from schemas.errors import UsageError
from schemas.labels import Status
from schemas.specs import SourceSpec

TILE_PX = 320
COLUMNS = 4
MASK_OPACITY = 0.5
# Okabe and Ito's colours for the colour-blind, without black and grey.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def contact_sheet(
    table: LabelsTable,
    model_id: str,
    source: SourceSpec,
    names: Mapping[int, str],
    storage: Storage,
    *,
    num_images: int = 12,
    min_score: float = 0.5,
) -> bytes:
    """PNG of the first `num_images` images that the source yields and the model has labelled.

    Args:
        names: category_id -> name.
        min_score: detections below it are not drawn.

    Raises:
        UsageError: no labelled image was found in the source.
    """
    rows = table.to_current(model_id).filter(f"status = '{Status.OK}'")
    ids = [row[0] for row in rows.select("image_id").order("image_id").limit(num_images).fetchall()]
    chosen = rows.filter(ColumnExpression("image_id").isin(*map(ConstantExpression, ids)))
    labels = {row["image_id"]: row["detections"] for row in chosen.to_arrow_table().to_pylist()}
    tiles = [
        draw_detections(pixels, labels[image_id], names, min_score)
        for image_id, pixels in _pixels(source, storage, set(labels))
    ]
    if not tiles:
        raise UsageError(f"no image of {source.uri} is labelled by {model_id} in {table.uri}.")
    return _sheet(tiles)


def draw_detections(
    image: NDArray[np.uint8],
    detections: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    min_score: float,
) -> Image.Image:
    """The image with masks tinted, boxes outlined, name and score beside each; the best score on top."""
    height, width = image.shape[:2]
    canvas = image.astype(np.float32)
    shown = [d for d in detections if d["score"] >= min_score]
    for detection in reversed(shown):
        mask = decode_rle(detection["rle"], height, width)
        colour = np.array(_colour(detection), dtype=np.float32)
        canvas[mask] = (1 - MASK_OPACITY) * canvas[mask] + MASK_OPACITY * colour
    picture = Image.fromarray(canvas.astype(np.uint8))
    scale = TILE_PX / max(width, height)
    picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    draw = ImageDraw.Draw(picture)
    for detection in reversed(shown):
        x0, y0, x1, y1 = (detection["box"][side] * scale for side in ("x0", "y0", "x1", "y1"))
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=_colour(detection), width=2)
        text = f"{names.get(detection['category_id'], detection['category_id'])} {detection['score']:.2f}"
        left, top, right, bottom = draw.textbbox((x0 + 3, max(0.0, y0 - 12)), text)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=(0, 0, 0))
        draw.text((x0 + 3, max(0.0, y0 - 12)), text, fill=(255, 255, 255))
    return picture


def _colour(detection: Mapping[str, Any]) -> tuple[int, int, int]:
    return PALETTE[detection["category_id"] % len(PALETTE)]


def _pixels(
    source: SourceSpec, storage: Storage, wanted: set[str]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Decoded images of the source by image_id, until all that are wanted were found."""
    left = set(wanted)
    for shard in list_shards(source, storage):
        for image in ShardReader(shard, source, storage, frozenset()):
            if image.image_id in left and image.data is not None:
                left.discard(image.image_id)
                try:
                    yield image.image_id, decode_image(image.data)
                except DecodeError:  # labelled once, damaged since: the sheet does without it
                    continue
            if not left:
                return


def _sheet(tiles: Sequence[Image.Image]) -> bytes:
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(tiles)) * TILE_PX, rows * TILE_PX), (32, 32, 32))
    for index, tile in enumerate(tiles):
        column, row = index % COLUMNS, index // COLUMNS
        sheet.paste(
            tile,
            (column * TILE_PX + (TILE_PX - tile.width) // 2, row * TILE_PX + (TILE_PX - tile.height) // 2),
        )
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
