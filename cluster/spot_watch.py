"""Drains this machine's Ray nodes when the cloud says that it will take the machine away.

    python -m cluster.spot_watch aws --address HEAD:6379

Enters: the notice of the cloud's metadata service. Leaves: a drain of the nodes here, and then their end.
A node that is drained gets no new task or actor, and what it loses is not counted against retries and
restarts. Its actors stay where they are, in Ray 2.60 as before, and go on with their units, until Ray is
stopped here shortly before the machine goes: so they move while everybody can still be told, instead of
after the half minute in which a silent node is believed.

Where `ray start --block` is the process that Kubernetes ends (KubeRay), nothing of this is needed: on SIGTERM
it drains its node by itself, for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S.

Sources: AWS EC2 user guide, "Spot Instance interruption notices" (two minutes, IMDSv2); Compute Engine,
"Spot VMs" (30 seconds, metadata instance/preempted).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from schemas.errors import MasklakeError, UsageError

POLL_S = 5.0  # as AWS recommends
STOP_BEFORE_S = 15.0  # half of what Google gives; `ray stop` takes some seconds
_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 21600
_GCP_NOTICE_S = 30.0
_AWS = "http://169.254.169.254"
_GCP = "http://metadata.google.internal"

Open = Callable[[Request, float], tuple[int, str]]
"""Sends a request and waits so many seconds: status and body. OSError or HTTPException: no answer."""


class DrainError(MasklakeError):
    """The cluster did not take the drain."""


@dataclass(frozen=True)
class Notice:
    """This machine goes. seconds_left: until then; 0 where that is past."""

    seconds_left: float
    text: str


class Metadata(Protocol):
    """A cloud's metadata service."""

    def notice(self) -> Notice | None:
        """What it says now; None: the machine stays.

        Raises:
            OSError, HTTPException: it does not answer, or not as it should.
        """


def open_url(request: Request, timeout_s: float) -> tuple[int, str]:
    """Past any proxy: the metadata service is this machine's own."""
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            return int(answer.status), answer.read().decode()
    except HTTPError as error:
        return error.code, ""


