"""Manifests that re-label on schedule: a CronJob around a RayJob, or KubeRay's RayCronJob.

Enters: a CronSchedule, the spec's content, a RayCluster. Leaves: manifests as dicts.

A CronJob's pod (cluster/schedule/start.py) makes a RayJob and waits for its end, so that `concurrencyPolicy:
Forbid` holds for the whole run. The RayJob belongs to the Job that made it and goes with it. Secrets are
named, never written.

Source of the fields: batch/v1 of Kubernetes 1.31 (podFailurePolicy) and later; ray.io/v1 of KubeRay 1.6.
"""

import json
from collections.abc import Mapping
from typing import Any

from cluster.kubernetes.pods import CONTAINER_SECURITY, POD_SECURITY, labels, manifest, resources
from cluster.kubernetes.pools import RayCluster
from cluster.kubernetes.ray_job import ray_job, ray_job_spec
from cluster.kubernetes.spec_map import FOLDER, MOUNT, spec_data, volume
from cluster.kubernetes.yaml_text import Manifest
from cluster.schedule.cron import CronSchedule
from schemas.errors import UsageError

_JOB = "relabel"
_RAY_JOB_FILE = "rayjob.json"
_START_LATE_S = 3600  # a night's run that could not start for an hour is left to the next night
_CLUSTER_START_S = 3600  # what a cluster may take to start, beyond the run itself


def cron_job_manifests(
    schedule: CronSchedule, cluster: RayCluster, spec: Mapping[str, Any]
) -> list[Manifest]:
    """ConfigMap, ServiceAccount, Role, RoleBinding and CronJob.

    Args:
        spec: the content of a spec file that RelabelSpec took.

    Raises:
        UsageError: the spec names a path of this machine, which no pod sees.
    """
    account = f"{cluster.name}-start"
    template = ray_job(_JOB, cluster)
    # start.py gives it the name and the namespace of its own Job.
    template["metadata"] = {"labels": template["metadata"]["labels"]}
    data = spec_data(_JOB, spec) | {_RAY_JOB_FILE: json.dumps(template, indent=1)}
    return [
        manifest("v1", "ConfigMap", cluster.name, cluster) | {"data": data},
        manifest("v1", "ServiceAccount", account, cluster),
        manifest("rbac.authorization.k8s.io/v1", "Role", account, cluster)
        | {"rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]},
        manifest("rbac.authorization.k8s.io/v1", "RoleBinding", account, cluster)
        | {
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": cluster.namespace}],
        },
        manifest("batch/v1", "CronJob", cluster.name, cluster)
        | {
            "spec": {
                "schedule": schedule.expression,
                "timeZone": schedule.timezone,
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": _START_LATE_S,
                "successfulJobsHistoryLimit": 3,
                "failedJobsHistoryLimit": 3,
                "jobTemplate": {
                    "metadata": {"labels": labels(cluster)},
                    "spec": _job_spec(cluster, account),
                },
            }
        },
    ]


def ray_cron_job_manifests(
    schedule: CronSchedule, cluster: RayCluster, spec: Mapping[str, Any]
) -> list[Manifest]:
    """ConfigMap and RayCronJob. It has no concurrency policy: the lease ends a run that overlaps another.

    Raises:
        UsageError: as cron_job_manifests; or the cluster has a queue, whose label a RayCronJob cannot give.
    """
    if cluster.queue is not None:
        raise UsageError(
            "a RayCronJob gives its RayJobs no labels, so no queue of Kueue: use the CronJob instead"
        )
    return [
        manifest("v1", "ConfigMap", cluster.name, cluster) | {"data": spec_data(_JOB, spec)},
        manifest("ray.io/v1", "RayCronJob", cluster.name, cluster)
        | {
            "spec": {
                "schedule": schedule.expression,
                "timeZone": schedule.timezone,
                "jobTemplate": ray_job_spec(_JOB, cluster),
            }
        },
    ]


def _job_spec(cluster: RayCluster, account: str) -> Manifest:
    """A Job whose pod is replaced where it was evicted or lost the API, but not where its run failed."""
    return {
        "backoffLimit": 3,
        "activeDeadlineSeconds": (1 + cluster.retries) * cluster.deadline_s + _CLUSTER_START_S,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}},
            ]
        },
        "template": {
            "metadata": {"labels": labels(cluster)},
            "spec": {
                "serviceAccountName": account,
                "restartPolicy": "Never",
                "securityContext": POD_SECURITY,
                **cluster.head.pod_fields(),
                "containers": [
                    {
                        "name": "start",
                        "image": cluster.image,
                        "command": ["python", "-m", "cluster.schedule.start", f"{FOLDER}/{_RAY_JOB_FILE}"],
                        "env": [
                            _field_env("NAMESPACE", "metadata.namespace"),
                            _field_env("JOB_NAME", "metadata.labels['batch.kubernetes.io/job-name']"),
                            _field_env("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
                        ],
                        "resources": resources("100m", "128Mi"),
                        "securityContext": CONTAINER_SECURITY | {"readOnlyRootFilesystem": True},
                        "volumeMounts": [MOUNT],
                    }
                ],
                "volumes": [volume(cluster, _RAY_JOB_FILE)],
            },
        },
    }


def _field_env(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
