"""The same job on a running cluster: submitted through Ray's Jobs API with a token, and across several raylets."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec

ROOT = Path(__file__).parents[2]
NUM_RAYLETS = 3
MASKLAKE_BIN = Path(sys.executable).parent


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class RunningCluster:
    """A head with a dashboard and two more raylets, all on loopback, one CPU each, and how to speak to them."""

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
        "PYTHONPATH": str(ROOT),
    }
    env.pop("RAY_ADDRESS", None)
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1", "--block"]
    head = [
        f"--port={port}",
        "--head",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}",
    ]
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        log = (folder / f"raylet-{len(processes)}.log").open("wb")
        command = [str(MASKLAKE_BIN / "ray"), "start", *options, *common]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    start(*head)
    wait_for_port(dashboard)
    for _ in range(NUM_RAYLETS - 1):
        start(f"--address=127.0.0.1:{port}")
    try:
        yield RunningCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env)
    finally:
        for process in reversed(processes):
            process.terminate()  # `ray start --block` takes its own raylet down with it
        for process in processes:
            process.wait(60)


def wait_for_port(port: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port} after {timeout_s} s")
