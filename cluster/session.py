"""Joins a Ray cluster, or starts an embedded one on this machine. The only place that calls ray.init.

Enters: an address, or none. Leaves: a ClusterInfo, or a UsageError in one line.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import resolve_ip_for_localhost
from ray.exceptions import AuthenticationError

from cluster.node_images import check_nodes
from cluster.ray_settings import RAY_SETTINGS
from schemas.errors import UsageError

_PROBE_TIMEOUT_S = 5.0
# How a client of HTTP/2 begins, gRPC among them: the preface, and an empty frame of SETTINGS (RFC 9113, 3.4).
# A server answers with a frame of its own settings; the type stands in the fourth byte of nine.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_FRAME_BYTES = 9
_HTTP2_SETTINGS = 4
# Ray Data's own tasks ask for a whole CPU, and an actor needs room beside one. CPUs are bookkeeping: on one
# core the two take turns.
_MIN_LOCAL_CPUS = 2


@dataclass(frozen=True)
class ClusterInfo:
    """What there is to run on, as Ray counts it.

    Attributes:
        nodes: of each that is alive its CPU, GPU and custom resources, that with most CPUs first.
        started_here: an embedded Ray that ends with this process.
    """

    nodes: tuple[Mapping[str, float], ...]
    started_here: bool

    @property
    def num_cpus(self) -> float:
        return sum(node.get("CPU", 0.0) for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        return sum(node.get("GPU", 0.0) for node in self.nodes)

    @property
    def most_node_cpus(self) -> float:
        return max((node.get("CPU", 0.0) for node in self.nodes), default=0.0)


_open_connects = 0  # calls of connect() that wait for their shutdown(), since this module called ray.init


def connect(address: str | None = None, num_cpus: int | None = None) -> ClusterInfo:
    """Join the cluster at `address`, that of RAY_ADDRESS or of the Ray job around us, else start a local one.

    A local one listens on 127.0.0.1 only, keeps Ray's token authentication, and has no dashboard. A process
    that is connected already stays with its cluster. Each call wants one shutdown().

    Args:
        address: HOST:PORT of the cluster's head; "auto": the cluster that was started on this machine.
        num_cpus: CPUs of a local one; None: all of this machine's. A cluster that is joined has its own.

    Raises:
        UsageError: no such cluster, no token for it, another version of Ray or Python, or a node with
            another masklake.
    """
    global _open_connects
    started_here = False
    if not ray.is_initialized():
        target = cluster_address(address)
        _quiet_environment(is_local=target is None)
        with _sigterm_kept():
            if target is None:
                _start_local(num_cpus)
                started_here = True
            else:
                _join(target)
        _open_connects = 1
    elif _open_connects:
        _open_connects += 1
    return cluster_info(started_here)


def cluster_address(address: str | None = None) -> str | None:
    """The address of the cluster that connect(address) would use; None where it would start a local one."""
    if ray.is_initialized():
        return str(ray.get_runtime_context().gcs_address)
    in_a_job = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
    return address or os.environ.get("RAY_ADDRESS") or ("auto" if in_a_job else None)


def local_cpus() -> int:
    """CPUs of a Ray that connect() starts here."""
    return max(_MIN_LOCAL_CPUS, os.cpu_count() or 1)


def shutdown() -> None:
    """Undo one connect(). The last one leaves the cluster, or stops it where it was started here.

    A connection that somebody else opened stays open.
    """
    global _open_connects
    if _open_connects == 1:
        ray.shutdown()
    _open_connects = max(0, _open_connects - 1)


def _quiet_environment(*, is_local: bool) -> None:
    """Settings that Ray reads from the environment alone; what the user has set stays."""
    for name, value in RAY_SETTINGS.items():
        # Nodes that were started without these take a driver's questions for too many, and drop its calls.
        if is_local or not name.startswith("RAY_grpc_client_keepalive"):
            os.environ.setdefault(name, value)
    # An actor without a GPU keeps the devices it sees; unset, Ray warns in each worker that this will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # One machine alone has no node to drain, and nobody reads what the monitor looks for in its logs, what
    # the agent says of its processes, or Ray's metrics. Each costs up to a hundredth of a core.
    if is_local:
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")  # so that the next one counts
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "86400")
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
    # Ray Data makes its actor pools in a way for which Ray's C++ logs an error in every run.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def _start_local(num_cpus: int | None) -> None:
    # Ray takes 127.0.0.1 for "look up this machine's address", and its daemons then listen on every
    # interface. This is its switch for systems whose firewall would ask; it is read when the address is
    # looked up.
    previous = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _native_stderr_dropped():
            ray.init(
                address="local",
                num_cpus=num_cpus or local_cpus(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = previous


def _join(address: str) -> None:
    if address != "auto":
        _probe(address)
    try:
        with _native_stderr_dropped():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        text = str(error.__cause__ or error).strip()
        if isinstance(error, AuthenticationError) or "AuthenticationError" in text:
            raise UsageError(
                f"the Ray cluster at {address} wants its token: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN_PATH to a file with it (~/.ray/auth_token where the cluster was started)"
            ) from error
        reason = text.splitlines()[-1] if "Traceback" in text else text
        raise UsageError(f"cannot join the Ray cluster at {address}: {reason}") from error
    try:
        check_nodes()
    except UsageError:
        ray.shutdown()
        raise


def _probe(address: str) -> None:
    """Refuse within seconds what Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise UsageError(
            f"{address} is not the HOST:PORT of a cluster's head; to run there from outside use "
            f"`masklake submit infer job.yaml --address {address}`"
        )
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"{address} is not the address of a Ray cluster, wanted HOST:PORT such as 10.0.0.5:6379"
        )
    # For localhost Ray takes this machine's own address, where an embedded cluster does not listen.
    asked = resolve_ip_for_localhost(host.strip("[]"))
    try:
        connection = socket.create_connection((asked, int(port)), timeout=_PROBE_TIMEOUT_S)
    except OSError as error:
        raise UsageError(
            f"no Ray cluster answers at {asked}:{port}: {error.strerror or error}; give another --address or "
            "RAY_ADDRESS, or neither to run on this machine"
        ) from None
    with connection:
        # Under TLS it would have to be greeted with the certificates that Ray alone knows how to find.
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("0", "false") and not _speaks_grpc(connection):
            raise UsageError(
                f"{asked}:{port} answers, but not as a cluster's head: wanted its port (6379), not the "
                "dashboard's (8265); give another --address or RAY_ADDRESS, or neither to run on this machine"
            )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side greets as a server of gRPC does; False too if it says nothing for a while."""
    frame = b""
    try:
        connection.sendall(_HTTP2_HELLO)
        while len(frame) < _HTTP2_FRAME_BYTES:
            if not (more := connection.recv(_HTTP2_FRAME_BYTES - len(frame))):
                return False
            frame += more
    except OSError:
        return False
    return frame[3] == _HTTP2_SETTINGS


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray sets a handler of its own, which exits with status 15; one that is set already stays."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(previous) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def _native_stderr_dropped() -> Iterator[None]:
    """Keep the chatter of Ray's C++ off the terminal while it starts; it is in Ray's log files too."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cluster_info(started_here: bool = False) -> ClusterInfo:
    """What the cluster has now, of a process that is connected."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's types stop here
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    resources.sort(key=lambda node: node.get("CPU", 0.0), reverse=True)
    return ClusterInfo(tuple(resources), started_here)
