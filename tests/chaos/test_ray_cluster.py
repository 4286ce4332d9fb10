"""Drivers, actors, tasks and nodes of a real Ray killed in mid-run: it finishes, or the rerun does."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cluster.ray_settings import RAY_SETTINGS
from jobs.lake.failpoints import VARIABLE as FAILPOINTS
from jobs.lake.storage import Storage
from tests.chaos.conftest import Bucket, Reference
from tests.chaos.fault_proxy import Rule
from tests.chaos.harness import SEED, Job, make_images, make_source, padded, write_source
from tests.chaos.judge import judge, read_table
from tests.chaos.ray_cluster import Node, RayCluster, RayDriver, ray_cluster

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

ACTORS = "MapWorker(MapBatches(_LabelActor))"
READERS = "ReadUnits"
WRITERS = "MapBatches(FragmentWriter"
FRAGMENTS = "/labels/model_id"
TWO_ACTORS = ("pool.min_actors=2", "pool.max_actors=2")
DRIVER_TIMEOUT_S = 600.0
LONG_CALL = """
import time

import ray

from cluster.session import connect, shutdown


class Sleeper:
    def sleep(self, seconds):
        time.sleep(seconds)
        return f"slept {seconds} s"


connect()
print(ray.get(ray.remote(Sleeper).options(num_cpus=0).remote().sleep.remote(120)))
shutdown()
"""


@pytest.fixture(scope="module")
def one_node() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=4)
        yield cluster


def wait_until(happened: Callable[[], object], driver: RayDriver) -> bool:
    """False where the driver ended before."""
    deadline = time.monotonic() + DRIVER_TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline
        if not driver.runs:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_a_killed_driver_takes_its_actors_along_and_the_rerun_finishes(
    seed: int, one_node: RayCluster, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    rng = random.Random(seed)
    images = reference.first(30)
    source = write_source(tmp_path / "images", make_source(("tar", "files")[seed % 2], images))
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=4, settings=TWO_ACTORS)
    (node,) = one_node.nodes
    num_killed = 0
    for _ in range(2):
        before = len(read_table(job.lake, disk).rows)
        failpoint = rng.choice(["commit_send#1", "commit_put#2", "unit_finished#7", ""])
        driver = one_node.driver(job, {FAILPOINTS: failpoint})
        wanted = before + rng.randint(0, 12)
        if not failpoint and wait_until(lambda: len(read_table(job.lake, disk).rows) >= wanted, driver):  # noqa: B023
            driver.kill()
        num_killed += driver.wait(DRIVER_TIMEOUT_S).status == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while node.workers(ACTORS):
            assert time.monotonic() < deadline, "actors outlive their driver"
            time.sleep(0.1)
    before = len(read_table(job.lake, disk).rows)
    ended = one_node.driver(job).wait(DRIVER_TIMEOUT_S)
    assert ended.status == 0, ended.stderr
    assert ended.summary["images"] == len(images) - before
    table = read_table(job.lake, disk)
    assert reference.verdict(table, images) == []
    print(
        f"seed {seed}: killed {num_killed}, {before} committed before, {len(table.orphan_rows)} orphaned rows"
    )
    # Of one image each: two in an actor's queue, one in a writer on each core.
    assert len(table.orphan_rows) <= 2 * (job.every_images + 8)


def meet(node: Node, kind: str, driver: RayDriver, rng: random.Random) -> int | None:
    """A process at such work, once there is one; None where the run ends before."""
    while driver.runs:
        if found := node.workers(kind):
            return rng.choice(found)
        time.sleep(0.02)
    return None


@pytest.mark.parametrize("seed", range(SEED, SEED + 2))
def test_ten_killed_actors_and_workers_cost_time_and_nothing_else(
    seed: int, one_node: RayCluster, reference: Reference, bucket: Bucket
) -> None:
    """Reads and writes are slow, so that they can be met at work. Between two deaths of actors there is
    progress: an image that is there at each of them would be taken for the cause."""
    rng = random.Random(seed)
    images = reference.first(30)
    for name, data in make_source("tar", images, num_shards=10).items():
        bucket.put(f"images/{name}", data)
    job = Job(
        f"{bucket.uri}/images",
        f"{bucket.uri}/lake",
        max_images=1,
        every_images=4,
        settings=(*TWO_ACTORS, f"storage.endpoint_url={bucket.proxy.endpoint_url}"),
    )
    enough = threading.Event()
    bucket.proxy.set_rules(
        Rule("delay", "GET", "/images/[a-z]", seconds=1.5),
        Rule("delay", "PUT", FRAGMENTS, seconds=0.7, times=6),
        # So that it does not end too soon. Longer than 30 s would be taken for silence, and tried again.
        Rule("delay", "PUT", FRAGMENTS, seconds=25, released=enough.is_set),
    )
    (node,) = one_node.nodes
    driver = one_node.driver(job)
    started = time.monotonic()
    killed: list[str] = []

    def progress() -> int:
        return sum("PUT" in request and FRAGMENTS in request for request in bucket.proxy.requests)

    # Readers are done first, and once all is labelled there are no actors any more.
    for kind in [READERS] * 3 + [ACTORS] * 2 + [WRITERS] * 5:
        seen, give_up = progress(), time.monotonic() + 10
        again = kind == ACTORS and ACTORS in killed
        while again and progress() == seen and time.monotonic() < give_up:
            time.sleep(0.05)
        if victim := meet(node, kind, driver, rng):
            os.kill(victim, signal.SIGKILL)
            killed.append(kind)
            print(f"{time.monotonic() - started:.0f} s: {kind}", end="; ")
    enough.set()
    ended = driver.wait(DRIVER_TIMEOUT_S)
    table = bucket.table()
    print(
        f"seed {seed}: {[killed.count(kind) for kind in (ACTORS, READERS, WRITERS)]} actors, readers, "
        f"writers killed; {len(table.orphan_rows)} orphaned rows"
    )
    assert ended.status == 0, ended.stderr
    assert len(killed) == 10
    assert reference.verdict(table, images) == []


def test_a_lost_node_and_an_added_one_do_not_stop_a_run(
    reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    images = reference.first(30)
    source = write_source(tmp_path / "images", make_source("tar", images, num_shards=6))
    settings = ("pool.min_actors=2", "pool.max_actors=3")
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=3, settings=settings)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=2)
        lost = cluster.add_node(num_cpus=2)
        driver = cluster.driver(job)
        assert wait_until(lambda: len(read_table(job.lake, disk).rows) >= 3, driver)
        lost.kill()
        cluster.add_node(num_cpus=2)
        ended = driver.wait(DRIVER_TIMEOUT_S)
        assert ended.status == 0, ended.stderr
    table = read_table(job.lake, disk)
    print(f"{len(table.orphan_rows)} orphaned rows; {ended.summary['images_by_node']}")
    assert reference.verdict(table, images) == []


def test_actors_on_cpus_alone_go_on_reading_whichever_node_is_lost(
    reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    """An actor of a lost node is started again wherever its CPUs are free."""
    images = reference.first(30)
    source = write_source(tmp_path / "images", make_source("tar", images, num_shards=15))
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=3)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=2)
        lost = [cluster.add_node(num_cpus=2) for _ in range(2)]
        driver = cluster.driver(job)
        for node in lost:
            before = len(read_table(job.lake, disk).rows)
            assert wait_until(lambda: len(read_table(job.lake, disk).rows) >= before + 3, driver)  # noqa: B023
            node.kill()
        ended = driver.wait(DRIVER_TIMEOUT_S)
        assert ended.status == 0, ended.stderr
    assert ended.summary["actors"] == 3
    assert reference.verdict(read_table(job.lake, disk), images) == []


def test_a_run_waits_for_the_nodes_that_it_wants_and_grows_with_those_that_come(
    tmp_path: Path, disk: Storage
) -> None:
    images = make_images(300)
    source = write_source(tmp_path / "images", make_source("tar", images, num_shards=30))
    slow = ("model.min_size_px=512", "model.max_size_px=640")
    settings = (*slow, "pool.min_actors=2", "pool.max_actors=3", "pool.wait_for_nodes_s=4m")
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=3, settings=settings)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=2)
        refused = cluster.driver(replace(job, settings=("pool.min_actors=2", "pool.wait_for_nodes_s=5")))
        ended = refused.wait(DRIVER_TIMEOUT_S)
        assert ended.status == 2
        assert "no nodes came within 5 s: the cluster has 2 CPUs" in ended.stderr.splitlines()[-1]
        driver = cluster.driver(job)
        assert wait_until(lambda: "waiting up to 240 s for nodes with room for" in driver.stderr, driver)
        cluster.add_node(num_cpus=2)
        assert wait_until(lambda: len(read_table(job.lake, disk).rows) >= 3, driver)
        cluster.add_node(num_cpus=2)
        ended = driver.wait(DRIVER_TIMEOUT_S)
        assert ended.status == 0, ended.stderr
    assert ended.summary["actors"] == 2
    assert len(ended.summary["images_by_node"]) == 3
    assert judge(read_table(job.lake, disk), list(images.values())) == []


def test_an_actor_that_has_no_more_work_goes_while_another_still_has(
    one_node: RayCluster, tmp_path: Path, disk: Storage
) -> None:
    """Its CPUs, or its GPU, are free before the run ends."""
    images = make_images(41)
    first, *others = images
    shards = {"short.tar": [first], "long.tar": others}
    packed = {
        name: make_source("tar", {key: images[key] for key in keys}, num_shards=1).popitem()[1]
        for name, keys in shards.items()
    }
    source = write_source(tmp_path / "images", packed)
    slow = ("model.min_size_px=512", "model.max_size_px=640")
    job = Job(source, str(tmp_path / "lake"), max_images=40, every_images=1, settings=(*TWO_ACTORS, *slow))
    driver = one_node.driver(job)
    (node,) = one_node.nodes
    assert wait_until(lambda: len(node.workers(ACTORS)) == 2, driver), driver.stderr
    assert wait_until(lambda: len(node.workers(ACTORS)) == 1, driver), "both stayed until the end"
    assert driver.runs
    assert len(read_table(job.lake, disk).rows) < len(images)
    ended = driver.wait(DRIVER_TIMEOUT_S)
    assert ended.status == 0, ended.stderr
    assert judge(read_table(job.lake, disk), list(images.values())) == []


def test_a_lost_head_ends_the_run_and_the_rerun_on_another_cluster_finishes(
    reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    images = reference.first(30)
    source = write_source(tmp_path / "images", make_source("tar", images, num_shards=6))
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=3, settings=TWO_ACTORS)
    with ray_cluster(RAY_gcs_rpc_server_reconnect_timeout_s="10") as cluster:
        head = cluster.start_head(num_cpus=4)
        driver = cluster.driver(job)
        assert wait_until(lambda: len(read_table(job.lake, disk).rows) >= 3, driver)
        head.kill()
        ended = driver.wait(DRIVER_TIMEOUT_S)
        print(ended.status, ended.stderr[-2000:])
        assert ended.status != 0
    before = read_table(job.lake, disk)
    assert before.problems == []
    assert 3 <= len(before.rows) < len(images)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=4)
        ended = cluster.driver(job).wait(DRIVER_TIMEOUT_S)
    assert ended.status == 0, ended.stderr
    assert ended.summary["images"] == len(images) - len(before.rows)
    assert reference.verdict(read_table(job.lake, disk), images) == []


def test_nodes_that_others_started_keep_the_long_calls_of_our_drivers(tmp_path: Path) -> None:
    script = tmp_path / "long_call.py"
    script.write_text(LONG_CALL)
    with ray_cluster() as cluster:
        for name in RAY_SETTINGS:
            del cluster.env[name]
        cluster.start_head(num_cpus=1)
        ended = RayDriver([sys.executable, str(script)], cluster.env, tmp_path).wait()
    assert (ended.status, ended.stdout) == (0, "slept 120 s\n"), ended.stderr


def test_a_source_larger_than_the_object_store_goes_through_it(tmp_path: Path, disk: Storage) -> None:
    images = {name: padded(data, 5_000_000) for name, data in make_images(40).items()}
    source = write_source(tmp_path / "images", make_source("tar", images, num_shards=4))
    job = Job(source, str(tmp_path / "lake"), max_images=4, settings=TWO_ACTORS)
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=4, object_store_bytes=80_000_000)
        ended = cluster.driver(job).wait(DRIVER_TIMEOUT_S)
    assert ended.status == 0, ended.stderr
    assert judge(read_table(job.lake, disk), list(images.values())) == []


def limit_memory(node: Node, more_bytes: int) -> int:
    """Let the actors have so much more address space than they have now; gives their number."""
    actors = node.workers(ACTORS)
    for pid in actors:
        num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + more_bytes
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    return len(actors)


def test_an_image_for_which_an_actor_has_no_memory_fails_alone_and_is_labelled_when_there_is(
    one_node: RayCluster, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    """90 MB of pixels where 64 MB are to be had. With none at all, Ray's threads would hang as they start."""
    images = reference.first(20)
    large = io.BytesIO()
    Image.new("RGB", (6000, 5000), "teal").save(large, "JPEG")
    source = write_source(
        tmp_path / "images", make_source("files", {**images, "large.jpg": large.getvalue()})
    )
    settings = (*TWO_ACTORS, "failures.budget=100%")
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=3, settings=settings)
    (node,) = one_node.nodes
    driver = one_node.driver(job)
    assert wait_until(lambda: read_table(job.lake, disk).rows, driver)
    assert limit_memory(node, 64 << 20) == 2
    ended = driver.wait(DRIVER_TIMEOUT_S)
    table = read_table(job.lake, disk)
    (failed,) = (row for row in table.rows if row["status"] == "failed")
    print(ended.status, failed["error_kind"], failed["error"])
    assert (ended.status, failed["image_id"]) == (0, "large.jpg")
    table.rows.remove(failed)
    assert reference.verdict(table, images) == []
    retry = replace(job, settings=(*settings, f"failures.retry=[{failed['error_kind']}]"))
    ended = one_node.driver(retry).wait(DRIVER_TIMEOUT_S)
    assert (ended.status, ended.summary["images"], ended.summary["ok"]) == (0, 1, 1), ended.stderr
