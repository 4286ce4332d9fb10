"""`masklake infer`: label every image of a source that the lake's table does not have yet.

    prepare (spec, model, storage) -> plan (source minus table) -> pipeline -> commits -> summary

The driver is the only one that makes labels visible; whatever dies elsewhere, the table stays whole.
"""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import yaml
from ray.exceptions import RayError

from cluster.growing import planned_with_room
from cluster.profiles import PoolPlan, actor_profile, least_room
from cluster.session import ClusterInfo, connect, shutdown
from cluster.stop_wish import stoppable
from jobs.infer.books import Books
from jobs.infer.job import Job, plan, prepare
from jobs.infer.label import Replica
from jobs.infer.merge import merge_on_ray
from jobs.infer.metrics import RunMetrics
from jobs.infer.pipeline import Pipeline, run_pipeline
from jobs.infer.progress import Watcher
from jobs.infer.read import Tasks
from jobs.infer.summary import Summary
from jobs.infer.units import UnitReport
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import run_compaction
from jobs.lake.labels_table import LabelsTable, first_line
from jobs.lake.lease import Lease
from jobs.lake.listing import Listing
from jobs.lake.model_ids import record_model_id
from jobs.lake.shard_index import save_shard_index
from jobs.lake.shards import Shard
from schemas.errors import FailureBudgetExceeded, MasklakeError, StorageError
from schemas.specs import InferSpec

# Below this many images a few bad ones say nothing yet of a share, which is then judged at the end only.
MIN_IMAGES_FOR_SHARE = 1000
LEASE_TTL_S = 120.0


class ShardReadError(MasklakeError):
    """Some shards could not be read to their end; the rest is committed and a rerun takes up what is left."""


class InterruptedRunError(MasklakeError):
    """The run was asked to stop; what was finished is committed."""


Choose = Callable[[Job, Iterable[Shard]], tuple[Tasks, LabelsTable | None]]
"""What of a source is to be labelled, and the table that this was compared with, if there is one."""


@dataclass(frozen=True)
class Limits:
    """When a run ends though there is more to do: after a last commit and its compaction.

    deadline_s: of time.monotonic(); max_images: labelled.
    """

    deadline_s: float = math.inf
    max_images: float = math.inf

    def are_reached(self, num_images: int) -> bool:
        return num_images >= self.max_images or time.monotonic() >= self.deadline_s


NO_LIMITS = Limits()


@stoppable()
def run_infer(spec: InferSpec, watcher: Watcher) -> Summary:
    """Label what is missing.

    Returns:
        the summary of a run that is done, or had nothing to do.

    Raises:
        UsageError: the source, the model, the lake or the spec cannot work. Nothing was written.
        MasklakeError: the run failed or was stopped; its class says how. What was committed stays, the
            summary is in <lake>/runs/<run_id>/, and running the same again goes on from there.
    """
    job = prepare(spec)
    with Listing.of(spec.source, job.storage, job.lake_uri) as shards:
        return run_job(job, shards, watcher)


