import json

import pytest

from maskrcnn_core.config import COCO_CATEGORIES, PRESETS, MaskRCNNConfig, lite, r50_fpn


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_survives_json(preset: str) -> None:
    config = PRESETS[preset]()
    assert MaskRCNNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.preset == preset


def test_coco_has_80_categories_and_a_background() -> None:
    assert len(COCO_CATEGORIES) == 80
    assert r50_fpn().num_classes == 81
    assert r50_fpn().category_ids[-1] == 90


def test_r50_fpn_has_the_papers_numbers() -> None:
    """Mask R-CNN, section 3.1; FPN, sections 4.1 and 4.2; Faster R-CNN, section 3.1."""
    config = r50_fpn()
    assert (config.anchor_sizes, config.anchor_ratios) == ((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    assert (config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_nms_threshold) == (0.7, 0.3, 0.7)
    assert (config.rpn_samples, config.rpn_positive_fraction) == (256, 0.5)
    assert (config.rpn_pre_nms, config.rpn_post_nms) == (1000, 1000)
    assert (config.roi_samples, config.roi_positive_fraction, config.roi_iou) == (512, 0.25, 0.5)
    assert (config.box_roi_size, config.mask_roi_size, config.mask_head_convs) == (7, 14, 4)
    assert (config.score_threshold, config.nms_threshold, config.mask_threshold) == (0.05, 0.5, 0.5)
    assert config.max_detections == 100
    assert (config.min_size_px, config.max_size_px) == (800, 1333)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"backbone": "vgg16"}, "backbone"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"min_size_px": 2000}, "max_size_px"),
        ({"categories": ((1, "a"), (1, "b"))}, "categories"),
        ({"categories": ()}, "categories"),
        ({"norm": "layer_norm"}, "norm"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"stride_in_1x1": True}, "stride_in_1x1"),
        ({"anchor_strides": "guessed"}, "anchor_strides"),
        ({"roi_sampling_ratio": -1}, "roi_sampling_ratio"),
        ({"box_smooth_l1_beta": -0.1}, "box_smooth_l1_beta"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        lite().replace(**change)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="anchor_colour"):
        MaskRCNNConfig.from_dict({**lite().to_dict(), "anchor_colour": "red"})
