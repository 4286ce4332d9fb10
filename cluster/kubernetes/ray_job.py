"""A RayJob of KubeRay that runs one masklake job on a cluster of its own.

Enters: a job's name, a RayCluster, the spec's content. Leaves: a ConfigMap with the spec and the RayJob.

K8sJobMode, KubeRay's default: a Job of Kubernetes submits, so that `kubectl logs job/NAME` is the run's log
and a submitter that is evicted is replaced and finds its job by the submission's id. HTTPMode would need a
way from the operator's namespace to each dashboard; in SidecarMode the submitter would go with the head.

A retry is a new cluster and the same command. It is safe because of the commit protocol (docs/guarantees.md):
what is left to do is the source minus the table, so a retry goes on from the last commit, and a driver that
was believed dead cannot commit beside the new one. KubeRay does not tell exit statuses apart, so a refused
gate is tried again too; a run that passed its deadline is not.

Source of the fields: ray.io/v1 of KubeRay 1.6; tests/cluster/data says which files.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from cluster.kubernetes.pods import (
    API_TOKEN_MOUNT,
    CONTAINER_SECURITY,
    head_pod,
    manifest,
    resources,
    submitter_pod,
    worker_pod,
)
from cluster.kubernetes.pools import Pool, RayCluster
from cluster.kubernetes.spec_map import entrypoint, spec_data
from cluster.kubernetes.yaml_text import Manifest
from schemas.errors import UsageError
from schemas.spec_problems import nearest, show

JOBS = ("infer", "relabel", "train")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# A GPU node that takes minutes to come is kept for a pause between two stages, not for long after the tail.
_IDLE_S = 120


def ray_job_manifests(job: str, cluster: RayCluster, spec: Mapping[str, Any]) -> list[Manifest]:
    """ConfigMap and RayJob.

    Args:
        job: infer, relabel or train.
        spec: the content of a spec file that the job's model took.

    Raises:
        UsageError: no such job, or the spec names a path of this machine, which no pod sees.
    """
    if job not in JOBS:
        raise UsageError(f"there is no job {show(job)} for a cluster{nearest(job, JOBS)}: {', '.join(JOBS)}")
    config = manifest("v1", "ConfigMap", cluster.name, cluster) | {"data": spec_data(job, spec)}
    return [config, ray_job(job, cluster)]


def ray_job(job: str, cluster: RayCluster) -> Manifest:
    """The RayJob alone; a ConfigMap of the cluster's name has its spec."""
    made = manifest("ray.io/v1", "RayJob", cluster.name, cluster)
    if cluster.queue is not None:
        made["metadata"]["labels"][QUEUE_LABEL] = cluster.queue
    return made | {"spec": ray_job_spec(job, cluster)}


def ray_job_spec(job: str, cluster: RayCluster) -> Manifest:
    """What RayJob and RayCronJob have in common."""
    spec: Manifest = {
        "entrypoint": entrypoint(job),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_pod(cluster),
        "backoffLimit": cluster.retries,
        "activeDeadlineSeconds": cluster.deadline_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.keep_s,
        "rayClusterSpec": _cluster_spec(job, cluster),
    }
    # Kueue starts it once there is room.
    return spec if cluster.queue is None else {"suspend": True, **spec}


def _cluster_spec(job: str, cluster: RayCluster) -> Manifest:
    spec: Manifest = {
        "rayVersion": version("ray"),
        # KubeRay makes the token, a Secret of the cluster, and gives it to head, workers and submitter.
        "authOptions": {"mode": "token"},
    }
    if not cluster.is_fixed:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_S,
            "resources": resources("500m", "1Gi"),
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": [API_TOKEN_MOUNT],
        }
    return spec | {
        "headGroupSpec": {
            # No task runs on the head: the driver alone does. Within the cluster the dashboard wants the
            # token.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": head_pod(job, cluster),
        },
        "workerGroupSpecs": [_worker_group(pool, cluster) for pool in cluster.pools],
    }


def _worker_group(pool: Pool, cluster: RayCluster) -> Manifest:
    # Kueue admits a known size.
    low = pool.max_nodes if cluster.queue is not None else pool.min_nodes
    return {
        "groupName": pool.name,
        "replicas": low,
        "minReplicas": low,
        "maxReplicas": pool.max_nodes,
        "rayStartParams": {},
        "template": worker_pod(pool, cluster),
    }
