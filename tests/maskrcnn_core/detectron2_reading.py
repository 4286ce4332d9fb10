"""Detectron2's Mask R-CNN written out once more from its arrays, with torch.nn.functional alone.

For tests: an oracle that shares no code and no names with the network under test. It follows Detectron2's
modeling/ (backbone/resnet.py, backbone/fpn.py, proposal_generator/rpn.py, roi_heads/*.py) and its
conventions: pixels of 0 to 255 in the config's order, classes 0 to C - 1 and then the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn
from torchvision.ops import batched_nms, roi_align

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """What a training config chooses; C categories, W channels in the pyramid and the heads."""

    num_categories: int = 3
    depth: int = 50
    large: bool = False  # 4conv1fc box head, batch norm in pyramid and heads
    rpn_convs: int = 1
    frozen_bn: bool = True
    stride_in_1x1: bool = True
    bgr: bool = True
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    box_agnostic: bool = False
    mask_agnostic: bool = False
    width: int = 256
    fc_width: int = 1024

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        return (3, 4, 6, 3) if self.depth == 50 else (3, 4, 23, 3)


def random_arrays(network: Network, seed: int = 0) -> Arrays:
    """A state dict of Detectron2's names and shapes; activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {}

    def conv(name: str, out: int, into: int, side: int, *, norm: bool = False, bias: bool = False) -> None:
        scale = (2 / (into * side * side)) ** 0.5
        arrays[f"{name}.weight"] = scale * torch.randn(out, into, side, side, generator=generator)
        if bias:
            arrays[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)
        if norm:
            arrays[f"{name}.norm.weight"] = 0.5 + torch.rand(out, generator=generator)
            arrays[f"{name}.norm.bias"] = 0.1 * torch.randn(out, generator=generator)
            arrays[f"{name}.norm.running_mean"] = 0.1 * torch.randn(out, generator=generator)
            arrays[f"{name}.norm.running_var"] = 0.5 + torch.rand(out, generator=generator)
            if not (network.frozen_bn and name.startswith("backbone.bottom_up")):
                arrays[f"{name}.norm.num_batches_tracked"] = torch.tensor(9)

    def linear(name: str, out: int, into: int) -> None:
        arrays[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        arrays[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    bottom_up = "backbone.bottom_up"
    conv(f"{bottom_up}.stem.conv1", 64, 3, 7, norm=True)
    arrays[f"{bottom_up}.stem.conv1.weight"] *= torch.tensor(network.pixel_std).view(1, 3, 1, 1) / 60
    into = 64
    for stage, count in enumerate(network.blocks):
        inner, out = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"{bottom_up}.res{stage + 2}.{block}"
            if block == 0:
                conv(f"{name}.shortcut", out, into, 1, norm=True)
            conv(f"{name}.conv1", inner, into, 1, norm=True)
            conv(f"{name}.conv2", inner, inner, 3, norm=True)
            conv(f"{name}.conv3", out, inner, 1, norm=True)
            arrays[f"{name}.conv3.norm.weight"] *= 0.2  # or a hundred layers grow without bound
            into = out
    width, fc_width = network.width, network.fc_width
    for level in range(2, 6):
        conv(
            f"backbone.fpn_lateral{level}",
            width,
            64 * 2**level,
            1,
            norm=network.large,
            bias=not network.large,
        )
        conv(f"backbone.fpn_output{level}", width, width, 3, norm=network.large, bias=not network.large)
    head = "proposal_generator.rpn_head"
    for name in _rpn_convs(network):
        conv(name, width, width, 3, bias=True)
    conv(f"{head}.objectness_logits", 3, width, 1, bias=True)
    conv(f"{head}.anchor_deltas", 12, width, 1, bias=True)
    arrays[f"{head}.anchor_deltas.weight"] *= 0.1
    if network.large:
        for i in range(1, 5):
            conv(f"roi_heads.box_head.conv{i}", width, width, 3, norm=True)
        linear("roi_heads.box_head.fc1", fc_width, width * 49)
    else:
        linear("roi_heads.box_head.fc1", fc_width, width * 49)
        linear("roi_heads.box_head.fc2", fc_width, fc_width)
    count = network.num_categories
    linear("roi_heads.box_predictor.cls_score", count + 1, fc_width)
    linear("roi_heads.box_predictor.bbox_pred", 4 if network.box_agnostic else 4 * count, fc_width)
    for i in range(1, 5):
        conv(f"roi_heads.mask_head.mask_fcn{i}", width, width, 3, norm=network.large, bias=not network.large)
    arrays["roi_heads.mask_head.deconv.weight"] = (
        torch.randn(width, width, 2, 2, generator=generator) / width**0.5
    )
    arrays["roi_heads.mask_head.deconv.bias"] = 0.1 * torch.randn(width, generator=generator)
    conv("roi_heads.mask_head.predictor", 1 if network.mask_agnostic else count, width, 1, bias=True)
    return arrays


def pyramid(network: Network, arrays: Arrays, rgb: Tensor) -> list[Tensor]:
    """P2 to P6 of (B, 3, H, W) RGB of 0 to 255, H and W multiples of 32."""
    pixels = rgb.flip(1) if network.bgr else rgb
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.pixel_mean, network.pixel_std))
    x = fn.relu(_conv(arrays, "backbone.bottom_up.stem.conv1", (pixels - mean) / std, stride=2, padding=3))
    x = fn.max_pool2d(x, 3, 2, 1)
    stages = []
    for stage, count in enumerate(network.blocks):
        for block in range(count):
            name = f"backbone.bottom_up.res{stage + 2}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            stride_1x1, stride_3x3 = (stride, 1) if network.stride_in_1x1 else (1, stride)
            y = fn.relu(_conv(arrays, f"{name}.conv1", x, stride=stride_1x1))
            y = fn.relu(_conv(arrays, f"{name}.conv2", y, stride=stride_3x3, padding=1))
            y = _conv(arrays, f"{name}.conv3", y)
            x = fn.relu(y + (_conv(arrays, f"{name}.shortcut", x, stride=stride) if block == 0 else x))
        stages.append(x)
    levels: list[Tensor] = []
    above: Tensor | None = None
    for level in (5, 4, 3, 2):
        lateral = _conv(arrays, f"backbone.fpn_lateral{level}", stages[level - 2])
        above = lateral if above is None else lateral + fn.interpolate(above, scale_factor=2, mode="nearest")
        levels.insert(0, _conv(arrays, f"backbone.fpn_output{level}", above, padding=1))
    return [*levels, fn.max_pool2d(levels[-1], 1, 2, 0)]


