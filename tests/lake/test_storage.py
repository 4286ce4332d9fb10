"""What every kind of storage gives: on disk, in memory, and on S3 over the wire, through the same code."""

import os
import pickle
import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest

from jobs.lake import s3_store
from jobs.lake import storage as storage_module
from jobs.lake.storage import (
    PATIENCE_S,
    ChangedObjectError,
    CorruptObjectError,
    MissingObjectError,
    Storage,
    TransientStorageError,
)
from schemas.errors import StorageError, UsageError
from schemas.specs import StorageSpec
from tests.lake.faulty_s3 import FaultyS3, serve_s3


@dataclass(frozen=True)
class Place:
    storage: Storage
    uri: str  # an empty folder, prefix or bucket


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[FaultyS3, Storage]]:
    with serve_s3() as served:
        yield served


@pytest.fixture(params=["file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(storage_module, "FIRST_DELAY_S", 0.0001)
    if request.param == "file":
        return Place(Storage(StorageSpec()), f"file://{tmp_path}")
    if request.param == "memory":
        return Place(Storage(StorageSpec()), f"memory://bucket-{uuid.uuid4().hex}")
    server, storage = request.getfixturevalue("s3")
    return Place(storage, server.new_bucket(storage))


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 100])
def test_what_was_written_reads_back(place: Place, data: bytes) -> None:
    uri = f"{place.uri}/some/folder/ü 1%2B.bin"
    place.storage.write_bytes(uri, b"before")
    place.storage.write_bytes(uri, data)
    info = place.storage.stat(uri)
    assert (info.uri, info.size) == (uri, len(data))
    assert place.storage.read_bytes(info) == data
    with place.storage.open_verified(info) as stream:
        assert stream.seekable()
        assert stream.read() == data
        assert stream.seek(max(len(data) - 5, 0)) == max(len(data) - 5, 0)
        assert stream.read() == data[-5:]


