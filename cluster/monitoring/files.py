"""All of it as files: `python -m cluster.render` writes them below cluster/manifests/monitoring/."""

import json
from collections.abc import Mapping

from cluster.kubernetes.yaml_text import to_yaml
from cluster.monitoring.alerts import rule_groups
from cluster.monitoring.dashboard import dashboard
from cluster.monitoring.pod_monitor import pod_monitor, prometheus_rule


def monitoring_files(namespace: str, labels: Mapping[str, str], header: str = "") -> dict[str, str]:
    """Content by path.

    Args:
        namespace: where the clusters are.
        labels: by which the Prometheus operator takes PodMonitor and rules for its own.
        header: a comment for the top of YAML.
    """
    return {
        "monitoring/pod-monitor.yaml": header + to_yaml([pod_monitor(namespace, labels)]),
        "monitoring/prometheus-rule.yaml": header + to_yaml([prometheus_rule(namespace, labels)]),
        "monitoring/alerts.yaml": header + to_yaml([rule_groups()]),
        "monitoring/dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
    }
