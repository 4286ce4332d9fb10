"""`masklake lake retire`: take the labels of models that nobody needs out of the table's newest version.

Enters: a lake, and models or an age. Leaves: one version of the table without these models' files. Earlier
versions name the files as before, and read until vacuum deletes them.

Files are partitioned by model_id, so whole files go. The commit is made from what was looked at right before
it: any commit that comes first, with rows of such a model or another promotion, has it looked at anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product

import pyarrow as pa
import pyarrow.compute as pc

from jobs.care.doctor import HeldLease, held_leases
from jobs.care.vacuum import DEFAULT_GRACE_S
from jobs.lake import failpoints
from jobs.lake.aliases import PREFIX, Aliases, open_version
from jobs.lake.commit import app_id
from jobs.lake.commit_on_top import commit_on_top
from jobs.lake.current import labelled_sources, read_current
from jobs.lake.done_images import LabelFile
from jobs.lake.fragments import PARTITION_COLUMN
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import read_model_id
from jobs.lake.rewrite import OldFile, commit_actions, remove_action
from jobs.lake.storage import Storage
from schemas.errors import UsageError

DEFAULT_OLDER_THAN_S = 90 * 86400.0


@dataclass(frozen=True)
class RetiredModel:
    """What of a model was taken out.

    num_rows: 0 for files whose number the log does not say. newest_row_at: UTC, ISO 8601.
    """

    model_id: str
    num_files: int
    num_rows: int
    num_bytes: int
    newest_row_at: str


@dataclass(frozen=True)
class Retirement:
    """What retire did, or with dry_run what it would have done.

    version: the table's, without the retired models; the one before it has them.
    kept: model_id -> why it stays.
    """

    lake: str
    dry_run: bool
    version: int
    retired: list[RetiredModel]
    kept: dict[str, str]


def retire(
    lake_uri: str,
    storage: Storage,
    model_ids: Sequence[str] = (),
    older_than_s: float = DEFAULT_OLDER_THAN_S,
    *,
    dry_run: bool = False,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> Retirement:
    """Take out the labels of models, all in one version.

    A model stays when a source has it as its current or previous model, or may have; when an alias leads to
    it; when a run labels with it, or may; or when its newest row is younger than `older_than_s`.

    Args:
        model_ids: these and no others, all of them or none; without any, all that may go.
        clock: of the rows' times.

    Raises:
        UsageError: there is no label table; a model that was named has no labels, or stays. Nothing was
            changed.
        CommitStateUnknownError: a commit was sent, and the table could not be read since.
        StorageError: the store refused, or the registry is damaged; nothing was changed.
    """
    look = _Look(storage.normalize(lake_uri), storage, tuple(model_ids), older_than_s, clock)
    table = LabelsTable.open(look.lake_uri, storage)
    for model_id in model_ids:
        table.choose_model(model_id)
    before = _labels_by_model(table)
    version, choice = table.version, look.choose(table, before)
    if choice.going and not dry_run:
        version, choice = _take_out(table, lambda: look.choose(table, before), sleep)
    retired = [labels.to_retired() for labels in choice.going]
    return Retirement(look.lake_uri, dry_run, version, retired, choice.kept)


@dataclass(frozen=True)
class _Labels:
    """A model's labels in one version of the table."""

    model_id: str
    files: tuple[LabelFile, ...]
    newest_at: datetime

    def has_rows_since(self, before: _Labels | None) -> bool:
        """Whether rows may have come. A compaction changes files and leaves the number of rows."""
        if before is None:
            return True
        if {file.path for file in self.files} == {file.path for file in before.files}:
            return False
        counts = [file.num_rows for file in (*self.files, *before.files)]
        return None in counts or self.num_rows != before.num_rows

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows or 0 for file in self.files)

    def to_retired(self) -> RetiredModel:
        return RetiredModel(
            self.model_id,
            len(self.files),
            self.num_rows,
            sum(file.size_bytes for file in self.files),
            self.newest_at.isoformat(timespec="seconds"),
        )


@dataclass(frozen=True)
class _Choice:
    """going: the models to take out, as they stand in one version of the table. kept: others, and why."""

    going: tuple[_Labels, ...]
    kept: dict[str, str]


