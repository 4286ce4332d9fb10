"""RoI heads: proposals -> classes, refined boxes and mask probabilities.

Letters: B images, R RoIs (of an image, or of the batch), K classes with background, N candidates of an image,
D most detections of an image, T detections of the batch, M mask side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn_core.backbone import STRIDES
from maskrcnn_core.boxes import (
    clip_boxes,
    decode_deltas,
    encode_deltas,
    has_area,
    match,
    sample_balanced,
    shift_by_label,
)
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.instance_masks import MaskCrops, align_crops
from maskrcnn_core.losses import LossSums, box_head_loss, mask_head_loss
from maskrcnn_core.ops import nms, roi_align
from maskrcnn_core.rpn import Proposals

CANONICAL_BOX_PX, CANONICAL_LEVEL = 224, 4  # FPN, equation 1: a 224-px box is pooled from P4
LEVEL_EPS = 1e-6  # torchvision's, so that sqrt rounding does not move a box of exactly 112 px
MIN_DETECTION_PX = 1e-2  # torchvision drops detections with a shorter side
MAX_CANDIDATES = 4096  # see RoIHeads.detect


@dataclass(frozen=True)
class Instances:
    """Ground truth of one image, in pixels of the network's input.

    boxes: (G, 4) float32; class_indices: (G,) int64 >= 1; masks: of the same G, which may be 0;
    ignored_boxes: (I, 4) float32, regions in which nothing is learnt, such as crowds. An anchor or RoI of
    which at least half lies in one of them is no negative. One over the whole image makes it count for
    nothing.
    """

    boxes: Tensor
    class_indices: Tensor
    masks: MaskCrops
    ignored_boxes: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Instances:
        return Instances(
            self.boxes.to(device, non_blocking=non_blocking),
            self.class_indices.to(device, non_blocking=non_blocking),
            self.masks.to(device, non_blocking),
            self.ignored_boxes.to(device, non_blocking=non_blocking),
        )


class DetectedBoxes(NamedTuple):
    """What a batch shows, in input pixels, by falling score; rows after an image's last one are zeros.

    boxes: (B, D, 4) float32; scores: (B, D) float32; class_indices: (B, D) int64, 0 where there is none;
    complete: (B,) bool, False where candidates were left out that could have changed the result;
    finite: (B,) bool, False where the network gave NaN or infinity: then the rest means nothing.
    """

    boxes: Tensor
    scores: Tensor
    class_indices: Tensor
    complete: Tensor
    finite: Tensor


class BoxPredictor(nn.Module):
    """Class logits and box deltas of a RoI; parameters are torchvision's `box_predictor.*`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        num_boxes = 1 if config.box_class_agnostic else config.num_classes
        self.cls_score = nn.Linear(config.box_head_channels, config.num_classes)
        self.bbox_pred = nn.Linear(config.box_head_channels, 4 * num_boxes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) -> class_logits (R, K) and box_deltas (R, 4K), or (R, 4) for one box of all classes."""
        return self.cls_score(features), self.bbox_pred(features)


class RoIHeads(nn.Module):
    """Box head and mask head with their predictors; parameters are torchvision's `roi_heads.*`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        channels, side = config.fpn_channels, config.box_roi_size
        if config.box_head == "2fc":
            self.box_head: nn.Module = TwoMLPHead(channels * side**2, config.box_head_channels)
        else:
            self.box_head = FastRCNNConvFCHead(
                (channels, side, side), [channels] * 4, [config.box_head_channels], norm_layer=nn.BatchNorm2d
            )
        self.box_predictor = BoxPredictor(config)
        self.mask_head = MaskRCNNHeads(
            channels,
            [config.mask_head_channels] * config.mask_head_convs,
            1,
            norm_layer=nn.BatchNorm2d if config.mask_head_norm else None,
        )
        self.mask_predictor = MaskRCNNPredictor(
            config.mask_head_channels,
            config.mask_head_channels,
            1 if config.mask_class_agnostic else config.num_classes,
        )

    def detect(
        self,
        features: list[Tensor],
        proposals: Proposals,
        image_sizes: Tensor,
        max_candidates: int = MAX_CANDIDATES,
    ) -> DetectedBoxes:
        """Threshold, NMS class by class, the best `max_detections`.

        Args:
            image_sizes: (B, 2) float32, height and width of each image without its padding.
            max_candidates: the best so many (RoI, class) pairs of an image go into NMS, so that sizes do not
                depend on the data. This changes nothing unless more pass the threshold *and* fewer than
                `max_detections` of these survive: then `complete` is False.
        """
        config = self.config
        pooled = self._align(features, rois_of(proposals.boxes), config.box_roi_size)
        class_logits, box_deltas = self._predict_boxes(pooled)
        (num_images, num_rois), num_classes = proposals.valid.shape, class_logits.shape[1]
        finite = class_logits.isfinite().all(1) & box_deltas.isfinite().all(1)
        probs = class_logits.softmax(dim=-1)[:, 1:].reshape(num_images, num_rois, num_classes - 1)
        is_candidate = proposals.valid[..., None] & (probs > config.score_threshold)
        all_scores = torch.where(is_candidate, probs, -1.0).flatten(1)
        scores, chosen = _stable_topk(all_scores, min(max_candidates, all_scores.shape[1]))
        roi, classes = chosen // (num_classes - 1), chosen % (num_classes - 1) + 1
        delta_row = roi if config.box_class_agnostic else roi * num_classes + classes
        deltas = _rows(box_deltas.reshape(num_images, box_deltas.shape[1] * num_rois // 4, 4), delta_row)
        boxes = decode_deltas(deltas, _rows(proposals.boxes, roi), config.box_delta_weights)
        boxes = clip_boxes(boxes, image_sizes)
        valid = (scores >= 0) & has_area(boxes, MIN_DETECTION_PX)
        shifted = shift_by_label(boxes, classes, valid)
        kept = nms(shifted, classes.to(torch.int32), valid, config.nms_threshold, config.max_detections)
        # The kept ones to the front, in order: the best has the highest rank.
        num_candidates = kept.shape[1]
        rank = torch.where(kept, torch.arange(num_candidates, 0, -1, device=kept.device), 0)
        best = rank.topk(min(config.max_detections, num_candidates), dim=1)
        found = best.values > 0
        complete = (is_candidate.flatten(1).sum(1) <= num_candidates) | (kept.sum(1) >= config.max_detections)
        return DetectedBoxes(
            torch.where(found[..., None], _rows(boxes, best.indices), 0.0),
            torch.where(found, scores.gather(1, best.indices), 0.0),
            torch.where(found, classes.gather(1, best.indices), 0),
            complete,
            finite.reshape(num_images, num_rois).all(1) & proposals.finite,
        )

    def mask_probs(self, features: list[Tensor], rois: Tensor, class_indices: Tensor) -> Tensor:
        """The mask of each detection, of its own class only (Mask R-CNN, section 3.1).

        Args:
            rois: (T, 5) float32: image index, x0, y0, x1, y1 in input pixels. T may be 0.
            class_indices: (T,) int64.

        Returns:
            (T, M, M) float32 in [0, 1], on the box.
        """
        predictor = self.mask_predictor
        hidden = self.mask_head(self._align(features, rois, self.config.mask_roi_size))
        hidden = predictor.relu(predictor.conv5_mask(hidden))  # (T, C, M, M)
        # (T, M*M, C), as it lies in memory; the last layer may be of another type
        pixels = hidden.flatten(2).transpose(1, 2).to(predictor.mask_fcn_logits.weight.dtype)
        logits = self._own_mask_logits(pixels, class_indices)
        probs: Tensor = logits.float().sigmoid().unflatten(1, hidden.shape[2:])
        return probs

    def losses(
        self,
        features: list[Tensor],
        proposals: Proposals,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances],
        generators: Sequence[torch.Generator | None],
    ) -> LossSums:
        """Sample RoIs among the proposals and the ground-truth boxes; classify, regress and segment them.

        Args:
            image_sizes: B (height, width) of the images without their padding.
            generators: of each image's samples; None: torch's global one.
        """
        config = self.config
        candidates = [boxes[valid] for boxes, valid in zip(proposals.boxes, proposals.valid, strict=True)]
        rois, classes, delta_targets, positives, gt_of_positive = self._sample(
            candidates, targets, generators
        )
        pooled = self._align(features, _cat_rois(rois), config.box_roi_size)
        class_logits, box_deltas = self._predict_boxes(pooled)
        box_sums = box_head_loss(
            class_logits, box_deltas, torch.cat(classes), torch.cat(delta_targets), config.box_smooth_l1_beta
        )
        side = 2 * config.mask_roi_size
        mask_targets = torch.cat(
            [
                align_crops(target.masks, gt_index, boxes, side, config.roi_aligned, size)
                for target, gt_index, boxes, size in zip(
                    targets, gt_of_positive, positives, image_sizes, strict=True
                )
            ]
        )
        mask_classes = torch.cat(
            [t.class_indices[gt_index] for t, gt_index in zip(targets, gt_of_positive, strict=True)]
        )
        mask_logits = self._mask_logits(features, _cat_rois(positives), mask_classes)
        return box_sums | mask_head_loss(mask_logits, mask_targets)

    def _mask_logits(self, features: list[Tensor], rois: Tensor, class_indices: Tensor) -> Tensor:
        """(F, M, M) float32: what mask_probs applies the sigmoid to, made in a way that trains faster.

        The transposed convolution doubles the grid without overlap: it is a product with one matrix for each
        corner of a pixel, whose gradient takes a CPU half as long (256 RoIs, two cores: 0.25 s, not 0.56 s),
        and the corners need to be put in place only in the logits. Its sums are rounded in another order,
        hence inference, which is held to torchvision's bits, keeps the convolution.
        """
        hidden = self.mask_head(self._align(features, rois, self.config.mask_roi_size))
        upsample: nn.ConvTranspose2d = self.mask_predictor.conv5_mask
        channels = upsample.out_channels
        of_corners = upsample.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2·2·C, C_in)
        assert upsample.bias is not None
        corners = F.linear(hidden.permute(0, 2, 3, 1), of_corners, upsample.bias.repeat(4)).relu()
        height, width = hidden.shape[2:]
        logits = self._own_mask_logits(
            corners.reshape(len(rois), height * width * 4, channels), class_indices
        )
        by_corner = logits.float().reshape(len(rois), height, width, 2, 2)
        return by_corner.transpose(2, 3).reshape(len(rois), 2 * height, 2 * width)

    def _own_mask_logits(self, pixels: Tensor, class_indices: Tensor) -> Tensor:
        """The last layer for one class of K: a matrix product for each RoI, not a convolution to K channels.

        Args:
            pixels: (T, P, C); class_indices: (T,).

        Returns:
            (T, P).
        """
        last: nn.Conv2d = self.mask_predictor.mask_fcn_logits
        row = torch.zeros_like(class_indices) if self.config.mask_class_agnostic else class_indices
        weight, bias = last.weight[row].flatten(1), last.bias[row]  # type: ignore[index]
        return torch.baddbmm(bias[:, None, None], pixels, weight[..., None])[..., 0]

    def _predict_boxes(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """class_logits (R, K) and box_deltas (R, 4K) or (R, 4), float32."""
        hidden = self.box_head(pooled).to(self.box_predictor.cls_score.weight.dtype)
        class_logits, box_deltas = self.box_predictor(hidden)
        return class_logits.float(), box_deltas.float()

    def _align(self, features: list[Tensor], rois: Tensor, side: int) -> Tensor:
        """(R, C, side, side), each RoI from the level that fits its size (FPN, equation 1)."""
        pooled: Tensor = roi_align(
            features[:4],  # P6 serves the RPN only
            rois,
            pyramid_level(rois[:, 1:]),
            list(STRIDES[:4]),
            side,
            self.config.roi_sampling_ratio,
            self.config.roi_aligned,
        )
        # The heads' convolutions round as the memory lies: in the features' order (inference.py).
        return pooled.contiguous() if features[0].is_contiguous() else pooled

    @torch.no_grad()
    def _sample(
        self,
        proposals: list[Tensor],
        targets: Sequence[Instances],
        generators: Sequence[torch.Generator | None],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Per image: RoIs (r, 4), class_indices (r,), delta targets (r, 4), positives, their gt index."""
        config = self.config
        rois, classes, delta_targets, positives, gt_of_positive = [], [], [], [], []
        for image_proposals, target, generator in zip(proposals, targets, generators, strict=True):
            candidates = torch.cat((image_proposals, target.boxes))
            matched = match(
                target.boxes,
                candidates,
                positive_iou=config.roi_iou,
                negative_iou=config.roi_iou,
                rescue=False,
                ignored_boxes=target.ignored_boxes,
            )
            positive, negative = sample_balanced(
                matched, config.roi_samples, config.roi_positive_fraction, generator
            )
            chosen = candidates[torch.cat((positive, negative))]
            gt_index = matched[positive]
            image_classes = target.class_indices.new_zeros(len(chosen))
            image_classes[: len(positive)] = target.class_indices[gt_index]
            image_deltas = torch.zeros_like(chosen)
            image_deltas[: len(positive)] = encode_deltas(
                target.boxes[gt_index], candidates[positive], config.box_delta_weights
            )
            rois.append(chosen)
            classes.append(image_classes)
            delta_targets.append(image_deltas)
            positives.append(candidates[positive])
            gt_of_positive.append(gt_index)
        return rois, classes, delta_targets, positives, gt_of_positive


def pyramid_level(boxes: Tensor) -> Tensor:
    """(R,) int64 in 0 ... 3: the position in P2 ... P5 of the level a box is pooled from."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_BOX_PX) + LEVEL_EPS)
    return level.clamp(2, 5).to(torch.int64) - 2


def rois_of(boxes: Tensor) -> Tensor:
    """(B, R, 4) boxes of each image -> (B*R, 5) with the image's index in front."""
    index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
    return torch.cat((index.expand(-1, boxes.shape[1], 1), boxes), dim=2).flatten(0, 1)


def _cat_rois(boxes: list[Tensor]) -> Tensor:
    """B tensors (r, 4) -> (R, 5) with the image's index in front."""
    return torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values (B, R, 4), index (B, N) -> (B, N, 4)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of each row, falling; of equal ones the first comes first, which topk leaves open."""
    index = values.topk(k, dim=1).indices.sort(dim=1).values
    order = values.gather(1, index).sort(dim=1, descending=True, stable=True)
    return order.values, index.gather(1, order.indices)
