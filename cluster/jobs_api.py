"""Ray's Jobs API, as the commands need it: bounded in time, and each failure one line with its remedy.

Enters: the dashboard's address, and the token as Ray itself finds it (RAY_AUTH_MODE=token with
RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH). Leaves: Ray's JobDetails, logs as text, or a MasklakeError.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from schemas.errors import MasklakeError, UsageError
from schemas.spec_problems import show

# Connect, and between two pieces of an answer. The dashboard itself waits 10 s for the head's agent.
_TIMEOUT_S = (5.0, 20.0)
# The agent that takes jobs comes up seconds after the dashboard that hands them on.
_AGENT_WAIT_S = 60.0
_AGENT_RETRY_S = 2.0
_TRUSTED = "REQUESTS_CA_BUNDLE"
_SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class ClusterUnreachableError(MasklakeError):
    """The dashboard does not answer now, or refused for a reason of its own."""


class JobsApi:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Nothing is asked yet.

        Raises:
            UsageError: not the address of a dashboard, or there is no token where Ray, or no authority where
                we are told to use one.
        """
        self.address = checked_address(address)
        try:
            self._client = _Client(self.address)
        except AuthenticationError as error:
            raise UsageError(f"{str(error).split('. ')[0]}. {_TOKEN_REMEDY}") from None
        except FileNotFoundError:
            named = os.environ[_TRUSTED]
            raise UsageError(f"{named}, which {_TRUSTED} names, is not there") from None

    def check_version(self) -> None:
        """Refuse a cluster of another Ray: its driver would join, or read our request, in ways not tested.

        Raises:
            UsageError: no dashboard of Ray answers, it wants another token, or is of another version.
        """
        with self._explained():
            answer = self._client._do_request("GET", "/api/version")
        try:
            theirs = str(answer.json()["ray_version"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{self.address} answers, but not as Ray's dashboard ({_status(answer)}): wanted the "
                "address of the head's dashboard, such as http://HOST:8265"
            ) from None
        ours = ray.__version__
        if _numbers(theirs) != _numbers(ours):
            raise UsageError(
                f"the cluster at {self.address} runs Ray {theirs[:40]}, and here is Ray {ours}: submit from "
                f"an environment with ray=={theirs[:40]}, or start the cluster from an image with ray=={ours}"
            )

    def submit(
        self, submission_id: str, entrypoint: str, env_vars: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Hand a job in, once: an answer that was lost does not make two of it.

        Raises:
            UsageError: the id is taken.
            ClusterUnreachableError: no agent of the head takes jobs within a minute.
        """
        deadline = time.monotonic() + _AGENT_WAIT_S
        was_lost = False
        while True:
            try:
                with self._explained():
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env={"env_vars": dict(env_vars)},
                        metadata=dict(metadata),
                    )
                return
            except _RefusedError as refused:
                if "already exists" in refused.text:
                    if was_lost:
                        return
                    raise UsageError(
                        f"there is a job {submission_id} at {self.address} already: give another "
                        "--submission-id"
                    ) from None
                if "No available agent" not in refused.text or time.monotonic() > deadline:
                    raise refused.explained(self.address) from None
            except _NoAnswerError:
                if was_lost or time.monotonic() > deadline:
                    raise
                was_lost = True
            time.sleep(_AGENT_RETRY_S)

    def job(self, submission_id: str) -> JobDetails:
        """One job.

        Raises:
            UsageError: there is none.
        """
        with self._asked_about(submission_id):
            return self._client.get_job_info(checked_id(submission_id))

    def jobs(self) -> list[JobDetails]:
        """All that were submitted since the cluster started, the newest last."""
        with self._asked_about("list"):
            found = self._client.list_jobs()
        submitted = [job for job in found if job.type == JobType.SUBMISSION]
        return sorted(submitted, key=lambda job: job.start_time or 0)

    def log(self, submission_id: str) -> str:
        """What the job's driver has printed so far, stdout and stderr together."""
        with self._asked_about(submission_id):
            return self._client.get_job_logs(checked_id(submission_id))

    def tail(self, submission_id: str) -> AsyncIterator[str]:
        """The same from its beginning, as it comes, until the job ends or the connection breaks."""
        return self._client.tail_job_logs(checked_id(submission_id))

    @contextmanager
    def _asked_about(self, submission_id: str) -> Iterator[None]:
        try:
            with self._explained():
                yield
        except _RefusedError as refused:
            if refused.status == 404:
                raise UsageError(
                    f"there is no job {show(submission_id)} at {self.address}; `masklake jobs list` shows "
                    "those that there are"
                ) from None
            raise refused.explained(self.address) from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of requests and Ray as ours; what the dashboard itself refused stays a _RefusedError."""
        address = self.address
        try:
            yield
        except AuthenticationError as error:
            is_missing = str(error).startswith("Authentication required")
            said = "wants a token" if is_missing else "takes another token than ours"
            raise UsageError(f"the cluster at {address} {said}. {_TOKEN_REMEDY}") from None
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise UsageError(
                    f"the certificate of {address} is of nobody that is trusted here: set {_TRUSTED} to a "
                    "file with its authority's"
                ) from None
            raise UsageError(
                f"{address} speaks no TLS: give {address.replace('https://', 'http://', 1)}"
            ) from None
        except requests.exceptions.ConnectTimeout:
            raise ClusterUnreachableError(
                f"{address} did not answer within {_TIMEOUT_S[0]:.0f} s: {_ADDRESS_REMEDY}"
            ) from None
        except requests.exceptions.ReadTimeout:
            raise _NoAnswerError(
                f"{address} took the request and did not answer within {_TIMEOUT_S[1]:.0f} s: "
                f"{_ADDRESS_REMEDY}"
            ) from None
        except requests.exceptions.ConnectionError as error:
            raise self._connection_error(error) from None
        except requests.exceptions.RequestException as error:
            raise ClusterUnreachableError(f"{address} gives no answer of HTTP: {error}") from None

    def _connection_error(self, error: requests.exceptions.ConnectionError) -> MasklakeError:
        text, address = str(error), self.address
        if "Connection aborted" not in text:
            reason = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
            why = reason[1] if reason else "no connection"
            return ClusterUnreachableError(f"{address} does not answer ({why}): {_ADDRESS_REMEDY}")
        parts = urlsplit(address)
        if parts.scheme == "http" and _speaks_tls(parts):
            return UsageError(f"{address} speaks TLS: give {address.replace('http://', 'https://', 1)}")
        return _NoAnswerError(
            f"{address} takes connections and gives no answer of HTTP: wanted the port of Ray's dashboard "
            "(8265), not that of the cluster (6379) or of its clients (10001)"
        )


_ADDRESS_REMEDY = (
    "is the cluster up, and is this the address of its dashboard as this machine sees it? On Kubernetes: "
    "`kubectl port-forward service/NAME-head-svc 8265`"
)
_TOKEN_REMEDY = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's (~/.ray/auth_token where "
    "it was started)"
)


class _NoAnswerError(ClusterUnreachableError):
    """The request may have arrived."""


class _RefusedError(Exception):
    """The dashboard's answer is an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text

    def explained(self, address: str) -> MasklakeError:
        lines = [line for line in self.text.splitlines() if line.strip()] or ["without a reason"]
        return ClusterUnreachableError(f"the cluster at {address} refused ({self.status}): {lines[-1][:300]}")


class _Client(JobSubmissionClient):
    """Ray's, with time limits, and at the address that it was given."""

    def __init__(self, address: str) -> None:
        # Else it tells the terminal when a log's connection has closed.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        # JobSubmissionClient's own takes RAY_ADDRESS for better than the address it was given, and asks at
        # once.
        # The log's connection is aiohttp's, which does not know the variable of requests by itself.
        SubmissionClient.__init__(self, address, verify=os.environ.get(_TRUSTED) or True)
        self._client_ray_version = ray.__version__

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        # A redirect leads to somebody's login page, or to another scheme: said rather than followed.
        return super()._do_request(method, endpoint, timeout=_TIMEOUT_S, allow_redirects=False, **kwargs)

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise _RefusedError(r.status_code, r.text)


def checked_address(address: str) -> str:
    """The address without what follows the port.

    Raises:
        UsageError: it is not http://HOST:PORT or https://…
    """
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise UsageError(
            "--address is not that of a Ray dashboard, wanted http://HOST:8265 (or https://); HOST:6379 is "
            "for RAY_ADDRESS"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--address holds more than scheme, host, port and path; a token belongs in RAY_AUTH_TOKEN_PATH"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def checked_id(submission_id: str) -> str:
    """The id itself; it becomes part of addresses and of file names on the head.

    Raises:
        UsageError: it is none.
    """
    if not _SUBMISSION_ID.fullmatch(submission_id):
        raise UsageError(
            f"{show(submission_id)} is no submission id, wanted letters, digits, - and _, at most 100 of them"
        )
    return submission_id


def _numbers(version: str) -> tuple[str, ...]:
    """Major, minor, patch: of 2.60.0rc1 that is 2, 60, 0."""
    return tuple(re.findall(r"\d+", version)[:3])


def _status(answer: requests.Response) -> str:
    where = answer.headers.get("Location")
    return f"HTTP {answer.status_code}" + (f", which leads to {show(where)}" if where else "")


def _speaks_tls(parts: SplitResult) -> bool:
    """Whether a handshake succeeds. Nothing is sent over it, so whose certificate it is does not matter."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_TIMEOUT_S[0]) as raw:
            context.wrap_socket(raw, server_hostname=parts.hostname).close()
        return True
    except OSError:
        return False
