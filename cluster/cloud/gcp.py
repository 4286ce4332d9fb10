"""`ray up` on Google Cloud: head on demand, spot workers, no public addresses, no open ports.

Enters: a RayCluster and what is there already (a GcpSite). Leaves: the configuration as a dict.

SSH goes through the Identity-Aware Proxy. Workers have the job's service account (cluster/iam/gcp.py). The
head does not: Ray's launcher gives it one of its own, ray-autoscaler-sa-v1, with compute.admin and
storage.objectAdmin in the whole project, whatever is written here (ray/autoscaler/_private/gcp/config.py).
Give it a project of its own, or use KubeRay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.cloud.ray_up import Machine, NodeType, ray_up_config
from cluster.kubernetes.pools import Pool, RayCluster

# https://cloud.google.com/compute/docs/machine-resource
HEAD_MACHINE = Machine("n2-standard-4", 4, 16)
CPU_MACHINE = Machine("n2-standard-8", 8, 32)
GPU_MACHINE = Machine("g2-standard-8", 8, 32, 1)  # one L4 comes with it
_DISK_GB = 100  # image, and what Ray spills


@dataclass(frozen=True)
class GcpSite:
    """What is there already.

    Attributes:
        subnetwork: with Cloud NAT, Private Google Access, and a firewall that lets its nodes talk to each
            other and the Identity-Aware Proxy in at port 22.
        service_account: of the workers.
        image: for Ubuntu with Docker and, for GPUs, NVIDIA's driver and container toolkit; its user ubuntu
            is in the group docker.
    """

    project: str
    region: str
    zone: str
    subnetwork: str
    service_account: str
    image: str


def gcp_config(cluster: RayCluster, site: GcpSite) -> dict[str, Any]:
    """The configuration.

    Raises:
        UsageError: a pool does not fit its machine.
    """
    head = NodeType(cluster.head, HEAD_MACHINE, _node_config(cluster.head, HEAD_MACHINE, site))
    account = {"email": site.service_account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
    workers = [
        NodeType(pool, machine, {**_node_config(pool, machine, site), "serviceAccounts": [account]})
        for pool in cluster.pools
        for machine in [GPU_MACHINE if pool.gpus else CPU_MACHINE]
    ]
    return ray_up_config(
        cluster,
        head,
        workers,
        provider={
            "type": "gcp",
            "region": site.region,
            "availability_zone": site.zone,
            "project_id": site.project,
        },
        auth={
            "ssh_user": "ubuntu",
            "ssh_proxy_command": "gcloud compute start-iap-tunnel %h %p --listen-on-stdin "
            f"--zone={site.zone} --project={site.project}",
            "ssh_proxy_use_node_id": True,
        },
    )


def _node_config(pool: Pool, machine: Machine, site: GcpSite) -> Mapping[str, Any]:
    config: dict[str, Any] = {
        "machineType": machine.name,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {"diskSizeGb": _DISK_GB, "sourceImage": site.image},
            }
        ],
        # Without accessConfigs an interface has no public address.
        "networkInterfaces": [{"subnetwork": site.subnetwork}],
        "shieldedInstanceConfig": {"enableSecureBoot": True},
    }
    scheduling: dict[str, Any] = {}
    if machine.gpus or pool.is_spot:
        scheduling["onHostMaintenance"] = "TERMINATE"  # neither can be moved while it runs
    if pool.is_spot:
        scheduling |= {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "automaticRestart": False,
        }
    return config | ({"scheduling": scheduling} if scheduling else {})
