"""Mask R-CNN: backbone + FPN, RPN, RoI heads, trained end to end.

Parameter names are torchvision's (`backbone.body…`, `rpn.head…`, `roi_heads.box_head.fc6…`), so its state
dicts load as they are. Letters: B images, H×W the padded input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskrcnn_core.backbone import build_backbone
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.roi_heads import Instances, RawDetections, RoIHeads
from maskrcnn_core.rpn import RegionProposalNetwork


class MaskRCNN(nn.Module):
    """The network. Preprocessing and mask encoding are the predictor's work, not its own."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        self.rpn = RegionProposalNetwork(config)
        self.roi_heads = RoIHeads(config)

    def forward(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[RawDetections]:
        """Detect.

        Args:
            images: (B, 3, H, W) float, normalised RGB, zero-padded at the right and the bottom.
            image_sizes: (height, width) of each image without its padding.
        """
        features = self._features(images)
        return self.roi_heads(features, self.rpn(features, image_sizes), image_sizes)  # type: ignore[no-any-return]

    def losses(
        self, images: Tensor, image_sizes: list[tuple[int, int]], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """The five terms of the training loss, unweighted; their sum is what is minimised.

        Returns:
            loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask: scalars.
        """
        features = self._features(images)
        proposals, rpn_losses = self.rpn.proposals_and_losses(
            features, image_sizes, [t.boxes for t in targets]
        )
        return rpn_losses | self.roi_heads.losses(features, proposals, targets)

    def _features(self, images: Tensor) -> list[Tensor]:
        return list(self.backbone(images).values())


def build_model(config: MaskRCNNConfig, seed: int | None = None) -> MaskRCNN:
    """A model with fresh weights; the seed fixes them."""
    if seed is None:
        return MaskRCNN(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskRCNN(config)
