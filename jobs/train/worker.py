"""One worker of a training run: from the newest checkpoint to the last step.

Enters: a WorkerJob, the workers it is one of. Leaves: checkpoints and models below <out>, and metrics to
worker 0's watcher. All workers go through the same steps; worker 0 alone writes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from jobs.lake.storage import Storage
from jobs.train.batches import Batches, TrainingBatch
from jobs.train.calibration import recalibrate_batch_norm, stored_copy
from jobs.train.checkpoints import Checkpoints
from jobs.train.data_files import DataFile, fetch_data_file
from jobs.train.evaluation import GPU_BATCH_SIZE, evaluate_model
from jobs.train.image_locations import ImageReader
from jobs.train.memory import evaluation_memory, listed, step_memory, telling_what_takes_memory
from jobs.train.meter import Meter, take
from jobs.train.metrics import EvalMetrics
from jobs.train.optimizer import AveragedWeights, make_optimizer
from jobs.train.preemption import Ask, PreemptionWarnings, ask_nobody
from jobs.train.recipe import Recipe
from jobs.train.run_record import RunRecord
from jobs.train.state import Progress, TrainingStateError, restore, snapshot
from jobs.train.step import StepFigures, Stepper
from jobs.train.training_set import TrainingSet
from jobs.train.watcher import TrainWatcher
from jobs.train.workers import Workers
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.host_memory import keep_freed_memory
from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.predictor import NonFiniteError
from schemas.errors import StorageError
from schemas.train_spec import TrainSpec

# A look at the loss waits for the device, so it is not taken at every step.
_CHECK_EVERY_STEPS = 20
# While a node is about to go: the steps since the newest checkpoint go with it.
_SAVE_EVERY_S = 20.0
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
VERSIONED = ("masklake", "torch", "torchvision", "ray")


class DivergedError(FloatingPointError):
    """The loss or the gradients are not numbers; every worker sees it at the same step."""


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told.

    Attributes:
        data_folder: where sets are fetched to; None: a folder of each machine's own.
        torch_threads, loader_threads: of this worker.
        log_every_s: seconds between two reports; 0: each step is reported.
    """

    record: RunRecord
    recipe: Recipe
    spec: TrainSpec
    out_uri: str
    storage: Storage
    data_folder: Path | None
    torch_threads: int
    loader_threads: int
    log_every_s: float = 1.0


def train(
    job: WorkerJob, workers: Workers, watcher: TrainWatcher, ask_preemption: Ask = ask_nobody
) -> Progress:
    """Take the run to its end.

    Args:
        watcher: told of steps by worker 0 only, of images that cannot be read by each.
        ask_preemption: asked by worker 0 after each step; a node that goes is worth a checkpoint.

    Raises:
        DivergedError: the loss is not a number. Checkpoints from before stay.
        TrainingMemoryError: a step or an evaluation takes more memory than there is.
        NonFiniteError: an evaluation meets NaN that no step's loss has shown.
        TrainingStateError: the checkpoint is of another model.
        StorageError: data or checkpoints cannot be reached.
    """
    torch.set_num_threads(job.torch_threads)
    if workers.device.type == "cpu":
        keep_freed_memory()
    return _Run(job, workers, watcher, PreemptionWarnings(ask_preemption)).work()


