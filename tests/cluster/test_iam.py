"""Least privileges, cluster/iam/."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path
from typing import Any

import pytest

import jobs.lake.gcs_store
import jobs.lake.s3_store
from cluster.iam import aws, gcp
from cluster.iam.prefixes import JobPrefixes, Prefix
from schemas.errors import UsageError

PREFIXES = JobPrefixes.parse(["s3://photos/in", "s3://both/truth.json"], ["s3://both/lake/"], "s3")
POLICY = aws.job_policy(PREFIXES)
# Of each call that jobs/lake/s3_store.py makes, the action that AWS wants for it. A HEAD is a read.
ACTIONS = {
    "delete_object": "s3:DeleteObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
}


def is_allowed(policy: aws.Policy, action: str, resource: str, prefix: str | None = None) -> bool:
    """What IAM would say of statements that allow: all conditions here are on s3:prefix."""
    for statement in policy["Statement"]:
        actions, resources = (
            [found] if isinstance(found, str) else found
            for found in (statement["Action"], statement["Resource"])
        )
        patterns = statement.get("Condition", {}).get("StringLikeIfExists", {}).get("s3:prefix")
        fits = patterns is None or prefix is None or any(fnmatch.fnmatchcase(prefix, one) for one in patterns)
        if action in actions and any(fnmatch.fnmatchcase(resource, one) for one in resources) and fits:
            return True
    return False


def s3_calls() -> set[str]:
    """Names of the methods of botocore that S3Store calls."""
    tree = ast.parse(Path(jobs.lake.s3_store.__file__).read_text())
    constants = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    return {name for name in constants if name.rpartition("_object")[1]}


def test_every_call_of_the_store_has_an_action_and_every_action_is_in_the_policy() -> None:
    assert s3_calls() == {*ACTIONS}
    granted = {
        action
        for statement in POLICY["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    # The Delta library's multipart uploads are the one thing beside.
    assert granted == {*ACTIONS.values(), "s3:AbortMultipartUpload"}


@pytest.mark.parametrize(
    ("action", "key", "is_granted"),
    [
        ("s3:GetObject", "photos/in/a.jpg", True),
        ("s3:PutObject", "photos/in/a.jpg", False),
        ("s3:DeleteObject", "photos/in/a.jpg", False),
        ("s3:GetObject", "photos/in-other/a.jpg", False),
        ("s3:GetObject", "photos/other/a.jpg", False),
        ("s3:GetObject", "both/truth.json", True),
        ("s3:PutObject", "both/truth.json", False),
        ("s3:GetObject", "both/lake/labels/_delta_log/0.json", True),
        ("s3:PutObject", "both/lake/labels/_delta_log/0.json", True),
        ("s3:DeleteObject", "both/lake/labels/a.parquet", True),
        ("s3:PutObject", "both/lake-other/a.parquet", False),
        ("s3:GetObject", "elsewhere/lake/a", False),
        ("s3:GetObjectAcl", "photos/in/a.jpg", False),
        ("s3:PutBucketPolicy", "both/lake/a", False),
    ],
)
def test_a_job_reads_its_source_and_writes_its_lake_and_nothing_else(
    action: str, key: str, is_granted: bool
) -> None:
    assert is_allowed(POLICY, action, f"arn:aws:s3:::{key}") == is_granted


@pytest.mark.parametrize(
    ("bucket", "prefix", "is_granted"),
    [
        ("photos", "in/", True),
        ("photos", "in", True),  # Storage.check_reachable asks without a slash
        ("photos", "in/2026/", True),
        ("photos", "other/", False),
        ("photos", "in-other/", False),
        ("photos", "", False),
        ("both", "lake/labels/", True),
        ("both", "lak", False),
        ("elsewhere", "in/", False),
        ("photos", None, True),  # a HEAD names none: without this S3 would answer 403 for a missing key
    ],
)
def test_only_its_prefixes_are_listed(bucket: str, prefix: str | None, is_granted: bool) -> None:
    assert is_allowed(POLICY, "s3:ListBucket", f"arn:aws:s3:::{bucket}", prefix) == is_granted


def test_a_whole_bucket_has_no_condition() -> None:
    policy = aws.job_policy(JobPrefixes.parse([], ["s3://lake"], "s3"))
    assert is_allowed(policy, "s3:ListBucket", "arn:aws:s3:::lake", "anything")
    assert is_allowed(policy, "s3:PutObject", "arn:aws:s3:::lake/anything")
    assert "Condition" not in str(policy)


@pytest.mark.parametrize(
    "uri", ["gs://a/b", "s3://", "s3://a/*", "s3://a/${aws:username}", "s3://a/b?c", "a/b"]
)
def test_what_would_mean_something_else_in_a_policy_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="is no prefix for a policy"):
        Prefix.parse(uri, "s3")


def test_a_job_that_writes_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match="has to write somewhere"):
        JobPrefixes.parse(["s3://photos"], [], "s3")


def test_the_role_is_for_pods_of_one_service_account() -> None:
    (statement,) = aws.service_account_trust("111122223333", "oidc.example/id/1", "vision", "masklake")[
        "Statement"
    ]
    assert statement["Condition"]["StringEquals"] == {
        "oidc.example/id/1:aud": "sts.amazonaws.com",
        "oidc.example/id/1:sub": "system:serviceaccount:vision:masklake",
    }


def test_a_head_starts_and_ends_instances_of_its_own_cluster_alone() -> None:
    policy = aws.ray_up_head_policy("111122223333", "us-east-1", "masklake-infer", "masklake-job")
    own: dict[str, Any] = {}
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        if "ec2:TerminateInstances" in actions or statement["Sid"] == "StartWorkers":
            own |= statement["Condition"]["StringEquals"]
        assert not any(action.endswith("*") for action in actions)
        if statement["Resource"] == "*":  # these know no resources
            assert all(action.startswith(("ec2:Describe", "ssm:", "ssmmessages:")) for action in actions)
    assert own == {
        "aws:RequestTag/ray-cluster-name": "masklake-infer",
        "aws:ResourceTag/ray-cluster-name": "masklake-infer",
    }


def test_on_google_cloud_each_prefix_is_a_folder_with_a_policy() -> None:
    prefixes = JobPrefixes.parse(["gs://photos/in"], ["gs://lake"], "gs")
    policies = gcp.folder_policies("p", "job@p.iam.gserviceaccount.com", prefixes)
    assert {folder: policy["bindings"][0]["role"] for folder, policy in policies.items()} == {
        "gs://photos/in/": "projects/p/roles/masklakeReader",
        "gs://lake/": "projects/p/roles/masklakeWriter",
    }
    roles = gcp.custom_roles()
    assert roles["masklakeReader"]["includedPermissions"] == ["storage.objects.get", "storage.objects.list"]
    added = {*roles["masklakeWriter"]["includedPermissions"]} - {*gcp.READ_PERMISSIONS}
    assert {permission.rpartition(".")[2] for permission in added} == {"abort", "create", "delete"}


def test_the_calls_to_google_cloud_are_on_objects_alone() -> None:
    source = Path(jobs.lake.gcs_store.__file__).read_text()
    paths = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("b/{}")
    }
    assert paths == {"b/{}/o", "b/{}/o/{}"}
