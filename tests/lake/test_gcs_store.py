"""Google Cloud Storage's JSON API as we use it, against a small server with its rules on generations."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from jobs.lake.storage import AccessDeniedError, MissingObjectError, Storage
from schemas.errors import UsageError
from schemas.specs import StorageSpec

BUCKET = "gs://photos"


@dataclass
class FakeGcs:
    """Objects of the one bucket "photos"."""

    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    generation: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        with self.lock:
            # The key is quoted, so it has no slash of its own.
            _, _, rest = environ["REQUEST_URI"].partition("?")[0].partition("/b/")
            bucket, _, key = rest.partition("/o")
            response = self._route(request, bucket, unquote(key.removeprefix("/")))
        return response(environ, start_response)

    def _route(self, request: Request, bucket: str, key: str) -> Response:
        if bucket == "secret":
            return _reply({"error": {"message": "does not have storage.objects.list access"}}, 403)
        if bucket != "photos":
            return _reply({"error": {"message": "The specified bucket does not exist."}}, 404)
        if request.method == "POST":
            return self._upload(request)
        if not key:
            return self._list(request)
        if key not in self.items:
            return _reply({"error": {"message": "No such object"}}, 404)
        if request.method == "DELETE":
            del self.items[key], self.contents[key]
            return Response(status=204)
        if request.args.get("alt") == "media":
            range_ = request.range
            start, end = range_.ranges[0] if range_ else (0, None)
            return Response(self.contents[key][start:end], status=206)
        return _reply(self.items[key])

    def _list(self, request: Request) -> Response:
        keys = sorted(key for key in self.items if key.startswith(request.args.get("prefix", "")))
        start, count = int(request.args.get("pageToken", 0)), int(request.args["maxResults"])
        page: dict[str, Any] = {"items": [self.items[key] for key in keys[start : start + count]]}
        if start + count < len(keys):
            page["nextPageToken"] = str(start + count)
        return _reply(page)

    def _upload(self, request: Request) -> Response:
        """The body is multipart/related: the metadata, then the content."""
        _, metadata, content = request.get_data().removesuffix(b"\n--==0==--").split(b"--==0==\n", 2)
        item = json.loads(metadata.partition(b"\n\n")[2])
        data = content.partition(b"\n\n")[2]
        if request.args.get("ifGenerationMatch") == "0" and item["name"] in self.items:
            return _reply({"error": {"message": "conditionNotMet"}}, 412)
        self.generation += 1
        self.contents[item["name"]] = data
        self.items[item["name"]] = item | {
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "generation": str(self.generation),
        }
        return _reply(self.items[item["name"]])


def _reply(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, content_type="application/json")


class _QuietHandler(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Not in the tests' output."""


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as environment:
        server = make_server("127.0.0.1", 0, FakeGcs().answer, threaded=True, request_handler=_QuietHandler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.port}")
        yield Storage(StorageSpec(anonymous=True))
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_was_written_reads_back_and_its_md5_is_compared(storage: Storage, tmp_path: Path) -> None:
    uri = f"{BUCKET}/folder/ü 1%2B.jpg"
    for data in (b"first", b"second, longer", b""):
        storage.write_bytes(uri, data)
        info = storage.stat(uri)
        assert (info.uri, info.size, info.etag) == (uri, len(data), hashlib.md5(data).hexdigest())
        assert storage.read_bytes(info) == data
        with storage.open_verified(info) as stream:
            assert stream.read() == data
    storage.write_bytes(uri, b"another")
    assert storage.stat(uri).version != info.version
    (tmp_path / "set.arrow").write_bytes(b"of a file")
    storage.write_file(uri, tmp_path / "set.arrow")
    assert storage.read_bytes(storage.stat(uri)) == b"of a file"


def test_ranges_are_read_in_place(storage: Storage) -> None:
    storage.write_bytes(f"{BUCKET}/ranges", b"0123456789")
    with storage.open_unverified(storage.stat(f"{BUCKET}/ranges")) as stream:
        stream.seek(4)
        assert stream.read(3) == b"456"


def test_a_listing_goes_page_by_page(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.lake.gcs_store.PAGE_KEYS", 2)
    uris = [f"{BUCKET}/listed/{n // 2}/{n}" for n in range(5)]
    for uri in uris:
        storage.write_bytes(uri, b"x")
    assert [info.uri for info in storage.list(f"{BUCKET}/listed")] == uris
    assert list(storage.list(f"{BUCKET}/nothing")) == []


def test_of_many_writers_exactly_one_makes_the_object(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: storage.create_exclusive(f"{BUCKET}/lease", b"%d" % n), range(8)))
    assert sum(made) == 1
    storage.probe_conditional_put(f"{BUCKET}/lake")


def test_what_is_deleted_is_gone_and_may_be_deleted_again(storage: Storage) -> None:
    storage.write_bytes(f"{BUCKET}/gone", b"x")
    storage.delete(f"{BUCKET}/gone")
    storage.delete(f"{BUCKET}/gone")
    assert not storage.exists(f"{BUCKET}/gone")
    assert not storage.exists(BUCKET)


def test_missing_and_forbidden_buckets_are_named(storage: Storage) -> None:
    with pytest.raises(UsageError, match="source gs://absent/a: no such object or bucket"):
        storage.check_reachable("gs://absent/a", "source")
    with pytest.raises(MissingObjectError, match="gs://absent"):
        list(storage.list("gs://absent"))
    with pytest.raises(AccessDeniedError, match="gs://secret: Google Cloud Storage denies access"):
        list(storage.list("gs://secret"))


def test_absent_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(
        UsageError, match=r"no usable Google credentials .* set GOOGLE_APPLICATION_CREDENTIALS"
    ):
        Storage(StorageSpec()).check_reachable("gs://bucket", "source")
