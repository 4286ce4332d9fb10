from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maskrcnn_core.anchors import pyramid_anchors
from maskrcnn_core.boxes import decode_deltas
from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.config import COCO_CATEGORIES, MaskRCNNConfig
from maskrcnn_core.detectron2_format import fitting_recipes, from_detectron2, num_detectron2_categories
from maskrcnn_core.detectron2_recipes import RECIPES, zoo_recipe
from maskrcnn_core.model import MaskRCNN
from tests.maskrcnn_core import detectron2_reading as oracle
from tests.maskrcnn_core.detectron2_reading import Arrays, Network

THREE = ((1, "ellipse"), (7, "box"), (9, "star"))
MSRA = Network()
NARROW = Network(width=32, fc_width=64)  # for what does not depend on the widths, which shapes say
LSJ = Network(large=True, rpn_convs=2, frozen_bn=False)
RGB = Network(
    bgr=False,
    pixel_mean=(123.675, 116.28, 103.53),
    pixel_std=(58.395, 57.12, 57.375),
    stride_in_1x1=False,
)
# Each recipe with the network that its config describes; the values are those of Detectron2's configs.
VARIANTS = {
    "r50-fpn-3x": ("detectron2:r50-fpn-3x", MSRA),
    "r50-fpn-3x, class-agnostic": (
        "detectron2:r50-fpn-3x",
        replace(NARROW, box_agnostic=True, mask_agnostic=True),
    ),
    "r50-fpn-3x, one category": ("detectron2:r50-fpn-3x", replace(NARROW, num_categories=1)),
    "r101-fpn-3x": ("detectron2:r101-fpn-3x", replace(NARROW, depth=101)),
    "r50-fpn-lsj": ("detectron2:r50-fpn-lsj", LSJ),
    "r50-fpn-9x-syncbn": (
        "detectron2:r50-fpn-9x-syncbn",
        replace(LSJ, rpn_convs=1, stride_in_1x1=False, pixel_std=(57.375, 57.12, 58.395)),
    ),
    "r50-fpn-torchvision": ("detectron2:r50-fpn-torchvision", RGB),
}


@dataclass(frozen=True)
class Imported:
    recipe: str
    network: Network
    arrays: Arrays
    config: MaskRCNNConfig
    model: MaskRCNN


@pytest.fixture(scope="module", params=VARIANTS)
def imported(request: pytest.FixtureRequest) -> Imported:
    """Random weights under Detectron2's names, and the model they became."""
    recipe, network = VARIANTS[request.param]
    arrays = oracle.random_arrays(network)
    config, state = from_detectron2(arrays, recipe, THREE[: network.num_categories])
    model = MaskRCNN(config).eval()
    model.load_state_dict(state)
    return Imported(recipe, network, arrays, config, model)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Of r50-fpn-3x, for what is refused or read from names and shapes."""
    return oracle.random_arrays(NARROW)


def picture(height: int, width: int) -> Tensor:
    """(1, 3, H, W) RGB, 0 to 255, no two channels alike."""
    generator = torch.Generator().manual_seed(1)
    coarse = 255 * torch.rand(1, 3, height // 16, width // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bilinear").round()


def as_ours(config: MaskRCNNConfig, rgb: Tensor) -> Tensor:
    """The predictor's normalisation: RGB in [0, 1], minus mean, by std."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.image_mean, config.image_std))
    return (rgb / 255 - mean) / std


def close(found: Tensor, expected: Tensor) -> bool:
    """To float32's precision over a hundred layers, in units of the largest value."""
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 2e-4 * expected.abs().max().clamp(min=1e-3)
    )


@torch.no_grad()
def test_the_backbone_and_the_pyramid_compute_what_detectron2_does(imported: Imported) -> None:
    rgb = picture(64, 96)
    expected = oracle.pyramid(imported.network, imported.arrays, rgb)
    found = list(imported.model.backbone(as_ours(imported.config, rgb)).values())
    assert [tuple(level.shape[2:]) for level in found] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for level, wanted in zip(found, expected, strict=True):
        assert close(level, wanted)


