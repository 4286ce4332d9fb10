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


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"backbone": "vgg16"}, "backbone"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"min_size_px": 2000}, "max_size_px"),
        ({"categories": ((1, "a"), (1, "b"))}, "categories"),
        ({"categories": ()}, "categories"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        lite().replace(**change)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="anchor_colour"):
        MaskRCNNConfig.from_dict({**lite().to_dict(), "anchor_colour": "red"})
