"""Predictor: photographs in, detections with compressed masks out.

Enters: uint8 RGB images of any size. Leaves: one Detections an image, in pixels of that image.
Letters: B images of a micro-batch, D most detections of an image, T detections of the batch, M mask side,
H×W original size.

The way of a micro-batch: resize, normalise and pad in one operator -> network -> boxes to the CPU (the one
point where it must know how many there are) -> masks of just these -> M×M probabilities to the CPU -> RLE.
Inputs are made one micro-batch ahead on a second thread, and masks are encoded on a third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.inference import prepare_for_inference
from maskrcnn_core.masks import encode_mask_probs
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.ops import resize_normalize
from maskrcnn_core.roi_heads import MAX_CANDIDATES
from maskrcnn_core.shapes import Size, common_shape, input_size, tight_shape

Precision = Literal["fp32", "bf16", "fp16"]
Padding = Literal["tight", "common"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(FloatingPointError):
    """The network gave NaN or infinity: its weights are damaged, or the precision is too narrow for them."""


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


@dataclass(frozen=True)
class _Found:
    """One image's part of a micro-batch on the CPU, in input pixels; arrays as in Detections."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_indices: NDArray[np.int64]
    mask_probs: NDArray[np.float32]  # (N, M, M)


class Predictor:
    """A model made ready for one device and one precision."""

    def __init__(
        self,
        model: MaskRCNN,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        batch_size: int = 1,
        padding: Padding = "tight",
    ) -> None:
        """Args:
            model: is copied; training it further changes nothing here.
            device: "cpu", "cuda" or "cuda:N".
            precision: "fp32" is the reference; see docs/exactness.md for what the others change.
            batch_size: most images of one forward pass. Only images with the same padded shape share a pass,
                so that padding does not depend on what else is in the batch.
            padding: "tight" to multiples of 32; "common" to one of at most seven shapes (shapes.py), so that
                more images share a pass and a compiler or autotuner meets few shapes.

        Raises:
            ValueError: fp16 on a CPU, or a batch size below 1.
        """
        if precision == "fp16" and device == "cpu":
            raise ValueError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted >= 1.")
        self.config = model.config
        self._device = torch.device(device)
        self._dtype = _DTYPES[precision]
        self._model = prepare_for_inference(model, self._device, self._dtype)
        self._batch_size = batch_size
        self._padding = padding
        self._category_ids = np.array((0, *model.config.category_ids), dtype=np.int32)  # by class_index
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare-input")
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode-masks")

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect in each image.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes; may be empty.

        Returns:
            one Detections an image, in input order.

        Raises:
            ValueError: an image has another shape or type.
            NonFiniteError: the network gave NaN or infinity.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ValueError(
                    f"an image is {image.shape} {image.dtype}; wanted (H, W, 3) uint8 with H, W >= 1."
                )
        batches = self._micro_batches(images)
        pending: list[tuple[list[int], Future[list[Detections]]]] = []
        for (_, indices), inputs in zip(batches, self._inputs(batches, images), strict=True):
            originals = [(images[i].shape[0], images[i].shape[1]) for i in indices]
            sizes = [input_size(self.config, *original) for original in originals]
            found = self._detect(inputs, sizes)
            pending.append((indices, self._encoder.submit(self._to_detections, found, sizes, originals)))
        results: dict[int, Detections] = {}
        for indices, future in pending:
            results.update(zip(indices, future.result(), strict=True))
        return [results[i] for i in range(len(images))]

    def _micro_batches(self, images: Sequence[NDArray[np.uint8]]) -> list[tuple[Size, list[int]]]:
        """Padded shape and indices of the images that run together, at most batch_size."""
        by_shape: dict[Size, list[int]] = {}
        for index, image in enumerate(images):
            size = input_size(self.config, image.shape[0], image.shape[1])
            shape = tight_shape(size) if self._padding == "tight" else common_shape(self.config, size)
            by_shape.setdefault(shape, []).append(index)
        return [
            (shape, indices[start : start + self._batch_size])
            for shape, indices in by_shape.items()
            for start in range(0, len(indices), self._batch_size)
        ]

    def _inputs(
        self, batches: list[tuple[Size, list[int]]], images: Sequence[NDArray[np.uint8]]
    ) -> Iterator[Tensor]:
        """The network's input for each micro-batch; the next one is made while one is in use."""
        ahead: Future[Tensor] | None = None
        for shape, indices in batches:
            following = self._preparer.submit(self._input, [images[i] for i in indices], shape)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()

    @torch.inference_mode()
    def _detect(self, batch: Tensor, sizes: list[Size]) -> list[_Found]:
        """Run the network on images of one padded shape."""
        image_sizes = self._to_device(torch.tensor(sizes, dtype=torch.float32))
        limit = MAX_CANDIDATES
        while True:
            found, features = self._model.detect(batch, image_sizes, limit)
            flags = torch.stack((found.complete, found.finite), dim=1).float()
            rows = torch.cat((found.boxes, found.scores[..., None], found.class_indices[..., None]), dim=2)
            packed = torch.cat((rows.flatten(1), flags), dim=1).cpu().numpy()  # the first wait
            if not packed[:, -1].all():
                raise NonFiniteError("the network gave values that are not finite; check the weights.")
            if packed[:, -2].all():
                break
            limit *= 8  # rare: thousands of candidates, of which fewer than max_detections survive
        table = packed[:, :-2].reshape(len(sizes), -1, 6)
        image_index, row = np.nonzero(table[..., 5])
        detections = table[image_index, row]
        rois = np.column_stack((image_index.astype(np.float32), detections[:, :4]))
        classes = detections[:, 5].astype(np.int64)
        mask_probs = self._model.mask_probs(
            features, self._to_device(torch.from_numpy(rois)), self._to_device(torch.from_numpy(classes))
        )
        probs = mask_probs.cpu().numpy()  # the second wait
        return [
            _Found(detections[own, :4], detections[own, 4], classes[own], probs[own])
            for own in (image_index == image for image in range(len(sizes)))
        ]

    @torch.inference_mode()
    def _input(self, images: list[NDArray[np.uint8]], shape: Size) -> Tensor:
        """(B, 3, H, W) of the model's type, on the device; runs on the preparing thread."""
        flat = [image.reshape(-1) for image in images]
        together = flat[0] if len(flat) == 1 else np.concatenate(flat)
        pixels = torch.from_numpy(np.require(together, requirements="W"))  # torch takes no read-only memory
        geometry, offset = [], 0
        for image in images:
            height, width = image.shape[:2]
            geometry.append((offset, height, width, *input_size(self.config, height, width)))
            offset += image.size
        mean, std = list(self.config.image_mean), list(self.config.image_std)
        on_device: Tensor = resize_normalize(
            self._to_device(pixels), torch.tensor(geometry), *shape, mean, std, self._dtype
        )
        # float32 is the reference and keeps its memory order: see inference.py
        return on_device.contiguous() if self._dtype == torch.float32 else on_device

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Without waiting for what the device is doing."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _to_detections(
        self, found: list[_Found], resized: list[Size], originals: list[Size]
    ) -> list[Detections]:
        """Boxes to original pixels, masks to RLE; runs on the encoder thread."""
        results = []
        for image, (input_h, input_w), (height, width) in zip(found, resized, originals, strict=True):
            scale = np.array([width / input_w, height / input_h] * 2, dtype=np.float32)
            boxes = image.boxes * scale
            if not np.isfinite(image.mask_probs).all():
                raise NonFiniteError("the network gave a mask that is not finite; check the weights.")
            rles, areas = encode_mask_probs(
                image.mask_probs, boxes, height, width, self.config.mask_threshold
            )
            category_ids = self._category_ids[image.class_indices]
            results.append(Detections(height, width, boxes, image.scores, category_ids, rles, areas))
        return results


def default_device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(precision: str, device: str) -> Precision:
    """What "auto" means on a device: bf16 on a GPU, fp32 on a CPU, where it is the reference."""
    if precision == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if precision not in _DTYPES:
        raise ValueError(f"precision {precision!r}: wanted auto, fp32, bf16 or fp16.")
    return precision  # type: ignore[return-value]
