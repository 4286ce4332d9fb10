"""Where a run's curves go while it lasts: TensorBoard always, MLflow and Weights & Biases when asked for.

Enters: metrics, as a TrainWatcher hears them. Leaves: scalars under the same names everywhere: train/loss,
train/loss_mask, ..., train/learning_rate, eval/bbox_AP, eval/segm_AP50, eval/category/NAME/segm_AP.

The clients of MLflow and Weights & Biases are not installed unless wanted, and find server and credentials in
their own environment variables and files.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jobs.lake.storage import Storage
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.watcher import TrainWatcher
from schemas.errors import UsageError

PROJECT: Final = "masklake"
UPLOAD_INTERVAL_S: Final = 300.0
SEND_INTERVAL_S: Final = 10.0
_MAX_METRICS = 1000  # of an MLflow request, as its REST API says
_MAX_PARAMS = 100
_MAX_PARAM_CHARS = 500  # what every version of MLflow's server takes
_MLFLOW_STATUS = {"done": "FINISHED", "interrupted": "KILLED"}


def open_trackers(
    names: Sequence[str], out_uri: str, run_id: str, settings: Mapping[str, Any], storage: Storage
) -> list[TrainWatcher]:
    """TensorBoard below `<out>/tensorboard`, and those that are named.

    Args:
        names: of "mlflow" and "wandb".
        run_id: letters, digits and dashes; a resumed run with the same id goes on with the same curves.
        settings: of the run, flat, to be shown beside it.

    Raises:
        UsageError: a client is not installed, or its server or credentials cannot be used.
    """
    trackers: list[TrainWatcher] = [TensorBoardTracker(f"{storage.normalize(out_uri)}/tensorboard", storage)]
    for name in names:
        tracker, package, label = _CLIENTS[name]
        try:
            client = importlib.import_module(package)
        except ImportError as error:
            raise UsageError(f"{label} is not installed ({error}): pip install 'masklake[{name}]'") from error
        try:
            trackers.append(tracker(client, run_id, settings))
        except Exception as error:  # each client has classes of its own
            raise UsageError(
                f"{label} refuses the run ({type(error).__name__}: {error}); check its server and "
                f"credentials, or leave out --set trackers"
            ) from error
    return trackers


def step_scalars(metrics: StepMetrics) -> dict[str, float]:
    """Names and values of a step; what is not finite is left out."""
    values = {
        "train/loss": metrics.loss,
        **{f"train/{name}": value for name, value in metrics.losses.items()},
        "train/learning_rate": metrics.learning_rate,
        "train/images_per_s": metrics.images_per_s,
        "train/data_wait_share": metrics.data_wait_share,
        "train/memory_GiB": metrics.memory_bytes / 2**30,
        "train/num_workers": float(metrics.num_workers),
        "train/grad_norm": metrics.grad_norm,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def eval_scalars(metrics: EvalMetrics) -> dict[str, float]:
    """Names and values of an evaluation; what could not be measured (-1) is left out."""
    values = {
        **{f"eval/bbox_{name}": value for name, value in metrics.bbox.items()},
        **{f"eval/segm_{name}": value for name, value in metrics.segm.items()},
        **{
            f"eval/category/{category}/{name}": value
            for category, figures in metrics.per_category.items()
            for name, value in figures.items()
        },
    }
    return {name: value for name, value in values.items() if value >= 0}


class TensorBoardTracker:
    """Event files for TensorBoard, at `uri`; of a resumed run, one more beside those there are.

    On a disk they grow in place. An object store cannot append: there the file is written on this machine and
    replaced in the store at evaluations, at the end, and each UPLOAD_INTERVAL_S.
    """

    def __init__(self, uri: str, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._uri = uri
        self._storage = storage
        self._clock = clock
        self._last_upload_s = clock()
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        if uri.startswith("file://"):
            self._folder = Path(uri.removeprefix("file://"))
        else:
            self._spool = tempfile.TemporaryDirectory(prefix="masklake-tensorboard-")
            self._folder = Path(self._spool.name)
        self._writer: Any = None

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        # what an earlier attempt wrote of the steps that are taken again is not shown
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)
        self._writer.add_text("run", description, first_step)

    def step(self, metrics: StepMetrics) -> None:
        self._write(step_scalars(metrics), metrics.step)
        if self._clock() - self._last_upload_s >= UPLOAD_INTERVAL_S:
            self._upload()

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._write(eval_scalars(metrics), metrics.step)
        self._upload()

    def note(self, text: str) -> None:
        """Nothing of it is shown."""

    def ended(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
        self._upload()
        if self._spool is not None:
            self._spool.cleanup()

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def _upload(self) -> None:
        """The newest event file; those before it are there already."""
        self._last_upload_s = self._clock()
        if self._writer is not None:
            self._writer.flush()
        files = sorted(self._folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
        if self._spool is not None and files:
            self._storage.write_bytes(f"{self._uri}/{files[-1].name}", files[-1].read_bytes())


class MlflowTracker:
    """A run in MLflow's experiment "masklake", found again by its run_id.

    By run id, not by MLflow's "active run", which belongs to one thread. Metrics go in batches.
    """

    def __init__(
        self,
        mlflow: Any,
        run_id: str,
        settings: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mlflow = mlflow
        self._clock = clock
        self._last_send_s = clock()
        self._metrics: list[Any] = []
        self._client = mlflow.MlflowClient()
        experiment_id = mlflow.set_experiment(PROJECT).experiment_id
        known = self._client.search_runs([experiment_id], f"tags.\"masklake.run_id\" = '{run_id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = self._client.create_run(experiment_id, run_name=run_id, tags={"masklake.run_id": run_id})
            self._id = run.info.run_id
            params = [
                mlflow.entities.Param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in settings.items()
            ]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._client.set_tag(self._id, "mlflow.note.content", description)

    def step(self, metrics: StepMetrics) -> None:
        self._add(step_scalars(metrics), metrics.step)
        if self._clock() - self._last_send_s >= SEND_INTERVAL_S:
            self._send()

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._add(eval_scalars(metrics), metrics.step)
        self._send()

    def note(self, text: str) -> None:
        """Nothing of it is shown."""

    def ended(self, status: str) -> None:
        self._send()
        self._client.set_terminated(self._id, _MLFLOW_STATUS.get(status, "FAILED"))

    def _add(self, scalars: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._metrics += [
            self._mlflow.entities.Metric(_mlflow_name(name), value, now_ms, step)
            for name, value in scalars.items()
        ]

    def _send(self) -> None:
        self._last_send_s = self._clock()
        while self._metrics:
            self._client.log_batch(self._id, metrics=self._metrics[:_MAX_METRICS])
            del self._metrics[:_MAX_METRICS]


class WandbTracker:
    """A run in the Weights & Biases project "masklake", with `step` as the axis of every curve.

    The client's own step only grows, so steps taken again after a restart would be dropped.
    """

    def __init__(self, wandb: Any, run_id: str, settings: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project=PROJECT,
            id=run_id,
            name=run_id,
            resume="allow",
            config=dict(settings),
            save_code=False,
            settings={"console": "off"},  # it would capture the terminal, bar and all
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._run.notes = description

    def step(self, metrics: StepMetrics) -> None:
        self._run.log({"step": metrics.step, **step_scalars(metrics)})

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._run.log({"step": metrics.step, **eval_scalars(metrics)})

    def note(self, text: str) -> None:
        """Nothing of it is shown."""

    def ended(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


_CLIENTS: dict[str, tuple[Callable[[Any, str, Mapping[str, Any]], TrainWatcher], str, str]] = {
    "mlflow": (MlflowTracker, "mlflow", "MLflow"),
    "wandb": (WandbTracker, "wandb", "Weights & Biases"),
}


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits, and _ - . / and blanks in the name of a metric."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)
