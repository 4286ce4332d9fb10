from __future__ import annotations

import pytest
from ray.job_submission import JobDetails

from jobs.submit.outcome import JobFailedError, outcome_of
from tests.submit.fake_dashboard import details


def job(status: str, code: int | None = None, message: str | None = None) -> JobDetails:
    return JobDetails(**details("infer-1", status, driver_exit_code=code, message=message))


def test_a_job_that_succeeded_gives_its_summary_whatever_is_printed_after_it() -> None:
    log = 'Running entrypoint …\n{"note": "x"}\n{"run_id": "infer-7", "images": 12}\n(raylet) bye\n'
    outcome = outcome_of(job("SUCCEEDED", 0), log)
    outcome.raise_if_failed()
    assert outcome.summary == {"run_id": "infer-7", "images": 12}


def failure(status: str, code: int | None, log: str, message: str | None = None) -> tuple[int, str]:
    with pytest.raises(JobFailedError) as caught:
        outcome_of(job(status, code, message), log).raise_if_failed()
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_the_drivers_own_line_and_exit_status_become_ours(code: int) -> None:
    log = f"…\nmasklake: a replica needs 2 GPUs\n(pid=7) noise: {code}\n"
    assert failure("FAILED", code, log) == (code, "a replica needs 2 GPUs")


@pytest.mark.parametrize(
    "line", ["/bin/sh: 1: masklake: not found", "bash: line 1: masklake: command not found"]
)
def test_an_image_without_the_command_is_told_with_the_remedy(line: str) -> None:
    code, text = failure("FAILED", 127, f"Running entrypoint …\n{line}\n")
    assert code == 127
    assert "image has no masklake: start the cluster from an image" in text


def test_an_image_without_a_package_is_told_with_the_remedy() -> None:
    log = "Traceback …\nModuleNotFoundError: No module named 'jobs'\n"
    assert "image has no package jobs" in failure("FAILED", 1, log)[1]


def test_a_driver_that_fell_over_is_shown_by_its_last_line() -> None:
    code, text = failure("FAILED", 1, "Traceback\n  File …\nKeyError: 'x'\n\n")
    assert (code, text) == (1, "job infer-1 failed with exit status 1: KeyError: 'x'")


@pytest.mark.parametrize(("code", "status"), [(-9, 137), (137, 137)])
def test_a_driver_that_was_killed_names_the_signal(code: int, status: int) -> None:
    given, text = failure("FAILED", code, "")
    assert given == status
    assert "killed by signal 9" in text


def test_a_log_that_is_gone_is_replaced_by_what_ray_kept() -> None:
    kept = "Job entrypoint command failed with exit code 2, last available logs:\nmasklake: no bucket"
    assert failure("FAILED", 2, "", kept) == (2, "no bucket")


def test_a_job_whose_node_died_has_no_exit_status_and_says_so() -> None:
    code, text = failure("FAILED", None, "", "Unexpected error occurred:\nThe actor died: its node is gone")
    assert code == 1
    assert text.endswith("without an exit status: The actor died: its node is gone")


def test_rays_own_stop_is_no_success() -> None:
    code, text = failure("STOPPED", None, "")
    assert code == 1
    assert "Ray's own stop" in text
