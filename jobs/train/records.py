"""Images and annotations as the readers of data write them down, in any order; training_set.py sorts them.

Enters: rows as Arrow batches. Leaves: two Parquet files in a folder, and the problems that were found,
counted by kind. Memory: one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UsageError
from schemas.specs import SourceSpec


class Problem(StrEnum):
    """Why an annotation or an image is left out of a training set."""

    BAD_ANNOTATION = "bad_annotation"  # a field is missing or of another type
    UNKNOWN_CATEGORY = "unknown_category"  # not one of the model's
    UNKNOWN_IMAGE = "unknown_image"  # its image_id is none of the images'
    BOX_WITHOUT_AREA = "box_without_area"  # or none inside the image
    MISSING_MASK = "missing_mask"
    EMPTY_MASK = "empty_mask"
    MASK_OF_ANOTHER_SIZE = "mask_of_another_size"
    MASK_OUTSIDE_BOX = "mask_outside_box"  # no pixel of it is inside
    BAD_POLYGON = "bad_polygon"  # the part is left out; with no part left, the annotation
    BAD_RLE = "bad_rle"
    BAD_IMAGE = "bad_image"  # an entry without id, file_name, height or width
    DUPLICATE_IMAGE = "duplicate_image"  # the first is taken
    MISSING_IMAGE = "missing_image"  # not found where the images are
    AMBIGUOUS_IMAGE = "ambiguous_image"  # found by its name alone, more than once
    FAILED_IMAGE = "failed_image"  # of the label table: a row without labels
    DAMAGED_SHARD = "damaged_shard"  # images before the damage are taken


class RefusedError(ValueError):
    """An annotation that is left out, and why."""

    def __init__(self, kind: Problem, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class Problems:
    """Counts by kind, with the first of each kind in words."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, kind: Problem, what: str, count: int = 1) -> None:
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.first.setdefault(kind, what)

    def refuse(self, where: str) -> None:
        """Raises UsageError naming the first of each kind, if there is any."""
        if self.counts:
            found = "; ".join(f"{kind} ({count}): {self.first[kind]}" for kind, count in self.counts.items())
            raise UsageError(f"{where} has problems, and --strict wants none: {found}")


# image: joins annotations to their image. key: what the image is called in its source, as
# jobs/lake/sources.py names image ids; shard: null where any will do; name: to find it by where no key fits,
# null: never. newness: of several rows with one key the newest counts. status: as in the label table.
_IMAGE_COLUMNS: dict[str, pa.DataType] = {
    "image": pa.int64(),
    "source": pa.string(),
    "shard": pa.string(),
    "key": pa.string(),
    "name": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "newness": pa.int64(),
    "status": pa.string(),
}
IMAGES: pa.Schema = pa.schema(_IMAGE_COLUMNS)
# mask: COCO compressed counts of mask_height × mask_width, or polygons as coco_json.py packs them, whose
# sizes are 0.
_ANNOTATION_COLUMNS: dict[str, pa.DataType] = {
    "image": pa.int64(),
    "number": pa.int64(),
    "category_id": pa.int64(),
    "x0": pa.float32(),
    "y0": pa.float32(),
    "x1": pa.float32(),
    "y1": pa.float32(),
    "ignored": pa.bool_(),
    "mask": pa.binary(),
    "mask_height": pa.int32(),
    "mask_width": pa.int32(),
}
ANNOTATIONS: pa.Schema = pa.schema(_ANNOTATION_COLUMNS)


class Records(Protocol):
    """A maker of records: an instances JSON, a label table."""

    def read(self, spool: Spool, problems: Problems) -> Sequence[SourceSpec]:
        """Write every record to the spool; returns where the images are."""

    def describe(self) -> dict[str, Any]:
        """What was read, for whoever asks later: plain values. After read()."""


class Spool:
    """A context manager: images.parquet and annotations.parquet in a folder, complete once it is left.

    category_names: category_id -> name, where the data have names.
    """

    def __init__(self, folder: Path) -> None:
        self.images_path = folder / "images.parquet"
        self.annotations_path = folder / "annotations.parquet"
        self.category_names: dict[int, str] = {}
        self._images = pq.ParquetWriter(self.images_path, IMAGES, compression="zstd")
        self._annotations = pq.ParquetWriter(self.annotations_path, ANNOTATIONS, compression="zstd")

    def add_images(self, rows: pa.RecordBatch) -> None:
        self._images.write_batch(rows)

    def add_annotations(self, rows: pa.RecordBatch) -> None:
        self._annotations.write_batch(rows)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._images.close()
        self._annotations.close()


def to_batch(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    """Tuples in the order of a schema's columns."""
    values = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
