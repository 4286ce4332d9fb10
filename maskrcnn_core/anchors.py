"""Anchors: the boxes that the region proposal network refines.

Letters: P pyramid levels, A anchors a position.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from maskrcnn_core.backbone import STRIDES
from maskrcnn_core.config import MaskRCNNConfig


def pyramid_anchors(
    config: MaskRCNNConfig, grids: tuple[tuple[int, int], ...], device: torch.device
) -> list[Tensor]:
    """Anchors of every level, float32, in input pixels.

    Args:
        grids: P (height, width) of the feature maps, P2 first.

    Returns:
        P tensors (height * width * A, 4), row by row, the ratios of a position side by side.

    Source: Faster R-CNN, section 3.1.1; FPN, section 4.1.
    """
    if torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
        return _pyramid_anchors(config, grids, device)
    return _cached_anchors(config, grids, device)


@lru_cache(maxsize=64)
def _cached_anchors(
    config: MaskRCNNConfig, grids: tuple[tuple[int, int], ...], device: torch.device
) -> list[Tensor]:
    with torch.inference_mode(False):  # so that training may use what labelling cached
        return _pyramid_anchors(config, grids, device)


def _pyramid_anchors(
    config: MaskRCNNConfig, grids: tuple[tuple[int, int], ...], device: torch.device
) -> list[Tensor]:
    padded = tuple(side * STRIDES[0] for side in grids[0])  # P2 divides the input exactly
    levels = []
    for size, (rows, columns), nominal in zip(config.anchor_sizes, grids, STRIDES, strict=True):
        if config.anchor_strides == "nominal":
            step_y = step_x = nominal
        else:  # at P6 a little under 64 where the padded size is no multiple of 64
            step_y, step_x = padded[0] // rows, padded[1] // columns
        x = torch.arange(columns, dtype=torch.float32, device=device) * step_x
        y = torch.arange(rows, dtype=torch.float32, device=device) * step_y
        y, x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack((x, y, x, y), dim=-1)[:, :, None]
        cell = cell_anchors(size, config.anchor_ratios, config.anchor_rounding).to(device)
        levels.append((centers + cell).reshape(-1, 4))
    return levels


def cell_anchors(size: float, ratios: tuple[float, ...], rounding: bool) -> Tensor:
    """(A, 4): one anchor a ratio (height / width) of area size², around the origin.

    Args:
        rounding: corners to whole pixels, ties to even (config.anchor_rounding).
    """
    roots = torch.tensor(ratios, dtype=torch.float32).sqrt()
    heights, widths = roots * size, 1.0 / roots * size
    corners = torch.stack((-widths, -heights, widths, heights), dim=1) / 2
    return corners.round() if rounding else corners
