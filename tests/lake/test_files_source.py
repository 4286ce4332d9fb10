"""Images that are objects of their own, from a folder or from a list, on disk and over the wire."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.lake import files_source
from jobs.lake import storage as storage_module
from jobs.lake.shards import Shard
from jobs.lake.sources import ShardReader, SourceImage, list_shards
from jobs.lake.storage import ObjectInfo, Storage
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec
from tests.lake.faulty_s3 import FaultyS3, busy, flipped_byte, serve_s3

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
    return Shard("s3://bucket/list.csv", "list.csv", "files", None, infos, len(infos))


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
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.001)
    server, storage = s3
    bucket = server.new_bucket(storage)
    for name in ("good", "damaged", "busy", "vanished"):
        storage.write_bytes(f"{bucket}/{name}.jpg", b"data")
    (shard,) = list_shards(SourceSpec(uri=bucket), storage)
    listed = dict(shard.objects)
    huge = replace(unknown(f"{bucket}/huge.jpg"), size=256_000_001)
    storage.delete(f"{bucket}/vanished.jpg")
    server.faults = [flipped_byte("damaged", times=100), busy("GET", "busy", times=100)]
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
        ("busy.jpg", ErrorKind.IO),
        ("damaged.jpg", ErrorKind.CORRUPT),
        ("good.jpg", b"data"),
        ("vanished.jpg", ErrorKind.MISSING),
        ("huge.jpg", ErrorKind.TOO_LARGE),
        ("absent", ErrorKind.MISSING),
        ("web", ErrorKind.UNSUPPORTED),
        ("no bucket", ErrorKind.MISSING),
        ("good.jpg#2", ErrorKind.DUPLICATE_KEY),
        ("good in a list", b"data"),
    ]
    assert num_images == 10
    assert all((image.data is None) == (image.error is not None) for image in images)


def test_an_empty_object_is_an_image_of_zero_bytes(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (shard,) = list_shards(SourceSpec(uri=str(tmp_path)), storage)
    assert read(storage, shard)[0] == [SourceImage("a.jpg", ".", b"", None, None)]


def test_a_slice_with_everything_done_reads_nothing(storage: Storage) -> None:
    assert read(storage, slice_of()) == ([], 0)
    assert read(storage, slice_of(("a", unknown("/nowhere"))), frozenset({"a"})) == ([], 1)
