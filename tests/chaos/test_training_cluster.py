"""Training while nodes of a real Ray go and come: it goes on with those there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ray_settings import RAY_SETTINGS
from jobs.demo.lake import write_scene_lake
from jobs.lake.storage import Storage
from jobs.train.metrics_log import read_history
from tests.chaos.ray_cluster import ray_cluster
from tests.chaos.test_ray_cluster import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

STEPS = 1000
CHECKPOINT_EVERY = 20
# Steps that can be taken while a checkpoint is written beside them and its news travels.
IN_FLIGHT = 20


def told(stderr: str) -> Iterator[dict[str, Any]]:
    """The JSON lines among what was printed; the last line may be half there."""
    for line in stderr[: stderr.rfind("\n") + 1].splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def starts(stderr: str) -> list[tuple[int, int, int]]:
    """Of each start: the step it went on from, its workers, the last step that was told of it."""
    found: list[tuple[int, int, int]] = []
    first = 0
    is_new = False
    for line in told(stderr):
        if "started" in line:
            first, is_new = line["first_step"], True
        elif "loss" in line:
            if is_new:
                found.append((first, line["workers"], line["step"]))
                is_new = False
            else:
                found[-1] = (*found[-1][:2], line["step"])
    return found


def test_a_lost_node_and_an_added_one_change_how_many_train(tmp_path: Path, disk: Storage) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "run"
    write_scene_lake(scenes, range(10_000_000, 10_000_012), 2)
    spec = {
        "data": {"scenes": {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}},
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "out": {"uri": str(out)},
        "recipe": {
            "name": "scenes",
            "steps": STEPS,
            "total_batch": 2,
            "precision": "fp32",
            "shorter_sides": [64],
            "calibration_batches": 0,
        },
        "scaling": {"num_workers": "1..2", "cpus_per_worker": 1},
        "checkpoint": {"every_steps": CHECKPOINT_EVERY, "every_s": 10.0},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(spec))
    with ray_cluster(**RAY_SETTINGS) as cluster:
        cluster.start_head(num_cpus=1)
        lost = cluster.add_node(num_cpus=1)
        driver = cluster.run("jobs.cli", ["train", str(tmp_path / "train.yaml"), "--json"])

        def trains(workers: list[int]) -> bool:
            return [number for _, number, last in starts(driver.stderr) if last > CHECKPOINT_EVERY] == workers

        assert wait_until(lambda: trains([2]), driver), driver.stderr
        lost.kill()
        assert wait_until(lambda: trains([2, 1]), driver), driver.stderr
        cluster.add_node(num_cpus=1)
        ended = driver.wait(900)
    assert ended.status == 0, ended.stderr
    found = starts(ended.stderr)
    print(found)
    assert [number for _, number, _ in found] == [2, 1, 2]
    steps = [metrics.step for metrics in read_history(str(out), disk).steps]
    assert steps[-1] == STEPS
    for (_, _, last), (first, _, _) in pairwise(found):
        assert first >= last - CHECKPOINT_EVERY - IN_FLIGHT
