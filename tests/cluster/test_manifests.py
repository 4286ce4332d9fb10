"""What lies in cluster/manifests/: it is what cluster/render.py makes, and each API would take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import FOLDER, main, rendered

FILES = rendered()
# Not Kubernetes': what `ray up` reads, and Prometheus itself.
_OTHERS = ("ray-up/", "monitoring/alerts.yaml")
MANIFESTS = [
    (name, manifest)
    for name, text in FILES.items()
    if name.endswith(".yaml") and not name.startswith(_OTHERS)
    for manifest in yaml.load_all(text, yaml.CSafeLoader)
]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Specs of pods, at any depth."""
    if isinstance(node, list):
        for one in node:
            yield from pods(one)
    elif isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)


def all_pods() -> list[tuple[str, dict[str, Any]]]:
    found = [(name, pod) for name, manifest in MANIFESTS for pod in pods(manifest)]
    for name, manifest in MANIFESTS:
        if "rayjob.json" in manifest.get("data", {}):
            found += [(name, pod) for pod in pods(json.loads(manifest["data"]["rayjob.json"]))]
    return found


def test_rendering_would_change_nothing() -> None:
    there = {
        path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.rglob("*") if path.is_file()
    }
    assert sorted(there) == sorted(FILES), "run: python -m cluster.render"
    assert [name for name in FILES if there[name] != FILES[name]] == [], "run: python -m cluster.render"


def test_rendering_removes_what_is_rendered_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file.yaml").write_text("a: 1\n")
    main(tmp_path)
    assert not (tmp_path / "old/file.yaml").exists()
    assert (tmp_path / "kueue/queue.yaml").read_text() == FILES["kueue/queue.yaml"]
    assert capsys.readouterr().out == f"{len(FILES)} files in {tmp_path}\n"


def test_every_manifest_has_only_fields_that_its_api_knows(problems: Any) -> None:
    found = {f"{name} {manifest['kind']}": problems(manifest) for name, manifest in MANIFESTS}
    assert {where: what for where, what in found.items() if what} == {}
    kinds = {manifest["kind"] for _, manifest in MANIFESTS}
    assert kinds >= {"RayJob", "RayCronJob", "CronJob", "ClusterQueue", "LocalQueue", "ServiceAccount"}


def test_every_pod_passes_the_restricted_standard_and_has_no_token_by_itself() -> None:
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/
    assert len(all_pods()) > 30
    for name, pod in all_pods():
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"] == container["resources"]["limits"], name
        kinds = {next(key for key in volume if key != "name") for volume in pod.get("volumes", [])}
        assert kinds <= {"configMap", "projected"}, name
        # The pod that makes RayJobs is the one that needs the token, and its own account.
        if pod["containers"][0]["name"] != "start":
            assert pod["automountServiceAccountToken"] is False, name


def test_configurations_of_ray_up_are_one_document_each() -> None:
    for name in ("ray-up/aws.yaml", "ray-up/gcp.yaml"):
        assert yaml.load(FILES[name], yaml.CSafeLoader)["cluster_name"] == "masklake-infer"
