"""`masklake lake doctor | vacuum | compact | retire`, jobs/care/cli.py."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.lake.current import promote
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.shard_index import save_shard_index
from jobs.lake.sources import list_shards
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec

MakeRows = Callable[..., pa.Table]
AddRows = Callable[..., list[Fragment]]
MODEL = "lite-0123456789ab"


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["lake", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout


def run_json(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(*arguments, "--json", exit_code=exit_code).splitlines()[-1])
    return answer


def test_the_three_commands_on_one_lake(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows
) -> None:
    add_rows(make_rows(["a"]), make_rows(["b"]), make_rows(["c"], failed={"c": "io"}))
    write_fragment(make_rows(["d"]), ["unit"], lake, MODEL, storage)
    text = run("doctor", "--lake", lake)
    assert "rows     3 of 3 images: 1 failed, 2 ok" in text
    assert "orphans  1 file (" in text
    assert text.endswith("sound\n")

    compacted = run_json("compact", "--lake", lake)
    assert (compacted["num_old_files"], compacted["num_new_files"], compacted["version"]) == (3, 1, 2)
    assert "0 files became 0" in run("compact", "--lake", lake)
    kept = run("vacuum", "--lake", lake, "--dry-run")
    assert "would delete  0 files\nkept     4 files" in kept
    assert len(run_json("vacuum", "--lake", lake, "--grace", "0s", "--force-grace")["deleted"]) == 4

    report = run_json("doctor", "--lake", lake, "--deep")
    assert (report["sound"], report["num_files"], report["num_rows"]) == (True, 1, 3)
    assert report["orphans"] == report["replaced"] == []


def test_the_doctor_fails_where_something_is_wrong(lake: str, make_rows: MakeRows, add_rows: AddRows) -> None:
    add_rows(make_rows(["a"], changes={"area": 1}))
    assert "WRONG    an area that is not its mask's: image 'a'" in run("doctor", "--lake", lake, exit_code=1)
    assert run_json("doctor", "--lake", lake, exit_code=1)["sound"] is False


def test_the_doctor_compares_rows_with_a_folder_of_images(
    lake: str, make_rows: MakeRows, add_rows: AddRows, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (photos / name).touch()
    add_rows(make_rows(["a.jpg", "b.jpg", "gone.jpg"], source=f"file://{photos}", shard="."))
    (check,) = run_json("doctor", "--lake", lake, "--source", str(photos))["sources"]
    assert (check["model_id"], check["listed"], check["missing"], check["extra"]) == (MODEL, 3, 1, 1)
    text = run("doctor", "--lake", lake, "--source", str(photos))
    assert f"3 images, 1 without a row of {MODEL}, 1 row without an image" in text


def test_the_doctor_compares_rows_with_tars_as_far_as_they_were_read(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows, tmp_path: Path
) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    for name in ("x.tar", "y.tar"):
        with tarfile.open(source / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    uri = f"file://{source}"
    add_rows(make_rows(["x.tar/a", "x.tar/b"], source=uri, shard="x.tar"))
    add_rows(make_rows(["z.tar/a"], source=uri, shard="z.tar"))
    shard = next(iter(list_shards(SourceSpec(uri=uri), storage)))
    assert shard.info is not None
    save_shard_index(storage, lake, uri, MODEL, "run-1", {("x.tar", shard.info.version): 3})
    (check,) = run_json("doctor", "--lake", lake, "--source", uri)["sources"]
    assert {name: check[name] for name in ("listed", "missing", "extra", "unknown_shards")} == {
        "listed": 3,
        "missing": 1,
        "extra": 1,
        "unknown_shards": 1,
    }


@pytest.mark.usefixtures("table")
def test_an_unknown_model_is_a_mistake(lake: str) -> None:
    result = CliRunner().invoke(app, ["lake", "compact", "--lake", lake, "--model-id", "nobody"])
    assert "nobody is not one of them" in str(result.exception)


def test_old_models_are_retired(
    table: LabelsTable, lake: str, make_rows: MakeRows, add_rows: AddRows
) -> None:
    add_rows(*(make_rows(["a"], model_id=f"{letter}-0123456789ab") for letter in "abcd"))
    promote(table, ["s3://photos/2026"], "d-0123456789ab", None, "ana", "")
    assert "kept     a-0123456789ab: its newest row is of" in run("retire", "--lake", lake)
    named = ("retire", "--lake", lake, "--older-than", "0s", "--model-id")
    assert run(*named, "a-0123456789ab", "--dry-run").startswith("would go a-0123456789ab: 1 row in 1 file, ")
    text = run(*named, "a-0123456789ab", "--model-id", "b-0123456789ab")
    assert "retired  b-0123456789ab: 1 row in 1 file, " in text
    assert "table    at version 3; earlier ones have these labels until `masklake lake vacuum`" in text

    answer = run_json("retire", "--lake", lake, "--older-than", "0s")
    assert [model["model_id"] for model in answer["retired"]] == ["c-0123456789ab"]
    assert answer["kept"] == {"d-0123456789ab": "its labels of s3://photos/2026 are current"}
    assert run("retire", "--lake", lake).endswith("nothing to retire\n")
    result = CliRunner().invoke(app, ["lake", *named, "d-0123456789ab"])
    assert "d-0123456789ab stays: its labels of s3://photos/2026 are current" in str(result.exception)
