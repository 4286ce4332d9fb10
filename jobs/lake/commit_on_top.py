"""A commit that depends on what is in the table: look, decide, send, look again.

Enters: what to commit in view of a version, and how it is sent. Leaves: one version that has it, or none.

A commit names the one version that it may become, the next: deltalake's own retries are off, because they
take a transaction that removes a file which another has removed since (1.6.6), and the rows would stand there
twice. So each try decides anew in view of the newest version, and is lost when any other commit comes first.
A commit may succeed and report failure, so each carries a commit_id that is searched for before another try.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from jobs.lake.labels_table import LabelsTable, first_line
from schemas.errors import (
    CommitConflictError,
    CommitStateUnknownError,
    MasklakeError,
    StorageError,
    UsageError,
)

# A run commits once a minute; dozens of runs at once would still leave room within these.
_MAX_ATTEMPTS = 20
_MAX_PAUSE_S = 2.0

Choice = TypeVar("Choice")


def commit_on_top(
    table: LabelsTable,
    choose: Callable[[], Choice | None],
    send: Callable[[Choice, str], None],
    *,
    what: str,
    if_unknown: str,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[int, Choice] | None:
    """Commit what is chosen, once. The table shows the newest version afterwards.

    Args:
        choose: what to commit on top of the version that the table shows; None: nothing. Its UsageError or
            CommitConflictError ends this, any other error is looked past.
        send: one try to commit it as the next version, with this commit_id in the commit's metadata.
        what: the commit, for messages: "a promotion".
        if_unknown: what to do then, a sentence.

    Returns:
        The version that a commit made, and what was chosen for it; None where there was nothing to commit.

    Raises:
        CommitStateUnknownError: a commit was sent, and the table could not be read since.
        StorageError: the store refused; nothing was committed.
    """
    sent: dict[str, Choice] = {}
    failure: Exception | None = None
    unknown = False  # whether a commit was sent and the table could not be looked at since
    searched_version = table.version
    for attempt in range(_MAX_ATTEMPTS + 1):
        try:
            if unknown:
                table.reopen()
            else:
                table.refresh()
            if (made := _find_commit(table, sent, searched_version)) is not None:
                return made
            searched_version = table.version
            unknown = False
            if (choice := choose()) is None:
                return None
            if attempt == _MAX_ATTEMPTS:
                break
            commit_id = uuid.uuid4().hex
            sent[commit_id] = choice
            unknown = True
            send(choice, commit_id)
        except (UsageError, CommitConflictError):
            raise
        except Exception as error:  # another commit came first, or the store failed; the next look tells
            failure = error
            sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.05 * 2**attempt)))
    raise _give_up(table, what, if_unknown if unknown else None, failure)


def _find_commit(
    table: LabelsTable, sent: dict[str, Choice], searched_version: int
) -> tuple[int, Choice] | None:
    """Among the versions since another."""
    num_new = table.version - searched_version
    if not sent or num_new <= 0:
        return None
    for commit in table.ask("reading the log", lambda delta: delta.history(num_new)):
        if (commit_id := commit.get("commit_id")) in sent:
            return int(commit["version"]), sent[commit_id]
    return None


def _give_up(
    table: LabelsTable, what: str, if_unknown: str | None, failure: Exception | None
) -> MasklakeError:
    reason = first_line(failure) if failure else "it does not show up in the table"
    if if_unknown is not None:
        return CommitStateUnknownError(
            f"{what} was sent to the table at {table.uri}, which could not be read since: {reason}. "
            f"{if_unknown}"
        )
    return StorageError(
        f"{what} is not in the table at {table.uri} after {_MAX_ATTEMPTS} attempts: {reason}. The table is "
        f"as it was; run the same command again."
    )
