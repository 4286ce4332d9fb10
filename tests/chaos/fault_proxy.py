"""A proxy between clients and an S3 server that breaks replies by rule.

Enters: rules, which may change at any time. Leaves: the server's replies, or what the rules make of them; and
a record of what was broken. One rule at most applies to a request: the first that fits. Whether a rule with a
probability applies is drawn from the proxy's seed. The Host header stays the client's, which signed it.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "refuse",  # an error reply; the server sees nothing
    "lose_reply",  # the server does it, the client's connection breaks
    "busy_after",  # the server does it, the client hears 503
    "reset",  # the connection breaks; the server sees nothing
    "stall",  # half of the body, then nothing for `seconds`, then the connection breaks
    "slow",  # the body over `seconds`
    "delay",  # the server sees it after `seconds`, or once it is `released`
    "truncate",  # half of the body, then the connection ends
    "shorten",  # half of the body, with a Content-Length to match
    "flip",  # one bit of the body is wrong
    "pass",  # nothing is broken: for rules that are there for their `before`
]

# What S3 answers: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_STATUSES = {
    "AccessDenied": "403 Forbidden",
    "ExpiredToken": "400 Bad Request",
    "InternalError": "500 Internal Server Error",
    "RequestTimeTooSkewed": "403 Forbidden",
    "SlowDown": "503 Slow Down",
}
_READ_LIMIT = 1 << 20


@dataclass
class Rule:
    """Which requests, and what becomes of them.

    method, path: "" is any; path is searched, as a pattern, in path and query as they are on the wire.
    skip: so many requests that fit are let through first.
    times: so many are broken; None: all from then on.
    until_s: it applies for so many seconds from its first use.
    code: of "refuse".
    before: called, in one of a few threads, before the request goes on.
    released: of "delay": whether it is over already.
    """

    fault: Fault
    method: str = ""
    path: str = ""
    probability: float = 1.0
    skip: int = 0
    times: int | None = None
    until_s: float | None = None
    seconds: float = 1.0
    code: str = "SlowDown"
    before: Callable[[], object] | None = None
    released: Callable[[], bool] = lambda: False
    first_used_s: float | None = None

    def fits(self, method: str, path: str, rng: random.Random) -> bool:
        """Whether it applies to this request; counts it."""
        if self.method not in ("", method) or not re.search(self.path, path) or self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        now = time.monotonic()
        since_s = 0.0 if self.first_used_s is None else now - self.first_used_s
        if self.until_s is not None and since_s > self.until_s:
            return False
        if rng.random() >= self.probability:
            return False
        self.first_used_s = self.first_used_s or now
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class FaultProxy:
    """A context manager. rules and broken may be used from any thread."""

    upstream: str
    seed: int = 0
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "GET /bucket/key"
    broken: list[str] = field(default_factory=list)  # "refuse GET /bucket/key"

    def __enter__(self) -> FaultProxy:
        self._rng = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_READ_LIMIT)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.endpoint_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def set_rules(self, *rules: Rule) -> None:
        """In place of those before; the record and the draws start anew."""
        self._rng.seed(self.seed)
        self.rules[:] = rules
        self.requests.clear()
        self.broken.clear()

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of a connection; the reply says that it closes."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if re.search(rb"(?i)\r\nexpect: *100-continue", head):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
            body = await _read_body(reader, head)
            method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
            self.requests.append(f"{method} {path}")
            rule = next((rule for rule in self.rules if rule.fits(method, path, self._rng)), None)
            if rule is not None and rule.fault != "pass":
                self.broken.append(f"{rule.fault} {method} {path}")
            await self._answer(rule, method, head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    async def _answer(
        self, rule: Rule | None, method: str, head: bytes, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        fault = "pass" if rule is None else rule.fault
        if rule is not None and rule.before is not None:
            await asyncio.to_thread(rule.before)
        if fault == "reset":
            writer.transport.abort()
            return
        if fault == "refuse":
            assert rule is not None
            writer.write(_error(rule.code, method))
            await writer.drain()
            return
        if rule is not None and fault == "delay":
            over_s = time.monotonic() + rule.seconds
            while (left_s := over_s - time.monotonic()) > 0 and not rule.released():
                await asyncio.sleep(min(0.1, left_s))
        reply = await self._forward(head, body)
        if fault == "lose_reply":
            writer.transport.abort()
            return
        if fault == "busy_after":
            reply = _error("SlowDown", method)
        reply_head, _, reply_body = reply.partition(b"\r\n\r\n")
        reply_head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", reply_head) + b"\r\nConnection: close"
        half = reply_body[: len(reply_body) // 2]
        if fault == "shorten":
            reply_head = re.sub(
                rb"(?i)(\r\ncontent-length:) *\d+", rb"\1 " + str(len(half)).encode(), reply_head
            )
            reply_body = half
        elif fault == "flip" and reply_body:
            place = self._rng.randrange(len(reply_body))
            flipped = reply_body[place] ^ (1 << self._rng.randrange(8))
            reply_body = reply_body[:place] + bytes([flipped]) + reply_body[place + 1 :]
        elif fault in ("stall", "truncate"):
            reply_body = half
        writer.write(reply_head + b"\r\n\r\n")
        pieces = 20 if fault == "slow" else 1
        step = max(1, -(-len(reply_body) // pieces))
        for start in range(0, len(reply_body), step):
            writer.write(reply_body[start : start + step])
            await writer.drain()
            if rule is not None and fault == "slow":
                await asyncio.sleep(rule.seconds / pieces)
        if rule is not None and fault == "stall":
            await asyncio.sleep(rule.seconds)
            writer.transport.abort()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """The server's whole reply."""
        place = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        reply = await reader.read(-1)
        writer.close()
        return reply


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """A request's body as it is on the wire."""
    if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
        return await reader.readexactly(int(length[1]))
    if not re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        return b""
    body = b""
    while True:
        size_line = await reader.readuntil(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        body += size_line + await reader.readexactly(size + 2)
        if size == 0:
            return body


def _error(code: str, method: str) -> bytes:
    """S3's XML; to a HEAD the status only."""
    xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    body = b"" if method == "HEAD" else xml
    head = f"HTTP/1.1 {_STATUSES[code]}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
