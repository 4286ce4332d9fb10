"""What operators see and do, on a real Ray: metrics scraped, a node drained in mid-run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import metrics
from cluster.monitoring.queries import LABEL_STAGE
from cluster.ray_settings import RAY_SETTINGS
from jobs.demo.lake import write_scene_lake
from jobs.lake.storage import Storage
from jobs.train.metrics import StepMetrics, from_json_line
from jobs.train.metrics_log import read_history
from schemas.specs import StorageSpec
from tests.chaos.harness import Job, make_images, make_source, write_source
from tests.chaos.judge import judge, read_table
from tests.chaos.ray_cluster import Node, RayCluster, RayDriver, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK = Storage(StorageSpec())
DRAIN_S = 20
# Taken while a checkpoint is written and the node ends.
FEW_STEPS = 20
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


@contextmanager
def a_head(num_cpus: int) -> Iterator[RayCluster]:
    with ray_cluster(RAY_raylet_start_wait_time_s="80", **RAY_SETTINGS) as running:
        running.start_head(num_cpus)
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Counters stay with it: at most one run of each command."""
    with a_head(num_cpus=3) as running:
        yield running


@pytest.fixture(scope="module")
def shrinking() -> Iterator[RayCluster]:
    """Tests add a node and take it away again; the actors that go with it come to the head."""
    with a_head(num_cpus=3) as running:
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


def value(found: list[tuple[str, dict[str, str], float]], metric: metrics.Metric) -> float:
    """Of a metric without labels, or of which there is one time series."""
    (only,) = total(found, metric).values()
    return only


def of_command(found: list[tuple[str, dict[str, str], float]], command: str) -> list[dict[str, str]]:
    """Labels of the runs of a command that are at work."""
    infos = [labels for name, labels, _ in found if name == metrics.RUN_INFO.exported]
    return [labels for labels in infos if labels["command"] == command]


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
        return bool(of_command(during, "infer"))

    wait_until(has_committed, driver)
    ended = driver.wait()
    assert ended.status == 0, ended.stderr
    summary = ended.summary
    (run,) = of_command(during, "infer")
    assert (run["run_id"], run["model_id"]) == (summary["run_id"], summary["model_id"])

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
    assert total(found, metrics.RUNS_ENDED)[summary["run_id"], "infer", "done"] == 1
    label_s, network_s = (
        total(found, metric)[()] for metric in (metrics.LABEL_SECONDS, metrics.NETWORK_SECONDS)
    )
    assert label_s == pytest.approx(summary["stage_seconds"]["label"], abs=0.01)
    assert 0 < network_s < label_s
    stages = {labels["operator"] for name, labels, _ in found if name == "ray_data_num_alive_actors"}
    assert sum(re.fullmatch(_STAGE, stage) is not None for stage in stages) == 1, stages


def added_node(cluster: RayCluster) -> tuple[str, Node]:
    """One of two CPUs, and its id."""
    before = nodes(cluster).keys()
    node = cluster.add_node(num_cpus=2)
    (added,) = nodes(cluster).keys() - before
    return added, node


def training(folder: Path, steps: int, total_batch: int = 2, **changes: Any) -> list[str]:
    """A command that trains `lite` for a while on a few scenes of 128 px."""
    write_scene_lake(folder / "scenes", range(10_000_000, 10_000_006), 1)
    scenes = folder / "scenes"
    data = {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}
    recipe = {"name": "scenes", "steps": steps, "total_batch": total_batch, "precision": "fp32"}
    spec = {
        "data": {"scenes": data},
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": str(folder / "run")},
        "recipe": recipe | {"shorter_sides": [128], "calibration_batches": 0},
        **changes,
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(spec))
    return ["train", str(path), "--json"]


def test_what_is_scraped_in_a_training_is_what_its_log_says(cluster: RayCluster, tmp_path: Path) -> None:
    began = time.time()
    driver = cluster.run("jobs.cli", training(tmp_path, steps=60, total_batch=1))
    during: list[tuple[str, dict[str, str], float]] = []

    def has_reported() -> bool:  # gauges outlive their process by 20 s
        has_ended = not driver.runs
        during[:] = scrape(cluster)
        return has_ended or bool(total(during, metrics.TRAIN_STEP))

    wait_until(has_reported, driver)
    scraped = time.time()
    ended = driver.wait()
    assert ended.status == 0, ended.stderr
    after = scrape(cluster)
    of_training = {metric.exported for metric in metrics.METRICS if "_train_" in metric.name}
    missing = of_training - {name for name, *_ in during + after}
    assert missing == {metrics.TRAIN_NONFINITE.exported}

    run_id = ended.summary["run_id"]
    (run,) = of_command(during, "train")
    assert (run["run_id"], run["model_id"]) == (run_id, "lite")
    reports = {report.step: report for report in read_history(str(tmp_path / "run"), DISK).steps}
    report = reports[int(value(during, metrics.TRAIN_STEP))]
    assert value(during, metrics.TRAIN_LOSS) == pytest.approx(report.loss)
    assert value(during, metrics.TRAIN_STEP_SECONDS) == pytest.approx(1 / report.images_per_s)
    assert value(during, metrics.TRAIN_DATA_WAIT) == pytest.approx(report.data_wait_share)
    assert value(during, metrics.TRAIN_WORKERS) == 1
    assert began < value(during, metrics.TRAIN_LAST_REPORT) < scraped
    for found in (during, after):
        assert total(found, metrics.TRAIN_STARTS) == {(run_id,): 1}
    assert total(after, metrics.RUNS_ENDED)[run_id, "train", "done"] == 1