@pytest.mark.parametrize("imported", ["r50-fpn-3x", "r50-fpn-torchvision"], indirect=True)
@torch.no_grad()
def test_the_oracle_sees_a_wrong_stride_order_or_mean(imported: Imported) -> None:
    """What a wrong recipe would change is far above the tolerance."""
    rgb = picture(64, 96)
    expected = oracle.pyramid(imported.network, imported.arrays, rgb)[0]
    wrong: dict[str, Any]
    for wrong in (
        {"stride_in_1x1": not imported.network.stride_in_1x1},
        {"bgr": not imported.network.bgr},
        {"pixel_mean": imported.network.pixel_mean[::-1]},
    ):
        other = oracle.pyramid(replace(imported.network, **wrong), imported.arrays, rgb)[0]
        assert not close(other, expected), wrong


@torch.no_grad()
def test_the_rpn_head_computes_what_detectron2_does(imported: Imported) -> None:
    feature = torch.randn(2, imported.network.width, 5, 7, generator=torch.Generator().manual_seed(2))
    logits, deltas = imported.model.rpn.head([feature])
    expected_logits, expected_deltas = oracle.rpn_head(imported.network, imported.arrays, feature)
    assert close(logits[0], expected_logits)
    assert close(deltas[0], expected_deltas)


def test_anchors_are_where_detectron2_has_them(imported: Imported) -> None:
    grids = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))  # of 64 x 96: no multiple of P6's 64
    found = pyramid_anchors(imported.config, grids, torch.device("cpu"))
    for level, grid in enumerate(grids):
        assert close(found[level], oracle.anchors(level, *grid))


@torch.no_grad()
def test_the_box_head_computes_what_detectron2_does(imported: Imported) -> None:
    pooled = torch.randn(3, imported.network.width, 7, 7, generator=torch.Generator().manual_seed(3))
    heads = imported.model.roi_heads
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    expected_probs, expected_deltas = oracle.box_head(imported.network, imported.arrays, pooled)
    probs = logits.softmax(dim=1)
    assert close(probs[:, 0], expected_probs[:, -1])  # background
    assert close(probs[:, 1:], expected_probs[:, :-1])
    if imported.network.box_agnostic:
        assert close(deltas, expected_deltas)
    else:
        assert close(deltas[:, 4:], expected_deltas)
        assert (deltas[:, :4] == 0).all()  # the background has no box


@torch.no_grad()
def test_boxes_are_decoded_as_in_detectron2(imported: Imported) -> None:
    generator = torch.Generator().manual_seed(4)
    corners = 100 * torch.rand(20, 2, generator=generator)
    boxes = torch.cat((corners, corners + 1 + 50 * torch.rand(20, 2, generator=generator)), dim=1)
    deltas = 20 * torch.randn(20, 4, generator=generator)  # some beyond the limit of log(1000 / 16)
    expected = oracle.decode(deltas, boxes, (10, 10, 5, 5))
    assert close(decode_deltas(deltas, boxes, imported.config.box_delta_weights), expected)


@torch.no_grad()
def test_the_mask_head_computes_what_detectron2_does(imported: Imported) -> None:
    pooled = torch.randn(2, imported.network.width, 14, 14, generator=torch.Generator().manual_seed(5))
    heads = imported.model.roi_heads
    logits = heads.mask_predictor(heads.mask_head(pooled))
    expected = oracle.mask_head(imported.network, imported.arrays, pooled)
    assert close(logits if imported.network.mask_agnostic else logits[:, 1:], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imported",
    ["r50-fpn-3x", "r50-fpn-3x, class-agnostic", "r50-fpn-lsj", "r50-fpn-torchvision"],
    indirect=True,
)
@torch.no_grad()
def test_the_whole_network_detects_what_detectron2_does(imported: Imported) -> None:
    """Levels, RoIAlign, decoding, NMS and the choice of masks; a wrong flag moves boxes by 0.2 px or more."""
    rgb, threshold, num_proposals = picture(64, 96), 0.25, 30
    expected = oracle.detect(imported.network, imported.arrays, rgb, threshold, num_proposals)
    config = imported.config.replace(score_threshold=threshold, rpn_post_nms=num_proposals)
    model = MaskRCNN(config).eval()
    model.load_state_dict(imported.model.state_dict())
    found, mask_probs = model(as_ours(config, rgb), torch.tensor([[64.0, 96.0]]))
    real = found.class_indices[0] > 0
    boxes, scores, classes = found.boxes[0][real], found.scores[0][real], found.class_indices[0][real]
    assert len(expected[0]) >= 3
    assert len(boxes) == len(expected[0])
    for box, score, category, mask in zip(*expected, strict=True):
        distance = (boxes - box).abs().amax(dim=1) + 100 * (classes != category + 1)
        nearest = int(distance.argmin())
        assert distance[nearest] < 0.01  # pixels
        assert abs(scores[nearest] - score) < 1e-3
        assert (mask_probs[0][real][nearest] - mask).abs().max() < 1e-3


