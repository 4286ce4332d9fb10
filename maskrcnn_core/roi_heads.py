"""RoI heads: proposals -> classes, refined boxes and mask probabilities.

Letters: B images, R RoIs over the batch, K classes with background, M mask side, D detections of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, roi_align

from maskrcnn_core.backbone import STRIDES
from maskrcnn_core.boxes import clip_boxes, decode_deltas, encode_deltas, match, sample_balanced
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.losses import box_head_loss, mask_head_loss

CANONICAL_BOX_PX, CANONICAL_LEVEL = 224, 4  # FPN, equation 1: a 224-px box is pooled from P4
LEVEL_EPS = 1e-6  # torchvision's, so that sqrt rounding does not move a box of exactly 112 px
MIN_DETECTION_PX = 1e-2  # torchvision drops detections with a shorter side


@dataclass(frozen=True)
class Instances:
    """Ground truth of one image, in pixels of the network's input.

    boxes: (G, 4) float32; class_indices: (G,) int64 >= 1; masks: (G, H, W) uint8, 1 inside. G may be 0.
    """

    boxes: Tensor
    class_indices: Tensor
    masks: Tensor


@dataclass(frozen=True)
class RawDetections:
    """What the network says of one image, in pixels of its input, sorted by falling score.

    boxes: (D, 4); scores: (D,); class_indices: (D,) int64 >= 1; mask_probs: (D, M, M) of the predicted class,
    on the box.
    """

    boxes: Tensor
    scores: Tensor
    class_indices: Tensor
    mask_probs: Tensor


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
        self.box_predictor = FastRCNNPredictor(config.box_head_channels, config.num_classes)
        self.mask_head = MaskRCNNHeads(
            channels,
            [config.mask_head_channels] * config.mask_head_convs,
            1,
            norm_layer=nn.BatchNorm2d if config.mask_head_norm else None,
        )
        self.mask_predictor = MaskRCNNPredictor(
            config.mask_head_channels, config.mask_head_channels, config.num_classes
        )

    def forward(
        self, features: list[Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[RawDetections]:
        """Detections of each image; the mask is the predicted class's (Mask R-CNN, section 3.1)."""
        class_logits, box_deltas = self._box_branch(features, proposals)
        boxes, scores, classes = self._select(class_logits, box_deltas, proposals, image_sizes)
        mask_logits = self._mask_branch(features, boxes)
        all_classes = torch.cat(classes)
        rows = torch.arange(len(all_classes), device=all_classes.device)
        mask_probs = mask_logits[rows, all_classes].sigmoid().split([len(b) for b in boxes])
        return [RawDetections(*fields) for fields in zip(boxes, scores, classes, mask_probs, strict=True)]

    def losses(
        self, features: list[Tensor], proposals: list[Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Sample RoIs among the proposals and the ground-truth boxes; classify, regress and segment them."""
        rois, classes, delta_targets, positives, gt_of_positive = self._sample(proposals, targets)
        class_logits, box_deltas = self._box_branch(features, rois)
        loss_classifier, loss_box_reg = box_head_loss(
            class_logits, box_deltas, torch.cat(classes), torch.cat(delta_targets)
        )
        side = 2 * self.config.mask_roi_size
        mask_targets = torch.cat(
            [
                align_masks(target.masks, gt_index, boxes, side)
                for target, gt_index, boxes in zip(targets, gt_of_positive, positives, strict=True)
            ]
        )
        mask_classes = torch.cat(
            [t.class_indices[gt_index] for t, gt_index in zip(targets, gt_of_positive, strict=True)]
        )
        loss_mask = mask_head_loss(self._mask_branch(features, positives), mask_classes, mask_targets)
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}

    def _box_branch(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """class_logits (R, K) and box_deltas (R, 4K), float32."""
        pooled = self._align(features, boxes, self.config.box_roi_size)
        class_logits, box_deltas = self.box_predictor(self.box_head(pooled))
        return class_logits.float(), box_deltas.float()

    def _mask_branch(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """mask_logits (R, K, M, M), float32."""
        pooled = self._align(features, boxes, self.config.mask_roi_size)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled)).float()
        return logits

    def _align(self, features: list[Tensor], boxes: list[Tensor], side: int) -> Tensor:
        return roi_align_pyramid(
            features, boxes, side, self.config.roi_sampling_ratio, self.config.roi_aligned
        )

    def _select(
        self,
        class_logits: Tensor,
        box_deltas: Tensor,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Threshold, NMS class by class, best `max_detections`; per image boxes, scores, classes."""
        config = self.config
        counts = [len(p) for p in proposals]
        num_classes = class_logits.shape[1]
        decoded = decode_deltas(
            box_deltas.unflatten(1, (num_classes, 4)), torch.cat(proposals)[:, None], config.box_delta_weights
        )
        probs = class_logits.softmax(dim=-1)
        boxes, scores, classes = [], [], []
        for image_boxes, image_probs, (height, width) in zip(
            decoded.split(counts), probs.split(counts), image_sizes, strict=True
        ):
            candidates = clip_boxes(image_boxes, height, width)[:, 1:]
            candidate_scores = image_probs[:, 1:]
            size = candidates[..., 2:] - candidates[..., :2]
            keep = (candidate_scores > config.score_threshold) & (size >= MIN_DETECTION_PX).all(dim=-1)
            row, column = torch.where(keep)
            kept_boxes, kept_scores, kept_classes = (
                candidates[row, column],
                candidate_scores[row, column],
                column + 1,
            )
            best = batched_nms(kept_boxes, kept_scores, kept_classes, config.nms_threshold)[
                : config.max_detections
            ]
            boxes.append(kept_boxes[best])
            scores.append(kept_scores[best])
            classes.append(kept_classes[best])
        return boxes, scores, classes

    @torch.no_grad()
    def _sample(
        self, proposals: list[Tensor], targets: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Per image: RoIs (r, 4), class_indices (r,), delta targets (r, 4), positives, their gt index."""
        config = self.config
        rois, classes, delta_targets, positives, gt_of_positive = [], [], [], [], []
        for image_proposals, target in zip(proposals, targets, strict=True):
            candidates = torch.cat((image_proposals, target.boxes))
            matched = match(
                target.boxes,
                candidates,
                positive_iou=config.roi_iou,
                negative_iou=config.roi_iou,
                rescue=False,
            )
            positive, negative = sample_balanced(matched, config.roi_samples, config.roi_positive_fraction)
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


def roi_align_pyramid(
    features: list[Tensor], boxes: list[Tensor], side: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign each box from the level that fits its size.

    Args:
        features: P2 ... (B, C, H_p, W_p); P6 serves the RPN only and is ignored.
        boxes: B tensors (r, 4) in input pixels.
        side: output grid.

    Returns:
        (R, C, side, side) in the order of `boxes`; R may be 0.

    Source: FPN, equation 1; Mask R-CNN, section 3 (RoIAlign).
    """
    features = features[:4]
    image_index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    all_boxes = torch.cat(boxes)
    rois = torch.cat((image_index, all_boxes), dim=1).to(features[0].dtype)
    level = pyramid_level(all_boxes)
    pooled = features[0].new_zeros((len(all_boxes), features[0].shape[1], side, side))
    for index, (feature, stride) in enumerate(zip(features, STRIDES, strict=False)):
        of_level = torch.where(level == index)[0]
        pooled[of_level] = roi_align(
            feature, rois[of_level], side, 1.0 / stride, sampling_ratio=sampling_ratio, aligned=aligned
        )
    return pooled


def pyramid_level(boxes: Tensor) -> Tensor:
    """(R,) int64 in 0 ... 3: the position in P2 ... P5 of the level a box is pooled from."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_BOX_PX) + LEVEL_EPS)
    return level.clamp(2, 5).to(torch.int64) - 2


def align_masks(masks: Tensor, gt_index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut each box out of its ground-truth mask: (F, side, side) float in [0, 1].

    Args:
        masks: (G, H, W) uint8; gt_index: (F,) which mask; boxes: (F, 4) where.
    """
    rois = torch.cat((gt_index[:, None].to(boxes), boxes), dim=1)
    aligned: Tensor = roi_align(masks[:, None].to(boxes), rois, side, 1.0)
    return aligned[:, 0]
