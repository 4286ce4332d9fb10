"""A table that was killed over, then merged and vacuumed while somebody reads an old version of it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from jobs.care.doctor import audit
from jobs.care.vacuum import vacuum
from jobs.lake.compact import run_compaction
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from tests.chaos.conftest import Reference
from tests.chaos.harness import Drivers, Job, Kill, make_source, run_schedule, write_source
from tests.chaos.judge import read_table

pytestmark = pytest.mark.chaos

GRACE_S = 3600.0


def read_ids(table: LabelsTable) -> list[str]:
    return sorted(str(image_id) for image_id in table.dataset().to_table()["image_id"].to_pylist())


def test_a_reader_of_an_old_version_reads_on_while_orphans_and_small_files_are_cleared_away(
    drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    images = reference.first(24)
    source = write_source(tmp_path / "images", make_source("files", images))
    job = Job(source, str(tmp_path / "lake"), settings=("commit.compact=false",))
    kills = tuple(Kill(failpoint, 0) for failpoint in ("unit_finished#5", "commit_send#1", "commit_done#1"))

    def committed() -> list[str]:
        return read_table(job.lake, disk).ids()

    assert run_schedule(drivers, job, kills, tmp_path / "journal", committed).problems == []
    before = read_table(job.lake, disk)
    assert len(before.orphans) == 5
    for path in before.orphans:
        os.utime(f"{job.lake}/labels/{path}", (time.time() - 2 * GRACE_S,) * 2)

    old = LabelsTable.open(job.lake, disk, version=2)
    expected = read_ids(old)
    assert len(expected) == 12
    readings: list[list[str]] = []
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            readings.append(read_ids(old))

    reader = threading.Thread(target=read_on)
    reader.start()
    merged = run_compaction(LabelsTable.open(job.lake, disk), disk.normalize(job.lake), disk)
    cleared = vacuum(job.lake, disk, GRACE_S)
    time.sleep(0.2)
    stop.set()
    reader.join()

    assert merged.num_old_files == 12
    assert sorted(file.path for file in cleared.deleted) == sorted(before.orphans)
    assert len(readings) > 1
    assert all(reading == expected for reading in readings)
    after = read_table(job.lake, disk)
    assert after.orphans == []
    assert reference.verdict(after, images) == []
    found = audit(job.lake, disk)
    assert (found.orphans, len(found.replaced), found.num_rows) == ([], 12, 24)


def test_the_doctor_finds_a_killed_table_as_sound_as_the_judge_does(
    drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    source = write_source(tmp_path / "images", make_source("files", reference.first(24)))
    job = Job(source, str(tmp_path / "lake"))
    run_schedule(drivers, job, (Kill("commit_put#2", 0),), tmp_path / "journal", list)
    table = read_table(job.lake, disk)
    assert reference.verdict(table, reference.first(24)) == []
    found = audit(job.lake, disk)
    assert sorted(file.path for file in found.orphans) == sorted(table.orphans)
    assert found.problems == []
