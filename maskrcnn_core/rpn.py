"""Region proposal network: P2 ... P6 -> objectness and deltas per anchor -> proposals.

Letters: B images, P levels, A anchors a position, N_p anchors of a level, N candidates a level, R proposals
of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from maskrcnn_core.anchors import pyramid_anchors
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
from maskrcnn_core.losses import LossSums, rpn_loss
from maskrcnn_core.ops import nms

RPN_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
MIN_PROPOSAL_PX = 1e-3  # a proposal with a side below this has no area to align
EVERYWHERE_PX = 1e6  # no anchor comes near this


class Proposals(NamedTuple):
    """Of a batch, best first in each image, clipped to it, in input pixels.

    boxes: (B, R, 4) float32, zeros where not valid; valid: (B, R) bool, the first rows of an image;
    finite: (B,) bool, False where the network gave NaN or infinity.
    """

    boxes: Tensor
    valid: Tensor
    finite: Tensor


class RegionProposalNetwork(nn.Module):
    """Faster R-CNN's RPN over a pyramid; parameters are torchvision's `rpn.head.*`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(config.fpn_channels, len(config.anchor_ratios), conv_depth=config.rpn_convs)

    def forward(self, features: list[Tensor], image_sizes: Tensor) -> Proposals:
        """Proposals of each image.

        Args:
            features: P tensors (B, C, H_p, W_p).
            image_sizes: (B, 2) float32, height and width of each image without its padding.
        """
        return self._select(*self._predict(features), image_sizes)

    def proposals_and_losses(
        self,
        features: list[Tensor],
        image_sizes: Tensor,
        gt_boxes: list[Tensor],
        ignored_boxes: list[Tensor],
        generators: Sequence[torch.Generator | None],
    ) -> tuple[Proposals, LossSums]:
        """The same, and the two losses against the ground truth.

        Args:
            gt_boxes: (G, 4) of each image; ignored_boxes: (I, 4) of each image, where nothing is learnt.
            generators: of each image's samples; None: torch's global one.
        """
        logits, deltas, anchors = self._predict(features)
        with torch.no_grad():
            proposals = self._select(
                [x.detach() for x in logits], [x.detach() for x in deltas], anchors, image_sizes
            )
        ignored_boxes = [
            _past_the_border(boxes, size) for boxes, size in zip(ignored_boxes, image_sizes, strict=True)
        ]
        return proposals, self._losses(
            torch.cat(logits, 1),
            torch.cat(deltas, 1),
            torch.cat(anchors),
            gt_boxes,
            ignored_boxes,
            generators,
        )

    def _predict(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits (B, N_p), deltas (B, N_p, 4), anchors (N_p, 4), in float32."""
        raw_logits, raw_deltas = self.head(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in raw_logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float() for x in raw_deltas]
        grids = tuple((x.shape[-2], x.shape[-1]) for x in features)
        return logits, deltas, pyramid_anchors(self.config, grids, features[0].device)

    def _select(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image_sizes: Tensor
    ) -> Proposals:
        """Top anchors a level, decoded, clipped, NMS level by level, top proposals an image."""
        config = self.config
        pre_nms = config.rpn_pre_nms_train if self.training else config.rpn_pre_nms
        post_nms = config.rpn_post_nms_train if self.training else config.rpn_post_nms
        num_candidates = min(pre_nms, max(x.shape[1] for x in logits))
        level_scores, level_boxes = [], []
        for of_level, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            top = of_level.topk(min(pre_nms, of_level.shape[1]), dim=1)
            top_deltas = level_deltas.gather(1, top.indices[..., None].expand(-1, -1, 4))
            boxes = decode_deltas(top_deltas, level_anchors[top.indices], RPN_DELTA_WEIGHTS)
            missing = num_candidates - top.values.shape[1]
            level_scores.append(F.pad(top.values.sigmoid(), (0, missing), value=-1.0))
            level_boxes.append(F.pad(boxes, (0, 0, 0, missing)))
        scores, boxes = torch.cat(level_scores, 1), torch.cat(level_boxes, 1)  # (B, P*N), (B, P*N, 4)
        finite = scores.isfinite().all(1) & boxes.isfinite().flatten(1).all(1)
        boxes = clip_boxes(boxes, image_sizes)
        valid = (scores >= 0) & has_area(boxes, MIN_PROPOSAL_PX)
        groups = (-1, num_candidates)  # a level of an image is a group: levels do not suppress each other
        levels = torch.arange(len(logits), device=boxes.device)[:, None].expand(-1, num_candidates).flatten()
        kept = nms(
            shift_by_label(boxes, levels.expand_as(valid), valid).reshape(*groups, 4),
            torch.zeros_like(valid, dtype=torch.int32).reshape(groups),
            valid.reshape(groups),
            config.rpn_nms_threshold,
            post_nms,
        ).reshape(valid.shape)
        # stable: of equal scores the finer level comes first, as in torchvision
        order = torch.where(kept, scores, -1.0).sort(dim=1, descending=True, stable=True)
        best = order.indices[:, :post_nms]
        chosen = order.values[:, :post_nms] >= 0
        proposals = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        return Proposals(torch.where(chosen[..., None], proposals, 0.0), chosen, finite)

    def _losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        gt_boxes: list[Tensor],
        ignored_boxes: list[Tensor],
        generators: Sequence[torch.Generator | None],
    ) -> LossSums:
        config = self.config
        sampled_logits, labels, positive_deltas, delta_targets = [], [], [], []
        for image, (boxes, ignored, generator) in enumerate(
            zip(gt_boxes, ignored_boxes, generators, strict=True)
        ):
            matched = match(
                boxes,
                anchors,
                positive_iou=config.rpn_positive_iou,
                negative_iou=config.rpn_negative_iou,
                rescue=True,
                ignored_boxes=ignored,
            )
            positive, negative = sample_balanced(
                matched, config.rpn_samples, config.rpn_positive_fraction, generator
            )
            sampled_logits.append(logits[image, torch.cat((positive, negative))])
            labels.append(torch.cat((logits.new_ones(len(positive)), logits.new_zeros(len(negative)))))
            positive_deltas.append(deltas[image, positive])
            delta_targets.append(
                encode_deltas(boxes[matched[positive]], anchors[positive], RPN_DELTA_WEIGHTS)
            )
        return rpn_loss(
            torch.cat(sampled_logits),
            torch.cat(labels),
            torch.cat(positive_deltas),
            torch.cat(delta_targets),
            config.rpn_smooth_l1_beta,
        )


def _past_the_border(ignored_boxes: Tensor, image_size: Tensor) -> Tensor:
    """Ignored regions without an end where they touch the image's border, since anchors reach beyond it.

    So a region that is the whole image leaves no anchor to learn from.
    """
    most = image_size.flip(0).repeat(2)
    starts = torch.where(ignored_boxes <= 0, -EVERYWHERE_PX, ignored_boxes)[:, :2]
    ends = torch.where(ignored_boxes >= most, EVERYWHERE_PX, ignored_boxes)[:, 2:]
    return torch.cat((starts, ends), 1)
