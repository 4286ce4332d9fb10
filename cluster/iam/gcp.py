"""Roles and bindings of Google Cloud for a job.

Enters: prefixes and a service account. Leaves: custom roles and IAM policies as dicts, and annotations for a
Kubernetes ServiceAccount.

A prefix is a managed folder, which has a policy of its own, so that listing is bound to it as well; a whole
bucket is bound as such. Which calls are made: jobs/lake/gcs_store.py and, in the lake, the Delta library's.
"""

from typing import Any

from cluster.iam.prefixes import JobPrefixes, Prefix

READ_PERMISSIONS = ("storage.objects.get", "storage.objects.list")
# Overwriting wants delete. In parts: a large checkpoint of the Delta log.
WRITE_PERMISSIONS = (
    *READ_PERMISSIONS,
    "storage.objects.create",
    "storage.objects.delete",
    "storage.multipartUploads.create",
    "storage.multipartUploads.abort",
)
_READER, _WRITER = "masklakeReader", "masklakeWriter"


def custom_roles() -> dict[str, dict[str, Any]]:
    """By their ids: files for `gcloud iam roles create ID --project=PROJECT --file=FILE`."""
    return {
        _READER: _role("masklake: read", READ_PERMISSIONS),
        _WRITER: _role("masklake: read and write", WRITE_PERMISSIONS),
    }


def folder_policies(project: str, service_account: str, prefixes: JobPrefixes) -> dict[str, dict[str, Any]]:
    """By gs://bucket/folder/: policies for `gcloud storage managed-folders set-iam-policy`."""
    member = f"serviceAccount:{service_account}"
    roles = [(prefix, _READER) for prefix in prefixes.read] + [(prefix, _WRITER) for prefix in prefixes.write]
    return {
        _folder(prefix): {"bindings": [{"role": f"projects/{project}/roles/{role}", "members": [member]}]}
        for prefix, role in roles
    }


def workload_identity_policy(project: str, namespace: str, service_account: str) -> dict[str, Any]:
    """Who may act as the service account: pods of one ServiceAccount of the project's GKE clusters."""
    member = f"serviceAccount:{project}.svc.id.goog[{namespace}/{service_account}]"
    return {"bindings": [{"role": "roles/iam.workloadIdentityUser", "members": [member]}]}


def service_account_annotations(service_account: str) -> dict[str, str]:
    """What tells GKE as whom the pods of a ServiceAccount act."""
    return {"iam.gke.io/gcp-service-account": service_account}


def _role(title: str, permissions: tuple[str, ...]) -> dict[str, Any]:
    return {"title": title, "stage": "GA", "includedPermissions": list(permissions)}


def _folder(prefix: Prefix) -> str:
    return f"gs://{prefix.bucket}/{prefix.key}/" if prefix.key else f"gs://{prefix.bucket}/"