def test_the_config_says_what_the_weights_do_not(imported: Imported) -> None:
    config, network = imported.config, imported.network
    assert config.categories == THREE[: network.num_categories]
    assert (config.fpn_channels, config.box_head_channels) == (network.width, network.fc_width)
    assert config.norm == ("frozen_bn" if network.frozen_bn else "bn")
    assert config.stride_in_1x1 == network.stride_in_1x1
    assert (config.anchor_rounding, config.anchor_strides) == (False, "nominal")
    assert (config.roi_aligned, config.roi_sampling_ratio) == (True, 0)
    assert (config.rpn_smooth_l1_beta, config.box_smooth_l1_beta) == (0, 0)
    for found, wanted in ((config.image_mean, network.pixel_mean), (config.image_std, network.pixel_std)):
        in_order = reversed(wanted) if network.bgr else wanted
        assert all(math.isclose(255 * f, w) for f, w in zip(found, in_order, strict=True))


def test_only_the_named_recipes_family_fits(imported: Imported) -> None:
    assert imported.recipe in fitting_recipes(imported.arrays)
    layers = RECIPES[imported.recipe].layers
    for name, recipe in RECIPES.items():
        assert (name in fitting_recipes(imported.arrays)) == (recipe.layers == layers)


@pytest.mark.parametrize(
    ("recipe", "like", "changed"),
    [
        ("detectron2:r101-fpn-lsj", "detectron2:r50-fpn-lsj", "resnet101"),
        ("detectron2:r101-fpn-torchvision", "detectron2:r50-fpn-torchvision", "resnet101"),
        ("detectron2:r101-fpn-3x", "detectron2:r50-fpn-3x", "resnet101"),
    ],
)
def test_a_deeper_recipe_differs_in_depth_alone(recipe: str, like: str, changed: str) -> None:
    deeper, shallower = RECIPES[recipe], RECIPES[like]
    assert deeper.layers == replace(shallower.layers, backbone=changed)
    assert (
        replace(deeper, layers=shallower.layers, source=shallower.source, zoo_md5=shallower.zoo_md5)
        == shallower
    )


def test_a_published_file_is_known_by_the_md5_in_its_name() -> None:
    # mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl
    assert zoo_recipe("f10217" + "0" * 26) == "detectron2:r50-fpn-3x"
    assert zoo_recipe("a3ec72" + "0" * 26) == "detectron2:r101-fpn-3x"
    assert zoo_recipe("14d201" + "0" * 26) == "detectron2:r50-fpn-lsj"  # 400 epochs
    assert zoo_recipe("0" * 32) is None
    sums = [md5 for recipe in RECIPES.values() for md5 in recipe.zoo_md5]
    assert len(set(sums)) == len(sums)
    assert all(len(md5) == 6 for md5 in sums)


def test_old_frozen_norms_get_no_eps(arrays: Arrays) -> None:
    """Before version 3 of its layout, FrozenBatchNorm2d divided by the root of the variance alone."""
    norm = "backbone.bottom_up.res2.0.conv1.norm"
    variance = arrays[f"{norm}.running_var"]
    ours = "backbone.body.layer1.0.bn1.running_var"
    for version, change in ((None, 0.0), (3, 0.0), (2, 1e-5), (1, 1e-5)):
        versions = {} if version is None else {norm: version}
        _, state = from_detectron2(arrays, "detectron2:r50-fpn-3x", THREE, versions=versions)
        assert torch.equal(state[ours], variance - change if change else variance)


def test_norms_that_were_trained_are_not_frozen(arrays: Arrays) -> None:
    trained = dict(arrays)
    for key in arrays:
        if key.startswith("backbone.bottom_up.") and key.endswith(".norm.weight"):
            trained[key.replace(".weight", ".num_batches_tracked")] = torch.tensor(5)
    versions = {"backbone.bottom_up.stem.conv1.norm": 2}  # of nn.BatchNorm2d, which always added eps
    config, state = from_detectron2(trained, "detectron2:r50-fpn-3x", THREE, versions=versions)
    assert config.norm == "bn"
    assert torch.equal(
        state["backbone.body.bn1.running_var"], arrays["backbone.bottom_up.stem.conv1.norm.running_var"]
    )
    assert state["backbone.body.bn1.num_batches_tracked"] == 5


