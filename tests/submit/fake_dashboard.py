"""A dashboard of Ray that answers what a test tells it to, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

LOST = (0, "")  # the request has arrived, and the connection breaks


def details(submission_id: str, status: str, **more: Any) -> dict[str, Any]:
    """A job as the API tells it."""
    return {
        "type": "SUBMISSION",
        "submission_id": submission_id,
        "status": status,
        "entrypoint": "masklake infer env:MASKLAKE_SPEC --json",
        **more,
    }


@dataclass
class FakeDashboard:
    """What it knows, and what it was asked.

    Attributes:
        answers: to one path, the next first and the last again and again: a body for 200, or (status, text).
        submitted: bodies of the jobs that were handed in.
    """

    address: str = ""
    token: str | None = None
    answers: dict[str, list[Any]] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, str]:
        self.asked.append(f"{method} {path}")
        if self.token is not None and token != f"Bearer {self.token}":
            return (401, "Unauthorized: Missing") if token is None else (403, "Forbidden: Invalid")
        if method == "POST" and path == "/api/jobs/":
            self.submitted.append(json.loads(body))
            default: Any = {"submission_id": self.submitted[-1]["submission_id"], "job_id": None}
        else:
            default = {"ray_version": ray.__version__} if path == "/api/version" else (404, "does not exist")
        scripted = self.answers.get(path, [default])
        answer = scripted.pop(0) if len(scripted) > 1 else scripted[0]
        return answer if isinstance(answer, tuple) else (200, json.dumps(answer))


@contextmanager
def serving(dashboard: FakeDashboard) -> Iterator[FakeDashboard]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond()

        def do_POST(self) -> None:
            self.respond()

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = dashboard.answer(self.command, self.path, body, self.headers.get("Authorization"))
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read what was asked, not a log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    dashboard.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield dashboard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