class _Run:
    def __init__(
        self, job: WorkerJob, workers: Workers, watcher: TrainWatcher, preemptions: PreemptionWarnings
    ) -> None:
        self._job = job
        self._workers = workers
        self._watcher = watcher
        self._preemptions = preemptions
        self._recipe = job.recipe
        config = MaskRCNNConfig.from_dict(job.record.config)
        # Fresh weights are drawn and then replaced by the checkpoint's; channels_last is what convolves fast.
        model = MaskRCNN(config).to(workers.device).to(memory_format=torch.channels_last)
        self._model = model.train()
        self._average = AveragedWeights(model, job.recipe.ema_decay) if job.recipe.ema_decay else None
        self._optimizer = make_optimizer(model, job.recipe)
        self._checkpoints = Checkpoints(job.storage, job.out_uri, job.spec.checkpoint.keep)
        self._progress = self._resume()
        if job.recipe.compile:
            model.backbone.compile()
        self._sets = [self._fetch(file) for file in job.record.sets]
        self._evaluated = None if job.record.evaluation is None else self._fetch(job.record.evaluation)
        self._reader = ImageReader(job.storage)
        self._unreadable: Counter[str] = Counter()
        self._unchecked: list[_Taken] = []
        self._meter = Meter(job.recipe, workers.size, self._progress.step)
        self._last_saved_s = time.monotonic()
        self._node_goes_s = 0.0

    def work(self) -> Progress:
        recipe, first = self._recipe, self._progress.step
        stepper = Stepper(
            self._model, self._average, self._optimizer, recipe, self._workers, self._job.spec.recipe.seed
        )
        if self._is_first:
            images = ", ".join(f"{file.name} {file.num_images:,}" for file in self._job.record.sets)
            self._watcher.started(recipe.steps, first, f"{self._job.record.name} on {images} images")
        batches = self._batches().starting_at(first * recipe.accumulate)
        for step in range(first, recipe.steps):
            passes, waited_s = take(batches, recipe.accumulate)
            self._count_unreadable(passes)
            names = [name for batch in passes for name in batch.names]
            with telling_what_takes_memory(partial(self._told_of_step, step + 1, names, passes)):
                figures = stepper.step(passes, step, waited_s)
            self._progress = replace(self._progress, step=step + 1)
            is_last = step + 1 == recipe.steps
            is_evaluated = not is_last and self._is_evaluation_due()
            self._meter.add(figures)
            self._unchecked.append(_Taken(step + 1, names, figures))
            # An evaluation of weights that went wrong could not say at which step they did.
            if is_last or is_evaluated or (step + 1) % _CHECK_EVERY_STEPS == 0:
                self._check_finite()
            if self._is_first and (is_last or self._meter.seconds >= self._job.log_every_s):
                self._watcher.step(self._meter.read(step + 1, recipe.rate_at(step)))
            if is_evaluated:
                with self._meter.apart():
                    self._evaluate()
                if self._is_patience_at_its_end:
                    break
            # Weights that went wrong are not kept; the next look, which all take, says so.
            is_due = self._is_first and not is_last and self._is_checkpoint_due()
            if is_due and self._first_not_finite() is None:
                self._save()
        if self._unreadable:
            told = ", ".join(f"{count:,} {kind}" for kind, count in self._unreadable.items())
            self._watcher.note(f"worker {self._workers.rank} could not read images: {told}")
        self._finish()
        return self._progress

    @property
    def _is_first(self) -> bool:
        return self._workers.rank == 0

    @property
    def _result(self) -> MaskRCNN:
        """What is evaluated and kept: the average, or the model where there is none."""
        return self._model if self._average is None else self._average.model

    def _resume(self) -> Progress:
        """All workers take the checkpoint that worker 0 found."""
        found = self._checkpoints.newest() if self._is_first else None
        step = self._workers.from_first(-1 if found is None else found[1].step)
        if not self._is_first and step >= 0:
            found = self._checkpoints.newest(step)
        if found is None:
            raise TrainingStateError(f"there is no whole checkpoint in {self._job.out_uri}/checkpoints")
        tensors, progress = found
        restore(tensors, self._model, self._average, self._optimizer)
        return progress

    def _fetch(self, file: DataFile) -> TrainingSet:
        return fetch_data_file(file, self._job.data_folder, self._job.storage)

    def _batches(self, alone: bool = False) -> Batches:
        """This worker's share of each pass, or all of it."""
        spec, recipe = self._job.spec, self._recipe
        return Batches(
            self._sets,
            self._job.record.image_order(spec.recipe.seed),
            self._reader,
            recipe.augmentation,
            self._model.config,
            batch_size=recipe.total_batch // recipe.accumulate,
            rank=0 if alone else self._workers.rank,
            world_size=1 if alone else self._workers.size,
            seed=spec.recipe.seed,
            copy_paste=recipe.copy_paste,
            num_threads=self._job.loader_threads,
            pin_memory=self._workers.device.type == "cuda",
        )

    def _check_finite(self) -> None:
        """Look at the steps since the last look. All workers at the same step: an end is told of together."""
        bad = self._first_not_finite()
        if bad is not None:
            self._diverged(*bad)

    def _first_not_finite(self) -> tuple[_Taken, float] | None:
        """The first step since the last look that went wrong, which is the one to name, and its loss."""
        if not self._unchecked:
            return None
        figures = [step.figures for step in self._unchecked]
        values = torch.stack([torch.stack([step.loss, step.norm]) for step in figures]).tolist()
        for step, (loss, norm) in zip(self._unchecked, values, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                return step, loss
        self._unchecked = []
        return None

    def _diverged(self, taken: _Taken, loss: float) -> NoReturn:
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
        raise DivergedError(
            f"{what} at step {taken.step}; lower recipe.learning_rate, or set recipe.clip_norm, or look at "
            f"its images: {listed(self._workers.gather(taken.names))}. The last good checkpoint is "
            f"{self._checkpoints.uri_of(self._workers.from_first(self._whole_step()))}"
        )

    def _whole_step(self) -> int:
        """Of the newest checkpoint that this worker knows to be whole."""
        if self._is_first:
            with suppress(StorageError):
                self._checkpoints.wait()
        assert self._checkpoints.whole_step is not None  # a run begins by reading one
        return self._checkpoints.whole_step

    def _told_of_step(self, step: int, names: Sequence[str], passes: Sequence[TrainingBatch]) -> str:
        height, width = max((batch.images.shape[-2:] for batch in passes), key=math.prod)
        images = max(len(batch.images) for batch in passes)
        instances = sum(len(target.boxes) for batch in passes for target in batch.targets)
        return (
            f"step {step} takes more memory than there is: {images} images of {width}x{height} px a pass "
            f"and worker, {instances} instances ({listed(names)}); {step_memory(self._recipe)}"
        )

    def _count_unreadable(self, passes: Sequence[TrainingBatch]) -> None:
        """Tell of the first of a kind; the others are counted."""
        for batch in passes:
            for image in batch.unreadable:
                self._unreadable[image.kind] += 1
                if self._unreadable[image.kind] == 1:
                    self._watcher.note(
                        f"image {image.name} is left out of training: {image.kind} ({image.problem})"
                    )

    def _is_checkpoint_due(self) -> bool:
        spec = self._job.spec.checkpoint
        if spec.every_steps is not None and self._progress.step % spec.every_steps == 0:
            return True
        # One that takes longer to write than every_s is not waited for by the next.
        if self._checkpoints.is_writing:
            return False
        if self._is_a_node_going():
            return True
        every_s = min(spec.every_s, _SAVE_EVERY_S) if time.time() < self._node_goes_s else spec.every_s
        return time.monotonic() - self._last_saved_s >= every_s

    def _is_a_node_going(self) -> bool:
        """Whether there is news of one; said in a note."""
        going = self._preemptions.news()
        if going is None:
            return False
        now_s = time.time()
        self._node_goes_s = max(self._node_goes_s, going.end_s(now_s))
        self._watcher.note(f"{going.told(now_s)}; a checkpoint is written at step {self._progress.step}")
        return True

    def _save(self) -> None:
        self._last_saved_s = time.monotonic()
        with self._meter.apart(), telling_what_takes_memory(self._told_of_snapshot):
            tensors = snapshot(self._model, self._average, self._optimizer)
            self._checkpoints.save_behind(tensors, self._progress)

    def _told_of_snapshot(self) -> str:
        return (
            f"the copy that becomes the checkpoint of step {self._progress.step} takes more memory than the "
            "node has; raise scaling.cpus_per_worker, so that fewer workers share it, or lower "
            "scaling.loader_threads"
        )

    def _is_evaluation_due(self) -> bool:
        every = self._job.spec.evaluate.every_steps
        return self._evaluated is not None and every is not None and self._progress.step % every == 0

    @property
    def _is_patience_at_its_end(self) -> bool:
        patience = self._job.spec.evaluate.patience
        return patience is not None and self._progress.worse_in_a_row >= patience

    def _finish(self) -> None:
        """Evaluate, write what came out; the last checkpoint says that all is done."""
        model, metrics = self._evaluate()
        self._write_model("last", model, metrics)
        if self._progress.best_ap < 0:  # AP was never measured
            self._write_model("model", model, metrics)
        if self._is_first:
            self._save()
            self._checkpoints.wait()
        if self._workers.size > 1:
            dist.barrier()

    def _evaluate(self) -> tuple[MaskRCNN, EvalMetrics | None]:
        """Measure the AP of what the run would leave now, and keep that if it is the best so far.

        Returns:
            what the run would leave, and its figures, None without images to measure on.
        """
        with telling_what_takes_memory(self._told_of_calibration):
            model = self._candidate()
        if self._evaluated is None:
            return model, None
        with telling_what_takes_memory(self._told_of_evaluation):
            metrics = self._measured(model, self._evaluated)
        ap, progress = metrics.segm["AP"], self._progress
        if ap > progress.best_ap:
            self._progress = replace(progress, best_ap=ap, best_step=progress.step, worse_in_a_row=0)
            self._write_model("model", model, metrics)
        elif ap >= 0:  # else there is no annotation to find, which is no news of the model
            self._progress = replace(progress, worse_in_a_row=progress.worse_in_a_row + 1)
        if self._is_first:
            self._watcher.evaluated(metrics)
        return model, metrics

    def _candidate(self) -> MaskRCNN:
        """What the run would leave if it ended now; the same on all workers."""
        recipe, workers = self._recipe, self._workers
        model = stored_copy(self._result, _DTYPES[self._job.spec.out.dtype])
        if recipe.calibration_batches:
            # What would be learnt from after the end; the same images at each evaluation.
            first = recipe.steps * recipe.accumulate
            batches = self._batches(alone=True).starting_at(first + workers.rank, workers.size)
            recalibrate_batch_norm(model, batches, recipe.calibration_batches, workers)
        elif workers.size > 1:  # each has gathered batch norm's statistics from images of its own
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        return model

    def _measured(self, model: MaskRCNN, data: TrainingSet) -> EvalMetrics:
        spec, step = self._job.spec.evaluate, self._progress.step
        try:
            return evaluate_model(
                model,
                data,
                self._reader.read,
                self._workers,
                step=step,
                precision=self._recipe.precision,  # type: ignore[arg-type]  # fp32 or bf16
                num_threads=self._job.loader_threads,
                max_images=spec.max_images,
                per_category=spec.per_category,
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the evaluation after step {step}, whose loss was still finite, met NaN or infinity; lower "
                "recipe.learning_rate, or set recipe.clip_norm. A good checkpoint is "
                f"{self._checkpoints.uri_of(self._whole_step())}"
            ) from error

    def _told_of_calibration(self) -> str:
        recipe = self._recipe
        return (
            f"measuring batch norm's statistics after step {self._progress.step} takes more memory than "
            f"there is: passes of {recipe.total_batch // recipe.accumulate} images on each worker; raise "
            f"recipe.accumulate (now {recipe.accumulate}) or set recipe.calibration_batches=0"
        )

    def _told_of_evaluation(self) -> str:
        config = self._model.config
        images = GPU_BATCH_SIZE if self._workers.device.type == "cuda" else 1
        return (
            f"the evaluation after step {self._progress.step} takes more memory than there is, beside the "
            f"training's own: images of up to {config.max_size_px} px, {images} at a time; "
            f"{evaluation_memory(config)}"
        )

    def _write_model(self, name: str, model: MaskRCNN, metrics: EvalMetrics | None) -> None:
        """<out>/<name>.safetensors, which `masklake infer` takes."""
        if not self._is_first:
            return
        record = self._job.record
        provenance: dict[str, Any] = {
            "run_id": record.run_id,
            "step": self._progress.step,
            "recipe": asdict(self._recipe) | {"seed": self._job.spec.recipe.seed},
            "start": dict(record.origin),
            "data": [_described(file) | {"weight": file.weight} for file in record.sets],
            "evaluated_on": None if record.evaluation is None else _described(record.evaluation),
            "metrics": None if metrics is None else _figures(metrics),
            "versions": {package: version(package) for package in VERSIONED},
        }
        dtype = _DTYPES[self._job.spec.out.dtype]
        content = dump_checkpoint(model, record.name, dtype=dtype, provenance=provenance)
        self._job.storage.write_bytes(f"{self._job.out_uri}/{name}.safetensors", content)


@dataclass(frozen=True)
class _Taken:
    """A step that nobody has looked at yet: its number, its images on this worker, its figures."""

    step: int
    names: Sequence[str]
    figures: StepFigures


def _described(file: DataFile) -> dict[str, Any]:
    return {"name": file.name, "fingerprint": file.fingerprint, "num_images": file.num_images} | dict(
        file.description
    )


def _figures(metrics: EvalMetrics) -> dict[str, Any]:
    return {"bbox": dict(metrics.bbox), "segm": dict(metrics.segm), "num_images": metrics.num_images}
