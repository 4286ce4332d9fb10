"""What a run over a source consists of: the models that label, in turn, and whose labels count meanwhile.

Enters: a RelabelSpec, the lake. Leaves: passes, each with a worklist; nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain

import duckdb

from jobs.evaluate.run import check_annotations
from jobs.infer.job import Job, prepare
from jobs.lake.current import current_of, read_current, rolled_back
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord, check_categories, read_model_id
from jobs.lake.models import REGISTRY_PREFIX
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.shard_index import load_shard_index
from jobs.lake.shards import Shard
from jobs.lake.storage import CorruptObjectError
from jobs.relabel.worklist import Counts, Worklist, open_worklist
from schemas.errors import StorageError, UsageError
from schemas.relabel_spec import RelabelSpec
from schemas.specs import ModelSpec

# Rows are newer or older by their time, so a clock that is behind the table's would hide what it labels.
_CLOCK_PATIENCE_S = 5.0
# Fewer labelled images may all be gone without anybody being asked.
_FEW_IMAGES = 100


@dataclass(frozen=True)
class Pass:
    """One model over the source. current_id: whose labels are stale where this model has none."""

    spec: RelabelSpec
    job: Job
    current_id: str | None

    @contextmanager
    def compare(self, shards: Iterable[Shard], table: LabelsTable | None) -> Iterator[Worklist]:
        """The worklist, as of the table's version."""
        job = self.job
        index, current_index = (
            {} if model_id is None else load_shard_index(job.storage, job.lake_uri, job.source_uri, model_id)
            for model_id in (job.model_id, self.current_id)
        )
        with open_worklist(
            shards,
            table,
            job.source_uri,
            job.model_id,
            self.current_id,
            retry=self.spec.failures.retry,
            order=self.spec.order,
            index=index,
            current_index=current_index,
        ) as work:
            yield work


