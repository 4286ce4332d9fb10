"""The cluster that a command writes a manifest of: its options, and the RayCluster that they describe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.durations import parse_duration
from schemas.errors import UsageError

if TYPE_CHECKING:
    from cluster.kubernetes.pools import RayCluster

DEADLINE = "24h"
# For whoever looks at what failed, or scrapes the last metrics: docs/runbook.md.
_KEEP_S = 600

Image = Annotated[str | None, typer.Option(help="manifest: image with masklake and Ray")]
Namespace = Annotated[str | None, typer.Option(help="manifest: namespace (default)")]
Secrets = Annotated[
    list[str] | None,
    typer.Option("--secret", help="manifest: Secret that becomes environment variables; repeatable"),
]
ServiceAccount = Annotated[str | None, typer.Option(help="manifest: of the Ray pods")]
AllowedEndpoints = Annotated[
    list[str] | None,
    typer.Option("--allow-endpoint", help="manifest: S3 endpoint that the spec may name; repeatable"),
]
Workers = Annotated[int | None, typer.Option(min=1, help="manifest: worker pods (1)")]
WorkerCpu = Annotated[str | None, typer.Option(help="manifest: of each worker (4)")]
WorkerMemory = Annotated[str | None, typer.Option(help="manifest: of each worker (16Gi)")]
WorkerGpus = Annotated[int | None, typer.Option(min=0, help="manifest: of each worker (0)")]


@dataclass(frozen=True)
class ClusterOptions:
    """What was given of them; None is what was not."""

    image: str | None
    namespace: str | None
    secret: list[str] | None
    service_account: str | None
    allow_endpoint: list[str] | None
    workers: int | None
    worker_cpu: str | None
    worker_memory: str | None
    worker_gpus: int | None

    def first_given(self) -> str | None:
        """The first that was given, as a user writes it."""
        given = (field.name for field in fields(self) if getattr(self, field.name) not in (None, []))
        return next((f"--{name.replace('_', '-')}" for name in given), None)

    def cluster(self, name: str, deadline_s: int, retries: int, wanted_by: str) -> RayCluster:
        """The cluster.

        Args:
            wanted_by: the option that asks for a manifest; for the message.

        Raises:
            UsageError: there is no image, or an option is wrong.
        """
        from cluster.kubernetes.pools import Pool, RayCluster

        if self.image is None:
            raise UsageError(
                f"{wanted_by} wants --image: an image with masklake and Ray that the nodes can pull"
            )
        number = self.workers or 1
        pool = Pool(
            "workers",
            cpu=Pool.cpu if self.worker_cpu is None else self.worker_cpu,
            memory=Pool.memory if self.worker_memory is None else self.worker_memory,
            gpus=self.worker_gpus or 0,
            min_nodes=number,
            max_nodes=number,
        )
        return RayCluster(
            name,
            self.namespace or "default",
            self.image,
            pools=(pool,),
            secrets=tuple(self.secret or ()),
            service_account=self.service_account,
            allowed_endpoints=tuple(self.allow_endpoint or ()),
            deadline_s=deadline_s,
            retries=retries,
            keep_s=_KEEP_S,
        )


def deadline_seconds(deadline: str) -> int:
    """Raises UsageError: no time, or too short a one."""
    seconds = int(parse_duration(deadline))
    if seconds < 60:
        raise UsageError(f"--deadline {deadline} is less than a minute, in which no run does anything")
    return seconds
