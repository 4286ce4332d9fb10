"""Policies of AWS for a job, and for the head of `ray up`.

Enters: prefixes and names. Leaves: policy documents as dicts, and annotations for a Kubernetes
ServiceAccount.

Listing is bound to the prefixes by a condition that lets a request pass which names no prefix: S3 answers
404 for a missing key only to those who may list, and 403 otherwise, and a HEAD or GET names no prefix.
Leases, aliases and the Delta log stand on that 404. It follows that names (not contents) of other keys in
the bucket can be listed: a lake whose neighbours' names are secret wants a bucket of its own.

Which calls are made: jobs/lake/s3_store.py and, in the lake, the Delta library's. The table is in
docs/cluster.md.
"""

from collections.abc import Sequence
from typing import Any

from cluster.iam.prefixes import JobPrefixes, Prefix

Policy = dict[str, Any]
_VERSION = "2012-10-17"
READ_ACTIONS = ("s3:GetObject",)
# Abort: the Delta library writes a large checkpoint of its log in parts, and takes them back if it fails.
WRITE_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


def job_policy(prefixes: JobPrefixes) -> Policy:
    """For driver and workers: list and read all prefixes, write and delete under those that are written."""
    statements = [
        _list(f"ListBucket{number}", bucket, found)
        for number, (bucket, found) in enumerate(_by_bucket([*prefixes.read, *prefixes.write]).items())
    ]
    if prefixes.read:
        statements.append(_objects("Read", READ_ACTIONS, prefixes.read))
    statements.append(_objects("Write", WRITE_ACTIONS, prefixes.write))
    return {"Version": _VERSION, "Statement": statements}


def service_account_trust(account: str, oidc_provider: str, namespace: str, service_account: str) -> Policy:
    """Trust policy of a role that pods of one ServiceAccount of an EKS cluster may take (IRSA).

    Args:
        oidc_provider: the cluster's issuer, without https://.
    """
    return {
        "Version": _VERSION,
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Federated": f"arn:aws:iam::{account}:oidc-provider/{oidc_provider}"},
                "Action": "sts:AssumeRoleWithWebIdentity",
                "Condition": {
                    "StringEquals": {
                        f"{oidc_provider}:aud": "sts.amazonaws.com",
                        f"{oidc_provider}:sub": f"system:serviceaccount:{namespace}:{service_account}",
                    }
                },
            }
        ],
    }


def service_account_annotations(account: str, role: str) -> dict[str, str]:
    """What tells EKS which role the pods of a ServiceAccount take."""
    return {"eks.amazonaws.com/role-arn": f"arn:aws:iam::{account}:role/{role}"}


def ray_up_head_policy(account: str, region: str, cluster_name: str, worker_role: str) -> Policy:
    """For the head of `ray up`, beside the job's own: start and end its own workers, and be reached.

    The calls are those of ray/autoscaler/_private/aws/node_provider.py; instances of a cluster have its
    name as a tag.
    """
    ec2 = f"arn:aws:ec2:{region}:{account}"
    instances = f"{ec2}:instance/*"
    return {
        "Version": _VERSION,
        "Statement": [
            {
                "Sid": "See",
                "Effect": "Allow",
                "Action": ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes"],
                "Resource": "*",
            },
            {
                "Sid": "StartWorkers",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": instances,
                "Condition": {"StringEquals": {"aws:RequestTag/ray-cluster-name": cluster_name}},
            },
            {
                "Sid": "StartWorkersWith",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": [
                    f"arn:aws:ec2:{region}::image/*",
                    *(
                        f"{ec2}:{kind}/*"
                        for kind in ("key-pair", "network-interface", "security-group", "subnet", "volume")
                    ),
                    f"{ec2}:spot-instances-request/*",
                ],
            },
            {
                "Sid": "TagWhatIsStarted",
                "Effect": "Allow",
                "Action": "ec2:CreateTags",
                "Resource": instances,
                "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            },
            {
                "Sid": "TagAndEndOwnWorkers",
                "Effect": "Allow",
                "Action": ["ec2:CreateTags", "ec2:TerminateInstances"],
                "Resource": instances,
                "Condition": {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster_name}},
            },
            {
                "Sid": "GiveWorkersTheirRole",
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": f"arn:aws:iam::{account}:role/{worker_role}",
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            },
            {
                "Sid": "SessionManager",
                "Effect": "Allow",
                "Action": [
                    "ssm:UpdateInstanceInformation",
                    "ssmmessages:CreateControlChannel",
                    "ssmmessages:CreateDataChannel",
                    "ssmmessages:OpenControlChannel",
                    "ssmmessages:OpenDataChannel",
                ],
                "Resource": "*",
            },
        ],
    }


def _list(sid: str, bucket: str, prefixes: Sequence[Prefix]) -> Policy:
    statement: Policy = {
        "Sid": sid,
        "Effect": "Allow",
        "Action": "s3:ListBucket",
        "Resource": f"arn:aws:s3:::{bucket}",
    }
    if all(prefix.key for prefix in prefixes):
        patterns = [pattern for prefix in prefixes for pattern in (prefix.key, f"{prefix.key}/*")]
        statement["Condition"] = {"StringLikeIfExists": {"s3:prefix": patterns}}
    return statement


def _objects(sid: str, actions: Sequence[str], prefixes: Sequence[Prefix]) -> Policy:
    resources = []
    for prefix in prefixes:
        whole = f"arn:aws:s3:::{prefix.bucket}/{prefix.key}"
        # A source may be one object: a list, a Parquet file, a tar.
        resources += [f"{whole}*"] if not prefix.key else [whole, f"{whole}/*"]
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resources}


def _by_bucket(prefixes: Sequence[Prefix]) -> dict[str, list[Prefix]]:
    found: dict[str, list[Prefix]] = {}
    for prefix in prefixes:
        found.setdefault(prefix.bucket, []).append(prefix)
    return found
