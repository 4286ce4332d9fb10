"""The description of a cluster, cluster/kubernetes/pools.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.kubernetes.pools import Nodes, Pool, RayCluster, quantity
from schemas.errors import UsageError

CLUSTER = RayCluster("nightly", "vision", "registry.example/masklake:1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "n" * 35),
        ("name", "Nightly"),
        ("name", "2nightly"),
        ("name", "nightly\n"),
        ("namespace", "a.b"),
        ("namespace", ""),
        ("image", "masklake 1"),
        ("image", ""),
        ("gpu_image", "masklake 1"),
        ("secrets", ("AKIA=very/secret",)),
        ("service_account", "a b"),
        ("queue", "Team"),
        ("allowed_uris", ("photos/",)),
        ("allowed_uris", ("s3://a b",)),
        ("allowed_endpoints", ("ceph:7480",)),
        ("allowed_endpoints", ("https://me:hush@ceph",)),
        ("pools", ()),
        ("pools", (Pool("a"), Pool("a"))),
        ("pools", (Pool("head"),)),
        ("pools", tuple(Pool(f"pool-{number}") for number in range(7))),
        ("retries", -1),
        ("deadline_s", 0),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as refused:
        replace(CLUSTER, **{field: value})
    assert "very/secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "GPU"),
        ("name", ""),
        ("cpu", "four"),
        ("cpu", "0"),
        ("memory", "16 GB"),
        ("min_nodes", -1),
        ("min_nodes", 2),
    ],
)
def test_a_pool_that_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError):
        replace(Pool("gpu"), **{field: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("500m", 0.5), ("1.5", 1.5), ("16Gi", 17179869184), ("2k", 2000), ("3M", 3e6)],
)
def test_quantities_are_read_as_kubernetes_does(text: str, value: float) -> None:
    assert quantity(text) == value


def test_a_pool_says_where_its_pods_may_stand() -> None:
    pool = Pool(
        "gpu", gpus=1, nodes=Nodes({"gpu": "l4"}, absent=("spot",), taints=("team", "nvidia.com/gpu"))
    )
    assert pool.pod_fields() == {
        "nodeSelector": {"gpu": "l4"},
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "spot", "operator": "DoesNotExist"}]}]
                }
            }
        },
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists"},
            {"key": "team", "operator": "Exists"},
        ],
    }
    assert Pool("cpu").pod_fields() == {}


def test_only_pools_with_gpus_run_the_image_for_them() -> None:
    cpu, gpu = Pool("cpu"), Pool("gpu", gpus=1)
    both = replace(CLUSTER, gpu_image="registry.example/masklake:1-gpu")
    assert (both.image_of(cpu), both.image_of(gpu)) == (CLUSTER.image, "registry.example/masklake:1-gpu")
    assert CLUSTER.image_of(gpu) == CLUSTER.image


def test_a_cluster_has_an_autoscaler_where_a_pool_can_grow_and_no_queue_counts_it() -> None:
    growing = replace(CLUSTER, pools=(Pool("cpu", max_nodes=4),))
    assert (CLUSTER.is_fixed, growing.is_fixed) == (True, False)
    assert replace(growing, queue="team").is_fixed
