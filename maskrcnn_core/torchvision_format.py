"""torchvision's Mask R-CNN state dicts in and out.

Enters: a state dict of maskrcnn_resnet50_fpn, its v2, or a MaskRCNN on another ResNet-FPN. Leaves: a config
and a state dict that loads strictly; or, the other way, what in torchvision a config's weights load into.

Our parameter names are torchvision's, and class_index is its label, so the tensors stay as they are. What
there is to do: names of before torchvision 0.13, and the config that names and shapes imply.

Source: torchvision 0.29, models/detection/mask_rcnn.py, rpn.py, ops/feature_pyramid_network.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.config import COCO_CATEGORIES, MaskRCNNConfig, r50_fpn, r50_fpn_v2, r101_fpn
from maskrcnn_core.foreign_weights import check_fit, wanted_tensors

# The files torchvision publishes carry the start of their sha256 in their names:
# maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth and maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth.
COCO_V1_SHA256 = "bf2d0c1e"  # torchvision sets eps to 0 for this one: its frozen norms were trained without
COCO_V2_SHA256 = "73cbd019"
NUM_PUBLISHED_CATEGORIES = 90

# Names of torchvision before 0.13, whose modules still read them, and so does the file COCO_V1.
_OLD_NAMES = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
)
_OLD_MASK_NAME = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)")

# Fields that decide which layers there are.
_LAYERS = {
    "backbone",
    "fpn_channels",
    "fpn_norm",
    "rpn_convs",
    "box_head",
    "box_head_channels",
    "mask_head_channels",
    "mask_head_convs",
    "mask_head_norm",
}
# Fields of our config that torchvision's builders take as arguments, under their names there.
_BUILDER_ARGUMENTS = {
    "min_size_px": "min_size",
    "max_size_px": "max_size",
    "image_mean": "image_mean",
    "image_std": "image_std",
    "score_threshold": "box_score_thresh",
    "nms_threshold": "box_nms_thresh",
    "max_detections": "box_detections_per_img",
    "box_delta_weights": "bbox_reg_weights",
    "rpn_pre_nms": "rpn_pre_nms_top_n_test",
    "rpn_post_nms": "rpn_post_nms_top_n_test",
    "rpn_nms_threshold": "rpn_nms_thresh",
}
# Fields that change what the same weights compute, and that torchvision's builders cannot be told.
_NOT_IN_TORCHVISION = (
    "norm_eps",
    "stride_in_1x1",
    "anchor_sizes",
    "anchor_ratios",
    "anchor_rounding",
    "anchor_strides",
    "roi_sampling_ratio",
    "roi_aligned",
    "box_class_agnostic",
    "mask_class_agnostic",
    "box_roi_size",
    "mask_roi_size",
)


def published_coco_categories() -> tuple[tuple[int, str], ...]:
    """The 90 categories of torchvision's 91 classes: its label is COCO's category_id.

    Ten ids have no category in COCO; torchvision calls them "N/A". They were never trained, and keep their
    place so that no other category moves; a label with one of them says by its name that it means nothing.
    """
    names = dict(COCO_CATEGORIES)
    return tuple((i, names.get(i, f"N/A {i}")) for i in range(1, NUM_PUBLISHED_CATEGORIES + 1))


def is_published(sha256: str) -> bool:
    """Whether a file is one that torchvision publishes, so that its 90 categories are COCO's."""
    return sha256.startswith((COCO_V1_SHA256, COCO_V2_SHA256))


def num_torchvision_categories(weights: Mapping[str, Tensor]) -> int:
    """K - 1: the classes of the box head without background.

    Raises:
        CheckpointError: there is no box head.
    """
    return _shape(weights, "roi_heads.box_predictor.cls_score.weight")[0] - 1


def from_torchvision(
    weights: Mapping[str, Tensor], categories: tuple[tuple[int, str], ...], *, sha256: str = ""
) -> tuple[MaskRCNNConfig, dict[str, Tensor]]:
    """Convert a state dict.

    Args:
        weights: of torchvision; names of before 0.13 are understood.
        categories: (category_id, name) of class_index 1, 2, …
        sha256: of the file, in hex; the one file whose batch norms have eps 0 is known by it.

    Returns:
        the config, and the state dict for MaskRCNN(config); tensors are those of `weights`, not copies.

    Raises:
        CheckpointError: the names or shapes are no Mask R-CNN's of ours; the message lists them.
    """
    state = {_new_name(key): tensor for key, tensor in weights.items()}
    config = _config_of(state, categories)
    if sha256.startswith(COCO_V1_SHA256):
        config = config.replace(norm_eps=0.0)
    check_fit(state, wanted_tensors(config), config)
    return config, state


