"""Kueue's queue for a cluster: a ResourceFlavor for each pool, a ClusterQueue, a LocalQueue.

Enters: a RayCluster with a queue. Leaves: manifests as dicts. The quota is one such cluster at its full
size, so that the next job waits until this one has ended; raise it for more at once.

Kueue refuses a RayJob with Ray's autoscaler (its webhook for RayClusters; elastic jobs are behind a feature
gate), one that keeps its cluster, and a pool of the name head.

Source of the fields: kueue.x-k8s.io/v1beta2; tests/cluster/data says which files.
"""

from cluster.kubernetes.pods import labels, manifest
from cluster.kubernetes.pools import Pool, RayCluster, quantity
from cluster.kubernetes.yaml_text import Manifest
from schemas.errors import UsageError

_API = "kueue.x-k8s.io/v1beta2"
# Beside the head: the submitter (500m, 1Gi), rounded up.
_SUBMITTER_CPUS, _SUBMITTER_GIB = 1, 1
_GIB = 2.0**30


def queue_manifests(cluster: RayCluster) -> list[Manifest]:
    """ResourceFlavors, ClusterQueue and LocalQueue.

    Raises:
        UsageError: the cluster has no queue.
    """
    if cluster.queue is None:
        raise UsageError(f"cluster {cluster.name} names no queue: set RayCluster.queue")
    # Head and submitter take the room of the first flavor that lets them: that of the head's own nodes.
    head = Pool("head-nodes", cluster.head.cpu, cluster.head.memory, nodes=cluster.head.nodes)
    flavors = [head, *cluster.pools]
    quotas = [_quotas(pool, is_head=pool is head) for pool in flavors]
    has_gpus = any(pool.gpus for pool in cluster.pools)
    covered = ["cpu", "memory", *(["nvidia.com/gpu"] if has_gpus else [])]
    cluster_queue = _of_the_whole_cluster("ClusterQueue", cluster.queue, cluster) | {
        "spec": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.namespace}},
            "resourceGroups": [
                {
                    "coveredResources": covered,
                    "flavors": [
                        {
                            "name": f"masklake-{pool.name}",
                            "resources": [{"name": name, "nominalQuota": quota[name]} for name in covered],
                        }
                        for pool, quota in zip(flavors, quotas, strict=True)
                    ],
                }
            ],
        }
    }
    local_queue = manifest(_API, "LocalQueue", cluster.queue, cluster) | {
        "spec": {"clusterQueue": cluster.queue}
    }
    return [*(_flavor(pool, cluster) for pool in flavors), cluster_queue, local_queue]


def _flavor(pool: Pool, cluster: RayCluster) -> Manifest:
    spec: Manifest = {}
    if pool.nodes.labels:
        spec["nodeLabels"] = dict(pool.nodes.labels)
    if pool.taints:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in pool.taints]
    return _of_the_whole_cluster("ResourceFlavor", f"masklake-{pool.name}", cluster) | {"spec": spec}


def _quotas(pool: Pool, *, is_head: bool) -> dict[str, str | int]:
    """Quantities of all the pool's nodes; GPUs are 0 where it has none, for a flavor lists every resource."""
    count = 1 if is_head else pool.max_nodes
    cpus = quantity(pool.cpu) * count + (_SUBMITTER_CPUS if is_head else 0)
    gib = quantity(pool.memory) * count / _GIB + (_SUBMITTER_GIB if is_head else 0)
    return {
        "cpu": f"{round(cpus * 1000)}m" if cpus % 1 else f"{cpus:.0f}",
        "memory": f"{round(gib * 1024)}Mi" if gib % 1 else f"{gib:.0f}Gi",
        "nvidia.com/gpu": pool.gpus * count,
    }


def _of_the_whole_cluster(kind: str, name: str, cluster: RayCluster) -> Manifest:
    return {"apiVersion": _API, "kind": kind, "metadata": {"name": name, "labels": labels(cluster)}}
