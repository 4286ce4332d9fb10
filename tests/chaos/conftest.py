"""The fork server, an S3 server, and the labels of an undisturbed run, for all chaos tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from jobs.lake.storage import Storage
from schemas.specs import StorageSpec
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.harness import SEED, Drivers, Job, make_images, make_source, write_source
from tests.chaos.judge import Table, judge, read_table
from tests.integration.conftest import S3Server, moto_server, rgw_server

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

__all__ = ["moto_server", "rgw_server"]

MOST_IMAGES = 30


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    server = Drivers(tmp_path_factory.mktemp("drivers"))
    yield server
    server.close()


@dataclass(frozen=True)
class Reference:
    """MOST_IMAGES images, their labels when nothing goes wrong (by content_hash), and how long 24 take."""

    images: dict[str, bytes]
    labels: dict[bytes, tuple[Any, ...]]
    seconds: float

    def first(self, num: int) -> dict[str, bytes]:
        return dict(list(self.images.items())[:num])

    def verdict(self, table: Table, images: Mapping[str, bytes]) -> list[str]:
        """What is wrong with a table that should hold these images, all with the labels they have here."""
        problems = judge(table, list(images.values()))
        found = table.labels()
        wrong = [
            row["image_id"]
            for row in table.rows
            if found[row["content_hash"]] != self.labels.get(row["content_hash"])
        ]
        return problems + [f"labels of {name} are not those of an undisturbed run" for name in wrong]


@pytest.fixture(scope="session")
def reference(drivers: Drivers, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    images = make_images(MOST_IMAGES)
    source = write_source(folder / "images", make_source("files", images))
    ended = drivers.run(Job(source, str(folder / "lake")))
    assert ended.status == 0, ended.stderr
    table = read_table(str(folder / "lake"), Storage(StorageSpec()))
    assert judge(table, list(images.values())) == []
    assert sum(len(row["detections"]) for row in table.rows) > MOST_IMAGES, "nothing is found to compare"
    return Reference(images, table.labels(), ended.summary["seconds"] * 24 / MOST_IMAGES)


@pytest.fixture
def disk() -> Storage:
    return Storage(StorageSpec())


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket, which drivers reach through the proxy and the judge directly."""

    name: str
    proxy: FaultProxy
    client: S3Client
    direct: Storage

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def env(self) -> dict[str, str]:
        """Of a driver."""
        return {"AWS_ENDPOINT_URL": self.proxy.endpoint_url}

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, form: str, images: Mapping[str, bytes]) -> str:
        """The images as a source; gives its URI."""
        for name, data in make_source(form, images).items():
            self.put(f"images/{name}", data)
        return f"{self.uri}/images"

    def table(self) -> Table:
        return read_table(f"{self.uri}/lake", self.direct)

    def job(self, form: str, images: Mapping[str, bytes], *settings: str) -> Job:
        return Job(self.upload(form, images), f"{self.uri}/lake", settings=settings)


@pytest.fixture
def bucket(moto_server: S3Server) -> Iterator[Bucket]:
    with FaultProxy(moto_server.endpoint_url, SEED) as proxy:
        client = moto_server.client()
        direct = Storage(StorageSpec(endpoint_url=moto_server.endpoint_url))
        fresh = Bucket(f"chaos-{uuid.uuid4().hex[:12]}", proxy, client, direct)
        client.create_bucket(Bucket=fresh.name)
        yield fresh
        proxy.set_rules()
