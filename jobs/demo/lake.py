"""The demo's source: rendered scenes as PNGs in tar shards, and their ground truth as a COCO JSON.

`python -m jobs.demo.lake FOLDER` writes scenes to train on; none of them is one of the demo's.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.demo.scenes import SCENE_CATEGORIES, TRAIN_SEED, Scene, render_scene
from maskrcnn_core.masks import encode_masks


def write_scene_lake(folder: Path, seeds: Sequence[int], num_shards: int) -> None:
    """Write <folder>/images/scenes-NNN.tar and <folder>/annotations.json; what was there is replaced."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    truth: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in SCENE_CATEGORIES],
    }
    for shard in range(num_shards):
        with tarfile.open(images / f"scenes-{shard:03d}.tar", "w") as tar:
            for seed in seeds[shard::num_shards]:
                scene = render_scene(seed)
                name = f"scene-{seed:06d}.png"
                data = _png(scene)
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                _add_truth(truth, scene, seed, name)
    (folder / "annotations.json").write_text(json.dumps(truth))


def _png(scene: Scene) -> bytes:
    data = io.BytesIO()
    Image.fromarray(scene.image).save(data, "PNG", compress_level=1)
    return data.getvalue()


def _add_truth(truth: dict[str, list[dict[str, Any]]], scene: Scene, image_id: int, name: str) -> None:
    height, width = scene.image.shape[:2]
    truth["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    rles = encode_masks(np.stack([instance.mask for instance in scene.instances]))
    for instance, rle in zip(scene.instances, rles, strict=True):
        rows, columns = np.where(instance.mask.any(axis=1))[0], np.where(instance.mask.any(axis=0))[0]
        x0, y0 = int(columns[0]), int(rows[0])
        truth["annotations"].append(
            {
                "id": len(truth["annotations"]) + 1,
                "image_id": image_id,
                "category_id": instance.category_id,
                "bbox": [x0, y0, int(columns[-1]) + 1 - x0, int(rows[-1]) + 1 - y0],
                "area": int(instance.mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": rle.decode("ascii")},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Render scenes to train the demo's checkpoint on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--shards", type=int, default=16)
    arguments = parser.parse_args()
    write_scene_lake(arguments.folder, range(TRAIN_SEED, TRAIN_SEED + arguments.scenes), arguments.shards)


if __name__ == "__main__":
    main()
