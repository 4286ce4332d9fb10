"""Calls with a time limit, jobs/lake/time_limit.py, and the log's, jobs/lake/labels_table.py."""

import threading
import time

import pytest
from deltalake import DeltaTable

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.lake.time_limit import HungCallError, within
from schemas.errors import StorageError


def test_a_call_in_time_gives_what_it_returns_or_raises() -> None:
    assert within(10, "adding", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(10, "dividing", lambda: 1 / 0)


def test_a_call_that_hangs_is_left_behind() -> None:
    wakes = threading.Event()
    started = time.monotonic()
    with pytest.raises(HungCallError, match=r"waiting did not come back in 0\.1 s"):
        within(0.1, "waiting", wakes.wait)
    assert time.monotonic() - started < 5
    wakes.set()


def test_a_log_that_hangs_while_it_is_opened_is_opened_again(
    lake: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    LabelsTable.open_or_create(lake, storage)
    monkeypatch.setattr("jobs.lake.labels_table.LOG_LIMIT_S", 0.3)
    opened = DeltaTable.version
    calls: list[int] = []
    wakes = threading.Event()

    def hanging_once(delta: DeltaTable) -> int:
        calls.append(1)
        if len(calls) == 1:
            wakes.wait(10)
        return opened(delta)

    monkeypatch.setattr(DeltaTable, "version", hanging_once)
    assert LabelsTable.open(lake, storage).version == 0
    wakes.set()

    monkeypatch.setattr(DeltaTable, "version", lambda delta: wakes.wait(10) and opened(delta))
    wakes.clear()
    with pytest.raises(StorageError, match=r"cannot open the label table .* did not come back in 0\.3 s"):
        LabelsTable.open(lake, storage)
    wakes.set()


def test_after_a_hung_refresh_the_table_is_opened_anew(
    lake: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = LabelsTable.open_or_create(lake, storage)
    stuck = table.delta
    monkeypatch.setattr("jobs.lake.labels_table.LOG_LIMIT_S", 0.3)
    wakes = threading.Event()
    monkeypatch.setattr(DeltaTable, "update_incremental", lambda delta: wakes.wait(10))
    with pytest.raises(HungCallError, match="reading the log"):
        table.refresh()
    table.refresh()
    assert table.delta is not stuck
    wakes.set()
