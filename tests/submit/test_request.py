from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.submit.request import MAX_SPEC_BYTES, checked_spec, make_request, new_id, parse_variables
from schemas.errors import UsageError
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec
from schemas.specs import InferSpec

INFER: dict[str, Any] = {
    "source": {"uri": "s3://bucket/photos/"},
    "model": {"uri": "demo"},
    "lake": {"uri": "s3://bucket/lake"},
}
TRAIN: dict[str, Any] = {
    "data": {"a": {"uri": "coco:s3://bucket/a.json", "images": "s3://bucket/a/"}},
    "model": {"uri": "lite"},
    "out": {"uri": "s3://bucket/run"},
}


def spec_file(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_what_is_sent_loads_to_the_same_spec_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**INFER, "unit": {"max_bytes": "32MB"}, "source": {"uri": "s3://bücket/", "include": "*.jpg"}}
    file, overrides = spec_file(tmp_path, settings), ["failures.budget=2%", "commit.every_s=5"]
    request = make_request("infer", checked_spec("infer", file, overrides), {})
    assert request.entrypoint == "masklake infer env:MASKLAKE_SPEC --json"
    monkeypatch.setenv("MASKLAKE_SPEC", request.env_vars["MASKLAKE_SPEC"])
    assert load_spec(InferSpec, "env:MASKLAKE_SPEC") == load_spec(InferSpec, file, overrides)


def test_only_what_was_set_is_sent(tmp_path: Path) -> None:
    assert checked_spec("infer", spec_file(tmp_path, INFER), []) == INFER


def test_a_wrong_spec_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pool\.batchsize is not a known key"):
        checked_spec("infer", spec_file(tmp_path, INFER), ["pool.batchsize=1"])


@pytest.mark.parametrize("place", ["photos/", "/data/photos", "~/photos", "file://photos"])
def test_a_path_of_this_machine_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match=r"source\.uri .* no node of a cluster sees"):
        checked_spec("infer", spec_file(tmp_path, INFER), [f"source.uri={place}"])


@pytest.mark.parametrize("place", ["https://host/photos/", "memory://photos", "az://container/photos"])
def test_a_scheme_that_no_job_reads_is_refused_before_anything_is_sent(tmp_path: Path, place: str) -> None:
    with pytest.raises(
        UsageError, match=r"source\.uri: \w+:// is not read on a cluster, wanted object storage"
    ):
        checked_spec("infer", spec_file(tmp_path, INFER), [f"source.uri={place}"])


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("data.a.uri=coco:/data/a.json", r"data\.a\.uri"),
        ("data.a.images=/data/a", r"data\.a\.images"),
        ("model.uri=weights.safetensors", r"model\.uri"),
        ("model.backbone=resnet.pth", r"model\.backbone"),
        ("out.uri=run", r"out\.uri"),
        ("evaluate.data={uri: 'coco:b.json', images: 's3://b/'}", r"evaluate\.data\.uri"),
    ],
)
def test_every_place_of_a_training_is_looked_at(tmp_path: Path, override: str, where: str) -> None:
    with pytest.raises(UsageError, match=where):
        checked_spec("train", spec_file(tmp_path, TRAIN), [override])


@pytest.mark.parametrize(
    "model", ["demo", "alias:current", "registry:birds@3", "gs://bucket/model.safetensors"]
)
def test_a_model_may_be_a_name_or_in_object_storage(tmp_path: Path, model: str) -> None:
    assert checked_spec("infer", spec_file(tmp_path, INFER), [f"model.uri={model}"])["model"] == {
        "uri": model
    }


def test_a_disk_that_every_node_mounts_is_named_by_its_uri(tmp_path: Path) -> None:
    spec = checked_spec("infer", spec_file(tmp_path, INFER), ["source.uri=file:///mnt/photos"])
    assert spec["source"] == {"uri": "file:///mnt/photos"}


def test_a_spec_too_large_for_a_variable_is_refused_by_its_size_as_sent() -> None:
    """Ray carries it as JSON: here each of its characters is six there."""
    globs = ["ü" * 1000] * 21
    relabel = RelabelSpec.model_validate({**INFER, "order": {"first": globs}})
    spec = relabel.model_dump(mode="json", exclude_unset=True)
    with pytest.raises(UsageError, match=r"1[23]\d,\d\d\d bytes long .* 120,000"):
        make_request("relabel", spec, {})
    spec["order"]["first"] = globs[1:10]
    sent = make_request("relabel", spec, {}).env_vars["MASKLAKE_SPEC"]
    assert len(json.dumps(sent)) < MAX_SPEC_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "DB_PASSWORD",
        "WANDB_API_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "aws_secret_access_key",
        "AZURE_STORAGE_CONNECTION_STRING",
        "GITHUB_PAT",
        "SMTP_PASS",
        "GPG_PASSPHRASE",
        "SIGNING_KEY",
        "BASIC_AUTH",
    ],
)
def test_a_secret_is_refused_by_its_name_and_not_repeated(name: str) -> None:
    with pytest.raises(UsageError, match="give the nodes a role") as caught:
        parse_variables([f"{name}=hush"])
    assert "hush" not in str(caught.value)


def test_a_secret_inside_of_a_url_is_refused() -> None:
    with pytest.raises(UsageError, match="looks like a secret"):
        parse_variables(["HTTPS_PROXY=http://me:hush@proxy:3128"])


@pytest.mark.parametrize(
    "name",
    ["MASKLAKE_ALLOWED_URIS", "MASKLAKE_SPEC", "RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"],
)
def test_what_is_for_whoever_runs_the_cluster_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="whoever runs the cluster"):
        parse_variables([f"{name}=x"])


@pytest.mark.parametrize("pair", ["AWS_REGION", "=x", "A B=x", "1A=x", ""])
def test_what_is_no_variable_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_variables([pair])


def test_other_variables_travel_whatever_their_values_hold() -> None:
    pairs = ["AWS_REGION=eu-central-1", "A=b=c", "EMPTY=", "TOKENIZERS_PARALLELISM=false", "PASSES=2"]
    variables = {"AWS_REGION": "eu-central-1", "A": "b=c", "EMPTY": "", "TOKENIZERS_PARALLELISM": "false"}
    variables["PASSES"] = "2"
    assert parse_variables(pairs) == variables


def test_ids_are_nobody_elses() -> None:
    assert len({new_id("infer") for _ in range(100)}) == 100


def test_an_id_of_ones_own_must_be_one() -> None:
    assert make_request("infer", INFER, {}, "nightly-7").submission_id == "nightly-7"
    with pytest.raises(UsageError, match="is no submission id"):
        make_request("infer", INFER, {}, "../7")
