"""Disks without room: the run ends with one line, the table is whole, and with room a rerun finishes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from tests.chaos.conftest import Bucket, Reference
from tests.chaos.harness import Drivers, Job, make_source, padded, write_source
from tests.chaos.judge import judge, read_table

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB of memory as a disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def leave_room(disk: Path, num_bytes: int) -> Path:
    """Fill the disk up to so much; gives the file that does."""
    filler = disk / "filler"
    filler.write_bytes(bytes(DISK_BYTES - num_bytes))
    free = os.statvfs(disk)
    assert abs(free.f_bavail * free.f_frsize - num_bytes) < 16_384
    return filler


# From nothing, over the lease, the table, fragments and commits, to all but the last record.
@pytest.mark.parametrize("room_bytes", [0, *range(8_192, 160_000, 16_384)])
def test_a_lake_whose_disk_is_full_is_whole_and_goes_on_once_there_is_room(
    room_bytes: int, small_disk: Path, drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    images = reference.first(14)
    source = write_source(tmp_path / "images", make_source("tar", images))
    job = Job(source, str(small_disk / "lake"))
    filler = leave_room(small_disk, room_bytes)
    ended = drivers.run(job)
    committed = read_table(job.lake, disk)
    print(f"{room_bytes} bytes: {len(committed.rows)} rows, {ended.status}: {ended.last_line[:200]}")
    if ended.status != 0:
        ended.check_clear_end(1, 2)
    assert committed.problems == []
    filler.unlink()
    ended = drivers.run(job)
    assert ended.status == 0, ended.stderr
    assert reference.verdict(read_table(job.lake, disk), images) == []
    assert not [name for _, _, files in os.walk(small_disk) for name in files if name.startswith(".masklake")]


def test_no_room_for_a_shard_on_its_way_is_said_and_goes_on_elsewhere(
    small_disk: Path, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = {name: padded(data, 200_000) for name, data in reference.first(14).items()}
    job = bucket.job("tar", images)
    ended = drivers.run(job, {**bucket.env, "TMPDIR": str(small_disk)})
    ended.check_clear_end(1)
    assert "TMPDIR" in ended.last_line
    assert bucket.table().problems == []
    ended = drivers.run(job, bucket.env)
    assert ended.status == 0, ended.stderr
    assert judge(bucket.table(), list(images.values())) == []
