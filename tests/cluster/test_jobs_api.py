from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray

from cluster import jobs_api
from cluster.jobs_api import ClusterUnreachableError, JobsApi, checked_address
from schemas.errors import MasklakeError, UsageError
from tests.submit.fake_dashboard import LOST, FakeDashboard, details, serving
from tests.submit.tls_relay import localhost_certificate, tls_relay


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashboard]:
    monkeypatch.setattr(jobs_api, "_AGENT_RETRY_S", 0.01)
    with serving(FakeDashboard()) as served:
        yield served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "_TIMEOUT_S", (0.3, 0.3))


@contextmanager
def talking(converse: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server of one connection after another that are anything; gives HOST:PORT."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with suppress(OSError):
                converse(connection)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    """A server's context with a certificate that nobody trusts."""
    return localhost_certificate(tmp_path)[1]


@pytest.mark.parametrize(
    ("address", "taken"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://ray.example/team/", "https://ray.example/team"),
        ("http://[::1]:8265/", "http://[::1]:8265"),
    ],
)
def test_an_address_is_scheme_host_port_and_path(address: str, taken: str) -> None:
    assert checked_address(address) == taken


@pytest.mark.parametrize(
    "address",
    ["", "head:8265", "10.0.0.5:6379", "ray://head:10001", "http://", "http://head:99999", "http://h:x"],
)
def test_what_is_no_dashboards_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"wanted http://HOST:8265"):
        checked_address(address)


@pytest.mark.parametrize("address", ["http://me:hush@head:8265", "http://head:8265/?token=hush"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UsageError, match="more than scheme") as caught:
        checked_address(address)
    assert "hush" not in str(caught.value)


def refusal(address: str, kind: type[MasklakeError]) -> str:
    """The one line that a version check ends in, within the seconds that somebody waits for it."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        JobsApi(address).check_version()
    assert time.monotonic() - started < 5
    return str(caught.value)


def test_a_port_where_nothing_listens_is_told_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = refusal(f"http://127.0.0.1:{port}", ClusterUnreachableError)
    assert f"127.0.0.1:{port} does not answer (Connection refused)" in text
    assert "port-forward" in text


def test_a_host_without_an_address_is_told() -> None:
    text = refusal("http://no-such-host.invalid:8265", ClusterUnreachableError)
    assert "does not answer" in text


@pytest.mark.usefixtures("impatient")
def test_an_address_that_swallows_connections_is_given_up() -> None:
    """A full queue of connections that nobody takes: further ones are not even refused."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        text = refusal(f"http://127.0.0.1:{server.getsockname()[1]}", ClusterUnreachableError)
        for filler in fillers:
            filler.close()
    assert "did not answer within" in text


@pytest.mark.usefixtures("impatient")
def test_a_server_that_takes_a_request_and_is_silent_is_given_up() -> None:
    with talking(lambda connection: time.sleep(0.6)) as place:
        assert "took the request and did not answer" in refusal(f"http://{place}", ClusterUnreachableError)


def test_a_port_that_speaks_something_else_is_told() -> None:
    with talking(lambda connection: connection.sendall(b"\0\0\6\4\0\0\0\0\0junk")) as place:
        text = refusal(f"http://{place}", ClusterUnreachableError)
    assert "no answer of HTTP" in text
    assert "8265" in text


def test_http_where_tls_is_spoken_names_https(tls: ssl.SSLContext) -> None:
    with talking(lambda raw: tls.wrap_socket(raw, server_side=True).close()) as place:
        assert refusal(f"http://{place}", UsageError).endswith(f"speaks TLS: give https://{place}")


def test_https_where_http_is_spoken_names_http(dashboard: FakeDashboard) -> None:
    text = refusal(dashboard.address.replace("http://", "https://"), UsageError)
    assert text.endswith(f"speaks no TLS: give {dashboard.address}")


def test_a_certificate_of_nobodys_is_told(tls: ssl.SSLContext) -> None:
    with talking(lambda raw: tls.wrap_socket(raw, server_side=True).close()) as place:
        assert "REQUESTS_CA_BUNDLE" in refusal(f"https://{place}", UsageError)


def test_a_certificate_of_an_authority_of_ones_own_is_taken(
    dashboard: FakeDashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted, context = localhost_certificate(tmp_path)
    server = urlsplit(dashboard.address)
    with tls_relay(context, str(server.hostname), int(server.port or 0)) as address:
        refusal(address, UsageError)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(trusted))
        JobsApi(address).check_version()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
        with pytest.raises(UsageError, match=r"nowhere\.pem, which REQUESTS_CA_BUNDLE names, is not there"):
            JobsApi(address)
    assert dashboard.asked == ["GET /api/version"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, "<html>Sign in</html>"), "HTTP 200"),
        ((404, "nothing here"), "HTTP 404"),
        ((302, "https://login.example/"), "leads to 'https://login.example/'"),
        ([1], "HTTP 200"),
    ],
)
def test_another_service_is_not_taken_for_a_dashboard(
    dashboard: FakeDashboard, answer: object, said: str
) -> None:
    dashboard.answers["/api/version"] = [answer]
    text = refusal(dashboard.address, UsageError)
    assert "not as Ray's dashboard" in text
    assert said in text


