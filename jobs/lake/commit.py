"""Commits: the one place where labels become visible.

Enters: fragments, as the driver receives them. Leaves: versions of the label table, each with a batch of
fragments in it, whole. The Committer decides over a CommitStore and a clock that it is given; DeltaStore is
the CommitStore over the Delta log.

A commit may succeed and report failure, when the reply is lost. So each carries a commit_id of its own, and
after any failure the table is opened anew and searched for it before anything is tried again. The app
transaction (app_id, number) is the fence against a second driver: the table takes a number from one of them
only. delta-rs compares numbers between the snapshot a commit starts from and what was committed since; that
the snapshot itself has the number we expect is for us to check.
"""

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltalake import CommitProperties, Transaction
from deltalake.transaction import AddAction

from jobs.lake import failpoints
from jobs.lake.fragments import PARTITION_COLUMN, Fragment
from jobs.lake.labels_table import LabelsTable, first_line
from schemas.errors import CommitConflictError, CommitStateUnknownError, MasklakeError, StorageError

_MAX_ATTEMPTS = 6
_NUMBER = "app_transaction"  # in a commit's metadata: the number of its app transaction
_FIRST_BACKOFF_S = 0.5  # doubled each time: 15.5 s in all, on top of the retries of the store's client
# No further attempt after it: each may be as long as that client's own patience (stores.py), several times.
_PATIENCE_S = 120.0


def app_id(source_uri: str, model_id: str) -> str:
    """The app transaction that all runs over one source with one model share."""
    return "infer:" + hashlib.blake2b(f"{source_uri}\0{model_id}".encode(), digest_size=16).hexdigest()


class CommitStore(Protocol):
    """A table that takes batches of fragments. Any method may raise anything."""

    def refresh(self) -> None:
        """Look at the newest version from here on."""

    def last_transaction(self, app_id: str) -> int | None:
        """The app transaction's number in the version looked at, None before the first."""

    def find_commit(self, commit_id: str) -> int | None:
        """The version that a commit made, None where the version looked at does not have it."""

    def append(
        self, fragments: Sequence[Fragment], app_id: str, transaction: int, metadata: Mapping[str, str | int]
    ) -> None:
        """Add the fragments in one version, unless the app transaction moved since the version looked at."""


@dataclass(frozen=True)
class _Batch:
    """What one commit holds. Once tried it never changes, for it may have gone through already."""

    fragments: tuple[Fragment, ...]
    commit_id: str


