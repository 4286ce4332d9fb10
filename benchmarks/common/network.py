"""Untrained networks that behave like trained ones, since no trained one can be shipped or downloaded.

Fresh weights without training make activations grow from block to block and give every class the same score.
Here each batch norm gets the statistics of what it really sees, and each last layer is scaled so that its
outputs spread as a trained one's do: hundreds of candidates, of all sizes, with scores from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_core.config import MaskRCNNConfig, r50_fpn, r50_fpn_v2
from maskrcnn_core.model import MaskRCNN, build_model

NINETY = tuple((i, f"category {i}") for i in range(1, 91))  # torchvision's 91 classes with background
PRESETS: dict[str, tuple[Callable[..., MaskRCNNConfig], Callable[..., nn.Module]]] = {
    "r50_fpn": (r50_fpn, maskrcnn_resnet50_fpn),
    "r50_fpn_v2": (r50_fpn_v2, maskrcnn_resnet50_fpn_v2),
}


def same_weights(
    preset: str, photograph: Tensor, *, min_size_px: int = 800, max_size_px: int = 1333, **changes: Any
) -> tuple[Any, MaskRCNN]:
    """torchvision's network and ours with the same weights, both in eval mode.

    Args:
        photograph: (3, H, W) float in [0, 1], on which the statistics are taken.
        changes: of our config; score_threshold, max_detections and rpn_post_nms go to both.
    """
    make_config, make_reference = PRESETS[preset]
    config = make_config(NINETY).replace(min_size_px=min_size_px, max_size_px=max_size_px, **changes)
    torch.manual_seed(0)
    reference: Any = make_reference(
        weights=None,
        weights_backbone=None,
        num_classes=config.num_classes,
        min_size=min_size_px,
        max_size=max_size_px,
        box_score_thresh=config.score_threshold,
        box_detections_per_img=config.max_detections,
        rpn_post_nms_top_n_test=config.rpn_post_nms,
    ).eval()
    if config.norm == "frozen_bn":  # torchvision freezes only where it has downloaded weights
        _freeze_norms(reference.backbone.body)
    settle(reference, photograph)
    ours = build_model(config).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@torch.no_grad()
def settle(reference: Any, photograph: Tensor) -> None:
    """Set batch-norm statistics and the scale of the last layers, front to back, in one forward pass."""
    for block in reference.modules():
        if isinstance(block, Bottleneck):  # a block adds a little to what it gets, as in trained networks
            block.bn3.weight.fill_(0.2)
    hooks = [
        module.register_forward_pre_hook(_take_statistics)
        for module in reference.modules()
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]
    heads = reference.roi_heads
    for module, spread in (
        (reference.rpn.head.cls_logits, 3.0),
        (reference.rpn.head.bbox_pred, 0.2),
        (heads.box_predictor.cls_score, 2.5),
        (heads.box_predictor.bbox_pred, 0.5),
        (heads.mask_predictor.mask_fcn_logits, 4.0),
    ):
        hooks.append(module.register_forward_pre_hook(partial(_scale_outputs, spread)))
    reference([photograph])
    reference.rpn.head.cls_logits.bias -= 6.0  # most anchors hold no object,
    heads.box_predictor.cls_score.bias[0] += 5.0  # and most proposals are background
    for hook in hooks:
        hook.remove()


def _freeze_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, child.eps))
        else:
            _freeze_norms(child)


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    norm.get_buffer("running_mean").copy_(inputs[0].mean((0, 2, 3)))
    norm.get_buffer("running_var").copy_(inputs[0].var((0, 2, 3)).clamp(min=1e-3))


def _scale_outputs(spread: float, layer: nn.Module, inputs: tuple[Tensor]) -> None:
    """Outputs with a mean of 0 and this standard deviation in each channel."""
    if getattr(layer, "settled", False):  # the RPN's head runs once a level
        return
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    bias.zero_()
    outputs = layer.forward(*inputs)
    across = [dim for dim in range(outputs.dim()) if dim != 1]
    factor = spread / outputs.std(across).clamp(min=1e-6)
    weight.mul_(factor.reshape(-1, *[1] * (weight.dim() - 1)))
    bias.copy_(-outputs.mean(across) * factor)
    layer.settled = True  # type: ignore[assignment]
