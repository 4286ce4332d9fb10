from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster import session
from cluster.session import ClusterInfo, cluster_address, connect
from schemas.errors import UsageError


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not called ray.init, whatever other tests did."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_local_cluster_has_the_cpus_asked_for_and_ends_with_us(local_ray: ClusterInfo) -> None:
    assert (local_ray.num_cpus, len(local_ray.nodes), local_ray.most_node_cpus) == (2, 1, 2)
    assert local_ray.started_here


def test_a_local_cluster_listens_on_the_loopback_only(local_ray: ClusterInfo) -> None:
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's types stop here
    assert node["NodeManagerAddress"] == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address would be used
        outside = probe.getsockname()[0]
    if outside.startswith("127."):
        pytest.skip("this machine has the loopback only")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((outside, node["NodeManagerPort"]), timeout=2)


def test_a_local_cluster_keeps_token_authentication(local_ray: ClusterInfo) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"


_ASK_ITS_BOOKS = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
"""


def test_a_local_cluster_s_books_are_shut_without_its_token(local_ray: ClusterInfo) -> None:
    def ask(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _ASK_ITS_BOOKS, ray.get_runtime_context().gcs_address]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    assert ask().stdout == "1\n"
    refused = ask(RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr


def test_a_connected_process_stays_with_its_cluster(local_ray: ClusterInfo) -> None:
    again = connect()
    assert not again.started_here
    assert again.num_cpus == 2
    session.shutdown()
    assert ray.is_initialized()


JOIN = """
import sys, ray
from cluster.session import connect, shutdown
from schemas.errors import UsageError
if sys.argv[2:]:
    ray.__version__ = sys.argv[2]
try:
    print(connect(sys.argv[1]))
    shutdown()
except UsageError as error:
    print(error)
"""


def run_join(*arguments: str, **environment: str) -> str:
    """What a fresh process prints about joining; it says nothing else."""
    command = [sys.executable, "-c", JOIN, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a cluster that runs without us, and the environment that has its token."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0123456789abcdef" * 4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=3", "--include-dashboard=false", f"--temp-dir={folder}"]
    log = (folder / "start.log").open("wb")
    with log, subprocess.Popen(command, env=os.environ | token, stdout=log, stderr=log) as ray_head:
        address = f"127.0.0.1:{port}"
        while "'CPU': 3.0" not in run_join(address, **token):
            assert ray_head.poll() is None, f"ray start ended at once, see {log.name}"
            time.sleep(0.5)
        yield address, token
        ray_head.terminate()


@pytest.mark.slow
def test_a_process_joins_by_address_and_leaves_the_cluster_running(head: tuple[str, dict[str, str]]) -> None:
    address, token = head
    joined = run_join(address, **token)  # after the fixture has joined and left it
    assert joined.startswith("ClusterInfo(nodes=({")
    assert "'CPU': 3.0" in joined
    assert "started_here=False" in joined


@pytest.mark.slow
def test_another_version_of_ray_is_refused_in_one_line(head: tuple[str, dict[str, str]]) -> None:
    address, token = head
    message = run_join(address, "2.0.0", **token)
    assert message.startswith(f"cannot join the Ray cluster at {address}: Version mismatch: The cluster was")
    assert message.count("\n") == 1


@pytest.mark.slow
def test_a_missing_token_is_refused_in_one_line(head: tuple[str, dict[str, str]]) -> None:
    address, _ = head
    message = run_join(
        address, RAY_AUTH_MODE="disabled", RAY_NUM_REDIS_GET_RETRIES="1"
    )  # for 20 s by default
    assert message.startswith(f"the Ray cluster at {address} wants its token: set RAY_AUTH_MODE=token")
    assert message.count("\n") == 1


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.2:1", "no Ray cluster answers at 127.0.0.2:1: Connection refused; give another --address"),
        ("head.invalid:6379", "no Ray cluster answers at head.invalid:6379: Name or service not known"),
        ("head", "head is not the address of a Ray cluster, wanted HOST:PORT such as 10.0.0.5:6379"),
        ("10.0.0.5:99999", "10.0.0.5:99999 is not the address of a Ray cluster"),
        (
            "http://head:8265",
            "use `masklake submit infer job.yaml --address http://head:8265`",
        ),
        ("ray://head:10001", "ray://head:10001 is not the HOST:PORT of a cluster's head"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(address)
    assert message in str(caught.value)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_a_port_that_is_not_a_head_s_is_refused_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, says: bytes | None
) -> None:
    """It answers as a dashboard does, hangs up, or says nothing."""
    monkeypatch.setattr(session, "_PROBE_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.2", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                if says is None:
                    peer.recv(1)  # until the other side gives up
                else:
                    peer.sendall(says)

        answering = threading.Thread(target=answer)
        answering.start()
        port = server.getsockname()[1]
        with pytest.raises(
            UsageError, match=rf"127.0.0.2:{port} answers, but not as a cluster's head"
        ) as caught:
            connect(f"127.0.0.2:{port}")
        answering.join()
    assert "wanted its port (6379), not the dashboard's (8265)" in str(caught.value)


@pytest.mark.usefixtures("unconnected")
def test_the_address_is_the_argument_else_the_environment_s_else_that_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cluster_address() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cluster_address() == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert cluster_address() == "10.0.0.5:6379"
    assert cluster_address("10.0.0.6:6379") == "10.0.0.6:6379"
