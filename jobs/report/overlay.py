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
from PIL import Image

from jobs.lake.labels_table import LabelsTable
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from maskrcnn_core.images import DecodeError, decode_image
from maskrcnn_core.overlay import PALETTE, draw_boxes, draw_masks
from schemas.errors import UsageError
from schemas.labels import Status
from schemas.specs import SourceSpec

TILE_PX = 320
COLUMNS = 4


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
    """The image with masks tinted, boxes outlined, name and score beside each; the first detection on top."""
    shown = [d for d in detections if d["score"] >= min_score]
    colours = [PALETTE[d["category_id"] % len(PALETTE)] for d in shown]
    picture = draw_masks(image, [d["rle"] for d in shown], colours, TILE_PX)
    boxes = np.array([[d["box"][side] for side in ("x0", "y0", "x1", "y1")] for d in shown], np.float32)
    scale = TILE_PX / max(image.shape[:2])
    captions = [f"{names.get(d['category_id'], d['category_id'])} {d['score']:.2f}" for d in shown]
    draw_boxes(picture, boxes.reshape(-1, 4) * np.float32(scale), colours, captions)
    return picture


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
