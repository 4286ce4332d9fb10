"""Which model's labels are current, for each source: a property of the label table, and commits of it.

Enters: the label table, a model that labelled something, who wants the switch and why. Leaves: a version of
the table in which other labels are current, and the list of such switches.

    masklake.current = {"version": 7, "sources": {"s3://photos": {"model_id": "lite-…", "model": "facades@2",
                       "by": "ana", "at": "2026-11-23T02:10:00+00:00", "why": "", "before": [["lite-…", …]]}}}

"version" is that of the commit which wrote it. Its metadata says what it changed and names the change before,
so that the list is read from one to the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow.compute as pc
from deltalake import CommitProperties

from jobs.lake import failpoints
from jobs.lake.commit_on_top import commit_on_top
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import CorruptObjectError
from schemas.errors import (
    CommitConflictError,
    StorageError,
    UsageError,
)

_PROPERTY: Final = "masklake.current"
_EVENT: Final = "masklake_current"  # in a commit's metadata: promotion or rollback
_MAX_BEFORE = 10  # models that a rollback can go back through


@dataclass(frozen=True)
class ModelName:
    """A model. model: NAME@N of the registry; None where it was named by its model_id only."""

    model_id: str
    model: str | None

    def __str__(self) -> str:
        return self.model_id if self.model is None else f"{self.model} ({self.model_id})"


@dataclass(frozen=True)
class CurrentModel:
    """The model whose labels of a source are current, as the table says.

    by, at, why: of the switch that made it so; at: UTC, ISO 8601. before: the models that were current before
    it, the last one first, without those that were rolled back.
    """

    source: str
    model_id: str
    model: str | None
    by: str
    at: str
    why: str
    before: tuple[ModelName, ...]

    @property
    def name(self) -> ModelName:
        return ModelName(self.model_id, self.model)

    @property
    def previous(self) -> ModelName | None:
        """What a rollback goes back to."""
        return self.before[0] if self.before else None


@dataclass(frozen=True)
class Switch:
    """A promotion or a rollback, as its commit says.

    sources: of each source that it changed, the model since then and the one until then, None if it was open.
    """

    version: int
    event: str
    by: str
    at: str
    why: str
    sources: Mapping[str, tuple[ModelName, ModelName | None]]


def read_current(table: LabelsTable) -> dict[str, CurrentModel]:
    """What the version of the table says is current, by source; not of sources without a promotion.

    Raises:
        StorageError: the property is damaged.
    """
    return _read_property(table)[1]


def current_of(table: LabelsTable, source: str) -> str | None:
    """The model_id whose labels of a source are current; without a promotion the only one that has any.

    Returns:
        None where no model labelled the source, or several did and none was promoted.
    """
    said = read_current(table).get(source)
    if said is not None:
        return said.model_id
    models = labelled_sources(table).get(source, set())
    return next(iter(models)) if len(models) == 1 else None


def labelled_sources(table: LabelsTable) -> dict[str, set[str]]:
    """The sources that have rows in the table, and the models that made them."""
    models: dict[str, set[str]] = {}
    unclear = []
    for file in table.files():
        if file.sources.only is None:
            unclear.append(file)
        else:
            models.setdefault(file.sources.only, set()).add(file.model_id)
    for file in unclear:  # of another writer, or of a source with a very long name
        rows = table.dataset_of([file]).to_table(columns=["source"])
        for source in pc.unique(rows["source"]).to_pylist():
            models.setdefault(str(source), set()).add(file.model_id)
    return models


def promote(
    table: LabelsTable,
    sources: Collection[str],
    model_id: str,
    model: str | None,
    by: str,
    why: str,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Make a model's labels of some sources current, in one commit.

    Whether they are complete is for the caller to know.

    Args:
        table: at the version from which this was decided; it shows the newest afterwards. A source that was
            switched by somebody else since is a conflict.
        model: NAME@N, for people to read.

    Returns:
        The version in which it is so. Where it is so already, nothing is committed.

    Raises:
        UsageError: the model has no labels of one of the sources, or `by` or `why` is more than a line.
        CommitConflictError: somebody else switched one of the sources first. Nothing was changed.
        CommitStateUnknownError: a commit was sent, and the table could not be read since.
        StorageError: the store refused; nothing was changed.
    """
    if not sources:
        raise UsageError(f"{model_id} was to be promoted for no source; name one that it has labelled.")
    wanted = ModelName(model_id, model)

    def decide(said: Mapping[str, CurrentModel]) -> dict[str, _Decision]:
        labelled = labelled_sources(table)
        without = sorted(source for source in sources if model_id not in labelled.get(source, ()))
        if without:
            raise UsageError(
                f"{wanted} has no labels of {', '.join(without)} in the table at {table.uri}: label it "
                f"first, or promote another model. Nothing was changed."
            )
        return {
            source: (wanted, _before(said.get(source), wanted))
            for source in sorted(sources)
            if not _is_said(said.get(source), wanted)
        }

    return _switch(table, "promotion", sources, decide, by, why, clock, sleep)


