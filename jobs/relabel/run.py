"""`masklake relabel`: bring a lake's labels up to its source and its model, and publish what passes.

    compare (source, table, model) -> current model: what is new -> new model: what is missing
        -> rows of what is gone -> all there? -> diff -> gate -> promote

Images that fail or cannot be read keep a model from being promoted that night, and nothing else from being
done.

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

from cluster.session import connect, shutdown
from cluster.stop_wish import stoppable
from jobs.infer.job import Job, prepare
from jobs.infer.progress import Watcher
from jobs.infer.read import Tasks
from jobs.infer.run import Limits, ShardReadError, run_job
from jobs.infer.units import UnitReport
from jobs.lake import failpoints
from jobs.lake.current import current_of, promote, read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.listing import Listing
from jobs.lake.shards import Shard
from jobs.relabel.diff import diff_models
from jobs.relabel.diff_report import write_diff_report
from jobs.relabel.gate import judge, judge_first, measure_ap, raise_if_refused
from jobs.relabel.night import (
    Night,
    Pass,
    check_ground_truth,
    open_table,
    plan_night,
    too_many_removed,
)
from jobs.relabel.upkeep import Upkeep
from jobs.relabel.verdict import Question, Verdict, ask, keep_verdict, last_verdict
from jobs.relabel.worklist import Counts, Reason, RemovedImages, Worklist, open_worklist
from schemas.errors import (
    CommitConflictError,
    FailureBudgetExceeded,
    GateRefused,
    MasklakeError,
    StorageError,
)
from schemas.labels import Status
from schemas.relabel_spec import RelabelSpec

LEASE_TTL_S = 120.0


@dataclass
class PassSummary:
    """What was done with one model.

    run_id: stands in the rows of what was labelled; in the others that of the whole run does. counts: images
    by reason, before; removed: images that were marked so; status, error: as of `masklake infer`.
    """

    model_id: str
    run_id: str
    status: str
    counts: dict[str, int]
    removed: int = 0
    images: int = 0
    failed: int = 0
    unchanged: int = 0
    committed_version: int | None = None
    error: str | None = None


@dataclass
class RelabelSummary:
    """What a run did; <lake>/runs/<run_id>/relabel.json.

    status: promoted | up_to_date | limited (the rest is for the next run) | complete (and not promoted, as
        the spec wants) | refused | failed (nothing was promoted, what was labelled stays). current: whose
        labels count after it. report: of the comparison with those that counted before.
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
        """Whether there may be rows in the table that name this run."""
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
        GateRefused: all is labelled, and a rule failed; or too many images are gone from the source, and
            nothing was labelled. The table stays on the old model.
        FailureBudgetExceeded, ShardReadError: of one of the models, once both had their turn.
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
        Lease.acquire(job.storage, job.lake_uri, key, holder, LEASE_TTL_S, leased=job.source_uri) as lease,
        Listing.of(spec.source, job.storage, job.lake_uri) as shards,
        ExitStack() as connection,
    ):
        run = _Run(spec, job, shards, lease, watcher, summary, started, connection)
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
    connection: ExitStack  # to Ray, of all passes; a night without work opens none
    is_connected: bool = False
    trouble: MasklakeError | None = None  # the first that kept images from being labelled

    def work(self) -> None:
        night = plan_night(self.spec, self.job)
        check_ground_truth(self.spec, night, self.shards)
        self.summary.current = night.current
        for note in night.notes:
            self.watcher.note(note)
        if night.unlabelled is not None:
            self._note_removed(night.unlabelled)
        if night.current not in (None, self.job.model_id) and not night.is_promoted:
            # Readers would not know whose labels count once two models have some.
            name = next((str(part.job.model) for part in night.passes[:-1]), None)
            self._promote(open_table(self.job), night.current, name, "it was the only model so far")
        is_limited = any(self._label(part).status == "limited" for part in night.passes)
        if self.trouble is not None:
            raise self.trouble
        if is_limited:
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
        """Label what a model misses, within what is left of the budget, then see to the other rows.

        Where images failed or could not be read the others are committed, and the night goes on.
        """
        unchanged: list[str] = []
        gone: list[RemovedImages] = []

        def hear(report: UnitReport) -> None:
            done.images += report.num_images
            done.failed += report.num_failed
            unchanged.extend(report.unchanged)
            if report.shard_gone:
                gone.append(RemovedImages(report.shard, report.shard_gone))

        with _Choice(part) as choice:
            choice.look(self.shards)
            counts = choice.work.counts
            by_reason = {str(reason): count for reason, count in counts.by_reason.items()}
            done = PassSummary(part.job.model_id, part.job.run_id, "", by_reason)
            self.summary.passes.append(done)
            self.watcher.note(f"{part.job.model_id}: {describe(counts)}")
            self._check_removed(part.job.model_id, counts)
            limits = self._limits()
            if choice.work.has_tasks and limits.are_reached(0):
                done.status = "limited"
                return done
            choice.max_images = None if math.isinf(limits.max_images) else int(limits.max_images)
            if choice.work.has_tasks:
                self._connect()
            try:
                labelled = run_job(part.job, self.shards, self.watcher, choice, limits, hear)
                done.status, done.committed_version = labelled.status, labelled.committed_version
            except (FailureBudgetExceeded, ShardReadError) as error:
                done.status, done.error = "failed", str(error)
                self.trouble = self.trouble or error
                table = open_table(part.job)
                done.committed_version = None if table is None else table.version
                self.watcher.note(f"{part.job.model_id}: {error}")
            if choice.is_cut:  # though some of those were found unchanged, or are gone
                done.status = "limited"
            done.unchanged = len(unchanged)
            versions = choice.work.versions_of(unchanged)
            kept = self._upkeep(part.job.model_id).apply([*choice.work.removed(), *gone], versions)
            done.removed = kept.num_removed
            if kept.version is not None:
                done.committed_version = kept.version
        self.summary.version = done.committed_version
        return done

    def _connect(self) -> None:
        """Start Ray or join its cluster; both passes connect within this, and it is started once."""
        if not self.is_connected:
            connect()
            self.is_connected = True
            self.connection.callback(shutdown)

    def _check_removed(self, model_id: str, counts: Counts) -> None:
        if problem := too_many_removed(self.spec, model_id, counts):
            raise GateRefused(problem)

    def _note_removed(self, current: str) -> None:
        """Of the model whose labels count, where it cannot label what is new."""
        table = open_table(self.job)
        with open_worklist(self.shards, table, self.job.source_uri, current, None) as work:
            self._check_removed(current, work.counts)
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
        if table is None or new not in table.model_ids() or not night.is_to_be_judged:
            self.summary.status = "up_to_date"
            return
        self._check_unswitched(table, night)
        old = night.compared_with
        self._pass_gate(table, old)
        why = "its labels are complete" if old is None else f"it passed the gate against {old}"
        if self.spec.promote == "never":
            self.summary.status = "complete"
            return
        self._promote(table, new, self.summary.model, why)
        self.summary.status = "up_to_date" if night.current == new else "promoted"
        self.summary.current = new

    def _check_unswitched(self, table: LabelsTable, night: Night) -> None:
        """The gate compares with the labels that counted when the night began. Did somebody switch since?"""
        said = read_current(table).get(self.job.source_uri)
        if said is not None and said.model_id != night.compared_with:
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

    def _pass_gate(self, table: LabelsTable, old: str | None) -> None:
        """Ask the gate, unless it was asked about these very labels before. old: None: nothing to compare."""
        job = self.job
        question = ask(table, job.storage, job.source_uri, old, job.model_id, self.spec.gate)
        verdict = last_verdict(job.storage, job.lake_uri, question)
        if verdict is not None:
            self.watcher.note(
                f"nothing has changed since {verdict.run_id} asked the gate: nothing is compared again"
            )
        else:
            verdict = self._judge_first(table, question) if old is None else self._judge(table, old, question)
            keep_verdict(job.storage, job.lake_uri, verdict)
        self.summary.report = verdict.report
        self.summary.rules = [asdict(result) for result in verdict.results]
        for result in verdict.results:
            self.watcher.note(f"{'passed' if result.passed else 'failed'}: {result.text}")
        raise_if_refused(verdict.results, job.source_uri, old, job.model_id)

    def _judge_first(self, table: LabelsTable, question: Question) -> Verdict:
        """No labels of the source count yet: by the rules that need one model only."""
        job, gate = self.job, self.spec.gate
        statuses = table.to_current(job.model_id).aggregate("source, status, count(*)").fetchall()
        counts = {status: number for source, status, number in statuses if source == job.source_uri}
        ap = None
        if gate.annotations is not None:
            ap = measure_ap(gate.annotations, table, job.storage, job.source_uri, job.model_id)
        results = judge_first(counts.get(str(Status.OK), 0), counts.get(str(Status.FAILED), 0), gate, ap)
        return Verdict(question, self.summary.run_id, results, None)

    def _judge(self, table: LabelsTable, old: str, question: Question) -> Verdict:
        job, gate = self.job, self.spec.gate
        diff = diff_models(
            table,
            job.storage,
            job.source_uri,
            old,
            job.model_id,
            min_score=gate.min_score,
            match_iou=gate.match_iou,
            masks=gate.compare_masks,
        )
        failpoints.reach("gate_compared")
        aps = None
        if gate.annotations is not None:
            aps = (
                measure_ap(gate.annotations, table, job.storage, job.source_uri, old),
                measure_ap(gate.annotations, table, job.storage, job.source_uri, job.model_id),
            )
        results = judge(diff, gate, *(aps or (None, None)))
        folder = f"{job.lake_uri}/runs/{self.summary.run_id}"
        report = write_diff_report(folder, job.storage, diff, table, self.spec.source, results, aps)
        return Verdict(question, self.summary.run_id, results, report)


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
