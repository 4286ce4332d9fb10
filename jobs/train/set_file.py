"""The file of a training set: its columns, and how it is written.

Enters: images and annotations sorted by image. Leaves: an Arrow IPC file of the annotations that are in
order, their masks run-length encoded; what is wrong is counted by kind and left out. Memory: one batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from jobs.train.coco_json import unpack_polygons
from jobs.train.image_locations import LOCATION_COLUMNS, LOCATIONS
from jobs.train.records import Problem, Problems, RefusedError
from maskrcnn_core.masks import decode_rle_crop, rle_area, rle_num_pixels

BATCH_IMAGES = 256  # of one record batch: image i is row i % 256 of batch i // 256
FACTS_KEY = b"masklake.training_set"  # metadata of the last batch, which has no rows
FACTS_VERSION = 1
_READ_ROWS = 1024

Box = tuple[float, float, float, float]

SET_SCHEMA: pa.Schema = pa.schema(
    [
        ("name", pa.string()),
        *((name, LOCATIONS.field(name).type) for name in LOCATION_COLUMNS),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # x0 y0 x1 y1 of each annotation
        ("class_indices", pa.list_(pa.int32())),
        ("ignored", pa.list_(pa.uint8())),
        ("rles", pa.list_(pa.large_binary())),
    ]
)


class SetWriter:
    """Checks annotations, encodes masks, writes the file.

    num_images and num_instances: what was written; ignored annotations are no instances.
    """

    def __init__(self, categories: Sequence[tuple[int, str]], problems: Problems) -> None:
        self.num_images = self.num_instances = 0
        self._class_of = {category_id: k + 1 for k, (category_id, _) in enumerate(categories)}
        self._problems = problems
        self._hash = hashlib.blake2b(digest_size=16)

    def write(
        self,
        path: Path,
        images: duckdb.DuckDBPyRelation,
        annotations: duckdb.DuckDBPyRelation,
        drop_empty: bool,
        description: dict[str, Any],
    ) -> None:
        """Both results are sorted by position."""
        of_image = groupby(_rows(annotations), itemgetter("position"))
        position, rows = next(of_image, (None, iter(())))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SET_SCHEMA) as writer:
            waiting: list[dict[str, Any]] = []
            for image in _rows(images):
                if image["position"] == position:
                    made = self._image(image, rows)
                    position, rows = next(of_image, (None, iter(())))
                else:
                    made = self._image(image, iter(()))
                if drop_empty and not made["rles"]:
                    continue
                self._count(made)
                waiting.append(made)
                if len(waiting) == BATCH_IMAGES:
                    writer.write_batch(pa.RecordBatch.from_pylist(waiting, SET_SCHEMA))
                    waiting.clear()
            if waiting:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, SET_SCHEMA))
            facts = {
                "version": FACTS_VERSION,
                "fingerprint": self._hash.hexdigest(),
                "problems": self._problems.counts,
                "description": description,
            }
            nothing = pa.RecordBatch.from_pylist([], SET_SCHEMA)
            writer.write_batch(nothing, custom_metadata={FACTS_KEY: json.dumps(facts).encode()})

    def _image(self, image: dict[str, Any], rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The row of one image, as SET_SCHEMA."""
        boxes: list[float] = []
        class_indices, ignored, rles = [], [], []
        for row in rows:
            try:
                box, rle = self._annotation(row, image["height"], image["width"])
            except RefusedError as refusal:
                self._problems.add(refusal.kind, f"{image['image_name']}: {refusal}")
                continue
            boxes.extend(box)
            class_indices.append(self._class_of[row["category_id"]])
            ignored.append(int(row["ignored"]))
            rles.append(rle)
        return {
            **{name: image[name] for name in (*LOCATION_COLUMNS, "height", "width")},
            "name": image["image_name"],
            "boxes": np.array(boxes, np.float32),
            "class_indices": class_indices,
            "ignored": ignored,
            "rles": rles,
        }

    def _annotation(self, row: dict[str, Any], height: int, width: int) -> tuple[Box, bytes]:
        """The box, clipped to the image, and the mask.

        Raises:
            RefusedError: one of them is no good.
        """
        if row["category_id"] not in self._class_of:
            raise RefusedError(Problem.UNKNOWN_CATEGORY, f"category_id {row['category_id']}")
        box = max(row["x0"], 0.0), max(row["y0"], 0.0), min(row["x1"], width), min(row["y1"], height)
        x0, y0, x1, y1 = box
        if not (x1 > x0 and y1 > y0):
            raise RefusedError(Problem.BOX_WITHOUT_AREA, f"box {box} in {height}×{width} pixels")
        try:
            rle = self._rle(row, height, width)
            # The part that training will decode.
            inside = decode_rle_crop(
                rle, height, math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1)
            ).any()
            if not inside:
                is_empty = rle_area(rle) == 0
                raise RefusedError(Problem.EMPTY_MASK if is_empty else Problem.MASK_OUTSIDE_BOX, f"box {box}")
        except RefusedError:
            raise
        except ValueError as error:
            raise RefusedError(Problem.BAD_RLE, str(error)) from error
        return box, rle

    def _rle(self, row: dict[str, Any], height: int, width: int) -> bytes:
        """Compressed counts that cover the image. Raises RefusedError, or ValueError if malformed."""
        rle: bytes = row["mask"]
        if not row["mask_height"]:
            return _rasterize(unpack_polygons(rle), height, width)
        if (row["mask_height"], row["mask_width"]) != (height, width):
            size = f"{row['mask_height']}×{row['mask_width']}"
            raise RefusedError(
                Problem.MASK_OF_ANOTHER_SIZE, f"mask of {size} on an image of {height}×{width}"
            )
        if rle_num_pixels(rle) != height * width:
            raise RefusedError(
                Problem.BAD_RLE, f"its runs cover {rle_num_pixels(rle)} pixels of {height}×{width}"
            )
        return rle

    def _count(self, image: dict[str, Any]) -> None:
        self.num_images += 1
        self.num_instances += image["ignored"].count(0)
        head = image["name"], image["height"], image["width"], image["class_indices"], image["ignored"]
        self._hash.update(json.dumps([*head, [len(rle) for rle in image["rles"]]]).encode())
        self._hash.update(image["boxes"].tobytes())
        for rle in image["rles"]:
            self._hash.update(rle)


def _rows(result: duckdb.DuckDBPyRelation) -> Iterator[dict[str, Any]]:
    for batch in result.to_arrow_reader(_READ_ROWS):
        yield from batch.to_pylist()


def _rasterize(parts: list[NDArray[np.float64]], height: int, width: int) -> bytes:
    """Compressed counts of the union of polygons, as COCO's own tools rasterize them.

    Raises:
        RefusedError: a point lies farther outside than the image is large, which the tools would trace there.
    """
    reach = max(height, width)
    for part in parts:
        if part.min() < -reach or part.max() > 2 * reach:
            raise RefusedError(
                Problem.BAD_POLYGON,
                f"points from {part.min():g} to {part.max():g} on {height}×{width} pixels",
            )
    encoded = coco_mask.frPyObjects([part.tolist() for part in parts], height, width)
    merged: Any = coco_mask.merge(encoded)
    counts: bytes = merged["counts"]
    return counts
