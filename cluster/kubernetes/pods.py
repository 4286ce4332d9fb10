"""Pods of a Ray cluster: head, workers, submitter.

Enters: a RayCluster and a pool. Leaves: pod templates that pass Kubernetes' "restricted" pod security
standard: no root, no capability, no privilege gained, the default seccomp profile, no token of the
Kubernetes API.

The one process that needs such a token is the autoscaler beside the head. KubeRay makes its Role and starts
its container; the token is mounted into that container alone, so that the driver and what it reads cannot
use it.
"""

from cluster.kubernetes.pools import Pool, RayCluster
from cluster.kubernetes.spec_map import MOUNT, spec_file, volume
from cluster.kubernetes.yaml_text import Manifest
from cluster.ray_settings import RAY_SETTINGS

POD_SECURITY: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY: Manifest = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
# Where Ray's autoscaler looks: ray/autoscaler/_private/kuberay/node_provider.py.
API_TOKEN_MOUNT = {
    "name": "kube-api",
    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
    "readOnly": True,
}
_API_TOKEN_VOLUME: Manifest = {
    "name": "kube-api",
    "projected": {
        "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {
                "downwardAPI": {
                    "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]
                }
            },
        ]
    },
}


def head_pod(job: str, cluster: RayCluster) -> Manifest:
    """The head's template. It alone has the spec, for the driver runs there."""
    pod = _ray_pod("ray-head", cluster.head, cluster)
    pod["spec"]["containers"][0]["volumeMounts"] = [MOUNT]
    pod["spec"]["volumes"] = [
        volume(cluster, spec_file(job)),
        *([] if cluster.is_fixed else [_API_TOKEN_VOLUME]),
    ]
    return pod


def worker_pod(pool: Pool, cluster: RayCluster) -> Manifest:
    """The template of a pool's nodes."""
    return _ray_pod("ray-worker", pool, cluster)


def submitter_pod(cluster: RayCluster) -> Manifest:
    """KubeRay fills in the command and the Ray token; without a template its pod would not say non-root."""
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "resources": resources("500m", "1Gi"),
        "securityContext": CONTAINER_SECURITY,
    }
    return {
        "metadata": {"labels": labels(cluster)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": POD_SECURITY,
            **cluster.head.pod_fields(),
            "containers": [container],
        },
    }


def resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    """As much as is asked for, and no more: a node that ran short of memory would kill what it likes."""
    amounts: dict[str, str | int] = {"cpu": cpu, "memory": memory} | (
        {"nvidia.com/gpu": gpus} if gpus else {}
    )
    return {"requests": amounts, "limits": amounts}


def labels(cluster: RayCluster) -> dict[str, str]:
    """Of everything that is made for this cluster."""
    return {"app.kubernetes.io/name": "masklake", "app.kubernetes.io/instance": cluster.name}


def manifest(api_version: str, kind: str, name: str, cluster: RayCluster) -> Manifest:
    """A manifest without its content."""
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels(cluster)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _ray_pod(name: str, pool: Pool, cluster: RayCluster) -> Manifest:
    container: Manifest = {
        "name": name,
        "image": cluster.image_of(pool),
        "env": _environment(cluster),
        "resources": resources(pool.cpu, pool.memory, pool.gpus),
        "securityContext": CONTAINER_SECURITY,
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in cluster.secrets]
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        **pool.pod_fields(),
        "containers": [container],
    }
    if cluster.service_account is not None:
        pod["serviceAccountName"] = cluster.service_account
    return {"metadata": {"labels": labels(cluster)}, "spec": pod}


def _environment(cluster: RayCluster) -> list[Manifest]:
    # Ray drains for 30 s when its pod is to end, all that Kubernetes leaves it; Google leaves spot pods half.
    variables = RAY_SETTINGS | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "10"} | cluster.limits
    return [{"name": name, "value": value} for name, value in variables.items()]