def run_job(
    job: Job,
    shards: Listing,
    watcher: Watcher,
    choose: Choose = plan,
    limits: Limits = NO_LIMITS,
    hear: Callable[[UnitReport], None] = lambda report: None,
) -> Summary:
    """The same for a job and a source's shards that are there already.

    Args:
        choose: what is to be done, and in which order; asked again when nobody else can commit any more.
        hear: told of each unit, and of each shard's end, once it is in the books.
    """
    started = time.monotonic()
    summary = Summary(
        job.run_id, job.model_id, job.source_uri, job.lake_uri, precision=job.precision, device=job.device
    )
    spec = job.spec
    tasks, table = choose(job, shards)
    if not len(tasks):
        return _nothing_to_do(job, summary, table, watcher, started)

    job.storage.probe_conditional_put(job.lake_uri)
    holder = f"{job.run_id} on {socket.gethostname()}"
    with Lease.acquire(
        job.storage, job.lake_uri, app_id(job.source_uri, job.model_id), holder, LEASE_TTL_S
    ) as lease:
        table = LabelsTable.open_or_create(job.lake_uri, job.storage)
        record_model_id(job.storage, job.lake_uri, job.record)
        committer = Committer(
            DeltaStore(table),
            app_id(job.source_uri, job.model_id),
            {"run_id": job.run_id, "model_id": job.model_id, "spec_hash": job.spec_hash},
            spec.commit.every_s,
            spec.commit.every_images,
        )
        # Planned again now that nobody else commits: another run may have finished since the first look.
        tasks, _ = choose(job, shards)
        shards.keep(spec.source, job.storage, job.lake_uri)
        if not len(tasks):
            return _nothing_to_do(job, summary, table, watcher, started)
        save_index = partial(
            save_shard_index, job.storage, job.lake_uri, job.source_uri, job.model_id, job.run_id
        )
        run = _Run(job, committer, Books(committer, save_index), lease, summary, watcher, limits, hear)
        run.write_record("spec.yaml", yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
        try:
            run.work(tasks)
            summary.status = "limited" if run.is_limited else "done"
            if summary.images == 0:  # shards that had to be read to know it
                _nothing_to_do(job, summary, table, watcher, started)
        except BaseException as error:
            summary.status = (
                "interrupted" if isinstance(error, (InterruptedRunError, KeyboardInterrupt)) else "failed"
            )
            summary.error = str(error) or type(error).__name__
            raise
        finally:
            watcher.stop(summary)
            summary.seconds = time.monotonic() - started
            try:
                run.write_record("summary.json", json.dumps(summary.to_dict(), indent=2))
            except StorageError as error:  # what is committed stands, and why the run ended is worth more
                watcher.note(f"the summary could not be written: {error}")
    return summary


def _nothing_to_do(
    job: Job, summary: Summary, table: LabelsTable | None, watcher: Watcher, started: float
) -> Summary:
    retried = job.spec.failures.retry_only
    what = "no image failed that is to be tried again in" if retried else "every image is labelled in"
    watcher.note(f"nothing to do: {what} {job.source_uri} by {job.model_id}.")
    summary.status = "nothing_to_do"
    summary.committed_version = table.version if table else None
    summary.seconds = time.monotonic() - started
    return summary


@dataclass
class _Run:
    """The driver's side of one run."""

    job: Job
    committer: Committer
    books: Books
    lease: Lease
    summary: Summary
    watcher: Watcher
    limits: Limits
    hear: Callable[[UnitReport], None]
    is_limited: bool = False
    stop: _Stop = field(default_factory=lambda: _Stop())
    metrics: RunMetrics = field(default_factory=RunMetrics)

    def work(self, tasks: Tasks) -> None:
        """Run the pipeline over the tasks, committing as it goes and once at the end."""
        cluster = connect()
        try:
            with self.metrics.running(self.job, InterruptedRunError):
                self._work_on(cluster, tasks)
        finally:
            shutdown()

    def _work_on(self, cluster: ClusterInfo, tasks: Tasks) -> None:
        pool = self._pool(cluster)
        self.metrics.begun()
        self.summary.shards = len(tasks)
        self.summary.actors = pool.room
        self.watcher.start(len(tasks), tasks.num_bytes)
        replica = Replica(
            self.job.model_overrides,
            self.job.device,
            self.job.precision,
            self.job.spec.pool.batch_size,
            pool.torch_threads,
        )
        units = run_pipeline(
            Pipeline(
                tasks, self.job.spec, self.job.storage, self.job.lineage, self.job.checkpoint, replica, pool
            )
        )
        with closing(units), _stop_on_signals(self.stop):
            try:
                for unit in units:
                    if unit.report.write_error is not None:
                        self._commit()
                        raise StorageError(
                            f"a worker could not write labels: {unit.report.write_error}; what is committed "
                            "stays, run the same command again for the rest."
                        )
                    if self.books.take(unit.report, unit.fragment):
                        self.summary.add(unit.report)
                        self.hear(unit.report)
                        self.metrics.took(self.summary)
                    if self.committer.due():
                        self._commit()
                    if self._is_over_budget(MIN_IMAGES_FOR_SHARE):
                        break
                    self.watcher.update(self.summary)
                    if self.limits.are_reached(self.summary.images):
                        self.is_limited = True
                        break
                    if self.stop.requested:
                        raise KeyboardInterrupt
            except RayError:
                self._commit()  # what was finished is not to be done again
                raise
            except KeyboardInterrupt:
                self._commit()
                raise InterruptedRunError(
                    f"stopped after {self.summary.committed_images} images were committed; run the same "
                    "command again to go on."
                ) from None
            self._commit()
        self.watcher.update(self.summary)
        if self._is_over_budget(1):
            raise self._budget_exceeded()
        if self.summary.unread_shards:
            name, why = next(iter(self.summary.unread_shards.items()))
            raise ShardReadError(
                f"{len(self.summary.unread_shards)} of {len(tasks)} shards could not be read to their end, "
                f"first {name}: {why} The rest is committed; run the same command again for what is missing."
            )
        if self.job.spec.commit.compact:
            self._compact()

    def _compact(self) -> None:
        """Merge the fragments into large files. The labels are committed: nothing here fails the run."""
        try:
            table = LabelsTable.open(self.job.lake_uri, self.job.storage)
            done = run_compaction(
                table, self.job.lake_uri, self.job.storage, self.job.model_id, merge=merge_on_ray
            )
        except (MasklakeError, RayError) as error:
            reason = first_line(error)
            self.watcher.note(f"small files were not merged ({reason}): run `masklake lake compact`")
            return
        self.summary.merged_files = done.num_old_files
        self.summary.committed_version = done.version

    def write_record(self, name: str, text: str) -> None:
        uri = f"{self.job.lake_uri}/runs/{self.job.run_id}/{name}"
        self.job.storage.write_bytes(uri, text.encode())

    def _pool(self, cluster: ClusterInfo) -> PoolPlan:
        if self.job.device == "cpu":
            self.watcher.note(f"no GPU: labelling on {cluster.num_cpus:g} CPU cores in {self.job.precision}.")
        spec = self.job.spec

        def plan(nodes: Sequence[Mapping[str, float]]) -> PoolPlan:
            return actor_profile(nodes, spec.pool, self.job.preset, spec.unit.max_images)

        return planned_with_room(
            plan, cluster, least_room(spec.pool), spec.pool.wait_for_nodes_s, self.watcher.note
        )

    def _commit(self) -> None:
        """Commit whole: cut in two by a signal, it would take its own commit for another run's."""
        self.stop.deferred = True
        try:
            self._commit_finished()
        finally:
            self.stop.deferred = False

    def _commit_finished(self) -> None:
        """Make what is finished visible, then remember the shards that are complete."""
        if self.lease.lost:
            raise MasklakeError(
                "another run took the lease over while this one was paused; nothing more is committed here."
            )
        version = self.books.commit()
        if version is not None:
            self.summary.commits += 1
            self.summary.committed_version = version
            self.summary.committed_images = (
                self.committer.num_committed_ok + self.committer.num_committed_failed
            )
            self.metrics.committed(self.summary)

    def _is_over_budget(self, min_images: int) -> bool:
        budget, summary = self.job.spec.failures.budget, self.summary
        if isinstance(budget, int):
            return summary.failed > budget
        return summary.images >= min_images and summary.failed > budget * summary.images

    def _budget_exceeded(self) -> FailureBudgetExceeded:
        budget, summary = self.job.spec.failures.budget, self.summary
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.failed_by_kind.items()))
        allowed = str(budget) if isinstance(budget, int) else f"{budget:.2%}"
        return FailureBudgetExceeded(
            f"{summary.failed} of {summary.images} images failed ({kinds}), over failures.budget {allowed}; "
            "all are committed as failed rows with their reasons. Look at them, mend what is wrong and try "
            "them again with --retry-failed, or raise the budget."
        )


@dataclass
class _Stop:
    """Whether a signal asked the run to stop, and whether that has to wait."""

    requested: bool = False
    deferred: bool = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.deferred:
            raise KeyboardInterrupt


@contextmanager
def _stop_on_signals(stop: _Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run after a last commit. Set once Ray is up, which takes the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
