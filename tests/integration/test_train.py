"""`masklake train` on Ray: from files to a model, over dead workers and dead drivers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.session import ClusterInfo, connect
from cluster.train_profiles import train_plan
from jobs.demo.lake import write_scene_lake
from jobs.infer.progress import JsonWatcher
from jobs.infer.run import run_infer
from jobs.lake.lease import Lease
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from jobs.train import run
from jobs.train.beginning import begin
from jobs.train.metrics import StepMetrics
from jobs.train.metrics_log import read_history
from jobs.train.recipe import make_recipe
from jobs.train.run import TrainingFailedError, run_train
from jobs.train.worker import WorkerJob, train
from jobs.train.workers import Workers
from schemas.errors import LeaseHeldError, UsageError
from schemas.spec_loader import load_spec, parse_spec
from schemas.specs import InferSpec, StorageSpec
from schemas.train_spec import TrainSpec
from tests.integration.conftest import S3Bucket
from tests.train.recording_watcher import RecordingWatcher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_lake(folder, range(10_000_000, 10_000_012), 2)
    return folder


def sections(scenes: Path, out: Path, **changes: Any) -> dict[str, Any]:
    recipe = {"name": "scenes", "steps": 6, "total_batch": 2, "precision": "fp32", "shorter_sides": [128]}
    return {
        "data": {"scenes": {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}},
        "model": {"uri": "lite"},
        "out": {"uri": str(out)},
        **changes,
        "recipe": recipe | {"calibration_batches": 0} | changes.get("recipe", {}),
    }


def make_spec(scenes: Path, out: Path, **changes: Any) -> TrainSpec:
    return parse_spec(TrainSpec, sections(scenes, out, **changes), "spec")


def losses(told: list[object]) -> dict[int, dict[str, float]]:
    return {metrics.step: dict(metrics.losses) for metrics in told if isinstance(metrics, StepMetrics)}


def test_a_model_is_trained_registered_and_not_trained_again(
    scenes: Path, tmp_path: Path, local_ray: ClusterInfo
) -> None:
    data = {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}
    spec = make_spec(
        scenes,
        tmp_path / "run",
        recipe={"steps": 2},
        evaluate={"data": data, "max_images": 2},
        register_as={"name": "scenes", "lake": str(tmp_path / "lake")},
    )
    watcher = RecordingWatcher()
    summary = run_train(spec, watcher, log_every_s=0.0)
    assert (summary.status, summary.steps, summary.registered) == ("done", 2, "scenes@1")
    assert list(losses(watcher.told)) == [1, 2]
    assert watcher.told[-1] == "done"
    history = read_history(str(tmp_path / "run"), Storage(StorageSpec()))
    assert [metrics.step for metrics in history.evaluations] == [2]
    (version,) = ModelRegistry(str(tmp_path / "lake"), Storage(StorageSpec())).versions("scenes")
    assert version.facts["run_id"] == summary.run_id
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "model.safetensors",
        "last.safetensors",
        "run.json",
        "spec.yaml",
        "summary.json",
        "tensorboard",
    } <= left

    again = RecordingWatcher()
    assert run_train(spec, again).run_id == summary.run_id
    assert again.told == [f"nothing to do: run {summary.run_id} is done, its model registered as scenes@1."]
    with pytest.raises(UsageError, match=r"holds run .* of another spec"):
        run_train(make_spec(scenes, tmp_path / "run", recipe={"steps": 3}), again)


def test_a_second_driver_is_told_who_trains_there(scenes: Path, tmp_path: Path) -> None:
    storage = Storage(StorageSpec())
    out = storage.normalize(str(tmp_path / "run"))
    with (
        Lease.acquire(storage, out, "train", "somebody else"),
        pytest.raises(LeaseHeldError, match="somebody else"),
    ):
        run_train(make_spec(scenes, tmp_path / "run"), RecordingWatcher())


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_command_once(
    scenes: Path, tmp_path: Path, local_ray: ClusterInfo
) -> None:
    """Ray would start the workers anew eight times."""
    spec = make_spec(scenes, tmp_path / "run", recipe={"learning_rate": 1e20, "steps": 3, "warmup_steps": 0})
    watcher = RecordingWatcher()
    with pytest.raises(TrainingFailedError, match=r"the loss is .* lower recipe\.learning_rate"):
        run_train(spec, watcher, log_every_s=0.0)
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_synchronised_batch_norm_without_a_gpu_is_refused(
    scenes: Path, tmp_path: Path, local_ray: ClusterInfo
) -> None:
    with pytest.raises(UsageError, match="sync_bn is for GPUs, and this run has none; take frozen_bn"):
        run_train(
            make_spec(scenes, tmp_path / "run", model={"uri": "lite", "norm": "sync_bn"}), RecordingWatcher()
        )


@pytest.mark.slow
def test_sets_are_mixed_from_a_bucket_into_a_bucket(
    scenes: Path, s3_bucket: S3Bucket, local_ray: ClusterInfo
) -> None:
    s3_bucket.upload(scenes)
    few = json.loads((scenes / "annotations.json").read_text())
    few["images"] = few["images"][:4]
    few["annotations"] = [a for a in few["annotations"] if a["image_id"] in {i["id"] for i in few["images"]}]
    s3_bucket.put("few.json", json.dumps(few).encode())
    images = f"{s3_bucket.uri}/images"
    asked = sections(
        scenes,
        Path("elsewhere"),
        data={
            "all": {"uri": f"coco:{s3_bucket.uri}/annotations.json", "images": images},
            "few": {"uri": f"coco:{s3_bucket.uri}/few.json", "images": images, "weight": 3.0},
        },
        storage={"endpoint_url": s3_bucket.endpoint_url},
        checkpoint={"every_steps": 2, "every_s": 1e6},
    )
    asked["out"] = {"uri": f"{s3_bucket.uri}/run"}
    watcher = RecordingWatcher()
    summary = run_train(parse_spec(TrainSpec, asked, "spec"), watcher, log_every_s=0.0)
    assert (summary.status, [data["num_images"] for data in summary.data]) == ("done", [12, 4])
    assert watcher.told[-1] == "done"
    keys = s3_bucket.list_keys("run/")
    assert {"run/model.safetensors", "run/data/all.arrow", "run/data/few.arrow", "run/report/report.md"} <= {
        *keys
    }
    assert [key for key in keys if "/checkpoints/" in key][-1] == "run/checkpoints/step-00000006.safetensors"


class KillsAWorker(RecordingWatcher):
    """SIGKILL to the last of the training workers when a step is told, once."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self.killed: list[int] = []

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        if metrics.step >= self._step and not self.killed:
            self.killed = training_workers()[-1:]
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


