"""Storage on S3 over the wire while the server, the network or the credentials fail."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.lake import s3_store
from jobs.lake import storage as storage_module
from jobs.lake.storage import (
    TRIES,
    AccessDeniedError,
    CorruptObjectError,
    MissingObjectError,
    Storage,
    TransientStorageError,
)
from schemas.errors import StorageError, UsageError
from schemas.specs import StorageSpec
from tests.lake.faulty_s3 import (
    Fault,
    FaultyS3,
    busy,
    extra_header,
    flipped_byte,
    lost_reply,
    refusal,
    serve_s3,
    shortened,
    unconditional_put,
)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FaultyS3, Storage]]:
    with serve_s3() as served:
        yield served


@pytest.fixture
def server(served: tuple[FaultyS3, Storage], monkeypatch: pytest.MonkeyPatch) -> FaultyS3:
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.0001)
    served[0].faults.clear()
    return served[0]


@pytest.fixture
def storage(served: tuple[FaultyS3, Storage]) -> Storage:
    return served[1]


@pytest.fixture
def bucket(server: FaultyS3, storage: Storage) -> str:
    return server.new_bucket(storage)


def upload_in_parts(storage: Storage, uri: str, parts: list[bytes]) -> None:
    filesystem, path = storage.filesystem(uri)
    where = dict(zip(("Bucket", "Key"), path.split("/", 1), strict=True))
    upload_id = filesystem.call_s3("create_multipart_upload", **where)["UploadId"]
    done = []
    for number, part in enumerate(parts, 1):
        reply = filesystem.call_s3("upload_part", **where, UploadId=upload_id, PartNumber=number, Body=part)
        done.append({"PartNumber": number, "ETag": reply["ETag"]})
    filesystem.call_s3(
        "complete_multipart_upload", **where, UploadId=upload_id, MultipartUpload={"Parts": done}
    )


class TestRetries:
    def test_every_operation_outlasts_a_busy_server(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [busy(method, times=2) for method in ("PUT", "HEAD", "GET", "DELETE")]
        storage.write_bytes(f"{bucket}/object", b"data")
        info = storage.stat(f"{bucket}/object")
        assert list(storage.list(bucket)) == [info]
        server.faults += [busy("GET", "/object", times=2)]
        assert storage.read_bytes(info) == b"data"
        storage.delete(info.uri)
        assert not storage.exists(info.uri)
        assert all(fault.times == 0 for fault in server.faults)

    def test_a_server_that_stays_busy_is_given_up_with_one_line(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [busy("HEAD", times=100)]
        server.requests.clear()
        with pytest.raises(TransientStorageError) as failure:
            storage.stat(f"{bucket}/object")
        assert str(failure.value) == (
            f"{bucket}/object: {server.endpoint_url} is busy or failing (503); run again later"
        )
        assert len(server.requests) == TRIES

    def test_what_will_not_pass_is_not_tried_again(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [refusal("GET", "403 Forbidden", "AccessDenied")]
        server.requests.clear()
        with pytest.raises(AccessDeniedError, match="denies access"):
            list(storage.list(bucket))
        assert len(server.requests) == 1


class TestUploadsInParts:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Of three parts."""
        monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
        path = tmp_path / "set.arrow"
        path.write_bytes(os.urandom((10 << 20) + 1000))
        return path

    def test_each_part_outlasts_a_busy_server_and_lost_replies(
        self, server: FaultyS3, storage: Storage, bucket: str, file: Path
    ) -> None:
        storage.write_bytes(f"{bucket}/large", b"before")
        begun = Fault("POST", "/large", lambda *reply: reply)
        server.faults = [begun, lost_reply("POST"), busy("PUT", times=3), lost_reply("PUT")]
        storage.write_file(f"{bucket}/large", file)
        info = storage.stat(f"{bucket}/large")
        assert info.version.endswith("-3")
        assert storage.read_bytes(info) == file.read_bytes()
        assert all(fault.times == 0 for fault in server.faults)

    def test_one_that_fails_leaves_what_was_there_and_no_parts(
        self, server: FaultyS3, storage: Storage, bucket: str, file: Path
    ) -> None:
        storage.write_bytes(f"{bucket}/large", b"before")
        server.faults = [refusal("PUT", "403 Forbidden", "AccessDenied", times=1)]
        with pytest.raises(AccessDeniedError, match="denies access"):
            storage.write_file(f"{bucket}/large", file)
        assert storage.read_bytes(storage.stat(f"{bucket}/large")) == b"before"
        filesystem, path = storage.filesystem(bucket)
        assert "Uploads" not in filesystem.call_s3("list_multipart_uploads", Bucket=path)


