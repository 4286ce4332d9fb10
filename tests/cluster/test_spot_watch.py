"""A notice that the machine goes: heard from fake metadata servers over HTTP, and what is done then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.spot_watch import AwsMetadata, DrainError, GcpMetadata, Notice, Watch, main

NOW = datetime(2026, 11, 23, 6, 0, 0, tzinfo=UTC)
ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


@dataclass
class Service:
    """A metadata service. answers: by path; a callable sees the request's headers."""

    url: str = ""
    answers: dict[str, Callable[[dict[str, str]], tuple[int, str]]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)


def _not_found(headers: dict[str, str]) -> tuple[int, str]:
    return 404, ""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody: a proxy must not be asked
    served = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            headers = {key.lower(): value for key, value in self.headers.items()}
            served.asked.append((self.command, self.path, headers))
            status, body = served.answers.get(self.path, _not_found)(headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def aws(service: Service) -> AwsMetadata:
    return AwsMetadata(base_url=service.url, now=lambda: NOW)


def imds(service: Service, action: str | None) -> None:
    """IMDSv2: each token is good for two calls."""
    good_for = {"": 0}

    def token(headers: dict[str, str]) -> tuple[int, str]:
        assert 0 < int(headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        name = f"token-{len(good_for)}"
        good_for[name] = 2
        return 200, name

    def instance_action(headers: dict[str, str]) -> tuple[int, str]:
        name = headers.get("x-aws-ec2-metadata-token", "")
        if not good_for[name]:
            return 401, ""
        good_for[name] -= 1
        return (404, "") if action is None else (200, action)

    service.answers = {"/latest/api/token": token, ACTION: instance_action}


def test_aws_says_when_the_instance_goes(service: Service) -> None:
    imds(service, '{"action": "terminate", "time": "2026-11-23T06:02:00Z"}')
    assert aws(service).notice() == Notice(
        120.0, "AWS will terminate this instance at 2026-11-23 06:02:00+00:00"
    )
    assert [(method, path) for method, path, _ in service.asked] == [
        ("PUT", "/latest/api/token"),
        ("GET", ACTION),
    ]


def test_aws_without_a_notice_is_asked_with_one_token_until_it_is_too_old(service: Service) -> None:
    imds(service, None)
    metadata = aws(service)
    assert [metadata.notice() for _ in range(4)] == [None] * 4
    puts = [method for method, *_ in service.asked].count("PUT")
    assert puts == 2


def test_a_time_that_is_past_leaves_no_seconds(service: Service) -> None:
    imds(service, '{"action": "stop", "time": "2026-11-23T05:59:00Z"}')
    notice = aws(service).notice()
    assert notice is not None
    assert notice.seconds_left == 0


@pytest.mark.parametrize(
    "body", ["", "{}", '{"action": "terminate"}', '{"action": "terminate", "time": "soon"}']
)
def test_an_answer_that_aws_does_not_give_is_an_error_and_no_notice(service: Service, body: str) -> None:
    imds(service, body)
    with pytest.raises(HTTPException, match="instance-action says"):
        aws(service).notice()


def test_a_service_that_gives_no_token_is_an_error(service: Service) -> None:
    service.answers = {"/latest/api/token": lambda _: (403, "")}
    with pytest.raises(HTTPException, match="api/token answers 403"):
        aws(service).notice()


@pytest.mark.parametrize(("body", "seconds"), [("FALSE", None), ("TRUE", 30.0), ("TRUE\n", 30.0)])
def test_google_says_that_the_instance_is_preempted(
    service: Service, body: str, seconds: float | None
) -> None:
    service.answers = {
        PREEMPTED: lambda headers: (200 if headers["metadata-flavor"] == "Google" else 403, body)
    }
    notice = GcpMetadata(base_url=service.url).notice()
    assert (notice and notice.seconds_left) == seconds


def test_something_else_at_googles_address_is_an_error(service: Service) -> None:
    service.answers = {PREEMPTED: lambda _: (200, "<html>")}
    with pytest.raises(HTTPException, match="preempted answers 200"):
        GcpMetadata(base_url=service.url).notice()


class World:
    """A clock, a metadata service by script, a cluster, and Ray on this machine; told: what happened when."""

    def __init__(self, answers: list[Notice | Exception | None], refusals: int = 0) -> None:
        self.seconds = 0.0
        self.told: list[tuple[float, str]] = []
        self._answers = iter(answers)
        self._refusals = refusals

    def notice(self) -> Notice | None:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def drain(self, seconds: float, reason: str) -> None:
        if self._refusals:
            self._refusals -= 1
            raise DrainError("the cluster was not told")
        self.told.append((self.seconds, f"drain {seconds:g} {reason}"))

    def stop(self) -> None:
        self.told.append((self.seconds, "stop"))

    def say(self, line: str) -> None:
        self.told.append((self.seconds, line))

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def run(self) -> list[tuple[float, str]]:
        Watch(self, self.drain, self.stop, self.say, clock=lambda: self.seconds, sleep=self.sleep).run()
        return self.told


def test_the_node_is_drained_at_once_and_ray_ends_before_the_machine() -> None:
    assert World([None, None, Notice(120, "AWS will terminate")]).run() == [
        (10, "AWS will terminate: draining Ray here, 120 s are left"),
        (10, "drain 120 AWS will terminate"),
        (115, "stopping Ray here"),
        (115, "stop"),
    ]


def test_a_drain_that_is_refused_is_tried_until_it_is_time_to_stop() -> None:
    told = World([Notice(30, "preempted")], refusals=2).run()
    assert told[1:] == [
        (0, "the cluster was not told"),
        (5, "the cluster was not told"),
        (10, "drain 20 preempted"),
        (15, "stopping Ray here"),
        (15, "stop"),
    ]
    assert World([Notice(30, "preempted")], refusals=99).run()[-1] == (15, "stop")


def test_with_no_time_left_ray_is_stopped_at_once() -> None:
    assert World([Notice(0, "late")]).run()[1:] == [
        (0, "drain 0 late"),
        (0, "stopping Ray here"),
        (0, "stop"),
    ]


def test_a_service_that_does_not_answer_is_told_of_once_and_asked_on() -> None:
    silent: list[Notice | Exception | None] = [OSError("no route"), HTTPException("503"), OSError("no route")]
    told = World([*silent, None, OSError("again"), Notice(60, "gone")]).run()
    assert [line for _, line in told if "answer" in line] == [
        "the metadata service does not answer (no route): asking on",
        "the metadata service does not answer (again): asking on",
    ]
    assert told[-1] == (25 + 45, "stop")


@pytest.mark.parametrize("address", ["http://head:8265", "head"])
def test_an_address_that_is_no_host_and_port_is_refused(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["aws", "--address", address]) == 2
    assert "is not HOST:PORT" in capsys.readouterr().err
