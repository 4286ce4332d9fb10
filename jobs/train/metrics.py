"""What is measured of a training run: a StepMetrics at each report, an EvalMetrics at each evaluation.

Enters: numbers from rank 0. Leaves: lines of JSON and back, and the history that such lines tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """Where a run is after `step` steps: means over the steps since the last report.

    losses: the terms by name, means of the global batch; learning_rate: of the last step; images_per_s: of
    all workers, without the time of evaluations and of checkpoints' copies; data_wait_share: 0 to 1, of the
    same time, the mean over the workers; memory_bytes: the most that worker 0 has had, on its GPU or, without
    one, as a process; grad_norm: before clipping; num_unreadable: images that could not be read since the
    last report, of all workers.
    """

    step: int
    losses: Mapping[str, float]
    learning_rate: float
    images_per_s: float
    data_wait_share: float
    memory_bytes: int
    num_workers: int
    grad_norm: float
    num_unreadable: int = 0

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation, after `step` steps.

    bbox, segm: COCO's twelve figures (maskrcnn_core.coco_eval.METRICS), -1 where there is nothing to measure.
    per_category: name -> bbox_AP and segm_AP; empty unless asked for.
    unreadable: images that could not be read, by kind; they count as images without detections.
    """

    step: int
    bbox: Mapping[str, float]
    segm: Mapping[str, float]
    per_category: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    num_images: int = 0
    unreadable: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


Metrics = StepMetrics | EvalMetrics
_KINDS: dict[str, type[Metrics]] = {"step": StepMetrics, "eval": EvalMetrics}


def to_json_line(metrics: Metrics) -> str:
    """One line of JSON, without its end; NaN and infinity, which JSON does not have, become null."""
    kind = "step" if isinstance(metrics, StepMetrics) else "eval"
    return json.dumps({"kind": kind, **_finite(asdict(metrics))}, allow_nan=False)


def from_json_line(line: str) -> Metrics:
    """Read what to_json_line wrote; null becomes NaN. Fields that a newer version wrote are left out.

    Raises:
        ValueError: the line is not such a line, or only a part of one.
    """
    try:
        values = json.loads(line)
        metrics = _KINDS[values["kind"]]
        known = {f.name for f in fields(metrics)}
        return metrics(**{name: _numbers(value) for name, value in values.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a line of training metrics ({error}): {line[:80]!r}") from error


@dataclass(frozen=True)
class History:
    """A run so far, in order of steps. A step reported again after a restart counts as it was last."""

    steps: tuple[StepMetrics, ...]
    evaluations: tuple[EvalMetrics, ...]

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> History:
        """Read lines of JSON in the order in which they were written.

        Raises:
            ValueError: a line is damaged.
        """
        steps: dict[int, StepMetrics] = {}
        evaluations: dict[int, EvalMetrics] = {}
        for metrics in map(from_json_line, lines):
            if isinstance(metrics, StepMetrics):
                steps[metrics.step] = metrics
            else:
                evaluations[metrics.step] = metrics
        return cls(
            tuple(steps[number] for number in sorted(steps)),
            tuple(evaluations[number] for number in sorted(evaluations)),
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return math.nan if value is None else value
