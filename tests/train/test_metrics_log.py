from dataclasses import replace
from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from jobs.train.metrics import EvalMetrics, History, StepMetrics
from jobs.train.metrics_log import MetricsLog, read_history
from schemas.errors import StorageError
from schemas.specs import StorageSpec

STEP = StepMetrics(1, {"loss_mask": 0.5}, 0.01, 12.5, 0.02, 1 << 30, 4, 1.5)
EVALUATION = EvalMetrics(2, {"AP": 0.5}, {"AP": 0.25})


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


def step(number: int, rate: float = 0.01) -> StepMetrics:
    return replace(STEP, step=number, learning_rate=rate)


def test_an_out_without_metrics_has_an_empty_history(tmp_path: Path, storage: Storage) -> None:
    assert read_history(f"{tmp_path}/run", storage) == History((), ())


def test_a_resumed_run_goes_on_with_its_history(tmp_path: Path, storage: Storage) -> None:
    log = MetricsLog(str(tmp_path), storage)
    log.started(4, 0, "lite")
    log.step(step(1))
    log.step(step(2))
    log.evaluated(EVALUATION)
    log.step(step(3))  # killed here: the third step was not written yet
    assert read_history(str(tmp_path), storage) == History((step(1), step(2)), (EVALUATION,))

    again = MetricsLog(str(tmp_path), storage)
    again.started(4, 1, "lite")
    again.note("so")
    again.step(step(2, rate=0.5))
    again.ended("done")
    assert read_history(str(tmp_path), storage) == History((step(1), step(2, rate=0.5)), (EVALUATION,))
    (tmp_path / "metrics" / "notes.txt").write_text("a user's own")
    MetricsLog(str(tmp_path), storage).ended("done")
    assert sorted(p.name for p in (tmp_path / "metrics").iterdir()) == [
        "000001.jsonl",
        "000002.jsonl",
        "notes.txt",
    ]


def test_steps_are_written_once_an_interval(tmp_path: Path, storage: Storage) -> None:
    times_s = iter((0.0, 30.0, 61.0, 62.0, 90.0))  # made, two steps, written, one step
    log = MetricsLog(str(tmp_path), storage, interval_s=60.0, clock=lambda: next(times_s))
    for number in (1, 2, 3):
        log.step(step(number))
    assert read_history(str(tmp_path), storage).steps == (step(1), step(2))


def test_what_could_not_be_written_is_written_later(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(str(tmp_path), storage, interval_s=0.0)

    def refuse(uri: str, data: bytes) -> None:
        raise StorageError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "create_exclusive", refuse)
        log.step(step(1))
        log.evaluated(EVALUATION)
        with pytest.raises(StorageError, match="away"):
            log.ended("done")
    assert read_history(str(tmp_path), storage) == History((), ())
    log.ended("done")
    assert read_history(str(tmp_path), storage) == History((step(1),), (EVALUATION,))


def test_a_damaged_file_is_named(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "000001.jsonl").write_bytes(b'{"kind"\xff')
    with pytest.raises(StorageError, match="metrics: not a line of training metrics"):
        read_history(str(tmp_path), storage)


def test_two_drivers_that_write_at_once_overwrite_nothing(tmp_path: Path, storage: Storage) -> None:
    paused, other = (MetricsLog(str(tmp_path), storage) for _ in range(2))
    other.step(step(1))
    other.ended("done")
    paused.step(step(2))
    paused.ended("interrupted")
    assert [metrics.step for metrics in read_history(str(tmp_path), storage).steps] == [1, 2]
