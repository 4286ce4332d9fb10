"""The clusters, specs and sites that cluster/manifests/ is rendered from: take a copy and change the names.

Enters: nothing. Leaves: RayClusters for AWS (EKS with Karpenter) and Google Cloud (GKE), one for each job,
a spec for each, and what is supposed to be there already. Account 111122223333 is the one that AWS uses in
examples.

A pod of a pool fills a machine of 8 cores and 32 GiB, less what kubelet and the daemons on each node keep for
themselves (GKE keeps some 3.7 GiB of 32). CPU nodes list, read and write; GPU nodes decode and label. One
GPU node is there from the beginning and stays, so that a run begins and ends also when there is no spot;
spot nodes come as there is work for them. Training keeps two for the same reason, and takes up to six more
as it can get them.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cluster.cloud.aws import AwsSite
from cluster.cloud.gcp import GcpSite
from cluster.kubernetes.pools import Nodes, Pool, RayCluster

NAMESPACE = "vision"
SERVICE_ACCOUNT = "masklake"
QUEUE = "masklake"
AWS_ACCOUNT = "111122223333"
AWS_ROLE = "masklake-job"
OIDC_PROVIDER = "oidc.eks.us-east-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
GCP_PROJECT = "example-project"
GCP_SERVICE_ACCOUNT = f"masklake-job@{GCP_PROJECT}.iam.gserviceaccount.com"
_IMAGE = f"registry.example/masklake:{version('masklake')}"
_NIGHT_S = 6 * 3600
# A first run over a lake, or a training, takes as long as it takes; one that is ended so has no other try.
_LONGEST_S = 7 * 86400


@dataclass(frozen=True)
class Cloud:
    """How a cloud's Kubernetes marks its nodes, and where the data are.

    Attributes:
        scheme: of its object storage.
        on_demand, spot: nodes that stay, and nodes that may be taken away.
        gpu: labels of nodes with the GPU that the pools are sized for.
    """

    name: str
    scheme: str
    on_demand: Nodes
    spot: Nodes
    gpu: dict[str, str]


# https://karpenter.sh/docs/concepts/scheduling/; managed node groups have eks.amazonaws.com/capacityType.
AWS = Cloud(
    "aws",
    "s3",
    on_demand=Nodes({"karpenter.sh/capacity-type": "on-demand"}),
    spot=Nodes({"karpenter.sh/capacity-type": "spot"}),
    gpu={"karpenter.k8s.aws/instance-gpu-name": "l4"},
)
# https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
GCP = Cloud(
    "gcp",
    "gs",
    on_demand=Nodes(absent=("cloud.google.com/gke-spot",)),
    spot=Nodes({"cloud.google.com/gke-spot": "true"}, taints=("cloud.google.com/gke-spot",)),
    gpu={"cloud.google.com/gke-accelerator": "nvidia-l4"},
)
CLOUDS = (AWS, GCP)

AWS_SITE = AwsSite(
    region="us-east-1",
    subnets=("subnet-0123456789abcdef0", "subnet-0123456789abcdef1"),
    security_group="sg-0123456789abcdef0",
    head_profile="masklake-head",
    worker_profile=AWS_ROLE,
    image_id="ami-0123456789abcdef0",
)
GCP_SITE = GcpSite(
    project=GCP_PROJECT,
    region="us-central1",
    zone="us-central1-a",
    subnetwork=f"projects/{GCP_PROJECT}/regions/us-central1/subnetworks/masklake",
    service_account=GCP_SERVICE_ACCOUNT,
    image=f"projects/{GCP_PROJECT}/global/images/masklake-node",
)


def cluster(job: str, cloud: Cloud, *, queue: str | None = None) -> RayCluster:
    """For one job."""
    return RayCluster(
        name=f"masklake-{job}",
        namespace=NAMESPACE,
        image=f"{_IMAGE}-cpu",
        gpu_image=f"{_IMAGE}-gpu",
        pools=_train_pools(cloud) if job == "train" else _label_pools(cloud),
        head=Pool("head", "3", "12Gi", nodes=cloud.on_demand),
        service_account=SERVICE_ACCOUNT,
        allowed_uris=(*read_uris(cloud), *write_uris(cloud)),
        queue=queue,
        retries=3,
        deadline_s=_NIGHT_S if job == "relabel" else _LONGEST_S,
        keep_s=600,
    )


def read_uris(cloud: Cloud) -> tuple[str, ...]:
    """What the jobs read beside the lake."""
    return (f"{cloud.scheme}://example-photos/incoming", f"{cloud.scheme}://example-truth/coco")


def write_uris(cloud: Cloud) -> tuple[str, ...]:
    """What the jobs write: the lake, and training runs."""
    return (f"{cloud.scheme}://example-lake/masklake", f"{cloud.scheme}://example-lake/training")


def spec(job: str, cloud: Cloud) -> dict[str, Any]:
    """A spec for the cluster of that job.

    The pool is written out: "auto" counts what the cluster has when the run begins, and this one grows.
    """
    photos, truth = read_uris(cloud)
    lake, training = write_uris(cloud)
    if job == "train":
        return {
            "data": {
                "people": {"uri": f"coco:{truth}/train.json", "images": photos},
                "lake": {"uri": f"lake:{lake}", "min_score": 0.8, "ignore_below": 0.9, "weight": 0.5},
            },
            "model": {"uri": "alias:champion"},
            "out": {"uri": f"{training}/2026-11"},
            "scaling": {
                "num_workers": "2..8",
                "use_gpu": True,
                "cpus_per_worker": 6,
                "wait_for_nodes_s": "30m",
            },
            "checkpoint": {"every_s": 300},
            "evaluate": {"data": {"uri": f"coco:{truth}/val.json", "images": photos}, "every_steps": 2000},
            "register_as": {"name": "people", "lake": lake},
        }
    made: dict[str, Any] = {
        "source": {"uri": photos},
        "model": {"uri": "alias:champion"},
        "lake": {"uri": lake},
        "pool": {
            "min_actors": 1,
            "max_actors": 9,
            "gpus_per_actor": 1,
            "cpus_per_actor": 6,
            "wait_for_nodes_s": "30m",
        },
    }
    if job == "relabel":
        made["budget"] = {"time_s": "5h"}
    return made


def _label_pools(cloud: Cloud) -> tuple[Pool, ...]:
    return (
        Pool("cpu", "7", "26Gi", min_nodes=1, max_nodes=4, nodes=cloud.on_demand),
        Pool("gpu", "7", "26Gi", 1, 1, 1, nodes=_with_gpu(cloud.on_demand, cloud)),
        Pool("gpu-spot", "7", "26Gi", 1, 0, 8, is_spot=True, nodes=_with_gpu(cloud.spot, cloud)),
    )


def _train_pools(cloud: Cloud) -> tuple[Pool, ...]:
    return (
        Pool("gpu", "7", "26Gi", 1, 2, 2, nodes=_with_gpu(cloud.on_demand, cloud)),
        Pool("gpu-spot", "7", "26Gi", 1, 0, 6, is_spot=True, nodes=_with_gpu(cloud.spot, cloud)),
    )


def _with_gpu(nodes: Nodes, cloud: Cloud) -> Nodes:
    return Nodes({**nodes.labels, **cloud.gpu}, nodes.absent, nodes.taints)
