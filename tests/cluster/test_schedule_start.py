"""What the CronJob's pod does, cluster/schedule/start.py, against a small HTTP server in the API's place."""

from __future__ import annotations

import ipaddress
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cluster.schedule.start import ApiUnreachableError, Owner, RayJobs, main, run
from schemas.errors import StorageError

OWNER = Owner("vision", "nightly-29000000", "uid-1")
MANIFEST = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"labels": {"a": "b"}}, "spec": {}}


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return folder / "ca.crt", folder / "key.pem"


@dataclass
class Api:
    """Answers each request with the next of `answers`; the last one again and again."""

    answers: list[tuple[int, dict[str, Any]]]
    requests: list[tuple[str, str, str, Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, request: tuple[str, str, str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(request)
        return self.answers[min(len(self.requests), len(self.answers)) - 1]


@pytest.fixture
def serve() -> Iterator[Callable[..., Api]]:
    servers: list[ThreadingHTTPServer] = []

    def start(*answers: tuple[int, dict[str, Any]], tls: tuple[Path, Path] | None = None) -> Api:
        api = Api(list(answers))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                token = self.headers["Authorization"]
                status, content = api.answer((self.command, self.path, token, body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            do_POST = do_GET  # noqa: N815 - the server's name for it

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        api.url = f"http://127.0.0.1:{server.server_address[1]}"
        return api

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("token-1\n")
    return tmp_path


def ray_jobs(api: Api, account: Path, sleep: Callable[[float], None] = lambda _: None) -> RayJobs:
    return RayJobs(api.url, "vision", account, sleep=sleep)


def status(deployment: str, job: str = "", **more: str) -> tuple[int, dict[str, Any]]:
    return 200, {"status": {"jobDeploymentStatus": deployment, "jobStatus": job, **more}}


def test_a_ray_job_is_made_for_the_job_and_waited_for(serve: Callable[..., Api], account: Path) -> None:
    api = serve((201, {}), (200, {}), status("Running", "RUNNING"), status("Complete", "SUCCEEDED"))
    run(MANIFEST, OWNER, ray_jobs(api, account))
    made, *asked = api.requests
    path = "/apis/ray.io/v1/namespaces/vision/rayjobs"
    assert made == (
        "POST",
        path,
        "Bearer token-1",
        MANIFEST
        | {
            "metadata": {
                "labels": {"a": "b"},
                "name": "nightly-29000000-ray",
                "namespace": "vision",
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-29000000", "uid": "uid-1"}
                ],
            }
        },
    )
    assert [request[:2] for request in asked] == [("GET", f"{path}/nightly-29000000-ray")] * 3


def test_a_second_pod_waits_for_the_ray_job_of_the_first(
    serve: Callable[..., Api], account: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = serve((409, {"message": "already exists"}), status("Complete", "SUCCEEDED"))
    run(MANIFEST, OWNER, ray_jobs(api, account))
    assert "found RayJob nightly-29000000-ray" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (
            status("Failed", "FAILED", reason="AppFailed", message="exit code 4: max_lost"),
            "exit code 4: max_lost",
        ),
        (status("Complete", "FAILED", message="exit code 5"), "FAILED exit code 5"),
        (status("Failed", reason="DeadlineExceeded"), "DeadlineExceeded"),
        (status("ValidationFailed"), "ValidationFailed"),
        (status("Complete", "STOPPED"), "STOPPED"),
    ],
)
def test_a_run_that_failed_is_told_with_its_reason(
    ended: tuple[int, dict[str, Any]], said: str, serve: Callable[..., Api], account: Path
) -> None:
    with pytest.raises(StorageError) as failed:
        run(MANIFEST, OWNER, ray_jobs(serve((201, {}), ended), account))
    assert said in str(failed.value)
    assert failed.value.exit_code == 1  # the Job's podFailurePolicy makes no new pod of it


def test_a_refusal_names_the_role(serve: Callable[..., Api], account: Path) -> None:
    api = serve((403, {"message": "rayjobs is forbidden"}))
    with pytest.raises(StorageError, match=r"rayjobs is forbidden, 403 \(the schedule's Role"):
        run(MANIFEST, OWNER, ray_jobs(api, account))
    assert len(api.requests) == 1


def test_a_ray_job_that_somebody_deleted_ends_the_wait(serve: Callable[..., Api], account: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read the RayJob .*, 404"):
        run(MANIFEST, OWNER, ray_jobs(serve((201, {}), (404, {})), account))


def test_a_busy_server_is_asked_again_with_the_token_of_that_time(
    serve: Callable[..., Api], account: Path
) -> None:
    api = serve((503, {}), (429, {}), (201, {}), status("Complete", "SUCCEEDED"))

    def replace_token(seconds: float) -> None:
        (account / "token").write_text("new")

    run(MANIFEST, OWNER, ray_jobs(api, account, replace_token))
    assert [request[2] for request in api.requests] == ["Bearer token-1"] + ["Bearer new"] * 3


def test_a_server_that_stays_away_is_left_to_a_new_pod(account: Path) -> None:
    times = iter(range(0, 10_000, 250))
    absent = RayJobs("http://127.0.0.1:1", "vision", account, clock=lambda: next(times), sleep=lambda _: None)
    with pytest.raises(ApiUnreachableError, match="did not answer for 10 min") as failed:
        run(MANIFEST, OWNER, absent)
    assert failed.value.exit_code == 75


@pytest.mark.parametrize("is_success", [True, False])
def test_the_pod_trusts_the_cluster_s_certificate_and_ends_as_the_run_did(
    is_success: bool,
    serve: Callable[..., Api],
    account: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = (
        status("Complete", "SUCCEEDED") if is_success else status("Failed", "FAILED", message="exit code 5")
    )
    api = serve((201, {}), ended, tls=make_certificate(account))
    (account / "rayjob.json").write_text(json.dumps(MANIFEST))
    monkeypatch.setattr(sys, "argv", ["start", str(account / "rayjob.json")])
    host, _, port = api.url.removeprefix("http://").partition(":")
    for name, value in {
        "NAMESPACE": OWNER.namespace,
        "JOB_NAME": OWNER.job_name,
        "JOB_UID": OWNER.job_uid,
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    if is_success:
        main(account)
        assert "RayJob nightly-29000000-ray succeeded" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as ending:
            main(account)
        assert ending.value.code == 1
        assert "RayJob nightly-29000000-ray failed: FAILED exit code 5" in capsys.readouterr().err


def test_the_pod_is_small_it_loads_neither_ray_nor_yaml() -> None:
    text = "import sys, cluster.schedule.start; print({'ray', 'yaml', 'pydantic', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
