"""Ground truth for the images of tests/relabel/two_models.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.relabel.two_models import HEIGHT, WIDTH, Box


def write_truth(path: Path, objects: Mapping[str, Box]) -> str:
    """An instances JSON with one object of category 1 in each image."""
    annotations = []
    for number, (x0, y0, x1, y1) in enumerate(objects.values()):
        annotation = {
            "id": number + 1,
            "image_id": number,
            "category_id": 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        }
        annotations.append(annotation)
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(objects)
    ]
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    path.write_text(json.dumps(truth))
    return str(path)
