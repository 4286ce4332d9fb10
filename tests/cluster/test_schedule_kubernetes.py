"""Manifests that re-label on schedule, cluster/schedule/kubernetes.py."""

from __future__ import annotations

import importlib
import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.schedule.cron import CronSchedule
from cluster.schedule.kubernetes import (
    Manifest,
    RayCluster,
    cron_job_manifests,
    ray_cron_job_manifests,
    to_yaml,
)
from schemas.errors import UsageError
from schemas.spec_file import read_spec_file

NIGHTLY = CronSchedule("0 2 * * *", "Europe/Berlin")
CLUSTER = RayCluster("nightly", "vision", "registry.example/masklake:1")
SPEC = {
    "source": {"uri": "s3://photos/"},
    "model": {"uri": "alias:champion"},
    "lake": {"uri": "s3://lake"},
}
_DEFINITIONS = {
    "ConfigMap": "api.core.v1.ConfigMap",
    "CronJob": "api.batch.v1.CronJob",
    "Role": "api.rbac.v1.Role",
    "RoleBinding": "api.rbac.v1.RoleBinding",
    "ServiceAccount": "api.core.v1.ServiceAccount",
    "RayJob": "ray.v1.RayJob",
    "RayCronJob": "ray.v1.RayCronJob",
}


@pytest.fixture(scope="module")
def problems() -> Any:
    """Says what the API's own schemas, in which no unknown field passes, find in a manifest."""
    jsonschema = importlib.import_module("jsonschema")
    schemas = json.loads((Path(__file__).parent / "data/manifest_schemas.json").read_text())
    checks = {
        kind: jsonschema.Draft202012Validator({"$defs": schemas["$defs"], "$ref": f"#/$defs/{name}"})
        for kind, name in _DEFINITIONS.items()
    }
    return lambda manifest: [error.message for error in checks[manifest["kind"]].iter_errors(manifest)]


def by_kind(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {manifest["kind"]: manifest for manifest in yaml.load_all(to_yaml(manifests), yaml.CSafeLoader)}


@cache
def _cron_job(cluster: RayCluster) -> dict[str, Manifest]:
    return by_kind(cron_job_manifests(NIGHTLY, cluster, SPEC))


def cron_job(cluster: RayCluster = CLUSTER) -> dict[str, Manifest]:
    return deepcopy(_cron_job(cluster))


def ray_job_of(manifests: dict[str, Manifest]) -> Manifest:
    ray_job: Manifest = json.loads(manifests["ConfigMap"]["data"]["rayjob.json"])
    return ray_job


FULL = replace(
    CLUSTER, secrets=("lake-keys", "more"), service_account="labeller", num_workers=3, worker_gpus=1
)


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
    del ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    assert problems(ray_job) == ["'name' is a required property"]


def test_a_cron_job_never_runs_twice_at_once_and_keeps_its_wall_time() -> None:
    spec = cron_job()["CronJob"]["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 3600)
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 3
    # podFailurePolicy wants it.
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_run_that_takes_too_long_is_ended_before_its_job_is() -> None:
    manifests = cron_job(replace(CLUSTER, deadline_s=7200))
    assert ray_job_of(manifests)["spec"]["activeDeadlineSeconds"] == 7200
    assert manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 10800


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


@pytest.mark.parametrize("uri", ["photos/", "/data/photos", "file:///data/photos"])
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
        ("secrets", ("AKIA=very/secret",)),
        ("service_account", "a b"),
        ("worker_cpu", "four"),
        ("worker_cpu", "0"),
        ("worker_memory", "16 GB"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as refused:
        replace(CLUSTER, **{field: value})
    assert "very/secret" not in str(refused.value)


def test_the_longest_name_makes_a_ray_job_name_of_47_characters() -> None:
    assert len(f"{replace(CLUSTER, name='n' * 34).name}-29000000-ray") == 47
