"""Where Prometheus finds the metrics of clusters that KubeRay makes.

Enters: namespace and name. Leaves: a PodMonitor and a PrometheusRule, for the Prometheus operator.

KubeRay gives head and workers a container port named metrics (8080) and tells Ray to listen there. Pods are
chosen by KubeRay's own label, which no template can take away.

Source of the fields: monitoring.coreos.com/v1; tests/cluster/data says which files.
"""

from collections.abc import Mapping
from typing import Any

from cluster.monitoring.alerts import rule_groups
from cluster.monitoring.queries import CLUSTER

INTERVAL = "15s"  # a gauge of a process that ended is there for 20 s
_RAY_POD = {"ray.io/is-ray-node": "yes"}
_LABELS = {CLUSTER: "ray_io_cluster", "ray_io_group": "ray_io_group"}


def pod_monitor(namespace: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Every Ray pod of the namespace.

    Args:
        labels: by which Prometheus takes it for one of its own (its podMonitorSelector).
    """
    relabelings = [
        {
            "action": "replace",
            "sourceLabels": [f"__meta_kubernetes_pod_label_{source}"],
            "targetLabel": target,
        }
        for target, source in _LABELS.items()
    ]
    endpoint = {"port": "metrics", "interval": INTERVAL, "relabelings": relabelings}
    spec = {"selector": {"matchLabels": _RAY_POD}, "podMetricsEndpoints": [endpoint]}
    return _manifest("PodMonitor", namespace, labels) | {"spec": spec}


def prometheus_rule(namespace: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """The alerts. labels: as for the PodMonitor (ruleSelector)."""
    return _manifest("PrometheusRule", namespace, labels) | {"spec": rule_groups()}


def _manifest(kind: str, namespace: str, labels: Mapping[str, str]) -> dict[str, Any]:
    metadata = {"name": "masklake", "namespace": namespace, "labels": dict(labels)}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": metadata}
