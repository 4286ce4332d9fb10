"""Images of a tar shard: every image becomes one row, whatever is wrong with it or with the tar."""

import gzip
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.lake.shards import MAX_IMAGE_BYTES
from jobs.lake.sources import ShardReader, SourceImage, list_shards
from jobs.lake.storage import ChangedObjectError, MissingObjectError, Storage
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec
from tests.lake.tars import BLOCK, END, header, make_tar, padded, pax, record


def read(
    storage: Storage, path: Path, skip: frozenset[str] = frozenset()
) -> tuple[list[SourceImage], int | None]:
    spec = SourceSpec(uri=str(path))
    (shard,) = list_shards(spec, storage)
    reader = ShardReader(shard, spec, storage, skip)
    assert reader.num_images is None
    return list(reader), reader.num_images


def outcomes(images: list[SourceImage]) -> list[tuple[str, bytes | ErrorKind | None]]:
    return [
        (image.image_id, image.data if image.error_kind is None else image.error_kind) for image in images
    ]


def test_image_members_come_in_order_and_others_are_passed_over(storage: Storage, tmp_path: Path) -> None:
    members = {
        "b/2.jpg": b"two",
        "b/2.json": b"{}",
        "1.PNG": b"one",
        ".hidden.jpg": b"",
        "b/._2.jpg": b"",
        ".cache/3.jpg": b"",
        "./c.tar.webp": b"three",
        "readme": b"",
        "empty.tiff": b"",
    }
    (tmp_path / "s.tar").write_bytes(make_tar(members))
    images, num_images = read(storage, tmp_path / "s.tar")
    assert outcomes(images) == [
        ("s.tar/b/2", b"two"),
        ("s.tar/1", b"one"),
        ("s.tar/c.tar", b"three"),
        ("s.tar/empty", b""),
    ]
    assert num_images == 4
    assert {image.shard for image in images} == {"s.tar"}


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_a_gzipped_tar_is_known_by_its_first_bytes(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(make_tar({"1.jpg": b"one", "2.jpg": b"two"})))
    images, num_images = read(storage, tmp_path / name)
    assert outcomes(images) == [(f"{name}/1", b"one"), (f"{name}/2", b"two")]
    assert num_images == 2


