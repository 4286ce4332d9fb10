"""Manifests that re-label on schedule, cluster/kubernetes/cron_job.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.cron_job import cron_job_manifests, ray_cron_job_manifests
from cluster.kubernetes.pools import Pool, RayCluster
from cluster.kubernetes.yaml_text import Manifest, to_yaml
from cluster.schedule.cron import CronSchedule
from schemas.errors import UsageError
from schemas.spec_file import read_spec_file

NIGHTLY = CronSchedule("0 2 * * *", "Europe/Berlin")
CLUSTER = RayCluster("nightly", "vision", "registry.example/masklake:1")
SPEC = {
    "source": {"uri": "s3://photos/"},
    "model": {"uri": "alias:champion"},
    "lake": {"uri": "s3://lake"},
}
FULL = replace(
    CLUSTER,
    secrets=("lake-keys", "more"),
    service_account="labeller",
    pools=(Pool("workers", gpus=1, min_nodes=3, max_nodes=3),),
)


def by_kind(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {manifest["kind"]: manifest for manifest in yaml.load_all(to_yaml(manifests), yaml.CSafeLoader)}


def cron_job(cluster: RayCluster = CLUSTER) -> dict[str, Manifest]:
    return by_kind(cron_job_manifests(NIGHTLY, cluster, SPEC))


def ray_job_of(manifests: dict[str, Manifest]) -> Manifest:
    ray_job: Manifest = json.loads(manifests["ConfigMap"]["data"]["rayjob.json"])
    return ray_job


@pytest.mark.parametrize("cluster", [CLUSTER, FULL])
def test_manifests_have_only_fields_that_their_apis_know(cluster: RayCluster, problems: Any) -> None:
    manifests = cron_job(cluster)
    ray_job = ray_job_of(manifests)
    ray_job["metadata"]["name"] = "nightly-29000000-ray"
    found = by_kind(ray_cron_job_manifests(NIGHTLY, cluster, SPEC))
    for manifest in [*manifests.values(), ray_job, *found.values()]:
        assert problems(manifest) == [], manifest["kind"]
    assert [*manifests] == ["ConfigMap", "ServiceAccount", "Role", "RoleBinding", "CronJob"]
    assert [*found] == ["ConfigMap", "RayCronJob"]


def test_the_schemas_do_find_what_an_api_would_refuse(problems: Any) -> None:
    manifests = cron_job()
    manifests["CronJob"]["spec"]["timezone"] = "UTC"
    assert "'timezone' was unexpected" in problems(manifests["CronJob"])[0]
    ray_job = ray_job_of(manifests)
    cluster = ray_job["spec"]["rayClusterSpec"]
    cluster["authOptions"]["mode"] = "tokens"
    assert problems(ray_job) == ["'tokens' is not one of ['disabled', 'token']"]
    cluster["authOptions"] = {}
    del cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    assert problems(ray_job) == ["'name' is a required property"]


def test_a_cron_job_never_runs_twice_at_once_and_keeps_its_wall_time() -> None:
    spec = cron_job()["CronJob"]["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 3600)
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 3
    # podFailurePolicy wants it.
    assert job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(("retries", "job_deadline_s"), [(0, 10800), (2, 25200)])
def test_a_run_that_takes_too_long_is_ended_before_its_job_is(retries: int, job_deadline_s: int) -> None:
    manifests = cron_job(replace(CLUSTER, deadline_s=7200, retries=retries))
    assert ray_job_of(manifests)["spec"]["activeDeadlineSeconds"] == 7200
    assert manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] == job_deadline_s


def test_the_pod_may_make_and_read_ray_jobs_of_its_namespace_and_nothing_else() -> None:
    manifests = cron_job()
    account = manifests["ServiceAccount"]["metadata"]
    assert manifests["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert manifests["RoleBinding"]["roleRef"]["name"] == manifests["Role"]["metadata"]["name"]
    assert manifests["RoleBinding"]["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": "vision"}
    ]
    pod = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["name"]
    assert {manifest["metadata"]["namespace"] for manifest in manifests.values()} == {"vision"}


def test_secrets_are_named_in_head_and_workers_and_nowhere_written() -> None:
    manifests = cron_job(FULL)
    cluster = ray_job_of(manifests)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["envFrom"] == [
            {"secretRef": {"name": "lake-keys"}},
            {"secretRef": {"name": "more"}},
        ]
        assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("labeller", False)
    start = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert "envFrom" not in start


def test_workers_have_the_size_asked_for_and_the_head_takes_no_tasks() -> None:
    cluster = ray_job_of(cron_job(FULL))["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in json.dumps(ray_job_of(cron_job(CLUSTER)))


def test_a_ray_cron_job_runs_the_same_job() -> None:
    found = by_kind(ray_cron_job_manifests(NIGHTLY, CLUSTER, SPEC))["RayCronJob"]["spec"]
    assert found["jobTemplate"] == ray_job_of(cron_job())["spec"]
    assert (found["schedule"], found["timeZone"]) == ("0 2 * * *", "Europe/Berlin")


def test_a_queue_counts_the_cron_jobs_ray_jobs_and_a_ray_cron_job_has_none() -> None:
    queued = replace(CLUSTER, queue="team")
    ray_job = ray_job_of(cron_job(queued))
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert ray_job["spec"]["suspend"] is True
    with pytest.raises(UsageError, match="use the CronJob instead"):
        ray_cron_job_manifests(NIGHTLY, queued, SPEC)


def test_the_spec_comes_out_of_the_config_map_as_it_went_in(tmp_path: Path) -> None:
    spec = SPEC | {
        "notes": {"number": "1e-3", "word": "on", "letter": "n", "text": "a: 'b'\n", "share": 1e-3}
    }
    text = by_kind(cron_job_manifests(NIGHTLY, CLUSTER, spec))["ConfigMap"]["data"]["relabel.yaml"]
    (tmp_path / "relabel.yaml").write_text(text)
    assert read_spec_file(str(tmp_path / "relabel.yaml")) == spec
    assert "letter: 'n'" in text  # other readers of YAML 1.1 take n for false
    entrypoint = ray_job_of(cron_job())["spec"]["entrypoint"]
    head = ray_job_of(cron_job())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = head["containers"][0]["volumeMounts"]
    (item,) = head["volumes"][0]["configMap"]["items"]
    assert entrypoint == f"masklake relabel {mount['mountPath']}/{item['path']}"


@pytest.mark.parametrize("uri", ["photos/", "/data/photos", "file:///data/photos", "lite/photos"])
@pytest.mark.parametrize("section", ["source", "model", "lake"])
def test_paths_that_no_pod_sees_are_refused(section: str, uri: str) -> None:
    spec = SPEC | {section: {"uri": uri}}
    with pytest.raises(UsageError, match=rf"{section}\.uri .* is a path of this machine"):
        ray_cron_job_manifests(NIGHTLY, CLUSTER, spec)
    ray_cron_job_manifests(NIGHTLY, CLUSTER, SPEC | {"model": {"uri": "demo"}})


def test_ground_truth_on_this_machine_is_refused() -> None:
    ray_cron_job_manifests(NIGHTLY, CLUSTER, SPEC | {"gate": {"annotations": "coco:s3://truth.json"}})
    for uri in ("coco:truth.json", "coco:file:///truth.json"):
        with pytest.raises(UsageError, match=r"gate\.annotations .* is a path of this machine"):
            ray_cron_job_manifests(NIGHTLY, CLUSTER, SPEC | {"gate": {"annotations": uri}})


def test_the_longest_name_makes_a_ray_job_name_of_47_characters() -> None:
    assert len(f"{replace(CLUSTER, name='n' * 34).name}-29000000-ray") == 47
