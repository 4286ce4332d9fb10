"""How a submitted job came out.

Enters: Ray's JobDetails of a job that has ended, and its log. Leaves: an Outcome with the command's exit
status and the one line that says why.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from schemas.errors import MasklakeError

_MAX_LINE = 2000
_OUR_LINE = "masklake: "
# What a shell says where there is no such command, and Python where the package is not whole.
_NO_COMMAND = re.compile(r"masklake: (command )?not found|not found: masklake")
_NO_PACKAGE = re.compile(r"No module named '?(jobs|cluster|schemas|maskrcnn_core)\b")


class JobFailedError(MasklakeError):
    """A submitted job ended with another exit status than 0, which becomes the command's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Outcome:
    """status: Ray's; exit_code: of the driver, 1 where it has none; line: why it failed; summary: what it
    printed."""

    submission_id: str
    status: str
    exit_code: int
    line: str | None
    summary: dict[str, Any] | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def raise_if_failed(self) -> None:
        """Raises JobFailedError, with the job's exit status."""
        if self.exit_code != 0:
            raise JobFailedError(self.line or "failed without a word", self.exit_code)


def outcome_of(job: JobDetails, log: str) -> Outcome:
    """Args: log: all of it, or empty where it cannot be had any more."""
    submission_id = job.submission_id or ""
    if job.status == JobStatus.SUCCEEDED:
        return Outcome(submission_id, job.status.value, 0, None, _summary(log))
    code = job.driver_exit_code
    if job.status == JobStatus.STOPPED:
        line = (
            f"job {submission_id} was ended by Ray's own stop; submit it again to go on from its last commit."
        )
        return Outcome(submission_id, job.status.value, 1, line, None)
    log = log or job.message or ""
    exit_code = 1 if code in (None, 0) else code if code > 0 else 128 - code
    return Outcome(submission_id, job.status.value, exit_code, _reason(job, log), _summary(log))


def _reason(job: JobDetails, log: str) -> str:
    code, submission_id = job.driver_exit_code, job.submission_id
    missing = _NO_PACKAGE.search(log)
    if (code == 127 and _NO_COMMAND.search(log)) or missing:
        what = f"package {missing[1]}" if missing else "masklake"
        return (
            f"the cluster's image has no {what}: start the cluster from an image with masklake "
            "(docs/submit.md), of the version that submits"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(_OUR_LINE)]
    if code is None:
        last = (job.message or "no reason given").strip().splitlines()[-1]
        return f"job {submission_id} ended without an exit status: {last[:_MAX_LINE]}"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        return (
            f"the driver of job {submission_id} was killed by signal {number} (9: often for lack of memory "
            "on its node); submit it again to go on from its last commit"
        )
    if ours:
        return ours[-1].removeprefix(_OUR_LINE)[:_MAX_LINE]
    last = lines[-1][:_MAX_LINE] if lines else "and has printed nothing"
    return f"job {submission_id} failed with exit status {code}: {last}"


def _summary(log: str) -> dict[str, Any] | None:
    """The JSON that the command prints at its end; lines of Ray's may follow it."""
    for line in reversed(log.splitlines()[-50:]):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "run_id" in found:
                return found
    return None
