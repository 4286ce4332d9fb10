"""What operators see and do, on a real Ray of two nodes: metrics scraped, a node drained in mid-run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import metrics
from cluster.monitoring.queries import LABEL_STAGE
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec
from tests.chaos.harness import Job, make_images, make_source, write_source
from tests.chaos.judge import judge, read_table
from tests.chaos.ray_cluster import RayCluster, RayDriver, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK = Storage(StorageSpec())
DRAIN_S = 20
_LINE = re.compile(r"(\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_STAGE = LABEL_STAGE.split('"')[1].replace("\\\\", "\\")  # as PromQL reads the string
_NODES = """
import json
from ray._raylet import GcsClient
found = GcsClient(address="{address}").get_all_node_info(timeout=20)
print(json.dumps({{
    node.hex(): [info.node_manager_address, info.metrics_export_port, info.state]
    for node, info in found.items()
}}))
"""
_DRAIN = """
from cluster.spot_watch import drain_nodes
print(drain_nodes("{address}", {seconds}, "the cloud takes this machine", node_id="{node}"))
"""


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(RAY_raylet_start_wait_time_s="80") as running:
        # The actors of a node that ends come here, and reading needs a CPU beside them.
        running.start_head(num_cpus=3)
        yield running


def ask(cluster: RayCluster, program: str, **values: object) -> str:
    """A program in a process of its own: the token is in the cluster's environment, not in ours."""
    code = program.format(address=cluster.address, **values)
    done = subprocess.run([sys.executable, "-c", code], env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def nodes(cluster: RayCluster) -> dict[str, list[Any]]:
    """By id: address, port for metrics, state (0: alive)."""
    found: dict[str, list[Any]] = json.loads(ask(cluster, _NODES))
    return found


def scrape(cluster: RayCluster) -> list[tuple[str, dict[str, str], float]]:
    """Names, labels and values of all live nodes."""
    lines: list[str] = []
    for address, port, state in nodes(cluster).values():
        if state == 0:
            with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=20) as answer:
                lines += answer.read().decode().splitlines()
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    return [(match[1], dict(_LABEL.findall(match[2])), float(match[3])) for match in found]


def total(found: list[tuple[str, dict[str, str], float]], metric: metrics.Metric) -> Counter[tuple[str, ...]]:
    """Sums over processes, by the metric's own labels."""
    sums: Counter[tuple[str, ...]] = Counter()
    for name, labels, value in found:
        if name == metric.exported:
            sums[tuple(labels[label] for label in metric.labels)] += value  # type: ignore[assignment]
    return sums


def wait_until(happened: Callable[[], object], driver: RayDriver) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert driver.runs, driver.wait().stderr
        assert time.monotonic() < deadline, driver.stderr
        time.sleep(0.2)


def test_what_is_scraped_after_a_run_is_what_its_summary_says(cluster: RayCluster, tmp_path: Path) -> None:
    images = make_images(10)
    names = list(images)
    images[names[3]] = images[names[3]][:200]
    images[names[5]] = b"no image"
    source = write_source(tmp_path / "images", images)
    job = Job(source, str(tmp_path / "lake"), settings=("failures.budget=5",))
    driver = cluster.driver(job)
    during: list[tuple[str, dict[str, str], float]] = []

    def has_committed() -> bool:
        during[:] = scrape(cluster)
        return bool(total(during, metrics.RUN_INFO))

    wait_until(has_committed, driver)
    ended = driver.wait()
    assert ended.status == 0, ended.stderr
    summary = ended.summary
    (run,) = total(during, metrics.RUN_INFO)
    assert run == (summary["run_id"], "infer", summary["model_id"])

    deadline = time.monotonic() + 30  # Ray Data's own figures come every few seconds
    found = scrape(cluster)
    while "ray_data_num_alive_actors" not in {name for name, *_ in found}:
        assert time.monotonic() < deadline
        time.sleep(1)
        found = scrape(cluster)
    expected = {("ok", ""): summary["ok"]}
    expected |= {("failed", kind): count for kind, count in summary["failed_by_kind"].items()}
    assert total(found, metrics.IMAGES) == expected
    assert sum(expected.values()) == 10
    assert total(found, metrics.DETECTIONS) == {(): summary["detections"]}
    assert total(found, metrics.COMMITS) == {(): summary["commits"]}
    assert total(found, metrics.READ_BYTES) == {(): summary["encoded_bytes"]}
    fragments = (tmp_path / "lake" / "labels").glob("model_id=*/*.parquet")
    written = total(found, metrics.WRITTEN_BYTES)[()]
    assert 0 < written <= sum(path.stat().st_size for path in fragments)
    assert total(found, metrics.RUNS_ENDED) == {(summary["run_id"], "infer", "done"): 1}
    label_s, network_s = (
        total(found, metric)[()] for metric in (metrics.LABEL_SECONDS, metrics.NETWORK_SECONDS)
    )
    assert label_s == pytest.approx(summary["stage_seconds"]["label"], abs=0.01)
    assert 0 < network_s < label_s
    stages = {labels["operator"] for name, labels, _ in found if name == "ray_data_num_alive_actors"}
    assert sum(re.fullmatch(_STAGE, stage) is not None for stage in stages) == 1, stages


def test_a_drained_node_goes_in_mid_run_and_every_image_is_there_once(
    cluster: RayCluster, tmp_path: Path
) -> None:
    images = make_images(300)
    source = write_source(tmp_path / "images", make_source("files", images))
    settings = ("pool.min_actors=2", "pool.max_actors=2", "model.min_size_px=192", "model.max_size_px=256")
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=4, settings=settings)
    (head,) = nodes(cluster)
    node = cluster.add_node(num_cpus=2)
    (drained,) = nodes(cluster).keys() - {head}
    driver = cluster.driver(job)
    wait_until(lambda: len(read_table(job.lake, DISK).rows) >= 4, driver)
    assert drained in ask(cluster, _DRAIN, node=drained, seconds=DRAIN_S)
    before = len(read_table(job.lake, DISK).rows)
    wait_until(lambda: len(read_table(job.lake, DISK).rows) >= before + 4, driver)
    node.process.terminate()
    ended = driver.wait()
    assert ended.status == 0, ended.stderr
    assert judge(read_table(job.lake, DISK), list(images.values())) == []
