"""Label, label again and train over machines that share nothing but a network, of which some are lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.demo.lake import write_scene_lake
from jobs.lake.storage import Storage
from jobs.lake.views import current_labels
from jobs.train.metrics_log import read_history
from schemas.specs import StorageSpec
from tests.chaos.conftest import Reference
from tests.chaos.harness import Job, make_source
from tests.chaos.judge import Table, read_table
from tests.chaos.machines import Machine, Network, network, start_ray, why_not
from tests.integration.conftest import S3Bucket, S3Server

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

STORE_PORT = 9000
JOB_TIMEOUT_S = 600.0
# What a machine with a GPU would be: actors stand where this is.
GPU = "gpu_machine"


@dataclass
class Site:
    """Object storage, a head without CPUs for tasks, a machine that reads, and one that labels."""

    network: Network
    store: Machine
    head: Machine
    bucket: S3Bucket
    storage: Storage
    others: dict[str, Machine] = field(default_factory=dict)

    def add(self, name: str, cpus: int, **resources: float) -> Machine:
        machine = self.network.add(name)
        start_ray(machine, self.head, cpus=cpus, resources=resources)
        self.others[name] = machine
        return machine

    def masklake(self, *argv: str) -> subprocess.Popen[bytes]:
        """A command on the head; it finds the cluster there."""
        return self.head.run(
            sys.executable, "-m", "jobs.cli", *argv, env={"RAY_ADDRESS": f"{self.head.address}:6379"}
        )

    def put(self, prefix: str, objects: Mapping[str, bytes]) -> str:
        for name, data in objects.items():
            self.bucket.put(f"{prefix}/{name}", data)
        return f"{self.bucket.uri}/{prefix}"

    def table(self, lake: str) -> Table:
        return read_table(lake, self.storage)

    def wait_for(self, happened: Callable[[], object], run: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not happened():
            assert run.poll() is None, self.head.log()
            assert time.monotonic() < deadline, self.head.log()
            time.sleep(1)

    def summary(self, run: subprocess.Popen[bytes], prefix: str = "{") -> dict[str, Any]:
        """What the head's newest command printed at its end; it must have gone well."""
        assert run.wait(JOB_TIMEOUT_S) == 0, self.head.log()
        lines = [line for line in self.head.log().splitlines() if line.startswith(prefix)]
        summary: dict[str, Any] = json.loads(lines[-1])
        return summary


@contextmanager
def open_site(bucket_name: str, env: Mapping[str, str]) -> Iterator[Site]:
    """Object storage with an empty bucket, and a head. env: of every machine."""
    with network() as net:
        net.env.update(env)
        store = net.add("store")
        store.boot([sys.executable, "-m", "moto.server", "-H", store.address, "-p", str(STORE_PORT)])
        server = S3Server("moto", f"http://{store.address}:{STORE_PORT}")
        net.env["AWS_ENDPOINT_URL"] = server.endpoint_url
        client = server.client()
        bucket = S3Bucket(bucket_name, server, client)
        _until_it_answers(lambda: client.create_bucket(Bucket=bucket.name))
        head = net.add("head")
        start_ray(head, None, cpus=0)
        yield Site(net, store, head, bucket, Storage(StorageSpec(endpoint_url=server.endpoint_url)))


@pytest.fixture
def site() -> Iterator[Site]:
    with open_site("lake", {}) as opened:
        yield opened


def _until_it_answers(ask: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ask()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def test_labelling_goes_on_when_machines_are_cut_off_lose_power_and_come(
    site: Site, reference: Reference
) -> None:
    images = reference.first(24)
    source = site.put("images", make_source("tar", images, num_shards=8))
    lake = f"{site.bucket.uri}/lake"
    reader = site.add("reader", cpus=2)
    site.add("first-gpu", cpus=1, **{GPU: 1})
    settings = (f"pool.resources={{{GPU}: 1}}", "pool.min_actors=1", "pool.max_actors=2")
    job = Job(source, lake, max_images=1, every_images=4, settings=settings)

    run = site.masklake(*job.argv())
    site.wait_for(lambda: len(site.table(lake).rows) >= 4, run)
    site.others["first-gpu"].lose_power()
    site.add("second-gpu", cpus=1, **{GPU: 1})
    site.add("second-reader", cpus=2)
    reader.cut_off()
    began = time.monotonic()
    summary = site.summary(run)
    assert time.monotonic() - began < 240, "it stood still"
    assert summary["status"] == "done"
    assert reference.verdict(site.table(lake), images) == []

    # The same lake, labelled again for what changed since.
    gone, *_ = site.bucket.list_keys("images/")
    site.bucket.client.delete_object(Bucket=site.bucket.name, Key=gone)
    more = dict(list(reference.images.items())[24:])
    site.put("images", {"later.tar": make_source("tar", more, num_shards=1).popitem()[1]})
    summary = site.summary(site.masklake("relabel", *job.argv()[1:]))
    (part,) = summary["passes"]
    assert (summary["status"], part["images"], part["removed"]) == ("up_to_date", len(more), 3)
    current = current_labels(lake, site.storage).reader().read_all()
    assert current.num_rows == 24 - 3 + len(more)
    assert {row["shard"] for row in current.to_pylist()} & {"later.tar", Path(gone).name} == {"later.tar"}


def test_training_goes_on_with_the_machines_there_are(site: Site, tmp_path: Path) -> None:
    write_scene_lake(tmp_path / "scenes", range(10_000_000, 10_000_012), 1)
    site.bucket.upload(tmp_path / "scenes", prefix="scenes/")
    out = f"{site.bucket.uri}/run"
    spec = {
        "data": {
            "scenes": {
                "uri": f"coco:{site.bucket.uri}/scenes/annotations.json",
                "images": f"{site.bucket.uri}/scenes/images",
            }
        },
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": out},
        "recipe": {
            "name": "scenes",
            "steps": 300,
            "total_batch": 2,
            "precision": "fp32",
            "shorter_sides": [64],
            "calibration_batches": 0,
        },
        "scaling": {"num_workers": "1..2", "cpus_per_worker": 1},
        "checkpoint": {"every_steps": 20, "every_s": 10.0},
    }
    (site.head.disk / "train.yaml").write_text(yaml.safe_dump(spec))
    site.add("one", cpus=1)
    lost = site.add("two", cpus=1)

    run = site.masklake("train", "/tmp/train.yaml", "--json")

    def steps(workers: int) -> int:
        found = [json.loads(line) for line in site.head.log().splitlines() if line.startswith('{"step"')]
        return sum(line["workers"] == workers for line in found)

    site.wait_for(lambda: steps(2) > 2, run)
    lost.cut_off()
    site.wait_for(lambda: steps(1) > 2, run)
    summary = site.summary(run)
    assert summary["steps"] == 300
    assert [metrics.step for metrics in read_history(out, site.storage).steps][-1] == 300
