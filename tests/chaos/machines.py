"""Machines of their own on this one: network, disk, shared memory and processes apart, joined by a switch.

Enters: names. Leaves: machines with an address each that run commands, can be cut off, and can lose power.

A machine is a set of Linux namespaces. Its /tmp and /dev/shm are its own and nothing else can be written, so
what two machines both know went over the network. Wants root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.ray_settings import RAY_SETTINGS
from tests.chaos.harness import CREDENTIALS, ROOT

SHARED_MEMORY_BYTES = 400_000_000
_START_TIMEOUT_S = 120.0
# Of these, so that no address of a real network is hidden: a test network of RFC 2544.
_SUBNET = "198.18"
_SETTLE = f"""
set -e
case '{ROOT}' in /tmp/*)  # a checkout there is seen in the machine's own /tmp, too
    checkout="$DISK"'{str(ROOT).removeprefix("/tmp")}'
    mkdir -p "$checkout"
    mount --bind '{ROOT}' "$checkout"
    mount -o remount,ro,bind "$checkout"
esac
mount --rbind "$DISK" /tmp
mount -t tmpfs -o size={SHARED_MEMORY_BYTES} tmpfs /dev/shm
mount -o remount,ro,bind /
hostname "$NAME"
mkdir -p /tmp/home
exec "$@"
"""


@dataclass
class Machine:
    """One of a Network's. disk: what it sees as /tmp, seen from here."""

    name: str
    address: str
    disk: Path
    namespace: str
    port: str
    switch: str
    env: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def boot(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start what keeps it running; all its other processes end with this one."""
        apart = "--uts --ipc --mount --propagation private --pid --fork --kill-child --mount-proc"
        settled = ["ip", "netns", "exec", self.namespace, "unshare", *apart.split()]
        return self._start([*settled, "sh", "-c", _SETTLE, "sh", *command])

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """One more process in the machine that runs."""
        (init,) = _children(self.processes[0].pid)
        inside = ["nsenter", "--all", f"--target={init}", f"--wd={ROOT}"]
        return self._start([*inside, *command], env)

    def cut_off(self) -> None:
        """Pull the plug out of the switch."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def lose_power(self) -> None:
        """Everything in it ends at once, with no word to anybody."""
        self.cut_off()
        for init in _children(self.processes[0].pid):
            os.kill(init, signal.SIGKILL)
        for process in self.processes:
            process.wait(30)

    def log(self, number: int = -1) -> str:
        """What a process has said so far, in the order of their starts."""
        number = range(len(self.processes))[number]
        return (self.disk.parent / f"{self.name}-{number}.log").read_text(errors="replace")

    def _start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        path = self.disk.parent / f"{self.name}-{len(self.processes)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**self.env, **(env or {}), "DISK": str(self.disk), "NAME": self.name},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


class Network:
    """A switch, this machine's own port on it, and the machines that were added; use network()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._id = uuid.uuid4().hex[:6]
        self._switch = f"ml{self._id}"
        self._subnet = f"{_SUBNET}.{int(self._id, 16) % 256}"
        self.machines: list[Machine] = []
        (folder / "token").write_text("0123456789abcdef" * 4)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))},
            **CREDENTIALS,
            "HOME": "/tmp/home",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            **RAY_SETTINGS,
            # A lost node is given up after some seconds, not half a minute.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "5",
            "RAY_worker_niceness": "0",
            "TMPDIR": "/tmp",
        }
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            self._plug_in(f"ml{self._id}h", f"{self._subnet}.1", None)
        except BaseException:
            self.close()
            raise

    def add(self, name: str) -> Machine:
        """A machine with an address and an empty disk; nothing runs in it yet."""
        number = len(self.machines) + 2
        namespace, port = f"{self._switch}-{name}", f"p{number}"
        address = f"{self._subnet}.{number}"
        disk = self.folder / name
        disk.mkdir()
        machine = Machine(name, address, disk, namespace, port, self._switch, self.env)
        self.machines.append(machine)
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        self._plug_in(port, address, namespace)
        return machine

    def close(self) -> None:
        for machine in self.machines:
            for init in _children(machine.processes[0].pid) if machine.processes else ():
                os.kill(init, signal.SIGKILL)
            for process in machine.processes:
                process.wait(30)
            subprocess.run(["ip", "netns", "del", machine.namespace], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self._switch], check=True)  # and all cables with it

    def _plug_in(self, port: str, address: str, namespace: str | None) -> None:
        """A cable from the switch to a machine, or to the one that these tests run on."""
        inner = port if namespace is None else "eth0"
        where = [] if namespace is None else ["-n", namespace]
        outer = "host" if namespace is None else port
        peer = ["peer", "name", inner, *(["netns", namespace] if namespace else ["netns", str(os.getpid())])]
        _ip("-n", self._switch, "link", "add", outer, "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", outer, "master", "switch", "up")
        _ip(*where, "address", "add", f"{address}/24", "dev", inner)
        _ip(*where, "link", "set", inner, "up")


@contextmanager
def network() -> Iterator[Network]:
    """An empty network; whatever was added to it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="machines-", ignore_cleanup_errors=True) as folder:
        opened = Network(Path(folder))
        try:
            yield opened
        finally:
            opened.close()


def why_not() -> str | None:
    """What this machine lacks for others to run on it; None: nothing.

    Under CI=true nothing is lacking that may be: the tests run, and fail.
    """
    if os.environ.get("CI") == "true":
        return None
    if os.geteuid() != 0:
        return "network namespaces want root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    return f"no {', '.join(missing)} here: apt-get install iproute2 util-linux" if missing else None


def start_ray(
    machine: Machine, head: Machine | None, *, cpus: int, resources: Mapping[str, float] | None = None
) -> None:
    """`ray start` as its first process, and wait until it runs. head: None where this machine is it."""
    place = (
        ["--head", "--port=6379", "--dashboard-port=8265", f"--dashboard-host={machine.address}"]
        if head is None
        else [f"--address={head.address}:6379"]
    )
    ray = [str(Path(sys.executable).parent / "ray"), "start", *place, "--block"]
    custom = json.dumps(dict(resources or {}))
    sizes = [f"--num-cpus={cpus}", f"--resources={custom}", "--object-store-memory=100000000"]
    process = machine.boot([*ray, *sizes, f"--node-ip-address={machine.address}", "--temp-dir=/tmp/ray"])
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "--block" not in machine.log(0):
        assert process.poll() is None, machine.log(0)
        assert time.monotonic() < deadline, f"Ray does not start on {machine.name}: {machine.log(0)}"
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
