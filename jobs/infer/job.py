"""A job made ready: a spec checked against the world, and what of its source is left to do.

Enters: an InferSpec. Leaves: a Job, or a UsageError; then its shards minus what the label table has.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from cluster.session import cluster_address, connect, shutdown
from jobs.infer.read import Tasks
from jobs.infer.rows import Lineage
from jobs.lake.done_images import DoneImages, LabelFile
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord
from jobs.lake.models import REGISTRY_PREFIX, read_checkpoint_bytes, resolve_uri
from jobs.lake.plan import plan_failed, plan_shards
from jobs.lake.registry import ModelVersion
from jobs.lake.shard_index import load_shard_index
from jobs.lake.sources import Shard
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import CheckpointError, parse_checkpoint
from maskrcnn_core.predictor import Precision, default_device, resolve_precision
from schemas.errors import UsageError
from schemas.specs import InferSpec, PoolSpec


@dataclass(frozen=True)
class Job:
    """A spec made ready: everything checked that can be without reading an image.

    model: the version of the lake's registry, where the spec names one. record: what model_id stands for.
    """

    spec: InferSpec
    storage: Storage
    source_uri: str
    lake_uri: str
    checkpoint: bytes
    preset: str
    model_overrides: dict[str, float | int | None]
    model_id: str
    model: ModelVersion | None
    record: ModelIdRecord
    device: str
    precision: Precision
    run_id: str
    spec_hash: str

    @property
    def lineage(self) -> Lineage:
        """Of rows that are made from now on."""
        return Lineage(self.source_uri, self.model_id, self.run_id, datetime.now(UTC))


def prepare(spec: InferSpec) -> Job:
    """Check the spec against the world: storage answers, the checkpoint loads and fits.

    Raises:
        UsageError: it cannot work; one line says why.
    """
    storage = Storage(spec.storage)
    source_uri, lake_uri = storage.normalize(spec.source.uri), storage.normalize(spec.lake.uri)
    for uri, what in ((source_uri, "source.uri"), (lake_uri, "lake.uri")):
        if uri.startswith("memory://"):
            raise UsageError(
                f"{what} is {uri}: workers cannot see this process's memory; use a folder, s3:// or gs://."
            )
    version = resolve_uri(spec.model.uri, storage, lake_uri)
    model_uri = spec.model.uri if version is None else f"{REGISTRY_PREFIX}{version}"
    checkpoint, where = read_checkpoint_bytes(model_uri, storage, lake_uri)
    device = _actor_device(spec.pool)
    overrides = spec.model.model_dump(exclude={"uri"})
    try:
        parsed = parse_checkpoint(checkpoint, where)
        precision = resolve_precision(spec.pool.precision, device)
        if precision == "fp16" and device == "cpu":
            raise UsageError("pool.precision fp16 needs a GPU and there is none; use fp32, bf16 or auto.")
        built = parsed.build(
            **overrides
        )  # also refuses weights that do not fit, before a cluster is asked for
        model_id = parsed.model_id(precision, **overrides)
    except (CheckpointError, ValueError) as error:
        raise UsageError(f"model: {error}") from error
    storage.check_reachable(source_uri, "source.uri")
    storage.check_reachable(lake_uri, "lake.uri")
    now = datetime.now(UTC)
    run_id = f"infer-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    record = ModelIdRecord(
        model_id=model_id,
        fingerprint=parsed.fingerprint,
        name=parsed.name,
        precision=precision,
        settings={name: getattr(built.config, name) for name in overrides},
        categories=tuple(built.config.categories),
        first_run_id=run_id,
        at=now.isoformat(timespec="seconds"),
    )
    return Job(
        spec=spec,
        storage=storage,
        source_uri=source_uri,
        lake_uri=lake_uri,
        checkpoint=checkpoint,
        preset=parsed.config.preset,
        model_overrides=overrides,
        model_id=model_id,
        model=version,
        record=record,
        device=device,
        precision=precision,
        run_id=run_id,
        spec_hash=hashlib.blake2b(spec.model_dump_json().encode(), digest_size=8).hexdigest(),
    )


def _actor_device(pool: PoolSpec) -> str:
    """Where the actors will run. It decides the precision and so model_id, before a local Ray is started."""
    if pool.gpus_per_actor != "auto":
        return "cuda" if pool.gpus_per_actor > 0 else "cpu"
    if cluster_address() is None:
        return default_device()
    num_gpus = connect().num_gpus
    shutdown()
    return "cuda" if num_gpus >= 1 else "cpu"


def plan(job: Job, shards: Iterable[Shard]) -> tuple[Tasks, LabelsTable | None]:
    """The source's shards minus the table, nothing written; the table is None where the lake has none yet."""
    failures = job.spec.failures
    table = None
    if LabelsTable.exists(job.lake_uri, job.storage):
        table = LabelsTable.open(job.lake_uri, job.storage)
        done = table.done_images(job.source_uri, job.model_id, failures.retry)
    else:
        done = DoneImages((), job.source_uri, (), _no_keys)
    index = load_shard_index(job.storage, job.lake_uri, job.source_uri, job.model_id) if table else {}
    left = plan_failed(shards, done) if failures.retry_only else plan_shards(shards, done, index)
    return Tasks(left), table


def _no_keys(file: LabelFile) -> NoReturn:
    raise AssertionError(f"a table without files was asked for the keys of {file.path}")
