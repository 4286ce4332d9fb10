"""`masklake lake vacuum`: delete data files that no version of the table needs any more.

Enters: a lake and a grace period. Leaves: the table as it is, minus orphans (named by no version) and files
that a compaction or a retirement took out, both for longer than the grace period.

A younger orphan may belong to a run at work, which writes files first and names them in its next commit; and
a reader may still be at a version that names a file replaced a moment ago. So the grace period must be longer
than the time between a run's commits and than any reader takes. Versions that were current within the grace
period stay whole; older ones keep their log and may lose files.

deltalake's own vacuum is not used: it judges by the version that it was opened at, so that a file committed
since counts as an orphan; it writes two versions of its own, and does not say what it kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.care.doctor import held_leases
from jobs.care.store_files import StoredFile, list_data_files, read_replaced, stored_files
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import ObjectInfo, Storage
from schemas.errors import LeaseHeldError, UsageError

DEFAULT_GRACE_S = 7 * 86400.0
# A run commits every minute by default; an hour leaves room for another setting, a slow store, a clock ahead.
MIN_GRACE_S = 3600.0
_THREADS = 16


@dataclass(frozen=True)
class Vacuum:
    """What vacuum did, or with dry_run what it would have done.

    deleted: orphans and replaced files of more than the grace period; kept: the younger ones.
    oldest_whole_version: this version and all later ones have all their files.
    num_unfinished: temporary files beside what a killed process was writing, on a disk only.
    """

    lake: str
    dry_run: bool
    grace_s: float
    deleted: list[StoredFile]
    kept: list[StoredFile]
    oldest_whole_version: int
    num_unfinished: int

    @property
    def num_bytes(self) -> int:
        return sum(file.size_bytes for file in self.deleted)


def vacuum(
    lake_uri: str,
    storage: Storage,
    grace_s: float = DEFAULT_GRACE_S,
    *,
    dry_run: bool = False,
    force: bool = False,
    clock: Callable[[], float] = time.time,
) -> Vacuum:
    """Delete what nobody needs.

    Args:
        force: take a grace period of less than MIN_GRACE_S, as long as nobody is at work on the lake.
        clock: seconds since 1970, as the store's.

    Raises:
        UsageError: there is no label table, or the grace period is too short.
        LeaseHeldError: it is short, and somebody is at work.
        StorageError: the store refused; some files may be deleted, the table is whole.
    """
    lake_uri = storage.normalize(lake_uri)
    table = LabelsTable.open(lake_uri, storage)
    if grace_s < MIN_GRACE_S:
        _check_short_grace(lake_uri, storage, grace_s, force)
    stored = list_data_files(table, storage)
    table.refresh()  # after the listing: what was committed in between counts as named
    named = table.paths()
    unnamed = [info for path, info in stored.items() if path not in named]
    now_s = clock()
    replaced = read_replaced(table, storage, now_s - grace_s)
    deleted: list[StoredFile] = []
    kept: list[StoredFile] = []
    for file in stored_files(unnamed, table.uri, storage, clock):
        # A file may be older than the version that took it out of the table; one of another age is an orphan.
        age_s = min(file.age_s, now_s - replaced.at_s.get(file.path, 0.0))
        (deleted if age_s > grace_s else kept).append(StoredFile(file.path, file.size_bytes, age_s))
    unfinished = list(_unfinished_writes(table.uri, now_s - grace_s))
    if not dry_run:
        _delete_all((stored[file.path] for file in deleted), storage)
        for path in unfinished:
            with suppress(FileNotFoundError):
                os.unlink(path)
    return Vacuum(lake_uri, dry_run, grace_s, deleted, kept, replaced.oldest_version, len(unfinished))


def _check_short_grace(lake_uri: str, storage: Storage, grace_s: float, force: bool) -> None:
    if not force:
        raise UsageError(
            f"a grace period of {grace_s:g} s is less than {MIN_GRACE_S / 3600:g} h: a run at work would "
            f"lose files that it is about to commit, and readers those they read. Nothing was deleted; give "
            f"a longer one, or --force-grace where nobody is at work."
        )
    if leases := held_leases(lake_uri, storage):
        raise LeaseHeldError(
            f"run {leases[0].holder} is at work on {lake_uri}, so the grace period cannot be {grace_s:g} s. "
            f"Nothing was deleted; wait for its end, or give at least {MIN_GRACE_S / 3600:g}h."
        )


def _delete_all(infos: Iterable[ObjectInfo], storage: Storage) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda info: storage.delete(info.uri), infos):
            pass


def _unfinished_writes(table_uri: str, before_s: float) -> Iterable[Path]:
    """What LocalStore calls its temporary files; a process that was killed cannot take its own away."""
    if table_uri.startswith("file://"):
        for path in Path(table_uri.removeprefix("file://")).glob("*/.masklake-*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before_s:
                    yield path
