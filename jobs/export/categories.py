"""Names for class indices: weights have a number of categories, never their names.

Enters: the number, and what the user said. Leaves: (category_id, name) of class_index 1, 2, …, or an error.
"""

from __future__ import annotations

import json
from typing import Any

from jobs.export.files import read_model_file
from jobs.lake.storage import Storage
from maskrcnn_core.config import COCO_CATEGORIES
from maskrcnn_core.torchvision_format import published_coco_categories
from schemas.errors import UsageError

Categories = tuple[tuple[int, str], ...]


def choose_categories(
    num: int, asked: str | None, published: bool, where: str, storage: Storage
) -> Categories:
    """The categories of weights that have `num` of them.

    Args:
        asked: "coco", the path or URI of a COCO-style JSON, or None.
        published: the file is known, by its checksum, to be one trained on COCO.
        where: the weights, for messages.

    Raises:
        UsageError: nothing says the names, or what says them has another number.
    """
    if asked is None and not published:
        raise UsageError(
            f"{where} has {num} categories, and no weights file says their names; add --categories coco, or "
            "--categories FILE.json with a COCO-style list of them."
        )
    if asked is None or asked == "coco":
        lists = (COCO_CATEGORIES, published_coco_categories())
        categories = next((c for c in lists if len(c) == num), None)
        if categories is None:
            raise UsageError(
                f"{where} has {num} categories; COCO has 80, or 90 with torchvision's unused ones. Add "
                "--categories FILE.json."
            )
        return categories
    data, uri = read_model_file(asked, storage)
    categories = _fill_holes(parse_categories(data, uri), num)
    if len(categories) != num:
        raise UsageError(f"{where} has {num} categories, {uri} lists {len(categories)}.")
    return categories


def parse_categories(data: bytes, where: str) -> Categories:
    """A COCO-style list, or an instances JSON with one under "categories": sorted by id.

    By rising id is how Detectron2 counts classes, and torchvision where labels are the ids.

    Raises:
        UsageError: it is none, or an id comes twice.
    """
    try:
        parsed: Any = json.loads(data)
        entries = parsed["categories"] if isinstance(parsed, dict) else parsed
        categories = tuple(sorted((int(entry["id"]), str(entry["name"])) for entry in entries))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f'{where} is not a COCO-style list of categories, [{{"id": 1, "name": "person"}}, …]: {error!r}.'
        ) from error
    ids = [category_id for category_id, _ in categories]
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0:
        raise UsageError(f"{where} has no categories, an id twice or one below 0.")
    return categories


def _fill_holes(categories: Categories, num: int) -> Categories:
    """Where labels are the ids themselves, ids nobody uses are classes too: "N/A 12" means nothing."""
    names = dict(categories)
    if len(categories) < num and categories[0][0] >= 1 and categories[-1][0] == num:
        return tuple((i, names.get(i, f"N/A {i}")) for i in range(1, num + 1))
    return categories
