"""Every job with the privileges of cluster/iam/aws.py and no others, on Ceph RGW, which enforces them.

The policy is made as cluster/manifests/iam/aws/job-policy.json is, for this test's prefixes. On AWS it hangs
on a role. RGW's hang on a bucket: each bucket gets the statements about it, with the user as principal.
Actions, resources and the condition on s3:prefix are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from cluster.iam.aws import Policy, job_policy
from cluster.iam.prefixes import JobPrefixes
from jobs.demo.lake import write_scene_lake
from tests.integration.conftest import RGW_JOB_KEYS, S3Bucket, S3Server, fresh_bucket

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Site:
    """Two buckets of somebody else's, and who works on them.

    Attributes:
        photos: images/ and annotations.json are read; private/ is not to be.
        lake: lake/ and training/ are written; notes/ is not to be touched.
        job: a client with the job's keys.
    """

    photos: S3Bucket
    lake: S3Bucket
    job: S3Client

    def masklake(self, *words: str) -> dict[str, Any]:
        """A command with the job's keys; it has to end well."""
        env = {**os.environ, **RGW_JOB_KEYS, "AWS_ENDPOINT_URL": self.photos.endpoint_url}
        command = [sys.executable, "-m", "jobs.cli", *words, "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return summary


def policy_of_bucket(policy: Policy, bucket: str) -> str:
    """The statements of a role's policy that speak of one bucket, as the policy of that bucket."""
    arn = f"arn:aws:s3:::{bucket}"
    statements = []
    for statement in policy["Statement"]:
        resources = (
            [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        )
        mine = [resource for resource in resources if resource == arn or resource.startswith(f"{arn}/")]
        if mine:
            user = {"AWS": ["arn:aws:iam:::user/job"]}
            statements.append({**statement, "Resource": mine, "Principal": user})
    return json.dumps({**policy, "Statement": statements})


@pytest.fixture(scope="module")
def site(rgw_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    scenes = tmp_path_factory.mktemp("scenes")
    write_scene_lake(scenes, range(10_000_000, 10_000_008), 2)
    access_key, secret_key = RGW_JOB_KEYS.values()
    job = boto3.client(
        "s3",
        endpoint_url=rgw_server.endpoint_url,
        config=rgw_server.client().meta.config,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )
    with fresh_bucket(rgw_server) as photos, fresh_bucket(rgw_server) as lake:
        photos.upload(scenes)
        photos.put("private/letter.txt", b"not for the job")
        lake.put("notes/plan.txt", b"not for the job")
        policy = job_policy(
            JobPrefixes.parse(
                [f"{photos.uri}/images", f"{photos.uri}/annotations.json"],
                [f"{lake.uri}/lake", f"{lake.uri}/training"],
                "s3",
            )
        )
        for bucket in (photos, lake):
            bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=policy_of_bucket(policy, bucket.name))
        yield Site(photos, lake, job)


def test_every_job_runs_with_just_the_stated_privileges(site: Site, tmp_path: Path) -> None:
    lake = f"{site.lake.uri}/lake"
    settings = [f"source.uri={site.photos.uri}/images", "model.uri=demo", f"lake.uri={lake}"]
    settings += ["unit.max_images=2", "commit.compact=false"]  # that is done below
    label = [word for setting in settings for word in ("--set", setting)]
    assert site.masklake("infer", *label)["ok"] == 8

    later, *_ = site.photos.list_keys("images/")
    site.photos.client.delete_object(Bucket=site.photos.name, Key=later)
    relabelled = site.masklake("relabel", *label)
    assert relabelled["status"] in ("up_to_date", "promoted")

    data = {"uri": f"coco:{site.photos.uri}/annotations.json", "images": f"{site.photos.uri}/images"}
    recipe = {"name": "scenes", "steps": 2, "total_batch": 1, "shorter_sides": [64], "calibration_batches": 0}
    spec = {
        "data": {"scenes": data},
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": f"{site.lake.uri}/training/run"},
        "recipe": recipe,
        "register_as": {"name": "scenes", "lake": lake},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(spec))
    assert site.masklake("train", str(tmp_path / "train.yaml"))["registered"] == "scenes@1"

    compacted = site.masklake("lake", "compact", "--lake", lake)
    assert compacted["num_new_files"] < compacted["num_old_files"]
    vacuumed = site.masklake("lake", "vacuum", "--lake", lake, "--grace", "1s", "--force-grace")
    assert len(vacuumed["deleted"]) > 0


def test_what_is_not_stated_is_refused(site: Site) -> None:
    def refusal(call: str, bucket: S3Bucket, **arguments: object) -> str:
        with pytest.raises(ClientError) as caught:
            getattr(site.job, call)(Bucket=bucket.name, **arguments)
        return str(caught.value.response["Error"]["Code"])

    photo, *_ = site.photos.list_keys("images/")
    assert site.job.get_object(Bucket=site.photos.name, Key=photo)["ContentLength"] > 0
    assert [
        refusal("put_object", site.photos, Key="images/new.jpg", Body=b""),
        refusal("delete_object", site.photos, Key=photo),
        refusal("get_object", site.photos, Key="private/letter.txt"),
        refusal("list_objects_v2", site.photos, Prefix="private/"),
        refusal("get_object", site.lake, Key="notes/plan.txt"),
        refusal("put_object", site.lake, Key="notes/plan.txt", Body=b""),
        refusal("delete_object", site.lake, Key="notes/plan.txt"),
        refusal("delete_bucket", site.lake),
        refusal("put_bucket_policy", site.lake, Policy="{}"),
    ] == ["AccessDenied"] * 9
    assert site.photos.list_keys("private/") == ["private/letter.txt"]
