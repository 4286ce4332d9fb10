"""The same photographs come out whichever way they went in, and in units of bounded size."""

import gzip
import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.lake import storage as storage_module
from jobs.lake.sources import ShardReader, SourceImage, list_shards, slice_units
from jobs.lake.storage import TRIES, AccessDeniedError, Storage, TransientStorageError
from schemas.errors import StorageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec
from tests.lake.faulty_s3 import FaultyS3, busy, refusal, serve_s3
from tests.lake.tars import make_tar


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[FaultyS3, Storage]]:
    with serve_s3() as served:
        yield served


def image(size_bytes: int | None) -> SourceImage:
    if size_bytes is None:
        return SourceImage.failed("id", "shard", ErrorKind.IO, "it failed")
    return SourceImage("id", "shard", bytes(size_bytes), None, None)


def read_source(spec: SourceSpec, storage: Storage) -> list[SourceImage]:
    return [
        image
        for shard in pickle.loads(pickle.dumps(list(list_shards(spec, storage))))
        for image in ShardReader(shard, spec, storage, frozenset())
    ]


class TestUnits:
    def test_a_unit_is_full_by_bytes_or_by_images_whichever_comes_first(self) -> None:
        images = [image(size) for size in (4, 4, 4, 11, 1, None, 1, 9)]
        units = [[len(i.data or b"") for i in unit] for unit in slice_units(images, 10, 3)]
        assert units == [[4, 4], [4], [11], [1, 0, 1], [9]]

    def test_no_images_make_no_units(self) -> None:
        assert list(slice_units([], 10, 3)) == []

    @settings(deadline=None)
    @given(st.lists(st.none() | st.integers(0, 30), max_size=40), st.integers(1, 50), st.integers(1, 6))
    def test_every_image_is_in_one_unit_in_order_and_only_a_lone_one_is_over_the_limit(
        self, sizes: list[int | None], max_bytes: int, max_images: int
    ) -> None:
        images = [image(size) for size in sizes]
        units = list(slice_units(images, max_bytes, max_images))
        assert [i for unit in units for i in unit] == images
        for unit in units:
            assert 1 <= len(unit) <= max_images
            assert sum(len(i.data or b"") for i in unit) <= max_bytes or len(unit) == 1

    def test_a_unit_is_given_before_the_next_image_but_one_is_read(self) -> None:
        num_read = 0

        def images() -> Iterator[SourceImage]:
            nonlocal num_read
            for _ in range(100):
                num_read += 1
                yield image(10)

        units = slice_units(images(), 30, 100)
        assert (len(next(units)), num_read) == (3, 4)


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "parquet", "list"])
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_photographs_come_out_as_they_went_in_whichever_way(
    kind: str, place: str, storage: Storage, s3: tuple[FaultyS3, Storage], tmp_path: Path, shared_data: Path
) -> None:
    photos = {p.name: p.read_bytes() for p in sorted((shared_data / "coco_photos" / "val2017").glob("*.jpg"))}
    assert photos
    if place == "s3":
        storage, base = s3[1], s3[0].new_bucket(s3[1])
    else:
        base = f"file://{tmp_path}"
    half = len(photos) // 2
    halves = [dict(list(photos.items())[:half]), dict(list(photos.items())[half:])]
    if kind in ("folder", "list"):
        for name, data in photos.items():
            storage.write_bytes(f"{base}/photos/{name}", data)
    uri = f"{base}/photos"
    if kind == "list":
        uri = f"{base}/photos.csv"
        storage.write_bytes(uri, "\n".join(["uri", *(f"{base}/photos/{name}" for name in photos)]).encode())
    for number, part in enumerate(halves):
        if kind.startswith("tar"):
            data = make_tar(part)
            storage.write_bytes(
                f"{uri}/{number}.{kind}", gzip.compress(data, 1) if kind == "tar.gz" else data
            )
        if kind == "parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"image": list(part.values())}), sink, row_group_size=20)
            storage.write_bytes(f"{uri}/{number}.parquet", sink.getvalue().to_pybytes())

    images = read_source(SourceSpec(uri=uri), storage)

    def digests(datas: list[bytes]) -> list[str]:
        return [hashlib.blake2b(data, digest_size=16).hexdigest() for data in datas]

    assert all(image.error is None for image in images)
    assert digests([image.data or b"" for image in images]) == digests(list(photos.values()))
    assert len({image.image_id for image in images}) == len(photos)


class TestStorageThatFailsInMidShard:
    @pytest.fixture
    def shard_uri(self, s3: tuple[FaultyS3, Storage], monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.0001)
        return f"{s3[0].new_bucket(s3[1])}/shards"

    @pytest.mark.parametrize("name", ["1.tar", "1.parquet"])
    @pytest.mark.parametrize("in_place", [False, True], ids=["spooled", "in place"])
    def test_the_shard_is_an_error_not_a_row_of_lost_images(
        self, s3: tuple[FaultyS3, Storage], shard_uri: str, name: str, in_place: bool
    ) -> None:
        server, storage = s3
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [b"x"]}), sink)
        data = make_tar({"a.jpg": b"x"}) if name == "1.tar" else sink.getvalue().to_pybytes()
        storage.write_bytes(f"{shard_uri}/{name}", data)
        spec = SourceSpec(uri=shard_uri)
        (shard,) = list_shards(spec, storage)
        if in_place and shard.info:
            shard = replace(shard, info=replace(shard.info, etag=None))
        server.faults = [busy("GET", name, times=2 * TRIES)]
        with pytest.raises(TransientStorageError, match="is busy or failing"):
            list(ShardReader(shard, spec, storage, frozenset()))
        server.faults = [refusal("GET", "403 Forbidden", "AccessDenied")]
        with pytest.raises(AccessDeniedError, match="denies access"):
            list(ShardReader(shard, spec, storage, frozenset()))

    def test_a_busy_moment_is_outlasted(self, s3: tuple[FaultyS3, Storage], shard_uri: str) -> None:
        server, storage = s3
        storage.write_bytes(f"{shard_uri}/1.tar", make_tar({"a.jpg": b"x"}))
        spec = SourceSpec(uri=shard_uri)
        server.faults = [busy("GET", "1.tar", times=2)]
        assert [image.data for image in read_source(spec, storage)] == [b"x"]


def test_what_was_read_before_a_shard_failed_is_a_unit_too() -> None:
    def stream() -> Iterator[SourceImage]:
        for number in range(5):
            yield SourceImage(f"{number}", "s", b"data", None, None)
        raise StorageError("gone")

    units = slice_units(stream(), 1000, 3)
    assert [len(next(units)), len(next(units))] == [3, 2]
    with pytest.raises(StorageError, match="gone"):
        next(units)
