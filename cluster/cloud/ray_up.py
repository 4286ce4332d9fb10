"""What configurations of `ray up` have in common on every cloud.

Enters: a RayCluster, a machine and a node_config for its head and each pool. Leaves: a configuration as a
dict.

Nodes have no public address. Ray's ports are open among the nodes alone, which is the network's to say
(docs/cluster.md); the dashboard listens on the head's loopback, so that `ray dashboard` (a tunnel) is the
way to it, and everything wants the token of ~/.ray/auth_token. Nothing is installed on a node: all of it is
in the image. The container runs as the node's own user, so that it may read the token, which only that user
may.

Source of the fields: ray/autoscaler/ray-schema.json of the installed Ray; tests/cluster/test_ray_up.py.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.kubernetes.pools import Pool, RayCluster, quantity
from cluster.ray_settings import RAY_SETTINGS
from schemas.errors import UsageError

TOKEN_FILE = "~/.ray/auth_token"
_HEAD = "head"
_IDLE_MIN = 5
_RUN_OPTIONS = (
    # Evaluated by the node's shell. Group 0 has no rights of root; the image's home lets it write.
    "--user $(id -u):0",
    "--env USER=masklake",
    "--env RAY_AUTH_MODE=token",
    *(f"--env {name}={value}" for name, value in RAY_SETTINGS.items()),
    "--cap-drop ALL",
    "--security-opt no-new-privileges",
    "--ulimit nofile=65536:65536",
)
_STOP = "ray stop"
# A head without CPUs takes no tasks.
_START_HEAD = (
    "ray start --head --port=6379 --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 --dashboard-port=8265 "
    "--metrics-export-port=8080 --autoscaling-config=~/ray_bootstrap_config.yaml"
)
_START_WORKER = "ray start --address=$RAY_HEAD_IP:6379 --metrics-export-port=8080"
# Beside Ray on each worker: hears that the machine is to be taken away, and drains it.
_WATCH_SPOT = (
    "nohup python -m cluster.spot_watch {cloud} --address=$RAY_HEAD_IP:6379 > /tmp/spot_watch.log 2>&1 &"
)


@dataclass(frozen=True)
class Machine:
    """A machine type of a cloud.

    Attributes:
        cpus, memory_gib, gpus: as the cloud's own list says.
    """

    name: str
    cpus: int
    memory_gib: int
    gpus: int = 0

    def check_holds(self, pool: Pool) -> None:
        """Refuse a pool whose nodes are larger than this machine.

        Raises:
            UsageError: with both.
        """
        has_room = quantity(pool.cpu) <= self.cpus and quantity(pool.memory) <= self.memory_gib * 2**30
        if not has_room or pool.gpus != self.gpus:
            raise UsageError(
                f"pool {pool.name} wants nodes of {pool.cpu} CPUs, {pool.memory} and {pool.gpus} GPUs; "
                f"{self.name} has {self.cpus}, {self.memory_gib}Gi and {self.gpus}"
            )


@dataclass(frozen=True)
class NodeType:
    """A pool (or the head), the machine it stands on, and what the cloud is to be told about it."""

    pool: Pool
    machine: Machine
    node_config: Mapping[str, Any]


def ray_up_config(
    cluster: RayCluster,
    head: NodeType,
    workers: list[NodeType],
    provider: Mapping[str, Any],
    auth: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration.

    Raises:
        UsageError: a machine is too small for its pool.
    """
    for node in (head, *workers):
        node.machine.check_holds(node.pool)
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(node.pool.max_nodes for node in workers),
        "idle_timeout_minutes": _IDLE_MIN,
        "provider": {**provider, "use_internal_ips": True},
        "auth": dict(auth),
        "docker": {
            "image": cluster.image,
            "container_name": "masklake",
            "pull_before_run": True,
            "run_options": [*_RUN_OPTIONS, *_limits(cluster)],
        },
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {
                "resources": {"CPU": 0},
                "min_workers": 0,
                "max_workers": 0,
                "node_config": dict(head.node_config),
            },
            **{node.pool.name: _worker_type(node, cluster) for node in workers},
        },
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [_STOP, _START_HEAD],
        "worker_start_ray_commands": [_STOP, _START_WORKER, _WATCH_SPOT.format(cloud=provider["type"])],
    }


def _limits(cluster: RayCluster) -> list[str]:
    return [f"--env {shlex.quote(f'{name}={value}')}" for name, value in cluster.limits.items()]


def _worker_type(node: NodeType, cluster: RayCluster) -> dict[str, Any]:
    found: dict[str, Any] = {
        "resources": {"CPU": node.machine.cpus} | ({"GPU": node.machine.gpus} if node.machine.gpus else {}),
        "min_workers": node.pool.min_nodes,
        "max_workers": node.pool.max_nodes,
        "node_config": dict(node.node_config),
    }
    if cluster.image_of(node.pool) != cluster.image:
        found["docker"] = {"worker_image": cluster.image_of(node.pool)}
    return found
