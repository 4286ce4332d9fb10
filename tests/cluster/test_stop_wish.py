from __future__ import annotations

import _thread
import json
import os
import signal
import time
from unittest.mock import MagicMock

import pytest
import ray
from ray.exceptions import ActorDiedError

from cluster.session import ClusterInfo
from cluster.stop_wish import StoppedError, bring_wish, own_submission_id, stoppable

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def test_a_process_that_is_no_job_has_no_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert own_submission_id() is None
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {}}))
    assert own_submission_id() is None


def test_a_driver_knows_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"metadata": {"job_submission_id": "infer-1", "job_name": "infer-1"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(config))
    assert own_submission_id() == "infer-1"


def test_sigterm_ends_a_command_in_one_line_and_the_handler_of_before_is_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="run the same command again"), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_go_through() -> None:
    with pytest.raises(ZeroDivisionError), stoppable():
        1 / 0  # noqa: B018 - it is the error that is wanted


def test_a_wish_that_came_right_before_a_sleep_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """interrupt_main() marks a signal as seen and ends no wait: what a signal a moment too early does."""
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "infer-1"}}))
    for name in ("connect", "shutdown"):
        monkeypatch.setattr(f"cluster.stop_wish.{name}", lambda: None)
    monkeypatch.setattr("cluster.stop_wish._Listener._keeper", MagicMock())
    monkeypatch.setattr("cluster.stop_wish._RETRY_S", 0.1)

    def wait(refs: list[object], timeout: float) -> tuple[list[object], list[object]]:
        time.sleep(0.5)  # until the main thread sleeps
        return refs, []

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", MagicMock())
    monkeypatch.setattr(
        "cluster.stop_wish.interrupt_main_thread", lambda: _thread.interrupt_main(signal.SIGTERM)
    )
    began = time.monotonic()
    with pytest.raises(StoppedError), stoppable():
        time.sleep(20)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_wish_reaches_the_driver_and_its_actor_ends_with_it(
    local_ray: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"infer-{os.getpid()}"
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": name}}))

    @stoppable()
    def job() -> None:
        assert bring_wish(name) is None  # the wish may be heard before its answer is here
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(StoppedError):
        job()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("names_found", "said"), [(1, None), (9, "does not answer")])
def test_an_actor_that_is_gone_before_it_answers_was_told(
    names_found: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([True] * names_found + [False] * 9)

    def get_actor(name: str, namespace: str) -> MagicMock:
        if not next(looks):
            raise ValueError("no such actor")
        return MagicMock()

    monkeypatch.setattr("cluster.stop_wish._APPEARS_S", 0.1)
    monkeypatch.setattr("cluster.stop_wish._RETRY_S", 0.06)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "get", MagicMock(side_effect=ActorDiedError()))
    assert bring_wish("infer-1") == said


@pytest.mark.slow
def test_a_job_without_an_actor_cannot_be_told(
    local_ray: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.stop_wish._APPEARS_S", 0.1)
    assert bring_wish("nobody") == "has no actor that takes wishes"