def test_skipped_images_are_counted_but_not_given(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(make_tar({f"{n}.jpg": b"x" for n in range(5)}))
    images, num_images = read(storage, tmp_path / "s.tar", frozenset({"s.tar/1", "s.tar/3", "other/0"}))
    assert [image.image_id for image in images] == ["s.tar/0", "s.tar/2", "s.tar/4"]
    assert num_images == 5


def test_a_repeated_key_is_a_row_of_its_own_under_a_name_nobody_else_has(
    storage: Storage, tmp_path: Path
) -> None:
    names = ["a.jpg", "a#2.jpg", "a.png", "b.jpg", "a.jpg", "./a.jpg"]
    (tmp_path / "s.tar").write_bytes(make_tar([(name, b"x") for name in names]))
    images, num_images = read(storage, tmp_path / "s.tar")
    assert outcomes(images) == [
        ("s.tar/a", b"x"),
        ("s.tar/a#2", b"x"),
        ("s.tar/a#3", ErrorKind.DUPLICATE_KEY),
        ("s.tar/b", b"x"),
        ("s.tar/a#4", ErrorKind.DUPLICATE_KEY),
        ("s.tar/a#5", ErrorKind.DUPLICATE_KEY),
    ]
    assert num_images == 6
    again, num_again = read(storage, tmp_path / "s.tar", frozenset(image.image_id for image in images[:4]))
    assert again == images[4:]
    assert num_again == 6


def test_links_and_sparse_files_are_unsupported_not_lost(storage: Storage, tmp_path: Path) -> None:
    sparse = pax(record(b"GNU.sparse.major", b"1")) + header(b"s.jpg", 1) + padded(b"x")
    data = header(b"a.jpg", 0, b"1") + header(b"b.jpg", 0, b"2") + sparse + END
    (tmp_path / "s.tar").write_bytes(data)
    images, _ = read(storage, tmp_path / "s.tar")
    assert [image.error_kind for image in images] == [ErrorKind.UNSUPPORTED] * 3
    assert images[0].error == (
        "member 'a.jpg' is a hard link, which has no bytes of its own here; pack plain files "
        "(GNU tar: --dereference --hard-dereference, without --sparse)"
    )


def test_an_oversized_member_is_a_row_and_is_never_held(storage: Storage, tmp_path: Path) -> None:
    size_bytes = MAX_IMAGE_BYTES + 1
    with open(tmp_path / "s.tar", "wb") as file:
        file.write(header(b"huge.jpg", size_bytes))
        file.seek(size_bytes + -size_bytes % BLOCK, os.SEEK_CUR)
        file.write(header(b"good.jpg", 1) + padded(b"x") + END)
    tracemalloc.start()
    images, _ = read(storage, tmp_path / "s.tar")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcomes(images) == [("s.tar/huge", ErrorKind.TOO_LARGE), ("s.tar/good", b"x")]
    assert images[0].error == "256000001 encoded bytes, at most 256000000 are read: is it an image?"
    assert peak_bytes < 8 << 20


def test_memory_stays_at_one_image_however_long_the_tar(storage: Storage, tmp_path: Path) -> None:
    member = padded(os.urandom(1 << 20))
    with open(tmp_path / "s.tar", "wb") as file:
        for n in range(64):
            file.write(header(b"%d.jpg" % n, 1 << 20) + member)
        file.write(END)
    spec = SourceSpec(uri=str(tmp_path / "s.tar"))
    (shard,) = list_shards(spec, storage)
    tracemalloc.start()
    num_images = sum(image.data is not None for image in ShardReader(shard, spec, storage, frozenset()))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_images == 64
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_tar_gives_its_whole_images_and_one_row_for_the_rest(
    storage: Storage, tmp_path: Path, compressed: bool
) -> None:
    whole = make_tar({f"{n}.jpg": b"%d" % n * 600 for n in range(3)})
    cut = whole[: 2 * 3 * BLOCK + BLOCK + 100]  # inside the data of the third
    (tmp_path / "s.tar").write_bytes(gzip.compress(cut) if compressed else cut)
    images, num_images = read(storage, tmp_path / "s.tar")
    assert outcomes(images) == [
        ("s.tar/0", b"0" * 600),
        ("s.tar/1", b"1" * 600),
        ("s.tar/#tail", ErrorKind.TRUNCATED),
    ]
    assert num_images == 3
    assert "2 images before were read, the rest of s.tar was not: pack it anew" in str(images[2].error)
    again, num_again = read(storage, tmp_path / "s.tar", frozenset(image.image_id for image in images))
    assert (again, num_again) == ([], 3)


def test_a_damaged_header_quarantines_the_tail_and_says_where(storage: Storage, tmp_path: Path) -> None:
    damaged = bytearray(make_tar({f"{n}.jpg": b"x" for n in range(4)}))
    damaged[2 * 2 * BLOCK + 10] ^= 1
    (tmp_path / "s.tar").write_bytes(damaged)
    images, num_images = read(storage, tmp_path / "s.tar")
    assert outcomes(images)[2:] == [("s.tar/#tail", ErrorKind.CORRUPT)]
    assert num_images == 3
    assert images[2].error == (
        "a member's header fails its checksum (byte 2048 of the tar); 2 images before were read, "
        "the rest of s.tar was not: pack it anew"
    )


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x1f\x8b", gzip.compress(b"")])
def test_what_is_no_tar_at_all_is_one_row(storage: Storage, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    images, num_images = read(storage, tmp_path / "s.tar")
    assert [image.image_id for image in images] == ["s.tar/#tail"]
    assert num_images == 1


def test_a_shard_that_vanished_is_an_error_not_a_row(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(make_tar({}))
    spec = SourceSpec(uri=str(tmp_path))
    (shard,) = list_shards(spec, storage)
    (tmp_path / "s.tar").unlink()
    reader = ShardReader(shard, spec, storage, frozenset())
    with pytest.raises(MissingObjectError, match=r"s\.tar"):
        list(reader)
    assert reader.num_images is None


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_shard_replaced_while_being_read_is_left_for_the_next_run(
    storage: Storage, tmp_path: Path, compressed: bool, damaged: bool
) -> None:
    data = make_tar({"0.jpg": b"x", "1.jpg": b"x"})
    if damaged:
        data = data[: 2 * 2 * BLOCK] + b"no tar" * BLOCK
    (tmp_path / "s.tar").write_bytes(gzip.compress(data) if compressed else data)
    images, given = started_reading(storage, tmp_path)
    os.utime(tmp_path / "s.tar", (1, 1))
    with pytest.raises(ChangedObjectError, match=r"s\.tar"):
        given.extend(images)
    assert all(image.error_kind is None for image in given)


def test_a_shard_that_vanishes_while_being_read_is_left_for_the_next_run(
    storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "s.tar").write_bytes(make_tar({"0.jpg": b"x", "1.jpg": b"x"}))
    images, given = started_reading(storage, tmp_path)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(MissingObjectError, match=r"s\.tar"):
        given.extend(images)
    assert all(image.error_kind is None for image in given)


def started_reading(storage: Storage, folder: Path) -> tuple[Iterator[SourceImage], list[SourceImage]]:
    """What is left of the only shard of a folder after its first image; and that image."""
    spec = SourceSpec(uri=str(folder))
    (shard,) = list_shards(spec, storage)
    images = iter(ShardReader(shard, spec, storage, frozenset()))
    return images, [next(images)]


def test_a_gzip_bomb_costs_neither_the_images_before_it_nor_time_nor_memory(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.lake.tar._MAX_SMALL_BYTES", 1 << 20)
    bomb_bytes = 64 << 20
    with gzip.open(tmp_path / "s.tgz", "wb") as file:
        file.write(header(b"good.jpg", 1) + padded(b"x") + header(b"bomb.bin", bomb_bytes))
        for _ in range(bomb_bytes >> 20):
            file.write(bytes(1 << 20))
        file.write(header(b"late.jpg", 1) + padded(b"x") + END)
    packed_bytes = (tmp_path / "s.tgz").stat().st_size
    tracemalloc.start()
    images, _ = read(storage, tmp_path / "s.tgz")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcomes(images) == [("s.tgz/good", b"x"), ("s.tgz/#tail", ErrorKind.TOO_LARGE)]
    assert f"unpacks to more than {100 * packed_bytes} bytes, 100 times its size" in str(images[1].error)
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("num_bytes", [50_000, 3_000_000])
def test_a_tar_that_shrinks_well_is_no_bomb(storage: Storage, tmp_path: Path, num_bytes: int) -> None:
    drawing = bytes(num_bytes // 50) + os.urandom(num_bytes // 50)
    (tmp_path / "s.tgz").write_bytes(gzip.compress(make_tar({f"{n}.bmp": drawing for n in range(25)})))
    images, _ = read(storage, tmp_path / "s.tgz")
    assert [image.data for image in images] == [drawing] * 25


@pytest.mark.parametrize(
    ("stored", "image_id"),
    [
        (b"a photo of us.jpg", "a photo of us"),
        (b"two\nlines.jpg", "two\nlines"),
        ("Füße/猫 🐈.jpg".encode(), "Füße/猫 🐈"),
        (b"latin-1 \xe9t\xe9.jpg", "latin-1 \\xe9t\\xe9"),
        (b"/etc/passwd.jpg", "/etc/passwd"),
        (b"../../up.jpg", "../../up"),
        (b"a#tail.jpg", "a#tail"),
        (b"\x1b[31mred.jpg", "\x1b[31mred"),
    ],
)
def test_odd_names_are_ids_and_no_paths(
    storage: Storage, tmp_path: Path, stored: bytes, image_id: str
) -> None:
    (tmp_path / "s.tar").write_bytes(header(stored, 1) + padded(b"x") + END)
    images, _ = read(storage, tmp_path / "s.tar")
    assert outcomes(images) == [(f"s.tar/{image_id}", b"x")]
    assert read(storage, tmp_path / "s.tar", frozenset({f"s.tar/{image_id}"})) == ([], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_a_sample_without_an_image_is_no_image(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(make_tar({"1.json": b"{}", "1.txt": b"hello", "2.jpg": b"x"}))
    images, num_images = read(storage, tmp_path / "s.tar")
    assert outcomes(images) == [("s.tar/2", b"x")]
    assert num_images == 1
