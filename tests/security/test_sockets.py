"""A Ray that we start is for this machine only: each of its processes, each of their sockets."""

from __future__ import annotations

import ipaddress
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from cluster.session import ClusterInfo


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_of_a_local_cluster_listens_to_the_outside(local_ray: ClusterInfo) -> None:
    ray.get(ray.remote(num_cpus=1)(lambda: None).remote())  # so that there is a worker, too
    ours = processes_below(os.getpid())
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in ours}
    assert {"raylet", "gcs_server"} <= names
    listening = {address for pid in ours for address in listening_addresses(pid)}
    assert listening, "nothing listens, so the test looks in the wrong place"
    assert {address for address in listening if not ipaddress.ip_address(address).is_loopback} == set()


def processes_below(pid: int) -> set[int]:
    """Children of a process, their children, and so on."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # ended meanwhile
            for child in map(int, children.read_text().split()):
                found |= {child, *processes_below(child)}
    return found


def listening_addresses(pid: int) -> set[str]:
    """Of the TCP sockets that a process listens on. /proc/net/tcp has them in hexadecimal, word by word."""
    sockets = set()
    with suppress(OSError):
        sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                packed = bytes.fromhex(local.partition(":")[0])
                words = [packed[at : at + 4][::-1] for at in range(0, len(packed), 4)]
                ip = ipaddress.ip_address(b"".join(words))
                mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
                found.add(str(mapped or ip))
    return found
