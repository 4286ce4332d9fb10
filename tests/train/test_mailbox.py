import pickle
import time
from dataclasses import replace

import pytest

from jobs.train.mailbox import Letter, LetterBox, Mailbox, Sender
from jobs.train.metrics import EvalMetrics, StepMetrics
from tests.train.recording_watcher import RecordingWatcher

STEP = StepMetrics(1, {"loss_mask": 0.5}, 0.01, 12.5, 0.02, 1 << 30, 4, 1.5)


def test_letters_are_taken_once_in_order_and_an_empty_box_gives_none() -> None:
    box = LetterBox()
    assert box.take() == []
    letters = [Letter("note", ("a",)), Letter("ended", ("b",))]
    for letter in letters:
        box.put(letter)
    assert box.take() == letters
    assert box.take() == []


def test_a_box_that_nobody_empties_drops_the_oldest_and_says_how_many() -> None:
    box = LetterBox(max_letters=2)
    for text in "abcde":
        box.put(Letter("note", (text,)))
    assert [letter.arguments[0] for letter in box.take()] == [
        "3 reports of training came too fast.",
        "d",
        "e",
    ]
    assert box.take() == []


def test_the_first_end_that_is_told_counts() -> None:
    box = LetterBox()
    assert not box.has_ended()
    for status in ("the loss is nan", "done"):
        box.put(Letter("ended", (status,)))
    assert box.take() == [Letter("ended", ("the loss is nan",))]
    assert box.has_ended()


@pytest.mark.usefixtures("local_ray")
def test_what_a_worker_tells_its_watcher_the_driver_s_watcher_hears_in_order() -> None:
    evaluation = EvalMetrics(2, {"AP": 0.5}, {"AP": 0.25})
    mailbox = Mailbox()
    sender: Sender = pickle.loads(pickle.dumps(mailbox.sender()))  # as it travels to a worker
    recorder = RecordingWatcher()
    with mailbox.delivering_to(recorder, interval_s=0.02):
        sender.started(3, 0, "lite")
        sender.step(STEP)
        sender.flush()
        deadline = time.monotonic() + 10
        while len(recorder.told) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert recorder.told == [(3, 0, "lite"), STEP]  # while it lasts, not only at the end
        sender.evaluated(evaluation)
        sender.note("so")
        sender.ended("done")
        sender.flush()
    assert recorder.told == [(3, 0, "lite"), STEP, evaluation, "so", "done"]

    sender.step(replace(STEP, step=2))
    sender.flush()
    with (
        pytest.raises(ConnectionError, match="away"),
        mailbox.delivering_to(RecordingWatcher(fails_at_step=2)),
    ):
        pass

    mailbox.close()
    recorder = RecordingWatcher()
    with mailbox.delivering_to(recorder, interval_s=0.02):
        sender.step(STEP)  # fails nobody
        sender.flush()
        time.sleep(0.1)
    (note,) = recorder.told
    assert str(note).startswith("no news of training for now: ")
