"""AP of a model while it is trained: its detections on labelled images against their annotations.

Enters: a model and labelled images that it was not trained on. Leaves: EvalMetrics, the same on every
worker. Worker r of W predicts images r, r + W, ...; worker 0 scores them all. Images are read and decoded a
window ahead, and what is kept of one is its detections, masks compressed.

Letters: N instances of one image, W workers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from jobs.lake.storage import ChangedObjectError, CorruptObjectError, MissingObjectError
from jobs.train.image_locations import ImageLocation
from jobs.train.metrics import EvalMetrics
from jobs.train.workers import Workers
from maskrcnn_core.augment import Annotations
from maskrcnn_core.coco_eval import METRICS, CocoScores, score_coco
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.images import DecodeError, decode_image
from maskrcnn_core.masks import rle_area
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.predictor import Detections, Precision, Predictor
from schemas.labels import ErrorKind

GPU_BATCH_SIZE = 16  # pool.batch_size of `masklake infer`
ANOTHER_SIZE = "another_size"
"""The kind of an image whose pixels are not as many as its annotations say."""


class LabelledImages(Protocol):
    """What is asked of a TrainingSet."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def annotations(self, index: int) -> Annotations: ...

    def location(self, index: int) -> ImageLocation: ...


Read = Callable[[ImageLocation], bytes]


@dataclass(frozen=True)
class Predicted:
    """One image with what was found in it. problem: why it could not be read, or ""; pixels is then None."""

    index: int
    pixels: NDArray[np.uint8] | None
    detections: Detections
    problem: str


@dataclass(frozen=True)
class Share:
    """What one worker found: detections by the image's index, and images it could not read, by kind."""

    detections: Mapping[int, Detections]
    unreadable: Mapping[str, int]


def evaluate_model(
    model: MaskRCNN,
    data: LabelledImages,
    read: Read,
    workers: Workers,
    *,
    step: int,
    precision: Precision,
    batch_size: int | None = None,
    num_threads: int = 1,
    max_images: int | None = None,
    per_category: bool = False,
) -> EvalMetrics:
    """Measure; every worker calls it, with the same weights.

    An image that cannot be read counts as one without detections, so AP says what `masklake infer` would
    give. AP depends on the number of workers only as far as the network gives other last bits when other
    images share its pass: not at all with a batch_size of 1.

    Args:
        model: is copied; training it further changes nothing here.
        read: the encoded bytes of an image.
        batch_size: images of a forward pass; None: one on a CPU, GPU_BATCH_SIZE on a GPU.
        max_images: the first so many; None: all.

    Returns:
        figures of -1 where no annotation is there to be found.

    Raises:
        StorageError: storage cannot be reached.
        NonFiniteError: the network gave NaN or infinity.
    """
    started_s = time.monotonic()
    num_images = len(data) if max_images is None else min(max_images, len(data))
    device = str(workers.device)
    is_cpu = workers.device.type == "cpu"
    if batch_size is None:
        batch_size = 1 if is_cpu else GPU_BATCH_SIZE
    predictor = Predictor(
        model,
        device=device,
        precision=precision,
        batch_size=batch_size,
        padding="tight" if is_cpu else "common",  # of few shapes, so batches fill up
    )
    own = range(workers.rank, num_images, workers.size)
    share = predict_share(predictor, data, read, own, batch_size=batch_size, num_threads=num_threads)
    shares = _gather(share, workers)
    metrics: list[EvalMetrics | None] = [None]
    if workers.rank == 0:
        scored = score(shares, data, model.config, step=step, per_category=per_category)
        metrics = [replace(scored, seconds=time.monotonic() - started_s)]
    if workers.size > 1:
        dist.broadcast_object_list(metrics, src=0)
    assert metrics[0] is not None
    return metrics[0]


def predict_share(
    predictor: Predictor,
    data: LabelledImages,
    read: Read,
    indices: Sequence[int],
    *,
    batch_size: int,
    num_threads: int,
) -> Share:
    """Detections of some images."""
    detections: dict[int, Detections] = {}
    unreadable: Counter[str] = Counter()
    window = max(batch_size, 2 * num_threads)
    for image in predict_images(predictor, data, read, indices, window=window, num_threads=num_threads):
        detections[image.index] = image.detections
        if image.problem:
            unreadable[image.problem] += 1
    return Share(detections, dict(unreadable))


