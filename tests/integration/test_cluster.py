"""The same commands on a running cluster: through Ray's Jobs API, with a token, over three raylets."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from cluster.ray_settings import RAY_SETTINGS
from jobs.demo.lake import write_scene_lake
from jobs.lake.current import read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.submit.request import MAX_SPEC_BYTES, checked_spec, make_request
from schemas.specs import StorageSpec
from tests.chaos.ray_cluster import descendants
from tests.integration.conftest import free_ports
from tests.security.test_credentials import KEY, SECRET, TOKEN
from tests.submit.tls_relay import localhost_certificate, tls_relay

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_RAYLETS = 3
# More than are done until a stop has arrived.
TRAIN_STEPS = 300
RELABEL_IMAGES = 80
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RunningCluster:
    """A head with a dashboard and two more raylets on loopback, two CPUs each, behind a token.

    Attributes:
        agent: of the head, which starts the jobs that the dashboard takes.
    """

    address: str
    dashboard: str
    agent: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("r")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = free_ports(2)
    env = {
        **os.environ,
        # No job here needs them; whatever Ray writes down is searched for them at the end.
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **RAY_SETTINGS,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # So few images are labelled by whichever actor starts first; here all of a pool start before them.
        "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "240",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        # The raylets share this machine's disk; a submitted job reads no disk that it was not allowed.
        "MASKLAKE_ALLOWED_URIS": f"file://{tmp_path_factory.getbasetemp()}/",
    }
    env.pop("RAY_ADDRESS", None)
    common = ["--num-cpus=2", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1", "--block"]
    head = [
        f"--port={port}",
        "--head",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
    ]
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> int:
        """Start a raylet and wait until it runs, for several at once time out on a busy machine; gives its
        agent's port.
        """
        (agent_port,) = free_ports(1)  # the default is taken where another Ray runs, and no job is taken then
        agent = f"--dashboard-agent-listen-port={agent_port}"
        command = [str(BIN / "ray"), "start", *options, agent, *common]
        with (folder / f"raylet-{len(processes)}.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        processes.append(process)
        deadline = time.monotonic() + 60
        while b"--block" not in Path(log.name).read_bytes():
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, f"a raylet does not start: {log.name}"
            time.sleep(0.2)
        return agent_port

    agent = start(*head)
    for _ in range(NUM_RAYLETS - 1):
        start(f"--address=127.0.0.1:{port}")
    started = RunningCluster(
        f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{agent}", env
    )
    try:
        yield started
        records = ask(f"{started.dashboard}/api/jobs/", token.read_text())[1]
        commands = [line for process in processes for line in descendants(process.pid).values()]
        written = [folder / "session_latest" / "logs", tmp_path_factory.getbasetemp()]
        check_no_credential_stands_in([records, *(line.encode() for line in commands)], written)
    finally:
        for process in reversed(processes):
            process.terminate()  # `ray start --block` takes its own raylet down with it
        for process in processes:
            process.wait(60)


def ask(url: str, token: str | None, body: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and content of a GET, with a body of a POST, as a stranger would send it."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


def check_no_credential_stands_in(texts: list[bytes], folders: list[Path]) -> None:
    assert len(texts) > 2 * NUM_RAYLETS, "no process was looked at"
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in files), "no log of a job was looked at"
    for secret in (KEY, SECRET, TOKEN):
        assert [text[:200] for text in texts if secret.encode() in text] == []
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []


def spec_file(folder: Path, num_images: int) -> Path:
    (folder / "images").mkdir()
    for index in range(num_images):
        pixels = np.random.default_rng(index).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG")
        (folder / "images" / f"{index:03d}.jpg").write_bytes(data.getvalue())
    path = folder / "job.yaml"
    path.write_text(
        f"""
