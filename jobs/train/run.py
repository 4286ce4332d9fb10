"""`masklake train`: train a Mask R-CNN on a Ray cluster.

    prepare (data, first weights) -> workers, from the newest checkpoint to the last step -> model, report

The folder <out> is the run: the same command takes it up where its newest checkpoint is. The driver holds its
lease, so two of them never train into one folder.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import ray.train
from ray.exceptions import OutOfMemoryError
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from cluster.growing import planned_with_room
from cluster.session import connect, shutdown
from cluster.stop_wish import interrupt_main_thread, stoppable
from cluster.train_profiles import TrainPlan, least_train_room, train_plan
from jobs.lake.lease import Lease
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import MissingObjectError, Storage
from jobs.train.beginning import begin
from jobs.train.data_files import DataFile, fetch_data_file
from jobs.train.image_locations import ImageReader
from jobs.train.mailbox import Mailbox, Sender
from jobs.train.memory import death_for_memory, evaluation_memory, listed, step_memory
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.metrics_export import MetricsExport
from jobs.train.metrics_log import MetricsLog, read_history
from jobs.train.one_machine import OneMachineTrainer
from jobs.train.own_address import OwnAddressConfig
from jobs.train.preemption import ask_ray_train
from jobs.train.recipe import Recipe, make_recipe
from jobs.train.report import DataFacts, RunFacts, write_report
from jobs.train.run_record import RunRecord, new_run_id, read_record
from jobs.train.samples import take_samples
from jobs.train.state import TrainingStateError
from jobs.train.trackers import open_trackers
from jobs.train.watcher import TrainWatcher, WatcherGroup
from jobs.train.worker import VERSIONED, DivergedError, WorkerJob, train
from jobs.train.workers import Workers
from maskrcnn_core.checkpoint import Checkpoint, parse_checkpoint
from maskrcnn_core.config import MaskRCNNConfig
from schemas.errors import MasklakeError, UsageError
from schemas.train_spec import TrainSpec

LEASE_TTL_S = 120.0
# A worker that waits for one that died is told by its process group; this is for one that hangs.
_COLLECTIVE_TIMEOUT_S = 1800
_LEASE_LOOK_S = 1.0


class TrainingFailedError(MasklakeError):
    """Training ended before its last step; checkpoints stay, the same command goes on from the newest."""


class TrainingInterruptedError(TrainingFailedError):
    """The run was asked to stop."""


@dataclass
class TrainSummary:
    """What a run came to; <out>/summary.json.

    seconds, unreadable_images: of this start of it; an image counts each time that a step wanted it. ap: mask
    AP of the best model.
    """

    run_id: str
    out: str
    model: str
    status: str = "running"  # done | failed | interrupted
    steps: int = 0
    first_step: int = 0
    seconds: float = 0.0
    unreadable_images: int = 0
    ap: float | None = None
    evaluation: dict[str, Any] | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    registered: str | None = None
    workers: int = 0
    hardware: str = ""
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@stoppable()
def run_train(spec: TrainSpec, watcher: TrainWatcher, log_every_s: float = 1.0) -> TrainSummary:
    """Train, or go on.

    Raises:
        UsageError: spec, data or model cannot work.
        LeaseHeldError: another driver trains into this folder.
        MasklakeError: the run ended early; its class says how.
    """
    started = time.monotonic()
    storage = Storage(spec.storage)
    out_uri = storage.normalize(spec.out.uri)
    recipe = make_recipe(spec.recipe)
    _check_batch(spec, recipe)
    storage.check_reachable(out_uri, "out.uri")
    storage.probe_conditional_put(out_uri)
    with Lease.acquire(storage, out_uri, "train", f"train on {socket.gethostname()}", LEASE_TTL_S) as lease:
        record = read_record(out_uri, spec, storage)
        if record is not None and (done := _read_summary(out_uri, storage)).status == "done":
            _register_done(spec, record, done, storage, watcher)
            return done
        record = record or begin(spec, recipe, out_uri, storage, watcher.note)
        summary = TrainSummary(record.run_id, out_uri, f"{out_uri}/model.safetensors")
        summary.data = [asdict(file) for file in record.sets]
        driver = _Driver(
            spec, recipe, record, lease, out_uri, storage, watcher, summary, log_every_s, started
        )
        try:
            driver.work()
            summary.status = "done"
        except BaseException as error:
            is_asked = isinstance(error, (KeyboardInterrupt, TrainingInterruptedError))
            summary.status = "interrupted" if is_asked else "failed"
            summary.error = str(error) or type(error).__name__
            raise
        finally:
            summary.seconds = time.monotonic() - started
            if not lease.lost:
                _write_summary(summary, storage)
    return summary


def _write_summary(summary: TrainSummary, storage: Storage) -> None:
    storage.write_bytes(f"{summary.out}/summary.json", json.dumps(asdict(summary), indent=1).encode())


def _read_summary(out_uri: str, storage: Storage) -> TrainSummary:
    """Of the last start of a run; one that was killed has left none, or an older one."""
    try:
        info = storage.stat(f"{out_uri}/summary.json")
        return TrainSummary(**json.loads(storage.read_bytes(info)))
    except MissingObjectError:
        return TrainSummary("", out_uri, "")


def _register_done(
    spec: TrainSpec, record: RunRecord, done: TrainSummary, storage: Storage, watcher: TrainWatcher
) -> None:
    """All that can be asked of a run that is done: that its model gets a name in the registry."""
    if spec.register_as.name is None:
        watcher.note(f"nothing to do: run {record.run_id} is done.")
        return
    before = done.registered
    content, where = read_checkpoint_bytes(done.model, storage)
    done.registered = _register(spec, record, done, content, parse_checkpoint(content, where), storage)
    if done.registered == before:
        watcher.note(f"nothing to do: run {record.run_id} is done, its model registered as {before}.")
    else:
        _write_summary(done, storage)
        watcher.note(f"run {record.run_id} is done; its model is registered as {done.registered}.")


def _register(
    spec: TrainSpec,
    record: RunRecord,
    summary: TrainSummary,
    content: bytes,
    checkpoint: Checkpoint,
    storage: Storage,
) -> str:
    """NAME@VERSION of a run's model: the version that an earlier start made of it, or else a new one."""
    name = spec.register_as.name
    assert name is not None
    assert spec.lake_uri is not None  # the spec asks for it
    registry = ModelRegistry(spec.lake_uri, storage)
    for known in reversed(registry.versions(name)):
        if known.facts.get("run_id") == record.run_id:
            return str(known)
    facts = {"run_id": record.run_id, "evaluation": summary.evaluation}
    return str(registry.register(name, content, checkpoint.fingerprint, facts))


