"""Vacuum, jobs/care/vacuum.py: what is deleted, what stays, who still reads what."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.care.doctor import audit
from jobs.care.vacuum import vacuum
from jobs.lake.compact import run_compaction
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.storage import Storage
from schemas.durations import parse_duration
from schemas.errors import LeaseHeldError, UsageError

MakeRows = Callable[..., pa.Table]
AddRows = Callable[..., list[Fragment]]
MODEL = "lite-0123456789ab"
ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"
DAY_S = 86400.0


@pytest.fixture
def later() -> Callable[[], float]:
    """A clock 8 days ahead: what was written by now is older than the grace period."""
    return lambda: time.time() + 8 * DAY_S


def data_files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.parquet") if "_delta_log" not in path.parts}


@pytest.mark.parametrize("model_id", [MODEL, ODD_MODEL])
def test_orphans_go_after_the_grace_period_and_named_files_never(
    model_id: str,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_rows: AddRows,
    tmp_path: Path,
    later: Callable[[], float],
) -> None:
    (named,) = add_rows(make_rows(["a"], model_id=model_id))
    orphan = write_fragment(make_rows(["b"], model_id=model_id), ["unit"], lake, model_id, storage)
    young = vacuum(lake, storage)
    assert (young.deleted, [file.path for file in young.kept]) == ([], [orphan.path])
    planned = vacuum(lake, storage, clock=later, dry_run=True)
    assert [file.path for file in planned.deleted] == [orphan.path]
    assert len(data_files(tmp_path)) == 2
    done = vacuum(lake, storage, clock=later)
    assert ([file.path for file in done.deleted], done.kept) == ([orphan.path], [])
    assert done.num_bytes == orphan.size_bytes
    assert data_files(tmp_path) == {Path(named.path).name}
    found = audit(lake, storage)
    assert (found.problems, found.num_rows, found.version) == ([], 1, 1)


def test_a_reader_of_an_older_version_keeps_its_files_for_the_grace_period(
    table: LabelsTable,
    lake: str,
    storage: Storage,
    make_rows: MakeRows,
    add_rows: AddRows,
    tmp_path: Path,
    later: Callable[[], float],
) -> None:
    add_rows(make_rows(["a"]))
    add_rows(make_rows(["b"]))
    week_ago_s = time.time() - 30 * DAY_S
    for path in (tmp_path / "lake" / "labels" / f"model_id={MODEL}").iterdir():
        os.utime(path, (week_ago_s, week_ago_s))  # the files are old, but were replaced just now
    reader = LabelsTable.open(lake, storage)
    run_compaction(table, lake, storage)
    assert table.version == 3
    young = vacuum(lake, storage)
    assert (young.deleted, len(young.kept), young.oldest_whole_version) == ([], 2, 0)
    assert reader.dataset().count_rows() == 2

    done = vacuum(lake, storage, clock=later)
    assert (len(done.deleted), done.kept, done.oldest_whole_version) == (2, [], 3)
    assert audit(lake, storage).num_rows == 2
    with pytest.raises(FileNotFoundError):
        reader.dataset().to_table()


def test_a_short_grace_period_is_refused_and_never_taken_while_a_run_is_at_work(
    lake: str, storage: Storage, make_rows: MakeRows, add_rows: AddRows, table: LabelsTable
) -> None:
    write_fragment(make_rows(["a"]), ["unit"], lake, MODEL, storage)
    with pytest.raises(UsageError, match="less than 1 h"):
        vacuum(lake, storage, 10)
    with (
        Lease.acquire(storage, lake, "key", "run-1"),
        pytest.raises(LeaseHeldError, match="run-1 is at work"),
    ):
        vacuum(lake, storage, 0, force=True)
    assert len(vacuum(lake, storage, 0, force=True).deleted) == 1


def test_unfinished_writes_of_killed_processes_go_too(
    lake: str,
    storage: Storage,
    add_rows: AddRows,
    make_rows: MakeRows,
    tmp_path: Path,
    later: Callable[[], float],
) -> None:
    (fragment,) = add_rows(make_rows(["a"]))
    temporary = (tmp_path / "lake" / "labels" / fragment.path).with_name(".masklake-0123")
    temporary.write_bytes(b"half a file")
    assert vacuum(lake, storage).num_unfinished == 0
    assert vacuum(lake, storage, clock=later).num_unfinished == 1
    assert not temporary.exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("7d", 604800), ("30m", 1800)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1h", "1 week"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like"):
        parse_duration(text)
