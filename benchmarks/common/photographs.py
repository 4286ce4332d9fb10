"""Photographs with their COCO annotations, for benchmarks: the reader names the folder, none are shipped."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Photograph = NDArray[np.uint8]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("../shared/data/coco_photos"),
        help="folder in COCO's form: val2017/*.jpg, annotations/instances_val2017.json, also train2017",
    )


def load(folder: Path, limit: int | None = None, splits: tuple[str, ...] = ("val2017",)) -> list[Photograph]:
    """RGB pixels, by file name; ends the program with one line where the folder is not there."""
    paths = [path for split in splits for path in sorted((folder / split).glob("*.jpg"))]
    if not paths:
        sys.exit(
            f"{folder} holds no photographs ({', '.join(splits)}): name a folder with --photos; not measured"
        )
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths[:limit]]


def load_annotated(
    folder: Path, limit: int | None, split: str = "val2017"
) -> tuple[list[Photograph], dict[str, Any]]:
    """The first photographs of a split and their annotations; image ids are 1, 2, … in their order."""
    photographs = load(folder, limit, (split,))
    truth = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    names = [path.name for path in sorted((folder / split).glob("*.jpg"))[:limit]]
    number = {
        image["id"]: names.index(image["file_name"]) + 1
        for image in truth["images"]
        if image["file_name"] in names
    }
    truth["images"] = [i | {"id": number[i["id"]]} for i in truth["images"] if i["id"] in number]
    truth["annotations"] = [
        a | {"image_id": number[a["image_id"]]} for a in truth["annotations"] if a["image_id"] in number
    ]
    return photographs, truth
