"""A source that changes between listing and reading: a label belongs to the bytes that were read."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from tests.chaos.conftest import Bucket, Reference
from tests.chaos.fault_proxy import Rule
from tests.chaos.harness import (
    Drivers,
    Job,
    make_images,
    make_source,
    padded,
    write_source,
)
from tests.chaos.judge import read_table

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

NUM_IMAGES = 14


def hashes(images: Iterable[bytes]) -> set[bytes]:
    return {hashlib.blake2b(data, digest_size=16).digest() for data in images}


def test_an_object_replaced_before_it_is_read_is_labelled_as_it_is_then(
    bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(NUM_IMAGES)
    job = bucket.job("files", images)
    images["image-0003.jpg"] = reference.images["image-0020.jpg"]
    replace = partial(bucket.put, "images/image-0003.jpg", images["image-0003.jpg"])
    bucket.proxy.set_rules(Rule("pass", "GET", "/images/image-0003", times=1, before=replace))
    assert drivers.run(job, bucket.env).status == 0
    assert reference.verdict(bucket.table(), images) == []


def test_an_object_deleted_before_it_is_read_has_no_row(
    bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(NUM_IMAGES)
    job = bucket.job("files", images)
    del images["image-0003.jpg"]
    delete = partial(bucket.client.delete_object, Bucket=bucket.name, Key="images/image-0003.jpg")
    bucket.proxy.set_rules(Rule("pass", "GET", "/images/image-0003", times=1, before=delete))
    assert drivers.run(job, bucket.env).status == 0
    assert reference.verdict(bucket.table(), images) == []


def test_an_object_added_while_others_are_read_is_for_the_next_run(
    bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(NUM_IMAGES)
    job = bucket.job("files", images)
    late = reference.images["image-0020.jpg"]
    add = partial(bucket.put, "images/image-0000-late.jpg", late)
    bucket.proxy.set_rules(Rule("pass", "GET", "/images/image-0003", times=1, before=add))
    assert drivers.run(job, bucket.env).summary["images"] == NUM_IMAGES
    assert reference.verdict(bucket.table(), images) == []
    assert drivers.run(job, bucket.env).summary["images"] == 1
    assert reference.verdict(bucket.table(), {**images, "late": late}) == []


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("vanishes", [False, True], ids=["replaced", "deleted"])
def test_a_shard_that_changes_before_it_is_read_is_left_for_the_next_run(
    vanishes: bool, form: str, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(NUM_IMAGES)
    job = bucket.job(form, images)
    shards = make_source(form, images)
    name = sorted(shards)[1]
    kept = dict(list(images.items())[0::2])
    others = dict(list(reference.images.items())[NUM_IMAGES : NUM_IMAGES + 5])
    new_shard = make_source(form, others, num_shards=1).popitem()[1]

    def change() -> None:
        if vanishes:
            bucket.client.delete_object(Bucket=bucket.name, Key=f"images/{name}")
        else:
            bucket.put(f"images/{name}", new_shard)

    bucket.proxy.set_rules(Rule("pass", "GET", f"/images/{name}", times=1, before=change))
    ended = drivers.run(job, bucket.env)
    bucket.proxy.set_rules()
    ended.check_clear_end(1)
    assert name in ended.last_line
    assert reference.verdict(bucket.table(), kept) == []
    if not vanishes:
        kept |= others
    assert drivers.run(job, bucket.env).status == 0
    assert reference.verdict(bucket.table(), kept) == []


@pytest.mark.parametrize(
    ("form", "in_place"),
    [("files", False), ("files", True), ("tar", False), ("tar", True), ("parquet", False), ("parquet", True)],
)
def test_a_file_written_over_while_it_is_read_never_gives_a_label_of_a_mixture(
    form: str, in_place: bool, drivers: Drivers, tmp_path: Path, disk: Storage
) -> None:
    """The driver sleeps after its first unit; shards are larger than what is read at once."""
    images = {name: padded(data, 400_000) for name, data in make_images(20).items()}
    others = {name: padded(data, 330_000) for name, data in make_images(20, seed=7).items()}
    source = write_source(tmp_path / "images", make_source(form, images))
    job = Job(source, str(tmp_path / "lake"), settings=("failures.budget=100%",))
    driver = drivers.start(job, {"MASKLAKE_CHAOS_STOP": "unit_finished#1"})
    driver.wait_stopped()
    for name, data in make_source(form, others).items():
        if in_place:
            with open(Path(source, name), "r+b") as file:
                file.truncate()
                file.write(data)
        else:
            Path(source, f".{name}").write_bytes(data)
            os.replace(Path(source, f".{name}"), Path(source, name))
    driver.signal(signal.SIGCONT)
    ended = driver.wait()
    print(ended.status, ended.last_line)
    if ended.status != 0:
        ended.check_clear_end(1)
        assert drivers.run(job).status == 0
    table = read_table(job.lake, disk)
    assert table.problems == []
    labelled = {row["content_hash"] for row in table.rows if row["status"] == "ok"}
    assert labelled <= hashes(images.values()) | hashes(others.values())
    assert len(set(table.ids())) == len(table.ids()) >= 20
