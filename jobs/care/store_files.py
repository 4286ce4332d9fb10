"""Files below the label table: what stands in the store, what the log says of it, how old it is.

Enters: an open table. Leaves: every data file there is, and which of them the newest version does not name:
orphans, which no version names, and files that a compaction or a retirement took out.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage
from schemas.errors import StorageError

_THREADS = 16
_LOG_ENTRIES_AT_ONCE = 64
# Writers' clocks differ; a log is read on for so long before the time asked for.
_CLOCK_SLACK_S = 3600.0


@dataclass(frozen=True)
class StoredFile:
    """A data file that the newest version does not name.

    path: below the table.
    age_s: since it was written or, of a file that was replaced, since then.
    """

    path: str
    size_bytes: int
    age_s: float


@dataclass(frozen=True)
class Replaced:
    """What the log says was taken out of the table: path -> when (seconds since 1970).

    oldest_version: the log was read back to here; every file that it or a later version names is either in
        the newest one or here.
    """

    at_s: dict[str, float]
    oldest_version: int


def list_data_files(table: LabelsTable, storage: Storage) -> dict[str, ObjectInfo]:
    """Every object below the table by its path there, the log and other hidden ones left out.

    List first and refresh the table afterwards: a file that is committed in between then counts as named.
    """
    return {info.uri[len(table.uri) + 1 :]: info for info in storage.list(table.uri)}


def read_replaced(
    table: LabelsTable, storage: Storage, since_s: float, wanted: Collection[str] | None = None
) -> Replaced:
    """Read the log backwards from the table's version for what was taken out since a time.

    Args:
        since_s: seconds since 1970; 0 for the whole log.
        wanted: stop once all of these paths were found.
    """
    entries = {_version(info.uri): info for info in storage.list(f"{table.uri}/_delta_log", "*.json")}
    versions = sorted((version for version in entries if version <= table.version), reverse=True)
    at_s: dict[str, float] = {}
    oldest = table.version
    missing = None if wanted is None else set(wanted)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(versions), _LOG_ENTRIES_AT_ONCE):
            if missing is not None and not missing:
                break
            chunk = versions[start : start + _LOG_ENTRIES_AT_ONCE]
            read = pool.map(lambda version: _read_entry(storage, entries[version]), chunk)
            newest_s = 0.0
            for version, (committed_s, removed) in zip(chunk, read, strict=True):
                at_s |= {path: when for path, when in removed.items() if path not in at_s}
                newest_s = max(newest_s, committed_s)
                if committed_s >= since_s:
                    oldest = version - 1  # what it took out was in the version before
            if missing is not None:
                missing -= at_s.keys()
            if newest_s < since_s - _CLOCK_SLACK_S:
                break
    return Replaced(at_s, max(oldest, 0))


def stored_files(
    infos: Iterable[ObjectInfo], table_uri: str, storage: Storage, clock: Callable[[], float] = time.time
) -> list[StoredFile]:
    """The files with their ages, in order of their paths; one that went meanwhile is left out."""

    def look(info: ObjectInfo) -> StoredFile | None:
        written_s = modified_s(storage, info.uri)
        if written_s is None:
            return None
        return StoredFile(info.uri[len(table_uri) + 1 :], info.size, clock() - written_s)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [file for file in pool.map(look, infos) if file is not None]
    return sorted(found, key=lambda file: file.path)


def modified_s(storage: Storage, uri: str) -> float | None:
    """When an object was written by the store's clock, seconds since 1970; None where there is none.

    Raises:
        StorageError: the store refused.
    """
    filesystem, path = storage.filesystem(uri)
    try:
        return float(filesystem.modified(path).timestamp())
    except FileNotFoundError:
        return None
    except Exception as error:  # of the store's client, which raises what it likes
        raise StorageError(f"{uri}: cannot say how old it is ({type(error).__name__}); run again") from error


def _read_entry(storage: Storage, info: ObjectInfo) -> tuple[float, dict[str, float]]:
    """When a version was committed (infinity where it does not say) and what it took out, when."""
    try:
        lines = storage.read_bytes(info).splitlines()
    except MissingObjectError:  # a log may be cleaned up while it is read
        return 0.0, {}
    committed_s, removed = float("inf"), {}
    for line in lines:
        kind = line[:16]  # most lines are long Add actions, which need no reading
        if b'"commitInfo"' in kind:
            committed_s = json.loads(line)["commitInfo"].get("timestamp", float("inf")) / 1000
        elif b'"remove"' in kind:
            action = json.loads(line)["remove"]
            removed[unquote(action["path"])] = action.get("deletionTimestamp", 0) / 1000
    return committed_s, removed


def _version(uri: str) -> int:
    stem = uri.rpartition("/")[2].removesuffix(".json")
    return int(stem) if stem.isdecimal() else 1 << 63  # not a version: a checkpoint's sidecar, say