def test_a_node_of_another_masklake_is_refused_in_one_line(shrinking: RayCluster, tmp_path: Path) -> None:
    other = tmp_path / "site" / "masklake-0.0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: masklake\nVersion: 0.0.9\n")
    own_path = shrinking.env["PYTHONPATH"]
    shrinking.env["PYTHONPATH"] = f"{other.parent}:{own_path}"
    try:
        _, node = added_node(shrinking)
    finally:
        shrinking.env["PYTHONPATH"] = own_path
    job = Job(write_source(tmp_path / "images", make_images(1)), str(tmp_path / "lake"))
    refused = shrinking.driver(job).wait()
    node.process.terminate()
    node.process.wait(60)
    refused.check_clear_end(2)
    # Ray takes 127.0.0.1, where it was told so, for this machine's own address.
    assert re.match(r"masklake: node \S+ has masklake 0\.0\.9, and here is masklake", refused.last_line)


@pytest.mark.chaos
def test_a_node_that_is_drained_in_a_training_costs_it_few_steps(
    shrinking: RayCluster, tmp_path: Path
) -> None:
    """Checkpoints are days apart, but for the one that the warning brings about."""
    scaling = {"num_workers": "1..2", "cpus_per_worker": 2}  # one on each node
    command = training(tmp_path, steps=100_000, scaling=scaling, checkpoint={"every_s": 1e6})
    drained, node = added_node(shrinking)
    driver = shrinking.run("jobs.cli", command, {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"})
    wait_until(lambda: '"loss"' in driver.stderr, driver)
    assert drained in ask(shrinking, _DRAIN, node=drained, seconds=DRAIN_S)
    checkpoints = tmp_path / "run" / "checkpoints"
    # A run begins with one.
    wait_until(lambda: len([*checkpoints.glob("step-*.safetensors")]) == 2, driver)
    node.process.terminate()
    taken: dict[int, int] = {}  # by how many workers: the last step

    def has_gone_on() -> bool:
        for path in sorted((tmp_path / "run").glob("metrics/*")):
            for report in map(from_json_line, path.read_text().splitlines()):
                assert isinstance(report, StepMetrics)
                taken[report.num_workers] = max(report.step, taken.get(report.num_workers, 0))
        return 1 in taken

    wait_until(has_gone_on, driver)
    told = [json.loads(line) for line in driver.stderr.splitlines()]
    driver.kill()
    driver.wait()
    (note,) = (line["note"] for line in told if "node goes in" in line.get("note", ""))
    found = re.fullmatch(r"node goes in \d+ s: (\w{12}); a checkpoint is written at step (\d+)", note)
    assert found is not None, note
    assert drained.startswith(found[1])
    written = int(found[2])
    assert [line["first_step"] for line in told if "started" in line] == [0, written]
    assert written <= taken[2] <= written + FEW_STEPS


def test_a_drained_node_goes_in_mid_run_and_every_image_is_there_once(
    shrinking: RayCluster, tmp_path: Path
) -> None:
    images = make_images(300)
    source = write_source(tmp_path / "images", make_source("files", images))
    settings = ("pool.min_actors=2", "pool.max_actors=2", "model.min_size_px=192", "model.max_size_px=256")
    job = Job(source, str(tmp_path / "lake"), max_images=1, every_images=4, settings=settings)
    drained, node = added_node(shrinking)
    driver = shrinking.driver(job)
    wait_until(lambda: len(read_table(job.lake, DISK).rows) >= 4, driver)
    assert drained in ask(shrinking, _DRAIN, node=drained, seconds=DRAIN_S)
    before = len(read_table(job.lake, DISK).rows)
    wait_until(lambda: len(read_table(job.lake, DISK).rows) >= before + 4, driver)
    node.process.terminate()
    ended = driver.wait()
    assert ended.status == 0, ended.stderr
    assert judge(read_table(job.lake, DISK), list(images.values())) == []
