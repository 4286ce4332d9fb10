"""`masklake lake doctor`: read the label table back and judge it.

Enters: a lake. Leaves: an Audit: what is wrong, what lies about, how much was looked at. Nothing is written.
Files are read in batches of rows, and the keys of all rows go into a DuckDB on disk, so that memory does not
grow with the table.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import duckdb

from jobs.care.file_check import FileCheck, LoggedFile, check_file, logged_files
from jobs.care.findings import Findings
from jobs.care.model_check import model_faults
from jobs.care.store_files import StoredFile, list_data_files, read_replaced, stored_files
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import CorruptObjectError, MissingObjectError, ObjectInfo, Storage

_THREADS = 4
_FILES_AT_ONCE = 4 * _THREADS
_SAMPLE_FILES = 64
_MAX_EXAMPLES = 20
# Of one image under one model, oldest row first: a row has its reason if it is the first, if the image had
# failed (a retry), was away or is now, or has other bytes. A run labels an image once in any case.
_DUPLICATES = f"""
    WITH repeated AS (
        SELECT *, lag(status) OVER image AS before, lag(content_hash) OVER image AS hash_before,
            row_number() OVER (PARTITION BY model_id, source, image_id, run_id) AS number_in_run
        FROM keys
        SEMI JOIN (
            SELECT model_id, source, image_id FROM keys GROUP BY ALL HAVING count(*) > 1
        ) USING (model_id, source, image_id)
        WINDOW image AS (PARTITION BY model_id, source, image_id ORDER BY labeled_at, run_id)
    )
    SELECT count(*) OVER (), model_id, source, image_id FROM repeated
    WHERE number_in_run > 1 OR (
        before = 'ok' AND status <> 'removed' AND (content_hash = hash_before OR status <> 'ok')
    )
    LIMIT {_MAX_EXAMPLES}
"""


@dataclass(frozen=True)
class HeldLease:
    """Somebody is at work on this lake, or died less than a lease's time to live ago."""

    key: str
    holder: str
    host: str
    expires_in_s: float


@dataclass(frozen=True)
class Audit:
    """What the doctor found.

    num_images: different (source, image_id) under each model; with fewer than rows some images have older
        rows, which the current view leaves out.
    num_masks_checked: decoded and compared with image and area; num_files_whole: files read with all columns.
    problems: one line for each kind; none in a sound table.
    orphans: data files that no version names. Not a problem: a run that died, or one at work, left them.
    replaced: data files that only older versions name, since a compaction or a retired model.
    unfinished_runs: without a summary: at work, or killed.
    """

    lake: str
    version: int
    num_files: int
    num_files_whole: int
    num_bytes: int
    num_rows: int
    num_images: int
    rows_by_status: dict[str, int]
    rows_by_model: dict[str, int]
    num_masks: int
    num_masks_checked: int
    problems: list[str]
    orphans: list[StoredFile]
    replaced: list[StoredFile]
    leases: list[HeldLease]
    unfinished_runs: list[str]

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.is_sound, **asdict(self)}


def audit(lake_uri: str, storage: Storage, *, deep: bool = True) -> Audit:
    """Read the newest version of a lake's label table back and compare it with its log and with itself.

    Args:
        deep: read all columns of every file and decode every mask, else of a sample of files; and read the
            weights that aliases lead to, else compare their sizes only.

    Raises:
        UsageError: the lake has no label table.
        SchemaMismatchError: it has one of another schema.
        StorageError: the store refused, other than for single files, which are problems.
    """
    with key_database() as keys:
        return audit_into(keys, lake_uri, storage, deep)


