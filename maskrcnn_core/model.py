"""Mask R-CNN: backbone + FPN, RPN, RoI heads, trained end to end.

Parameter names are torchvision's (`backbone.body…`, `rpn.head…`, `roi_heads.box_head.fc6…`), so its state
dicts load as they are. Letters: B images, H×W the padded input, D most detections of an image, M mask side.

Nothing between the images and the detections depends in size on what they show, and nothing waits for the
device: a batch can be captured as one graph, or exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskrcnn_core.backbone import build_backbone
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.losses import LossSums
from maskrcnn_core.roi_heads import MAX_CANDIDATES, DetectedBoxes, Instances, RoIHeads, rois_of
from maskrcnn_core.rpn import RegionProposalNetwork


class MaskRCNN(nn.Module):
    """The network. Preprocessing and mask encoding are the predictor's work, not its own."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        self.rpn = RegionProposalNetwork(config)
        self.roi_heads = RoIHeads(config)

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[DetectedBoxes, Tensor]:
        """Detect and segment, every row of the result, empty ones too.

        Args:
            images: (B, 3, H, W), normalised RGB, zero-padded at the right and the bottom.
            image_sizes: (B, 2) float32, height and width of each image without its padding.

        Returns:
            the detections, and mask_probs (B, D, M, M) float32, each on its box.
        """
        found, features = self.detect(images, image_sizes)
        rois = rois_of(found.boxes)
        mask_probs = self.mask_probs(features, rois, found.class_indices.flatten())
        return found, mask_probs.unflatten(0, found.scores.shape)

    def detect(
        self, images: Tensor, image_sizes: Tensor, max_candidates: int = MAX_CANDIDATES
    ) -> tuple[DetectedBoxes, list[Tensor]]:
        """The detections without their masks, and the feature maps that `mask_probs` wants.

        Args:
            max_candidates: see RoIHeads.detect.
        """
        features = self._features(images)
        proposals = self.rpn(features, image_sizes)
        return self.roi_heads.detect(features, proposals, image_sizes, max_candidates), features

    def mask_probs(self, features: list[Tensor], rois: Tensor, class_indices: Tensor) -> Tensor:
        """(T, M, M) masks of any detections of the batch; see RoIHeads.mask_probs."""
        return self.roi_heads.mask_probs(features, rois, class_indices)

    def losses(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances],
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """The five terms of the training loss, unweighted; their sum is what is minimised.

        Args:
            see loss_sums.

        Returns:
            loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask: scalars.
        """
        return self.loss_sums(images, image_sizes, targets, generators).mean()

    def loss_sums(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances],
        generators: Sequence[torch.Generator] | None = None,
    ) -> LossSums:
        """The same five terms before they are divided by the numbers of samples.

        Args:
            images: (B, 3, H, W), normalised RGB, zero-padded at the right and the bottom.
            image_sizes: B (height, width) of the images without their padding.
            targets: B, on the images' device.
            generators: B, on the images' device: an image's anchors and RoIs are sampled with its own, so
                that they do not depend on the rest of the batch. None: torch's global one.
        """
        of_images = [None] * len(targets) if generators is None else generators
        features = self._features(images)
        sizes = torch.tensor(image_sizes, dtype=torch.float32, device=images.device)
        proposals, rpn_sums = self.rpn.proposals_and_losses(
            features, sizes, [t.boxes for t in targets], [t.ignored_boxes for t in targets], of_images
        )
        return rpn_sums | self.roi_heads.losses(features, proposals, image_sizes, targets, of_images)

    def _features(self, images: Tensor) -> list[Tensor]:
        return list(self.backbone(images).values())


def build_model(config: MaskRCNNConfig, seed: int | None = None) -> MaskRCNN:
    """A model with fresh weights; the seed fixes them."""
    if seed is None:
        return MaskRCNN(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskRCNN(config)
