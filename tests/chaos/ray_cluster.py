"""A Ray cluster of this machine's own: a head, more nodes as they are wanted, and any of it killed.

Enters: CPUs of nodes. Leaves: an environment for drivers, and the processes at work, by what they do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray.util import get_node_ip_address

from cluster.ray_settings import RAY_SETTINGS
from tests.chaos.harness import CREDENTIALS, ROOT, Ended, Job, parent, processes
from tests.integration.conftest import free_ports

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 60.0


@dataclass
class Node:
    """`ray start --block`, and all that it started."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL to its raylet (on a head, to the cluster's own books too), as a machine that is gone.

        What else it started finds that out by itself.
        """
        for pid, command in descendants(self.process.pid).items():
            if "/raylet/raylet" in command or "/gcs/gcs_server" in command:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(_STOP_TIMEOUT_S)

    def workers(self, what: str) -> list[int]:
        """Worker processes whose title, `ray::…`, holds this."""
        found = descendants(self.process.pid).items()
        return [pid for pid, command in found if command.startswith("ray::") and what in command]


@dataclass
class RayCluster:
    """Nodes on this machine behind a token. The first one is the head."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host = str(get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray's types stop here
        (self.folder / "token").write_text("0123456789abcdef" * 4)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))},
            **CREDENTIALS,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            **RAY_SETTINGS,
            **self.settings,
        }

    @property
    def address(self) -> str:
        return self.env["RAY_ADDRESS"]

    def start_head(self, num_cpus: int, object_store_bytes: int = 100_000_000) -> Node:
        (port,) = free_ports(1)
        self.env["RAY_ADDRESS"] = f"{self.host}:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        return self._start(head, num_cpus, object_store_bytes)

    def add_node(self, num_cpus: int) -> Node:
        return self._start([f"--address={self.address}"], num_cpus, 100_000_000)

    def driver(self, job: Job, env: Mapping[str, str] | None = None) -> RayDriver:
        return self.run("jobs.infer", job.argv()[1:], env)

    def run(self, module: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> RayDriver:
        """`python -m module …`, which finds the cluster by itself."""
        return RayDriver([sys.executable, "-m", module, *argv], {**self.env, **(env or {})}, self.folder)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.process.terminate()
        for node in self.nodes:
            node.process.wait(_STOP_TIMEOUT_S)

    def _start(self, options: list[str], num_cpus: int, object_store_bytes: int) -> Node:
        """Start a node and wait until it runs: several at once time out on a busy machine."""
        (agent_port,) = free_ports(1)
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", *options, "--block"),
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={object_store_bytes}",
            f"--node-ip-address={self.host}",
            f"--dashboard-agent-listen-port={agent_port}",
        ]
        # A node started under RAY_ADDRESS would refuse to be a head.
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=_end_with_us)
        self.nodes.append(Node(process))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while b"--block" not in Path(log.name).read_bytes():
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, f"a node does not start: {log.name}"
            time.sleep(0.2)
        return self.nodes[-1]


class RayDriver:
    """A command on a cluster, and what it prints."""

    _count = 0

    def __init__(self, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        RayDriver._count += 1
        self._outputs = [folder / f"driver-{self._count}.{name}" for name in ("out", "err")]
        with self._outputs[0].open("wb") as stdout, self._outputs[1].open("wb") as stderr:
            self._process = subprocess.Popen(
                argv,
                env=env,
                cwd=folder,
                stdout=stdout,
                stderr=stderr,
                preexec_fn=_end_with_us,
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._outputs[1].read_text()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float = 240) -> Ended:
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise TimeoutError(f"a driver hung: {self._outputs[1].read_text()}") from None
        stdout, stderr = (path.read_text() for path in self._outputs)
        return Ended(self._process.pid, status, stdout, stderr)


@contextmanager
def ray_cluster(**settings: str) -> Iterator[RayCluster]:
    """An empty cluster; `settings` are environment variables of its nodes and drivers."""
    # Not below pytest's folders: the paths of Ray's sockets are long enough as they are.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(Path(folder), settings)
        try:
            yield cluster
        finally:
            cluster.stop()


def _end_with_us() -> None:
    """In a child: a session of its own, and SIGTERM when these tests end, however they end."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants(ancestor: int) -> dict[int, str]:
    """Processes below one, with their command lines."""
    children: dict[int, list[int]] = {}
    for pid in processes():
        children.setdefault(parent(pid), []).append(pid)
    found: dict[int, str] = {}
    waiting = [ancestor]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            waiting.append(pid)
    return found
