"""The metrics that jobs export, through Ray: one scrape of a Ray node's metrics port has them all.

Enters: counts and figures, in any process of a job. Leaves: time series of Prometheus, under the names below
with "ray_" before them, and Ray's own labels beside ours (NodeAddress, SessionName, WorkerId, Version). A
process without Ray records nothing, and does not import Ray for it.

Ray 2.60 sends every 10 s and once more when a process leaves it in good order; counters stay at the node's
agent after that, gauges go after 20 s. A gauge that is no number is not exported at all.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal, Protocol

PREFIX = "ray_"  # ray/_private/telemetry/open_telemetry_metric_recorder.py


@dataclass(frozen=True)
class Metric:
    """One name. kind: a counter only grows, and rate() is for it; a gauge is the newest figure.

    labels: of few values each, or of one value a run; never what there is one of for each image.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.kind == "counter") == self.name.endswith("_total"), self.name

    @property
    def exported(self) -> str:
        """As Prometheus sees it."""
        return PREFIX + self.name


RUN_INFO = Metric(
    "masklake_run_info",
    "gauge",
    "1 while the driver of a run is at work; command is infer or train.",
    ("run_id", "command", "model_id"),
)
RUNS_ENDED = Metric(
    "masklake_runs_ended_total",
    "counter",
    "1 once a run has ended in good order: done, interrupted, over_budget or failed. A killed one has none.",
    ("run_id", "command", "status"),
)
IMAGES = Metric(
    "masklake_committed_images_total",
    "counter",
    "Images that a commit of this run made visible, each once. error_kind is empty where status is ok.",
    ("status", "error_kind"),
)
DETECTIONS = Metric(
    "masklake_committed_detections_total", "counter", "Detections in images that were committed."
)
COMMITS = Metric("masklake_commits_total", "counter", "Commits to the label table.")
LAST_COMMIT = Metric(
    "masklake_last_commit_timestamp_seconds",
    "gauge",
    "Unix time of the run's last commit, or of its start before the first: time() minus it is the age.",
)
UNCOMMITTED_IMAGES = Metric(
    "masklake_uncommitted_images", "gauge", "Images that are labelled and wait for the next commit."
)
BUDGET_USED = Metric(
    "masklake_failure_budget_used_ratio",
    "gauge",
    "Failed images over those that failures.budget allows so far, at least 1: above 1 the run ends.",
)
READ_BYTES = Metric(
    "masklake_read_bytes_total",
    "counter",
    "Encoded bytes of images in units that were read, on the node that read them; a second attempt counts.",
)
WRITTEN_BYTES = Metric(
    "masklake_written_bytes_total",
    "counter",
    "Bytes of fragments that were written, on the node that wrote them; a second attempt counts.",
)
LABEL_SECONDS = Metric(
    "masklake_label_seconds_total", "counter", "Seconds that label actors had a unit in work."
)
NETWORK_SECONDS = Metric(
    "masklake_network_seconds_total",
    "counter",
    "Seconds that label actors were in the network, masks included: its rate is their GPUs' busy share.",
)
TRAIN_STARTS = Metric(
    "masklake_train_starts_total",
    "counter",
    "Starts of the workers of a training run: 1, and one more each time they began anew.",
    ("run_id",),
)
TRAIN_STEP = Metric("masklake_train_step", "gauge", "Steps that the training run has taken.")
TRAIN_STEP_SECONDS = Metric(
    "masklake_train_step_seconds", "gauge", "Seconds a step took, the mean since the last report."
)
TRAIN_LOSS = Metric("masklake_train_loss", "gauge", "Loss, the mean since the last report; only if finite.")
TRAIN_NONFINITE = Metric(
    "masklake_train_nonfinite_losses_total", "counter", "Reports whose loss was not finite.", ("run_id",)
)
TRAIN_DATA_WAIT = Metric(
    "masklake_train_data_wait_ratio", "gauge", "Share of the time that workers waited for data, 0 to 1."
)
TRAIN_WORKERS = Metric("masklake_train_workers", "gauge", "Workers that train.")
TRAIN_LAST_REPORT = Metric(
    "masklake_train_last_report_timestamp_seconds",
    "gauge",
    "Unix time of the last report of steps or of an evaluation, or of the workers' start before the first.",
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class Recorder(Protocol):
    """Takes figures; no call waits or fails."""

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """More of a counter; nothing where amount is 0."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge's newest figure."""


class NoRecorder:
    """Records nothing: there is no Ray."""

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        pass

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        pass


class RayRecorder:
    """By ray.util.metrics. One a process: Ray takes each name once."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray refuses 0
            self._of(metric, labels).inc(amount, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._of(metric, labels).set(value, labels)

    def _of(self, metric: Metric, labels: dict[str, str]) -> Any:
        assert labels.keys() == set(metric.labels), f"{metric.name} has labels {metric.labels}, got {labels}"
        made = self._made.get(metric.name)
        if made is None:
            from ray.util import metrics

            kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            made = self._made.setdefault(metric.name, kind(metric.name, metric.help, metric.labels))
        return made


_RAY = RayRecorder()
_NONE = NoRecorder()


def recorder() -> Recorder:
    """This process's; ask again after it joined or left a cluster."""
    ray = sys.modules.get("ray")
    return _RAY if ray is not None and ray.is_initialized() else _NONE
