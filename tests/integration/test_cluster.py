"""The same job on a running cluster: submitted through Ray's Jobs API with a token, over three raylets."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec
from tests.integration.conftest import free_ports

ROOT = Path(__file__).parents[2]
NUM_RAYLETS = 3
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RunningCluster:
    """A head with a dashboard and two more raylets on loopback, two CPUs each, behind a token."""

    address: str
    dashboard: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("r")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = free_ports(2)
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PYTHONPATH": str(ROOT),
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

    def start(*options: str) -> None:
        """Start a raylet and wait until it runs: several at once time out on a busy machine."""
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

    start(*head)
    for _ in range(NUM_RAYLETS - 1):
        start(f"--address=127.0.0.1:{port}")
    try:
        yield RunningCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env)
    finally:
        for process in reversed(processes):
            process.terminate()  # `ray start --block` takes its own raylet down with it
        for process in processes:
            process.wait(60)


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
source: {{uri: {folder}/images}}
model: {{uri: demo}}
lake: {{uri: {folder}/lake}}
unit: {{max_images: 1}}
pool: {{min_actors: {NUM_RAYLETS}, max_actors: {NUM_RAYLETS}, cpus_per_actor: 1}}
"""
    )
    return path


def submit(
    cluster: RunningCluster, env: dict[str, str], *entrypoint: str
) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again until the head's job agent has come up: it does seconds after the dashboard."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--", *entrypoint]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_a_submitted_job_runs_over_all_raylets_and_commits_every_image(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    job = spec_file(tmp_path, num_images=12)
    submitted = submit(cluster, cluster.env, sys.executable, "-m", "jobs.infer", str(job), "--json")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (record,) = (tmp_path / "lake" / "runs").glob("*/summary.json")
    summary = json.loads(record.read_text())
    assert (summary["status"], summary["images"], summary["ok"]) == ("done", 12, 12)
    assert len(summary["images_by_node"]) == NUM_RAYLETS
    table = LabelsTable.open(str(tmp_path / "lake"), Storage(StorageSpec())).dataset().to_table()
    assert len(set(table["image_id"].to_pylist())) == len(table) == 12
    assert f'"run_id": "{summary["run_id"]}"' in submitted.stdout


def test_without_its_token_the_cluster_takes_no_job(cluster: RunningCluster) -> None:
    env = {key: value for key, value in cluster.env.items() if not key.startswith("RAY_AUTH")}
    stranger = {**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    refused = submit(cluster, stranger, "true")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