def _check_batch(spec: TrainSpec, recipe: Recipe) -> None:
    _, most = spec.worker_range
    images = recipe.total_batch // recipe.accumulate
    if images < most:
        raise UsageError(
            f"a pass has {images} images and scaling.num_workers is up to {most}; each worker needs one: "
            "raise recipe.total_batch, or lower recipe.accumulate or the workers"
        )


@dataclass
class _Driver:
    """The driver's side of one start of a run."""

    spec: TrainSpec
    recipe: Recipe
    record: RunRecord
    lease: Lease
    out_uri: str
    storage: Storage
    watcher: TrainWatcher
    summary: TrainSummary
    log_every_s: float
    started: float

    def work(self) -> None:
        settings = self._settings()
        trackers = open_trackers(self.spec.trackers, self.out_uri, self.record.run_id, settings, self.storage)
        outcome = _Outcome(self.summary)
        export = MetricsExport(self.record.run_id, self.record.name, self.recipe.total_batch)
        log = MetricsLog(self.out_uri, self.storage)
        group = WatcherGroup(self.watcher, [outcome, log, export, *trackers])
        cluster = connect()
        try:
            plan = planned_with_room(
                lambda nodes: train_plan(nodes, self.spec),
                cluster,
                least_train_room(self.spec),
                self.spec.scaling.wait_for_nodes_s,
                self.watcher.note,
            )
            if not plan.use_gpu and self.record.config["norm"] == "sync_bn":
                raise UsageError(
                    "model.norm sync_bn is for GPUs, and this run has none; take frozen_bn, bn or gn, and "
                    "another --out"
                )
            self.summary.workers = plan.max_workers
            self.summary.hardware = (
                f"{len(cluster.nodes)} nodes, {cluster.num_cpus:g} CPUs, {cluster.num_gpus:g} GPUs"
            )
            mailbox = Mailbox()
            try:
                with mailbox.delivering_to(group), _interrupted_when_lost(self.lease):
                    error = self._fit(plan, mailbox.sender(), is_embedded=cluster.started_here)
            finally:
                mailbox.close()
            if not outcome.is_told:  # else it is the workers' own word that counts
                group.ended("failed")
        except KeyboardInterrupt:
            if self.lease.lost:  # the trackers, too, are the other's now
                self.watcher.ended("failed")
                raise self._lost() from None
            group.ended("interrupted")
            raise TrainingInterruptedError(
                f"stopped at step {self.summary.steps}; run the same command again to go on."
            ) from None
        except BaseException:
            group.ended("failed")
            raise
        finally:
            shutdown()
        if outcome.failure is not None:
            raise TrainingFailedError(f"{outcome.failure}. What was saved before stays in {self.out_uri}.")
        if not outcome.is_told:
            why = "the workers ended without a word" if error is None else self._why_given_up(error)
            raise TrainingFailedError(
                f"{why}. Run the same command again to go on from the newest checkpoint."
            ) from error
        self._close()

    def _lost(self) -> MasklakeError:
        return MasklakeError(
            f"another run took the lease of {self.out_uri} over while this one was paused, or the store "
            f"could not be reached for {LEASE_TTL_S:.0f} s; this one writes nothing more there. Once no "
            "other trains there, the same command goes on from the newest checkpoint."
        )

    def _fit(self, plan: TrainPlan, sender: Sender, *, is_embedded: bool) -> Exception | None:
        """Train; gives the error where Ray gave the workers up. One that they told of says more."""
        workers: int | tuple[int, int] = plan.max_workers
        if plan.min_workers < plan.max_workers:
            workers = plan.min_workers, plan.max_workers
        make_trainer = OneMachineTrainer if is_embedded and isinstance(workers, int) else TorchTrainer
        with tempfile.TemporaryDirectory(prefix="masklake-train-") as folder:
            job = WorkerJob(
                self.record,
                self.recipe,
                self.spec,
                self.out_uri,
                self.storage,
                None,
                plan.torch_threads,
                plan.loader_threads,
                self.log_every_s,
            )
            trainer = make_trainer(
                _train_on_ray,
                train_loop_config={"job": job, "sender": sender},
                torch_config=OwnAddressConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=plan.use_gpu,
                    resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
                    # More workers begin at the newest checkpoint, so there should be a new one.
                    elastic_resize_monitor_interval_s=self.spec.checkpoint.every_s,
                ),
                run_config=RunConfig(  # type: ignore[arg-type]  # its types say the class of before
                    # Ray answers a name that it has seen with the old result. Checkpoints are our own, so
                    # nothing of Ray's has to outlive this call.
                    name=new_run_id(),
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=self.spec.scaling.max_failures),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            try:
                trainer.fit()
            except (ray.train.TrainingFailedError, OutOfMemoryError) as error:
                return error
        return None

    def _why_given_up(self, error: Exception) -> str:
        times = f"the workers failed {self.spec.scaling.max_failures + 1} times, the last time"
        death = death_for_memory(error)
        if death is None:
            return f"{times} with: {_last_line(error)}"
        step = self.summary.steps
        names = self._names_of(step)
        images = f" ({listed(names)})" if names else ""
        return (
            f"{times} after step {step:,}, at step {step + 1:,}{images} or soon after it: {death}. Where it "
            f"was memory, in a step: {step_memory(self.recipe)}; in an evaluation: "
            f"{evaluation_memory(MaskRCNNConfig.from_dict(self.record.config))}; raise "
            "scaling.cpus_per_worker for fewer workers on a node"
        )

    def _names_of(self, step: int) -> list[str]:
        """Of the images of a step, counted from 0; none where a set cannot be had."""
        order = self.record.image_order(self.spec.recipe.seed)
        try:
            sets = [fetch_data_file(file, None, self.storage) for file in self.record.sets]
        except MasklakeError:
            return []
        images = self.recipe.total_batch
        draws = [order.at(position) for position in range(step * images, (step + 1) * images)]
        return [sets[draw.set_index].name(draw.index) for draw in draws]

    def _close(self) -> None:
        """Registration and report, once training is done."""
        if self.lease.lost:
            raise self._lost()
        history = read_history(self.out_uri, self.storage)
        if history.evaluations:
            best = max(history.evaluations, key=lambda metrics: metrics.segm["AP"])
            self.summary.ap = best.segm["AP"]
            self.summary.evaluation = {"bbox": dict(best.bbox), "segm": dict(best.segm), "step": best.step}
        content, where = read_checkpoint_bytes(self.summary.model, self.storage)
        checkpoint = parse_checkpoint(content, where)
        if self.spec.register_as.name is not None:
            self.summary.registered = _register(
                self.spec, self.record, self.summary, content, checkpoint, self.storage
            )
        files = [*self.record.sets, *([self.record.evaluation] if self.record.evaluation else [])]
        data = [
            DataFacts(file.name, _described(file), file.fingerprint, file.num_images, file.problems)
            for file in files
        ]
        settings = self._settings() | {
            "hardware": f"{self.summary.workers} workers on {self.summary.hardware}",
            "seconds": f"{time.monotonic() - self.started:,.0f} since the last start",
            **{package: version(package) for package in VERSIONED},
        }
        shown = self.record.evaluation or self.record.sets[0]
        data_set = fetch_data_file(shown, None, self.storage)
        samples = take_samples(checkpoint.build(), data_set, ImageReader(self.storage).read)
        facts_of_run = RunFacts(self.record.run_id, "done", settings, data, shown.name)
        write_report(self.out_uri, self.storage, facts_of_run, history, samples, checkpoint.config)

    def _settings(self) -> dict[str, str]:
        """What was asked for, as people and trackers are shown it."""
        recipe = {f"recipe.{key}": str(value) for key, value in asdict(self.recipe).items()}
        return {"model": self.spec.model.uri, "out": self.out_uri, **recipe}