class Committer:
    """Collects fragments and commits them, each work unit once.

    Args:
        store: asked here for the app transaction's number, which is the fence for this run's whole life.
        app_id: see app_id().
        metadata: what every commit of this run says: run_id, model_id, spec_hash.
        every_s, every_images: a commit is due after so many seconds or images, whichever is first.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: CommitStore,
        app_id: str,
        metadata: Mapping[str, str | int],
        every_s: float,
        every_images: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._app_id = app_id
        self._metadata = dict(metadata)
        self._every_s = every_s
        self._every_images = every_images
        self._clock = clock
        self._sleep = sleep
        self._pending: list[Fragment] = []
        self._batch: _Batch | None = None
        self._seen_units: set[str] = set()
        self._refused: MasklakeError | None = None
        self._last_commit_s = clock()
        self._transaction = store.last_transaction(app_id) or 0
        self._unknown = False  # whether a commit was sent and the table could not be looked at since
        self.committed_version: int | None = None
        self.num_committed_ok = 0
        self.num_committed_failed = 0

    @property
    def num_pending(self) -> int:
        """Images that were added and are not committed yet."""
        waiting = [*self._pending, *(self._batch.fragments if self._batch else ())]
        return sum(fragment.num_rows for fragment in waiting)

    def add(self, fragment: Fragment) -> bool:
        """Take a fragment for the next commit.

        Returns:
            False where its units are here already, made by another attempt: the file stays an orphan.

        Raises:
            MasklakeError: only some of its units are here already, so it can be neither taken nor left.
        """
        seen = [unit_id for unit_id in fragment.unit_ids if unit_id in self._seen_units]
        if len(seen) == len(fragment.unit_ids):
            return False
        if seen:
            raise MasklakeError(
                f"fragment {fragment.path} holds unit {seen[0]} a second time, next to new units. It was "
                f"not committed; run the same command again, which labels what is missing."
            )
        self._seen_units.update(fragment.unit_ids)
        self._pending.append(fragment)
        return True

    def due(self) -> bool:
        """Whether it is time to commit."""
        waited_s = self._clock() - self._last_commit_s
        return self.num_pending > 0 and (waited_s >= self._every_s or self.num_pending >= self._every_images)

    def commit(self) -> int | None:
        """Make all that was added visible, atomically. After a StorageError, calling it again is safe.

        Returns:
            The table's version that has it; None where nothing was waiting.

        Raises:
            CommitConflictError: another run commits under the same app transaction. Of the batch nothing is
                in the table, and this Committer will commit nothing more.
            CommitStateUnknownError: the commit was sent, and the table could not be read since.
            StorageError: the store refused; the batch is not in the table.
        """
        if self._refused is not None:
            raise self._refused
        version = None
        # A batch left over from a failed call goes first and alone: it may have gone through as it was.
        while self._batch is not None or self._pending:
            if self._batch is None:
                self._batch = _Batch(tuple(self._pending), uuid.uuid4().hex)
                self._pending = []
            version = self._commit_batch(self._batch)
            self._transaction += 1
            self.committed_version = version
            self.num_committed_ok += sum(fragment.num_ok for fragment in self._batch.fragments)
            self.num_committed_failed += sum(fragment.num_failed for fragment in self._batch.fragments)
            self._batch = None
        self._last_commit_s = self._clock()
        failpoints.reach("commit_done")
        return version

    def _commit_batch(self, batch: _Batch) -> int:
        """Look, send where the batch is not there, look again. Gives the version that has it."""
        failure: Exception | None = None
        started_s = self._clock()
        for attempt in range(_MAX_ATTEMPTS + 1):
            if attempt:
                if self._clock() - started_s > _PATIENCE_S:
                    break
                self._sleep(_FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                version = self._look_for(batch)
                if version is None and attempt < _MAX_ATTEMPTS:
                    self._send(batch)
                    version = self._look_for(batch)
                if version is not None:
                    return version
            except CommitConflictError:
                raise
            except Exception as error:  # of the store's client; whatever it was, the batch may be there: look
                failure = error
        raise self._give_up(failure, attempt) from failure

    def _look_for(self, batch: _Batch) -> int | None:
        self._store.refresh()
        version = self._store.find_commit(batch.commit_id)
        last_transaction = self._store.last_transaction(self._app_id) or 0
        self._unknown = False
        if version is None and last_transaction != self._transaction:
            self._refused = self._conflict(last_transaction)
            raise self._refused
        return version

    def _send(self, batch: _Batch) -> None:
        self._unknown = True
        failpoints.reach("commit_send")
        self._store.append(batch.fragments, self._app_id, self._transaction + 1, self._describe(batch))
        failpoints.reach("commit_put")

    def _describe(self, batch: _Batch) -> dict[str, str | int]:
        return {
            **self._metadata,
            "app_id": self._app_id,
            "commit_id": batch.commit_id,
            "num_images": sum(fragment.num_rows for fragment in batch.fragments),
            "num_ok": sum(fragment.num_ok for fragment in batch.fragments),
            "num_failed": sum(fragment.num_failed for fragment in batch.fragments),
        }

    def _conflict(self, last_transaction: int) -> CommitConflictError:
        return CommitConflictError(
            f"another run committed labels of the same source and model: its commit is number "
            f"{last_transaction}, this run's last was {self._transaction}. {self.num_pending} images of this "
            f"run were not committed, what it committed before stays. Let the other run end, then run the "
            f"same command again."
        )

    def _give_up(self, failure: Exception | None, num_attempts: int) -> MasklakeError:
        reason = first_line(failure) if failure else "it does not show up in the table"
        if self._unknown:
            return CommitStateUnknownError(
                f"a commit of {self.num_pending} images was sent, and the label table could not be read "
                f"since: {reason}. Once it can, run the same command again: it labels what is missing."
            )
        return StorageError(
            f"a commit of {self.num_pending} images is not in the label table after {num_attempts} "
            f"attempts: {reason}. What was committed before stays; run the same command again."
        )


class DeltaStore:
    """A CommitStore over the label table.

    Args:
        table: open. The Committer's number is that of the version the table shows when the Committer is made,
            so plan from that version or a later one: a commit that another run made after the plan's version
            and before the Committer's would be neither in the plan nor noticed.
    """

    def __init__(self, table: LabelsTable) -> None:
        self._table = table
        self._searched_version = table.version
        self._found: dict[str, int] = {}  # commit_id -> version, of the versions since this store was made
        self._numbers: dict[str, int | None] = {}  # app_id -> number, as of _searched_version
        self._in_doubt = False

    def refresh(self) -> None:
        if self._in_doubt:
            self._table.reopen()
            self._numbers.clear()
            self._in_doubt = False
        else:
            self._table.refresh()

    def last_transaction(self, app_id: str) -> int | None:
        self._read_new_versions()
        # deltalake reads every version since the last checkpoint for it, a request each: once is enough.
        if app_id not in self._numbers:
            self._numbers[app_id] = self._table.ask(
                "reading the log", lambda delta: delta.transaction_version(app_id)
            )
        return self._numbers[app_id]

    def find_commit(self, commit_id: str) -> int | None:
        """Search the versions that came since this store was made."""
        self._read_new_versions()
        return self._found.get(commit_id)

    def _read_new_versions(self) -> None:
        version = self._table.version
        num_new = version - self._searched_version
        history = (
            self._table.ask("reading the log", lambda delta: delta.history(num_new)) if num_new > 0 else []
        )
        for commit in reversed(history):
            if "commit_id" in commit:
                self._found[commit["commit_id"]] = int(commit["version"])
            if (app_id := commit.get("app_id")) in self._numbers:
                if _NUMBER in commit:
                    self._numbers[app_id] = int(commit[_NUMBER])
                else:  # of a masklake that did not say it: ask the log
                    del self._numbers[app_id]
        self._searched_version = version  # last: a search that was interrupted is made again

    def append(
        self, fragments: Sequence[Fragment], app_id: str, transaction: int, metadata: Mapping[str, str | int]
    ) -> None:
        self._in_doubt = True
        # A call that hangs may commit yet. Of it and of what is sent in its stead one is refused, for both
        # carry the same number of the same app transaction.
        self._table.ask(
            "a commit to the log",
            lambda delta: delta.create_write_transaction(
                [_add_action(fragment) for fragment in fragments],
                mode="append",
                schema=delta.schema(),
                partition_by=[PARTITION_COLUMN],
                commit_properties=CommitProperties(
                    app_transactions=[Transaction(app_id, transaction)],
                    custom_metadata={**metadata, _NUMBER: transaction},
                ),
            ),
        )
        self._in_doubt = False


def _add_action(fragment: Fragment) -> AddAction:
    return AddAction(
        path=fragment.path,  # delta-rs percent-encodes it for the log
        size=fragment.size_bytes,
        partition_values={PARTITION_COLUMN: fragment.model_id},
        modification_time=fragment.written_at_ms,
        data_change=True,
        stats=fragment.stats_json,
    )
