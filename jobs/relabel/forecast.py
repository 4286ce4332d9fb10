"""`masklake plan`: what `masklake relabel` would do, how long it would take and cost. Writes nothing.

Enters: a RelabelSpec. Leaves: counts by reason for each model that would label, and a forecast. The rate is
measured: a few of the very images that are to be labelled go through the network where an actor would stand,
in the cluster, or in a Ray that is started here as a run would start one, which is measured too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import ray
import torch

from cluster.growing import NoRoomError
from cluster.profiles import PoolPlan, actor_profile
from cluster.session import ClusterInfo, cluster_address, connect, local_cpus, shutdown
from jobs.infer.job import Job, prepare
from jobs.infer.label import Labeler, Replica
from jobs.infer.read import UnitReader
from jobs.infer.units import UnitReport
from jobs.lake.listing import Listing
from jobs.lake.plan import ShardTask
from jobs.relabel.night import check_ground_truth, open_table, plan_night, too_many_removed
from jobs.relabel.worklist import Reason, Worklist
from schemas.relabel_spec import RelabelSpec

DEFAULT_SAMPLE = 32
# What a run does besides, and a plan does not measure: Python's start and end; of each model that labels, the
# stages before and after its actors, and the last commit. Seen on two cores (benchmarks/forecast.py).
RUN_S = 5.0
PASS_S = 4.0
# Images compared by a gate in a second, with ten objects and their masks (benchmarks/diff.py).
_COMPARED_PER_S = 60_000
# What actors reach of the rate that one reaches alone, for they wait for units now and then.
_BUSY_SHARE = 0.94


@dataclass(frozen=True)
class PassForecast:
    """One model's part.

    counts: images by reason. read_only: so many of the changed ones, by a sample, hold what they held, and
    are read and not labelled. images: to be labelled; seconds: of that; start_s: until an actor is warm, of
    the first one with Ray's start.
    """

    model_id: str
    counts: dict[str, int]
    removed: int
    estimated: int
    read_only: int
    images: int
    images_per_s: float | None
    seconds: float | None
    start_s: float


@dataclass
class Forecast:
    """What a run would do now, and the nights that it would take.

    images: to be labelled, by all models; this_run: those that the budget lets through; seconds: of the whole
    command; hours: of all actors together; finish_at: UTC, of this run. None where nothing was sampled.
    looked_s: what looking at the lake, listing the source and ending Ray took here, as it will take the run.
    notes: what the run would say first.
    """

    source: str
    lake: str
    current: str | None
    passes: list[PassForecast] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    actors: int = 0
    images: int = 0
    this_run: int = 0
    runs: int = 0
    looked_s: float = 0.0
    seconds: float | None = None
    hours: float | None = None
    price: float | None = None
    currency: str = ""
    finish_at: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_forecast(spec: RelabelSpec, sample: int = DEFAULT_SAMPLE) -> Forecast:
    """Compare, sample, reckon.

    Args:
        sample: images that are labelled to measure the rate; 0: no rate, and so no times.

    Raises:
        UsageError: source, model, lake or spec cannot work.
    """
    started, sampled_s = time.perf_counter(), 0.0
    job = prepare(spec.infer_spec())
    night = plan_night(spec, job)
    forecast = Forecast(
        job.source_uri, job.lake_uri, night.current, notes=night.notes, currency=spec.price.currency
    )
    cluster, table = _cluster(job), open_table(job)
    with Listing.of(spec.source, job.storage, job.lake_uri) as shards, ExitStack() as connection:
        check_ground_truth(spec, night, shards)
        for part in night.passes:
            with part.compare(shards, table) as work:
                if problem := too_many_removed(spec, part.job.model_id, work.counts):
                    forecast.notes.append(problem)
                sampling = time.perf_counter()
                forecast.passes.append(_forecast_pass(part.job, work, cluster, sample, connection))
                sampled_s += time.perf_counter() - sampling
            pool = _pool(part.job, cluster)
            forecast.actors = max(forecast.actors, 0 if pool is None else pool.room)
    forecast.looked_s = time.perf_counter() - started - sampled_s
    _reckon(forecast, spec, is_judged=night.current not in (None, job.model_id) and night.rolled_back is None)
    return forecast


@dataclass(frozen=True)
class _Sample:
    """Of an image, on average: seconds of an actor, and encoded bytes.

    start_s: until an actor was warm, with Ray's start where that was not there yet.
    """

    seconds: float
    num_bytes: float
    start_s: float


def _forecast_pass(
    job: Job, work: Worklist, cluster: ClusterInfo, sample: int, connection: ExitStack
) -> PassForecast:
    counts, rate, measured, read_only = work.counts, None, None, 0
    if sample and work.has_tasks:
        if known := work.num_known:
            read_only = round(known * _share_unchanged(job, work.known_sample(sample)))
        pool = _pool(job, cluster)
        measured = None if pool is None else _measure(job, pool, work.tasks(), sample, connection)
        rate = None if pool is None or measured is None else pool.room * _BUSY_SHARE / measured.seconds
    if work.has_tasks and not counts.to_do:
        # Shards of a source of which none was read yet: by the sample's size, or at least an image each.
        shards = [task.shard.num_bytes for task in work.tasks()]
        images = len(shards) if measured is None else round(sum(shards) / measured.num_bytes)
        counts.by_reason[Reason.NEW] += images
        counts.estimated += images
    images = counts.to_do - read_only
    return PassForecast(
        job.model_id,
        {str(reason): count for reason, count in counts.by_reason.items()},
        counts.removed,
        counts.estimated,
        read_only,
        images,
        rate,
        None if rate is None else images / rate,
        0.0 if measured is None else measured.start_s,
    )


def _share_unchanged(job: Job, tasks: Iterator[ShardTask]) -> float:
    """Of images that are to be read for what they hold, how many hold what they held."""
    reader = UnitReader(job.spec.source, job.storage, job.spec.unit.max_bytes, 1)
    unchanged = labelled = 0
    for task in tasks:
        for unit in reader.read_units(task):
            report = UnitReport.from_json(unit["report"][0].as_py())
            unchanged += len(report.unchanged)
            labelled += report.num_images
    return unchanged / (unchanged + labelled) if unchanged else 0.0


def _measure(
    job: Job, pool: PoolPlan, tasks: Iterator[ShardTask], sample: int, connection: ExitStack
) -> _Sample | None:
    """None where the sample could not be read. connection: keeps Ray for the next model."""
    reader = UnitReader(job.spec.source, job.storage, job.spec.unit.max_bytes, min(pool.max_images, sample))
    units: list[pa.Table] = []
    num_images = 0
    for task in tasks:
        # Without what is known of contents: no image is left out, and none more read than are asked for.
        for unit in reader.read_units(replace(task, contents={})):
            report = UnitReport.from_json(unit["report"][0].as_py())
            if report.num_images:
                units.append(unit)
                num_images += report.num_images
            if num_images >= sample:
                break
        if num_images >= sample:
            break
    if not units:
        return None
    replica = Replica(
        job.model_overrides, job.device, job.precision, job.spec.pool.batch_size, pool.torch_threads
    )
    remote = ray.remote(_label).options(
        num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor or None, resources=dict(pool.resources)
    )
    started = time.perf_counter()
    connect()
    connection.callback(shutdown)
    seconds, num_images, num_bytes = ray.get(remote.remote(job, replica, units))
    start_s = time.perf_counter() - started - seconds
    return _Sample(seconds / num_images, num_bytes / num_images, start_s)


def _label(job: Job, replica: Replica, units: Sequence[pa.Table]) -> tuple[float, int, int]:
    """Label and forget; the first unit warms up. Gives seconds, images, and their encoded bytes."""
    labeler = Labeler(job.checkpoint, replica, job.lineage)
    try:
        labeler(units[0])
        started = time.perf_counter()
        reports = [UnitReport.from_json(labeler(unit)["report"][0].as_py()) for unit in units]
        seconds = time.perf_counter() - started
    finally:
        labeler.close()
    num_images = sum(report.num_images for report in reports)
    return seconds, num_images, sum(report.encoded_bytes for report in reports)


def _cluster(job: Job) -> ClusterInfo:
    """The cluster that a run would join, or what it would start on this machine."""
    if cluster_address() is not None:
        info = connect()
        shutdown()
        return info
    cpus = float(local_cpus())
    gpus = float(torch.cuda.device_count()) if job.device == "cuda" else 0.0
    return ClusterInfo(({"CPU": cpus, "GPU": gpus},), True)


def _pool(job: Job, cluster: ClusterInfo) -> PoolPlan | None:
    """None where a run would wait for its nodes: nothing can be measured on them yet."""
    try:
        return actor_profile(cluster.nodes, job.spec.pool, job.preset, job.spec.unit.max_images)
    except NoRoomError:
        if job.spec.pool.wait_for_nodes_s is None:
            raise
        return None


def _reckon(forecast: Forecast, spec: RelabelSpec, is_judged: bool) -> None:
    """From images and rates to times and money.

    Args:
        is_judged: once all is labelled, a gate compares the models.
    """
    forecast.images = sum(part.images for part in forecast.passes)
    working = [part for part in forecast.passes if part.images]
    start_s = forecast.looked_s + RUN_S + sum(PASS_S + part.start_s for part in working)
    left_s = math.inf if spec.budget.time_s is None else spec.budget.time_s - start_s
    left = forecast.images if spec.budget.max_images is None else spec.budget.max_images
    seconds = 0.0
    for part in working:
        images = min(part.images, left)
        if part.images_per_s:
            images = int(min(images, max(0.0, left_s - seconds) * part.images_per_s))
            seconds += images / part.images_per_s
        forecast.this_run += images
        left -= images
    forecast.runs = math.ceil(forecast.images / forecast.this_run) if forecast.this_run else 0
    if any(part.seconds is None for part in working):
        return
    compared = sum(forecast.passes[-1].counts.values()) if is_judged and forecast.passes else 0
    judged_s = compared / _COMPARED_PER_S
    is_last = forecast.this_run == forecast.images
    forecast.seconds = start_s + seconds + (judged_s if is_last else 0.0)
    all_s = sum(part.seconds or 0.0 for part in working)
    forecast.hours = forecast.actors * (all_s + judged_s + start_s * forecast.runs) / 3600
    forecast.price = forecast.hours * spec.price.per_hour
    forecast.finish_at = (datetime.now(UTC) + timedelta(seconds=forecast.seconds)).isoformat(
        timespec="minutes"
    )
