from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.submit import following
from jobs.submit.outcome import JobFailedError
from schemas.errors import UsageError
from tests.submit.fake_dashboard import FakeDashboard, details, serving
from tests.submit.test_request import INFER, spec_file


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashboard]:
    monkeypatch.setattr(following, "_POLL_S", 0.001)
    with serving(FakeDashboard()) as served:
        yield served


def masklake(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_submitting_says_how_to_look_and_how_to_stop(dashboard: FakeDashboard, tmp_path: Path) -> None:
    file = spec_file(tmp_path, INFER)
    done = masklake("submit", "infer", file, "--address", dashboard.address, "--submission-id", "infer-1")
    assert done.exit_code == 0, done.output
    assert f"masklake jobs stop infer-1 --address {dashboard.address}" in done.output
    (sent,) = dashboard.submitted
    assert yaml.safe_load(sent["runtime_env"]["env_vars"]["MASKLAKE_SPEC"]) == INFER


def test_a_dry_run_prints_what_a_run_sends_and_sends_nothing(
    dashboard: FakeDashboard, tmp_path: Path
) -> None:
    words = ["submit", "infer", spec_file(tmp_path, INFER), "--address", dashboard.address]
    words += ["--submission-id", "infer-1", "--env", "AWS_REGION=eu-1", "--set", "pool.min_actors=2"]
    shown = json.loads(masklake(*words, "--dry-run").stdout)
    assert dashboard.asked == []
    assert shown.pop("address") == dashboard.address
    masklake(*words)
    (sent,) = dashboard.submitted
    assert sent["runtime_env"]["env_vars"] == shown["runtime_env"]["env_vars"]
    assert {key: sent[key] for key in ("submission_id", "entrypoint", "metadata")} == {
        key: shown[key] for key in ("submission_id", "entrypoint", "metadata")
    }


def test_waiting_ends_with_the_jobs_own_exit_status_and_line(
    dashboard: FakeDashboard, tmp_path: Path
) -> None:
    dashboard.answers["/api/jobs/infer-1"] = [
        details("infer-1", "RUNNING"),
        details("infer-1", "FAILED", driver_exit_code=3),
    ]
    dashboard.answers["/api/jobs/infer-1/logs"] = [{"logs": "…\nmasklake: 7 of 9 images failed\n"}]
    words = ["submit", "infer", spec_file(tmp_path, INFER), "--address", dashboard.address]
    done = masklake(*words, "--submission-id", "infer-1", "--wait", "--json")
    assert isinstance(done.exception, JobFailedError)
    assert (done.exception.exit_code, str(done.exception)) == (3, "7 of 9 images failed")
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 3


def test_a_wrong_spec_reaches_no_cluster(dashboard: FakeDashboard, tmp_path: Path) -> None:
    done = masklake("submit", "train", spec_file(tmp_path, INFER), "--address", dashboard.address)
    assert isinstance(done.exception, UsageError)
    assert dashboard.asked == []


def test_without_an_address_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    done = masklake("submit", "infer", spec_file(tmp_path, INFER))
    assert "give --address" in str(done.exception)


def test_the_address_may_be_rays_variable(dashboard: FakeDashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard.address)
    dashboard.answers["/api/jobs/"] = [[]]
    assert json.loads(masklake("jobs", "list", "--json").stdout) == {"jobs": []}


def test_a_manifest_is_printed_and_nothing_is_sent(tmp_path: Path) -> None:
    words = [
        "submit",
        "infer",
        spec_file(tmp_path, INFER),
        "--render",
        "kuberay",
        "--image",
        "example/masklake:1",
    ]
    config, job = yaml.safe_load_all(masklake(*words, "--name", "birds", "--worker-gpus", "1").stdout)
    assert yaml.safe_load(config["data"]["infer.yaml"]) == INFER
    assert (job["kind"], job["metadata"]["name"]) == ("RayJob", "birds")
    assert "masklake infer" in job["spec"]["entrypoint"]


def test_a_manifest_has_the_options_that_a_schedule_has(tmp_path: Path) -> None:
    words = ["--secret", "keys", "--service-account", "masklake", "--worker-cpu", "7", "--deadline", "3d"]
    words += ["--worker-memory", "26Gi", "--allow-endpoint", "https://ceph.example"]
    file = spec_file(tmp_path, INFER)
    done = masklake("submit", "infer", file, "--render", "kuberay", "--image", "example/masklake:1", *words)
    _, job = yaml.safe_load_all(done.stdout)
    assert job["spec"]["activeDeadlineSeconds"] == 3 * 86400
    # A node that is lost is not the end of it, and what failed can be looked at.
    assert (job["spec"]["backoffLimit"], job["spec"]["ttlSecondsAfterFinished"]) == (3, 600)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["requests"] == {"cpu": "7", "memory": "26Gi"}
    assert worker["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "MASKLAKE_ALLOWED_ENDPOINTS", "value": "https://ceph.example"} in worker["env"]
    assert group["template"]["spec"]["serviceAccountName"] == "masklake"


@pytest.mark.parametrize(
    "words", [["--env", "A=b"], ["--submission-id", "a"], ["--wait"], ["--follow"], ["--dry-run"], ["--json"]]
)
def test_what_is_of_a_job_that_is_sent_is_not_ignored_with_a_manifest(
    tmp_path: Path, words: list[str]
) -> None:
    file = spec_file(tmp_path, INFER)
    done = masklake("submit", "infer", file, "--render", "kuberay", "--image", "a/b:1", *words)
    assert f"{words[0]} is of a job that is sent, and --render kuberay sends none" in str(done.exception)


@pytest.mark.parametrize("words", [["--image", "a/b:1"], ["--secret", "keys"], ["--deadline", "1h"]])
def test_what_is_of_a_manifest_is_not_ignored_without_one(tmp_path: Path, words: list[str]) -> None:
    done = masklake("submit", "infer", spec_file(tmp_path, INFER), "--address", "http://head", *words)
    assert f"{words[0]} is of a manifest: give it with --render kuberay" in str(done.exception)


def test_jobs_are_listed_and_shown_without_their_variables(dashboard: FakeDashboard) -> None:
    one = details(
        "infer-1",
        "FAILED",
        driver_exit_code=2,
        start_time=1_700_000_000_000,
        metadata={"masklake": "infer"},
        message="logs:\nmasklake: no",
        runtime_env={"env_vars": {"MASKLAKE_SPEC": "hush"}},
    )
    dashboard.answers["/api/jobs/"] = [[one]]
    dashboard.answers["/api/jobs/infer-1"] = [one]
    listed = masklake("jobs", "list", "--address", dashboard.address)
    assert listed.exit_code == 0, listed.exception
    assert "infer-1" in listed.stdout
    shown = masklake("jobs", "status", "infer-1", "--address", dashboard.address, "--json").stdout
    assert "hush" not in shown
    facts = json.loads(shown)
    assert (facts["job"], facts["started"], facts["exit_code"], facts["message"]) == (
        "infer",
        "2023-11-14T22:13:20Z",
        2,
        "masklake: no",
    )


def test_a_log_is_printed(dashboard: FakeDashboard) -> None:
    dashboard.answers["/api/jobs/infer-1"] = [details("infer-1", "RUNNING")]
    dashboard.answers["/api/jobs/infer-1/logs"] = [{"logs": "one\ntwo\n"}]
    assert masklake("jobs", "logs", "infer-1", "--address", dashboard.address).stdout == "one\ntwo\n"


def test_stopping_a_job_that_there_is_not_is_told(dashboard: FakeDashboard) -> None:
    done = masklake("jobs", "stop", "infer-9", "--address", dashboard.address)
    assert "there is no job 'infer-9'" in str(done.exception)