@pytest.mark.parametrize("size", [0, 1000, (11 << 20) + 1])
def test_a_file_of_any_size_reads_back(
    place: Place, size: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    file = tmp_path_factory.mktemp("files") / "data.arrow"
    file.write_bytes(random.Random(size).randbytes(size))
    uri = f"{place.uri}/some/folder/object"
    place.storage.write_bytes(uri, b"before")
    place.storage.write_file(uri, file)
    info = place.storage.stat(uri)
    assert info.size == size
    assert place.storage.read_bytes(info) == file.read_bytes()
    with place.storage.open_verified(info) as stream:
        assert stream.read() == file.read_bytes()
    assert [found.uri for found in place.storage.list(place.uri)] == [uri]


def test_version_changes_with_the_content(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"one")
    before = place.storage.stat(uri)
    place.storage.write_bytes(uri, b"two")
    after = place.storage.stat(uri)
    assert before.version != after.version
    assert next(iter(place.storage.list(place.uri))) == after


def test_a_listing_goes_through_all_levels_in_key_order_and_leaves_hidden_names_out(place: Place) -> None:
    shown = ["a-b/1", "a.txt", "a/1", "a/b/c", "a0", "é", "z"]
    for key in [*shown, "_lake/1", ".hidden", "a/_tmp", "a/.x/1"]:
        place.storage.write_bytes(f"{place.uri}/{key}", key.encode())
    infos = list(place.storage.list(place.uri))
    assert [info.uri for info in infos] == [f"{place.uri}/{key}" for key in sorted(shown, key=str.encode)]
    assert [place.storage.read_bytes(info).decode() for info in infos] == sorted(shown, key=str.encode)
    assert infos == [place.storage.stat(info.uri) for info in infos]


def test_a_listing_takes_a_glob_whose_star_crosses_folders(place: Place) -> None:
    for key in ["a/1.jpg", "a/b/2.jpg", "a/3.png", "4.jpg"]:
        place.storage.write_bytes(f"{place.uri}/{key}", b"")
    assert [i.uri for i in place.storage.list(place.uri, "a/*.jpg")] == [
        f"{place.uri}/a/1.jpg",
        f"{place.uri}/a/b/2.jpg",
    ]
    assert [i.uri for i in place.storage.list(f"{place.uri}/a/", "?.*")] == [
        f"{place.uri}/a/1.jpg",
        f"{place.uri}/a/3.png",
    ]
    assert list(place.storage.list(f"{place.uri}/a", "nothing")) == []


def test_a_listing_longer_than_a_page_is_complete(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in ("local_store", "memory_store", "s3_store"):
        monkeypatch.setattr(f"jobs.lake.{store}.PAGE_KEYS", 10)
    uris = [f"{place.uri}/{n // 7}/{n:05d}" for n in range(35)]
    for uri in uris:
        place.storage.write_bytes(uri, b"")
    assert [info.uri for info in place.storage.list(place.uri)] == uris


def test_a_prefix_is_a_folder_not_the_start_of_a_name(place: Place) -> None:
    place.storage.write_bytes(f"{place.uri}/images/1", b"")
    place.storage.write_bytes(f"{place.uri}/images-old/1", b"")
    assert [i.uri for i in place.storage.list(f"{place.uri}/images")] == [f"{place.uri}/images/1"]


def test_of_many_writers_exactly_one_makes_the_object(place: Place) -> None:
    uri = f"{place.uri}/leases/1.json"
    start = threading.Barrier(12)

    def make(writer: int) -> bool:
        start.wait()
        return place.storage.create_exclusive(uri, b"writer %d" % writer)

    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(make, range(12)))
    assert sum(made) == 1
    assert place.storage.read_bytes(place.storage.stat(uri)) == b"writer %d" % made.index(True)
    assert not place.storage.create_exclusive(uri, b"writer %d" % made.index(True))
    assert len(list(place.storage.list(place.uri))) == 1


def test_the_probe_passes_and_leaves_nothing_behind(place: Place) -> None:
    place.storage.probe_conditional_put(place.uri)
    filesystem, path = place.storage.filesystem(place.uri)
    assert not (filesystem.exists(path) and filesystem.find(path))


def test_what_is_deleted_is_gone_and_may_be_deleted_again(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"x")
    assert place.storage.exists(uri)
    place.storage.delete(uri)
    place.storage.delete(uri)
    assert not place.storage.exists(uri)


def test_what_is_not_an_object_is_missing(place: Place) -> None:
    place.storage.write_bytes(f"{place.uri}/folder/object", b"x")
    gone = replace(place.storage.stat(f"{place.uri}/folder/object"), uri=f"{place.uri}/gone")
    for uri in (gone.uri, f"{place.uri}/folder"):
        with pytest.raises(MissingObjectError, match=uri):
            place.storage.stat(uri)
    with pytest.raises(MissingObjectError, match=gone.uri):
        place.storage.read_bytes(gone)
    with pytest.raises(MissingObjectError, match=gone.uri), place.storage.open_verified(gone) as stream:
        stream.read()


@pytest.mark.parametrize("listed_bytes", [3, 20])
def test_an_object_of_another_size_than_listed_is_refused(place: Place, listed_bytes: int) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"ten bytes.")
    stale = replace(place.storage.stat(uri), size=listed_bytes)
    with pytest.raises(CorruptObjectError, match=rf"read \d+ bytes, listed with {listed_bytes}; it was"):
        place.storage.read_bytes(stale)


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_an_object_with_another_md5_than_listed_is_refused(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"ten bytes.")
    stale = replace(place.storage.stat(uri), etag="0" * 32)
    with pytest.raises(CorruptObjectError, match=r"its MD5 is .*, the store says 000"):
        place.storage.read_bytes(stale)
    with pytest.raises(CorruptObjectError, match="its MD5"), place.storage.open_verified(stale):
        pass


def test_an_object_replaced_while_being_read_is_refused_at_the_end(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"ten bytes.")
    without_md5 = replace(place.storage.stat(uri), etag=None)

    def read_while_it_changes() -> None:
        with place.storage.open_verified(without_md5) as stream:
            stream.read(3)
            place.storage.write_bytes(uri, b"others....")

    with pytest.raises(ChangedObjectError, match="was replaced since it was listed"):
        read_while_it_changes()


def test_what_makes_no_sense_because_the_object_was_replaced_is_told_as_that(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"ten bytes.")
    without_md5 = replace(place.storage.stat(uri), etag=None)

    def stumble_over_the_others_bytes() -> None:
        with place.storage.open_verified(without_md5):
            place.storage.write_bytes(uri, b"others....")
            raise ValueError("no header")

    with pytest.raises(ChangedObjectError):
        stumble_over_the_others_bytes()


def test_parts_read_one_after_another_are_never_of_two_objects(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, bytes(20 << 20))
    info = replace(place.storage.stat(uri), etag=None)
    stream = place.storage.open_unverified(info)
    stream.read(1000)
    place.storage.write_bytes(uri, bytes([1]) * (20 << 20))
    stream.seek(19 << 20)
    with pytest.raises(ChangedObjectError):
        stream.read(1000)


def test_an_object_that_is_no_longer_the_listed_one_is_not_called_damaged(place: Place) -> None:
    uri = f"{place.uri}/object"
    place.storage.write_bytes(uri, b"ten bytes.")
    listed = place.storage.stat(uri)
    place.storage.write_bytes(uri, b"eleven bytes")
    with pytest.raises(ChangedObjectError, match="run again"):
        place.storage.read_bytes(listed)
    place.storage.delete(uri)
    with pytest.raises(MissingObjectError):
        place.storage.read_bytes(listed)


