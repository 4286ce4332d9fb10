"""The command line as a user meets it: one clear line for a mistake, the right status, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from jobs.demo.lake import write_scene_lake
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import lite
from maskrcnn_core.model import build_model
from schemas.specs import StorageSpec

if TYPE_CHECKING:
    from tests.integration.conftest import S3Bucket, S3Server


def masklake(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], capture_output=True, text=True, timeout=120, env=env
    )


def assert_one_line(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert result.returncode == status, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in lines[0]
    for word in words:
        assert word in lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"not read in these tests")
    return folder


def test_a_misspelt_key_is_refused_with_the_right_name(images: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(
        f"source: {{uri: {images}}}\nmodel: {{uri: demo}}\n"
        f"lake: {{uri: {tmp_path}/lake}}\npool: {{bach_size: 4}}\n"
    )
    assert_one_line(masklake("infer", str(spec)), 2, "pool.bach_size", "batch_size")
    assert not (tmp_path / "lake").exists()


def test_a_missing_setting_is_named(images: Path) -> None:
    assert_one_line(masklake("infer", "--source", str(images), "--model", "demo"), 2, "lake.uri")


def test_a_checkpoint_of_another_architecture_is_refused(images: Path, tmp_path: Path) -> None:
    config = lite(((1, "a"),))
    other = build_model(config.replace(box_head_channels=64), seed=0)
    other.config = config
    (tmp_path / "other.safetensors").write_bytes(dump_checkpoint(other, "other"))
    result = masklake(
        "infer",
        "--source",
        str(images),
        "--model",
        str(tmp_path / "other.safetensors"),
        "--lake",
        str(tmp_path / "lake"),
    )
    assert_one_line(result, 2, "box_head.fc6.weight", "wanted")
    assert not (tmp_path / "lake").exists()


def test_a_pickled_checkpoint_is_refused(images: Path, tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, tmp_path / "model.pth")
    result = masklake(
        "infer",
        "--source",
        str(images),
        "--model",
        str(tmp_path / "model.pth"),
        "--lake",
        str(tmp_path / "lake"),
    )
    assert_one_line(result, 2, "safetensors")


def test_a_missing_checkpoint_and_a_missing_source_are_refused(images: Path, tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    assert_one_line(
        masklake("infer", "--source", str(images), "--model", "nowhere.safetensors", "--lake", lake),
        2,
        "nowhere",
    )
    assert_one_line(
        masklake("infer", "--source", str(tmp_path / "no"), "--model", "demo", "--lake", lake),
        2,
        "does not exist",
    )
    assert not (tmp_path / "lake").exists()


def test_a_missing_bucket_is_refused(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    lake = f"{s3_bucket.uri}/lake"
    result = masklake("infer", "--source", "s3://no-such-bucket/images", "--model", "demo", "--lake", lake)
    assert_one_line(result, 2, "no-such-bucket", "create it")
    assert s3_bucket.list_keys() == []


def test_an_endpoint_that_does_not_answer_is_named(images: Path) -> None:
    endpoint = "storage.endpoint_url=http://127.0.0.1:9"
    result = masklake(
        "infer", "--source", str(images), "--model", "demo", "--lake", "s3://bucket/lake", "--set", endpoint
    )
    assert result.returncode in (1, 2)
    assert_one_line(result, result.returncode, "127.0.0.1:9")


@pytest.mark.s3
def test_wrong_credentials_are_refused(
    rgw_server: S3Server, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = rgw_server.client()
    client.create_bucket(Bucket="locked")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "somebody-elses")
    endpoint = f"storage.endpoint_url={rgw_server.endpoint_url}"
    result = masklake(
        "infer", "--source", str(images), "--model", "demo", "--lake", "s3://locked/lake", "--set", endpoint
    )
    assert_one_line(result, 2, "s3://locked/lake")
    assert "somebody-elses" not in result.stderr
    assert "Contents" not in client.list_objects_v2(Bucket="locked")
    client.delete_bucket(Bucket="locked")


@pytest.mark.slow
def test_a_terminated_job_commits_what_is_finished_and_the_next_one_goes_on(tmp_path: Path) -> None:
    write_scene_lake(tmp_path, range(48), num_shards=2)
    lake = tmp_path / "lake"
    arguments = ["infer", "--source", str(tmp_path / "images"), "--model", "demo", "--lake", str(lake)]
    quickly = ["--set", "commit.every_s=0.1", "--set", "unit.max_images=2"]
    command = [sys.executable, "-m", "jobs.cli", *arguments, *quickly]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 90
        while not (lake / "labels/_delta_log/00000000000000000001.json").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.terminate()
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1, errors
    assert "run the same command again to go on" in errors.splitlines()[-1]
    (record,) = (lake / "runs").glob("*/summary.json")
    first = json.loads(record.read_text())
    assert first["status"] == "interrupted"
    assert 0 < first["committed_images"] < 48
    second = json.loads(masklake(*arguments, "--json").stdout.splitlines()[-1])
    assert second["images"] == 48 - first["committed_images"]
    table = LabelsTable.open(str(lake), Storage(StorageSpec())).dataset().to_table()
    assert len(set(table["image_id"].to_pylist())) == len(table) == 48


def test_the_schema_is_json_that_names_every_section() -> None:
    result = masklake("schema", "infer")
    assert result.returncode == 0
    assert set(json.loads(result.stdout)["properties"]) >= {
        "source",
        "model",
        "lake",
        "unit",
        "pool",
        "commit",
        "storage",
    }