def audit_into(keys: duckdb.DuckDBPyConnection, lake_uri: str, storage: Storage, deep: bool) -> Audit:
    """audit(), leaving the keys of all rows in table `keys` of a key_database()."""
    lake_uri = storage.normalize(lake_uri)
    table = LabelsTable.open(lake_uri, storage)
    stored = list_data_files(table, storage)
    table.refresh()
    files = logged_files(table)
    findings = Findings()
    _add_newer(stored, files, table, storage)
    for kind, example in _compare_sizes(files, stored):
        findings.add(kind, example)

    present = [file for file in files if file.path in stored]
    whole = {file.path for file in present[:: 1 if deep else max(1, len(present) // _SAMPLE_FILES)]}
    num_rows = num_masks = num_masks_checked = 0
    statuses: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for file, check in _check_all(table.uri, present, storage, whole):
        findings.merge(check.findings)
        num_rows += check.num_rows
        num_masks += check.num_masks
        num_masks_checked += check.num_masks_checked
        statuses += check.statuses
        models[file.model_id] += check.num_rows
        if check.keys is not None:
            keys.register("batch", check.keys)
            keys.execute("INSERT INTO keys BY NAME SELECT * FROM batch")
            keys.unregister("batch")
    for count, model_id, source, image_id in keys.execute(_DUPLICATES).fetchall()[:1]:
        image = f"image {image_id!r} of {source} under {model_id}"
        findings.add("rows that label an image a second time for no reason", image, count)
    for kind, example in model_faults(keys, table, lake_uri, storage, deep):
        findings.add(kind, example)

    named = {file.path for file in files}
    unnamed = [info for path, info in stored.items() if path not in named]
    orphans, replaced = _sort_unnamed(table, storage, unnamed)
    return Audit(
        lake=lake_uri,
        version=table.version,
        num_files=len(files),
        num_files_whole=len(whole),
        num_bytes=sum(file.size_bytes for file in files),
        num_rows=num_rows,
        num_images=_count(
            keys, "SELECT count(*) FROM (SELECT DISTINCT model_id, source, image_id FROM keys)"
        ),
        rows_by_status=dict(sorted(statuses.items())),
        rows_by_model=dict(sorted(models.items())),
        num_masks=num_masks,
        num_masks_checked=num_masks_checked,
        problems=findings.to_list(),
        orphans=orphans,
        replaced=replaced,
        leases=held_leases(lake_uri, storage),
        unfinished_runs=_unfinished_runs(lake_uri, storage),
    )


@contextmanager
def key_database() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty table `keys` in a database on disk, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="masklake-") as folder,
        duckdb.connect(
            f"{folder}/keys.duckdb", config={"memory_limit": "1GB", "temp_directory": f"{folder}/spill"}
        ) as connection,
    ):
        connection.execute(
            "CREATE TABLE keys (model_id VARCHAR, source VARCHAR, shard VARCHAR, image_id VARCHAR, "
            "status VARCHAR, content_hash BLOB, run_id VARCHAR, labeled_at TIMESTAMPTZ)"
        )
        yield connection


def held_leases(lake_uri: str, storage: Storage) -> list[HeldLease]:
    """Leases that are neither released nor expired by this machine's clock."""
    newest: dict[str, ObjectInfo] = {}
    with suppress(MissingObjectError):  # on a disk there is no folder before the first lease
        for info in storage.list(f"{lake_uri}/leases", "*.json"):
            newest[info.uri.rpartition("/")[0]] = info  # listed in order: the highest number comes last
    held = []
    for folder, info in newest.items():
        with suppress(MissingObjectError, CorruptObjectError):  # renewed or released while we look
            claim = json.loads(storage.read_bytes(info))
            left_s = claim["expires_s"] - time.time()
            if not claim["released"] and left_s > 0:
                key = folder.rpartition("/")[2]
                held.append(HeldLease(key, claim["holder"], claim["host"], round(left_s, 1)))
    return held


def _add_newer(
    stored: dict[str, ObjectInfo], files: list[LoggedFile], table: LabelsTable, storage: Storage
) -> None:
    """Look again for files that were not listed: they may be younger than the listing."""
    for file in files:
        if file.path not in stored:
            with suppress(MissingObjectError):
                stored[file.path] = storage.stat(f"{table.uri}/{file.path}")


def _compare_sizes(files: list[LoggedFile], stored: dict[str, ObjectInfo]) -> Iterator[tuple[str, str]]:
    for file in files:
        info = stored.get(file.path)
        if info is None:
            yield "a file that the table names does not exist", file.path
        elif info.size != file.size_bytes:
            sizes = f"{info.size} bytes, the log says {file.size_bytes}"
            yield "a file of another size than the log says", f"{file.path} has {sizes}"


def _check_all(
    table_uri: str, files: list[LoggedFile], storage: Storage, whole: set[str]
) -> Iterator[tuple[LoggedFile, FileCheck]]:
    """A few files at a time: what was read and not yet taken is held."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), _FILES_AT_ONCE):
            some = files[start : start + _FILES_AT_ONCE]
            checks = pool.map(lambda f: check_file(table_uri, f, storage, f.path in whole), some)
            yield from zip(some, checks, strict=True)


def _sort_unnamed(
    table: LabelsTable, storage: Storage, unnamed: list[ObjectInfo]
) -> tuple[list[StoredFile], list[StoredFile]]:
    """Orphans, and files that were replaced."""
    if not unnamed:
        return [], []
    paths = {info.uri[len(table.uri) + 1 :] for info in unnamed}
    at_s = read_replaced(table, storage, 0, paths).at_s
    orphans, replaced = [], []
    for file in stored_files(unnamed, table.uri, storage):
        if file.path in at_s:
            replaced.append(StoredFile(file.path, file.size_bytes, time.time() - at_s[file.path]))
        else:
            orphans.append(file)
    return orphans, replaced


def _unfinished_runs(lake_uri: str, storage: Storage) -> list[str]:
    begun: set[str] = set()
    ended: set[str] = set()
    with suppress(MissingObjectError):  # on a disk there is no folder before the first run
        for info in storage.list(f"{lake_uri}/runs"):
            run_id, _, name = info.uri[len(lake_uri) + len("/runs/") :].partition("/")
            (ended if name == "summary.json" else begun).add(run_id)
    return sorted(begun - ended)


def _count(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    row = connection.execute(sql).fetchone()
    return int(row[0]) if row else 0
