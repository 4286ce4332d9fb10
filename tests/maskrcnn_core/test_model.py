from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from maskrcnn_core.config import MaskRCNNConfig, lite, r101_fpn
from maskrcnn_core.losses import box_head_loss, mask_head_loss
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances, align_masks, pyramid_level, rois_of

THREE = ((1, "one"), (2, "two"), (3, "three"))


def sizes_of(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.float32)


@pytest.mark.parametrize("preset", [r101_fpn, lite])
def test_every_preset_detects_and_trains(preset: Callable[..., MaskRCNNConfig]) -> None:
    config = preset(THREE).replace(rpn_post_nms=20, rpn_post_nms_train=20, score_threshold=0.0)
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
        found, mask_probs = model.eval()(images, sizes_of(*sizes))
    assert found.complete.all()
    assert found.finite.all()
    assert mask_probs.shape == (*found.scores.shape, 28, 28)
    for boxes, scores, (height, width) in zip(found.boxes, found.scores, sizes, strict=True):
        assert (scores.diff() <= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()


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


def test_nothing_above_the_threshold_gives_rows_of_zeros(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config.replace(score_threshold=1.0), seed=0).eval()
    with torch.no_grad():
        found, _ = model(torch.randn(1, 3, 64, 64), sizes_of((64, 64)))
    assert not found.boxes.any()
    assert not found.scores.any()
    assert not found.class_indices.any()
    assert found.complete.all()


def test_no_image_gives_no_detection(tiny_model: MaskRCNN) -> None:
    with torch.no_grad():
        found, mask_probs = tiny_model(torch.zeros(0, 3, 64, 64), torch.zeros(0, 2))
    assert found.boxes.shape == (0, 10, 4)
    assert mask_probs.shape == (0, 10, 28, 28)


def test_few_candidates_say_that_they_were_too_few(tiny_config: MaskRCNNConfig) -> None:
    # No overlap is allowed, and the best candidates lie close together: not ten of ten survive.
    torch.manual_seed(0)
    model = build_model(tiny_config.replace(nms_threshold=0.0, score_threshold=0.01), seed=0).eval()
    image, size = torch.randn(1, 3, 96, 96), sizes_of((96, 96))
    with torch.no_grad():
        few, _ = model.detect(image, size, max_candidates=10)
        enough, _ = model.detect(image, size, max_candidates=100_000)
    assert not few.complete.item()
    assert enough.complete.item()
    assert (enough.scores > 0).sum() >= (few.scores > 0).sum()


def test_damaged_weights_are_told_apart_from_an_empty_image(tiny_config: MaskRCNNConfig) -> None:
    for name in ("backbone.body.0.0.weight", "rpn.head.cls_logits.bias", "roi_heads.box_head.fc6.weight"):
        model = build_model(tiny_config, seed=0).eval()
        model.get_parameter(name).data.flatten()[0] = float("nan")
        with torch.no_grad():
            found, _ = model.detect(torch.randn(1, 3, 64, 64), sizes_of((64, 64)))
        assert not found.finite.item(), name


@pytest.mark.parametrize("agnostic", [{"box_class_agnostic": True}, {"mask_class_agnostic": True}])
def test_one_box_or_one_mask_of_all_classes_detects_and_trains(
    tiny_config: MaskRCNNConfig, agnostic: dict[str, bool]
) -> None:
    model = build_model(tiny_config.replace(**agnostic), seed=0)
    boxes = 4 if "box_class_agnostic" in agnostic else 4 * tiny_config.num_classes
    masks = 1 if "mask_class_agnostic" in agnostic else tiny_config.num_classes
    assert model.get_parameter("roi_heads.box_predictor.bbox_pred.weight").shape[0] == boxes
    assert model.get_parameter("roi_heads.mask_predictor.mask_fcn_logits.weight").shape[0] == masks
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 8:40, 8:40] = 1
    target = Instances(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([3]), mask)
    losses = model.train().losses(torch.randn(1, 3, 64, 64), [(64, 64)], [target])
    sum(losses.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        found, mask_probs = model.eval()(torch.randn(1, 3, 64, 64), sizes_of((64, 64)))
    assert (found.scores > 0).any()
    assert torch.isfinite(mask_probs).all()


def test_the_mask_of_a_detection_is_its_own_classs(tiny_model: MaskRCNN) -> None:
    with torch.no_grad():
        found, features = tiny_model.detect(torch.randn(1, 3, 64, 64), sizes_of((64, 64)))
        rois, classes = rois_of(found.boxes), found.class_indices[0]
        mask_probs = tiny_model.mask_probs(features, rois, classes)
        heads = tiny_model.roi_heads
        every_class = heads.mask_predictor(heads.mask_head(heads._align(features, rois, 14))).sigmoid()
    own = every_class[torch.arange(len(classes)), classes]
    assert torch.allclose(mask_probs, own, atol=1e-6)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn", "gn"])
def test_every_norm_builds_and_detects(tiny_config: MaskRCNNConfig, norm: str) -> None:
    model = build_model(tiny_config.replace(norm=norm), seed=0).eval()
    with torch.no_grad():
        found, _ = model.detect(torch.randn(1, 3, 64, 64), sizes_of((64, 64)))
    assert found.finite.all()


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


BETA = 1 / 9


def test_background_has_no_box_loss() -> None:
    logits, deltas = torch.zeros(2, 3), torch.full((2, 12), 5.0)
    _, background = box_head_loss(logits, deltas, torch.tensor([0, 0]), torch.zeros(2, 4), BETA)
    _, foreground = box_head_loss(logits, deltas, torch.tensor([0, 1]), torch.zeros(2, 4), BETA)
    assert background == 0
    assert foreground == pytest.approx(4 * (5 - 0.5 / 9) / 2)


def test_boxes_are_pooled_from_the_level_that_fits_their_size() -> None:
    sides = torch.tensor([1.0, 111.0, 112.0, 224.0, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(6), torch.zeros(6), sides, sides), dim=1)
    assert pyramid_level(boxes).tolist() == [0, 0, 1, 2, 3, 3]


def test_a_mask_target_is_the_mask_inside_its_box() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[1, 8:24, 8:16] = 1  # the left half of the box below
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    target = align_masks(masks, torch.tensor([1]), box, 4, aligned=False)
    assert torch.equal(target, project_masks_on_boxes(masks, box, torch.tensor([1]), 4))
    # The last row reaches half a pixel below the mask: RoIAlign as torchvision trains with it, not aligned.
    assert target[0, :, 0].tolist() == [1, 1, 1, 0.875]
    assert target[0, :, 3].tolist() == [0, 0, 0, 0]


def test_an_aligned_mask_target_ends_where_the_mask_does() -> None:
    masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[0, 8:24, 8:16] = 1
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    target = align_masks(masks, torch.tensor([0]), box, 4, aligned=True)
    assert target[0, :, 0].tolist() == [1, 1, 1, 1]
    assert target[0, :, 3].tolist() == [0, 0, 0, 0]