def rpn_head(network: Network, arrays: Arrays, feature: Tensor) -> tuple[Tensor, Tensor]:
    """Objectness (B, 3, h, w) and deltas (B, 12, h, w) of one level."""
    for name in _rpn_convs(network):
        feature = fn.relu(_conv(arrays, name, feature, padding=1))
    head = "proposal_generator.rpn_head"
    return _conv(arrays, f"{head}.objectness_logits", feature), _conv(
        arrays, f"{head}.anchor_deltas", feature
    )


def box_head(network: Network, arrays: Arrays, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Of (R, W, 7, 7): class probabilities (R, C + 1), background last, and deltas (R, 4C) or (R, 4)."""
    name = "roi_heads.box_head"
    if network.large:
        for i in range(1, 5):
            pooled = fn.relu(_conv(arrays, f"{name}.conv{i}", pooled, padding=1))
    # Written as a sum over channel, row and column: the order of fc1's inputs is what is being read.
    fc1 = arrays[f"{name}.fc1.weight"].view(network.fc_width, network.width, 7, 7)
    x = fn.relu(torch.einsum("ochw,rchw->ro", fc1, pooled) + arrays[f"{name}.fc1.bias"])
    if not network.large:
        x = fn.relu(_linear(arrays, f"{name}.fc2", x))
    logits = _linear(arrays, "roi_heads.box_predictor.cls_score", x)
    return logits.softmax(dim=1), _linear(arrays, "roi_heads.box_predictor.bbox_pred", x)


def mask_head(network: Network, arrays: Arrays, pooled: Tensor) -> Tensor:
    """Mask logits (R, C, 28, 28) or (R, 1, 28, 28) of (R, W, 14, 14)."""
    name = "roi_heads.mask_head"
    for i in range(1, 5):
        pooled = fn.relu(_conv(arrays, f"{name}.mask_fcn{i}", pooled, padding=1))
    weight, bias = arrays[f"{name}.deconv.weight"], arrays[f"{name}.deconv.bias"]
    return _conv(arrays, f"{name}.predictor", fn.relu(fn.conv_transpose2d(pooled, weight, bias, stride=2)))


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes (N, 4) moved by deltas (N, 4); modeling/box_regression.py."""
    dx, dy, dw, dh = (deltas[:, i] / weights[i] for i in range(4))
    limit = torch.log(torch.tensor(1000.0 / 16))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + 0.5 * width + dx * width, boxes[:, 1] + 0.5 * height + dy * height
    new_width, new_height = width * dw.clamp(max=limit).exp(), height * dh.clamp(max=limit).exp()
    return torch.stack(
        (x - 0.5 * new_width, y - 0.5 * new_height, x + 0.5 * new_width, y + 0.5 * new_height), dim=1
    )


def anchors(level: int, height: int, width: int) -> Tensor:
    """(height * width * 3, 4) of P2 + level: 32 px and up, ratios 0.5, 1, 2, strides from 4, unrounded."""
    size, stride = 32.0 * 2**level, 4 * 2**level
    cell = []
    for ratio in (0.5, 1.0, 2.0):
        w = (size**2 / ratio) ** 0.5
        h = ratio * w
        cell.append([-w / 2, -h / 2, w / 2, h / 2])
    shifts = [[x * stride, y * stride] * 2 for y in range(height) for x in range(width)]
    return (torch.tensor(shifts)[:, None] + torch.tensor(cell)[None]).reshape(-1, 4)


def detect(
    network: Network, arrays: Arrays, rgb: Tensor, score_threshold: float, num_proposals: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image, unpadded: boxes (D, 4), scores (D,), categories (D,) in 0 ... C - 1, mask probabilities."""
    height, width = rgb.shape[2:]
    features = pyramid(network, arrays, rgb)
    boxes, scores, levels = [], [], []
    for level, feature in enumerate(features):
        logits, deltas = rpn_head(network, arrays, feature)
        flat_logits = logits[0].permute(1, 2, 0).flatten()
        flat_deltas = deltas[0].view(3, 4, *feature.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        order = flat_logits.argsort(descending=True)[:1000]
        proposals = decode(flat_deltas[order], anchors(level, *feature.shape[2:])[order], (1, 1, 1, 1))
        boxes.append(_clip(proposals, height, width))
        scores.append(flat_logits[order])
        levels.append(torch.full_like(order, level))
    all_boxes, all_scores, all_levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
    nonempty = ((all_boxes[:, 2:] - all_boxes[:, :2]) > 0).all(dim=1)
    all_boxes, all_scores, all_levels = all_boxes[nonempty], all_scores[nonempty], all_levels[nonempty]
    rois = all_boxes[batched_nms(all_boxes, all_scores, all_levels, 0.7)[:num_proposals]]
    probs, deltas = box_head(network, arrays, _pool(features, rois, 7))
    count = network.num_categories
    per_class = deltas.view(len(rois), -1, 4).expand(-1, count, -1).reshape(-1, 4)
    decoded = decode(per_class, rois.repeat_interleave(count, dim=0), (10, 10, 5, 5))
    decoded = _clip(decoded, height, width).view(len(rois), count, 4)
    row, category = torch.where(probs[:, :count] > score_threshold)
    found, found_scores = decoded[row, category], probs[row, category]
    keep = batched_nms(found, found_scores, category, 0.5)[:100]
    keep = keep[((found[keep, 2:] - found[keep, :2]) > 0).all(dim=1)]  # modeling/postprocessing.py
    found, found_scores, category = found[keep], found_scores[keep], category[keep]
    masks = mask_head(network, arrays, _pool(features, found, 14)).sigmoid()
    chosen = torch.zeros_like(category) if network.mask_agnostic else category
    return found, found_scores, category, masks[torch.arange(len(found)), chosen]


def _pool(features: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    """ROIAlignV2, sampling_ratio 0, from the level that fits; modeling/poolers.py."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-8)).clamp(2, 5).long() - 2
    pooled = torch.zeros(len(boxes), features[0].shape[1], side, side)
    for index in range(4):
        rows = torch.where(level == index)[0]
        rois = torch.cat((torch.zeros(len(rows), 1), boxes[rows]), dim=1)
        pooled[rows] = roi_align(features[index], rois, side, 1 / (4 * 2**index), 0, aligned=True)
    return pooled


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def _rpn_convs(network: Network) -> list[str]:
    name = "proposal_generator.rpn_head.conv"
    return [name] if network.rpn_convs == 1 else [f"{name}.conv{i}" for i in range(network.rpn_convs)]


def _conv(arrays: Arrays, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with its bias or its batch norm, whichever it has."""
    x = fn.conv2d(x, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"), stride, padding)
    if f"{name}.norm.weight" not in arrays:
        return x
    mean, var, weight, bias = (
        arrays[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return fn.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)


def _linear(arrays: Arrays, name: str, x: Tensor) -> Tensor:
    return fn.linear(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"])
