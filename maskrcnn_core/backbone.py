"""Backbone and feature pyramid: (B, 3, H, W) normalised images -> P2 ... P6, strides 4 ... 64.

Layers are torchvision's, and so are the parameter names: `backbone.body.*`, `backbone.fpn.*`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import mobilenet_v2, resnet50, resnet101
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from maskrcnn_core.config import MaskRCNNConfig

STRIDES = (4, 8, 16, 32, 64)
SIZE_DIVISOR = 32  # inputs are padded to a multiple of the deepest stage's stride

_RESNET_STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # deepest first
# Last block of each stride in MobileNetV2's `features`; block 18 (the classifier's 1280 channels)
# serves ImageNet only and is left out.
_MOBILENET_TAPS = {"3": 24, "6": 32, "13": 96, "17": 320}


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """torchvision's, in float32; in fewer bits one pass that keeps the type.

    torchvision's scale and shift are float32 tensors and make the activations float32, too, so that in
    autocast everything between two convolutions moves twice the bytes, and more to convert them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            exact: Tensor = super().forward(x)
            return exact
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Backbone(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's, whose frozen stages stay what they are in training, too.

    A batch norm whose scale and shift are not trained keeps to its statistics: training mode would normalise
    by those of the batch and move the stored ones, under convolutions that nothing adapts to them.
    """

    def __init__(self, body: nn.Module, *args: Any, **settings: Any) -> None:
        super().__init__(body, *args, **settings)
        # By name and once: an average of the weights, a copy, is trained nowhere.
        self._frozen_norms = [
            name
            for name, module in self.named_modules()
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
        ]
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self._frozen_norms:
            self.get_submodule(name).eval()
        return self


def build_backbone(config: MaskRCNNConfig) -> Backbone:
    """The pyramid of Lin et al. on the config's backbone; stages outside `trainable_stages` are frozen."""
    norm_layer = _norm_layer(config.norm, config.norm_eps)
    fpn_norm: Callable[..., nn.Module] | None = nn.BatchNorm2d if config.fpn_norm else None
    if config.backbone == "mobilenet_v2":
        body: nn.Module = mobilenet_v2(weights=None, norm_layer=norm_layer).features[:18]
        taps = _MOBILENET_TAPS
        _freeze_blocks(body, config.trainable_stages)
        return Backbone(
            body,
            {name: str(level) for level, name in enumerate(taps)},
            list(taps.values()),
            config.fpn_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=fpn_norm,
        )
    resnet = {"resnet50": resnet50, "resnet101": resnet101}[config.backbone]
    body = resnet(weights=None, norm_layer=norm_layer)
    if config.stride_in_1x1:
        _move_stride_to_1x1(body)
    trained = _RESNET_STAGES[: config.trainable_stages] + (("bn1",) if config.trainable_stages == 5 else ())
    for name, parameter in body.named_parameters():
        if not name.startswith(trained):
            parameter.requires_grad_(False)
    return Backbone(
        body,
        {f"layer{stage}": str(stage - 1) for stage in range(1, 5)},
        [256, 512, 1024, 2048],
        config.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=fpn_norm,
    )


def _norm_layer(norm: str, eps: float) -> Callable[..., nn.Module]:
    layers: dict[str, Callable[..., nn.Module]] = {
        "frozen_bn": partial(FrozenBatchNorm, eps=eps),
        "bn": partial(nn.BatchNorm2d, eps=eps),
        "sync_bn": partial(nn.SyncBatchNorm, eps=eps),  # acts in training, over all workers
        "gn": partial(_group_norm, eps=eps),
    }
    return layers[norm]


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Groups of 8 channels: every width of MobileNetV2 and of ResNet is a multiple of 8."""
    return nn.GroupNorm(channels // 8, channels, eps=eps)


def _move_stride_to_1x1(resnet: nn.Module) -> None:
    """Halve the grid in the first convolution of a stage, as ResNet was released (config.stride_in_1x1)."""
    for stage in ("layer2", "layer3", "layer4"):
        block = resnet.get_submodule(stage)[0]  # type: ignore[index]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _freeze_blocks(features: nn.Module, trainable_stages: int) -> None:
    """Freeze MobileNetV2's blocks before the last `trainable_stages` changes of stride."""
    first_block_of_stage = (0, 2, 4, 7, 14)
    if trainable_stages == 5:
        return
    first_trained = (*first_block_of_stage, 18)[5 - trainable_stages]
    for index, block in enumerate(features.children()):
        if index < first_trained:
            for parameter in block.parameters():
                parameter.requires_grad_(False)