def test_counters_that_a_conversion_left_out_are_zero() -> None:
    without = {
        k: t
        for k, t in oracle.random_arrays(replace(LSJ, width=32, fc_width=64)).items()
        if not k.endswith("num_batches_tracked")
    }
    config, state = from_detectron2(without, "detectron2:r50-fpn-lsj", THREE)
    assert config.norm == "bn"
    assert state["roi_heads.mask_head.0.1.num_batches_tracked"] == 0


def test_buffers_of_old_checkpoints_are_checked_and_left_out(arrays: Arrays) -> None:
    old = dict(arrays)
    old["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    old["pixel_std"] = torch.ones(3, 1, 1)
    for level in range(5):
        size = 32.0 * 2**level
        old[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = torch.tensor(
            [
                [-size / 2 * r**-0.5, -size / 2 * r**0.5, size / 2 * r**-0.5, size / 2 * r**0.5]
                for r in (0.5, 1.0, 2.0)
            ]
        )
    _, state = from_detectron2(old, "detectron2:r50-fpn-3x", THREE)
    assert state.keys() == from_detectron2(arrays, "detectron2:r50-fpn-3x", THREE)[1].keys()
    assert fitting_recipes(old) == ["detectron2:r50-fpn-3x"]  # the file itself says that it is BGR
    with pytest.raises(
        CheckpointError, match=r"pixel_mean is \[103\.5.*contradict|contradict.*pixel_mean is"
    ):
        from_detectron2(old, "detectron2:r50-fpn-torchvision", THREE)
    old["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match="holds other anchors"):
        from_detectron2(old, "detectron2:r50-fpn-3x", THREE)


def test_weights_of_another_recipe_are_refused_with_the_right_ones(arrays: Arrays) -> None:
    with pytest.raises(CheckpointError) as refused:
        from_detectron2(arrays, "detectron2:r101-fpn-lsj", THREE)
    for words in (
        "backbone is 'resnet50' in the weights and 'resnet101' in the recipe",
        "rpn_convs is 1 in the weights and 2 in the recipe",
        "box_head is '2fc'",
        "batch_norm is False",
        "Recipes that fit: detectron2:r50-fpn-3x, detectron2:r50-fpn-torchvision.",
    ):
        assert words in str(refused.value)


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(arrays: Arrays) -> None:
    with pytest.raises(CheckpointError, match=r"wanted one of detectron2:r50-fpn-3x, "):
        from_detectron2(arrays, "r50", THREE)


def test_what_does_not_fit_is_refused_with_detectron2s_keys(arrays: Arrays) -> None:
    wrong = dict(arrays)
    wrong["roi_heads.box_head.fc2.weight"] = torch.zeros(64, 7)
    wrong["roi_heads.keypoint_head.conv_fcn1.weight"] = torch.zeros(1)
    del wrong["backbone.fpn_output5.bias"]
    with pytest.raises(CheckpointError) as refused:
        from_detectron2(wrong, "detectron2:r50-fpn-3x", THREE)
    assert "1 missing: backbone.fpn_output5.bias" in str(refused.value)
    assert "1 unexpected: roi_heads.keypoint_head.conv_fcn1.weight" in str(refused.value)
    assert "roi_heads.box_head.fc2.weight (64, 7) instead of (64, 64)" in str(refused.value)


def test_another_number_of_categories_is_refused(arrays: Arrays) -> None:
    assert num_detectron2_categories(arrays) == 3
    with pytest.raises(CheckpointError, match=r"have 3 categories .* list has 80"):
        from_detectron2(arrays, "detectron2:r50-fpn-3x", COCO_CATEGORIES)


def test_group_norm_is_refused_by_name(arrays: Arrays) -> None:
    """32 groups there, groups of 8 channels here: the same weights would mean something else."""
    group_norm = {k: t for k, t in arrays.items() if ".running_" not in k}
    with pytest.raises(CheckpointError, match="group norm"):
        from_detectron2(group_norm, "detectron2:r50-fpn-3x", THREE)


@pytest.mark.parametrize("pattern", ["backbone.bottom_up.res4.", "roi_heads.box_predictor."])
def test_another_network_is_refused(arrays: Arrays, pattern: str) -> None:
    other = {k: t for k, t in arrays.items() if not k.startswith(pattern)}
    with pytest.raises(CheckpointError, match=r"0 bottlenecks|cls_score\.weight is missing"):
        from_detectron2(other, "detectron2:r50-fpn-3x", THREE)
