"""`masklake relabel`: bring a lake's labels up to its source and its model, and publish what passes.

    compare (source, table, model) -> current model: what is new -> new model: what is missing
        -> rows of what is gone -> all there? -> diff -> gate -> promote

One run at a time works on a source. What is labelled is committed by `masklake infer`'s own driver; a run
that dies leaves nothing that the next one would have to know.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from cluster.stop_wish import stoppable
from jobs.infer.job import Job, prepare
from jobs.infer.progress import Watcher
from jobs.infer.read import Tasks
from jobs.infer.run import Limits, run_job
from jobs.infer.units import UnitReport
from jobs.lake import failpoints
from jobs.lake.current import current_of, promote, read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.listing import Listing
from jobs.lake.shards import Shard
from jobs.relabel.diff import diff_models
from jobs.relabel.diff_report import write_diff_report
from jobs.relabel.gate import judge, measure_ap, raise_if_refused
from jobs.relabel.night import Night, Pass, open_table, plan_night
from jobs.relabel.upkeep import Upkeep
from jobs.relabel.worklist import Counts, Reason, RemovedImages, Worklist, open_worklist
from schemas.errors import CommitConflictError, GateRefused, MasklakeError, StorageError
from schemas.relabel_spec import RelabelSpec

LEASE_TTL_S = 120.0


@dataclass
class PassSummary:
    """What was done with one model. counts: images by reason, before; status: as of `masklake infer`."""

    model_id: str
    status: str
    counts: dict[str, int]
    removed: int
    images: int = 0
    failed: int = 0
    unchanged: int = 0
    committed_version: int | None = None


@dataclass
class RelabelSummary:
    """What a run did; <lake>/runs/<run_id>/relabel.json.

    status: promoted | up_to_date | limited (the rest is for the next run) | complete (and not promoted, as
        the spec wants) | refused | failed. current: whose labels count after it. report: of the comparison
        with those that counted before.
    """

    run_id: str
    source: str
    lake: str
    model_id: str
    model: str | None
    status: str = "failed"
    current: str | None = None
    passes: list[PassSummary] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    report: str | None = None
    version: int | None = None
    seconds: float = 0.0
    error: str | None = None

    @property
    def images(self) -> int:
        return sum(done.images for done in self.passes)

    @property
    def has_rows(self) -> bool:
        """Whether there are rows in the table that name this run."""
        return any(done.images or done.removed or done.unchanged for done in self.passes)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@stoppable()
def run_relabel(spec: RelabelSpec, watcher: Watcher) -> RelabelSummary:
    """Do one night's work.

    Raises:
        UsageError: source, model, lake or spec cannot work, the model's categories contradict those of the
            labels that count, a rule of the gate cannot be evaluated, or this machine's clock is behind the
            table. Nothing was written.
        GateRefused: all is labelled, and a rule failed; the table stays on the old model.
        LeaseHeldError: another run is at work on this source.
        CommitConflictError: somebody switched the source's current model meanwhile; what was labelled stays.
        MasklakeError: the run ended early; what was committed stays, the next run goes on.
    """
    started = time.monotonic()
    job = prepare(spec.infer_spec())
    run_id = job.run_id.replace("infer-", "relabel-", 1)
    summary = RelabelSummary(
        run_id, job.source_uri, job.lake_uri, job.model_id, None if job.model is None else str(job.model)
    )
    job.storage.probe_conditional_put(job.lake_uri)
    holder = f"{run_id} on {socket.gethostname()}"
    key = "relabel:" + hashlib.blake2b(job.source_uri.encode(), digest_size=16).hexdigest()
    with (
        Lease.acquire(job.storage, job.lake_uri, key, holder, LEASE_TTL_S) as lease,
        Listing.of(spec.source, job.storage, job.lake_uri) as shards,
    ):
        run = _Run(spec, job, shards, lease, watcher, summary, started)
        try:
            run.work()
        except GateRefused as error:
            summary.status, summary.error = "refused", str(error)
            raise
        except BaseException as error:
            summary.error = str(error) or type(error).__name__
            raise
        finally:
            summary.seconds = time.monotonic() - started
            if summary.status not in ("up_to_date", "failed") or summary.has_rows:
                try:
                    run.write_records()
                except StorageError as error:  # what is committed stands, and why the run ended is worth more
                    watcher.note(f"the summary could not be written: {error}")
    return summary


@dataclass
class _Run:
    spec: RelabelSpec
    job: Job
    shards: Listing
    lease: Lease
    watcher: Watcher
    summary: RelabelSummary
    started: float

    def work(self) -> None:
        night = plan_night(self.spec, self.job)
        self.summary.current = night.current
        for note in night.notes:
            self.watcher.note(note)
        if night.unlabelled is not None:
            self._note_removed(night.unlabelled)
        if night.current not in (None, self.job.model_id) and not night.is_promoted:
            # Readers would not know whose labels count once two models have some.
            name = next((str(part.job.model) for part in night.passes[:-1]), None)
            self._promote(open_table(self.job), night.current, name, "it was the only model so far")
        for part in night.passes:
            if self._label(part).status == "limited":
                self.summary.status = "limited"
                table = open_table(self.job)
                if table is not None:
                    self.summary.current = current_of(table, self.job.source_uri)
                return
        self._publish(night)

    def write_records(self) -> None:
        spec = yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False)
        self._write("spec.yaml", spec)
        self._write("relabel.json", json.dumps(asdict(self.summary), indent=1))

    def _write(self, name: str, text: str) -> None:
        uri = f"{self.job.lake_uri}/runs/{self.summary.run_id}/{name}"
        self.job.storage.write_bytes(uri, text.encode())

    def _label(self, part: Pass) -> PassSummary:
        """Label what a model misses, within what is left of the budget, then see to the other rows."""
        unchanged: list[str] = []
        gone: list[RemovedImages] = []

        def hear(report: UnitReport) -> None:
            unchanged.extend(report.unchanged)
            if report.shard_gone:
                gone.append(RemovedImages(report.shard, report.shard_gone))

        with _Choice(part) as choice:
            choice.look(self.shards)
            counts = choice.work.counts
            by_reason = {str(reason): count for reason, count in counts.by_reason.items()}
            done = PassSummary(part.job.model_id, "", by_reason, counts.removed)
            self.summary.passes.append(done)
            self.watcher.note(f"{part.job.model_id}: {describe(counts)}")
            limits = self._limits()
            if choice.work.has_tasks and limits.are_reached(0):
                done.status = "limited"
                return done
            choice.max_images = None if math.isinf(limits.max_images) else int(limits.max_images)
            labelled = run_job(part.job, self.shards, self.watcher, choice, limits, hear)
            done.status, done.images, done.failed = labelled.status, labelled.images, labelled.failed
            if choice.is_cut:  # though some of those were found unchanged, or are gone
                done.status = "limited"
            done.unchanged = len(unchanged)
            done.removed += sum(len(removed.image_ids) for removed in gone)
            versions = choice.work.versions_of(unchanged)
            kept = self._upkeep(part.job.model_id).apply([*choice.work.removed(), *gone], versions)
            done.committed_version = kept if kept is not None else labelled.committed_version
        self.summary.version = done.committed_version
        return done

    def _note_removed(self, current: str) -> None:
        """Of the model whose labels count, where it cannot label what is new."""
        table = open_table(self.job)
        with open_worklist(self.shards, table, self.job.source_uri, current, None) as work:
            self._upkeep(current).apply(list(work.removed()), {})

    def _upkeep(self, model_id: str) -> Upkeep:
        job = self.job
        return Upkeep(job.lake_uri, job.storage, job.source_uri, model_id, self.summary.run_id)

    def _limits(self) -> Limits:
        budget = self.spec.budget
        return Limits(
            math.inf if budget.time_s is None else self.started + budget.time_s,
            math.inf if budget.max_images is None else budget.max_images - self.summary.images,
        )

    def _publish(self, night: Night) -> None:
        """All is labelled: compare, and let the new labels count."""
        table, new = open_table(self.job), self.job.model_id
        if night.rolled_back is not None:
            raise GateRefused(
                f"{self.summary.model or new} was rolled back ({night.rolled_back}) and is not promoted "
                "again; the table stays as it is. Move the alias to another model, or use `masklake promote`."
            )
        is_current = night.current == new
        if table is None or new not in table.model_ids() or (is_current and night.is_promoted):
            self.summary.status = "up_to_date"
            return
        self._check_unswitched(table, night)
        why = "its labels are complete"
        if night.current is not None and not is_current:
            self._pass_gate(table, night.current)
            why = f"it passed the gate against {night.current}"
        if self.spec.promote == "never":
            self.summary.status = "complete"
            return
        self._promote(table, new, self.summary.model, why)
        self.summary.status = "up_to_date" if is_current else "promoted"
        self.summary.current = new

    def _check_unswitched(self, table: LabelsTable, night: Night) -> None:
        """The gate compares with the labels that counted when the night began. Did somebody switch since?"""
        expected = None if night.current == self.job.model_id else night.current
        said = read_current(table).get(self.job.source_uri)
        if said is not None and said.model_id != expected:
            raise CommitConflictError(
                f"{said.by} made {said.name} current for {self.job.source_uri} while this run was at work; "
                f"{night.current or 'none'} was when it began. Nothing was promoted; run again."
            )

    def _promote(self, table: LabelsTable | None, model_id: str | None, model: str | None, why: str) -> None:
        assert table is not None, "there are no labels"
        assert model_id is not None
        if self.lease.lost:
            raise MasklakeError(
                "another run took the lease over while this one was paused: nothing was promoted."
            )
        by = f"masklake relabel, {self.summary.run_id}"
        self.summary.version = promote(table, [self.job.source_uri], model_id, model, by, why)

    def _pass_gate(self, table: LabelsTable, current: str) -> None:
        job, gate = self.job, self.spec.gate
        diff = diff_models(
            table,
            job.storage,
            job.source_uri,
            current,
            job.model_id,
            min_score=gate.min_score,
            match_iou=gate.match_iou,
            masks=gate.compare_masks,
        )
        failpoints.reach("gate_compared")
        aps = None
        if gate.annotations is not None:
            aps = (
                measure_ap(gate.annotations, table, job.storage, job.source_uri, current),
                measure_ap(gate.annotations, table, job.storage, job.source_uri, job.model_id),
            )
        results = judge(diff, gate, *(aps or (None, None)))
        folder = f"{job.lake_uri}/runs/{self.summary.run_id}"
        self.summary.report = write_diff_report(
            folder, job.storage, diff, table, self.spec.source, results, aps
        )
        self.summary.rules = [asdict(result) for result in results]
        for result in results:
            self.watcher.note(f"{'passed' if result.passed else 'failed'}: {result.text}")
        raise_if_refused(results, diff)


class _Choice:
    """What run_job is to do, by the worklist of the table's newest version, made anew when that changed."""

    def __init__(self, part: Pass) -> None:
        self._part = part
        self._version: int | None = -1
        self._tasks: Tasks | None = None
        self._opened = ExitStack()
        self.max_images: int | None = None
        self.is_cut = False  # whether max_images left something out
        self.work: Worklist

    def __enter__(self) -> _Choice:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __call__(self, job: Job, shards: Iterable[Shard]) -> tuple[Tasks, LabelsTable | None]:
        table = self.look(shards)
        if self._tasks is None:
            self._tasks = Tasks(self.work.tasks(self.max_images))
            self.is_cut = self.work.is_cut(self.max_images)
        return self._tasks, table

    def look(self, shards: Iterable[Shard]) -> LabelsTable | None:
        table = open_table(self._part.job)
        version = None if table is None else table.version
        if version != self._version:
            self._opened.close()
            self.work = self._opened.enter_context(self._part.compare(shards, table))
            self._version, self._tasks = version, None
        return table


def describe(counts: Counts) -> str:
    """`1,000 new, 20 changed, …` in one line."""
    parts = [f"{counts.by_reason[reason]:,} {str(reason).replace('_', ' ')}" for reason in Reason]
    estimated = f" ({counts.estimated:,} of them by estimate)" if counts.estimated else ""
    return f"{', '.join(parts)}, {counts.removed:,} removed{estimated}"