class _Outcome:
    """Watches for the end of a run.

    is_told: whether a worker has said that it is at its end; failure: why it cannot go on, None where all
    steps were taken.
    """

    def __init__(self, summary: TrainSummary) -> None:
        self._summary = summary
        self.is_told = False
        self.failure: str | None = None

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._summary.first_step = self._summary.steps = first_step

    def step(self, metrics: StepMetrics) -> None:
        self._summary.steps = metrics.step
        self._summary.unreadable_images += metrics.num_unreadable

    def evaluated(self, metrics: EvalMetrics) -> None:
        """In the metrics log."""

    def note(self, text: str) -> None:
        """Shown by others."""

    def ended(self, status: str) -> None:
        if status not in ("failed", "interrupted"):  # these are the driver's own
            self.is_told = True
            self.failure = None if status == "done" else status


@contextmanager
def _interrupted_when_lost(lease: Lease) -> Iterator[None]:
    """Ends what is inside as Ctrl-C does once somebody else may have the lease, and so train there, too."""
    has_ended = threading.Event()

    def look() -> None:
        while not has_ended.wait(_LEASE_LOOK_S):
            if lease.lost:
                interrupt_main_thread()
                return

    thread = threading.Thread(target=look, name="look-at-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _train_on_ray(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker.

    An error that would come again is told to the driver. Where the other workers still wait for this one it
    is raised, too: Ray ends them all and starts them anew, to find that the run has ended.
    """
    sender: Sender = config["sender"]
    if sender.has_ended():
        return
    workers = Workers.joined(get_device())
    try:
        train(config["job"], workers, sender, ask_ray_train)
        if workers.rank == 0:
            sender.ended("done")
    except (FloatingPointError, MemoryError, TrainingStateError, UsageError) as error:
        sender.ended(str(error))
        if workers.size > 1 and not isinstance(error, DivergedError):
            raise
    finally:
        sender.flush()


def _described(file: DataFile) -> str:
    """A set's origin in a few words: `coco s3://…`, `lake s3://…, version 42`."""
    return ", ".join(f"{key} {value}" for key, value in file.description.items())


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
