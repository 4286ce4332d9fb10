"""Replace files of the label table by others with the same rows, in one version.

Enters: files to take out and the ones that hold their rows now. Leaves: a version of the table in which every
row stands exactly once, as before; or none, where somebody else took one of the files out first.

A commit names the one version that it may become: deltalake's own retries are off, because they take a
transaction that removes a file which another has removed since (1.6.6), and the rows would stand there twice.
So each try looks at the newest version anew, and is lost when any other commit comes first.
"""

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import CommitProperties
from deltalake.transaction import AddAction, RemoveAction

from jobs.lake import failpoints
from jobs.lake.fragments import PARTITION_COLUMN
from jobs.lake.labels_table import LabelsTable, first_line
from schemas.errors import CommitStateUnknownError, StorageError

# A run commits once a minute; dozens of runs at once would still leave room within these.
_MAX_ATTEMPTS = 20
_MAX_PAUSE_S = 2.0


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
    sent: dict[str, tuple[MergedFile, ...]] = {}
    failure: Exception | None = None
    unknown = False  # whether a commit was sent and the table could not be looked at since
    searched_version = table.version
    for attempt in range(_MAX_ATTEMPTS + 1):
        try:
            if unknown:
                table.reopen()
            else:
                table.refresh()
            found = _find_commit(table, sent, searched_version)
            searched_version = table.version
            left = _replaceable(table, merged)
            unknown = False
        except Exception as error:  # of the store's client; whatever it was, look again
            failure = error
            sleep(_pause_s(attempt))
            continue
        if found is not None:
            version, commit_id = found
            done = {file.path for file in sent[commit_id]}
            return Rewrite(version, sent[commit_id], tuple(file for file in merged if file.path not in done))
        if not left:
            return Rewrite(None, (), tuple(merged))
        if attempt == _MAX_ATTEMPTS:
            break
        commit_id = uuid.uuid4().hex
        sent[commit_id] = left
        unknown = True
        try:
            failpoints.reach("rewrite_send")
            _commit(table, left, {**metadata, "commit_id": commit_id})
            failpoints.reach("rewrite_put")
        except Exception as error:  # another commit came first, or the store failed; the next look tells
            failure = error
            sleep(_pause_s(attempt))
    reason = first_line(failure) if failure else "it does not show up in the table"
    if unknown:
        raise CommitStateUnknownError(
            f"a commit that replaces files of {table.uri} was sent, and the table could not be read since: "
            f"{reason}. Its rows are the same either way; run the same command again."
        )
    raise StorageError(
        f"files of {table.uri} could not be replaced in {_MAX_ATTEMPTS} attempts: {reason}. The table is as "
        f"it was; run the same command again."
    )


def _pause_s(attempt: int) -> float:
    return random.uniform(0, min(_MAX_PAUSE_S, 0.05 * 2**attempt))


def _find_commit(
    table: LabelsTable, sent: Mapping[str, object], searched_version: int
) -> tuple[int, str] | None:
    """The version that one of the commits made, and its commit_id."""
    num_new = table.version - searched_version
    if not sent or num_new <= 0:
        return None
    for commit in table.ask("reading the log", lambda delta: delta.history(num_new)):
        if (commit_id := commit.get("commit_id")) in sent:
            return int(commit["version"]), str(commit_id)
    return None


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
