"""RayJobs, cluster/kubernetes/ray_job.py and pods.py."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cluster.examples import AWS, CLOUDS, GCP, Cloud, cluster, spec
from cluster.kubernetes.pools import Pool, RayCluster
from cluster.kubernetes.ray_job import JOBS, ray_job_manifests
from cluster.kubernetes.yaml_text import Manifest
from schemas.errors import UsageError
from schemas.spec_loader import SPECS, load_spec

SMALL = RayCluster("try", "vision", "registry.example/masklake:1")


def ray_job(job: str, made_for: RayCluster | None = None, cloud: Cloud = AWS) -> Manifest:
    return ray_job_manifests(job, made_for or cluster(job, cloud), spec(job, cloud))[1]["spec"]  # type: ignore[no-any-return]


def groups(job: Manifest) -> dict[str, Manifest]:
    return {group["groupName"]: group for group in job["rayClusterSpec"]["workerGroupSpecs"]}


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("job", JOBS)
def test_the_entrypoint_is_a_command_that_takes_the_spec_of_the_config_map(
    job: str, cloud: Cloud, tmp_path: Path
) -> None:
    from jobs.cli import app

    config_map, made = ray_job_manifests(job, cluster(job, cloud), spec(job, cloud))
    ((name, text),) = config_map["data"].items()
    (tmp_path / name).write_text(text)
    pod = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]

    program, *arguments = shlex.split(made["spec"]["entrypoint"])
    assert program == "masklake"
    group = typer.main.get_command(app)
    with group.make_context("masklake", arguments, resilient_parsing=False) as context:
        subcommand, command, rest = group.resolve_command(context, arguments)  # type: ignore[attr-defined]
        with command.make_context(subcommand, rest, parent=context) as parsed:
            given = str(parsed.params["spec_file"])
    assert given.startswith(f"{mount['mountPath']}/")
    loaded = load_spec(SPECS[job], str(tmp_path / Path(given).name))
    assert loaded.model_dump()["model"]["uri"] == "alias:champion"


def test_a_training_run_is_elastic_between_the_nodes_that_stay_and_all_of_them(tmp_path: Path) -> None:
    from schemas.train_spec import TrainSpec

    pools = cluster("train", AWS).pools
    text = ray_job_manifests("train", cluster("train", AWS), spec("train", AWS))[0]["data"]["train.yaml"]
    (tmp_path / "train.yaml").write_text(text)
    low, high = load_spec(TrainSpec, str(tmp_path / "train.yaml")).worker_range
    assert (low, high) == (2, 8)
    assert low == sum(pool.min_nodes for pool in pools)
    assert high == sum(pool.max_nodes for pool in pools)


def test_the_head_is_on_a_node_that_stays_and_takes_no_tasks_and_no_gpu() -> None:
    head = ray_job("infer")["rayClusterSpec"]["headGroupSpec"]
    pod = head["template"]["spec"]
    assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_spot_nodes_are_asked_for_by_label_and_tolerated_where_they_are_tainted() -> None:
    aws, gcp = (groups(ray_job("infer", cloud=cloud))["gpu-spot"]["template"]["spec"] for cloud in (AWS, GCP))
    assert aws["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
    assert gcp["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in gcp["tolerations"]


def test_pools_keep_between_their_bounds_by_the_second_autoscaler() -> None:
    made = ray_job("infer")
    assert {name: (group["minReplicas"], group["maxReplicas"]) for name, group in groups(made).items()} == {
        "cpu": (1, 4),
        "gpu": (1, 1),
        "gpu-spot": (0, 8),
    }
    assert made["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert made["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


def test_a_cluster_that_cannot_grow_has_no_autoscaler_and_no_token_for_one() -> None:
    made = ray_job("infer", SMALL)
    assert "enableInTreeAutoscaling" not in made["rayClusterSpec"]
    assert "serviceAccountToken" not in str(made)


def test_every_ray_process_asks_for_the_token() -> None:
    assert ray_job("infer", SMALL)["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_token_of_the_kubernetes_api_is_mounted_beside_the_driver_and_not_into_it() -> None:
    made = ray_job("infer")["rayClusterSpec"]
    pod = made["headGroupSpec"]["template"]["spec"]
    (api,) = (volume for volume in pod["volumes"] if "serviceAccountToken" in str(volume))
    assert [mount["name"] for mount in made["autoscalerOptions"]["volumeMounts"]] == [api["name"]]
    assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == ["spec"]
    # Where Ray looks for it.
    from ray.autoscaler._private.kuberay import node_provider

    (mount,) = made["autoscalerOptions"]["volumeMounts"]
    assert f"{mount['mountPath']}/token" == node_provider.IN_CLUSTER_TOKEN_PATH
    assert f"{mount['mountPath']}/ca.crt" == node_provider.IN_CLUSTER_CA_CERT_PATH


def test_a_failed_run_is_tried_again_on_a_new_cluster_which_goes_when_it_has_ended() -> None:
    made = ray_job("infer", replace(SMALL, retries=3, deadline_s=7200, keep_s=60))
    assert (made["backoffLimit"], made["activeDeadlineSeconds"]) == (3, 7200)
    assert (made["shutdownAfterJobFinishes"], made["ttlSecondsAfterFinished"]) == (True, 60)


def test_what_a_spec_may_reach_is_said_to_head_and_workers() -> None:
    made = ray_job("infer", replace(SMALL, allowed_uris=("s3://a/photos", "s3://lake")))["rayClusterSpec"]
    for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
        variables = group["template"]["spec"]["containers"][0]["env"]
        assert {"name": "MASKLAKE_ALLOWED_URIS", "value": "s3://a/photos s3://lake"} in variables


def test_a_store_of_ones_own_is_allowed_to_head_and_workers() -> None:
    own = replace(SMALL, allowed_endpoints=("http://ceph.storage:7480", "https://minio.example"))
    made = ray_job("infer", own)["rayClusterSpec"]
    for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
        variables = group["template"]["spec"]["containers"][0]["env"]
        value = "http://ceph.storage:7480 https://minio.example"
        assert {"name": "MASKLAKE_ALLOWED_ENDPOINTS", "value": value} in variables


def test_a_queue_admits_the_whole_cluster_and_starts_it() -> None:
    queued = replace(SMALL, queue="team", pools=(Pool("gpu", gpus=1, min_nodes=0, max_nodes=4),))
    _, made = ray_job_manifests("infer", queued, spec("infer", AWS))
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert made["spec"]["suspend"] is True
    assert "enableInTreeAutoscaling" not in made["spec"]["rayClusterSpec"]
    (group,) = groups(made["spec"]).values()
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)


def test_a_job_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no job 'evaluate' for a cluster"):
        ray_job_manifests("evaluate", SMALL, spec("infer", AWS))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        (r"data\.people\.images", {"data": {"people": {"uri": "coco:s3://t.json", "images": "photos/"}}}),
        (r"data\.people\.uri", {"data": {"people": {"uri": "coco:t.json"}}}),
        (r"data\.lake\.uri", {"data": {"lake": {"uri": "lake:demo-lake@3"}}}),
        (r"evaluate\.data\.uri", {"evaluate": {"data": {"uri": "coco:/val.json"}}}),
        (r"out\.uri", {"out": {"uri": "runs/1"}}),
        (r"model\.backbone", {"model": {"uri": "r50_fpn", "backbone": "file:///weights.pth"}}),
        (r"register_as\.lake", {"register_as": {"lake": "demo-lake"}}),
    ],
)
def test_paths_that_no_pod_sees_are_refused_in_a_training_run_too(where: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{where} .* is a path of this machine"):
        ray_job_manifests("train", SMALL, spec("train", AWS) | change)
    ray_job_manifests("train", SMALL, spec("train", AWS) | {"model": {"uri": "r50_fpn"}})


def test_a_spec_that_is_too_long_for_a_config_map_is_refused() -> None:
    long = spec("relabel", AWS) | {"order": {"first": ["x" * 100] * 10_000}}
    with pytest.raises(UsageError, match="a ConfigMap holds 1,000,000"):
        ray_job_manifests("relabel", SMALL, long)
