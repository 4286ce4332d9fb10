"""First weights, jobs/train/start.py."""

from pathlib import Path

import pytest
import torch

from jobs.lake.storage import Storage
from jobs.train.start import Start, start_model
from maskrcnn_core.backbone import build_backbone
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import lite, r50_fpn
from maskrcnn_core.model import MaskRCNN, build_model
from schemas.errors import UsageError
from schemas.spec_loader import parse_spec
from schemas.specs import StorageSpec
from schemas.train_spec import TrainModelSpec

OLD = ((1, "disc"), (2, "square"), (7, "star"))
NEW = ((3, "star"), (4, "ring"), (5, "disc"))


def started(categories: tuple[tuple[int, str], ...] = OLD, **settings: object) -> Start:
    spec = parse_spec(TrainModelSpec, settings, "spec")
    return start_model(spec, categories, 0, Storage(StorageSpec()))


def start(categories: tuple[tuple[int, str], ...] = OLD, **settings: object) -> MaskRCNN:
    return started(categories, **settings).model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MaskRCNN]:
    path = tmp_path_factory.mktemp("model") / "old.safetensors"
    model = build_model(lite(OLD), 5)
    path.write_bytes(dump_checkpoint(model, "old"))
    return str(path), model


def test_a_preset_is_fresh_and_the_seed_fixes_it() -> None:
    one, two = start(uri="lite"), start(uri="lite")
    assert one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_random_weights_are_trained_whole_and_normalised_and_a_note_says_how_to_do_better() -> None:
    found = started(uri="r50_fpn")
    assert (found.model.config.norm, found.model.config.trainable_stages) == ("bn", 5)
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    (note,) = found.notes
    assert "r50_fpn starts from random weights: all stages are trained, with norm bn" in note
    assert "model.backbone" in note


def test_what_is_frozen_on_random_weights_by_wish_is_kept_and_said() -> None:
    found = started(uri="lite", norm="frozen_bn", trainable_stages=3)
    assert (found.model.config.norm, found.model.config.trainable_stages) == ("frozen_bn", 3)
    (note,) = found.notes
    assert "frozen_bn has no statistics to freeze" in note
    assert "trainable_stages 3 of 5 leaves the others random" in note
    assert started(uri="lite", norm="gn").model.config.trainable_stages == 5


def test_a_pretrained_backbone_is_frozen_as_the_preset_says(tmp_path: Path) -> None:
    body = build_backbone(r50_fpn(OLD)).body.state_dict()
    torch.save(body, tmp_path / "resnet50.pth")
    found = started(uri="r50_fpn", backbone=str(tmp_path / "resnet50.pth"))
    assert (found.model.config.norm, found.model.config.trainable_stages) == ("frozen_bn", 3)
    assert found.notes == ()


def test_a_checkpoint_of_the_same_categories_is_taken_whole(checkpoint: tuple[str, MaskRCNN]) -> None:
    path, old = checkpoint
    taken = start(uri=path).state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in old.state_dict().items())


def test_categories_keep_their_weights_by_name(checkpoint: tuple[str, MaskRCNN]) -> None:
    path, old = checkpoint
    model = start(NEW, uri=path)
    assert model.config.categories == NEW
    was, now = old.roi_heads, model.roi_heads
    for new, previous in ((0, 0), (1, 3), (3, 1)):  # background, star, disc
        assert torch.equal(
            now.box_predictor.cls_score.weight[new], was.box_predictor.cls_score.weight[previous]
        )
        boxes = now.box_predictor.bbox_pred.weight.unflatten(0, (-1, 4))[new]
        assert torch.equal(boxes, was.box_predictor.bbox_pred.weight.unflatten(0, (-1, 4))[previous])
        masks = now.mask_predictor.mask_fcn_logits.weight[new]
        assert torch.equal(masks, was.mask_predictor.mask_fcn_logits.weight[previous])
    ring = now.box_predictor.cls_score.weight[2]
    assert not any(torch.equal(ring, row) for row in was.box_predictor.cls_score.weight)
    kept = "roi_heads.box_head.fc6.weight"
    assert torch.equal(model.state_dict()[kept], old.state_dict()[kept])


def test_categories_are_the_same_whatever_their_case_and_a_note_counts_them(
    checkpoint: tuple[str, MaskRCNN],
) -> None:
    path, old = checkpoint
    found = started(((3, "Star"), (4, "ring"), (5, " disc")), uri=path)
    rows = found.model.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(rows[1], old.roi_heads.box_predictor.cls_score.weight[3])
    assert found.notes == (f"2 of 3 categories keep their weights of {path}; fresh ones: ring",)
    assert started(uri=path).notes == (f"3 of 3 categories keep their weights of {path}",)


@pytest.mark.parametrize("prefix", ["", "features."])
def test_a_pretrained_backbone_is_loaded_without_its_classifier(tmp_path: Path, prefix: str) -> None:
    source = build_model(lite(OLD), 9).backbone.body.state_dict()
    weights = {f"{prefix}{name}": value for name, value in source.items()}
    weights |= {f"{prefix}18.0.weight": torch.zeros(1), "classifier.1.weight": torch.zeros(1)}
    torch.save(weights, tmp_path / "backbone.pth")
    body = start(uri="lite", backbone=str(tmp_path / "backbone.pth")).backbone.body.state_dict()
    assert all(torch.equal(body[name], value) for name, value in source.items())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"uri": "lite", "backbone": "wrong.pth"}, r"does not fit mobilenet_v2 with norm bn: .* is missing"),
        ({"uri": "lite", "norm": "frozen_bn", "trainable_stages": 6}, "trainable_stages"),
        ({"uri": "OLD", "norm": "gn"}, "model.norm is for presets"),
        ({"uri": "absent.safetensors"}, "there is no checkpoint at"),
        ({"uri": "wrong.pth"}, "not a safetensors file"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    settings: dict[str, object],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: tuple[str, MaskRCNN],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.zeros(2)}, "wrong.pth")
    named = {key: checkpoint[0] if value == "OLD" else value for key, value in settings.items()}
    with pytest.raises(UsageError, match=problem) as caught:
        start(OLD, **named)
    assert "\n" not in str(caught.value)


def test_the_photographs_backbone_loads(shared_data: Path) -> None:
    weights = shared_data / "weights/mobilenet_v2_imagenet_features_bnrecal.pth"
    model = start(uri="lite", backbone=str(weights))
    loaded = torch.load(weights, weights_only=True)
    assert torch.equal(model.backbone.body.state_dict()["0.0.weight"], loaded["0.0.weight"])
