"""Images that are objects of their own, from a folder or from a list, on disk and over the wire."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.lake import files_source
from jobs.lake import storage as storage_module
from jobs.lake.object_table import ObjectTable
from jobs.lake.shards import Shard
from jobs.lake.sources import ShardReader, SourceImage, list_shards
from jobs.lake.storage import TRIES, ObjectInfo, Storage
from schemas.errors import StorageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec
from tests.lake.faulty_s3 import Fault, FaultyS3, busy, flipped_byte, refusal, serve_s3

SPEC = SourceSpec(uri="unused")


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[FaultyS3, Storage]]:
    with serve_s3() as served:
        yield served


def read(
    storage: Storage, shard: Shard, skip: frozenset[str] = frozenset()
) -> tuple[list[SourceImage], int | None]:
    reader = ShardReader(shard, SPEC, storage, skip)
    return list(reader), reader.num_images


def slice_of(*infos: tuple[str, ObjectInfo | None]) -> Shard:
    return Shard("s3://bucket/list.csv", "list.csv", "files", None, ObjectTable.of(infos))


def unknown(uri: str) -> ObjectInfo:
    return ObjectInfo(uri, -1, None, "")


def test_objects_come_in_order_while_many_are_read_ahead(
    s3: tuple[FaultyS3, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, storage = s3
    bucket = server.new_bucket(storage)
    for n in range(40):
        storage.write_bytes(f"{bucket}/{n:02d}.jpg", b"%d" % n * (n + 1))
    monkeypatch.setattr(files_source, "_AHEAD_BYTES", 100)
    (shard,) = list_shards(SourceSpec(uri=bucket), storage)
    images, num_images = read(storage, shard, frozenset({"00.jpg", "39.jpg"}))
    assert [(image.image_id, image.data) for image in images] == [
        (f"{n:02d}.jpg", b"%d" % n * (n + 1)) for n in range(1, 39)
    ]
    assert num_images == 40
    assert {image.shard for image in images} == {"."}


def test_no_more_than_the_bytes_allowed_are_read_ahead_of_the_consumer(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(20):
        (tmp_path / f"{n:02d}.jpg").write_bytes(bytes(10))
    monkeypatch.setattr(files_source, "_AHEAD_BYTES", 35)
    started: list[str] = []
    read_bytes = storage.read_bytes

    def watched(info: ObjectInfo) -> bytes:
        started.append(info.uri)
        return read_bytes(info)

    monkeypatch.setattr(storage, "read_bytes", watched)
    (shard,) = list_shards(SourceSpec(uri=str(tmp_path)), storage)
    images = iter(ShardReader(shard, SPEC, storage, frozenset()))
    for n in range(10):
        next(images)
        assert len(started) <= n + 4
    images.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    assert len(started) <= 14


def test_each_object_that_cannot_be_read_is_a_row_of_its_kind(
    s3: tuple[FaultyS3, Storage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.0001)
    server, storage = s3
    bucket = server.new_bucket(storage)
    for name in ("good", "damaged"):
        storage.write_bytes(f"{bucket}/{name}.jpg", b"data")
    (shard,) = list_shards(SourceSpec(uri=bucket), storage)
    listed = dict(shard.objects)
    huge = replace(unknown(f"{bucket}/huge.jpg"), size=256_000_001)
    server.faults = [flipped_byte("damaged", times=100)]
    images, num_images = read(
        storage,
        slice_of(
            *listed.items(),
            ("huge.jpg", huge),
            ("absent", unknown(f"{bucket}/absent.jpg")),
            ("web", unknown("http://example.com/a.jpg")),
            ("no bucket", unknown("s3://no-such-bucket/a.jpg")),
            ("good.jpg#2", None),
            ("good in a list", unknown(f"{bucket}/good.jpg")),
        ),
    )
    assert [(image.image_id, image.data or image.error_kind) for image in images] == [
        ("damaged.jpg", ErrorKind.CORRUPT),
        ("good.jpg", b"data"),
        ("huge.jpg", ErrorKind.TOO_LARGE),
        ("absent", ErrorKind.MISSING),
        ("web", ErrorKind.UNSUPPORTED),
        ("no bucket", ErrorKind.MISSING),
        ("good.jpg#2", ErrorKind.DUPLICATE_KEY),
        ("good in a list", b"data"),
    ]
    assert num_images == 8
    assert all((image.data is None) == (image.error is not None) for image in images)


@pytest.fixture
def listed(s3: tuple[FaultyS3, Storage], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Shard]:
    """A bucket with a.jpg to d.jpg, and the slice that its listing gave."""
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.0001)
    server, storage = s3
    server.faults = []
    bucket = server.new_bucket(storage)
    for name in "abcd":
        storage.write_bytes(f"{bucket}/{name}.jpg", name.encode())
    (shard,) = list_shards(SourceSpec(uri=bucket), storage)
    return bucket, shard


@pytest.mark.parametrize(
    "fault",
    [busy("GET", "b.jpg", times=TRIES), refusal("GET", "403 Forbidden", "AccessDenied", path="b.jpg")],
    ids=["busy", "denied"],
)
def test_an_image_that_cannot_be_reached_gets_no_row_and_costs_no_other_its_own(
    s3: tuple[FaultyS3, Storage], listed: tuple[str, Shard], fault: Fault
) -> None:
    server, storage = s3
    server.faults = [fault]
    reader = iter(ShardReader(listed[1], SPEC, storage, frozenset()))
    assert [next(reader).image_id for _ in range(3)] == ["a.jpg", "c.jpg", "d.jpg"]
    with pytest.raises(StorageError, match=r"b\.jpg"):
        next(reader)


def test_a_store_that_is_away_is_given_up_before_the_end_of_the_slice(
    s3: tuple[FaultyS3, Storage], listed: tuple[str, Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, storage = s3
    monkeypatch.setattr(files_source, "_READERS", 1)
    server.faults = [busy("GET", ".jpg", times=3 * TRIES)]
    with pytest.raises(StorageError, match=r"a\.jpg.*2 more of this slice"):
        read(storage, listed[1])


def test_an_object_that_is_gone_since_the_listing_gives_nothing(
    s3: tuple[FaultyS3, Storage], listed: tuple[str, Shard]
) -> None:
    bucket, shard = listed
    s3[1].delete(f"{bucket}/b.jpg")
    assert [image.image_id for image in read(s3[1], shard)[0]] == ["a.jpg", "c.jpg", "d.jpg"]


def test_an_object_that_was_replaced_since_the_listing_is_read_as_it_is_now(
    s3: tuple[FaultyS3, Storage], listed: tuple[str, Shard]
) -> None:
    bucket, shard = listed
    s3[1].write_bytes(f"{bucket}/b.jpg", b"another picture")
    assert [image.data for image in read(s3[1], shard)[0]] == [b"a", b"another picture", b"c", b"d"]


def test_an_object_that_never_stays_the_same_is_left_for_the_next_run(
    s3: tuple[FaultyS3, Storage], listed: tuple[str, Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, storage = listed[1], s3[1]
    read_bytes = storage.read_bytes
    versions = iter(range(1, 100))

    def replaced_before(info: ObjectInfo) -> bytes:
        if info.uri.endswith("b.jpg"):
            storage.write_bytes(info.uri, b"version" * next(versions))
        return read_bytes(info)

    monkeypatch.setattr(storage, "read_bytes", replaced_before)
    reader = iter(ShardReader(shard, SPEC, storage, frozenset()))
    assert [next(reader).image_id for _ in range(3)] == ["a.jpg", "c.jpg", "d.jpg"]
    with pytest.raises(StorageError, match="was replaced since it was listed"):
        next(reader)


def test_an_empty_object_is_an_image_of_zero_bytes(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (shard,) = list_shards(SourceSpec(uri=str(tmp_path)), storage)
    ((_, info),) = shard.objects
    assert info is not None
    version = info.version
    assert read(storage, shard)[0] == [SourceImage("a.jpg", ".", b"", None, None, version)]
    assert version.endswith("-0")  # its size


def test_a_slice_with_everything_done_reads_nothing(storage: Storage) -> None:
    assert read(storage, slice_of()) == ([], 0)
    assert read(storage, slice_of(("a", unknown("/nowhere"))), frozenset({"a"})) == ([], 1)
