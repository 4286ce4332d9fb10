from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import RoIPool, roi_align

from maskrcnn_core.config import MaskRCNNConfig, lite, r50_fpn, r50_fpn_v2, r101_fpn
from maskrcnn_core.losses import box_head_loss, mask_head_loss
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances, align_masks, pyramid_level, roi_align_pyramid

NINETY = tuple((i, str(i)) for i in range(1, 91))  # torchvision's 91 classes with background


def photograph(folder: Path) -> torch.Tensor:
    with Image.open(
        folder / "coco_photos/val2017" / sorted(p.name for p in (folder / "coco_photos/val2017").iterdir())[0]
    ) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255.0


@pytest.mark.parametrize(
    ("preset", "reference"), [(r50_fpn, maskrcnn_resnet50_fpn), (r50_fpn_v2, maskrcnn_resnet50_fpn_v2)]
)
def test_same_weights_detect_what_torchvision_detects(
    preset: Callable[..., MaskRCNNConfig], reference: Callable[..., nn.Module], shared_data: Path
) -> None:
    # A random head gives every class about 1/91; this threshold lets some hundred candidates through.
    threshold = 0.0115
    torch.manual_seed(0)
    theirs: Any = reference(
        weights=None,
        weights_backbone=None,
        num_classes=91,
        box_score_thresh=threshold,
        min_size=256,
        max_size=448,
    ).eval()
    ours = build_model(preset(NINETY).replace(score_threshold=threshold)).eval()
    ours.load_state_dict(theirs.state_dict())
    images, _ = theirs.transform([photograph(shared_data)])
    with torch.no_grad():
        features = theirs.backbone(images.tensors)
        proposals, _ = theirs.rpn(images, features, None)
        expected = theirs.roi_heads(features, proposals, images.image_sizes)[0][0]
        found = ours(images.tensors, images.image_sizes)[0]
    assert len(found.boxes) > 0
    assert torch.equal(found.class_indices, expected["labels"])
    assert torch.allclose(found.boxes, expected["boxes"], atol=1e-3)
    assert torch.allclose(found.scores, expected["scores"], atol=1e-5)
    assert torch.allclose(found.mask_probs, expected["masks"][:, 0], atol=1e-5)


@pytest.mark.parametrize("preset", [r101_fpn, lite])
def test_every_preset_detects_and_trains(preset: Callable[..., MaskRCNNConfig]) -> None:
    config = preset(NINETY[:3]).replace(rpn_post_nms=20, rpn_post_nms_train=20, score_threshold=0.0)
    model = build_model(config, seed=1)
    images = torch.randn(2, 3, 64, 96)
    sizes = [(64, 96), (60, 80)]
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = 1
    target = Instances(torch.tensor([[10.0, 10.0, 50.0, 40.0]]), torch.tensor([2]), masks)
    losses = model.train().losses(images, sizes, [target, target])
    assert set(losses) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        found = model.eval()(images, sizes)
    assert len(found) == 2
    assert all(
        (d.boxes[:, 2] <= w).all() and (d.boxes[:, 3] <= h).all()
        for d, (h, w) in zip(found, sizes, strict=True)
    )


def test_an_image_without_instances_still_has_a_finite_loss(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config, seed=0).train()
    empty = Instances(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.uint8)
    )
    losses = model.losses(torch.randn(2, 3, 64, 64), [(64, 64)] * 2, [empty, empty])
    total = sum(losses.values(), torch.zeros(()))
    total.backward()
    assert torch.isfinite(total)
    assert losses["loss_mask"] == 0


def test_no_proposal_gives_an_empty_result(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config.replace(score_threshold=1.0), seed=0).eval()
    with torch.no_grad():
        (found,) = model(torch.randn(1, 3, 64, 64), [(64, 64)])
    assert found.boxes.shape == (0, 4)
    assert found.mask_probs.shape == (0, 28, 28)


def test_a_model_learns_one_scene_by_heart(tiny_config: MaskRCNNConfig) -> None:
    torch.manual_seed(0)
    model: MaskRCNN = build_model(tiny_config, seed=0).train()
    image = torch.zeros(2, 3, 64, 64)
    image[:, :, 16:48, 16:48] = 2.0
    masks = (image[0, :1] > 1).to(torch.uint8)
    target = Instances(torch.tensor([[16.0, 16.0, 48.0, 48.0]]), torch.tensor([2]), masks)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for _ in range(25):
        loss = sum(model.losses(image, [(64, 64)] * 2, [target, target]).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


def test_the_mask_loss_reads_the_true_class_only() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1] = 20.0  # another class's opinion
    target = torch.ones(1, 2, 2)
    right = mask_head_loss(logits, torch.tensor([1]), target)
    other = mask_head_loss(logits, torch.tensor([2]), target)
    assert right < 1e-6
    assert other == pytest.approx(np.log(2.0))


def test_background_has_no_box_loss() -> None:
    logits, deltas = torch.zeros(2, 3), torch.full((2, 12), 5.0)
    _, background = box_head_loss(logits, deltas, torch.tensor([0, 0]), torch.zeros(2, 4))
    _, foreground = box_head_loss(logits, deltas, torch.tensor([0, 1]), torch.zeros(2, 4))
    assert background == 0
    assert foreground == pytest.approx(4 * (5 - 0.5 / 9) / 2)


def test_roi_align_is_exact_on_a_linear_ramp_where_roi_pool_is_not() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    roi = torch.tensor([[0.0, 4.3, 6.7, 19.9, 21.1]])
    aligned = roi_align(ramp, roi, 4, sampling_ratio=2, aligned=True)
    cell = (19.9 - 4.3) / 4
    expected = torch.tensor([4.3 + cell * (i + 0.5) - 0.5 for i in range(4)])
    assert torch.allclose(aligned[0, 0, 0], expected, atol=1e-4)
    pooled = RoIPool(4, 1.0)(ramp, roi)
    assert (pooled[0, 0, 0] - expected).abs().max() > 0.5


def test_boxes_are_pooled_from_the_level_that_fits_their_size() -> None:
    sides = torch.tensor([1.0, 111.0, 112.0, 224.0, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(6), torch.zeros(6), sides, sides), dim=1)
    assert pyramid_level(boxes).tolist() == [0, 0, 1, 2, 3, 3]


def test_aligning_no_box_gives_no_feature() -> None:
    features = [torch.randn(2, 8, 16 // 2**i, 16 // 2**i) for i in range(5)]
    empty = torch.zeros(0, 4)
    assert roi_align_pyramid(features, [empty, empty], 7, 2, False).shape == (0, 8, 7, 7)


def test_a_mask_target_is_the_mask_inside_its_box() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[1, 8:24, 8:16] = 1  # the left half of the box below
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    target = align_masks(masks, torch.tensor([1]), box, 4)
    assert torch.equal(target, project_masks_on_boxes(masks, box, torch.tensor([1]), 4))
    # The last row reaches half a pixel below the mask: RoIAlign as torchvision trains with it, not aligned.
    assert target[0, :, 0].tolist() == [1, 1, 1, 0.875]
    assert target[0, :, 3].tolist() == [0, 0, 0, 0]
