"""The one description of a cluster: its head, its pools of nodes, and what a job on it may use.

Enters: names, sizes and where pods may stand. Leaves: a RayCluster that was checked, from which RayJob,
CronJob, RayCronJob, Kueue's queues and the configuration of `ray up` are rendered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import UsageError
from schemas.spec_problems import show

# KubeRay takes RayJob names of 47 characters: the name, "-", 8 digits of a Job's minute and "-ray".
MAX_NAME = 34
_GPU_TAINT = "nvidia.com/gpu"
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?([mkMGT]|[KMGT]i)?")
_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


@dataclass(frozen=True)
class Nodes:
    """Which nodes of Kubernetes a pod may stand on.

    Attributes:
        labels: that a node has to have (nodeSelector).
        absent: keys of labels that it must not have.
        taints: keys of taints that the pod tolerates, whatever their values.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    taints: Sequence[str] = ()

    def pod_fields(self) -> dict[str, Any]:
        """Fields of a PodSpec; none where any node will do."""
        fields: dict[str, Any] = {}
        if self.labels:
            fields["nodeSelector"] = dict(self.labels)
        if self.absent:
            terms = [{"key": key, "operator": "DoesNotExist"} for key in self.absent]
            selector = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
            required = {"requiredDuringSchedulingIgnoredDuringExecution": selector}
            fields["affinity"] = {"nodeAffinity": required}
        if self.taints:
            fields["tolerations"] = [{"key": key, "operator": "Exists"} for key in self.taints]
        return fields


@dataclass(frozen=True)
class Pool:
    """Ray nodes of one kind.

    Attributes:
        name: of the worker group; Kueue keeps "head" for itself.
        cpu, memory, gpus: of each node, as Kubernetes writes quantities.
        min_nodes, max_nodes: the autoscaler stays between them.
        is_spot: may be taken away at any time.
        nodes: where its pods may stand.
    """

    name: str
    cpu: str = "4"
    memory: str = "16Gi"
    gpus: int = 0
    min_nodes: int = 1
    max_nodes: int = 1
    is_spot: bool = False
    nodes: Nodes = Nodes()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?", self.name):
            raise UsageError(
                f"pool {show(self.name)} is no name of a pool, wanted a-z, 0-9 and -, a letter first"
            )
        for flag, text in (("worker-cpu", self.cpu), ("worker-memory", self.memory)):
            if not _QUANTITY.fullmatch(text):
                raise UsageError(f"--{flag} {show(text)} is no quantity such as 4, 500m or 16Gi")
        if not 0 <= self.min_nodes <= self.max_nodes or self.max_nodes < 1:
            raise UsageError(
                f"pool {self.name} has {self.min_nodes} to {self.max_nodes} nodes, wanted 0 or more, the "
                "larger number last and not 0"
            )

    @property
    def taints(self) -> tuple[str, ...]:
        """Keys of taints its pods tolerate: a GPU node's own, and those of `nodes`."""
        return tuple(dict.fromkeys(((_GPU_TAINT,) if self.gpus else ()) + tuple(self.nodes.taints)))

    def pod_fields(self) -> dict[str, Any]:
        """Where its pods may stand, as fields of a PodSpec."""
        return Nodes(self.nodes.labels, self.nodes.absent, self.taints).pod_fields()


# The head holds the driver, Ray's own store and nothing of the model.
HEAD = Pool("head", "2", "8Gi")


