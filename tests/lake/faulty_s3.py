"""An S3 server on loopback (moto's) that fails on demand as real ones do: busy, cut short, damaged."""

import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app
from werkzeug.wrappers import Response

from jobs.lake.storage import Storage
from schemas.specs import StorageSpec

Headers = list[tuple[str, str]]
# (status line, headers, body) of the server's own reply -> what the client is to get instead.
Change = Callable[[str, Headers, bytes], tuple[str, Headers, bytes]]


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path matches.

    reached: whether the server sees the request; before it does, `hidden_headers` are taken out of it.
    """

    method: str
    path: str
    change: Change
    times: int = 1
    reached: bool = True
    hidden_headers: tuple[str, ...] = ()


def busy(method: str, path: str = "", times: int = 1) -> Fault:
    """503 SlowDown, and nothing is done."""
    return Fault(method, path, _slow_down, times, reached=False)


def lost_reply(method: str, path: str = "") -> Fault:
    """It is done, but the client hears 503."""
    return Fault(method, path, _slow_down)


def flipped_byte(path: str, times: int = 1) -> Fault:
    return Fault("GET", path, lambda s, h, body: (s, h, body[:-1] + bytes([body[-1] ^ 1])), times)


def shortened(path: str, times: int = 1) -> Fault:
    """Half the body, with a Content-Length to match."""
    return Fault("GET", path, lambda status, headers, body: (status, headers, body[: len(body) // 2]), times)


def unconditional_put() -> Fault:
    """A server that does not know If-None-Match."""
    return Fault("PUT", "", lambda *reply: reply, times=10**6, hidden_headers=("HTTP_IF_NONE_MATCH",))


def extra_header(method: str, path: str, name: str, value: str) -> Fault:
    return Fault(
        method, path, lambda status, headers, body: (status, [*headers, (name, value)], body), times=10**6
    )


def refusal(method: str, status: str, code: str, times: int = 10**6, path: str = "") -> Fault:
    """An S3 error reply to every request."""
    return Fault(method, path, lambda *_: _error(status, code), times, reached=False)


def _slow_down(*_: Any) -> tuple[str, Headers, bytes]:
    return _error("503 Slow Down", "SlowDown")


def _error(status: str, code: str) -> tuple[str, Headers, bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return status, [("Content-Type", "application/xml")], body


@contextmanager
def serve_s3() -> Iterator[tuple["FaultyS3", Storage]]:
    """A server, and a storage whose clients, made once, reach it."""
    with FaultyS3() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        storage = Storage(StorageSpec(endpoint_url=server.endpoint_url))
        server.new_bucket(storage)
        yield server, storage


@dataclass
class FaultyS3:
    """`faults` may be set at any time; the first one that fits a request applies."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "GET /bucket/key", since the last clear()

    def __enter__(self) -> "FaultyS3":
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_QuietHandler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def new_bucket(self, storage: Storage, suffix: str = "") -> str:
        """URI of an empty bucket; faults and the record of requests are cleared."""
        self.faults.clear()
        bucket = f"bucket-{uuid.uuid4().hex}{suffix}"
        storage.filesystem(f"s3://{bucket}")[0].call_s3("create_bucket", Bucket=bucket)
        self.requests.clear()
        return f"s3://{bucket}"

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append(f"{method} {path}")
            fitting = (f for f in self.faults if f.times and f.method == method and re.search(f.path, path))
            fault = next(fitting, None)
            if fault:
                fault.times -= 1
        if fault is None:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        for name in fault.hidden_headers:
            environ.pop(name, None)
        status, headers, body = "", [], b""
        if fault.reached:
            iterable, status, wsgi_headers = run_wsgi_app(self._app, environ, buffered=True)
            headers, body = list(wsgi_headers), b"".join(iterable)
        status, headers, changed = fault.change(status, headers, body)
        response = Response(changed, status, headers)
        if changed != body:
            response.content_length = len(changed)
        return response(environ, start_response)


class _QuietHandler(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Not in the tests' output."""
