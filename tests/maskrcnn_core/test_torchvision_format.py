from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.config import COCO_CATEGORIES, MaskRCNNConfig, lite, r50_fpn, r50_fpn_v2, r101_fpn
from maskrcnn_core.foreign_weights import wanted_tensors
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.torchvision_format import (
    COCO_V1_SHA256,
    COCO_V2_SHA256,
    from_torchvision,
    is_published,
    num_torchvision_categories,
    published_coco_categories,
    torchvision_target,
)

THREE = ((1, "ellipse"), (7, "box"), (9, "star"))


def on_meta(build: Callable[..., nn.Module], **arguments: Any) -> dict[str, Tensor]:
    """The state dict of a model that takes no memory."""
    with torch.device("meta"):
        return dict(build(**arguments).state_dict())


def without_weights(build: Callable[..., nn.Module], **arguments: Any) -> dict[str, Tensor]:
    return on_meta(build, weights=None, weights_backbone=None, **arguments)


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision called the same tensors before 0.13."""
    old = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[:2] == ["backbone", "fpn"]:
            key = ".".join([*parts[:4], parts[5]])  # backbone.fpn.inner_blocks.0.0.weight
        elif parts[:3] == ["rpn", "head", "conv"]:
            key = f"rpn.head.conv.{parts[-1]}"
        elif parts[:2] == ["roi_heads", "mask_head"]:
            key = f"roi_heads.mask_head.mask_fcn{int(parts[2]) + 1}.{parts[-1]}"
        old[key] = tensor
    return old


@pytest.mark.parametrize(
    ("build", "preset"), [(maskrcnn_resnet50_fpn, r50_fpn), (maskrcnn_resnet50_fpn_v2, r50_fpn_v2)]
)
def test_a_state_dict_of_torchvision_is_ours_as_it_is(
    build: Callable[..., nn.Module], preset: Callable[..., MaskRCNNConfig]
) -> None:
    theirs = without_weights(build, num_classes=4)
    config, state = from_torchvision(theirs, THREE)
    assert config == preset(THREE).replace(
        norm="bn"
    )  # built without weights, torchvision's norms are not frozen
    assert state.keys() == wanted_tensors(config).keys()
    assert all(state[key] is tensor for key, tensor in theirs.items())


def test_frozen_norms_are_known_by_what_they_do_not_count() -> None:
    theirs = without_weights(maskrcnn_resnet50_fpn, num_classes=4)
    frozen = {key: tensor for key, tensor in theirs.items() if not key.endswith("num_batches_tracked")}
    assert from_torchvision(frozen, THREE)[0] == r50_fpn(THREE)


def test_a_resnet_101_of_torchvision_is_read() -> None:
    def build() -> nn.Module:
        backbone = resnet_fpn_backbone(
            backbone_name="resnet101", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        model: nn.Module = TorchvisionMaskRCNN(backbone, num_classes=4)
        return model

    assert from_torchvision(on_meta(build), THREE)[0] == r101_fpn(THREE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "gn"},
        {"box_class_agnostic": True},
        {"mask_class_agnostic": True},
        {"rpn_convs": 2},
        {"fpn_norm": True},
        {"box_head": "4conv1fc"},
        {"backbone": "resnet101", "mask_head_norm": True},
        {"fpn_channels": 128, "box_head_channels": 512, "mask_head_channels": 64, "mask_head_convs": 2},
    ],
    ids=str,
)
def test_names_and_shapes_say_every_layer(changes: dict[str, Any]) -> None:
    config = r50_fpn(THREE).replace(**changes)
    read, _ = from_torchvision(wanted_tensors(config), THREE)
    different = {
        field: (got, want)
        for field, got in read.to_dict().items()
        if got != (want := getattr(config, field)) and field not in ("preset", "trainable_stages")
    }
    assert different == {}


def test_names_of_before_0_13_are_understood() -> None:
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    new = model.state_dict()
    old = with_old_names(dict(new))
    assert len(old.keys() - new.keys()) == 16 + 2 + 8
    model.load_state_dict(old)  # torchvision itself still reads them: these are the right names
    _, state = from_torchvision(old, THREE)
    assert state.keys() == new.keys()
    assert all(state[key] is new[key] or torch.equal(state[key], new[key]) for key in new)


def test_only_the_file_published_as_coco_v1_has_norms_without_eps() -> None:
    url = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    assert url.endswith(f"-{COCO_V1_SHA256}.pth")
    theirs = wanted_tensors(r50_fpn(THREE))
    assert from_torchvision(theirs, THREE, sha256=COCO_V1_SHA256 + "0" * 56)[0].norm_eps == 0
    for other in ("", COCO_V2_SHA256 + "0" * 56, "0" * 64):
        assert from_torchvision(theirs, THREE, sha256=other)[0].norm_eps == 1e-5
    assert is_published(COCO_V1_SHA256 + "0" * 56)
    assert is_published(COCO_V2_SHA256 + "0" * 56)
    assert not is_published("0" * 64)


def test_the_backbone_without_eps_computes_what_torchvisions_does() -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    backbone.body.bn1.running_var.uniform_(1e-5, 2e-5)  # as small as eps, so that it shows
    backbone.body.bn1.weight.fill_(1e-3)
    theirs = TorchvisionMaskRCNN(backbone, num_classes=4).eval()
    overwrite_eps(theirs, 0.0)
    config, state = from_torchvision(theirs.state_dict(), THREE, sha256=COCO_V1_SHA256)
    ours = MaskRCNN(config).eval()
    ours.load_state_dict(state)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = ours.backbone(image)
        expected = theirs.backbone(image)
        overwrite_eps(theirs, 1e-5)
        with_eps = theirs.backbone(image)
    for level in ("0", "1", "2", "3"):
        assert torch.allclose(found[level], expected[level], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(with_eps[level], expected[level], rtol=0.1)


def test_the_published_categories_are_cocos_at_their_ids() -> None:
    categories = published_coco_categories()
    assert [category_id for category_id, _ in categories] == list(range(1, 91))
    theirs = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    unused = [i for i, name in enumerate(theirs) if name == "N/A"]
    assert unused == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    for category_id, name in categories:
        assert name == (f"N/A {category_id}" if category_id in unused else theirs[category_id])
    assert {c for c in categories if not c[1].startswith("N/A")} == set(COCO_CATEGORIES)
    assert len({name for _, name in categories}) == 90


def test_what_does_not_fit_is_refused_with_its_keys() -> None:
    theirs = wanted_tensors(r50_fpn(THREE))
    with pytest.raises(CheckpointError, match=r"have 3 categories .* list has 80"):
        from_torchvision(theirs, COCO_CATEGORIES)
    wrong = dict(theirs)
    wrong["backbone.body.conv1.weight"] = torch.empty(64, 1, 7, 7)
    wrong["roi_heads.keypoint_head.0.weight"] = torch.empty(1)
    del wrong["rpn.head.cls_logits.bias"]
    with pytest.raises(CheckpointError) as refused:
        from_torchvision(wrong, THREE)
    assert "1 missing: rpn.head.cls_logits.bias" in str(refused.value)
    assert "1 unexpected: roi_heads.keypoint_head.0.weight" in str(refused.value)
    assert "backbone.body.conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in str(refused.value)


def test_a_long_list_of_keys_is_cut_and_counted() -> None:
    theirs = {k: t for k, t in wanted_tensors(r50_fpn(THREE)).items() if "layer3.4" not in k}
    with pytest.raises(CheckpointError, match=r"15 missing: backbone\.body\.layer3\.4\.conv1\.weight, .*, …"):
        from_torchvision(theirs, THREE)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "cls_score.weight is missing"),
        (wanted_tensors(lite(THREE)), "not a ResNet"),
        (
            {k: t for k, t in wanted_tensors(r50_fpn(THREE)).items() if not k.startswith("roi_heads.mask")},
            "mask_predictor.conv5_mask.weight is missing",
        ),
    ],
    ids=["nothing", "mobilenet", "faster r-cnn"],
)
def test_another_network_is_refused(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        from_torchvision(state, THREE)


def test_categories_are_counted_without_background() -> None:
    assert num_torchvision_categories(wanted_tensors(r50_fpn())) == 80


@pytest.mark.parametrize(
    "config",
    [
        r50_fpn(),
        r50_fpn_v2(THREE),
        r50_fpn(THREE).replace(min_size_px=600, max_size_px=900, score_threshold=0.3, norm="sync_bn"),
        r50_fpn(THREE).replace(image_mean=(0.4, 0.4, 0.4), image_std=(0.2, 0.2, 0.2), rpn_post_nms=300),
    ],
)
def test_the_builder_that_is_named_takes_the_weights_and_the_arguments(config: MaskRCNNConfig) -> None:
    target = torchvision_target(config)
    assert target.differences == {}
    assert target.builder is not None
    with torch.device("meta"):
        model = getattr(detection, target.builder)(weights=None, weights_backbone=None, **target.arguments)
        missing, unexpected = model.load_state_dict(wanted_tensors(config), strict=False, assign=True)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert model.transform.min_size == (config.min_size_px,)
    assert model.transform.max_size == config.max_size_px
    assert tuple(model.transform.image_mean) == config.image_mean
    assert model.roi_heads.score_thresh == config.score_threshold
    assert model.rpn.post_nms_top_n() == config.rpn_post_nms_train
    assert model.eval().rpn.post_nms_top_n() == config.rpn_post_nms


def test_what_torchvision_cannot_be_told_is_named() -> None:
    config = r50_fpn(THREE).replace(stride_in_1x1=True, roi_aligned=True, norm_eps=0.0)
    assert torchvision_target(config).differences == {
        "norm_eps": 0.0,
        "stride_in_1x1": True,
        "roi_aligned": True,
    }


@pytest.mark.parametrize(
    "config", [r101_fpn(), lite(), r50_fpn().replace(norm="gn"), r50_fpn().replace(rpn_convs=2)]
)
def test_layers_that_torchvision_has_no_function_for_have_no_builder(config: MaskRCNNConfig) -> None:
    assert torchvision_target(config).builder is None
