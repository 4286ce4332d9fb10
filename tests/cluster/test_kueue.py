"""Kueue's queue for a cluster, cluster/kubernetes/kueue.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.kubernetes.kueue import queue_manifests
from cluster.kubernetes.pools import Nodes, Pool, RayCluster
from cluster.kubernetes.yaml_text import Manifest
from schemas.errors import UsageError

SPOT = Nodes({"spot": "true"}, taints=("spot",))
CLUSTER = RayCluster(
    "nightly",
    "vision",
    "registry.example/masklake:1",
    queue="team",
    head=Pool("head", "2500m", "8Gi"),
    pools=(Pool("cpu", "1500m", "512Mi", max_nodes=3), Pool("gpu-spot", "7", "26Gi", 1, 0, 8, nodes=SPOT)),
)


def of_kind(kind: str, cluster: RayCluster = CLUSTER) -> list[Manifest]:
    return [manifest for manifest in queue_manifests(cluster) if manifest["kind"] == kind]


def test_manifests_have_only_fields_that_kueue_knows(problems: Any) -> None:
    for manifest in queue_manifests(CLUSTER):
        assert problems(manifest) == [], manifest["kind"]
    (queue,) = of_kind("ClusterQueue")
    queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["quota"] = "1"
    assert problems(queue) == ["Additional properties are not allowed ('quota' was unexpected)"]


def test_the_quota_is_one_whole_cluster_with_its_submitter() -> None:
    (queue,) = of_kind("ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    assert group["coveredResources"] == ["cpu", "memory", "nvidia.com/gpu"]
    quotas = {
        flavor["name"]: [resource["nominalQuota"] for resource in flavor["resources"]]
        for flavor in group["flavors"]
    }
    assert quotas == {
        "masklake-head-nodes": ["3500m", "9Gi", 0],
        "masklake-cpu": ["4500m", "1536Mi", 0],
        "masklake-gpu-spot": ["56", "208Gi", 8],
    }


def test_each_flavor_of_the_queue_exists_and_is_on_the_pools_nodes() -> None:
    flavors = {flavor["metadata"]["name"]: flavor["spec"] for flavor in of_kind("ResourceFlavor")}
    (queue,) = of_kind("ClusterQueue")
    assert [*flavors] == [flavor["name"] for flavor in queue["spec"]["resourceGroups"][0]["flavors"]]
    assert flavors["masklake-gpu-spot"]["nodeLabels"] == {"spot": "true"}
    assert [toleration["key"] for toleration in flavors["masklake-gpu-spot"]["tolerations"]] == [
        "nvidia.com/gpu",
        "spot",
    ]


def test_the_queue_of_the_namespace_leads_to_that_of_the_cluster_and_no_other_namespace_may_use_it() -> None:
    (local,), (queue,) = of_kind("LocalQueue"), of_kind("ClusterQueue")
    assert local["metadata"]["namespace"] == "vision"
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"] == "team"
    assert "namespace" not in queue["metadata"]
    assert queue["spec"]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "vision"}}


def test_without_gpus_no_quota_for_them() -> None:
    (queue,) = of_kind("ClusterQueue", replace(CLUSTER, pools=(Pool("cpu"),)))
    assert queue["spec"]["resourceGroups"][0]["coveredResources"] == ["cpu", "memory"]


def test_a_cluster_without_a_queue_is_refused() -> None:
    with pytest.raises(UsageError, match="names no queue"):
        queue_manifests(replace(CLUSTER, queue=None))
