"""Runs in the CronJob's pod: makes the RayJob and waits for its end, `python -m cluster.schedule.start FILE`.

Enters: a RayJob manifest without a name, and from the environment NAMESPACE, JOB_NAME and JOB_UID of the Job
that the pod belongs to. Leaves: exit status 0 when the RayJob succeeded, 1 when it failed or could not be
made, 75 when the API server did not answer for long, which a new pod may mend.

The RayJob's name follows from the Job's, so a pod that takes an evicted one's place finds its RayJob and goes
on waiting. The Job owns the RayJob: deleting one deletes the other. Only the standard library: a pod of some
tens of MB.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from schemas.errors import MasklakeError, StorageError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_POLL_S = 15.0
_GIVE_UP_S = 600.0  # without any answer of the API server
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
_ENDED = ("Complete", "Failed", "ValidationFailed")


class ApiUnreachableError(MasklakeError):
    """The Kubernetes API did not answer for ten minutes; the RayJob goes on without us."""

    exit_code = _TRY_AGAIN


@dataclass(frozen=True)
class Owner:
    """The Job whose pod this is."""

    namespace: str
    job_name: str
    job_uid: str


class RayJobs:
    """The RayJobs of a namespace, by the Kubernetes API.

    Attributes:
        base_url: https://HOST:PORT of the API server.
        account: folder with token and ca.crt of the pod's service account; the token is read for each call,
            because it is replaced every hour.
    """

    def __init__(
        self,
        base_url: str,
        namespace: str,
        account: Path,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = f"{base_url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        self._clock = clock
        self._sleep = sleep
        self._tls = ssl.create_default_context(cafile=account / "ca.crt") if "https:" in base_url else None

    def create(self, manifest: dict[str, Any]) -> bool:
        """Make it; False where one of its name is there already.

        Raises:
            StorageError: the API refused it.
            ApiUnreachableError: no answer.
        """
        status, answer = self._call("POST", self._url, json.dumps(manifest).encode())
        if status == 409:
            return False
        if status not in (200, 201):
            raise _refusal("create the RayJob", manifest["metadata"]["name"], status, answer)
        return True

    def wait(self, name: str) -> dict[str, Any]:
        """Its status once it has ended.

        Raises:
            StorageError: it is gone, or may not be read.
            ApiUnreachableError: no answer.
        """
        while True:
            http_status, answer = self._call("GET", f"{self._url}/{name}")
            if http_status != 200:
                raise _refusal("read the RayJob", name, http_status, answer)
            status: dict[str, Any] = answer.get("status") or {}
            if status.get("jobDeploymentStatus") in _ENDED:
                return status
            self._sleep(_POLL_S)

    def _call(self, method: str, url: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and content; a server that is away or busy is asked again."""
        began = self._clock()
        while True:
            request = urllib.request.Request(url, body, method=method)
            request.add_header("Content-Type", "application/json")
            request.add_header("Authorization", f"Bearer {(self._account / 'token').read_text().strip()}")
            try:
                with urllib.request.urlopen(request, timeout=60, context=self._tls) as reply:
                    return reply.status, json.loads(reply.read())
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    return error.code, _content(error.read())
                reason: object = f"status {error.code}"
            except (OSError, HTTPException, ValueError) as error:
                reason = error
            if self._clock() - began > _GIVE_UP_S:
                raise ApiUnreachableError(
                    f"the Kubernetes API did not answer for {_GIVE_UP_S / 60:.0f} min: {reason}"
                )
            self._sleep(_POLL_S)


def run(manifest: dict[str, Any], owner: Owner, ray_jobs: RayJobs) -> None:
    """Make the RayJob of this Job, or find it, and see it to its end.

    Raises:
        StorageError: it failed, with what KubeRay says of it.
        ApiUnreachableError: no answer.
    """
    name = f"{owner.job_name}-ray"  # KubeRay gives a RayJob's name to a Job of its own
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": owner.job_name, "uid": owner.job_uid}
    metadata = {"name": name, "namespace": owner.namespace, "ownerReferences": [reference]}
    is_new = ray_jobs.create(manifest | {"metadata": manifest["metadata"] | metadata})
    print(f"{'made' if is_new else 'found'} RayJob {name}; its log: kubectl logs job/{name}", flush=True)
    status = ray_jobs.wait(name)
    if status.get("jobStatus") != "SUCCEEDED":
        said = " ".join(str(status[key]) for key in ("jobStatus", "reason", "message") if status.get(key))
        raise StorageError(f"RayJob {name} failed: {said or status['jobDeploymentStatus']}")
    print(f"RayJob {name} succeeded", flush=True)


def main(account: Path = _ACCOUNT) -> None:
    """Entry point in the pod."""
    manifest = json.loads(Path(sys.argv[1]).read_text())
    owner = Owner(os.environ["NAMESPACE"], os.environ["JOB_NAME"], os.environ["JOB_UID"])
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    address = f"[{host}]" if ":" in host else host
    try:
        run(manifest, owner, RayJobs(f"https://{address}:{port}", owner.namespace, account))
    except MasklakeError as error:
        print(f"masklake: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _refusal(what: str, name: str, status: int, answer: dict[str, Any]) -> StorageError:
    hint = " (the schedule's Role lets its ServiceAccount create and get rayjobs)" if status == 403 else ""
    return StorageError(f"cannot {what} {name}: {answer.get('message', 'no reason given')}, {status}{hint}")


def _content(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
