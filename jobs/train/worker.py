"""One worker of a training run: from the newest checkpoint to the last step.

Enters: a WorkerJob, the workers it is one of. Leaves: checkpoints and models below <out>, and metrics to
worker 0's watcher. All workers go through the same steps; worker 0 alone writes.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.lake.storage import Storage
from jobs.train.batches import Batches, TrainingBatch
from jobs.train.calibration import recalibrate_batch_norm
from jobs.train.checkpoints import Checkpoints
from jobs.train.data_files import DataFile, fetch_data_file
from jobs.train.evaluation import evaluate_model
from jobs.train.image_locations import ImageReader
from jobs.train.image_order import ImageOrder
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.optimizer import AveragedWeights, make_optimizer
from jobs.train.preemption import Ask, PreemptionWarnings, ask_nobody
from jobs.train.recipe import Recipe
from jobs.train.run_record import RunRecord
from jobs.train.state import Progress, TrainingStateError, restore, snapshot
from jobs.train.step import Stepper
from jobs.train.training_set import TrainingSet
from jobs.train.watcher import TrainWatcher
from jobs.train.workers import Workers
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.model import MaskRCNN
from schemas.errors import StorageError
from schemas.train_spec import TrainSpec

# A look at the loss waits for the device, so it is not taken at every step.
_CHECK_EVERY_STEPS = 20
# While a node is about to go: the steps since the newest checkpoint go with it.
_SAVE_EVERY_S = 20.0
_SHOWN_NAMES = 16
# Allocations that fail on a CPU are plain RuntimeErrors.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
VERSIONED = ("masklake", "torch", "torchvision", "ray")


class DivergedError(FloatingPointError):
    """The loss or the gradients are not numbers; every worker sees it at the same step."""


class TrainingMemoryError(MemoryError):
    """A step took more memory than there is; one worker may see it and the others not."""


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
        TrainingMemoryError: a step takes more memory than there is.
        TrainingStateError: the checkpoint is of another model.
        StorageError: data or checkpoints cannot be reached.
    """
    torch.set_num_threads(job.torch_threads)
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
        self._meter = _Meter(job.recipe, workers.size, self._progress.step)
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
        batches = self._batches(first * recipe.accumulate)
        for step in range(first, recipe.steps):
            passes = [self._meter.wait_for(batches) for _ in range(recipe.accumulate)]
            self._count_unreadable(passes)
            names = [name for batch in passes for name in batch.names]
            with self._telling_what_takes_memory(step + 1, names, passes):
                terms, norm = stepper.step(passes, step)
            self._progress = replace(self._progress, step=step + 1)
            is_last = step + 1 == recipe.steps
            self._meter.add(terms, norm)
            self._unchecked.append(_Taken(step + 1, names, torch.stack([*terms.values()]).sum(), norm))
            if is_last or (step + 1) % _CHECK_EVERY_STEPS == 0:
                self._check_finite()
            if self._is_first and (is_last or self._meter.seconds >= self._job.log_every_s):
                self._watcher.step(self._meter.read(step + 1, recipe.rate_at(step)))
            every = self._job.spec.evaluate.every_steps
            if not is_last and every is not None and (step + 1) % every == 0 and self._evaluate():
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

    def _batches(self, first: int, alone: bool = False) -> Iterator[TrainingBatch]:
        """This worker's share of each pass, or all of it; from pass number `first` on."""
        spec, recipe = self._job.spec, self._recipe
        order = ImageOrder(
            [len(data) for data in self._sets],
            [file.weight for file in self._job.record.sets],
            spec.recipe.seed,
        )
        return Batches(
            self._sets,
            order,
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
        ).starting_at(first)

    def _check_finite(self) -> None:
        """Look at the steps since the last look. All workers at the same step: an end is told of together."""
        bad = self._first_not_finite()
        if bad is not None:
            self._diverged(*bad)

    def _first_not_finite(self) -> tuple[_Taken, float] | None:
        """The first step since the last look that went wrong, which is the one to name, and its loss."""
        if not self._unchecked:
            return None
        values = torch.stack([torch.stack([step.loss, step.norm]) for step in self._unchecked]).tolist()
        for step, (loss, norm) in zip(self._unchecked, values, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                return step, loss
        self._unchecked = []
        return None

    def _diverged(self, taken: _Taken, loss: float) -> NoReturn:
        if self._is_first:
            with suppress(StorageError):
                self._checkpoints.wait()
        saved = self._workers.from_first(self._checkpoints.last_step() if self._is_first else 0)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
        raise DivergedError(
            f"{what} at step {taken.step}; lower recipe.learning_rate, or set recipe.clip_norm, or look at "
            f"its images: {_listed(self._workers.gather(taken.names))}. The last good checkpoint is "
            f"{self._checkpoints.uri_of(saved)}"
        )

    @contextmanager
    def _telling_what_takes_memory(
        self, step: int, names: Sequence[str], passes: Sequence[TrainingBatch]
    ) -> Iterator[None]:
        """
        Raises:
            TrainingMemoryError: in place of torch's own error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not _is_out_of_memory(error):
                raise
            height, width = max((batch.images.shape[-2:] for batch in passes), key=math.prod)
            images = max(len(batch.images) for batch in passes)
            instances = sum(len(target.boxes) for batch in passes for target in batch.targets)
            recipe = self._recipe
            sides = "recipe.shorter_sides" if recipe.canvas_px is None else "recipe.canvas_px"
            raise TrainingMemoryError(
                f"step {step} takes more memory than there is: {images} images of {width}x{height} px a pass "
                f"and worker, {instances} instances ({_listed(names)}); raise recipe.accumulate (now "
                f"{recipe.accumulate}) or scaling.num_workers, or lower recipe.total_batch (now "
                f"{recipe.total_batch}) or {sides}"
            ) from error

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
        tensors = snapshot(self._model, self._average, self._optimizer)
        self._checkpoints.save_behind(tensors, self._progress)

    def _evaluate(self) -> bool:
        """Measure AP, keep the model if it is the best so far; True: it has been none too often."""
        if self._evaluated is None:
            return False
        spec = self._job.spec.evaluate
        if self._workers.size > 1:  # each has gathered batch norm's statistics from images of its own
            for buffer in self._result.buffers():
                dist.broadcast(buffer, 0)
        metrics = evaluate_model(
            self._result,
            self._evaluated,
            self._reader.read,
            self._workers,
            step=self._progress.step,
            precision=self._recipe.precision,  # type: ignore[arg-type]  # fp32 or bf16
            num_threads=self._job.loader_threads,
            max_images=spec.max_images,
            per_category=spec.per_category,
        )
        ap = metrics.segm["AP"]
        if ap > self._progress.best_ap:
            self._progress = replace(
                self._progress, best_ap=ap, best_step=self._progress.step, worse_in_a_row=0
            )
            self._write_model("model", metrics)
        else:
            self._progress = replace(self._progress, worse_in_a_row=self._progress.worse_in_a_row + 1)
        if self._is_first:
            self._watcher.evaluated(metrics)
        return spec.patience is not None and self._progress.worse_in_a_row >= spec.patience

    def _finish(self) -> None:
        """Calibrate, evaluate, write what came out; the last checkpoint says that all is done."""
        if self._recipe.calibration_batches:
            self._calibrate()
        self._evaluate()
        self._write_model("last", None)
        if self._evaluated is None:
            self._write_model("model", None)
        if self._is_first:
            self._save()
            self._checkpoints.wait()
        if self._workers.size > 1:
            dist.barrier()

    def _calibrate(self) -> None:
        """Worker 0 measures; the others take its figures when it is evaluated."""
        result = self._result
        if self._is_first:
            batches = self._batches(self._recipe.steps * self._recipe.accumulate, alone=True)
            recalibrate_batch_norm(result, batches, self._recipe.calibration_batches)

    def _write_model(self, name: str, metrics: EvalMetrics | None) -> None:
        """<out>/<name>.safetensors, which `masklake infer` takes."""
        if not self._is_first:
            return
        record = self._job.record
        provenance: dict[str, Any] = {
            "run_id": record.run_id,
            "step": self._progress.step,
            "recipe": self._job.spec.recipe.model_dump(mode="json", exclude_none=True),
            "start": dict(record.origin),
            "data": [
                {"name": file.name, "fingerprint": file.fingerprint, "num_images": file.num_images}
                | dict(file.description)
                for file in record.sets
            ],
            "metrics": None if metrics is None else {"bbox": dict(metrics.bbox), "segm": dict(metrics.segm)},
            "versions": {package: version(package) for package in VERSIONED},
        }
        dtype = _DTYPES[self._job.spec.out.dtype]
        content = dump_checkpoint(self._result, record.name, dtype=dtype, provenance=provenance)
        self._job.storage.write_bytes(f"{self._job.out_uri}/{name}.safetensors", content)


@dataclass(frozen=True)
class _Taken:
    """A step that nobody has looked at yet: its number, images, loss and norm of the gradients."""

    step: int
    names: Sequence[str]
    loss: Tensor
    norm: Tensor


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


class _Meter:
    """Means over the steps since the last report."""

    def __init__(self, recipe: Recipe, num_workers: int, step: int) -> None:
        self._recipe = recipe
        self._num_workers = num_workers
        self._start(step)

    def _start(self, step: int) -> None:
        self._step = step
        self._started = time.monotonic()
        self._waited = 0.0
        self._terms: dict[str, Tensor] = {}
        self._norm: Tensor | float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def wait_for(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def add(self, terms: dict[str, Tensor], norm: Tensor) -> None:
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + term
        self._norm = self._norm + norm

    def read(self, step: int, rate: float) -> StepMetrics:
        """The means, and begin anew."""
        num_steps = step - self._step
        losses = {name: float(term) / num_steps for name, term in self._terms.items()}
        norm = float(self._norm) / num_steps
        seconds = self.seconds  # after the device was waited for
        metrics = StepMetrics(
            step=step,
            losses=losses,
            learning_rate=rate,
            images_per_s=num_steps * self._recipe.total_batch / seconds,
            data_wait_share=min(1.0, self._waited / seconds),
            memory_bytes=_memory_bytes(),
            num_workers=self._num_workers,
            grad_norm=norm,
        )
        self._start(step)
        return metrics


def _memory_bytes() -> int:
    """The most that was taken: of the GPU, where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