@dataclass(frozen=True)
class _Look:
    """What was asked for."""

    lake_uri: str
    storage: Storage
    named: tuple[str, ...]
    older_than_s: float
    clock: Callable[[], datetime]

    def choose(self, table: LabelsTable, before: Mapping[str, _Labels]) -> _Choice:
        """Tell who may go, as of the table's version and of this moment.

        Args:
            before: the labels at the first look; models that got rows since stay.
        """
        now = _labels_by_model(table)
        kept: dict[str, str] = {}
        for model_id, reason in self._reasons(table, now, before):
            kept.setdefault(model_id, reason)
        kept = {model_id: kept[model_id] for model_id in now if model_id in kept}
        if refused := [f"{model_id} stays: {kept[model_id]}" for model_id in self.named if model_id in kept]:
            raise UsageError(
                f"{'; '.join(refused)} (table at {table.uri}). Nothing was changed; without --model-id all "
                f"goes that may."
            )
        wanted = self.named or tuple(now)
        going = (labels for model_id, labels in now.items() if model_id in wanted and model_id not in kept)
        return _Choice(tuple(going), kept)

    def _reasons(
        self, table: LabelsTable, now: Mapping[str, _Labels], before: Mapping[str, _Labels]
    ) -> Iterator[tuple[str, str]]:
        """(model_id, why it stays), of one model the most telling reason first."""
        labelled = labelled_sources(table)
        yield from _served(table, labelled)
        yield from self._aliased(now)
        yield from self._at_work(now, labelled)
        for model_id, labels in now.items():
            if labels.has_rows_since(before.get(model_id)):
                yield model_id, "rows of it were committed while this looked; run again"
            elif self._age_s(labels) < self.older_than_s:
                newest = f"{labels.newest_at:%Y-%m-%d %H:%M} UTC"
                yield model_id, f"its newest row is of {newest}, younger than {_days(self.older_than_s)}"

    def _aliased(self, now: Mapping[str, _Labels]) -> Iterator[tuple[str, str]]:
        """As jobs.lake.model_ids.resolve() has it: a model_id without a record is what no alias leads to."""
        names = Aliases(self.lake_uri, self.storage).names()
        records = [read_model_id(self.storage, self.lake_uri, model_id) for model_id in now] if names else []
        for name in names:
            version = open_version(f"{PREFIX}{name}", self.storage, self.lake_uri)
            for record in records:
                if record is not None and record.fingerprint == version.fingerprint:
                    yield record.model_id, f"alias {name} leads to it ({version})"

    def _at_work(
        self, now: Mapping[str, _Labels], labelled: Mapping[str, set[str]]
    ) -> Iterator[tuple[str, str]]:
        """A label job's lease is of its source and model. Of another source, or of another kind of job, it
        does not say the model: then models with young rows stay.
        """
        models = {app_id(source, model_id): model_id for source, model_id in product(labelled, now)}
        others: list[HeldLease] = []
        for lease in held_leases(self.lake_uri, self.storage):
            if lease.key in models:
                yield models[lease.key], f"run {lease.holder} labels with it"
            else:
                others.append(lease)
        for lease, labels in product(others, now.values()):
            if self._age_s(labels) < DEFAULT_GRACE_S:
                why = f"is at work, perhaps with it: it has rows younger than {_days(DEFAULT_GRACE_S)}"
                yield labels.model_id, f"run {lease.holder} {why}"

    def _age_s(self, labels: _Labels) -> float:
        return (self.clock() - labels.newest_at).total_seconds()


def _served(table: LabelsTable, labelled: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Models whose labels of a source are current, or would be after a rollback."""
    said = read_current(table)
    for source, current in sorted(said.items()):
        yield current.model_id, f"its labels of {source} are current"
        if current.previous is not None:
            yield current.previous.model_id, f"`masklake rollback` of {source} goes back to it"
    for source, models in sorted(labelled.items()):
        if source not in said:
            why = f"it is the only model that labelled {source}"
            if len(models) > 1:  # without one of two the other would be current, though nobody said so
                why = f"of those that labelled {source} none was promoted: `masklake promote` one"
            yield from ((model_id, why) for model_id in models)


def _labels_by_model(table: LabelsTable) -> dict[str, _Labels]:
    """Every model of the table's version, in alphabetical order."""
    actions = pa.table(table.delta.get_add_actions(flatten=True))
    files: dict[str, list[LabelFile]] = {}
    for file in table.files():
        files.setdefault(file.model_id, []).append(file)
    return {
        model_id: _Labels(model_id, tuple(files[model_id]), _newest_row_at(table, actions, model_id))
        for model_id in sorted(files)
    }


def _newest_row_at(table: LabelsTable, actions: pa.Table, model_id: str) -> datetime:
    column = "max.labeled_at"
    is_its = pc.equal(actions[f"partition.{PARTITION_COLUMN}"], pa.scalar(model_id))
    times = actions.filter(is_its)[column] if column in actions.column_names else None
    if times is None or times.null_count:  # of another writer
        times = table.dataset(model_id).to_table(columns=["labeled_at"])["labeled_at"]
    newest: datetime | None = pc.max(times).as_py()
    if newest is None:  # files without a row
        return datetime.min.replace(tzinfo=UTC)
    return newest if newest.tzinfo else newest.replace(tzinfo=UTC)


def _take_out(
    table: LabelsTable, look: Callable[[], _Choice], sleep: Callable[[float], None]
) -> tuple[int, _Choice]:
    """Take out what may go. Gives the version that has it, and what it was."""
    seen: list[_Choice] = []

    def choose() -> _Choice | None:
        seen.append(look())
        return seen[-1] if seen[-1].going else None

    def send(choice: _Choice, commit_id: str) -> None:
        failpoints.reach("retire_send")
        _commit(table, choice, commit_id)
        failpoints.reach("retire_put")

    made = commit_on_top(
        table,
        choose,
        send,
        what="a commit that takes models out",
        if_unknown="Run the same command again: it takes out what is left.",
        sleep=sleep,
    )
    return (table.version, seen[-1]) if made is None else made


def _commit(table: LabelsTable, choice: _Choice, commit_id: str) -> None:
    # The table is append-only, so deltalake takes Remove actions without a change of data only. Who follows
    # the table, rather than reads a version, keeps the rows: they were and are facts about their images.
    removes = [
        remove_action(OldFile(file.path, file.size_bytes), labels.model_id)
        for labels in choice.going
        for file in labels.files
    ]
    metadata = {
        "purpose": "retire",
        "models": [labels.model_id for labels in choice.going],
        "commit_id": commit_id,
    }
    commit_actions(table, removes, metadata)


def _days(seconds: float) -> str:
    return f"{seconds / 86400:g} d"