@dataclass(frozen=True)
class RayCluster:
    """Where a job takes place: made for it, and gone after it.

    Attributes:
        name: of the job and, with suffixes, of all it makes.
        image: has masklake and Ray; head, nodes without GPUs and the CronJob's pod run it.
        pools: the nodes besides the head.
        gpu_image: of pools with GPUs; None: `image`.
        head: on nodes that stay: without it a run ends. Its numbers of nodes do not count.
        secrets: names of Secrets whose keys become environment variables of head and workers.
        service_account: of head and workers; None: the namespace's default.
        allowed_uris: prefixes that a spec may reach (MASKLAKE_ALLOWED_URIS); none: what a submitted job may
            by default.
        allowed_endpoints: of S3, that a spec may name as storage.endpoint_url (MASKLAKE_ALLOWED_ENDPOINTS);
            a store of one's own is reached so. None: those of the nodes' own environment.
        queue: Kueue's LocalQueue; the cluster is then of fixed size.
        deadline_s: a try that takes longer is ended, and there is no other; the next run goes on.
        retries: further tries after a failure, each on a new cluster.
        keep_s: how long cluster and logs stay after the end.
    """

    name: str
    namespace: str
    image: str
    pools: Sequence[Pool] = (Pool("workers"),)
    gpu_image: str | None = None
    head: Pool = HEAD
    secrets: Sequence[str] = ()
    service_account: str | None = None
    allowed_uris: Sequence[str] = ()
    allowed_endpoints: Sequence[str] = ()
    queue: str | None = None
    deadline_s: int = 86400
    retries: int = 0
    keep_s: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.namespace):
            raise UsageError(f"--namespace {show(self.namespace)} is no name of a namespace")
        for image in (self.image, *([] if self.gpu_image is None else [self.gpu_image])):
            if not re.fullmatch(r"[a-z0-9][\w.\-/:@]*", image, re.ASCII | re.IGNORECASE):
                raise UsageError(f"--image {show(image)} is no image, wanted HOST/NAME:TAG or NAME@DIGEST")
        objects = [("service-account", self.service_account), ("queue", self.queue)]
        named = [(flag, name) for flag, name in objects if name is not None]
        for flag, name in [*(("secret", secret) for secret in self.secrets), *named]:
            if len(name) > 253 or not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", name):
                raise UsageError(
                    f"--{flag} is not the name of an object in the namespace, wanted a-z, 0-9, - and . (what "
                    "is secret stays in the cluster)"
                )
        for prefix in self.allowed_uris:
            if not re.fullmatch(r"[a-z][a-z0-9]*://\S*", prefix):
                raise UsageError(
                    f"allowed prefix {show(prefix)} is no URI, wanted such as s3://bucket/photos/"
                )
        for endpoint in self.allowed_endpoints:
            if not re.fullmatch(r"https?://[^\s/?#@]+/?", endpoint):
                raise UsageError("--allow-endpoint is no endpoint, wanted http://HOST:PORT or https://HOST")
        names = [pool.name for pool in self.pools]
        # Kueue counts at most 8 kinds of pods: head, submitter and these.
        if not 1 <= len(names) <= 6 or len({"head", *names}) != len(names) + 1:
            raise UsageError(f"pools {', '.join(names)}: wanted 1 to 6, with names of their own and not head")
        if self.retries < 0 or self.keep_s < 0 or self.deadline_s < 1:
            raise UsageError("retries and keep_s are 0 or more, deadline_s is 1 or more")

    @property
    def limits(self) -> dict[str, str]:
        """What a spec may reach, as environment variables of head and workers."""
        lists = {
            "MASKLAKE_ALLOWED_URIS": self.allowed_uris,
            "MASKLAKE_ALLOWED_ENDPOINTS": self.allowed_endpoints,
        }
        return {name: " ".join(listed) for name, listed in lists.items() if listed}

    @property
    def is_fixed(self) -> bool:
        """No autoscaler: a queue admits a known size, or no pool has room to grow."""
        return self.queue is not None or all(pool.min_nodes == pool.max_nodes for pool in self.pools)

    def image_of(self, pool: Pool) -> str:
        """The image that a pool's pods run."""
        return self.gpu_image if pool.gpus and self.gpu_image is not None else self.image


def check_name(name: str) -> None:
    """Refuse a name that not every scheduler takes.

    Raises:
        UsageError: it cannot begin the name of a RayJob.
    """
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UsageError(
            f"--name {show(name)} is no name of a schedule or job, wanted a-z, 0-9 and -, a letter first, at "
            f"most {MAX_NAME} characters"
        )


def quantity(text: str) -> float:
    """CPUs or bytes of a quantity that Pool took: "500m" is 0.5, "16Gi" is 17179869184."""
    digits = text.rstrip("mkMGTKi")
    return float(digits) * _UNITS[text[len(digits) :]]
