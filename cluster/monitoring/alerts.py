"""When somebody is to be woken, or told: rules for Prometheus.

Enters: nothing. Leaves: ALERTS, and the group of rules that they make. Each has a section of its name in
docs/runbook.md, which says what it means and what to do.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cluster import metrics
from cluster.monitoring.queries import (
    CLUSTER,
    GPUS,
    IDLE_GPUS,
    PENDING_ACTORS,
    RESTARTING_ACTORS,
    SPILLED_BYTES,
    busy_share,
    grown,
    newest,
    oldest,
)

# Where docs/runbook.md is served; a pager opens it, so it is the whole address. Put in your own.
RUNBOOK = "https://docs.example/masklake/runbook.md"
NO_COMMIT_S = 900
_SPILLED_BYTES = 10 * 2**30


@dataclass(frozen=True)
class Alert:
    """One rule.

    Attributes:
        expr: PromQL; there is an alert for each series it gives.
        holds: for how long, as Prometheus writes durations.
        severity: critical: labels are not made, or the run is gone. warning: they are made worse or dearer.
    """

    name: str
    expr: str
    holds: str
    severity: Literal["warning", "critical"]
    summary: str

    @property
    def anchor(self) -> str:
        """Of its section in the runbook."""
        return self.name.lower()

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.holds,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "runbook_url": f"{RUNBOOK}#{self.anchor}"},
        }


_RUN = f"{CLUSTER}, run_id, command"
_FAILED = '{status=~"failed|over_budget"}'


def _gone(window: str) -> str:
    """Runs that were there within the window, are not now, and did not say that they end."""
    info, ended = metrics.RUN_INFO.exported, metrics.RUNS_ENDED.exported
    return (
        f"max by ({_RUN}) (max_over_time({info}[{window}])) unless max by ({_RUN}) ({info})"
        f" unless max by ({_RUN}) (max_over_time({ended}[{window}]))"
    )


ALERTS: tuple[Alert, ...] = (
    Alert(
        "MasklakeNoCommit",
        f"time() - {oldest(metrics.LAST_COMMIT)} > {NO_COMMIT_S}",
        "1m",
        "critical",
        "A label run has committed nothing for 15 minutes.",
    ),
    Alert(
        "MasklakeRunGone",
        _gone("15m"),
        "2m",
        "critical",
        "Run {{ $labels.run_id }} is not there any more and has not ended in good order.",
    ),
    Alert(
        "MasklakeRunFailed",
        f"{grown(metrics.RUNS_ENDED.exported + _FAILED, '30m', 'run_id', 'status')} > 0",
        "0m",
        "critical",
        "Run {{ $labels.run_id }} ended: {{ $labels.status }}.",
    ),
    Alert(
        "MasklakeFailureBudget",
        f"{newest(metrics.BUDGET_USED)} > 0.8",
        "5m",
        "warning",
        "More than 80 % of failures.budget is used; above 100 % the run ends with status 3.",
    ),
    Alert(
        "MasklakeActorsPending",
        f"{PENDING_ACTORS} > 0 and {IDLE_GPUS} >= 1",
        "10m",
        "warning",
        "Label actors wait to be started while GPUs are free.",
    ),
    Alert(
        "MasklakeGpusIdle",
        f"{busy_share('10m')} < 0.5 and {GPUS} > 0",
        "15m",
        "warning",
        "Label actors are in the network for less than half of their time.",
    ),
    Alert(
        "MasklakeObjectStoreSpilling",
        f"{SPILLED_BYTES} > {_SPILLED_BYTES}",
        "10m",
        "warning",
        "More than 10 GiB of objects lie on the nodes' disks instead of in memory.",
    ),
    Alert(
        "MasklakeNodeLost",
        # Ray counts every node that ends, those that an autoscaler took away idle, too.
        f"{grown('ray_node_failure_total', '15m')} > 0 and max_over_time(({RESTARTING_ACTORS})[15m:30s]) > 0",
        "0m",
        "warning",
        "A Ray node went away, and label actors with it.",
    ),
    Alert(
        "MasklakeTrainingStalled",
        f"time() - {oldest(metrics.TRAIN_LAST_REPORT)} > {NO_COMMIT_S}",
        "1m",
        "critical",
        "A training run has reported no step for 15 minutes.",
    ),
    Alert(
        "MasklakeTrainingRestarts",
        f"{grown(metrics.TRAIN_STARTS.exported, '1h', 'run_id')} > 3",
        "0m",
        "warning",
        "The workers of {{ $labels.run_id }} began anew more than three times within an hour.",
    ),
    Alert(
        "MasklakeTrainingLossNotFinite",
        f"{grown(metrics.TRAIN_NONFINITE.exported, '30m', 'run_id')} > 0",
        "0m",
        "critical",
        "The loss of {{ $labels.run_id }} is not a finite number.",
    ),
    Alert(
        "MasklakeTrainingDataWait",
        f"{newest(metrics.TRAIN_DATA_WAIT)} > 0.2",
        "15m",
        "warning",
        "Training workers wait for data for more than a fifth of their time.",
    ),
)


def rule_groups() -> dict[str, Any]:
    """A file for Prometheus' rule_files, and the spec of a PrometheusRule."""
    return {"groups": [{"name": "masklake", "rules": [alert.rule() for alert in ALERTS]}]}
