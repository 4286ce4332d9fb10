"""The data of a run and its record, jobs/train/data_files.py and run_record.py."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from jobs.lake.storage import Storage
from jobs.train.coco_json import CocoJson
from jobs.train.data_files import (
    DataFile,
    fetch_data_file,
    find_categories,
    make_data_file,
)
from jobs.train.run_record import RunRecord, read_record, spec_hash, write_record
from jobs.train.training_set import build
from schemas.errors import UsageError
from schemas.spec_loader import parse_spec
from schemas.specs import SourceSpec, StorageSpec
from schemas.train_spec import DataSpec, TrainModelSpec, TrainSpec, split_version
from tests.lake.faulty_s3 import serve_s3
from tests.train.coco_files import CATEGORIES, annotation, image, picture, write_files, write_json
from tests.train.conftest import MakeSpec

STORAGE = Storage(StorageSpec())


def coco(folder: Path, name: str, categories: dict[int, str]) -> DataSpec:
    named = [{"id": category_id, "name": category} for category_id, category in categories.items()]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": named}))
    return parse_spec(DataSpec, {"uri": f"coco:{path}", "images": str(folder)}, "spec")


def model(uri: str) -> TrainModelSpec:
    return parse_spec(TrainModelSpec, {"uri": uri}, "spec")


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("s3://bucket/lake@42", ("s3://bucket/lake", 42)),
        ("s3://bucket/lake", ("s3://bucket/lake", None)),
        ("s3://user@host/lake", ("s3://user@host/lake", None)),
        ("lake@v2", ("lake@v2", None)),
    ],
)
def test_a_version_is_a_number_behind_the_last_at(uri: str, wanted: tuple[str, int | None]) -> None:
    assert split_version(uri) == wanted


def test_categories_of_all_sets_together_are_the_models(tmp_path: Path) -> None:
    data = {"a": coco(tmp_path, "a", {3: "cat", 1: "dog"}), "b": coco(tmp_path, "b", {3: "cat", 9: "owl"})}
    assert find_categories(data, model("lite"), STORAGE) == ((1, "dog"), (3, "cat"), (9, "owl"))


def test_an_id_with_two_names_is_refused(tmp_path: Path) -> None:
    data = {"a": coco(tmp_path, "a", {3: "cat"}), "b": coco(tmp_path, "b", {3: "owl"})}
    with pytest.raises(UsageError, match=r"category 3 is 'cat' in data\.a and 'owl' in data\.b"):
        find_categories(data, model("lite"), STORAGE)


def test_labels_alone_keep_a_checkpoints_categories_and_a_preset_has_none() -> None:
    data = {"labels": parse_spec(DataSpec, {"uri": "lake:nowhere"}, "spec")}
    assert dict(find_categories(data, model("demo"), STORAGE))[1] == "ellipse"
    with pytest.raises(UsageError, match=r"model\.uri lite is a preset, and a label table does not say"):
        find_categories(data, model("lite"), STORAGE)


@pytest.fixture
def made(scenes: Path, tmp_path: Path) -> DataFile:
    spec = parse_spec(
        DataSpec, {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}, "spec"
    )
    categories = find_categories({"a": spec}, model("lite"), STORAGE)
    return make_data_file(
        "a", spec, categories, STORAGE, f"file://{tmp_path}/data/a.arrow", strict=True, note=print
    )


def test_a_set_is_fetched_as_it_was_made(made: DataFile, tmp_path: Path) -> None:
    assert (made.num_images, made.problems, made.uri) == (12, {}, f"file://{tmp_path}/data/a.arrow")
    found = fetch_data_file(made, tmp_path / "local", STORAGE)
    assert (len(found), found.fingerprint) == (12, made.fingerprint)
    (tmp_path / "data/a.arrow").unlink()
    assert len(fetch_data_file(made, tmp_path / "local", STORAGE)) == 12  # this machine has it


def test_images_without_annotations_are_background_or_left_out_by_wish(tmp_path: Path) -> None:
    write_files(tmp_path / "images", {f"{n}.png": picture(n) for n in range(3)})
    path = write_json(tmp_path, [image(n) for n in range(3)], [annotation(1)])
    for drop_empty, num_images in ((False, 3), (True, 1)):
        settings = {"uri": f"coco:{path}", "images": f"{tmp_path}/images", "drop_empty": drop_empty}
        spec = parse_spec(DataSpec, settings, "spec")
        uri = f"file://{tmp_path}/a.arrow"
        made = make_data_file("a", spec, CATEGORIES, STORAGE, uri, strict=True, note=print)
        assert made.num_images == num_images


def test_a_set_that_was_replaced_or_damaged_is_refused(made: DataFile, tmp_path: Path) -> None:
    path = tmp_path / "data/a.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is another file than this run was started with, or damaged"):
        fetch_data_file(made, tmp_path / "local", STORAGE)
    assert list((tmp_path / "local").iterdir()) == []


_PUT_AND_FETCH = """
import shutil, sys
from pathlib import Path
from jobs.lake import s3_store
from jobs.lake.storage import Storage
from jobs.train import data_files
from jobs.train.training_set import TrainingSet
from schemas.spec_loader import parse_spec
from schemas.specs import SourceSpec, StorageSpec
from schemas.train_spec import DataSpec
from tests.train.coco_files import CATEGORIES