@dataclass(frozen=True)
class TorchvisionTarget:
    """Where exported weights go.

    builder: the function of torchvision.models.detection that has these layers; None where there is none.
    arguments: what to call it with, where our config differs from its defaults.
    differences: fields of our config that torchvision cannot be told, with our values: with any of them, the
        same weights compute something else there.
    """

    builder: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, Any] = field(default_factory=dict)


def torchvision_target(config: MaskRCNNConfig) -> TorchvisionTarget:
    """What in torchvision a config's state dict loads into, and what it computes differently there."""
    builders = {"maskrcnn_resnet50_fpn": r50_fpn, "maskrcnn_resnet50_fpn_v2": r50_fpn_v2}
    for builder, preset in builders.items():
        default = preset(config.categories)
        changed = {
            name: getattr(config, name)
            for name in (f.name for f in fields(config))
            if getattr(config, name) != getattr(default, name)
        }
        if config.norm == "gn" or changed.keys() & _LAYERS:
            continue
        arguments = {"num_classes": config.num_classes} | {
            theirs: changed[ours] for ours, theirs in _BUILDER_ARGUMENTS.items() if ours in changed
        }
        differences = {name: changed[name] for name in _NOT_IN_TORCHVISION if name in changed}
        return TorchvisionTarget(builder, arguments, differences)
    return TorchvisionTarget(None)


def _new_name(key: str) -> str:
    for old, new in _OLD_NAMES:
        key = old.sub(new, key) if old.fullmatch(key) else key
    if match := _OLD_MASK_NAME.fullmatch(key):
        key = f"roi_heads.mask_head.{int(match[1]) - 1}.0.{match[2]}"
    return key


def _config_of(state: Mapping[str, Tensor], categories: tuple[tuple[int, str], ...]) -> MaskRCNNConfig:
    """What names and shapes say; the rest is torchvision's, which our defaults are."""
    num_categories = num_torchvision_categories(state)
    if num_categories != len(categories):
        raise CheckpointError(
            f"the weights have {num_categories} categories (and background), the list has {len(categories)}."
        )
    if "backbone.body.layer1.0.conv3.weight" not in state:
        raise CheckpointError("the backbone is not a ResNet-50 or -101 with bottlenecks.")
    depth101 = "backbone.body.layer3.22.conv1.weight" in state
    four_convs = "roi_heads.box_head.0.0.weight" in state
    fpn_norm = "backbone.fpn.inner_blocks.0.1.weight" in state
    preset = r101_fpn if depth101 else r50_fpn_v2 if four_convs and fpn_norm else r50_fpn
    mask_convs = [key for key in state if re.fullmatch(r"roi_heads\.mask_head\.\d+\.0\.weight", key)]
    rpn_convs = [key for key in state if re.fullmatch(r"rpn\.head\.conv\.\d+\.0\.weight", key)]
    fc = "roi_heads.box_head.5.weight" if four_convs else "roi_heads.box_head.fc6.weight"
    return preset(categories).replace(
        norm=_norm_of(state),
        fpn_channels=_shape(state, "backbone.fpn.inner_blocks.0.0.weight")[0],
        fpn_norm=fpn_norm,
        rpn_convs=len(rpn_convs),
        box_head="4conv1fc" if four_convs else "2fc",
        box_head_channels=_shape(state, fc)[0],
        box_class_agnostic=_shape(state, "roi_heads.box_predictor.bbox_pred.bias") == (4,),
        mask_head_convs=len(mask_convs),
        mask_head_channels=_shape(state, "roi_heads.mask_predictor.conv5_mask.weight")[0],
        mask_head_norm="roi_heads.mask_head.0.1.weight" in state,
        mask_class_agnostic=_shape(state, "roi_heads.mask_predictor.mask_fcn_logits.bias") == (1,),
    )


def _norm_of(state: Mapping[str, Tensor]) -> str:
    if "backbone.body.bn1.num_batches_tracked" in state:
        return "bn"
    return "frozen_bn" if "backbone.body.bn1.running_mean" in state else "gn"


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"{key} is missing: these are not the weights of a Mask R-CNN with an FPN.")
    return tuple(state[key].shape)
