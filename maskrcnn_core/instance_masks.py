"""Ground-truth masks as crops: what lies around an instance is not stored.

Enters: a small mask and its corner for each instance, or dense masks. Leaves: mask targets of RoIs.

Letters: G instances of one image, P pixels of all their crops, F RoIs with an instance, H×W the image.

Dense masks of a crowded image (G·H·W bytes) have exhausted training machines; the crops of its instances
take a hundredth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.ops import crop_align


@dataclass(frozen=True)
class MaskCrops:
    """Masks of the G instances of an image, each a rectangle of it, zero outside; network-input pixels.

    pixels: (P,) uint8, 1 inside and 0 outside, the crops one after another, each row by row;
    corners: (G, 2) int64, y0 and x0; sizes: (G, 2) int64, height and width, which may be 0.

    Raises:
        ValueError: types or shapes do not fit; on a CPU also where P is not what the sizes add up to.
    """

    pixels: Tensor
    corners: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 1:
            raise ValueError(f"pixels are {_described(self.pixels)}; want (P,) uint8")
        for name in ("corners", "sizes"):
            values = getattr(self, name)
            if values.dtype != torch.int64 or values.shape != (len(self.corners), 2):
                raise ValueError(f"{name} are {_described(values)}; want (G, 2) int64 of the same G")
        if self.sizes.device.type == "cpu":  # a GPU would have to be waited for
            num_pixels = int(self.sizes.prod(1).sum())
            if num_pixels != len(self.pixels) or bool((self.sizes < 0).any()):
                raise ValueError(f"sizes add up to {num_pixels} pixels, and there are {len(self.pixels)}")

    @classmethod
    def from_crops(cls, crops: Sequence[tuple[int, int, Tensor | NDArray[Any]]]) -> MaskCrops:
        """Of (y0, x0, mask) for each instance; a mask is (h, w), bool or numbers that are 0 outside.

        Raises:
            ValueError: a mask is not two-dimensional.
        """
        masks = [np.asarray(mask) for _, _, mask in crops]
        for index, mask in enumerate(masks):
            if mask.ndim != 2:
                raise ValueError(f"mask {index} has shape {mask.shape}; want (h, w)")
        pixels = [(mask != 0).reshape(-1) for mask in masks]
        joined = np.concatenate(pixels) if pixels else np.zeros(0, np.bool_)
        return cls(
            torch.from_numpy(joined.view(np.uint8)),
            torch.tensor([(y0, x0) for y0, x0, _ in crops], dtype=torch.int64).reshape(-1, 2),
            torch.tensor([mask.shape for mask in masks], dtype=torch.int64).reshape(-1, 2),
        )

    @classmethod
    def from_dense(cls, masks: Tensor) -> MaskCrops:
        """Of (G, H, W), 0 outside, each cropped to its tight box; an empty one becomes 0×0 at the origin."""
        crops = []
        for mask in masks.cpu().numpy() != 0:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            y0, y1, x0, x1 = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else [0] * 4
            crops.append((int(y0), int(x0), mask[y0:y1, x0:x1]))
        return cls.from_crops(crops).to(masks.device)

    def __len__(self) -> int:
        """G."""
        return len(self.corners)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskCrops:
        tensors = (self.pixels, self.corners, self.sizes)
        return MaskCrops(*(x.to(device, non_blocking=non_blocking) for x in tensors))


def align_crops(
    crops: MaskCrops,
    gt_index: Tensor,
    boxes: Tensor,
    side: int,
    aligned: bool,
    image_size: tuple[int, int],
) -> Tensor:
    """Cut each box out of the mask of its instance, as RoIAlign does.

    Args:
        gt_index: (F,) int64 in 0 … G-1, which mask; boxes: (F, 4) float32, where. F may be 0.
        side: of the result, in pixels.
        aligned: as the features are (config.roi_aligned).
        image_size: H and W of the dense masks: RoIAlign goes on with the last row and column up to a pixel
            beyond the border.

    Returns:
        (F, side, side) float32 in [0, 1]: what torchvision's `roi_align` with its adaptive number of samples
        gives on the dense (G, H, W) masks, to the rounding of the sum.
    """
    targets: Tensor = crop_align(
        crops.pixels, crops.corners, crops.sizes, gt_index, boxes, *image_size, side, aligned
    )
    return targets


def _described(values: Tensor) -> str:
    return f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