def test_what_may_pass_is_tried_again_until_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    pauses: list[float] = []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

        @staticmethod
        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            pauses.append(seconds)

    def fail(path: str) -> None:
        raise TransientStorageError(f"{path} is busy")

    random.seed(0)
    monkeypatch.setattr(storage_module, "time", Clock)
    storage = Storage(StorageSpec())
    monkeypatch.setattr(storage._stores.locate("memory://bucket/object")[0], "stat", fail)
    with pytest.raises(TransientStorageError):
        storage.stat("memory://bucket/object")
    assert 60 < sum(pauses) <= PATIENCE_S  # an outage of a minute is outlasted
    assert len(set(pauses)) == len(pauses)  # workers do not come back all at once
    assert max(pauses) <= 30


def test_storage_travels_as_a_pickle_and_makes_its_clients_anew(place: Place) -> None:
    place.storage.write_bytes(f"{place.uri}/object", b"x")
    travelled = pickle.loads(pickle.dumps(place.storage))
    assert travelled.exists(f"{place.uri}/object")


def test_the_filesystem_is_fsspecs_own(place: Place) -> None:
    place.storage.write_bytes(f"{place.uri}/object", b"x")
    filesystem, path = place.storage.filesystem(f"{place.uri}/object")
    assert isinstance(filesystem, fsspec.AbstractFileSystem)
    assert filesystem.cat_file(path) == b"x"


def test_a_reachable_place_passes_even_where_the_prefix_is_empty(place: Place) -> None:
    place.storage.check_reachable(f"{place.uri}/not/yet", "lake")


def test_many_small_ranges_of_one_object_come_in_few_requests(
    s3: tuple[FaultyS3, Storage],
) -> None:
    server, storage = s3
    uri = f"{server.new_bucket(storage)}/object"
    data = os.urandom(9 << 20)
    storage.write_bytes(uri, data)
    server.requests.clear()
    with storage.open_unverified(storage.stat(uri)) as stream:
        got = b"".join(iter(lambda: stream.read(64 << 10), b""))
    assert got == data
    assert [request.split()[0] for request in server.requests] == ["HEAD", "GET", "GET"]


class TestUris:
    def test_a_plain_path_becomes_an_absolute_file_uri(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        storage = Storage(StorageSpec())
        assert storage.normalize("lake/") == f"file://{tmp_path}/lake"
        assert storage.normalize("file:///a/./b/../c/") == "file:///a/c"
        assert storage.normalize("s3://bucket/a//b/") == "s3://bucket/a//b"
        assert storage.normalize("gs://bucket") == "gs://bucket"

    @pytest.mark.parametrize(
        ("uri", "problem"),
        [
            ("http://host/a", "scheme 'http' is not supported"),
            ("S3://bucket/a", "scheme 'S3' is not supported"),
            ("s3:///a", "names no bucket"),
            ("s3://", "names no bucket"),
            ("file://host/a", "a file URI has an absolute path"),
        ],
    )
    def test_what_cannot_be_a_place_is_refused(self, uri: str, problem: str) -> None:
        with pytest.raises(UsageError, match=problem):
            Storage(StorageSpec()).filesystem(uri)

    def test_a_table_in_memory_is_refused(self) -> None:
        with pytest.raises(UsageError, match="one process's memory"):
            Storage(StorageSpec()).delta_options("memory://bucket/lake")


class TestDisk:
    def test_a_half_written_file_is_never_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        storage = Storage(StorageSpec())
        for write in (storage.write_bytes, storage.create_exclusive):
            with pytest.raises(StorageError, match="no space left on the disk"):
                write(f"{tmp_path}/object", b"data")
        assert list(tmp_path.iterdir()) == []

    def test_links_are_followed_but_not_round_in_circles(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "1.jpg").write_bytes(b"x")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "also").symlink_to(tmp_path / "real")
        (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "pipe.jpg")
        uris = [info.uri for info in Storage(StorageSpec()).list(str(tmp_path))]
        assert uris == [f"file://{tmp_path}/also/1.jpg", f"file://{tmp_path}/real/1.jpg"]

    def test_an_absent_folder_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MissingObjectError, match="nowhere does not exist"):
            list(Storage(StorageSpec()).list(f"{tmp_path}/nowhere"))

    def test_a_name_that_is_not_utf8_can_be_listed_and_read(self, tmp_path: Path) -> None:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
        storage = Storage(StorageSpec())
        (info,) = storage.list(str(tmp_path))
        assert storage.read_bytes(info) == b"x"
