"""MaskRCNNConfig: every hyper-parameter of the network, named once, with its source.

Enters: a preset's name or a mapping read from a checkpoint. Leaves: a frozen, validated config.
Letters: K classes with background, P pyramid levels.

Sources, cited below by their letter:
  [M] He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870
  [F] Lin et al., "Feature Pyramid Networks", CVPR 2017, arXiv:1612.03144
  [R] Ren et al., "Faster R-CNN", NIPS 2015, arXiv:1506.01497
  [L] Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers", arXiv:2111.11429
  [H] He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385
  [T] torchvision, models/detection/mask_rcnn.py (maskrcnn_resnet50_fpn and its v2)
  [D] Detectron2, detectron2/config/defaults.py and configs/COCO-InstanceSegmentation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BACKBONES = ("resnet50", "resnet101", "mobilenet_v2")
NORMS = ("frozen_bn", "bn", "sync_bn", "gn")
ANCHOR_STRIDES = ("measured", "nominal")

# The 80 categories of COCO 2017 with their official, gapped ids.
COCO_CATEGORIES: tuple[tuple[int, str], ...] = (
    (1, "person"), (2, "bicycle"), (3, "car"), (4, "motorcycle"), (5, "airplane"), (6, "bus"),
    (7, "train"), (8, "truck"), (9, "boat"), (10, "traffic light"), (11, "fire hydrant"),
    (13, "stop sign"), (14, "parking meter"), (15, "bench"), (16, "bird"), (17, "cat"), (18, "dog"),
    (19, "horse"), (20, "sheep"), (21, "cow"), (22, "elephant"), (23, "bear"), (24, "zebra"),
    (25, "giraffe"), (27, "backpack"), (28, "umbrella"), (31, "handbag"), (32, "tie"),
    (33, "suitcase"), (34, "frisbee"), (35, "skis"), (36, "snowboard"), (37, "sports ball"),
    (38, "kite"), (39, "baseball bat"), (40, "baseball glove"), (41, "skateboard"),
    (42, "surfboard"), (43, "tennis racket"), (44, "bottle"), (46, "wine glass"), (47, "cup"),
    (48, "fork"), (49, "knife"), (50, "spoon"), (51, "bowl"), (52, "banana"), (53, "apple"),
    (54, "sandwich"), (55, "orange"), (56, "broccoli"), (57, "carrot"), (58, "hot dog"),
    (59, "pizza"), (60, "donut"), (61, "cake"), (62, "chair"), (63, "couch"), (64, "potted plant"),
    (65, "bed"), (67, "dining table"), (70, "toilet"), (72, "tv"), (73, "laptop"), (74, "mouse"),
    (75, "remote"), (76, "keyboard"), (77, "cell phone"), (78, "microwave"), (79, "oven"),
    (80, "toaster"), (81, "sink"), (82, "refrigerator"), (84, "book"), (85, "clock"), (86, "vase"),
    (87, "scissors"), (88, "teddy bear"), (89, "hair drier"), (90, "toothbrush"),
)  # fmt: skip


@dataclass(frozen=True)
class MaskRCNNConfig:
    """A Mask R-CNN, complete: two equal configs and equal weights give equal labels.

    Raises:
        ValueError: at construction, naming the field, what it got and what it wants.
    """

    preset: str
    categories: tuple[tuple[int, str], ...]  # (category_id, name); class_index = position + 1

    # Backbone and pyramid [F]
    backbone: str = "resnet50"
    norm: str = "frozen_bn"  # [M] fine-tunes with frozen statistics
    norm_eps: float = 1e-5  # of the backbone; 0 in the weights [T] publishes as COCO_V1
    stride_in_1x1: bool = False  # [H] as released, and so [D]'s R-50.pkl; [T] puts it into the 3x3
    trainable_stages: int = 3  # [T] of 5, counted from the deepest
    fpn_channels: int = 256  # [F] section 4.2
    fpn_norm: bool = False  # [T] v2 puts batch norm after each FPN convolution

    # Region proposals [R], [F]
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # [F] one scale a level, pixels
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    anchor_rounding: bool = True  # [T] rounds an anchor's corners to whole pixels; [D] does not
    anchor_strides: str = "measured"  # [T] padded size // grid size; "nominal": 4 ... 64 [D]
    rpn_convs: int = 1  # [L] uses 2, as does [T] v2
    rpn_positive_iou: float = 0.7  # [R] section 3.1.2
    rpn_negative_iou: float = 0.3
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_nms_threshold: float = 0.7
    rpn_pre_nms_train: int = 2000  # [F] proposals a level before NMS
    rpn_pre_nms: int = 1000
    rpn_post_nms_train: int = 2000  # proposals an image after NMS
    rpn_post_nms: int = 1000
    # Where L1 begins: 1 / sigma^2 with sigma = 3, as [R] was released; 0: plain L1 [D]
    rpn_smooth_l1_beta: float = 1.0 / 9

    # RoI heads [M]
    roi_sampling_ratio: int = 2  # [T]; samples a bin and side; 0: one a feature pixel [D]
    roi_aligned: bool = False  # [T]; [D] shifts by half a pixel, so that pixel centres meet
    roi_samples: int = 512  # [F]; [M] samples 512 with FPN, 1:3
    roi_positive_fraction: float = 0.25
    roi_iou: float = 0.5
    box_head: str = "2fc"  # [F]; "4conv1fc" is [T] v2's
    box_head_channels: int = 1024
    box_roi_size: int = 7
    box_delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # [R] Caffe release
    box_class_agnostic: bool = False  # [M] one box a class; True: one for all
    box_smooth_l1_beta: float = 1.0 / 9  # [T]; 0: plain L1 [D]
    mask_head_channels: int = 256
    mask_head_convs: int = 4
    mask_head_norm: bool = False  # batch norm after each, [T] v2
    mask_roi_size: int = 14  # RoI grid; the mask is twice that, 28 x 28
    mask_class_agnostic: bool = False  # [M] table 2b compares the two

    # Inference [M] section 3.1
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    mask_threshold: float = 0.5
    max_detections: int = 100

    # Input
    min_size_px: int = 800  # shorter side [F]
    max_size_px: int = 1333  # longer side
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in [0, 1]
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        def want(holds: bool, field: str, wanted: str) -> None:
            if not holds:
                raise ValueError(f"MaskRCNNConfig.{field} is {getattr(self, field)!r}; wanted {wanted}.")

        want(self.backbone in BACKBONES, "backbone", f"one of {BACKBONES}")
        want(self.norm in NORMS, "norm", f"one of {NORMS}")
        want(self.norm_eps >= 0, "norm_eps", "a number >= 0")
        want(
            not (self.stride_in_1x1 and self.backbone == "mobilenet_v2"),
            "stride_in_1x1",
            "False: only the bottlenecks of a ResNet have a choice",
        )
        want(self.anchor_strides in ANCHOR_STRIDES, "anchor_strides", f"one of {ANCHOR_STRIDES}")
        want(self.box_head in ("2fc", "4conv1fc"), "box_head", "'2fc' or '4conv1fc'")
        ids = [category_id for category_id, _ in self.categories]
        want(len(ids) >= 1 and len(set(ids)) == len(ids), "categories", "at least one, with distinct ids")
        want(all(i >= 0 for i in ids), "categories", "ids >= 0")
        want(len(self.anchor_sizes) == 5, "anchor_sizes", "five sizes, one for each of P2 to P6")
        want(bool(self.anchor_ratios), "anchor_ratios", "at least one ratio")
        for field in ("score_threshold", "nms_threshold", "mask_threshold", "rpn_nms_threshold", "roi_iou"):
            want(0.0 <= getattr(self, field) <= 1.0, field, "a number from 0 to 1")
        for field in ("max_detections", "min_size_px", "fpn_channels", "rpn_samples", "roi_samples"):
            want(getattr(self, field) >= 1, field, "an integer >= 1")
        for field in ("roi_sampling_ratio", "rpn_smooth_l1_beta", "box_smooth_l1_beta"):
            want(getattr(self, field) >= 0, field, "a number >= 0")
        want(self.max_size_px >= self.min_size_px, "max_size_px", f">= min_size_px ({self.min_size_px})")
        want(0 <= self.trainable_stages <= 5, "trainable_stages", "0 to 5")

    @property
    def num_classes(self) -> int:
        """K: the categories and the background, which is class_index 0."""
        return len(self.categories) + 1

    @property
    def category_ids(self) -> tuple[int, ...]:
        return tuple(category_id for category_id, _ in self.categories)

    def replace(self, **changes: Any) -> MaskRCNNConfig:
        """A copy with some fields changed; a value of None leaves its field as it is."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskRCNNConfig:
        """Read what `to_dict` wrote, also after a round through JSON.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown fields of MaskRCNNConfig: {', '.join(unknown)}; written by a newer version?"
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            fields["categories"] = tuple((int(i), str(name)) for i, name in fields["categories"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a MaskRCNNConfig: {error}") from error


def r50_fpn(categories: tuple[tuple[int, str], ...] = COCO_CATEGORIES) -> MaskRCNNConfig:
    """ResNet-50-FPN as published [M]: 44.4 M parameters at 91 classes."""
    return MaskRCNNConfig("r50_fpn", categories)


def r101_fpn(categories: tuple[tuple[int, str], ...] = COCO_CATEGORIES) -> MaskRCNNConfig:
    """ResNet-101-FPN as published [M]."""
    return MaskRCNNConfig("r101_fpn", categories, backbone="resnet101")


def r50_fpn_v2(categories: tuple[tuple[int, str], ...] = COCO_CATEGORIES) -> MaskRCNNConfig:
    """torchvision's second version after [L]: deeper heads, batch norm throughout, not frozen."""
    return MaskRCNNConfig(
        "r50_fpn_v2",
        categories,
        norm="bn",
        trainable_stages=5,
        fpn_norm=True,
        rpn_convs=2,
        box_head="4conv1fc",
        mask_head_norm=True,
    )


def lite(categories: tuple[tuple[int, str], ...] = COCO_CATEGORIES) -> MaskRCNNConfig:
    """MobileNetV2-FPN for CPUs and small objects on small images: about 4 M parameters.

    Not from a paper: the widths are what keeps a half-precision checkpoint under 10 MB.
    """
    return MaskRCNNConfig(
        "lite",
        categories,
        backbone="mobilenet_v2",
        norm="bn",
        trainable_stages=5,
        fpn_channels=96,
        anchor_sizes=(16, 32, 64, 128, 256),
        rpn_pre_nms_train=500,
        rpn_pre_nms=300,
        rpn_post_nms_train=300,
        rpn_post_nms=200,
        roi_samples=64,
        box_head_channels=256,
        mask_head_channels=96,
        min_size_px=256,
        max_size_px=448,
    )


PRESETS = {"r50_fpn": r50_fpn, "r50_fpn_v2": r50_fpn_v2, "r101_fpn": r101_fpn, "lite": lite}
