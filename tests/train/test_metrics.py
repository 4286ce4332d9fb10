import json
import math
from dataclasses import replace

import pytest

from jobs.train.metrics import EvalMetrics, History, StepMetrics, from_json_line, to_json_line

STEP = StepMetrics(3, {"loss_mask": 0.5, "loss_objectness": 0.25}, 0.01, 12.5, 0.02, 1 << 30, 4, 1.5)
EVALUATION = EvalMetrics(
    3,
    {"AP": 0.2},
    {"AP": 0.1},
    {"ünder|score\n": {"bbox_AP": 0.2, "segm_AP": -1.0}},
    5,
    {"truncated": 1},
    2.5,
)


@pytest.mark.parametrize("metrics", [STEP, EVALUATION, EvalMetrics(0, {}, {})])
def test_a_line_reads_back_as_what_was_written(metrics: StepMetrics | EvalMetrics) -> None:
    line = to_json_line(metrics)
    assert "\n" not in line
    assert from_json_line(line) == metrics


def test_the_loss_is_the_sum_of_its_terms() -> None:
    assert STEP.loss == 0.75
    assert replace(STEP, losses={}).loss == 0


def test_what_is_not_finite_is_null_in_json_and_nan_when_read() -> None:
    line = to_json_line(replace(STEP, grad_norm=math.inf, losses={"loss_mask": math.nan}))
    assert json.loads(line)["grad_norm"] is None
    read = from_json_line(line)
    assert isinstance(read, StepMetrics)
    assert math.isnan(read.grad_norm)
    assert math.isnan(read.losses["loss_mask"])


def test_a_field_of_a_newer_version_is_left_out() -> None:
    assert from_json_line(json.dumps(json.loads(to_json_line(STEP)) | {"humidity": 0.4})) == STEP


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"kind": "tea"}', '{"kind": "step", "step": 1}'])
def test_what_is_no_line_of_metrics_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a line of training metrics"):
        from_json_line(line)


def test_a_step_taken_again_after_a_restart_counts_as_it_was_last() -> None:
    again = replace(STEP, learning_rate=0.5)
    first = replace(STEP, step=1)
    lines = [to_json_line(m) for m in (STEP, EVALUATION, first, again)]
    assert History.from_lines(lines) == History((first, again), (EVALUATION,))
    assert History.from_lines([]) == History((), ())
    with pytest.raises(ValueError, match="not a line"):
        History.from_lines([*lines, lines[0][:40]])