@dataclass
class Night:
    """The passes of one run.

    current: the model_id whose labels count before it, None where there are none. is_promoted: the table says
    so, and it is not only that nobody else labelled the source. rolled_back: who took the job's model back
    from the source and when, if it did not count again since; such a model has no pass. unlabelled: the
    current model, where it cannot label what is new. notes: for people.
    """

    job: Job
    current: str | None = None
    is_promoted: bool = False
    rolled_back: str | None = None
    unlabelled: str | None = None
    passes: list[Pass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def compared_with(self) -> str | None:
        """The model whose labels the gate holds the job's against; None where there is no other."""
        return None if self.current == self.job.model_id else self.current

    @property
    def is_to_be_judged(self) -> bool:
        """Whether the gate is asked once all is labelled."""
        return self.rolled_back is None and not (self.compared_with is None and self.is_promoted)


def plan_night(spec: RelabelSpec, job: Job) -> Night:
    """Look at the lake.

    Args:
        job: of the spec's model.

    Raises:
        UsageError: the model's categories contradict those of the labels that count, a rule of the gate
            cannot be evaluated, or this machine's clock is behind the table.
        StorageError: the lake cannot be reached.
    """
    night = Night(job)
    table = open_table(job)
    if table is not None:
        _check_clock(table)
        night.current = current_of(table, job.source_uri)
        night.is_promoted = job.source_uri in read_current(table)
        if (switch := rolled_back(table, job.source_uri, job.model_id)) is not None:
            night.rolled_back = f"{switch.by}, {switch.at}"
    others = night.compared_with
    if table is not None and others is not None:
        record = read_model_id(job.storage, job.lake_uri, others)
        if record is not None:
            check_categories(record, job.record)
            _check_rules(spec, job, record)
        else:
            night.notes.append(
                f"which categories {others} has was not written down: that those of {job.model_id} agree is "
                "for you to know"
            )
        kept = _job_of_current(spec, job, table, others, night.notes) if spec.keep_current else None
        if kept is not None:
            night.passes.append(Pass(spec, kept, None))
        else:
            night.unlabelled = others
    if night.rolled_back is None:
        night.passes.append(Pass(spec, job, others))
    else:
        night.notes.append(
            f"{job.model or job.model_id} was rolled back ({night.rolled_back}): it labels nothing, and the "
            "run ends as one that a gate refused"
        )
    return night


def check_ground_truth(spec: RelabelSpec, night: Night, shards: Iterable[Shard]) -> None:
    """Refuse annotations by which the gate could measure no AP, before nights are spent on labelling.

    Of tar and Parquet shards only those images are known that the current model labelled.

    Raises:
        UsageError: there are none, they are not COCO's, or their names are not those of the source's images.
        StorageError: the store refused.
    """
    if spec.gate.annotations is None or not night.is_to_be_judged:
        return
    job = night.job
    uri = job.storage.normalize(spec.gate.annotations.removeprefix("coco:"))
    job.storage.check_reachable(uri, "gate.annotations")
    if not job.storage.exists(uri):
        raise UsageError(f"gate.annotations: there is nothing at {uri}; check the path.")
    try:
        check_annotations(uri, job.storage, *_image_ids(night, shards))
    except UsageError as error:
        raise UsageError(f"gate.annotations: {error}") from error


def _image_ids(night: Night, shards: Iterable[Shard]) -> tuple[Iterable[str], bool]:
    """Of the source, as far as they are known before it is read; and whether those are all."""
    names = set()
    for shard in shards:
        if shard.format == "files":
            columns = (part.objects.columns["image_id"] for part in shards)
            return map(str, chain.from_iterable(column.to_pylist() for column in columns)), True
        names.add(shard.name)
    table = open_table(night.job)
    if table is None or night.current is None:
        return (), False
    in_source = duckdb.ColumnExpression("source") == duckdb.ConstantExpression(night.job.source_uri)
    rows = table.to_current(night.current).filter(in_source).select("image_id, shard").fetchall()
    return (image_id for image_id, shard in rows if shard in names), False


def too_many_removed(spec: RelabelSpec, model_id: str, counts: Counts) -> str | None:
    """Why a pass is not to be made: so much is gone from the source that a mistake is likelier."""
    share = spec.budget.max_removed
    if counts.labelled < _FEW_IMAGES or counts.removed <= share * counts.labelled:
        return None
    return (
        f"{counts.removed:,} of {counts.labelled:,} images that {model_id} labelled are not in "
        f"{spec.source.uri} any more, over budget.max_removed {100 * share:.4g}%: was source.include "
        "narrowed, or is a part of the source away? Nothing of this model was changed; if they are gone for "
        "good, run once with --set budget.max_removed=100%."
    )


def open_table(job: Job) -> LabelsTable | None:
    """The newest version, None where the lake has no table yet."""
    if not LabelsTable.exists(job.lake_uri, job.storage):
        return None
    return LabelsTable.open(job.lake_uri, job.storage)


def _job_of_current(
    spec: RelabelSpec, job: Job, table: LabelsTable, current: str, notes: list[str]
) -> Job | None:
    """What labels as the current model does; None, with a note, where that cannot be had."""
    known = read_current(table).get(job.source_uri)
    record = read_model_id(job.storage, job.lake_uri, current)
    registry = ModelRegistry(job.lake_uri, job.storage)
    name = None if known is None else known.model
    version = None if record is None else _find_version(registry, name, record.fingerprint)
    problem = "it is not in the lake's registry"
    if version is not None and record is not None:
        try:
            kept = prepare(spec.infer_spec(ModelSpec(uri=f"{REGISTRY_PREFIX}{version}", **record.settings)))
        except StorageError as error:
            is_there = job.storage.exists(registry.weights_uri(version))
            if is_there and not isinstance(error, CorruptObjectError):
                raise
            problem = str(error)
        else:
            if kept.model_id == current:
                return kept
            problem = f"here it labels as {kept.model_id}, in {kept.precision}"
    notes.append(
        f"until {job.model_id} is promoted, new images get no labels of {current}, which count: {problem}"
    )
    return None


def _find_version(registry: ModelRegistry, name: str | None, fingerprint: str) -> ModelVersion | None:
    """The version that was promoted, NAME@N; where only a model_id was, one with these weights."""
    if name is not None:
        try:
            return registry.open(name)
        except UsageError:  # there is no such version any more
            return None
    versions = (version for model in registry.names() for version in registry.versions(model))
    return next((version for version in versions if version.fingerprint == fingerprint), None)


def _check_rules(spec: RelabelSpec, job: Job, current: ModelIdRecord) -> None:
    """Refuse what the gate would refuse to judge, before nights are spent on labelling.

    Raises:
        UsageError: neither model knows a category that has rules.
    """
    categories = {*current.categories, *job.record.categories}
    known = {name for _, name in categories} | {str(category_id) for category_id, _ in categories}
    unknown = [name for name in spec.gate.categories if name not in known]
    if unknown:
        names = ", ".join(sorted({name for _, name in categories}))
        raise UsageError(
            f"gate.categories: neither {current.model_id} nor {job.model_id} has a category "
            f"{', '.join(map(repr, unknown))}; they have: {names}."
        )


def _check_clock(table: LabelsTable) -> None:
    """Wait until this machine's clock is past the newest row, if that takes a moment only.

    Raises:
        UsageError: it takes longer.
    """
    newest = table.newest_row_at()
    ahead_s = 0.0 if newest is None else (newest - datetime.now(UTC)).total_seconds()
    if ahead_s > _CLOCK_PATIENCE_S:
        raise UsageError(
            f"this machine's clock is {ahead_s:,.0f} s behind the table, whose newest row is of {newest}: "
            "what is labelled now would count as older than what is there; set the clock right"
        )
    time.sleep(max(0.0, ahead_s))
