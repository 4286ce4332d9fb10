"""`masklake model register | alias | list` as a user meets them."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest
import torch

from jobs.lake.aliases import login
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord, record_model_id
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from maskrcnn_core.config import lite
from maskrcnn_core.model import build_model
from schemas.specs import StorageSpec
from tests.export.conftest import Masklake, assert_refused
from tests.lake.conftest import make_label_rows

CATEGORIES = ((1, "window"), (3, "door"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with narrow heads, whose weights differ."""
    config = lite(CATEGORIES).replace(fpn_channels=8, box_head_channels=8, mask_head_channels=8)
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = folder / "first.safetensors", folder / "second.safetensors"
    for seed, path in enumerate(paths):
        path.write_bytes(dump_checkpoint(build_model(config, seed), path.stem, dtype=torch.float16))
    return paths


def label(lake: Path, checkpoint: Path) -> str:
    """Give the lake's table a label by this checkpoint, as a run would; returns its model_id."""
    parsed = parse_checkpoint(checkpoint.read_bytes(), str(checkpoint))
    model_id, storage = parsed.model_id("fp32"), Storage(StorageSpec())
    table = LabelsTable.open_or_create(str(lake), storage)
    committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
    committer.add(
        write_fragment(make_label_rows(["a.jpg"], model_id), ["unit"], f"file://{lake}", model_id, storage)
    )
    committer.commit()
    record = ModelIdRecord(
        model_id, parsed.fingerprint, parsed.name, "fp32", {}, parsed.config.categories, "infer-1", ""
    )
    record_model_id(storage, str(lake), record)
    return model_id


def test_versions_are_registered_named_by_aliases_and_listed(
    masklake: Masklake, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = checkpoints
    lake = ("--lake", tmp_path / "lake")
    assert "no models are registered" in masklake("list", *lake).out
    assert masklake("list", *lake, "--json").json == {"models": [], "aliases": {}}

    made = masklake("register", first, *lake, "--name", "facades", "--note", "trained in May")
    assert made.out.splitlines()[0] == "facades@1"
    again = masklake("register", second, *lake, "--name", "facades", "--json").json
    fingerprint = parse_checkpoint(second.read_bytes(), "").fingerprint
    assert (again["model"], again["made"], again["fingerprint"]) == ("facades@2", True, fingerprint)

    moved = masklake("alias", "champion", "facades@1", *lake, "--by", "ada", "--why", "the first")
    assert moved.out == "champion is facades@1; before: nothing\n"
    moved = masklake("alias", "champion", "facades@2", *lake, "--json").json
    assert (moved["number"], moved["model"], moved["before"]) == (2, "facades@2", "facades@1")
    assert moved["by"] == getpass.getuser()
    assert "facades@2; before: nothing" in masklake("alias", "newest", "alias:champion", *lake).out

    model_id = label(tmp_path / "lake", second)
    listed = masklake("list", *lake, "--json").json
    assert [
        (model["model"], model["aliases"], model["labelled_as"], model["facts"].get("note"))
        for model in listed["models"]
    ] == [("facades@1", [], [], "trained in May"), ("facades@2", ["champion", "newest"], [model_id], None)]
    assert [(move["model"], move["why"]) for move in listed["aliases"]["champion"]] == [
        ("facades@2", ""),
        ("facades@1", "the first"),
    ]
    lines = [line.split() for line in masklake("list", *lake).out.splitlines()]
    assert ["facades@2", "champion,", "newest", again["created_at"], model_id] in lines
    assert ["champion", "facades@2", moved["at"], moved["by"]] in lines


def test_the_weights_of_the_newest_version_make_no_other(
    masklake: Masklake, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = checkpoints
    name = ("--lake", tmp_path, "--name", "facades")
    masklake("register", first, *name)
    same = masklake("register", first, *name)
    assert same.out.startswith("facades@1\n  has these weights already; no version was made")
    assert masklake("register", "registry:facades@1", *name, "--json").json["made"] is False
    masklake("register", second, *name)
    back = masklake("register", first, *name, "--json").json  # the newest ones are others now
    assert (back["model"], back["made"]) == ("facades@3", True)


def test_what_cannot_be_registered_is_refused_and_nothing_is_written(
    masklake: Masklake, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoints[0].read_bytes()[:-1] + b"\x7f")
    for checkpoint, name, words in (
        (tmp_path / "no.safetensors", "facades", "no checkpoint at"),
        (damaged, "facades", "altered or damaged"),
        (__file__, "facades", "not a safetensors file"),
        ("alias:champion", "facades", "no alias 'champion'"),
        (checkpoints[0], "a/b", "model name 'a/b'"),
    ):
        assert_refused(masklake("register", checkpoint, "--lake", lake, "--name", name), words)
    arguments = ("register", checkpoints[0], "--lake", lake, "--name", "facades")
    assert_refused(masklake(*arguments, "--note", "two\nlines"), "--note", "one line")
    assert not lake.exists()


def test_what_cannot_be_an_alias_is_refused(
    masklake: Masklake, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    lake = ("--lake", tmp_path / "lake")
    assert_refused(masklake("alias", "champion", "facades@1", *lake), "models are none so far")
    masklake("register", checkpoints[0], *lake, "--name", "facades")
    assert_refused(masklake("alias", "champion", "facades@2", *lake), "facades has version 1")
    assert_refused(masklake("alias", "champion", "facades", *lake), "wanted NAME@VERSION")
    assert_refused(masklake("alias", "champion", "alias:other", *lake), "no alias 'other'")
    assert_refused(masklake("alias", "cham/pion", "facades@1", *lake), "alias 'cham/pion'")
    assert_refused(masklake("alias", "champion", "facades@1", *lake, "--why", "a\nb"), "one line")
    assert masklake("list", *lake, "--json").json["aliases"] == {}


def test_a_user_without_a_name_is_known_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_name() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", no_name)
    monkeypatch.setattr("os.getuid", lambda: 4711)
    assert login() == "uid 4711"


def test_models_of_a_registry_are_inspected_and_exported(
    masklake: Masklake, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, _ = checkpoints
    lake = ("--lake", tmp_path / "lake")
    masklake("register", first, *lake, "--name", "facades")
    masklake("alias", "champion", "facades@1", *lake)
    report = masklake("inspect", "alias:champion", *lake, "--json").json
    assert report["fingerprint"] == parse_checkpoint(first.read_bytes(), "").fingerprint
    assert report["file"].startswith("facades@1 (")
    exported = masklake("export", "registry:facades@1", tmp_path / "a.pth", *lake, "--json").json
    assert exported["fingerprint"] == report["fingerprint"]
    assert (tmp_path / "a.pth").exists()

    for arguments in (("inspect", "alias:champion"), ("export", "registry:facades@1", tmp_path / "b.pth")):
        assert_refused(masklake(*arguments), str(arguments[1]), "is a model of a lake's registry", "--lake")
        assert_refused(masklake(*arguments, "--lake", tmp_path / "none"), "none")
    assert_refused(masklake("inspect", "registry:facades@3", *lake), "facades@3 is not registered")
    assert not (tmp_path / "b.pth").exists()