source: {{uri: file://{folder}/images}}
model: {{uri: demo}}
lake: {{uri: file://{folder}/lake}}
unit: {{max_images: 1}}
pool: {{min_actors: {NUM_RAYLETS}, max_actors: {NUM_RAYLETS}, cpus_per_actor: 1}}
"""
    )
    return path


def masklake(cluster: RunningCluster, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of ours, told where the cluster is."""
    env = {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard, **variables}
    return subprocess.run(
        [str(BIN / "masklake"), *words], env=env, capture_output=True, text=True, timeout=600
    )


def image_ids(folder: Path) -> list[str]:
    table = LabelsTable.open(str(folder / "lake"), Storage(StorageSpec())).dataset().to_table()
    return [str(name) for name in table["image_id"].to_pylist()]


def test_a_job_submitted_over_tls_runs_over_all_raylets_and_commits_every_image(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = spec_file(tmp_path, num_images=12)
    certificate, context = localhost_certificate(tmp_path)
    dashboard = urlsplit(cluster.dashboard)
    with tls_relay(context, str(dashboard.hostname), int(dashboard.port or 0)) as gateway:
        address = ["--address", gateway, "--follow", "--json"]
        submitted = masklake(
            cluster, "submit", "infer", str(job), *address, REQUESTS_CA_BUNDLE=str(certificate)
        )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (record,) = (tmp_path / "lake" / "runs").glob("*/summary.json")
    summary = json.loads(record.read_text())
    assert (summary["status"], summary["images"], summary["ok"]) == ("done", 12, 12)
    assert len(summary["images_by_node"]) == NUM_RAYLETS
    assert len(set(image_ids(tmp_path))) == len(image_ids(tmp_path)) == 12
    *log, outcome = submitted.stdout.splitlines()
    assert any(line.startswith('{"shards": ') for line in log)
    assert any(f'"run_id": "{summary["run_id"]}"' in line for line in log)
    assert json.loads(outcome)["summary"]["run_id"] == summary["run_id"]


def test_without_its_token_the_cluster_takes_no_job(cluster: RunningCluster, tmp_path: Path) -> None:
    refused = masklake(cluster, "jobs", "list", RAY_AUTH_TOKEN="f" * 64)
    assert refused.returncode == 2
    assert "takes another token than ours. Set RAY_AUTH_MODE=token" in refused.stderr
    open_door = masklake(cluster, "jobs", "list", RAY_AUTH_MODE="disabled")
    assert open_door.returncode == 2
    assert "wants a token" in open_door.stderr

    for path in (f"{cluster.dashboard}/api/jobs/", f"{cluster.agent}/api/job_agent/jobs/"):
        for token, status in ((None, 401), ("f" * 64, 403)):
            stranger = {"entrypoint": f"touch {tmp_path}/was-here", "submission_id": "stranger"}
            assert ask(path, token, stranger)[0] == status, path
    for path in ("/nodes?view=summary", "/api/jobs/", "/api/v0/actors"):
        assert ask(cluster.dashboard + path, None)[0] == 401, path
        assert ask(cluster.dashboard + path, "f" * 64)[0] == 403, path
    own = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    status, records = ask(f"{cluster.dashboard}/api/jobs/", own)
    assert status == 200
    assert b"stranger" not in records
    assert not (tmp_path / "was-here").exists()


@pytest.mark.timeout(900)
def test_ctrl_c_commits_what_was_finished_and_the_next_run_goes_on(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = spec_file(tmp_path, num_images=100)
    slow = ["--set", "pool.min_actors=1", "--set", "pool.max_actors=1", "--set", "commit.every_s=1000"]
    command = [str(BIN / "masklake"), "submit", "infer", str(job), *slow, "--follow"]
    env = {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        # The log says so many images at most every ten seconds; none of them is committed yet.
        for line in run.stdout:
            if line.startswith('{"seconds": ') and json.loads(line)["images"] > 0:
                break
        run.send_signal(signal.SIGINT)
        _, notes = run.communicate(timeout=180)
    assert run.returncode == 1
    assert "was asked to stop: it commits what is finished and ends." in notes
    stopped = re.search(r"masklake: stopped after (\d+) images were committed", notes.splitlines()[-1])
    assert stopped is not None, notes
    assert 0 < int(stopped[1]) == len(image_ids(tmp_path)) < 100

    again = masklake(cluster, "submit", "infer", str(job), "--wait", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["summary"]["images"] == 100 - int(stopped[1])
    assert len(set(image_ids(tmp_path))) == len(image_ids(tmp_path)) == 100


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_training_that_was_asked_to_stop_says_how_far_it_came_and_goes_on_from_there(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = tmp_path / "train.yaml"
    write_scene_lake(tmp_path, range(10_000_000, 10_000_012), 2)
    scenes = f"file://{tmp_path}"
    spec = {
        "data": {"scenes": {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}},
        "model": {"uri": "lite"},
        "out": {"uri": f"{scenes}/run"},
        "recipe": {
            "name": "scenes",
            "steps": TRAIN_STEPS,
            "total_batch": 1,
            "shorter_sides": [64],
            "calibration_batches": 0,
        },
        "checkpoint": {"every_s": 1},
    }
    job.write_text(yaml.safe_dump(spec))
    submitted = masklake(cluster, "submit", "train", str(job), "--submission-id", "train-1")
    assert submitted.returncode == 0, submitted.stderr
    deadline = time.monotonic() + 120
    while not newest_checkpoint(tmp_path / "run"):  # one of step 0 is what it begins with
        assert time.monotonic() < deadline, masklake(cluster, "jobs", "logs", "train-1").stdout
        time.sleep(0.2)
    log = stop(cluster, "train-1")
    stopped = re.search(r"masklake: stopped at step (\d+)", log)
    assert stopped is not None, log
    left = json.loads((tmp_path / "run/summary.json").read_text())
    assert (left["status"], left["steps"]) == ("interrupted", int(stopped[1]))
    newest = newest_checkpoint(tmp_path / "run")

    again = masklake(cluster, "submit", "train", str(job), "--wait")
    assert again.returncode == 0, again.stderr
    done = json.loads((tmp_path / "run/summary.json").read_text())
    assert (done["run_id"], done["status"], done["steps"]) == (left["run_id"], "done", TRAIN_STEPS)
    assert 0 < newest == done["first_step"] < TRAIN_STEPS


def newest_checkpoint(run: Path) -> int:
    """Its step; 0 where there is none."""
    names = (path.stem for path in run.glob("checkpoints/step-*.safetensors"))
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_relabelling_that_was_asked_to_stop_keeps_what_was_finished_and_the_next_one_publishes_all(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = spec_file(tmp_path, num_images=RELABEL_IMAGES)
    slow = ["--set", "pool.min_actors=1", "--set", "pool.max_actors=1", "--set", "commit.every_s=1000"]
    submitted = masklake(cluster, "submit", "relabel", str(job), *slow, "--submission-id", "relabel-1")
    assert submitted.returncode == 0, submitted.stderr
    deadline = time.monotonic() + 240
    # A fragment that lies there is finished, and by then nothing is committed.
    while not list((tmp_path / "lake").glob("labels/model_id=*/*.parquet")):
        assert time.monotonic() < deadline, masklake(cluster, "jobs", "logs", "relabel-1").stdout
        time.sleep(0.2)
    log = stop(cluster, "relabel-1")
    stopped = re.search(r"masklake: stopped after (\d+) images were committed", log)
    assert stopped is not None, log
    assert 0 < int(stopped[1]) == len(image_ids(tmp_path)) < RELABEL_IMAGES
    status = json.loads(masklake(cluster, "jobs", "status", "relabel-1", "--json").stdout)
    assert status["exit_code"] == 1
    storage = Storage(StorageSpec())
    assert read_current(LabelsTable.open(str(tmp_path / "lake"), storage)) == {}

    again = masklake(cluster, "submit", "relabel", str(job), "--wait", "--json")
    assert again.returncode == 0, again.stderr
    assert len(set(image_ids(tmp_path))) == len(image_ids(tmp_path)) == RELABEL_IMAGES
    (part,) = json.loads(again.stdout)["summary"]["passes"]
    assert part["images"] == RELABEL_IMAGES - int(stopped[1])
    (current,) = read_current(LabelsTable.open(str(tmp_path / "lake"), storage)).values()
    assert current.model_id == part["model_id"]


def stop(cluster: RunningCluster, submission_id: str) -> str:
    """Ask a job to stop and wait until it has; gives its log."""
    asked = masklake(cluster, "jobs", "stop", submission_id)
    assert asked.returncode == 0, asked.stderr
    deadline = time.monotonic() + 180
    while json.loads(masklake(cluster, "jobs", "status", submission_id, "--json").stdout)["ended"] is None:
        assert time.monotonic() < deadline
        time.sleep(1)
    return masklake(cluster, "jobs", "logs", submission_id).stdout


def test_what_a_cluster_cannot_do_is_said_in_one_line_with_the_drivers_exit_status(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = str(spec_file(tmp_path, num_images=1))

    def failure(*settings: str) -> tuple[int, str]:
        done = masklake(cluster, "submit", "infer", job, *settings, "--wait")
        return done.returncode, done.stderr.splitlines()[-1]

    code, line = failure("--env", "PATH=/usr/bin:/bin")
    assert code == 127
    assert line.startswith("masklake: the cluster's image has no masklake")
    code, line = failure("--set", "pool.gpus_per_actor=1", "--set", "pool.max_actors=null")
    assert code == 2
    assert line.startswith("masklake: the cluster has 6 CPUs")
    code, line = failure("--set", "pool.cpus_per_actor=16", "--set", "pool.max_actors=null")
    assert code == 2
    assert "room for 0 actors of 16 CPUs" in line
    code, line = failure("--set", "source.uri=file:///etc")
    assert code == 2
    assert line.startswith("masklake: file:///etc is not allowed here")


def test_the_longest_spec_that_is_taken_arrives(cluster: RunningCluster, tmp_path: Path) -> None:
    spec = yaml.safe_load(spec_file(tmp_path, num_images=1).read_text())
    spec["model"] = {"uri": "alias:nobody"}
    job, size = tmp_path / "long.yaml", 0
    while size < MAX_SPEC_BYTES - 2000:
        globs = spec.setdefault("order", {"first": []})["first"]
        globs.append(f'{len(globs)}-"ü' + "x" * 1000)
        job.write_text(yaml.safe_dump(spec, allow_unicode=True))
        sent = make_request("relabel", checked_spec("relabel", str(job), []), {}).env_vars["MASKLAKE_SPEC"]
        size = len(json.dumps(sent))
    done = masklake(cluster, "submit", "relabel", str(job), "--wait")
    assert done.returncode == 2
    assert "there is no alias 'nobody' in the lake" in done.stderr.splitlines()[-1]


def test_a_job_of_others_is_left_alone_and_said_so(cluster: RunningCluster) -> None:
    other = [str(BIN / "ray"), "job", "submit", "--no-wait", "--submission-id", "other", "--", "sleep", "60"]
    env = {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    subprocess.run(other, env=env, check=True, capture_output=True, timeout=60)
    refused = masklake(cluster, "jobs", "stop", "other")
    assert refused.returncode == 2
    assert "job other has no actor that takes wishes: it is no job of masklake" in refused.stderr
