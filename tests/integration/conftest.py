"""S3 over the wire: moto's server in the quick suite, Ceph RGW, a real one, under `-m s3`.

A test that takes `s3_bucket` runs against both.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config

from schemas.specs import StorageSpec

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

_RGW_SCRIPT = Path(__file__).with_name("rgw.sh")
# Of RGW's second user, `job`, who may do only what a bucket's policy says.
RGW_JOB_KEYS = {"AWS_ACCESS_KEY_ID": "masklake-job", "AWS_SECRET_ACCESS_KEY": "the-job-s-own"}


@dataclass(frozen=True)
class S3Server:
    """A server on the loopback that takes the keys of the test environment."""

    name: str
    endpoint_url: str

    def client(self) -> S3Client:
        # RGW refuses the checksums that botocore adds since 2025 to what does not need any.
        config = Config(
            request_checksum_calculation="when_required", response_checksum_validation="when_required"
        )
        return boto3.client("s3", endpoint_url=self.endpoint_url, config=config)


@dataclass(frozen=True)
class S3Bucket:
    """A fresh bucket on one of the servers."""

    name: str
    server: S3Server
    client: S3Client

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def endpoint_url(self) -> str:
        return self.server.endpoint_url

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str = "") -> None:
        """Every file below the folder, under its relative path."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())

    def list_keys(self, prefix: str = "") -> list[str]:
        """Keys under the prefix, in order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """moto in a process of its own, for deltalake may hold the GIL while it waits; it takes any keys."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not _listens(port):
            assert process.poll() is None, "moto ended at once"
            time.sleep(0.05)
        yield S3Server("moto", f"http://127.0.0.1:{port}")
        process.terminate()


@pytest.fixture(scope="session")
def rgw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph RGW in processes of its own: ready after 15 s, refuses wrong keys, gone with this process."""
    missing = [name for name in ("radosgw", "ceph-mon", "ceph-osd") if shutil.which(name) is None]
    if missing:
        pytest.fail(
            f"no {', '.join(missing)} here: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"
        )
    folder = tmp_path_factory.mktemp("rgw")
    port, mon_port = free_ports(2)
    keys = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    with subprocess.Popen(
        [_RGW_SCRIPT, folder, str(port), str(mon_port), *keys, *RGW_JOB_KEYS.values()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.fail(f"{_RGW_SCRIPT.name} ended with {process.wait()}; its logs are in {folder}/log")
        yield S3Server("rgw", f"http://127.0.0.1:{port}")
        process.stdin.close()


@pytest.fixture(scope="session", params=["moto", pytest.param("rgw", marks=pytest.mark.s3)])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the servers in turn."""
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    """A fresh, empty bucket; AWS_ENDPOINT_URL names its server for this process and those it starts.

    Workers of `local_ray` were started before: give them the endpoint as the spec's storage.endpoint_url.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    with fresh_bucket(s3_server) as bucket:
        yield bucket


# Not moto: what photographs would show there, the small jobs show in a tenth of the time.
@pytest.fixture(params=["disk", pytest.param("rgw", marks=pytest.mark.s3)])
def photo_storage(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Callable[[Path], str], StorageSpec]]:
    """Where a job reads and writes: a function from a local folder, whether it exists yet or not, to its URI
    there, with what it holds; and how that place is reached.
    """
    if request.param == "disk":
        yield str, StorageSpec()
        return
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    with fresh_bucket(server) as bucket:

        def place(folder: Path) -> str:
            bucket.upload(folder, prefix=f"{folder.name}/")
            return f"{bucket.uri}/{folder.name}"

        yield place, StorageSpec(endpoint_url=server.endpoint_url)


@contextmanager
def fresh_bucket(server: S3Server) -> Iterator[S3Bucket]:
    """Gone afterwards, with all that is in it."""
    bucket = S3Bucket(f"tests-{uuid.uuid4().hex[:12]}", server, server.client())
    bucket.client.create_bucket(Bucket=bucket.name)
    yield bucket
    for key in bucket.list_keys():  # the server's memory is bounded
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    bucket.client.delete_bucket(Bucket=bucket.name)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