def rollback(
    table: LabelsTable,
    sources: Collection[str] | None,
    by: str,
    why: str,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Make the labels of the model before current again, in one commit. Once more goes back one more.

    Args:
        table: as for promote().
        sources: None means all that were ever promoted.

    Returns:
        The version in which it is so.

    Raises:
        UsageError: one of the sources has no model before its current one. Others: as promote().
    """
    chosen = sorted(read_current(table) if sources is None else sources)

    def decide(said: Mapping[str, CurrentModel]) -> dict[str, _Decision]:
        first = [source for source in chosen if source not in said or said[source].previous is None]
        if first or not chosen:
            what = f"of {', '.join(first)} " if first else ""
            raise UsageError(
                f"no labels {what}were current before the present ones in the table at {table.uri}: there is "
                f"nothing to go back to; `masklake history` says what was. Nothing was changed."
            )
        labelled = labelled_sources(table)
        for source in chosen:
            before = said[source].before[0]
            if before.model_id not in labelled.get(source, ()):
                raise UsageError(
                    f"{before}, which was current before, has no labels of {source} any more in the table at "
                    f"{table.uri}: it was retired; promote another model. Nothing was changed."
                )
        return {source: (said[source].before[0], said[source].before[1:]) for source in chosen}

    return _switch(table, "rollback", chosen, decide, by, why, clock, sleep)


def history(table: LabelsTable) -> Iterator[Switch]:
    """The promotions and rollbacks up to the table's version, the newest first; one small read for each,
    when it is asked for.

    Raises:
        StorageError: a commit that the table names is gone from the log, or damaged.
    """
    version = _read_property(table)[0]
    while version is not None:
        info = table.commit_info(version)
        try:
            switch = Switch(
                version,
                info[_EVENT],
                info["by"],
                info["at"],
                info["why"],
                {
                    one["source"]: (
                        ModelName(*one["to"]),
                        ModelName(*one["from"]) if one["from"] else None,
                    )
                    for one in info["sources"]
                },
            )
            earlier: int | None = info["switch_before"]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptObjectError(
                f"version {version} of {table.uri} is not a promotion: {error!r}"
            ) from error
        assert earlier is None or earlier < version, f"version {version} names {earlier} as the one before"
        yield switch
        version = earlier


def rolled_back(table: LabelsTable, source: str, model_id: str) -> Switch | None:
    """The rollback that took a model's labels of a source back, unless they counted again since.

    Read are the switches down to the newest one of the source that names the model, and none where its labels
    are current.

    Raises:
        StorageError: as history().
    """
    said = read_current(table).get(source)
    if said is None or said.model_id == model_id:
        return None
    for switch in history(table):
        now, before = switch.sources.get(source, (None, None))
        if now is not None and now.model_id == model_id:
            return None
        if before is not None and before.model_id == model_id:
            return switch if switch.event == "rollback" else None
    return None


# What a source's entry is to be: the model, and those before it.
_Decision = tuple[ModelName, tuple[ModelName, ...]]
_Switch = tuple[Mapping[str, CurrentModel], Mapping[str, _Decision]]


def _is_said(said: CurrentModel | None, wanted: ModelName) -> bool:
    """Whether the table says it already, under the same name or a better one."""
    return (
        said is not None
        and said.model_id == wanted.model_id
        and (wanted.model is None or said.model == wanted.model)
    )


def _before(said: CurrentModel | None, wanted: ModelName) -> tuple[ModelName, ...]:
    if said is None:  # the wanted model has labels: whichever others have too, none of them was current
        return ()
    if said.model_id == wanted.model_id:
        return said.before
    return (said.name, *said.before)[:_MAX_BEFORE]


def _switch(
    table: LabelsTable,
    event: str,
    sources: Collection[str],
    decide: Callable[[Mapping[str, CurrentModel]], Mapping[str, _Decision]],
    by: str,
    why: str,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
) -> int:
    """Commit what is decided where it is not there. Gives the version that has it."""
    for what, text in (("by", by), ("why", why)):
        if not text.isprintable():
            raise UsageError(f"{what} {text!r}: wanted one line without control characters.")
    seen = {source: read_current(table).get(source) for source in sources}

    def choose() -> _Switch | None:
        said = read_current(table)
        _check_unswitched(table, seen, said)
        return (said, decided) if (decided := decide(said)) else None

    def send(switch: _Switch, commit_id: str) -> None:
        at = clock().astimezone(UTC).isoformat(timespec="seconds")
        _commit(table, event, *switch, by, why, at, commit_id)

    made = commit_on_top(
        table,
        choose,
        send,
        what=f"a {event}",
        if_unknown="Once it can, `masklake history` says whether it is there.",
        sleep=sleep,
    )
    return table.version if made is None else made[0]


def _check_unswitched(
    table: LabelsTable, seen: Mapping[str, CurrentModel | None], said: Mapping[str, CurrentModel]
) -> None:
    for source, model in seen.items():
        now = said.get(source)
        if now is not None and now != model:
            raise CommitConflictError(
                f"{now.by} made {now.name} current for {source} at {now.at}, after this was decided, in the "
                f"table at {table.uri} ({now.why or 'no reason given'}). Nothing was changed; look at what "
                f"is current now and run again."
            )


def _commit(
    table: LabelsTable,
    event: str,
    said: Mapping[str, CurrentModel],
    decided: Mapping[str, _Decision],
    by: str,
    why: str,
    at: str,
    commit_id: str,
) -> None:
    after = dict(said)
    for source, (name, before) in decided.items():
        after[source] = CurrentModel(source, name.model_id, name.model, by, at, why, before)
    from_ = {source: said[source].name if source in said else None for source in decided}
    metadata: dict[str, Any] = {
        _EVENT: event,
        "by": by,
        "at": at,
        "why": why,
        "commit_id": commit_id,
        "switch_before": _read_property(table)[0],
        "sources": [
            {"source": source, "to": _to_list(name), "from": _to_list(from_[source])}
            for source, (name, _) in decided.items()
        ],
    }
    value = {
        "version": table.version + 1,
        "sources": {source: _to_json(after[source]) for source in sorted(after)},
    }
    failpoints.reach("current_send")
    table.ask(
        "a commit to the log",
        lambda delta: delta.alter.set_table_properties(
            {_PROPERTY: json.dumps(value)},
            raise_if_not_exists=False,
            commit_properties=CommitProperties(custom_metadata=metadata, max_commit_retries=0),
        ),
    )
    failpoints.reach("current_put")


def _read_property(table: LabelsTable) -> tuple[int | None, dict[str, CurrentModel]]:
    """The version that wrote it, None where there is no property; and what it says."""
    text = table.delta.metadata().configuration.get(_PROPERTY)
    if text is None:
        return None, {}
    try:
        value = json.loads(text)
        said = {
            source: CurrentModel(
                source,
                one["model_id"],
                one["model"],
                one["by"],
                one["at"],
                one["why"],
                tuple(ModelName(*name) for name in one["before"]),
            )
            for source, one in value["sources"].items()
        }
        return int(value["version"]), said
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"property {_PROPERTY} of the table at {table.uri} is damaged or of a newer version ({error!r}); "
            f"set it as an earlier version of the table has it."
        ) from error


def _to_json(current: CurrentModel) -> dict[str, Any]:
    return {
        "model_id": current.model_id,
        "model": current.model,
        "by": current.by,
        "at": current.at,
        "why": current.why,
        "before": [_to_list(name) for name in current.before],
    }


def _to_list(name: ModelName | None) -> list[str | None] | None:
    return None if name is None else [name.model_id, name.model]
