"""Region proposal network: P2 ... P6 -> objectness and deltas per anchor -> proposals.

Letters: B images, P levels, A anchors a position, N anchors of an image over all levels, S kept before NMS.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from maskrcnn_core.backbone import STRIDES
from maskrcnn_core.boxes import clip_boxes, decode_deltas, encode_deltas, match, sample_balanced
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.losses import rpn_loss

RPN_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
MIN_PROPOSAL_PX = 1e-3  # a proposal with a side below this has no area to align


class RegionProposalNetwork(nn.Module):
    """Faster R-CNN's RPN over a pyramid; parameters are torchvision's `rpn.head.*`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.anchors = AnchorGenerator(
            sizes=tuple((size,) for size in config.anchor_sizes),
            aspect_ratios=(config.anchor_ratios,) * len(config.anchor_sizes),
        )
        self.head = RPNHead(config.fpn_channels, len(config.anchor_ratios), conv_depth=config.rpn_convs)

    def forward(self, features: list[Tensor], image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Proposals of each image, best first.

        Args:
            features: P tensors (B, C, H_p, W_p).
            image_sizes: (height, width) of each image without its padding.

        Returns:
            B tensors (n, 4), n <= post-NMS limit, clipped to the image; n may be 0.
        """
        return self._select(*self._predict(features), image_sizes)

    def proposals_and_losses(
        self, features: list[Tensor], image_sizes: list[tuple[int, int]], gt_boxes: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The same, and the two losses against the ground truth of each image, (G, 4) each."""
        logits, deltas, anchors = self._predict(features)
        with torch.no_grad():
            proposals = self._select(
                [x.detach() for x in logits], [x.detach() for x in deltas], anchors, image_sizes
            )
        return proposals, self._losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), gt_boxes
        )

    def _predict(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits (B, N_p), deltas (B, N_p, 4), anchors (N_p, 4), in float32."""
        raw_logits, raw_deltas = self.head(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in raw_logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float() for x in raw_deltas]
        grid_sizes = [list(x.shape[-2:]) for x in features]
        device = features[0].device
        # As torchvision, whose weights were trained so: padded size // grid size, which at P6 is a
        # little under 64 where the padded size is no multiple of 64. P2 gives the padded size.
        padded = [side * STRIDES[0] for side in grid_sizes[0]]
        strides = [
            [torch.tensor(p // g, device=device) for p, g in zip(padded, grid, strict=True)]
            for grid in grid_sizes
        ]
        self.anchors.set_cell_anchors(torch.float32, device)
        return logits, deltas, self.anchors.grid_anchors(grid_sizes, strides)

    def _select(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Top anchors a level, decoded, clipped, NMS level by level, top proposals an image."""
        config = self.config
        pre_nms = config.rpn_pre_nms_train if self.training else config.rpn_pre_nms
        post_nms = config.rpn_post_nms_train if self.training else config.rpn_post_nms
        scores, boxes, levels = [], [], []
        for level, (level_logits, level_deltas, level_anchors) in enumerate(
            zip(logits, deltas, anchors, strict=True)
        ):
            top = level_logits.topk(min(pre_nms, level_logits.shape[1]), dim=1)
            top_deltas = level_deltas.gather(1, top.indices[..., None].expand(-1, -1, 4))
            scores.append(torch.sigmoid(top.values))
            boxes.append(decode_deltas(top_deltas, level_anchors[top.indices], RPN_DELTA_WEIGHTS))
            levels.append(torch.full_like(top.indices, level))
        all_scores, all_boxes, all_levels = torch.cat(scores, 1), torch.cat(boxes, 1), torch.cat(levels, 1)
        proposals = []
        for image, (height, width) in enumerate(image_sizes):
            clipped = clip_boxes(all_boxes[image], height, width)
            large = ((clipped[:, 2:] - clipped[:, :2]) >= MIN_PROPOSAL_PX).all(dim=1)
            candidates, image_scores = clipped[large], all_scores[image][large]
            keep = batched_nms(candidates, image_scores, all_levels[image][large], config.rpn_nms_threshold)
            proposals.append(candidates[keep[:post_nms]])
        return proposals

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, gt_boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        config = self.config
        sampled_logits, labels, positive_deltas, delta_targets = [], [], [], []
        for image, boxes in enumerate(gt_boxes):
            matched = match(
                boxes,
                anchors,
                positive_iou=config.rpn_positive_iou,
                negative_iou=config.rpn_negative_iou,
                rescue=True,
            )
            positive, negative = sample_balanced(matched, config.rpn_samples, config.rpn_positive_fraction)
            sampled_logits.append(logits[image, torch.cat((positive, negative))])
            labels.append(torch.cat((logits.new_ones(len(positive)), logits.new_zeros(len(negative)))))
            positive_deltas.append(deltas[image, positive])
            delta_targets.append(
                encode_deltas(boxes[matched[positive]], anchors[positive], RPN_DELTA_WEIGHTS)
            )
        objectness, regression = rpn_loss(
            torch.cat(sampled_logits), torch.cat(labels), torch.cat(positive_deltas), torch.cat(delta_targets)
        )
        return {"loss_objectness": objectness, "loss_rpn_box_reg": regression}