def predict_images(
    predictor: Predictor,
    data: LabelledImages,
    read: Read,
    indices: Sequence[int],
    *,
    window: int,
    num_threads: int,
) -> Iterator[Predicted]:
    """Each image with its detections, in order. Twice `window` decoded images are in memory at most."""
    starts = range(0, len(indices), window)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode-evaluation") as pool:
        ahead: list[tuple[int, Future[NDArray[np.uint8] | str]]] = []
        for chunk in (*(indices[start : start + window] for start in starts), ()):
            following = [(index, pool.submit(_pixels, data, read, index)) for index in chunk]
            decoded = [(index, future.result()) for index, future in ahead]
            found = iter(predictor.predict([pixels for _, pixels in decoded if not isinstance(pixels, str)]))
            for index, pixels in decoded:
                if isinstance(pixels, str):
                    yield Predicted(index, None, _nothing(data.annotations(index)), pixels)
                else:
                    yield Predicted(index, pixels, next(found), "")
            ahead = following


def score(
    shares: Sequence[Share],
    data: LabelledImages,
    config: MaskRCNNConfig,
    *,
    step: int,
    per_category: bool = False,
) -> EvalMetrics:
    """AP of what the workers found, whoever found it."""
    detections = {index: found for share in shares for index, found in share.detections.items()}
    in_order = {index: detections[index] for index in sorted(detections)}
    truth = ground_truth(data, list(in_order), config)
    unmeasured = CocoScores(dict.fromkeys(METRICS, -1.0), dict.fromkeys(config.category_ids, -1.0))
    bbox, segm = (
        score_coco(truth, in_order, kind) if truth["annotations"] else unmeasured for kind in ("bbox", "segm")
    )
    by_category = {
        name: {"bbox_AP": bbox.by_category[category_id], "segm_AP": segm.by_category[category_id]}
        for category_id, name in _distinct_names(config)
    }
    unreadable: Counter[str] = Counter()
    for share in shares:
        unreadable.update(share.unreadable)
    return EvalMetrics(
        step,
        bbox.figures,
        segm.figures,
        by_category if per_category else {},
        len(in_order),
        dict(sorted(unreadable.items())),
    )


def ground_truth(data: LabelledImages, indices: Sequence[int], config: MaskRCNNConfig) -> dict[str, Any]:
    """The annotations of some images in COCO's form, their indices as image ids.

    What is to be ignored is a crowd to COCO: it neither counts as missed nor makes a detection false. `area`
    is the mask's, where COCO's own files may have the polygons': figures by size differ by a hair.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in indices:
        known = data.annotations(index)
        images.append({"id": index, "height": known.height, "width": known.width})
        for box, class_index, is_ignored, rle in zip(
            known.boxes.tolist(),
            known.class_indices.tolist(),
            known.ignored.tolist(),
            known.rles,
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": config.category_ids[class_index - 1],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": rle_area(rle),
                    "iscrowd": int(is_ignored),
                    "segmentation": {"size": [known.height, known.width], "counts": rle},
                }
            )
    categories = [{"id": category_id, "name": name} for category_id, name in config.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _gather(share: Share, workers: Workers) -> list[Share]:
    """Every worker's share, on worker 0; nothing on the others."""
    if workers.size == 1:
        return [share]
    gathered: list[Share | None] | None = [None] * workers.size if workers.rank == 0 else None
    dist.gather_object(share, gathered, dst=0)
    return [part for part in gathered or [] if part is not None]


def _pixels(data: LabelledImages, read: Read, index: int) -> NDArray[np.uint8] | str:
    """The image, or why it cannot be read."""
    known = data.annotations(index)
    try:
        pixels = decode_image(read(data.location(index)))
    except DecodeError as error:
        return error.kind
    except MissingObjectError:
        return ErrorKind.MISSING
    except (ChangedObjectError, CorruptObjectError):
        return ErrorKind.CORRUPT
    return pixels if pixels.shape[:2] == (known.height, known.width) else ANOTHER_SIZE


def _nothing(known: Annotations) -> Detections:
    return Detections(
        known.height,
        known.width,
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        [],
        np.zeros(0, np.int32),
    )


def _distinct_names(config: MaskRCNNConfig) -> list[tuple[int, str]]:
    """(category_id, name); a name that several categories have gets its id."""
    count = Counter(name for _, name in config.categories)
    return [(i, name if count[name] == 1 else f"{name} ({i})") for i, name in config.categories]