built, endpoint, uri, folder = sys.argv[1:]
s3_store.PART_BYTES = 8 << 20
data_files.build = lambda path, *_, **__: shutil.copy(built, path) and TrainingSet(path)
data_files.check_images = lambda *_, **__: None
storage = Storage(StorageSpec(endpoint_url=endpoint))
spec = parse_spec(DataSpec, {"uri": "coco:a.json", "images": "a"}, "spec")
made = data_files.make_data_file("a", spec, CATEGORIES, storage, uri, strict=False, note=lambda _: None)
fetched = data_files.fetch_data_file(made, Path(folder), storage)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(fetched.path.stat().st_size, peak.split()[1])
"""


@pytest.mark.slow
def test_a_set_is_put_and_fetched_in_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    """Two sizes, each over the wire in a process of its own; what a build takes is not counted, nor are there
    images."""
    checkered = np.asfortranarray((np.indices((1000, 1000)).sum(0) % 2).astype(np.uint8))
    noisy: Any = coco_mask.encode(checkered)  # a megabyte
    noisy["counts"] = noisy["counts"].decode()
    sizes, peaks = [], []
    with serve_s3() as (server, storage):
        for num_images in (8, 108):
            names = [f"{n:03d}.png" for n in range(num_images)]
            write_files(tmp_path / "images", dict.fromkeys(names, b""))
            images = [image(n, name, height=1000, width=1000) for n, name in enumerate(names)]
            annotations = [annotation(n, id=n, segmentation=noisy) for n in range(num_images)]
            records = CocoJson(
                str(write_json(tmp_path, images, annotations)), SourceSpec(uri=f"{tmp_path}/images"), STORAGE
            )
            built = build(tmp_path / "built.arrow", records, CATEGORIES, STORAGE)
            uri = f"{server.new_bucket(storage)}/a.arrow"
            command = [sys.executable, "-c", _PUT_AND_FETCH, str(built.path), server.endpoint_url, uri]
            done = subprocess.run(
                [*command, str(tmp_path / str(num_images))], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            size, peak_kib = map(int, done.stdout.split())
            sizes.append(size)
            peaks.append(peak_kib << 10)
    assert sizes[1] - sizes[0] > 95e6
    assert peaks[1] - peaks[0] < 48e6


def test_sets_are_fetched_to_a_folder_of_the_users_own(
    made: DataFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = fetch_data_file(made, None, STORAGE).path.parent
    assert folder == tmp_path / f"masklake-training-sets-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.getuid", lambda: 4711)
    folder.rename(tmp_path / "masklake-training-sets-4711")
    with pytest.raises(UsageError, match="masklake-training-sets-4711 belongs to another user"):
        fetch_data_file(made, None, STORAGE)


def record(spec: Any, **changes: Any) -> RunRecord:
    file = DataFile("a", "file:///a.arrow", "ab" * 16, "cd" * 16, 12, 1.0, {"bad_rle": 2}, {"coco": "x"})
    whole = RunRecord("train-1", spec_hash(spec), "lite", {"preset": "lite"}, {}, (file,), None)
    return replace(whole, **changes)


def test_a_record_comes_back_as_it_was_written(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    out = f"file://{tmp_path}/run"
    assert read_record(out, spec, STORAGE) is None
    written = record(spec)
    write_record(out, written, STORAGE)
    assert read_record(out, spec, STORAGE) == written
    both = replace(written, evaluation=written.sets[0])
    write_record(out, both, STORAGE)
    assert read_record(out, spec, STORAGE) == both


def test_workers_and_checkpoints_may_change_and_what_is_learnt_may_not(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    out = f"file://{tmp_path}/run"
    write_record(out, record(make_spec()), STORAGE)
    assert read_record(out, make_spec(scaling={"num_workers": 2}, checkpoint={"keep": 5}), STORAGE)
    with pytest.raises(UsageError, match="holds run train-1 of another spec; choose another --out"):
        read_record(out, make_spec(recipe={"learning_rate": 0.5}), STORAGE)


def test_another_spelling_of_a_place_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_of(here: str, version: str = "@3") -> str:
        data = {
            "a": {"uri": f"coco:{here}a.json", "images": f"{here}images"},
            "b": {"uri": f"lake:{here}lake{version}"},
        }
        model = {"uri": f"{here}model.safetensors"}
        sections = {"data": data, "model": model, "out": {"uri": f"{here}run7/"}}
        return spec_hash(parse_spec(TrainSpec, sections, "spec"))

    monkeypatch.chdir(tmp_path)
    assert hash_of("") == hash_of("./") == hash_of(f"file://{tmp_path}/")
    assert hash_of("") != hash_of("x/")
    assert hash_of("") != hash_of("", version="@4")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "other"}'])
def test_what_is_no_record_is_said_so(content: bytes, make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_bytes(content)
    with pytest.raises(UsageError, match="is not a training run of this masklake"):
        read_record(f"file://{tmp_path}/run", make_spec(), STORAGE)
