"""Credentials go to the store's client and nowhere else: jobs whose credentials are easy to find again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from schemas.errors import UsageError
from schemas.specs import StorageSpec
from tests.chaos.harness import Driver, Drivers, Ended, make_images
from tests.lake.faulty_s3 import Fault, FaultyS3

pytestmark = pytest.mark.slow

KEY, SECRET, TOKEN = "AKIAEASYTOFIND000001", "sEcReT/easy+to/find0002", "ToKeNeasytofind0003=="
PASSWORD = "easytofind0004"
SECRETS = (KEY, SECRET, TOKEN, PASSWORD, SECRET.replace("/", "%2F").replace("+", "%2B"))
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}


@dataclass
class Shop:
    """An S3 server with a bucket of a few images, and all that drivers that worked on it left behind."""

    server: FaultyS3
    bucket: str
    drivers: Drivers
    scratch: Path
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    environments: list[bytes] = field(default_factory=list)  # of decoders

    def run(self, *argv: str, env: Mapping[str, str] | None = None) -> Ended:
        """Run a driver; keep what it and its children showed."""
        environment = {
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": self.server.endpoint_url,
            "TMPDIR": str(self.scratch),
        }
        driver = self.drivers.start(_Command(argv), {**environment, **(env or {})})
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(driver, done))
        watch.start()
        try:
            ended = driver.wait(120)
        finally:
            done.set()
            watch.join()
        self.seen += [("stdout", ended.stdout.encode()), ("stderr", ended.stderr.encode())]
        return ended

    def infer(self, *settings: str, lake: str = "lake", env: Mapping[str, str] | None = None) -> Ended:
        uris = ["--source", f"{self.bucket}/images", "--model", "demo", "--lake", f"{self.bucket}/{lake}"]
        small = ["model.min_size_px=64", "model.max_size_px=96", "pool.cpus_per_actor=1", *settings]
        return self.run("infer", *uris, "--json", *(w for s in small for w in ("--set", s)), env=env)

    def _watch(self, driver: Driver, done: threading.Event) -> None:
        """What the driver's children show: their arguments to everybody who asks `ps`."""
        while not done.is_set():
            for children in Path(f"/proc/{driver.pid}/task").glob("*/children"):
                with suppress(OSError):  # of a thread, or a process, that has ended
                    for pid in children.read_text().split():
                        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
                        self.seen.append((f"arguments of {arguments[:200]!r}", arguments))
                        if b"decode_child" in arguments:
                            self.environments.append(Path(f"/proc/{pid}/environ").read_bytes())
            time.sleep(0.02)

    def everything(self) -> Iterator[tuple[str, bytes]]:
        """What was seen, each object that the drivers wrote, each file of theirs that is left."""
        yield from self.seen
        storage = Storage(StorageSpec(endpoint_url=self.server.endpoint_url))
        filesystem, root = storage.filesystem(self.bucket)
        for path in filesystem.find(root):
            yield f"object {path}", filesystem.cat_file(path)
            yield "an object's name", path.encode()
        for path in self.scratch.rglob("*"):
            yield f"file {path}", path.read_bytes() if path.is_file() else str(path).encode()

    def check(self) -> None:
        for what, content in self.everything():
            for secret in SECRETS:
                assert secret.encode() not in content, f"{secret[:12]}… stands in {what}"


@dataclass(frozen=True)
class _Command:
    words: Sequence[str]

    def argv(self) -> list[str]:
        return list(self.words)


@pytest.fixture
def shop(drivers: Drivers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-test")
    with FaultyS3() as server:
        storage = Storage(StorageSpec(endpoint_url=server.endpoint_url))
        bucket = server.new_bucket(storage)
        for name, data in make_images(3).items():
            storage.write_bytes(f"{bucket}/images/{name}", data)
        (tmp_path / "scratch").mkdir()
        yield Shop(server, bucket, drivers, tmp_path / "scratch")


def telltale(method: str, status: str, code: str, path: str = "") -> Fault:
    """A refusal that repeats what it was sent, as stores do: the key, the token, what was signed."""
    body = (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{KEY} {TOKEN} {SECRET}</Message>"
        f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId><StringToSign>x-amz-security-token:{TOKEN}</StringToSign></Error>"
    ).encode()
    headers = [("Content-Type", "application/xml")]
    return Fault(method, path, lambda *_: (status, headers, body), times=10**6, reached=False)


def test_a_job_that_succeeds_leaves_no_credential_anywhere(shop: Shop) -> None:
    ended = shop.infer()
    assert ended.status == 0, ended.stderr
    objects = [what for what, _ in shop.everything() if what.startswith("object ")]
    assert any(what.endswith("spec.yaml") for what in objects)
    assert any(what.endswith("summary.json") for what in objects)
    assert any("decode_child" in what for what, _ in shop.seen), "no decoder was caught at work"
    shop.check()


def test_a_decoder_has_no_credentials(shop: Shop) -> None:
    """It takes strangers' bytes apart in C; should one of them get hold of it, there is nothing to find."""
    assert shop.infer().status == 0
    assert shop.environments, "no decoder was caught at work"
    for secret in SECRETS:
        assert not any(secret.encode() in environment for environment in shop.environments)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("HEAD", ""), ("PUT", ""), ("PUT", "_delta_log"), ("PUT", r"\.parquet")]
)
def test_a_job_that_is_refused_says_so_without_what_the_store_repeats(
    shop: Shop, method: str, path: str
) -> None:
    shop.server.faults.append(telltale(method, "403 Forbidden", "SignatureDoesNotMatch", path))
    ended = shop.infer()
    shop.server.faults.clear()
    assert ended.status in (1, 2), ended.stderr
    shop.check()


def test_a_missing_bucket_and_a_dead_endpoint_are_said_without_credentials(shop: Shop) -> None:
    uris = ["--source", "s3://no-such-bucket/images", "--model", "demo", "--lake", f"{shop.bucket}/lake"]
    assert shop.run("infer", *uris).status == 2
    shop.infer(env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).check_clear_end(2)
    shop.check()


def test_credentials_in_an_address_are_refused_and_not_repeated(shop: Shop) -> None:
    with_password = f"http://user:{PASSWORD}@127.0.0.1:9"
    shop.infer(env={"AWS_ENDPOINT_URL": with_password}).check_clear_end(2)
    shop.infer(f"storage.endpoint_url={with_password}").check_clear_end(2)
    for uri in (
        f"https://user:{PASSWORD}@host/images",
        f"s3://{KEY}:{SECRET}@bucket/images",
        f"s3://{PASSWORD}@b/i",
    ):
        uris = ["--source", uri, "--model", "demo", "--lake", f"{shop.bucket}/lake"]
        shop.run("infer", *uris).check_clear_end(2)
        uris[1], uris[3] = f"{shop.bucket}/images", uri
        shop.run("infer", *uris).check_clear_end(2)
        shop.run("lake", "doctor", "--lake", uri).check_clear_end(2)
    shop.check()


@pytest.mark.parametrize(
    "uri",
    [
        f"https://user:{PASSWORD}@host/x",
        f"https://host/x?X-Amz-Signature={PASSWORD}",
        f"s3://{KEY}:{SECRET}@b/x",
    ],
)
def test_a_uri_with_a_secret_is_refused_without_it(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        Storage(StorageSpec()).stat(uri)
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_flag_s_endpoint_is_refused_in_one_line(shop: Shop) -> None:
    flag = f"http://user:{PASSWORD}@127.0.0.1:9"
    ended = shop.run("lake", "doctor", "--lake", f"{shop.bucket}/lake", "--endpoint-url", flag)
    ended.check_clear_end(2)
    shop.check()
