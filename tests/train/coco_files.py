"""Small instances JSONs with their images, for the tests of training data."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.lake.storage import Storage
from jobs.train.coco_json import CocoJson
from jobs.train.training_set import TrainingSet, build
from schemas.specs import SourceSpec, StorageSpec

CATEGORIES = ((3, "window"), (7, "door"))
HEIGHT, WIDTH = 20, 30
SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 13.0, 2.0, 13.0]]  # rows 3 to 13, columns 2 to 12


def storage() -> Storage:
    return Storage(StorageSpec())


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def image(number: int, name: str | None = None, **changes: Any) -> dict[str, Any]:
    entry = {"id": number, "file_name": name or f"{number}.png", "height": HEIGHT, "width": WIDTH}
    return entry | changes


def annotation(image_id: int, **changes: Any) -> dict[str, Any]:
    entry = {"id": 50, "image_id": image_id, "category_id": 3, "bbox": [2, 3, 10, 10], "iscrowd": 0}
    return entry | {"segmentation": SQUARE} | changes


def write_json(
    folder: Path, images: Sequence[Any], annotations: Sequence[Any], categories: Sequence[Any] | None = None
) -> Path:
    known = [{"id": i, "name": name} for i, name in CATEGORIES] if categories is None else categories
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": known}))
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_set(folder: Path, images: Sequence[Any], annotations: Sequence[Any], **options: Any) -> TrainingSet:
    """A set of these entries; folder/images holds a picture for each, unless it is there already."""
    pictures = folder / "images"
    if not pictures.is_dir():
        write_files(pictures, {i["file_name"]: picture(i["id"]) for i in images})
    path = write_json(folder, images, annotations)
    records = CocoJson(str(path), SourceSpec(uri=str(pictures)), storage())
    return build(folder / "set.arrow", records, CATEGORIES, storage(), **options)