@pytest.mark.parametrize("version", ["2.40.0", "2.60.99", "3.0.0.dev0"])
def test_a_cluster_of_another_ray_is_refused_by_both_versions(dashboard: FakeDashboard, version: str) -> None:
    dashboard.answers["/api/version"] = [{"ray_version": version}]
    text = refusal(dashboard.address, UsageError)
    assert f"runs Ray {version}" in text
    assert f"here is Ray {ray.__version__}" in text


def test_the_same_ray_is_taken(dashboard: FakeDashboard) -> None:
    JobsApi(dashboard.address).check_version()


def test_another_clusters_token_is_told_and_not_shown(dashboard: FakeDashboard) -> None:
    dashboard.token = "right"
    api = JobsApi(dashboard.address)
    api._client._headers["Authorization"] = "Bearer wrong"
    with pytest.raises(UsageError, match="takes another token than ours") as caught:
        api.check_version()
    assert "RAY_AUTH_TOKEN_PATH" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_a_missing_token_is_told(dashboard: FakeDashboard) -> None:
    dashboard.token = "right"
    api = JobsApi(dashboard.address)
    api._client._headers.clear()
    with pytest.raises(UsageError, match=r"wants a token\. Set RAY_AUTH_MODE=token"):
        api.check_version()


def test_the_address_that_was_given_is_asked_whatever_ray_address_says(
    dashboard: FakeDashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    JobsApi(dashboard.address).check_version()
    assert dashboard.asked == ["GET /api/version"]


def submit(dashboard: FakeDashboard) -> None:
    JobsApi(dashboard.address).submit("infer-1", "masklake infer", {"A": "b"}, {"masklake": "infer"})


def test_a_job_is_sent_once_with_its_variables_and_without_a_working_directory(
    dashboard: FakeDashboard,
) -> None:
    submit(dashboard)
    (sent,) = dashboard.submitted
    assert sent["submission_id"] == "infer-1"
    assert sent["entrypoint"] == "masklake infer"
    assert sent["metadata"] == {"masklake": "infer"}
    assert sent["runtime_env"]["env_vars"] == {"A": "b"}
    assert "working_dir" not in sent["runtime_env"]


def test_a_head_whose_agent_is_not_up_yet_is_asked_again(dashboard: FakeDashboard) -> None:
    late = (500, "No available agent to submit job, please try again later.")
    dashboard.answers["/api/jobs/"] = [late, late, {"submission_id": "infer-1", "job_id": None}]
    submit(dashboard)
    assert len(dashboard.submitted) == 3


TAKEN = (500, "Traceback …\nValueError: Job with submission_id infer-1 already exists. Please use a …")


def test_an_id_that_is_taken_is_refused(dashboard: FakeDashboard) -> None:
    dashboard.answers["/api/jobs/"] = [TAKEN]
    with pytest.raises(UsageError, match="give another --submission-id"):
        submit(dashboard)


def test_an_answer_that_was_lost_does_not_make_two_jobs(dashboard: FakeDashboard) -> None:
    dashboard.answers["/api/jobs/"] = [LOST, TAKEN]
    submit(dashboard)
    assert len(dashboard.submitted) == 2


def test_why_a_dashboard_refuses_is_its_own_last_line(dashboard: FakeDashboard) -> None:
    dashboard.answers["/api/jobs/"] = [(500, "Traceback\n  File …\nOSError: the disk of the head is full\n")]
    with pytest.raises(
        ClusterUnreachableError, match=r"refused \(500\): OSError: the disk of the head is full"
    ):
        submit(dashboard)


def test_a_job_that_there_is_not_is_told(dashboard: FakeDashboard) -> None:
    with pytest.raises(UsageError, match="there is no job 'infer-9'"):
        JobsApi(dashboard.address).job("infer-9")


@pytest.mark.parametrize("name", ["../version", "a/stop", "a?b", "", "a" * 101])
def test_what_is_no_id_never_becomes_a_path(dashboard: FakeDashboard, name: str) -> None:
    with pytest.raises(UsageError, match="is no submission id"):
        JobsApi(dashboard.address).job(name)
    assert dashboard.asked == []


def test_jobs_that_were_submitted_are_listed_the_newest_last(dashboard: FakeDashboard) -> None:
    driver = details("", "RUNNING") | {"type": "DRIVER"}
    dashboard.answers["/api/jobs/"] = [
        [details("b", "RUNNING", start_time=2), driver, details("a", "FAILED", start_time=1)]
    ]
    assert [job.submission_id for job in JobsApi(dashboard.address).jobs()] == ["a", "b"]
