"""`masklake model …` as a user meets it: files in, files out, one clear line for a mistake."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.export.categories import choose_categories, parse_categories
from jobs.lake.storage import Storage
from maskrcnn_core import detectron2_recipes, torchvision_format
from maskrcnn_core.checkpoint import Checkpoint, dump_checkpoint, parse_checkpoint
from maskrcnn_core.config import COCO_CATEGORIES, MaskRCNNConfig, lite, r50_fpn
from maskrcnn_core.model import build_model
from schemas.errors import UsageError
from schemas.specs import StorageSpec
from tests.export.conftest import Masklake, assert_refused
from tests.maskrcnn_core import detectron2_reading

THREE = ((1, "ellipse"), (7, "box"), (9, "star"))


def read(path: Path) -> Checkpoint:
    return parse_checkpoint(path.read_bytes(), str(path))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in half precision, with a setting of each kind that no weights file says."""
    config = lite(THREE).replace(
        norm_eps=1e-3,
        roi_aligned=True,
        anchor_strides="nominal",
        score_threshold=0.2,
        image_mean=(0.5, 0.4, 0.3),
    )
    path = tmp_path_factory.mktemp("ours") / "small.safetensors"
    model = build_model(config, seed=0)
    path.write_bytes(
        dump_checkpoint(model, "small-1", dtype=torch.float16, provenance={"data": "rendered scenes"})
    )
    return path


def small_r50(categories: tuple[tuple[int, str], ...]) -> MaskRCNNConfig:
    """torchvision's layers with narrow heads, which are half of the weights."""
    return r50_fpn(categories).replace(fpn_channels=16, box_head_channels=8, mask_head_channels=8)


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    model = build_model(small_r50(tuple((i, str(i)) for i in range(1, 91))), seed=0)
    return {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }


@pytest.fixture
def torchvision_file(torchvision_state: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "theirs.pth"
    torch.save(torchvision_state, path)
    return path


@pytest.fixture(scope="module")
def detectron2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Detectron2 publishes them, a pickle of arrays with an author; with narrow heads."""
    network = detectron2_reading.Network(width=16, fc_width=8)
    arrays = {key: t.half().numpy() for key, t in detectron2_reading.random_arrays(network).items()}
    path = tmp_path_factory.mktemp("detectron2") / "model_final_000000.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "nobody"}))
    return path


@pytest.fixture
def three_categories(tmp_path: Path) -> Path:
    path = tmp_path / "categories.json"
    path.write_text(json.dumps([{"id": i, "name": name} for i, name in reversed(THREE)]))
    return path


def test_export_and_import_together_change_nothing(masklake: Masklake, ours: Path, tmp_path: Path) -> None:
    exported, back = tmp_path / "x" / "small.pth", tmp_path / "back.safetensors"
    assert masklake("export", ours, exported).status == 0
    assert masklake("import", exported, back, "--json").json["fingerprint"] == read(ours).fingerprint
    before, after = read(ours), read(back)
    assert after.config == before.config
    assert after.name == before.name
    assert after.fingerprint == before.fingerprint
    assert after.model_id("fp32") == before.model_id("fp32")
    assert after.provenance["data"] == "rendered scenes"
    assert after.provenance["imported"]["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()


def test_an_exported_file_is_a_plain_state_dict(masklake: Masklake, ours: Path, tmp_path: Path) -> None:
    result = masklake("export", ours, tmp_path / "small.pth")
    assert str(tmp_path / "small.pth.json") in result.out
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    assert type(state) is dict
    assert state.keys() == read(ours).weights.keys()
    sidecar = json.loads((tmp_path / "small.pth.json").read_text())
    assert sidecar["config"]["categories"] == [list(category) for category in THREE]
    assert sidecar["torchvision"]["builder"] is None


def test_export_says_what_to_build_in_torchvision_and_what_would_differ(
    masklake: Masklake, tmp_path: Path
) -> None:
    config = r50_fpn(THREE).replace(norm_eps=0.0, min_size_px=600)
    (tmp_path / "a.safetensors").write_bytes(
        dump_checkpoint(build_model(config, seed=0), "a", dtype=torch.float16)
    )
    result = masklake("export", tmp_path / "a.safetensors", tmp_path / "a.pth")
    assert (
        "maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=600)"
        in result.out
    )
    assert "norm_eps=0.0" in result.out


def test_nothing_is_overwritten_without_force(masklake: Masklake, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.pth"
    for existing in (out, tmp_path / "small.pth.json"):
        existing.write_text("mine")
        assert_refused(masklake("export", ours, out), "exists", "--force", str(existing))
        assert existing.read_text() == "mine"
        existing.unlink()
    out.write_text("mine")
    assert masklake("export", ours, out, "--force").status == 0
    checkpoint = tmp_path / "back.safetensors"
    checkpoint.write_text("mine")
    assert_refused(masklake("import", out, checkpoint), "exists", "--force")
    assert masklake("import", out, checkpoint, "--force").status == 0
    assert read(checkpoint).fingerprint == read(ours).fingerprint


def test_source_and_result_may_be_uris(masklake: Masklake, ours: Path) -> None:
    folder = "memory://bucket/models"
    assert masklake("export", ours, f"{folder}/small.pth").status == 0
    assert masklake("import", f"{folder}/small.pth", f"{folder}/back.safetensors").status == 0
    report = masklake("inspect", f"{folder}/back.safetensors", "--json").json
    assert report["fingerprint"] == read(ours).fingerprint


def test_torchvisions_weights_need_names_for_their_classes(
    masklake: Masklake, torchvision_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert_refused(masklake("import", torchvision_file, out), "90 categories", "--categories")
    assert not out.exists()
    result = masklake("import", torchvision_file, out, "--categories", "coco", "--name", "tv", "--json").json
    assert (result["format"], result["dtype"], result["categories"]) == ("torchvision", "float16", 90)
    config = read(out).config
    assert config == small_r50(torchvision_format.published_coco_categories())
    assert read(out).name == "tv"


def test_the_published_file_needs_nothing(
    masklake: Masklake, torchvision_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(torchvision_file.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision_format, "COCO_V1_SHA256", sha256[:8])
    out = tmp_path / "out.safetensors"
    assert masklake("import", torchvision_file, out).status == 0
    assert read(out).config.norm_eps == 0
    assert dict(read(out).config.categories)[12] == "N/A 12"
    assert masklake("inspect", torchvision_file, "--json").json["published"] is True


def test_settings_that_no_file_says_can_be_set(
    masklake: Masklake, torchvision_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ("import", torchvision_file, out, "--categories", "coco")
    settings = ("--set", "norm_eps=0", "--set", "roi_aligned=true", "--set", "image_mean=[0.5, 0.4, 0.3]")
    assert masklake(*arguments, *settings).status == 0
    config = read(out).config
    assert (config.norm_eps, config.roi_aligned, config.image_mean) == (0.0, True, (0.5, 0.4, 0.3))
    assert read(out).provenance["imported"]["settings"] == [*settings[1::2]]
    for wrong, words in (  # the first four before the file is opened
        ("norm_epsilon=0", "norm_eps"),
        ("norm_eps=small", "like 1e-05"),
        ("roi_aligned=1", "like False"),
        ("categories=[]", "FIELD=VALUE"),
        ("norm=none", "frozen_bn"),
        ("fpn_channels=32", "fpn.inner_blocks"),
    ):
        assert_refused(masklake(*arguments, "--force", "--set", wrong), words)


def test_categories_are_counted_by_rising_id(
    masklake: Masklake, detectron2_file: Path, three_categories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    recipe = ("--recipe", "detectron2:r50-fpn-3x")
    assert masklake("import", detectron2_file, out, *recipe, "--categories", three_categories).status == 0
    assert read(out).config.categories == THREE
    instances = json.dumps({"images": [], "categories": json.loads(three_categories.read_text())})
    assert parse_categories(instances.encode(), "instances.json") == THREE


def test_labels_that_are_ids_leave_holes_in_the_list(tmp_path: Path) -> None:
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps([{"id": i, "name": name} for i, name in COCO_CATEGORIES]))
    chosen = choose_categories(90, str(coco), False, "theirs.pth", Storage(StorageSpec()))
    assert chosen == torchvision_format.published_coco_categories()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "COCO-style"),
        ("[1, 2]", "COCO-style"),
        ("not json", "COCO-style"),
        ("[]", "no categories"),
        ('[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "twice"),
        ('[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]', "lists 2"),
    ],
)
def test_a_list_of_categories_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        choose_categories(90, str(path), False, "theirs.pth", Storage(StorageSpec()))


def test_detectron2s_weights_need_a_recipe(
    masklake: Masklake, detectron2_file: Path, three_categories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ("import", detectron2_file, out, "--categories", three_categories)
    assert_refused(
        masklake(*arguments), "--recipe", "detectron2:r50-fpn-3x", "detectron2:r50-fpn-torchvision"
    )
    assert_refused(masklake(*arguments, "--recipe", "detectron2:r101-fpn-3x"), "contradict", "resnet50")
    assert_refused(masklake(*arguments, "--recipe", "r50"), "wanted one of", "detectron2:r50-fpn-lsj")
    assert not out.exists()
    assert masklake(*arguments, "--recipe", "detectron2:r50-fpn-3x").status == 0
    imported = read(out).provenance["imported"]
    assert imported["recipe"] == "detectron2:r50-fpn-3x"
    assert imported["format"] == "detectron2"
    assert imported["file"] == detectron2_file.name
    assert imported["sha256"] == hashlib.sha256(detectron2_file.read_bytes()).hexdigest()
    read(out).build()  # loads strictly


def test_a_file_of_detectron2s_zoo_says_its_recipe_by_its_checksum(
    masklake: Masklake,
    detectron2_file: Path,
    three_categories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "detectron2:r50-fpn-torchvision"
    md5 = hashlib.md5(detectron2_file.read_bytes()).hexdigest()
    known = replace(detectron2_recipes.RECIPES[name], zoo_md5=(md5[:6],))
    monkeypatch.setitem(detectron2_recipes.RECIPES, name, known)
    out = tmp_path / "out.safetensors"
    result = masklake("import", detectron2_file, out, "--categories", three_categories, "--json").json
    assert result["recipe"] == name


class Attack:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("command", ["import", "inspect", "export"])
def test_a_hostile_file_does_not_run(masklake: Masklake, tmp_path: Path, suffix: str, command: str) -> None:
    victim, evil = tmp_path / "ran", tmp_path / f"evil{suffix}"
    attack = {"model": {"backbone.body.conv1.weight": Attack(victim)}}
    if suffix == ".pkl":
        evil.write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, evil)
    out = tmp_path / ("out.pth" if command == "export" else "out.safetensors")
    result = masklake(command, evil) if command == "inspect" else masklake(command, evil, out)
    assert_refused(result, "evil")
    assert not victim.exists()
    assert not out.exists()


def test_weights_that_do_not_fit_are_refused_with_their_keys(
    masklake: Masklake, torchvision_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(torchvision_state)
    del state["rpn.head.bbox_pred.bias"]
    state["roi_heads.keypoint_head.0.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pth")
    out = tmp_path / "out.safetensors"
    assert_refused(
        masklake("import", tmp_path / "a.pth", out, "--categories", "coco"),
        "1 missing: rpn.head.bbox_pred.bias",
        "1 unexpected: roi_heads.keypoint_head.0.bias",
    )
    assert not out.exists()


def test_weights_with_nan_are_refused(
    masklake: Masklake, torchvision_state: dict[str, Tensor], tmp_path: Path
) -> None:
    key = "backbone.body.bn1.bias"  # a frozen norm's, which is no parameter
    torch.save(torchvision_state | {key: torch.full((64,), float("nan"))}, tmp_path / "a.pth")
    out = tmp_path / "out.safetensors"
    assert_refused(masklake("import", tmp_path / "a.pth", out, "--categories", "coco"), "NaN", key)
    assert not out.exists()


def test_mistakes_are_named(masklake: Masklake, ours: Path, torchvision_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert_refused(masklake("import", tmp_path / "no.pth", out), "no file", "no.pth")
    assert_refused(masklake("import", ours, out), "already")
    assert_refused(masklake("import", torchvision_file, tmp_path / "out.pth"), ".safetensors")
    assert_refused(
        masklake("import", torchvision_file, out, "--recipe", "detectron2:r50-fpn-3x"), "leave it out"
    )
    assert_refused(masklake("import", torchvision_file, out, "--format", "detectron2"), "bottlenecks")
    assert_refused(
        masklake("import", torchvision_file, out, "--categories", "coco", "--name", "a/b"), "checkpoint name"
    )
    assert_refused(masklake("export", ours, tmp_path / "out.weights"), "suffix", ".pth")
    assert_refused(masklake("export", torchvision_file, tmp_path / "out.pth"), "safetensors")
    assert masklake("import", torchvision_file, out, "--format", "keras").status == 2
    torch.save({"stem.conv1.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    assert_refused(masklake("import", tmp_path / "backbone.pth", out), "stem.conv1.weight")
    assert not out.exists()


def test_a_sidecar_of_another_file_is_refused(
    masklake: Masklake, ours: Path, torchvision_file: Path, tmp_path: Path
) -> None:
    masklake("export", ours, tmp_path / "small.pth")
    sidecar = (tmp_path / "small.pth.json").read_text()
    beside = torchvision_file.with_name(torchvision_file.name + ".json")
    beside.write_text(sidecar)
    out = tmp_path / "out.safetensors"
    assert_refused(masklake("import", torchvision_file, out), "belongs to", beside.name)
    beside.write_text(sidecar[:100])
    assert_refused(masklake("import", torchvision_file, out), beside.name, "damaged")
    beside.write_text('{"somebody": "else"}')
    assert_refused(masklake("import", torchvision_file, out), "--categories")


def test_inspect_shows_a_checkpoint(masklake: Masklake, ours: Path) -> None:
    checkpoint = read(ours)
    report = masklake("inspect", ours, "--json").json
    assert report["format"] == "masklake"
    assert report["fingerprint"] == checkpoint.fingerprint
    assert report["model_id"]["bf16"] == checkpoint.model_id("bf16")
    assert report["categories"] == [list(category) for category in THREE]
    assert report["config"]["norm_eps"] == 1e-3
    assert report["provenance"] == {"data": "rendered scenes"}
    assert report["dtype"] == "float16"
    assert report["size_bytes"] == ours.stat().st_size
    model = checkpoint.build()
    assert report["num_parameters"] == sum(p.numel() for p in model.parameters())
    table = masklake("inspect", ours)
    assert table.status == 0
    for words in (checkpoint.fingerprint, "small-1", "7 box", "rendered scenes"):
        assert words in table.out.replace("\n", "").replace("  ", "") or words in table.out


def test_inspect_shows_the_bundled_checkpoint(masklake: Masklake) -> None:
    assert masklake("inspect", "demo", "--json").json["preset"] == "lite"


def test_inspect_says_what_foreign_files_look_like(
    masklake: Masklake, ours: Path, torchvision_file: Path, detectron2_file: Path, tmp_path: Path
) -> None:
    report = masklake("inspect", detectron2_file, "--json").json
    assert (report["format"], report["num_categories"], report["preset"]) == ("detectron2", 3, "r50_fpn")
    assert report["recipes"] == ["detectron2:r50-fpn-3x", "detectron2:r50-fpn-torchvision"]
    report = masklake("inspect", torchvision_file, "--json").json
    assert (report["format"], report["num_categories"], report["published"]) == ("torchvision", 90, False)
    assert report["layers"]["fpn_channels"] == 16
    assert report["dtype"] == "float16"
    assert "torchvision" in masklake("inspect", torchvision_file).out
    masklake("export", ours, tmp_path / "small.pth")
    report = masklake("inspect", tmp_path / "small.pth", "--json").json
    assert report["sidecar"].endswith("small.pth.json")
    assert report["categories"] == [list(category) for category in THREE]


def test_inspect_says_where_it_does_not_know(masklake: Masklake, tmp_path: Path) -> None:
    torch.save({"stem\x1b[31m.weight": torch.zeros(1)}, tmp_path / "a.pth")
    assert "names of nobody" in masklake("inspect", tmp_path / "a.pth", "--json").json["problem"]
    assert "\x1b[31m" not in masklake("inspect", tmp_path / "a.pth").out
    torch.save({"backbone.body.conv1.weight": torch.zeros(1)}, tmp_path / "b.pth")
    assert "cls_score.weight is missing" in masklake("inspect", tmp_path / "b.pth", "--json").json["problem"]
    (tmp_path / "c.txt").write_text("nothing of the kind")
    assert_refused(masklake("inspect", tmp_path / "c.txt"), "none of")
