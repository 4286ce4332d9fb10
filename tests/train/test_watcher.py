import io
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.watcher import (
    LinesWatcher,
    TerminalWatcher,
    TrainWatcher,
    WatcherGroup,
    default_watcher,
    evaluation_line,
    step_lines,
)
from tests.train.recording_watcher import RecordingWatcher

STEP = StepMetrics(
    1200,
    {
        "loss_objectness": 0.04,
        "loss_rpn_box_reg": 0.06,
        "loss_classifier": 0.2,
        "loss_box_reg": 0.2,
        "loss_mask": 0.3,
    },
    learning_rate=0.018,
    images_per_s=37.25,
    data_wait_share=0.013,
    memory_bytes=11 << 30,
    num_workers=8,
    grad_norm=3.2,
)
EVALUATION = EvalMetrics(
    1200,
    {"AP": 0.25, "AP50": -1.0},
    {"AP": 0.125, "AP50": 0.25},
    num_images=68,
    unreadable={"truncated": 2, "missing": 1},
)


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def clock(*times_s: float) -> Iterator[float]:
    return iter(times_s)


def terminal(width: int = 80) -> tuple[TerminalWatcher, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=24, color_system=None)
    return TerminalWatcher(console), screen


def test_step_lines_say_losses_rate_speed_wait_memory_and_workers_on_80_columns() -> None:
    half = replace(STEP, losses={name: value / 2 for name, value in STEP.losses.items()})
    first, terms, speed = step_lines([half, STEP])
    assert first == "loss 0.6000  learning rate 1.80e-02  gradient 3.20"
    assert terms == "objectness 0.030  rpn box 0.045  classifier 0.150  box 0.150  mask 0.225"
    assert speed == "37.2 images/s  1% of the time waiting for data  11.0 GiB  8 workers"
    assert all(len(line) <= 78 for line in step_lines([STEP]))


def test_an_evaluation_is_one_line_and_says_what_could_not_be_measured_or_read() -> None:
    assert evaluation_line(EVALUATION) == (
        "step 1,200: mask AP 0.125 (AP50 0.250), box AP 0.250 (AP50 –), 68 images, 3 unreadable"
    )
    assert evaluation_line(EvalMetrics(0, {}, {})).endswith("box AP – (AP50 –), 0 images")


def test_a_terminal_shows_a_bar_figures_evaluations_and_notes_as_they_are() -> None:
    watcher, screen = terminal()
    watcher.started(2000, 0, "lite on 407 images")
    watcher.step(STEP)
    watcher.evaluated(EVALUATION)
    watcher.note("a [note] with brackets")
    watcher.ended("done")
    shown = screen.getvalue()
    for part in ("lite on 407 images", "60 %", "step 1,200 of 2,000", "mask AP 0.125", "8 workers"):
        assert part in shown
    assert "a [note] with brackets" in shown
    assert "training ended" not in shown


def test_a_terminal_counts_on_from_the_step_at_which_workers_began_again() -> None:
    watcher, screen = terminal()
    watcher.started(2000, 0, "first")
    watcher.step(STEP)
    watcher.started(2000, 1000, "again")
    watcher.ended("interrupted")
    last = screen.getvalue().rsplit("again", 1)[1]
    assert "step 1,000 of 2,000" in last
    assert "waiting for the first step" in last
    assert "training ended: interrupted" in last


def test_a_fresh_run_begins_with_no_step_done() -> None:
    watcher, screen = terminal()
    watcher.started(2000, 0, "lite on 407 images")
    watcher.ended("interrupted")
    assert "step 0 of 2,000" in screen.getvalue()
    assert "step -" not in screen.getvalue()


def test_a_terminal_watcher_that_never_started_can_end() -> None:
    watcher, screen = terminal()
    watcher.ended("failed")
    assert screen.getvalue() == "training ended: failed\n"


def test_a_log_gets_one_json_line_an_interval_and_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    times = clock(0.0, 1.0, 2.0, 12.0, 13.0)
    watcher = LinesWatcher(interval_s=10.0, clock=lambda: next(times))
    watcher.started(4, 0, "lite")
    for number in (1, 2, 3, 4):
        watcher.step(replace(STEP, step=number))
    watcher.ended("done")
    lines = json_lines(capsys)
    assert lines[0] == {"started": "lite", "first_step": 0, "total_steps": 4}
    assert [line.get("step") for line in lines[1:-1]] == [1, 3, 4]
    assert lines[2]["eta_s"] == 4.0
    assert lines[2]["loss_mask"] == 0.3
    assert lines[2]["data_wait_share"] == 0.013
    assert lines[-1] == {"ended": "done"}


def test_a_log_gets_every_evaluation_and_note_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = LinesWatcher()
    watcher.started(4, 0, "lite")
    watcher.step(replace(STEP, losses={"loss_mask": float("nan")}))
    watcher.evaluated(EVALUATION)
    watcher.note("so")
    _, step, evaluation, note = json_lines(capsys)
    assert step["loss_mask"] is None
    assert evaluation["segm"] == {"AP": 0.125, "AP50": 0.25}
    assert evaluation["unreadable"] == {"truncated": 2, "missing": 1}
    assert note == {"note": "so"}


def test_without_a_terminal_lines_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    default_watcher().note("hello")
    assert json_lines(capsys) == [{"note": "hello"}]


def test_a_tracker_that_fails_is_noted_once_and_left_out() -> None:
    watcher, good, bad = RecordingWatcher(), RecordingWatcher(), RecordingWatcher(fails_at_step=2)
    group: TrainWatcher = WatcherGroup(watcher, [bad, good])
    steps = [replace(STEP, step=number) for number in (1, 2, 3)]
    group.started(3, 0, "lite")
    for metrics in steps:
        group.step(metrics)
    group.evaluated(EVALUATION)
    group.note("so")
    group.ended("done")
    everything = [(3, 0, "lite"), *steps, EVALUATION, "so", "done"]
    assert good.told == everything
    assert bad.told == everything[:2]
    noted = "RecordingWatcher failed and gets nothing more of this run: the other side is away"
    assert watcher.told == [*everything[:3], noted, *everything[3:]]


def test_the_watcher_s_own_error_is_raised() -> None:
    with pytest.raises(ConnectionError):
        WatcherGroup(RecordingWatcher(fails_at_step=STEP.step), []).step(STEP)
