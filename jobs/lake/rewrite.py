"""Replace files of the label table by others with the same rows, in one version.

Enters: files to take out and the ones that hold their rows now. Leaves: a version of the table in which every
row stands exactly once, as before; or none, where somebody else took one of the files out first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import CommitProperties
from deltalake.transaction import AddAction, RemoveAction

from jobs.lake import failpoints
from jobs.lake.commit_on_top import commit_on_top
from jobs.lake.fragments import PARTITION_COLUMN
from jobs.lake.labels_table import LabelsTable


@dataclass(frozen=True)
class OldFile:
    """A file to take out. path: below the table."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class MergedFile:
    """A written file that no version names yet, and those whose rows it holds, all of them.

    stats_json: as in Fragment.
    """

    path: str
    model_id: str
    size_bytes: int
    num_rows: int
    written_at_ms: int
    stats_json: str
    replaces: tuple[OldFile, ...]


@dataclass(frozen=True)
class Rewrite:
    """What became of merged files.

    version: the one that has `done`; None where nothing was left to do.
    given_up: a file they were to replace is gone from the table; theirs are orphans.
    """

    version: int | None
    done: tuple[MergedFile, ...]
    given_up: tuple[MergedFile, ...]


def replace_files(
    table: LabelsTable,
    merged: Sequence[MergedFile],
    metadata: Mapping[str, str | int],
    sleep: Callable[[float], None] = time.sleep,
) -> Rewrite:
    """Commit merged files in place of the ones they replace, all in one version.

    The table shows the newest version afterwards.

    Args:
        metadata: what the commit says of itself.

    Raises:
        CommitStateUnknownError: a commit was sent, and the table could not be read since. Whichever way it
            went, the table has the same rows.
        StorageError: the store refused; nothing was replaced.
    """

    def choose() -> tuple[MergedFile, ...] | None:
        return _replaceable(table, merged) or None

    def send(left: tuple[MergedFile, ...], commit_id: str) -> None:
        failpoints.reach("rewrite_send")
        _commit(table, left, {**metadata, "commit_id": commit_id})
        failpoints.reach("rewrite_put")

    made = commit_on_top(
        table,
        choose,
        send,
        what="a commit that replaces files",
        if_unknown="Its rows are the same either way; run the same command again.",
        sleep=sleep,
    )
    if made is None:
        return Rewrite(None, (), tuple(merged))
    version, replaced = made
    done = {file.path for file in replaced}
    return Rewrite(version, replaced, tuple(file for file in merged if file.path not in done))


def _replaceable(table: LabelsTable, merged: Sequence[MergedFile]) -> tuple[MergedFile, ...]:
    """Those whose old files the table still names, all of them."""
    live = table.paths()
    return tuple(file for file in merged if all(old.path in live for old in file.replaces))


def _commit(table: LabelsTable, merged: Sequence[MergedFile], metadata: Mapping[str, str | int]) -> None:
    # dataChange says to readers that follow the table: no row came or went. An append-only table takes it.
    adds = [
        AddAction(
            path=file.path,  # delta-rs percent-encodes paths for the log
            size=file.size_bytes,
            partition_values={PARTITION_COLUMN: file.model_id},
            modification_time=file.written_at_ms,
            data_change=False,
            stats=file.stats_json,
        )
        for file in merged
    ]
    removes = [remove_action(old, file.model_id) for file in merged for old in file.replaces]
    commit_actions(table, [*adds, *removes], metadata)


def remove_action(file: OldFile, model_id: str) -> RemoveAction:
    """Takes a file out of the newest version. An append-only table takes no other kind."""
    return RemoveAction(
        file.path,
        data_change=False,
        deletion_timestamp=time.time_ns() // 1_000_000,
        size=file.size_bytes,
        partition_values={PARTITION_COLUMN: model_id},
    )


def commit_actions(
    table: LabelsTable, actions: Sequence[AddAction | RemoveAction], metadata: Mapping[str, Any]
) -> None:
    """One try at the version after the table's; it fails where any other commit comes first."""
    table.ask(
        "a commit to the log",
        lambda delta: delta.create_write_transaction(
            [*actions],
            mode="append",
            schema=delta.schema(),
            partition_by=[PARTITION_COLUMN],
            commit_properties=CommitProperties(custom_metadata=dict(metadata), max_commit_retries=0),
        ),
    )