class TestReading:
    @pytest.mark.parametrize("damage", [flipped_byte, shortened])
    def test_damage_on_the_way_is_read_again(
        self, server: FaultyS3, storage: Storage, bucket: str, damage: Callable[..., Fault]
    ) -> None:
        storage.write_bytes(f"{bucket}/object", b"data" * 1000)
        info = storage.stat(f"{bucket}/object")
        server.faults = [damage("/object")]
        assert storage.read_bytes(info) == b"data" * 1000
        server.faults = [damage("/object")]
        with storage.open_verified(info) as stream:
            assert stream.read() == b"data" * 1000
        assert server.faults[0].times == 0

    @pytest.mark.parametrize("damage", [flipped_byte, shortened])
    def test_damage_that_stays_is_never_given_out(
        self, server: FaultyS3, storage: Storage, bucket: str, damage: Callable[..., Fault]
    ) -> None:
        storage.write_bytes(f"{bucket}/object", b"data" * 1000)
        info = storage.stat(f"{bucket}/object")
        server.faults = [damage("/object", times=100)]
        with pytest.raises(CorruptObjectError, match=info.uri):
            storage.read_bytes(info)
        with pytest.raises(CorruptObjectError, match=info.uri), storage.open_verified(info):
            pass

    def test_an_upload_in_parts_has_no_md5_and_streams(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        parts = [os.urandom(5 << 20), os.urandom(5 << 20), os.urandom(1000)]
        upload_in_parts(storage, f"{bucket}/large", parts)
        info = storage.stat(f"{bucket}/large")
        assert info.etag is None
        assert info.version.endswith("-3")
        server.faults = [busy("GET", "/large"), shortened("/large")]
        with storage.open_verified(info) as stream:
            assert stream.read(10) == parts[0][:10]
            stream.seek(-1000, os.SEEK_END)
            assert stream.read() == parts[2]
            stream.seek(0)
            assert stream.read() == b"".join(parts)
        assert storage.read_bytes(info) == b"".join(parts)

    def test_an_etag_that_is_no_md5_under_encryption_does_not_count_as_damage(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        storage.write_bytes(f"{bucket}/object", b"data")
        info = storage.stat(f"{bucket}/object")
        server.faults = [
            flipped_byte("/object", times=2),
            extra_header("HEAD", "/object", "x-amz-server-side-encryption", "aws:kms"),
        ]
        assert storage.read_bytes(info) == b"data"[:-1] + bytes([ord("a") ^ 1])
        with storage.open_verified(info) as stream:
            assert len(stream.read()) == 4

    @pytest.mark.parametrize("suffix", ["", "-in-turn"], ids=["in order", "in no order"])
    def test_a_listing_gives_its_first_page_at_once(
        self, server: FaultyS3, storage: Storage, monkeypatch: pytest.MonkeyPatch, suffix: str
    ) -> None:
        monkeypatch.setattr("jobs.lake.s3_store.PAGE_KEYS", 2)
        monkeypatch.setattr("jobs.lake.s3_store._DIRECTORY_BUCKET", "-in-turn")
        monkeypatch.setattr("jobs.lake.parallel_listing._PAGES_IN_TURN", 1)
        bucket = server.new_bucket(storage, suffix)
        for n in range(7):
            storage.write_bytes(f"{bucket}/{n}", b"")
        server.requests.clear()
        listing = storage.list(bucket)
        assert [info.uri for info in islice(listing, 2)] == [f"{bucket}/{n}" for n in range(2)]
        assert len(server.requests) == 1
        assert [info.uri for info in listing] == [f"{bucket}/{n}" for n in range(2, 7)]


class TestConditionalPut:
    def test_a_lost_reply_does_not_turn_the_winner_into_a_loser(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [lost_reply("PUT")]
        assert storage.create_exclusive(f"{bucket}/lease", b"data")
        assert not storage.create_exclusive(f"{bucket}/lease", b"data")

    def test_a_busy_server_does_not_turn_a_loser_into_a_winner(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        assert storage.create_exclusive(f"{bucket}/lease", b"data")
        server.faults = [busy("PUT"), refusal("PUT", "409 Conflict", "ConditionalRequestConflict", times=1)]
        assert not storage.create_exclusive(f"{bucket}/lease", b"data")

    def test_a_server_that_ignores_the_condition_is_refused(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [unconditional_put()]
        with pytest.raises(
            UsageError, match=r"does not honour conditional puts \(8 of 8 racing .* 1 of 1 late"
        ):
            storage.probe_conditional_put(f"{bucket}/lake")
        assert list(storage.list(bucket)) == []

    def test_a_server_that_refuses_the_condition_is_refused(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [refusal("PUT", "501 Not Implemented", "NotImplemented")]
        with pytest.raises(UsageError, match=rf"lake {bucket}/lake/_probe.*\(NotImplemented\)"):
            storage.probe_conditional_put(f"{bucket}/lake")


class TestMistakes:
    def test_a_missing_bucket_is_named(self, server: FaultyS3, storage: Storage) -> None:
        with pytest.raises(UsageError) as failure:
            storage.check_reachable("s3://no-such-bucket/images", "source")
        assert str(failure.value) == (
            "source s3://no-such-bucket/images: there is no bucket 'no-such-bucket' at "
            f"{server.endpoint_url}; "
            f"create it or mend the URI"
        )
        with pytest.raises(MissingObjectError):
            list(storage.list("s3://no-such-bucket/images"))

    @pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
    def test_wrong_credentials_are_named_but_not_shown(
        self, server: FaultyS3, storage: Storage, bucket: str, code: str
    ) -> None:
        server.faults = [refusal("GET", "403 Forbidden", code)]
        with pytest.raises(UsageError, match=rf"refuses the credentials \({code}\)") as failure:
            storage.check_reachable(bucket, "lake")
        assert "secret" not in str(failure.value)

    def test_absent_credentials_are_named(
        self, server: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(UsageError, match=r"no usable credentials .* set AWS_ACCESS_KEY_ID"):
            Storage(StorageSpec(endpoint_url=server.endpoint_url)).check_reachable("s3://bucket", "source")
        anonymous = Storage(StorageSpec(endpoint_url=server.endpoint_url, anonymous=True))
        with pytest.raises(UsageError, match="there is no bucket"):
            anonymous.check_reachable("s3://no-such-bucket", "source")

    def test_nobody_at_the_endpoint_is_named(self, server: FaultyS3) -> None:
        storage = Storage(StorageSpec(endpoint_url="http://127.0.0.1:9"))
        with pytest.raises(
            UsageError, match=r"no answer from http://127.0.0.1:9 .* check storage.endpoint_url"
        ):
            storage.check_reachable("s3://bucket/images", "source")

    def test_a_name_that_s3_does_not_allow_is_named(self, storage: Storage) -> None:
        with pytest.raises(UsageError, match="S3 allows no such name"):
            storage.check_reachable("s3://No_Bucket!/images", "source")

    def test_an_answer_nobody_knows_is_given_by_its_code_only(
        self, server: FaultyS3, storage: Storage, bucket: str
    ) -> None:
        server.faults = [refusal("GET", "418 Teapot", "ShortAndStout")]
        with pytest.raises(StorageError, match=r"refuses the request \(ShortAndStout\)$"):
            list(storage.list(bucket))


class TestEnvironment:
    def test_the_endpoint_comes_from_the_environment_for_s3fs_and_deltalake_alike(
        self, s3_lake: tuple[str, Storage], label_server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", label_server)
        table_uri = f"{s3_lake[0]}/table"
        storage = Storage(StorageSpec())
        options = storage.delta_options(table_uri)
        write_deltalake(table_uri, pa.table({"a": [1, 2]}), storage_options=options)
        assert DeltaTable(table_uri, storage_options=options).version() == 0
        assert len(list(storage.list(table_uri, "*.parquet"))) == 1

    def test_the_spec_goes_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        spec = StorageSpec(endpoint_url="https://here", region="eu-west-1", anonymous=True)
        options = Storage(spec).delta_options("s3://bucket")
        assert {name: value for name, value in options.items() if name.startswith("aws_")} == {
            "aws_conditional_put": "etag",
            "aws_endpoint_url": "https://here",
            "aws_allow_http": "false",
            "aws_region": "eu-west-1",
            "aws_skip_signature": "true",
        }
        assert Storage(StorageSpec()).delta_options("s3://bucket")["aws_region"] == "eu-north-1"

    def test_credentials_in_an_endpoint_are_refused_and_not_repeated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@here")
        with pytest.raises(UsageError, match="AWS_ENDPOINT_URL holds credentials") as failure:
            Storage(StorageSpec()).stat("s3://bucket/object")
        assert "hunter2" not in str(failure.value)
