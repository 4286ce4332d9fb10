from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import aiohttp
import pytest
from ray.job_submission import JobDetails

from cluster.jobs_api import ClusterUnreachableError, JobsApi
from jobs.submit import following
from jobs.submit.following import ask_to_stop, print_log, wait_for
from jobs.submit.outcome import JobFailedError
from schemas.errors import UsageError
from tests.submit.fake_dashboard import details


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_POLL_S", "_RECONNECT_S"):
        monkeypatch.setattr(following, name, 0.001)


class ScriptedApi:
    """A cluster with one job: the next status at each look; an exception in its place is raised."""

    address = "http://head:8265"

    def __init__(self, *statuses: str | BaseException, log: str = "", code: int | None = 0) -> None:
        self._statuses: Iterator[str | BaseException] = iter(statuses)
        self._log = log
        self._code = code
        self.messenger: tuple[int, str] = 0, "asked"
        self.submitted: list[str] = []
        self.tails: list[list[str | BaseException]] = []

    def job(self, submission_id: str) -> JobDetails:
        if submission_id.startswith("stop-"):
            said = self.messenger[0]
            return JobDetails(
                **details(submission_id, "FAILED" if said else "SUCCEEDED", driver_exit_code=said)
            )
        status = next(self._statuses)
        if isinstance(status, BaseException):
            raise status
        code = None if status == "RUNNING" else self._code
        return JobDetails(**details(submission_id, status, driver_exit_code=code))

    def log(self, submission_id: str) -> str:
        return self.messenger[1] if submission_id.startswith("stop-") else self._log

    def submit(self, submission_id: str, entrypoint: str, env_vars: object, metadata: object) -> None:
        self.submitted.append(entrypoint)

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        for chunk in self.tails.pop(0):
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


def wait(api: ScriptedApi, *, follow: bool = False) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return wait_for(cast(JobsApi, api), "infer-1", notes.append, follow=follow), notes


def test_a_job_is_waited_for_until_it_has_ended() -> None:
    outcome, notes = wait(ScriptedApi("PENDING", "RUNNING", "SUCCEEDED", log='{"run_id": "a"}\n'))
    assert (outcome.exit_code, outcome.summary, notes) == (0, {"run_id": "a"}, [])


def test_a_dashboard_that_is_away_for_a_while_is_waited_for_and_told_of_once() -> None:
    away = ClusterUnreachableError("the head does not answer")
    outcome, notes = wait(ScriptedApi("RUNNING", away, away, "SUCCEEDED"))
    assert outcome.exit_code == 0
    assert notes == ["the head does not answer (waiting for it)"]


def test_a_dashboard_that_stays_away_ends_the_wait_and_not_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_AWAY_S", -1.0)
    with pytest.raises(ClusterUnreachableError, match="lost sight of job infer-1, which may go on: gone"):
        wait(ScriptedApi("RUNNING", ClusterUnreachableError("gone")))


def test_a_log_is_printed_once_though_its_connection_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    api = ScriptedApi("RUNNING", "SUCCEEDED")
    api.tails = [
        ["one\ntwo\n", aiohttp.ClientError()],
        ["one\n", RuntimeError("closed")],
        ["one\ntwo\nth", "ree\n"],
    ]
    wait(api, follow=True)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_ctrl_c_asks_the_job_to_stop_and_goes_on_following() -> None:
    api = ScriptedApi(
        "RUNNING", KeyboardInterrupt(), "RUNNING", "RUNNING", "FAILED", log="masklake: stopped\n", code=1
    )
    outcome, notes = wait(api)
    assert api.submitted == ["python -m cluster.stop_wish infer-1"]
    assert (outcome.exit_code, outcome.line) == (1, "stopped")
    assert "Ctrl-C again leaves it alone" in notes[0]
    assert "commits what is finished" in notes[1]


def test_a_second_ctrl_c_leaves_the_job_alone_and_says_how_to_look_at_it() -> None:
    api = ScriptedApi("RUNNING", KeyboardInterrupt(), "RUNNING", KeyboardInterrupt())
    with pytest.raises(
        JobFailedError, match=r"goes on; .*jobs logs infer-1 --follow --address http"
    ) as caught:
        wait(api)
    assert caught.value.exit_code == 130


def test_a_wish_that_cannot_be_brought_is_told_and_the_job_is_followed_on() -> None:
    api = ScriptedApi(KeyboardInterrupt(), "RUNNING", "RUNNING", "SUCCEEDED")
    api.messenger = 1, "noise\nhas no actor that takes wishes"
    outcome, notes = wait(api)
    assert outcome.exit_code == 0
    assert "has no actor that takes wishes" in notes[1]


def test_a_dashboard_that_is_away_when_ctrl_c_comes_does_not_end_the_wait() -> None:
    away = ClusterUnreachableError("the head does not answer")
    outcome, notes = wait(ScriptedApi(KeyboardInterrupt(), away, "RUNNING", "SUCCEEDED"))
    assert outcome.exit_code == 0
    assert (
        notes[1] == "the head does not answer; the wait goes on, and `masklake jobs stop infer-1` asks again"
    )


def test_sigterm_asks_the_job_to_stop_as_ctrl_c_does() -> None:
    """A scheduler that cancels a run sends it."""
    before = signal.getsignal(signal.SIGTERM)

    class Terminated(ScriptedApi):
        terms = 1

        def job(self, submission_id: str) -> JobDetails:
            if self.terms:
                self.terms -= 1
                os.kill(os.getpid(), signal.SIGTERM)
            return super().job(submission_id)

    api = Terminated("RUNNING", "RUNNING", "FAILED", code=1)
    outcome, notes = wait(api)
    assert api.submitted == ["python -m cluster.stop_wish infer-1"]
    assert (outcome.exit_code, len(notes)) == (1, 2)
    assert signal.getsignal(signal.SIGTERM) == before


def stop(api: ScriptedApi) -> str:
    return ask_to_stop(cast(JobsApi, api), "infer-1")


def test_a_job_that_has_ended_is_not_asked() -> None:
    api = ScriptedApi("FAILED")
    assert stop(api) == "job infer-1 has ended already: FAILED."
    assert api.submitted == []


def test_a_job_that_ends_while_it_is_asked_is_told_of() -> None:
    api = ScriptedApi("RUNNING", "SUCCEEDED")
    api.messenger = 1, "has no actor that takes wishes"
    assert stop(api) == "job infer-1 ended meanwhile: SUCCEEDED."


def test_a_job_of_others_is_told_apart_with_the_remedy() -> None:
    api = ScriptedApi("RUNNING", "RUNNING")
    api.messenger = 1, "has no actor that takes wishes"
    with pytest.raises(UsageError, match=r"no job of masklake, or has hardly begun; `ray job stop"):
        stop(api)


def test_an_image_without_the_package_cannot_bring_a_wish() -> None:
    api = ScriptedApi("RUNNING", "RUNNING")
    api.messenger = 1, "python: Error while finding module specification for 'cluster.stop_wish'"
    with pytest.raises(UsageError, match=r"could not be asked \(python: Error while finding"):
        stop(api)


def test_ctrl_c_on_a_log_ends_only_the_looking(capsys: pytest.CaptureFixture[str]) -> None:
    api = ScriptedApi("RUNNING", "RUNNING", KeyboardInterrupt())
    api.tails = [[]]
    started = time.monotonic()
    print_log(cast(JobsApi, api), "infer-1", follow=True)
    assert time.monotonic() - started < 5
    assert api.submitted == []