class AwsMetadata:
    """IMDSv2: a token first, then spot/instance-action, which is not found while there is none."""

    def __init__(
        self,
        send: Open = open_url,
        base_url: str = _AWS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._send = send
        self._base_url = base_url
        self._now = now
        self._token: str | None = None

    def notice(self) -> Notice | None:
        status, body = self._ask()
        if status == HTTPStatus.UNAUTHORIZED:  # the token is too old
            self._token = None
            status, body = self._ask()
        if status == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise HTTPException(f"spot/instance-action answers {status}")
        return self._parse(body)

    def _ask(self) -> tuple[int, str]:
        if self._token is None:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
            request = Request(f"{self._base_url}/latest/api/token", headers=ttl, method="PUT")
            status, token = self._send(request, _TIMEOUT_S)
            if status != HTTPStatus.OK:
                raise HTTPException(f"api/token answers {status}")
            self._token = token
        url = f"{self._base_url}/latest/meta-data/spot/instance-action"
        return self._send(Request(url, headers={"X-aws-ec2-metadata-token": self._token}), _TIMEOUT_S)

    def _parse(self, body: str) -> Notice:
        """{"action": "terminate", "time": "2017-09-18T08:22:00Z"}; so do stop and hibernate."""
        try:
            found = json.loads(body)
            action, at = str(found["action"]), datetime.fromisoformat(found["time"])
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPException(f"spot/instance-action says {body[:80]!r}") from error
        return Notice(
            max(0.0, (at - self._now()).total_seconds()), f"AWS will {action} this instance at {at}"
        )


class GcpMetadata:
    """instance/preempted: TRUE once the machine has got its 30 seconds."""

    def __init__(self, send: Open = open_url, base_url: str = _GCP) -> None:
        self._send = send
        self._base_url = base_url

    def notice(self) -> Notice | None:
        url = f"{self._base_url}/computeMetadata/v1/instance/preempted"
        status, body = self._send(Request(url, headers={"Metadata-Flavor": "Google"}), _TIMEOUT_S)
        if status != HTTPStatus.OK or body.strip() not in ("TRUE", "FALSE"):
            raise HTTPException(f"instance/preempted answers {status} {body[:80]!r}")
        return Notice(_GCP_NOTICE_S, "Google preempts this instance") if body.strip() == "TRUE" else None


CLOUDS: dict[str, Callable[[], Metadata]] = {"aws": AwsMetadata, "gcp": GcpMetadata}


@dataclass(frozen=True)
class Watch:
    """Polls, drains, stops.

    Attributes:
        drain: tells the cluster, given the seconds that are left and why.
        stop: ends Ray on this machine.
        say: a line for the log.
    """

    metadata: Metadata
    drain: Callable[[float, str], None]
    stop: Callable[[], None]
    say: Callable[[str], None]
    poll_s: float = POLL_S
    stop_before_s: float = STOP_BEFORE_S
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> None:
        """Until the machine was drained."""
        notice = self._wait()
        ends_s = self.clock() + notice.seconds_left
        self.say(f"{notice.text}: draining Ray here, {notice.seconds_left:.0f} s are left")
        while True:
            try:
                self.drain(max(0.0, ends_s - self.clock()), notice.text)
            except MasklakeError as error:
                self.say(str(error))
                if self.clock() + self.poll_s < ends_s - self.stop_before_s:
                    self.sleep(self.poll_s)
                    continue
            break
        self.sleep(max(0.0, ends_s - self.stop_before_s - self.clock()))
        self.say("stopping Ray here")
        self.stop()

    def _wait(self) -> Notice:
        was_reached = True
        while True:
            try:
                notice = self.metadata.notice()
            except (OSError, HTTPException) as error:
                if was_reached:  # said once, not every five seconds for days
                    self.say(f"the metadata service does not answer ({error}): asking on")
                was_reached = False
            else:
                was_reached = True
                if notice is not None:
                    return notice
            self.sleep(self.poll_s)


def drain_nodes(address: str, seconds: float, reason: str, node_id: str | None = None) -> list[str]:
    """Tell the cluster at HOST:PORT that nodes go.

    Args:
        node_id: one node, in hex; None: all that live on this machine, by its address.

    Returns:
        ids of the nodes.

    Raises:
        DrainError: no such node, no answer, or the cluster refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
    from ray.exceptions import RayError
    from ray.util import get_node_ip_address

    here = str(get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray's types stop here
    deadline_ms = int((time.time() + seconds) * 1000)
    try:
        client = GcsClient(address=address)
        found = [
            node.hex()
            for node, info in client.get_all_node_info(timeout=_TIMEOUT_S * 5).items()
            if info.state == GcsNodeInfo.GcsNodeState.ALIVE
            and (node.hex() == node_id if node_id else info.node_manager_address == here)
        ]
        if not found:
            raise DrainError(f"{node_id or here} is no live node of the Ray cluster at {address}")
        for node in found:
            # Preemption is the reason that is never refused and that retries do not count.
            why = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
            is_accepted, answer = client.drain_node(node, why, reason, deadline_ms, timeout=_TIMEOUT_S * 5)
            if not is_accepted:
                raise DrainError(f"the Ray cluster at {address} does not drain node {node}: {answer}")
    except (RayError, RuntimeError, ConnectionError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DrainError(f"the Ray cluster at {address} was not told of the drain: {text}") from error
    return found


def stop_ray() -> None:
    """`ray stop`: what Ray runs on this machine, as this user."""
    subprocess.run([str(Path(sys.executable).parent / "ray"), "stop"], check=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.spot_watch", description="Drain Ray on a spot notice."
    )
    parser.add_argument("cloud", choices=sorted(CLOUDS), help="whose metadata service to ask")
    parser.add_argument("--address", required=True, help="HOST:PORT of the cluster's head")
    arguments = parser.parse_args(argv)
    try:
        if "://" in arguments.address or ":" not in arguments.address:
            raise UsageError(f"--address {arguments.address} is not HOST:PORT of a cluster's head")

        def drain(seconds: float, reason: str) -> None:
            drain_nodes(arguments.address, seconds, reason)

        Watch(
            CLOUDS[arguments.cloud](), drain, stop_ray, lambda line: print(line, file=sys.stderr, flush=True)
        ).run()
    except MasklakeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
