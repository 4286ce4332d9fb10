"""Labelled images for the tests of evaluation: rendered scenes, and what two workers make of them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from jobs.demo.scenes import render_scene
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage
from jobs.train.evaluation import evaluate_model
from jobs.train.image_locations import ImageLocation
from jobs.train.metrics import EvalMetrics, to_json_line
from jobs.train.workers import Workers
from maskrcnn_core.augment import Annotations
from maskrcnn_core.checkpoint import parse_checkpoint
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.model import MaskRCNN
from schemas.specs import StorageSpec

SIDE_PX = 128


@cache
def demo_model() -> MaskRCNN:
    """The bundled checkpoint, which knows these scenes' shapes. On one core, as tests are."""
    torch.set_num_threads(1)
    data, where = read_checkpoint_bytes("demo", Storage(StorageSpec()))
    return parse_checkpoint(data, where).build(min_size_px=SIDE_PX, score_threshold=0.3)


class RenderedImages:
    """Scenes as PNG in memory.

    broken: index -> bytes to give instead, None for MissingObjectError. known: index -> other annotations.
    num_reads: how many images were read so far.
    """

    def __init__(
        self,
        num_images: int,
        broken: dict[int, bytes | None] | None = None,
        known: dict[int, Annotations] | None = None,
    ) -> None:
        scenes = [_scene(seed) for seed in range(num_images)]
        self._known = dict(enumerate(annotations for annotations, _ in scenes)) | (known or {})
        self._files: dict[int, bytes | None] = dict(enumerate(file for _, file in scenes))
        self._files.update(broken or {})
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self._known)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def annotations(self, index: int) -> Annotations:
        return self._known[index]

    def location(self, index: int) -> ImageLocation:
        return ImageLocation(ObjectInfo(f"memory://scenes/{index}", -1, None, ""))

    def read(self, location: ImageLocation) -> bytes:
        data = self._files[int(location.info.uri.rpartition("/")[2])]
        self.num_reads += 1
        if data is None:
            raise MissingObjectError(f"{location.info.uri} does not exist")
        return data


def evaluate_rendered(data: RenderedImages, workers: Workers) -> EvalMetrics:
    return evaluate_model(
        demo_model(), data, data.read, workers, step=7, precision="fp32", num_threads=1, per_category=True
    )


def evaluate_as_worker(rank: int, size: int, num_images: int, folder: str) -> None:
    """The main function of a process: joins the others, and writes what it is given as metrics."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    metrics = evaluate_rendered(RenderedImages(num_images), Workers.joined(torch.device("cpu")))
    Path(folder, f"{rank}.json").write_text(to_json_line(metrics))
    dist.destroy_process_group()


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def _scene(seed: int) -> tuple[Annotations, bytes]:
    scene = render_scene(seed, SIDE_PX)
    masks = np.stack([instance.mask for instance in scene.instances])
    boxes = []
    for mask in masks:
        ys, xs = np.nonzero(mask)
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    annotations = Annotations(
        SIDE_PX,
        SIDE_PX,
        np.array(boxes, np.float32),
        np.array([instance.category_id for instance in scene.instances], np.int64),
        np.zeros(len(masks), np.bool_),
        encode_masks(masks),
    )
    return annotations, png(scene.image)