def training_workers() -> list[int]:
    """Pids of Ray Train's workers on this machine."""
    return sorted(pid for pid, name in ray_processes().items() if "TrainWorker" in name)


def ray_processes() -> dict[int, str]:
    """Names of the processes of Ray on this machine that run Python, an actor's begins with its class."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::"):
                found[int(folder.name)] = title.removeprefix(b"ray::").decode()
    return found


@pytest.mark.slow
def test_a_killed_worker_costs_less_than_a_checkpoints_interval(
    scenes: Path, tmp_path: Path, local_ray: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an embedded Ray, as a command starts it; on clusters nodes are lost, in tests/chaos."""
    monkeypatch.setattr(run, "connect", lambda: replace(connect(), started_here=True))
    settings: dict[str, Any] = {
        "model": {"uri": "lite", "norm": "frozen_bn"},
        "recipe": {"steps": 40},
        "scaling": {"num_workers": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"every_steps": 5, "every_s": 1e6},
    }
    at_random = random.randint(6, 32)
    print(f"killed at step {at_random}")
    whole, killed = RecordingWatcher(), KillsAWorker(at_random)
    run_train(make_spec(scenes, tmp_path / "whole", **settings), whole, log_every_s=0.0)
    summary = run_train(make_spec(scenes, tmp_path / "run", **settings), killed, log_every_s=0.0)
    assert killed.killed
    assert summary.status == "done"
    begun = {place: told[1] for place, told in enumerate(killed.told) if isinstance(told, tuple)}
    assert len(begun) == 2
    (_, first_begun), (restart, resumed_at) = begun.items()
    assert first_begun == 0
    # The workers are some steps ahead of what is told, and one checkpoint is written while they take more.
    reached = max(losses(killed.told[:restart]))
    assert reached - 10 <= resumed_at <= reached
    wanted = losses(whole.told)
    found = losses(killed.told)
    assert list(found) == list(range(1, 41))
    for step, terms in found.items():
        assert terms == pytest.approx(wanted[step], abs=1e-3), step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_taken_up_by_the_same_command_with_the_losses_of_an_unbroken_run(
    scenes: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "recipe": {"steps": 20},
        "checkpoint": {"every_steps": 5, "every_s": 1e6},
    }
    wanted = unbroken_losses(make_spec(scenes, tmp_path / "whole", **settings), tmp_path / "sets")
    spec = sections(scenes, tmp_path / "run", **settings)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "jobs.cli", "train", str(tmp_path / "train.yaml"), "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    of_others = ray_processes()
    driver = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while not list((tmp_path / "run/checkpoints").glob("step-0000001*")):
            assert time.monotonic() < deadline
            assert driver.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        running = " ".join(name for pid, name in ray_processes().items() if pid not in of_others)
    finally:
        driver.kill()
        driver.wait()
    assert "TrainController" in running
    assert not re.search("DatasetManager|PlacementGroupCleaner|AutoscalingCoordinator", running), running
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert (summary["status"], summary["steps"]) == ("done", 20)
    assert summary["first_step"] >= 10
    # The command reports once a second, so a report is the mean of the steps since the one before.
    before = summary["first_step"]
    resumed = [
        m for m in read_history(str(tmp_path / "run"), Storage(StorageSpec())).steps if m.step > before
    ]
    for metrics in resumed:
        taken = range(before + 1, metrics.step + 1)
        for name, term in metrics.losses.items():
            mean = sum(wanted[step][name] for step in taken) / len(taken)
            assert term == pytest.approx(mean, abs=1e-3), (taken, name)
        before = metrics.step
    assert before == 20


