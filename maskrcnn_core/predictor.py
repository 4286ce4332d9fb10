"""Predictor: photographs in, detections with compressed masks out.

Enters: uint8 RGB images of any size. Leaves: one Detections an image, in pixels of that image.
Letters: B images of a micro-batch, N detections of an image, M mask side, H×W original size.

The way of a photograph: resize -> normalise -> pad -> network -> boxes back to original pixels -> RLE. Pixels
and mask probabilities never outlive their micro-batch; masks of one batch are encoded on a second thread
while the network runs the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.backbone import SIZE_DIVISOR
from maskrcnn_core.masks import encode_mask_probs
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.roi_heads import RawDetections

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Detections:
    """What was found in one image, sorted by falling score; N may be 0.

    boxes: (N, 4) float32 x0 y0 x1 y1, pixels of the original image; scores: (N,) float32;
    category_ids: (N,) int32; rles: N COCO compressed count strings of size (height, width);
    areas: (N,) int32, pixels of the mask.
    """

    height: int
    width: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int32]
    rles: list[bytes]
    areas: NDArray[np.int32]


class Predictor:
    """A model made ready for one device and one precision."""

    def __init__(
        self, model: MaskRCNN, *, device: str = "cpu", precision: Precision = "fp32", batch_size: int = 1
    ) -> None:
        """Args:
            device: "cpu", "cuda" or "cuda:N".
            batch_size: most images of one forward pass. Only images with the same padded shape share a pass,
                so that padding does not depend on what else is in the batch.

        Raises:
            ValueError: fp16 on a CPU, or a batch size below 1.
        """
        if precision == "fp16" and device == "cpu":
            raise ValueError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted >= 1.")
        self.config = model.config
        self._device = torch.device(device)
        self._model = model.eval().to(self._device).to(memory_format=torch.channels_last)
        self._dtype = _AUTOCAST[precision]
        self._batch_size = batch_size
        self._category_ids = np.array((0, *model.config.category_ids), dtype=np.int32)  # by class_index
        self._mean, self._std = (
            torch.tensor(x, device=self._device).view(1, 3, 1, 1)
            for x in (model.config.image_mean, model.config.image_std)
        )
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode-masks")

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect in each image.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes; may be empty.

        Returns:
            one Detections an image, in input order.

        Raises:
            ValueError: an image has another shape or type.
            FloatingPointError: the network gave NaN for an image.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ValueError(
                    f"an image is {image.shape} {image.dtype}; wanted (H, W, 3) uint8 with H, W >= 1."
                )
        pending: list[tuple[list[int], Future[list[Detections]]]] = []
        for batch in self._micro_batches(images):
            sizes = [images[i].shape[:2] for i in batch]
            raw, resized = self._forward([images[i] for i in batch])
            pending.append((batch, self._encoder.submit(self._to_detections, raw, resized, sizes)))
        found: dict[int, Detections] = {}
        for batch, future in pending:
            found.update(zip(batch, future.result(), strict=True))
        return [found[i] for i in range(len(images))]

    def _micro_batches(self, images: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
        """Indices of images that run together: same padded shape, at most batch_size."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            height, width = self._input_size(image.shape[0], image.shape[1])
            by_shape.setdefault((_pad(height), _pad(width)), []).append(index)
        return [
            indices[start : start + self._batch_size]
            for indices in by_shape.values()
            for start in range(0, len(indices), self._batch_size)
        ]

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing: shorter side min_size_px unless the longer passes max_size_px."""
        shorter, longer = np.float32(min(height, width)), np.float32(max(height, width))
        # float32 and floor as torchvision computes it, so that sizes agree to the pixel
        scale = float(
            min(np.float32(self.config.min_size_px) / shorter, np.float32(self.config.max_size_px) / longer)
        )
        return max(1, int(height * scale)), max(1, int(width * scale))

    @torch.inference_mode()
    def _forward(self, images: list[NDArray[np.uint8]]) -> tuple[list[RawDetections], list[tuple[int, int]]]:
        """Run the network on images of one padded shape; results are on the CPU, with the resized sizes."""
        resized = [self._resize(image) for image in images]
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in resized]
        batch = torch.zeros((len(images), 3, _pad(sizes[0][0]), _pad(sizes[0][1])), device=self._device).to(
            memory_format=torch.channels_last
        )
        for target, image, (height, width) in zip(batch, resized, sizes, strict=True):
            target[:, :height, :width] = image[0]
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            raw = self._model(batch, sizes)
        return [
            RawDetections(r.boxes.cpu(), r.scores.cpu(), r.class_indices.cpu(), r.mask_probs.cpu())
            for r in raw
        ], sizes

    def _resize(self, image: NDArray[np.uint8]) -> Tensor:
        """(1, 3, h, w) float32, normalised."""
        pixels = torch.from_numpy(image).to(self._device).permute(2, 0, 1)[None].float().div_(255.0)
        size = self._input_size(image.shape[0], image.shape[1])
        normalised = pixels.sub_(self._mean).div_(self._std)
        return F.interpolate(normalised, size=size, mode="bilinear", align_corners=False)

    def _to_detections(
        self, raw: list[RawDetections], resized: list[tuple[int, int]], sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """Boxes to original pixels, masks to RLE; runs on the encoder thread."""
        results = []
        for image, (input_h, input_w), (height, width) in zip(raw, resized, sizes, strict=True):
            scale = np.array([width / input_w, height / input_h] * 2, dtype=np.float32)
            boxes = image.boxes.float().numpy() * scale
            if not np.isfinite(boxes).all():
                raise FloatingPointError("the network gave a box that is not finite; check the weights.")
            probs = image.mask_probs.float().numpy()
            rles, areas = encode_mask_probs(probs, boxes, height, width, self.config.mask_threshold)
            results.append(
                Detections(
                    height,
                    width,
                    boxes,
                    image.scores.float().numpy(),
                    self._category_ids[image.class_indices.numpy()],
                    rles,
                    areas,
                )
            )
        return results


def default_device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision: str, device: str) -> Precision:
    """What "auto" means on a device: bf16 on a GPU, fp32 on a CPU, where it is the reference."""
    if precision == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if precision not in _AUTOCAST:
        raise ValueError(f"precision {precision!r}: wanted auto, fp32, bf16 or fp16.")
    return precision  # type: ignore[return-value]


def _pad(side: int) -> int:
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR
