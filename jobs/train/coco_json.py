"""COCO instances JSON, of any size, -> records of a training set.

Enters: the JSON's URI and where its images are. Leaves: images and annotations in the spool; what is wrong is
counted by kind and left out. The file is parsed as a stream: memory is one chunk, one annotation and a few
thousand rows.

Source: cocodataset.org, "Data format", sections 1 (object detection) and 4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import ijson
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from jobs.lake.shards import image_name
from jobs.lake.storage import Storage
from jobs.train.records import ANNOTATIONS, IMAGES, Problem, Problems, RefusedError, Spool, to_batch
from schemas.errors import UsageError
from schemas.labels import Status
from schemas.specs import SourceSpec

_CHUNK_BYTES = 1 << 20
# Rows are handed on when there are so many, or their masks take so much.
_MAX_ROWS, _MAX_MASK_BYTES = 4096, 8 << 20
MAX_SIDE_PX = 1 << 20  # of an image; squared it is still a whole number
_MAX_NUMBER = float(MAX_SIDE_PX**2)
_SECTIONS = ("images", "annotations", "categories")


class CocoJson:
    """An instances JSON as Records.

    Args:
        uri: of the JSON, in any storage.
        images: where the images are. A file_name is an image's key there, or else, as with `masklake
            evaluate`, the same but for folder and suffix.
    """

    def __init__(self, uri: str, images: SourceSpec, storage: Storage) -> None:
        self.uri = storage.normalize(uri)
        self._images = images
        self._storage = storage

    def describe(self) -> dict[str, Any]:
        return {"coco": self.uri, "images": self._storage.normalize(self._images.uri)}

    def read(self, spool: Spool, problems: Problems) -> Sequence[SourceSpec]:
        """Parse the file.

        Raises:
            UsageError: it is not JSON, or not COCO's.
        """
        images = _Images(spool, problems, self._storage.normalize(self._images.uri))
        annotations = _Annotations(spool, problems)
        categories: list[Any] = []
        for section, items in _sections(self.uri, self._storage):
            add = {"images": images.add, "annotations": annotations.add, "categories": categories.extend}
            add[section](items)
        images.flush()
        annotations.flush()
        if not images.num_read:
            raise UsageError(
                f"{self.uri} is not a COCO instances JSON: it needs images, annotations and categories"
            )
        spool.category_names.update(_names(categories))
        return [self._images]


def read_categories(uri: str, storage: Storage) -> tuple[tuple[int, str], ...]:
    """(category_id, name) of an instances JSON in ascending order of ids, for a model made for these data.

    Raises:
        UsageError: it is not JSON, or names no category.
    """
    found: list[Any] = []
    for section, items in _sections(storage.normalize(uri), storage):
        if section == "categories":
            found.extend(items)
    if not (names := _names(found)):
        raise UsageError(f"{uri} names no categories; give a COCO instances JSON with them")
    return tuple(sorted(names.items()))


def pack_polygons(parts: list[list[float]]) -> bytes:
    """The parts of one mask, x y x y … each, for the spool: their number, their lengths, their values."""
    return np.concatenate([[len(parts)], [len(part) for part in parts], *parts]).astype(np.float64).tobytes()


def unpack_polygons(packed: bytes) -> list[NDArray[np.float64]]:
    """What pack_polygons packed."""
    values = np.frombuffer(packed, np.float64)
    num_parts = int(values[0])
    ends = np.cumsum(values[1 : 1 + num_parts]).astype(np.int64)[:-1]
    return np.split(values[1 + num_parts :], ends)


def _sections(uri: str, storage: Storage) -> Iterator[tuple[str, list[Any]]]:
    """(section, its next items) as the file goes by; a section's items are in the order of the file."""
    storage.check_reachable(uri, "annotations")
    found: dict[str, list[Any]] = {section: ijson.sendable_list() for section in _SECTIONS}
    parsers = [ijson.items_coro(items, f"{section}.item", use_float=True) for section, items in found.items()]
    try:
        with storage.open_verified(storage.stat(uri)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                for parser in parsers:
                    parser.send(chunk)
                for section, items in found.items():
                    yield section, list(items)
                    items.clear()
            for parser in parsers:
                parser.close()
    except ijson.JSONError as error:
        raise UsageError(f"{uri} is not JSON: {str(error).splitlines()[0]}; make it anew") from error


class _Images:
    """Entries of "images" to the spool."""

    def __init__(self, spool: Spool, problems: Problems, source: str) -> None:
        self.num_read = 0
        self._spool, self._problems, self._source = spool, problems, source
        self._rows: list[tuple[Any, ...]] = []

    def add(self, items: list[Any]) -> None:
        for item in items:
            self.num_read += 1
            try:
                name = item["file_name"]
                numbers = item["id"], item["height"], item["width"]
                if not isinstance(name, str) or not name or any(type(n) is not int for n in numbers):
                    raise TypeError
                image, height, width = numbers
                if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                self._problems.add(Problem.BAD_IMAGE, f"entry {self.num_read} of images: {_shown(item)}")
                continue
            self._rows.append(
                (image, self._source, None, name, image_name(name), height, width, 0, Status.OK)
            )
        if len(self._rows) >= _MAX_ROWS:
            self.flush()

    def flush(self) -> None:
        self._spool.add_images(to_batch(self._rows, IMAGES))
        self._rows.clear()


class _Annotations:
    """Entries of "annotations" to the spool, as far as they can be judged without their image."""

    def __init__(self, spool: Spool, problems: Problems) -> None:
        self._spool, self._problems = spool, problems
        self._rows: list[tuple[Any, ...]] = []
        self._num_read = self._mask_bytes = 0

    def add(self, items: list[Any]) -> None:
        for item in items:
            self._num_read += 1
            try:
                row = self._row(item)
            except RefusedError as refusal:
                self._problems.add(refusal.kind, f"annotation {_id_of(item, self._num_read)}: {refusal}")
                continue
            self._rows.append(row)
            self._mask_bytes += len(row[8])
            if len(self._rows) >= _MAX_ROWS or self._mask_bytes >= _MAX_MASK_BYTES:
                self.flush()

    def flush(self) -> None:
        self._spool.add_annotations(to_batch(self._rows, ANNOTATIONS))
        self._rows.clear()
        self._mask_bytes = 0

    def _row(self, item: Any) -> tuple[Any, ...]:
        """In the order of ANNOTATIONS. Raises RefusedError."""
        try:
            image, category_id, box = item["image_id"], item["category_id"], item["bbox"]
            ignored = item.get("iscrowd", 0)
            segmentation = item.get("segmentation")
        except (KeyError, TypeError, AttributeError) as error:
            raise RefusedError(Problem.BAD_ANNOTATION, f"no {error} in {_shown(item)}") from None
        if type(image) is not int or type(category_id) is not int or ignored not in (0, 1):
            raise RefusedError(
                Problem.BAD_ANNOTATION,
                f"image_id {_shown(image)}, category_id {_shown(category_id)}, iscrowd {_shown(ignored)}; "
                f"wanted whole numbers, iscrowd 0 or 1",
            )
        if not _are_numbers(box) or len(box) != 4:
            raise RefusedError(Problem.BAD_ANNOTATION, f"bbox {_shown(box)}; wanted x, y, width, height")
        x, y, box_width, box_height = box
        if not (box_width > 0 and box_height > 0):
            raise RefusedError(Problem.BOX_WITHOUT_AREA, f"bbox {box}")
        mask, height, width = self._mask(segmentation, _id_of(item, self._num_read))
        ends = (x + box_width, y + box_height)
        return image, self._num_read, category_id, x, y, *ends, bool(ignored), mask, height, width

    def _mask(self, segmentation: Any, annotation: object) -> tuple[bytes, int, int]:
        if not segmentation:
            raise RefusedError(Problem.MISSING_MASK, "it has no segmentation")
        if isinstance(segmentation, dict):
            return _rle(segmentation)
        if not isinstance(segmentation, list):
            raise RefusedError(
                Problem.BAD_ANNOTATION, f"segmentation {_shown(segmentation)}; wanted polygons or an RLE"
            )
        parts = [part for part in segmentation if _is_polygon(part)]
        if len(parts) < len(segmentation):
            bad = next(part for part in segmentation if not _is_polygon(part))
            problem = f"polygon {_shown(bad)}; wanted 3 points or more, x and y of each"
            if not parts:
                raise RefusedError(Problem.BAD_POLYGON, problem)
            self._problems.add(Problem.BAD_POLYGON, f"annotation {annotation}: {problem}")
        return pack_polygons(parts), 0, 0


def _rle(segmentation: dict[str, Any]) -> tuple[bytes, int, int]:
    """Compressed counts, height, width of an RLE; its runs are compared with its size later."""
    size: Any = segmentation.get("size")
    counts: Any = segmentation.get("counts")
    if not (
        _are_numbers(size) and len(size) == 2 and all(type(n) is int and 0 < n <= MAX_SIDE_PX for n in size)
    ):
        raise RefusedError(Problem.BAD_RLE, f"size {_shown(size)}; wanted height, width")
    height, width = size
    if isinstance(counts, str) and counts.isascii():
        return counts.encode(), height, width
    if not (_are_numbers(counts) and all(type(n) is int and n >= 0 for n in counts)):
        raise RefusedError(Problem.BAD_RLE, f"counts {_shown(counts)}; wanted a string or runs of pixels")
    if sum(counts) != height * width:
        raise RefusedError(
            Problem.BAD_RLE,
            f"runs cover {sum(counts)} pixels; its size {height}×{width} has {height * width}",
        )
    encoded: Any = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    return encoded["counts"], height, width


def _is_polygon(part: Any) -> bool:
    return _are_numbers(part) and len(part) >= 6 and len(part) % 2 == 0


def _are_numbers(values: Any) -> bool:
    """A list of numbers that are finite and of a size that coordinates or runs may have."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    return bool((np.abs(np.array(values, np.float64)) < _MAX_NUMBER).all())


def _names(categories: list[Any]) -> dict[int, str]:
    return {
        item["id"]: item["name"]
        for item in categories
        if isinstance(item, dict) and type(item.get("id")) is int and isinstance(item.get("name"), str)
    }


def _id_of(item: Any, number: int) -> object:
    return item["id"] if isinstance(item, dict) and "id" in item else f"number {number}"


def _shown(value: Any) -> str:
    """On a line, and cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
