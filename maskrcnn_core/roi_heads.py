"""RoI heads: proposals -> classes, refined boxes and mask probabilities.

Letters: B images, R RoIs (of an image, or of the batch), K classes with background, N candidates of an image,
D most detections of an image, T detections of the batch, M mask side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align as align_one_level

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
from maskrcnn_core.losses import box_head_loss, mask_head_loss
from maskrcnn_core.ops import nms, roi_align
from maskrcnn_core.rpn import Proposals

CANONICAL_BOX_PX, CANONICAL_LEVEL = 224, 4  # FPN, equation 1: a 224-px box is pooled from P4
LEVEL_EPS = 1e-6  # torchvision's, so that sqrt rounding does not move a box of exactly 112 px
MIN_DETECTION_PX = 1e-2  # torchvision drops detections with a shorter side
MAX_CANDIDATES = 4096  # see RoIHeads.detect


@dataclass(frozen=True)
class Instances:
    """Ground truth of one image, in pixels of the network's input.

    boxes: (G, 4) float32; class_indices: (G,) int64 >= 1; masks: (G, H, W) uint8, 1 inside. G may be 0.
    """

    boxes: Tensor
    class_indices: Tensor
    masks: Tensor


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
        last: nn.Conv2d = predictor.mask_fcn_logits
        row = torch.zeros_like(class_indices) if self.config.mask_class_agnostic else class_indices
        weight, bias = last.weight[row].flatten(1), last.bias[row]  # type: ignore[index]
        # One class of K: a matrix product for each detection instead of a convolution to K channels.
        pixels = hidden.flatten(2).transpose(1, 2).to(weight.dtype)  # (T, M*M, C), as it lies in memory
        logits = torch.baddbmm(bias[:, None, None], pixels, weight[..., None])
        probs: Tensor = logits[..., 0].float().sigmoid().unflatten(1, hidden.shape[2:])
        return probs

    def losses(
        self, features: list[Tensor], proposals: Proposals, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Sample RoIs among the proposals and the ground-truth boxes; classify, regress and segment them."""
        config = self.config
        candidates = [boxes[valid] for boxes, valid in zip(proposals.boxes, proposals.valid, strict=True)]
        rois, classes, delta_targets, positives, gt_of_positive = self._sample(candidates, targets)
        pooled = self._align(features, _cat_rois(rois), config.box_roi_size)
        class_logits, box_deltas = self._predict_boxes(pooled)
        loss_classifier, loss_box_reg = box_head_loss(
            class_logits, box_deltas, torch.cat(classes), torch.cat(delta_targets), config.box_smooth_l1_beta
        )
        side = 2 * config.mask_roi_size
        mask_targets = torch.cat(
            [
                align_masks(target.masks, gt_index, boxes, side, config.roi_aligned)
                for target, gt_index, boxes in zip(targets, gt_of_positive, positives, strict=True)
            ]
        )
        mask_classes = torch.cat(
            [t.class_indices[gt_index] for t, gt_index in zip(targets, gt_of_positive, strict=True)]
        )
        pooled = self._align(features, _cat_rois(positives), config.mask_roi_size)
        mask_logits = self.mask_predictor(self.mask_head(pooled)).float()
        loss_mask = mask_head_loss(mask_logits, mask_classes, mask_targets)
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}

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


def pyramid_level(boxes: Tensor) -> Tensor:
    """(R,) int64 in 0 ... 3: the position in P2 ... P5 of the level a box is pooled from."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_BOX_PX) + LEVEL_EPS)
    return level.clamp(2, 5).to(torch.int64) - 2


def align_masks(masks: Tensor, gt_index: Tensor, boxes: Tensor, side: int, aligned: bool) -> Tensor:
    """Cut each box out of its ground-truth mask: (F, side, side) float in [0, 1].

    Args:
        masks: (G, H, W) uint8; gt_index: (F,) which mask; boxes: (F, 4) where.
        aligned: as the features are (config.roi_aligned).
    """
    rois = torch.cat((gt_index[:, None].to(boxes), boxes), dim=1)
    cut: Tensor = align_one_level(masks[:, None].to(boxes), rois, side, 1.0, aligned=aligned)
    return cut[:, 0]


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
