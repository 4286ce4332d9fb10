"""`ray up` on AWS: head on demand, spot workers, no public addresses, no open ports.

Enters: a RayCluster and what is there already on AWS (an AwsSite). Leaves: the configuration as a dict.

SSH goes through Session Manager, which finds an instance by its id: no port 22 is open to anybody. Security
groups are named, for Ray would make one that lets the whole internet at port 22. Credentials are the instance
profiles' (cluster/iam/aws.py), read with IMDSv2 alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cloud.ray_up import Machine, NodeType, ray_up_config
from cluster.kubernetes.pools import Pool, RayCluster

# https://aws.amazon.com/ec2/instance-types/
HEAD_MACHINE = Machine("m7i.xlarge", 4, 16)
CPU_MACHINE = Machine("m7i.2xlarge", 8, 32)
GPU_MACHINE = Machine("g6.2xlarge", 8, 32, 1)  # one L4
_DISK_GB = 100  # image, and what Ray spills


@dataclass(frozen=True)
class AwsSite:
    """What is there already.

    Attributes:
        subnets: private ones, with a way out (NAT) to the registry.
        security_group: lets its members talk to each other, and nobody in.
        head_profile, worker_profile: instance profiles.
        image_id: an AMI for Ubuntu with Docker, the SSM agent and, for GPUs, NVIDIA's driver and container
            toolkit; its user ubuntu is in the group docker.
    """

    region: str
    subnets: Sequence[str]
    security_group: str
    head_profile: str
    worker_profile: str
    image_id: str


def aws_config(cluster: RayCluster, site: AwsSite) -> dict[str, Any]:
    """The configuration.

    Raises:
        UsageError: a pool does not fit its machine.
    """
    head_config = _node_config(cluster.head, HEAD_MACHINE, site.head_profile, site)
    workers = [
        NodeType(pool, machine, _node_config(pool, machine, site.worker_profile, site))
        for pool in cluster.pools
        for machine in [GPU_MACHINE if pool.gpus else CPU_MACHINE]
    ]
    return ray_up_config(
        cluster,
        NodeType(cluster.head, HEAD_MACHINE, head_config),
        workers,
        provider={"type": "aws", "region": site.region, "cache_stopped_nodes": False},
        auth={
            "ssh_user": "ubuntu",
            "ssh_proxy_command": "aws ssm start-session --target %h --document-name AWS-StartSSHSession "
            "--parameters portNumber=%p",
            "ssh_proxy_use_node_id": True,
        },
    )


def _node_config(pool: Pool, machine: Machine, profile: str, site: AwsSite) -> Mapping[str, Any]:
    config: dict[str, Any] = {
        "InstanceType": machine.name,
        "ImageId": site.image_id,
        "SubnetIds": list(site.subnets),
        "SecurityGroupIds": [site.security_group],
        "IamInstanceProfile": {"Name": profile},
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": _DISK_GB, "VolumeType": "gp3", "Encrypted": True},
            }
        ],
    }
    return config | ({"InstanceMarketOptions": {"MarketType": "spot"}} if pool.is_spot else {})
