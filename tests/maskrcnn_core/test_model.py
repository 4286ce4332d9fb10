from collections.abc import Callable

import numpy as np
import pytest
import torch

from maskrcnn_core.config import MaskRCNNConfig, lite, r101_fpn
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.model import MaskRCNN, build_model
from maskrcnn_core.roi_heads import Instances, pyramid_level, rois_of

THREE = ((1, "one"), (2, "two"), (3, "three"))


def instances(
    boxes: list[list[float]], classes: list[int], ignored: list[list[float]] | None = None
) -> Instances:
    """Each mask fills its box."""
    crops = [(int(y0), int(x0), np.ones((int(y1 - y0), int(x1 - x0)))) for x0, y0, x1, y1 in boxes]
    return Instances(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        MaskCrops.from_crops(crops),
        torch.tensor(ignored or []).reshape(-1, 4),
    )


def sizes_of(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.float32)


@pytest.mark.parametrize("preset", [r101_fpn, lite])
def test_every_preset_detects_and_trains(preset: Callable[..., MaskRCNNConfig]) -> None:
    config = preset(THREE).replace(rpn_post_nms=20, rpn_post_nms_train=20, score_threshold=0.0)
    model = build_model(config, seed=1)
    images = torch.randn(2, 3, 64, 96)
    sizes = [(64, 96), (60, 80)]
    target = instances([[10.0, 10.0, 50.0, 40.0]], [2])
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
    empty = instances([], [])
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
    target = instances([[8.0, 8, 40, 40]], [3])
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


@pytest.mark.parametrize("agnostic", [False, True])
def test_masks_are_trained_as_they_are_predicted(tiny_config: MaskRCNNConfig, agnostic: bool) -> None:
    """The same values as through torchvision's predictor, of the true class only, and the same gradients."""
    heads = build_model(tiny_config.replace(mask_class_agnostic=agnostic), seed=0).roi_heads
    torch.manual_seed(0)
    features = [torch.randn(1, 96, 64 // 2**level, 64 // 2**level) for level in range(4)]
    rois = torch.tensor([[0.0, 3, 5, 60, 47], [0, 20, 20, 40, 60], [0, 0, 0, 255, 200]])
    classes = torch.tensor([2, 1, 2])
    heads.mask_predictor.conv5_mask.bias.data.normal_()
    every_class = heads.mask_predictor(heads.mask_head(heads._align(features, rois, 14)))
    expected = every_class[torch.arange(3), 0 * classes if agnostic else classes]
    found = heads._mask_logits(features, rois, classes)
    assert torch.allclose(found, expected, atol=1e-5)
    parameters = [*heads.mask_head.parameters(), *heads.mask_predictor.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


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
    target = instances([[16.0, 16.0, 48.0, 48.0]], [2])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for _ in range(25):
        loss = sum(model.losses(image, [(64, 64)] * 2, [target, target]).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


def test_an_ignored_image_counts_for_nothing(tiny_config: MaskRCNNConfig) -> None:
    """Anchors beyond the border and in the padding give no samples either."""
    model = build_model(tiny_config, seed=0).train()
    blank = instances([], [], ignored=[[0.0, 0.0, 48.0, 40.0]])
    sums = model.loss_sums(torch.zeros(1, 3, 64, 64), [(40, 48)], [blank])
    assert all(count == 0 for count in sums.counts.values())
    total = sum(sums.mean().values(), torch.zeros(()))
    assert total == 0
    total.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_crowd_keeps_its_background_from_being_learnt(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config.replace(rpn_samples=100_000), seed=0).train()
    image, size = torch.randn(1, 3, 64, 64), [(64, 64)]
    counts = [
        model.loss_sums(image, size, [instances([], [], ignored=ignored)]).counts["loss_objectness"]
        for ignored in ([], [[10.0, 10.0, 30.0, 30.0]])
    ]
    assert 0 < counts[1] < counts[0]


def test_samples_of_an_image_do_not_depend_on_the_rest_of_the_batch(tiny_config: MaskRCNNConfig) -> None:
    model = build_model(tiny_config, seed=0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # its statistics do depend on the batch
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    targets = [instances([[8.0, 8, 40, 40]], [3]), instances([[20.0, 4, 50, 30], [1.0, 1, 20, 60]], [1, 2])]
    seeds = [11, 12]

    def sums_of(*chosen: int) -> dict[str, float]:
        generators = [torch.Generator().manual_seed(seeds[i]) for i in chosen]
        with torch.no_grad():
            sums = model.loss_sums(
                images[list(chosen)], [(64, 64)] * len(chosen), [targets[i] for i in chosen], generators
            )
        return {name: float(total) for name, total in sums.sums.items()}

    alone = [sums_of(0), sums_of(1)]
    for name, together in sums_of(1, 0).items():
        assert together == pytest.approx(alone[0][name] + alone[1][name], rel=1e-4)


def test_boxes_are_pooled_from_the_level_that_fits_their_size() -> None:
    sides = torch.tensor([1.0, 111.0, 112.0, 224.0, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(6), torch.zeros(6), sides, sides), dim=1)
    assert pyramid_level(boxes).tolist() == [0, 0, 1, 2, 3, 3]
