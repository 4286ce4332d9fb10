"""Detectron2's training configs, as far as weights do not say them: strides, pixels, the layers to expect.

A recipe is chosen by name, or by the MD5 sum of a file that Detectron2 publishes. Paths are of Detectron2's
repository; both configs/Base-RCNN-FPN.yaml and detectron2/config/defaults.py stand behind each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layers:
    """What names and shapes show of a network, and a recipe must agree with."""

    backbone: str
    rpn_convs: int = 1
    box_head: str = "2fc"
    batch_norm: bool = False  # in the pyramid, the box head and the mask head


@dataclass(frozen=True)
class Recipe:
    """What a training config says and the weights do not.

    pixel_mean, pixel_std: of 0 ... 255, in the order of the channels.
    zoo_md5: starts of the MD5 sums of the published files, which are in their names.
    """

    source: str
    layers: Layers
    zoo_md5: tuple[str, ...] = ()
    bgr: bool = True  # MODEL.PIXEL_MEAN's comment: INPUT.FORMAT defaults to BGR
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stride_in_1x1: bool = True
    trainable_stages: int = 3  # MODEL.BACKBONE.FREEZE_AT 2: stem and res2


_R50, _R101 = Layers("resnet50"), Layers("resnet101")
_R50_LSJ = Layers("resnet50", rpn_convs=2, box_head="4conv1fc", batch_norm=True)
_R50_SYNCBN = replace(_R50_LSJ, rpn_convs=1)
_COCO, _LSJ, _MISC = "COCO-InstanceSegmentation", "new_baselines", "Misc"

_R50_3X = Recipe(f"configs/{_COCO}/mask_rcnn_R_50_FPN_3x.yaml", _R50, ("a54504", "f10217"))
_R50_LSJ_100 = Recipe(
    f"configs/{_LSJ}/mask_rcnn_R_50_FPN_100ep_LSJ.py",
    _R50_LSJ,
    ("bb69de", "89a8d3", "14d201"),
    trainable_stages=5,
)
_TORCHVISION_BACKBONE = replace(
    _R50_3X,
    source="tools/convert-torchvision-to-d2.py",  # whose comment gives these settings
    zoo_md5=(),
    bgr=False,
    pixel_mean=(123.675, 116.28, 103.53),
    pixel_std=(58.395, 57.12, 57.375),
    stride_in_1x1=False,
)
RECIPES: dict[str, Recipe] = {
    "detectron2:r50-fpn-3x": _R50_3X,
    "detectron2:r101-fpn-3x": Recipe(
        f"configs/{_COCO}/mask_rcnn_R_101_FPN_3x.yaml", _R101, zoo_md5=("a3ec72",)
    ),
    "detectron2:r50-fpn-lsj": _R50_LSJ_100,
    "detectron2:r101-fpn-lsj": replace(
        _R50_LSJ_100,
        source=f"configs/{_LSJ}/mask_rcnn_R_101_FPN_100ep_LSJ.py",
        layers=replace(_R50_LSJ, backbone="resnet101"),
        zoo_md5=("4f7b58", "0bb7ae", "f96b26"),
    ),
    "detectron2:r50-fpn-3x-syncbn": Recipe(
        f"configs/{_MISC}/mask_rcnn_R_50_FPN_3x_syncbn.yaml", _R50_SYNCBN, ("3b3c51",)
    ),
    "detectron2:r50-fpn-9x-syncbn": Recipe(
        f"configs/{_MISC}/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml",
        _R50_SYNCBN,
        ("5ce33e",),
        pixel_std=(57.375, 57.12, 58.395),
        stride_in_1x1=False,
        trainable_stages=5,
    ),
    "detectron2:r50-fpn-torchvision": _TORCHVISION_BACKBONE,
    "detectron2:r101-fpn-torchvision": replace(_TORCHVISION_BACKBONE, layers=_R101),
}


def zoo_recipe(md5: str) -> str | None:
    """The recipe of a file that Detectron2 publishes, known by its MD5; None for any other."""
    return next((name for name, recipe in RECIPES.items() if md5.startswith(recipe.zoo_md5)), None)