def unbroken_losses(spec: TrainSpec, folder: Path) -> dict[int, dict[str, float]]:
    """Of the same run without Ray, on as many threads, so that sums have the same order."""
    storage, recipe = Storage(spec.storage), make_recipe(spec.recipe)
    out_uri = storage.normalize(spec.out.uri)
    record = begin(spec, recipe, out_uri, storage, print)
    threads = train_plan([{"CPU": float(os.cpu_count() or 1)}], spec).torch_threads
    watcher = RecordingWatcher()
    job = WorkerJob(record, recipe, spec, out_uri, storage, folder, threads, 1, log_every_s=0.0)
    train(job, Workers(0, 1, torch.device("cpu")), watcher)
    return losses(watcher.told)


@pytest.mark.slow
def test_a_model_is_trained_on_the_labels_it_wrote_and_sees_them_as_they_were(
    scenes: Path, tmp_path: Path, local_ray: ClusterInfo
) -> None:
    lake = str(tmp_path / "lake")
    flags = {"source.uri": f"{scenes}/images", "model.uri": "demo", "lake.uri": lake}
    infer = load_spec(InferSpec, None, ["pool.max_actors=1"], **flags)
    labelled = run_infer(infer, JsonWatcher())
    version = labelled.committed_version
    data = {"labels": {"uri": f"lake:{lake}", "min_score": 0.3, "ignore_below": 0.7}}
    settings: dict[str, Any] = {"data": data, "model": {"uri": "demo"}, "recipe": {"steps": 2}}
    first = run_train(make_spec(scenes, tmp_path / "one", **settings), RecordingWatcher())
    (described,) = first.data
    assert described["num_images"] == 12
    assert described["description"]["version"] == version

    model = f"{tmp_path}/one/model.safetensors"
    second_labels = load_spec(InferSpec, None, ["pool.max_actors=1"], **{**flags, "model.uri": model})
    moved_on = run_infer(second_labels, JsonWatcher())
    assert moved_on.committed_version != version
    pinned = {"labels": {**data["labels"], "uri": f"lake:{lake}@{version}"}}
    again = run_train(make_spec(scenes, tmp_path / "two", **{**settings, "data": pinned}), RecordingWatcher())
    assert again.data[0]["fingerprint"] == described["fingerprint"]
