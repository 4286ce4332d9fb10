"""Kubernetes manifests that re-label on schedule: a CronJob around a RayJob, or KubeRay's RayCronJob.

Enters: a CronSchedule, the spec's content, a RayCluster. Leaves: manifests as dicts, and their YAML.

A CronJob's pod (start.py) makes a RayJob and waits for its end, so that `concurrencyPolicy: Forbid` holds for
the whole run. The RayJob belongs to the Job that made it and goes with it. The spec travels in a ConfigMap.
Secrets are named, never written.

Source of the fields: batch/v1 of Kubernetes 1.31 (podFailurePolicy) and later; ray.io/v1 of KubeRay 1.6.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from cluster.schedule.cron import CronSchedule
from schemas.errors import UsageError
from schemas.spec_problems import show

Manifest = dict[str, Any]

# KubeRay takes RayJob names of 47 characters: the name, "-", 8 digits of the Job's minute and "-ray".
_MAX_NAME = 34
_FOLDER = "/etc/masklake"
_SPEC_FILE = "relabel.yaml"
_RAY_JOB_FILE = "rayjob.json"
# The head holds the driver, Ray's own store and nothing of the model.
_HEAD_CPU, _HEAD_MEMORY = "2", "8Gi"
_START_LATE_S = 3600  # a night's run that could not start for an hour is left to the next night
_CLUSTER_START_S = 3600  # what a cluster may take to start, beyond the run itself


@dataclass(frozen=True)
class RayCluster:
    """Where a run takes place: made for it, and gone after it.

    Attributes:
        name: of the schedule and, with suffixes, of all it makes.
        image: has masklake and Ray; head, workers and the CronJob's pod run it.
        secrets: names of Secrets whose keys become environment variables of head and workers.
        service_account: of head and workers; None: the namespace's default.
        num_workers, worker_cpu, worker_memory, worker_gpus: pods besides the head, and the size of each.
        deadline_s: a run that takes longer is ended; the next one goes on.
    """

    name: str
    namespace: str
    image: str
    secrets: Sequence[str] = ()
    service_account: str | None = None
    num_workers: int = 1
    worker_cpu: str = "4"
    worker_memory: str = "16Gi"
    worker_gpus: int = 0
    deadline_s: int = 86400

    def __post_init__(self) -> None:
        check_name(self.name)
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.namespace):
            raise UsageError(f"--namespace {show(self.namespace)} is no name of a namespace")
        if not re.fullmatch(r"[a-z0-9][\w.\-/:@]*", self.image, re.ASCII | re.IGNORECASE):
            raise UsageError(f"--image {show(self.image)} is no image, wanted HOST/NAME:TAG or NAME@DIGEST")
        accounts = [] if self.service_account is None else [("service-account", self.service_account)]
        for flag, name in [*(("secret", secret) for secret in self.secrets), *accounts]:
            if len(name) > 253 or not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", name):
                raise UsageError(
                    f"--{flag} is not the name of an object in the namespace, wanted a-z, 0-9, - and . (what "
                    "is secret stays in the cluster)"
                )
        for flag, quantity in (("worker-cpu", self.worker_cpu), ("worker-memory", self.worker_memory)):
            if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?([mkMGT]|[KMGT]i)?", quantity):
                raise UsageError(f"--{flag} {show(quantity)} is no quantity such as 4, 500m or 16Gi")


def check_name(name: str) -> None:
    """Refuse a schedule's name that not every scheduler takes.

    Raises:
        UsageError: it cannot begin the name of a RayJob.
    """
    if len(name) > _MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UsageError(
            f"--name {show(name)} is no name of a schedule, wanted a-z, 0-9 and -, a letter first, at most "
            f"{_MAX_NAME} characters"
        )


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
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"labels": _labels(cluster)},
        "spec": _ray_job_spec(cluster),
    }
    return [
        _config_map(cluster, spec, {_RAY_JOB_FILE: json.dumps(ray_job, indent=1)}),
        _manifest("v1", "ServiceAccount", account, cluster),
        _manifest("rbac.authorization.k8s.io/v1", "Role", account, cluster)
        | {"rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]},
        _manifest("rbac.authorization.k8s.io/v1", "RoleBinding", account, cluster)
        | {
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": cluster.namespace}],
        },
        _manifest("batch/v1", "CronJob", cluster.name, cluster)
        | {
            "spec": {
                "schedule": schedule.expression,
                "timeZone": schedule.timezone,
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": _START_LATE_S,
                "successfulJobsHistoryLimit": 3,
                "failedJobsHistoryLimit": 3,
                "jobTemplate": {
                    "metadata": {"labels": _labels(cluster)},
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
        UsageError: as cron_job_manifests.
    """
    return [
        _config_map(cluster, spec, {}),
        _manifest("ray.io/v1", "RayCronJob", cluster.name, cluster)
        | {
            "spec": {
                "schedule": schedule.expression,
                "timeZone": schedule.timezone,
                "jobTemplate": _ray_job_spec(cluster),
            }
        },
    ]


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """One YAML document each."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for a string and other readers for a number or a truth value; no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _job_spec(cluster: RayCluster, account: str) -> Manifest:
    """A Job whose pod is replaced where it was evicted or lost the API, but not where its run failed."""
    return {
        "backoffLimit": 3,
        "activeDeadlineSeconds": cluster.deadline_s + _CLUSTER_START_S,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}},
            ]
        },
        "template": {
            "metadata": {"labels": _labels(cluster)},
            "spec": {
                "serviceAccountName": account,
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "start",
                        "image": cluster.image,
                        "command": ["python", "-m", "cluster.schedule.start", f"{_FOLDER}/{_RAY_JOB_FILE}"],
                        "env": [
                            _field_env("NAMESPACE", "metadata.namespace"),
                            _field_env("JOB_NAME", "metadata.labels['batch.kubernetes.io/job-name']"),
                            _field_env("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
                        ],
                        "resources": _resources("100m", "128Mi"),
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                            "readOnlyRootFilesystem": True,
                        },
                        "volumeMounts": [_MOUNT],
                    }
                ],
                "volumes": [_volume(cluster, _RAY_JOB_FILE)],
            },
        },
    }


def _ray_job_spec(cluster: RayCluster) -> Manifest:
    worker = _resources(cluster.worker_cpu, cluster.worker_memory, cluster.worker_gpus)
    return {
        "entrypoint": f"masklake relabel {_FOLDER}/{_SPEC_FILE}",
        "submissionMode": "K8sJobMode",
        # A retry is a new cluster, whatever the exit status was. The next run goes on from the last commit.
        "backoffLimit": 0,
        "activeDeadlineSeconds": cluster.deadline_s,
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "headGroupSpec": {
                # No task runs on the head: the driver alone does.
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                "template": _ray_pod(cluster, "ray-head", _resources(_HEAD_CPU, _HEAD_MEMORY)),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": cluster.num_workers,
                    "minReplicas": cluster.num_workers,
                    "maxReplicas": cluster.num_workers,
                    "rayStartParams": {},
                    "template": _ray_pod(cluster, "ray-worker", worker),
                }
            ],
        },
    }


def _ray_pod(cluster: RayCluster, name: str, resources: Manifest) -> Manifest:
    container: Manifest = {
        "name": name,
        "image": cluster.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": resources,
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [_MOUNT],
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in cluster.secrets]
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [_volume(cluster, _SPEC_FILE)],
    }
    if cluster.service_account is not None:
        pod["serviceAccountName"] = cluster.service_account
    return {"metadata": {"labels": _labels(cluster)}, "spec": pod}


def _config_map(cluster: RayCluster, spec: Mapping[str, Any], more: Mapping[str, str]) -> Manifest:
    _check_reachable(spec)
    text = yaml.dump(dict(spec), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return _manifest("v1", "ConfigMap", cluster.name, cluster) | {"data": {_SPEC_FILE: text, **more}}


def _check_reachable(spec: Mapping[str, Any]) -> None:
    for section, key in (("source", "uri"), ("model", "uri"), ("lake", "uri"), ("gate", "annotations")):
        uri = (spec.get(section) or {}).get(key)
        if uri is None or uri == "demo" or uri.startswith(("alias:", "registry:")):
            continue
        if "://" not in uri or uri.removeprefix("coco:").startswith("file://"):
            raise UsageError(
                f"{section}.{key} {show(uri)} is a path of this machine, which no pod sees: wanted object "
                "storage such as s3://bucket/prefix"
            )


_MOUNT = {"name": "spec", "mountPath": _FOLDER, "readOnly": True}


def _volume(cluster: RayCluster, key: str) -> Manifest:
    return {"name": "spec", "configMap": {"name": cluster.name, "items": [{"key": key, "path": key}]}}


def _resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    amounts: dict[str, str | int] = {"cpu": cpu, "memory": memory} | (
        {"nvidia.com/gpu": gpus} if gpus else {}
    )
    return {"requests": amounts, "limits": amounts}


def _field_env(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _labels(cluster: RayCluster) -> dict[str, str]:
    return {"app.kubernetes.io/name": "masklake", "app.kubernetes.io/instance": cluster.name}


def _manifest(api_version: str, kind: str, name: str, cluster: RayCluster) -> Manifest:
    metadata = {"name": name, "namespace": cluster.namespace, "labels": _labels(cluster)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
