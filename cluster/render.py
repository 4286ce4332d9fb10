"""Writes cluster/manifests/: `python -m cluster.render`.

Enters: cluster/examples.py. Leaves: the files, by their paths below the folder; those that are rendered no
more are removed. Nothing below the folder is written by hand.
"""

import json
from pathlib import Path
from typing import Any

from cluster import examples
from cluster.cloud.aws import aws_config
from cluster.cloud.gcp import gcp_config
from cluster.examples import AWS, CLOUDS, GCP
from cluster.iam import aws, gcp
from cluster.iam.prefixes import JobPrefixes
from cluster.kubernetes.cron_job import cron_job_manifests, ray_cron_job_manifests
from cluster.kubernetes.kueue import queue_manifests
from cluster.kubernetes.ray_job import JOBS, ray_job_manifests
from cluster.kubernetes.yaml_text import Manifest, to_yaml
from cluster.monitoring.files import monitoring_files
from cluster.schedule.cron import CronSchedule

FOLDER = Path(__file__).parent / "manifests"
_HEADER = "# Rendered by `python -m cluster.render` from cluster/examples.py; to use it: docs/cluster.md\n"
_NIGHTLY = CronSchedule("0 2 * * *", "Europe/Berlin")


def rendered() -> dict[str, str]:
    """Every file's content, by its path below FOLDER."""
    monitoring = monitoring_files(examples.NAMESPACE, {"release": "prometheus"}, _HEADER)
    return {**_kubernetes(), **_queue(), **_ray_up(), **_aws_iam(), **_gcp_iam(), **monitoring}


def main(folder: Path = FOLDER) -> None:
    """Write them, and remove what is no longer rendered."""
    files = rendered()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    print(f"{len(files)} files in {folder}")


def _kubernetes() -> dict[str, str]:
    files = {
        f"kuberay/{cloud.name}/{job}.yaml": _yaml(
            ray_job_manifests(job, examples.cluster(job, cloud), examples.spec(job, cloud))
        )
        for cloud in CLOUDS
        for job in JOBS
    }
    nightly, spec = examples.cluster("relabel", AWS), examples.spec("relabel", AWS)
    return files | {
        "kuberay/aws/service-account.yaml": _yaml(
            [_service_account(aws.service_account_annotations(examples.AWS_ACCOUNT, examples.AWS_ROLE))]
        ),
        "kuberay/gcp/service-account.yaml": _yaml(
            [_service_account(gcp.service_account_annotations(examples.GCP_SERVICE_ACCOUNT))]
        ),
        "schedule/cron-job.yaml": _yaml(cron_job_manifests(_NIGHTLY, nightly, spec)),
        "schedule/ray-cron-job.yaml": _yaml(ray_cron_job_manifests(_NIGHTLY, nightly, spec)),
    }


def _queue() -> dict[str, str]:
    queued = examples.cluster("infer", AWS, queue=examples.QUEUE)
    return {
        "kueue/queue.yaml": _yaml(queue_manifests(queued)),
        "kueue/infer.yaml": _yaml(ray_job_manifests("infer", queued, examples.spec("infer", AWS))),
    }


def _ray_up() -> dict[str, str]:
    return {
        "ray-up/aws.yaml": _yaml([aws_config(examples.cluster("infer", AWS), examples.AWS_SITE)]),
        "ray-up/gcp.yaml": _yaml([gcp_config(examples.cluster("infer", GCP), examples.GCP_SITE)]),
    }


def _aws_iam() -> dict[str, str]:
    prefixes = JobPrefixes.parse(examples.read_uris(AWS), examples.write_uris(AWS), AWS.scheme)
    return {
        "iam/aws/job-policy.json": _json(aws.job_policy(prefixes)),
        "iam/aws/job-trust.json": _json(
            aws.service_account_trust(
                examples.AWS_ACCOUNT, examples.OIDC_PROVIDER, examples.NAMESPACE, examples.SERVICE_ACCOUNT
            )
        ),
        "iam/aws/ray-up-head-policy.json": _json(
            aws.ray_up_head_policy(
                examples.AWS_ACCOUNT,
                examples.AWS_SITE.region,
                examples.cluster("infer", AWS).name,
                examples.AWS_SITE.worker_profile,
            )
        ),
    }


def _gcp_iam() -> dict[str, str]:
    prefixes = JobPrefixes.parse(examples.read_uris(GCP), examples.write_uris(GCP), GCP.scheme)
    policies = gcp.folder_policies(examples.GCP_PROJECT, examples.GCP_SERVICE_ACCOUNT, prefixes)
    files = {f"iam/gcp/{name}.json": _json(role) for name, role in gcp.custom_roles().items()}
    for folder, policy in policies.items():
        name = folder.removeprefix("gs://").strip("/").replace("/", ".")
        files[f"iam/gcp/folders/{name}.json"] = _json(policy)
    files["iam/gcp/workload-identity.json"] = _json(
        gcp.workload_identity_policy(examples.GCP_PROJECT, examples.NAMESPACE, examples.SERVICE_ACCOUNT)
    )
    return files


def _service_account(annotations: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {
            "name": examples.SERVICE_ACCOUNT,
            "namespace": examples.NAMESPACE,
            "annotations": annotations,
        },
        # The autoscaler beside the head asks for a token; nothing else gets one.
        "automountServiceAccountToken": False,
    }


def _yaml(manifests: list[Manifest]) -> str:
    return _HEADER + to_yaml(manifests)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


if __name__ == "__main__":
    main()
