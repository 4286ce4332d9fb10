"""What the operator allows is reached, and nothing else, however it is spelled and whoever asks."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from jobs.lake.files_source import read_objects
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.shards import ImageIds
from jobs.lake.sources import list_shards
from jobs.lake.storage import Storage
from jobs.lake.uri_policy import RAY_JOB_VARIABLE, UriPolicy, is_metadata_address
from schemas.errors import StorageError, UsageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec, StorageSpec

Allow = Callable[[str], Storage]


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Allow:
    """A storage under a MASKLAKE_ALLOWED_URIS."""

    def allow(uris: str) -> Storage:
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", uris)
        return Storage(StorageSpec())

    return allow


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_JOB_VARIABLE, "{}")


def is_allowed(uri: str) -> bool:
    try:
        UriPolicy.from_environment().check(uri)
    except UsageError:
        return False
    return True


class TestPrefixes:
    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            ("s3://lake", True),
            ("s3://lake/labels/1.parquet", True),
            ("s3://lake/a//b", True),
            ("s3://lake/a..b/..c", True),  # names that only look like it
            ("s3://lake/50%25.jpg", True),
            ("s3://lake-2/x", False),
            ("s3://Lake/x", False),  # another bucket
            ("gs://lake/x", False),
            ("s3://photos/2026/1.jpg", True),
            ("s3://photos/2026", True),
            ("s3://photos/20266", False),
            ("s3://photos/2026-old/1.jpg", False),
            ("s3://photos", False),
            ("s3://photos/2026/../2025/1.jpg", False),
            ("s3://photos/2026/%2e%2e/2025/1.jpg", False),
            ("s3://photos/2026/%252E%252e/2025/1.jpg", False),
            ("s3://photos/2026/..%2f2025/1.jpg", False),
            ("s3://photos/2026/%" + "25" * 20 + "2e%2e/x", False),  # in layers without end
            ("s3://photos//2026/1.jpg", False),
            ("s3://photos/./2026/1.jpg", False),
            ("s3://photos%2f2026/1.jpg", False),
            ("memory://lake/x", False),
            ("file:///lake/x", False),
        ],
    )
    def test_a_uri_is_below_a_prefix_by_whole_parts_in_each_way_it_may_be_read(
        self, uri: str, expected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", " s3://lake/  s3://photos/2026\n")
        assert is_allowed(uri) is expected

    def test_a_scheme_alone_stands_for_all_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", "gs:// file:///")
        assert is_allowed("gs://any/x")
        assert is_allowed("file:///etc/hosts")
        assert not is_allowed("s3://any/x")

    @pytest.mark.parametrize("uri", ["S3://lake/x", "s3a://lake/x", "s3n://lake/x", "FILE:///etc/passwd"])
    def test_another_spelling_of_a_scheme_is_no_scheme(self, uri: str, allow: Allow) -> None:
        with pytest.raises(UsageError, match="is not supported"):
            allow("s3:// file:///").filesystem(uri)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("", "MASKLAKE_ALLOWED_URIS is set and empty"),
            ("  ", "MASKLAKE_ALLOWED_URIS is set and empty"),
            ("lake/", "MASKLAKE_ALLOWED_URIS names 'lake/', wanted prefixes such as s3://bucket/folder/"),
            ("s3a://lake/", "MASKLAKE_ALLOWED_URIS names 's3a'"),
            ("s3://lake/,s3://photos/ file://x", "MASKLAKE_ALLOWED_URIS names 'file'"),
        ],
    )
    def test_a_variable_that_cannot_be_meant_allows_nothing(
        self, value: str, message: str, allow: Allow
    ) -> None:
        with pytest.raises(UsageError, match=message):
            allow(value)

    @given(st.text(alphabet="a./%2eE5F\\", max_size=30))
    def test_no_spelling_reaches_the_folder_beside(self, rest: str) -> None:
        """Resolved as a URL client would, a URI that passes is still below its prefix."""
        from posixpath import normpath
        from urllib.parse import unquote

        policy = UriPolicy(("s3://b/in/",), None)
        path = f"b/in/{rest}"
        try:
            policy.check(f"s3://{path}")
        except UsageError:
            return
        for _ in range(10):
            assert f"{normpath(path)}/".startswith("b/in/")
            path = unquote(path)


class TestFiles:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        allowed, secret = tmp_path / "allowed", tmp_path / "secret"
        for folder in (allowed, secret):
            folder.mkdir()
            (folder / "1.jpg").write_bytes(b"x")
        return allowed, secret

    def test_links_and_dots_lead_nowhere_else(self, folders: tuple[Path, Path], allow: Allow) -> None:
        allowed, secret = folders
        (allowed / "link").symlink_to(secret)
        (allowed / "inner").symlink_to(allowed / "1.jpg")
        storage = allow(f"file://{allowed}/")
        assert storage.read_bytes(storage.stat(f"{allowed}/inner")) == b"x"
        for uri in (
            f"{allowed}/link/1.jpg",
            f"{allowed}/../secret/1.jpg",
            f"file://{secret}/1.jpg",
            "/etc/passwd",
        ):
            with pytest.raises(UsageError, match="is not allowed here, wanted one below file://"):
                storage.stat(uri)
        (allowed / "inner").unlink()
        with pytest.raises(UsageError, match=r"link/1\.jpg is not allowed here"):
            list(storage.list(str(allowed)))

    def test_a_prefix_may_itself_be_a_link(self, folders: tuple[Path, Path], allow: Allow) -> None:
        allowed, secret = folders
        (allowed / "link").symlink_to(secret)
        assert allow(f"file://{allowed}/link").exists(f"file://{secret}/1.jpg")

    def test_every_method_of_storage_asks(self, folders: tuple[Path, Path], allow: Allow) -> None:
        allowed, secret = folders
        info = Storage(StorageSpec()).stat(f"{secret}/1.jpg")
        storage = allow(f"file://{allowed}/")
        uri = info.uri

        def stream() -> None:
            with storage.open_verified(info):
                pass

        calls: list[Callable[[], object]] = [
            lambda: storage.filesystem(uri),
            lambda: storage.delta_options(uri),
            lambda: storage.stat(uri),
            lambda: list(storage.list(str(secret))),
            lambda: storage.read_bytes(info),
            stream,
            lambda: storage.open_unverified(info),
            lambda: storage.write_bytes(f"{secret}/new", b""),
            lambda: storage.write_file(f"{secret}/new", allowed / "1.jpg"),
            lambda: storage.create_exclusive(f"{secret}/new", b""),
            lambda: storage.exists(uri),
            lambda: storage.delete(uri),
            lambda: storage.check_reachable(uri, "source"),
            lambda: storage.probe_conditional_put(str(secret)),
        ]
        for call in calls:
            with pytest.raises(UsageError, match="is not allowed here"):
                call()
        assert [path.name for path in secret.iterdir()] == ["1.jpg"]
        asked = {name for name in vars(Storage) if not name.startswith("_")} - {
            "normalize"
        }  # which asks nobody
        assert len(asked) == len(calls), f"a method of Storage is not tried here: {asked}"

    def test_a_list_s_uri_that_is_not_allowed_becomes_a_failed_row(
        self, folders: tuple[Path, Path], allow: Allow
    ) -> None:
        allowed, secret = folders
        (allowed / "list.csv").write_text(f"uri\n{allowed}/1.jpg\n{secret}/1.jpg\n../secret/1.jpg\n")
        storage = allow(f"file://{allowed}/")
        (shard,) = list_shards(SourceSpec(uri=f"{allowed}/list.csv"), storage)
        images = list(read_objects(shard, storage, ImageIds(())))
        assert [image.data for image in images] == [b"x", None, None]
        assert {image.error_kind for image in images[1:]} == {ErrorKind.UNSUPPORTED}

    def test_a_checkpoint_is_asked_for_too(self, folders: tuple[Path, Path], allow: Allow) -> None:
        allowed, secret = folders
        with pytest.raises(UsageError, match="is not allowed here"):
            read_checkpoint_bytes(f"{secret}/1.jpg", allow(f"file://{allowed}/"))


class TestJobs:
    def test_ray_s_name_for_a_job_is_ours(self) -> None:
        assert RAY_JOB_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR

    @pytest.mark.usefixtures("in_a_job")
    def test_a_submitted_job_reaches_object_storage_only(self) -> None:
        for uri in ("file:///etc/passwd", "memory://b/x"):
            with pytest.raises(UsageError, match="a submitted job reaches object storage only"):
                Storage(StorageSpec()).filesystem(uri)
        assert is_allowed("s3://any/x")
        assert is_allowed("gs://any/x")

    @pytest.mark.usefixtures("in_a_job")
    def test_the_operator_may_give_a_job_a_folder(self, allow: Allow, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"")
        assert allow(f"file://{tmp_path}").exists(f"{tmp_path}/x")

    def test_without_a_word_a_laptop_reaches_everything(self) -> None:
        assert all(is_allowed(uri) for uri in ("file:///etc/passwd", "s3://b/../x", "memory://b/x"))

    def test_a_worker_is_bound_by_the_driver_s_policy_and_by_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", "memory://one/ memory://both/")
        travelling = pickle.dumps(Storage(StorageSpec()))
        monkeypatch.delenv("MASKLAKE_ALLOWED_URIS")
        there = pickle.loads(travelling)
        assert not there.exists("memory://one/x")
        with pytest.raises(UsageError, match="is not allowed here"):
            there.exists("memory://two/x")
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", "memory://two/ memory://both/")
        for storage in (there := pickle.loads(travelling), pickle.loads(pickle.dumps(there))):
            assert not storage.exists("memory://both/x")
            for uri in ("memory://one/x", "memory://two/x"):
                with pytest.raises(UsageError, match="is not allowed here"):
                    storage.exists(uri)


class TestEndpoints:
    @pytest.mark.parametrize(
        "address",
        [
            "169.254.169.254",
            "169.254.170.2",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "fe80::1%eth0",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "100.100.100.200",
            "::169.254.169.254",
            "64:ff9b:1::a9fe:a9fe",
            "::ffff:0:169.254.169.254",
        ],
    )
    def test_a_metadata_address_is_known_in_each_of_its_forms(self, address: str) -> None:
        assert is_metadata_address(address)

    @pytest.mark.parametrize(
        "address", ["127.0.0.1", "10.0.0.5", "::1", "fd00::1", "169.253.0.1", "64:ff9b::1"]
    )
    def test_other_addresses_are_not(self, address: str) -> None:
        assert not is_metadata_address(address)

    @pytest.mark.parametrize(
        "host",
        [
            "169.254.169.254",
            "169.254.169.254:80",
            "2852039166",
            "0xa9fea9fe",
            "0xa9.254.0251.254",
            "[fd00:ec2::254]",
            "[::ffff:a9fe:a9fe]",
            "metadata.google.internal",
            "Metadata.Google.Internal.",
            "innocent.example",
        ],
    )
    def test_an_endpoint_that_is_a_metadata_service_is_refused_under_every_name(
        self, host: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolve: Callable[..., Any] = socket.getaddrinfo

        def resolve_innocent(name: str, *args: Any, **options: Any) -> Any:
            return resolve("169.254.169.254" if name == "innocent.example" else name, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve_innocent)
        for storage in (Storage(StorageSpec(endpoint_url=f"http://{host}/latest")), Storage(StorageSpec())):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
            for call in (storage.filesystem, storage.delta_options):
                with pytest.raises(UsageError, match="leads to a link-local or metadata address"):
                    call("s3://bucket/key")

    def test_the_operator_may_list_even_that(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASKLAKE_ALLOWED_ENDPOINTS", "http://169.254.7.7:9000")
        UriPolicy.from_environment().check_endpoint("http://169.254.7.7:9000/", of_spec=True)
        with pytest.raises(UsageError, match="is not allowed here"):
            UriPolicy.from_environment().check_endpoint("http://169.254.7.7:9001", of_spec=True)

    def test_a_submitted_spec_names_the_environment_s_endpoint_or_a_listed_one(
        self, in_a_job: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://S3.internal.example/")
        monkeypatch.setenv("MASKLAKE_ALLOWED_ENDPOINTS", "http://127.0.0.1:9000 https://other.example")
        policy = UriPolicy.from_environment()
        for url in (
            "https://s3.internal.example",
            "https://s3.internal.example:443/",
            "http://127.0.0.1:9000",
            "https://OTHER.example.",
        ):
            policy.check_endpoint(url, of_spec=True)
        for url in (
            "http://s3.internal.example",
            "https://s3.internal.example:444",
            "https://s3.internal.example.evil.example",
            "https://evil.example/https://s3.internal.example",
            "http://127.0.0.1:9001",
        ):
            with pytest.raises(UsageError, match="requests to it are signed with this machine's credentials"):
                policy.check_endpoint(url, of_spec=True)
        with pytest.raises(UsageError, match="holds credentials") as caught:
            policy.check_endpoint("https://user:hunter2@s3.internal.example", of_spec=True)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(UsageError, match="has more behind the host than an endpoint has"):
            policy.check_endpoint("https://evil.example/?https://s3.internal.example", of_spec=True)

    def test_where_uris_are_limited_endpoints_are_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same bucket's name at another server is another place."""
        monkeypatch.setenv("MASKLAKE_ALLOWED_URIS", "s3://lake/")
        with pytest.raises(
            UsageError, match=r"storage\.endpoint_url http://127\.0\.0\.1:9 is not allowed here"
        ):
            Storage(StorageSpec(endpoint_url="http://127.0.0.1:9")).filesystem("s3://lake/x")

    @pytest.mark.parametrize("region", ["evil.example/", "us-east-1.evil.example", "a@b", ""])
    def test_a_region_cannot_make_a_host_of_its_own(
        self, region: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_REGION", region or "evil.example#")
        storage = Storage(StorageSpec(region=region or None))
        with pytest.raises(UsageError, match="wanted a region's name"):
            storage.delta_options("s3://bucket/lake")

    @pytest.mark.parametrize("status", [301, 302, 307])
    def test_a_redirect_is_not_followed(
        self, status: int, elsewhere: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        location, heard = elsewhere

        class Redirect(_Quiet):
            def answer(self) -> None:
                self.send_response(status)
                self.send_header("Location", f"{location}/latest/meta-data")

        monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
        with _serve(Redirect) as endpoint:
            storage = Storage(StorageSpec(endpoint_url=endpoint))
            for call in (lambda: storage.stat("s3://b/k"), lambda: list(storage.list("s3://b/k"))):
                with pytest.raises(StorageError, match=rf"redirects to another place \({status}\)"):
                    call()
        assert heard == []


class _Quiet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer()
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the library's way

    def answer(self) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:
        """Not in the tests' output."""


class _serve:  # noqa: N801 - a context manager that is called like a function
    def __init__(self, handler: type[_Quiet]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that nobody should ask, and what it was asked."""
    heard: list[str] = []

    class Elsewhere(_Quiet):
        def answer(self) -> None:
            heard.append(self.path)
            self.send_response(200)

    with _serve(Elsewhere) as location:
        yield location, heard
