"""Images of a Parquet shard: a binary column or struct<bytes, path>, row by row, damaged or not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.sources import ShardReader, SourceImage, list_shards
from jobs.lake.storage import ChangedObjectError, MissingObjectError, Storage
from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec

Read = Callable[..., tuple[list[SourceImage], int | None]]


@pytest.fixture
def read(storage: Storage, tmp_path: Path) -> Read:
    """Write s.parquet, or take it as it is, and read it as a source."""

    def write_and_read(
        table: pa.Table | None = None,
        skip: frozenset[str] = frozenset(),
        *,
        row_group_size: int = 1000,
        **settings: Any,
    ) -> tuple[list[SourceImage], int | None]:
        path = tmp_path / "s.parquet"
        if table is not None:
            pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)
        spec = SourceSpec(uri=str(path), **settings)
        (shard,) = list_shards(spec, storage)
        reader = ShardReader(shard, spec, storage, skip)
        return list(reader), reader.num_images

    return write_and_read


def outcomes(images: list[SourceImage]) -> list[tuple[str, bytes | ErrorKind | None]]:
    return [
        (image.image_id, image.data if image.error_kind is None else image.error_kind) for image in images
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_binary_column_gives_an_image_per_row(read: Read, kind: pa.DataType) -> None:
    table = pa.table({"image": pa.array([b"one", b"", None, b"four"], kind), "label": [1, 2, 3, 4]})
    images, num_images = read(table, row_group_size=3)
    assert outcomes(images) == [
        ("s.parquet/000000000", b"one"),
        ("s.parquet/000000001", b""),
        ("s.parquet/000000002", ErrorKind.EMPTY),
        ("s.parquet/000000003", b"four"),
    ]
    assert num_images == 4
    assert {image.shard for image in images} == {"s.parquet"}


def test_the_struct_of_hugging_face_datasets_is_read(read: Read) -> None:
    rows = [
        {"bytes": b"one", "path": "1.jpg"},
        {"bytes": None, "path": "2.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"five", "path": None},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images, _ = read(pa.table({"picture": pa.array(rows, kind)}), image_column="picture")
    assert [outcome for _, outcome in outcomes(images)] == [
        b"one",
        ErrorKind.MISSING,
        ErrorKind.EMPTY,
        ErrorKind.EMPTY,
        b"five",
    ]
    assert images[1].error == "the row has only a path ('2.jpg'), not the image's bytes: embed them"


@pytest.mark.parametrize("values", [["a", "b", None, "a", "#"], [7, 8, None, 7, 9]])
def test_an_id_column_names_the_images_and_shows_what_is_wrong_with_it(read: Read, values: list[Any]) -> None:
    table = pa.table({"image": [b"x"] * 5, "key": values})
    images, num_images = read(table, id_column="key", row_group_size=2)
    assert outcomes(images) == [
        (str(values[0]), b"x"),
        (str(values[1]), b"x"),
        ("s.parquet/000000002", ErrorKind.MISSING),
        (f"{values[3]}#2", ErrorKind.DUPLICATE_KEY),
        (str(values[4]), b"x"),
    ]
    assert num_images == 5


@pytest.mark.parametrize("id_column", [None, "key"])
def test_row_groups_that_are_done_are_not_read(
    read: Read, id_column: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table(
        {"image": [b"%d" % n for n in range(9)], "key": [f"s.parquet/{n:09d}" for n in range(9)]}
    )
    done = frozenset(f"s.parquet/{n:09d}" for n in (0, 1, 2, 4))
    asked: list[list[int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["row_groups"])
        return iter_batches(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    images, num_images = read(table, done, row_group_size=3, id_column=id_column)
    assert [image.data for image in images] == [b"3", b"5", b"6", b"7", b"8"]
    assert asked == [[1], [2]]
    assert num_images == 9


def write_checked(path: Path, columns: dict[str, list[Any]]) -> None:
    """Row groups of two, values as they are and nowhere else in the file, page checksums."""
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=2,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )


def test_a_damaged_row_group_costs_its_own_rows_only(read: Read, tmp_path: Path) -> None:
    marks = [bytes([n]) * 999 for n in range(6)]
    write_checked(tmp_path / "s.parquet", {"image": marks})
    data = bytearray((tmp_path / "s.parquet").read_bytes())
    data[data.index(marks[3]) + 500] ^= 1
    (tmp_path / "s.parquet").write_bytes(data)
    images, num_images = read()
    assert [outcome for _, outcome in outcomes(images)] == [
        marks[0],
        marks[1],
        ErrorKind.CORRUPT,
        ErrorKind.CORRUPT,
        marks[4],
        marks[5],
    ]
    assert num_images == 6
    assert "row group 1 of s.parquet is damaged: " in str(images[2].error)


def test_a_damaged_id_column_leaves_rows_that_say_so(read: Read, tmp_path: Path) -> None:
    names = [f"name {n} of an image" for n in range(4)]
    write_checked(tmp_path / "s.parquet", {"key": names, "image": [b"x"] * 4})
    data = bytearray((tmp_path / "s.parquet").read_bytes())
    data[data.index(names[0].encode())] ^= 1
    (tmp_path / "s.parquet").write_bytes(data)
    images, _ = read(id_column="key")
    assert outcomes(images) == [
        ("s.parquet/000000000", ErrorKind.CORRUPT),
        ("s.parquet/000000001", ErrorKind.CORRUPT),
        (names[2], b"x"),
        (names[3], b"x"),
    ]


@pytest.mark.parametrize("data", [b"", b"<html>", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_file_is_one_row(read: Read, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.parquet").write_bytes(data)
    images, num_images = read()
    assert outcomes(images) == [("s.parquet/#tail", ErrorKind.CORRUPT)]
    assert num_images == 1


def test_a_cut_file_is_one_row(read: Read, tmp_path: Path) -> None:
    read(pa.table({"image": [b"x" * 5000]}))
    data = (tmp_path / "s.parquet").read_bytes()
    (tmp_path / "s.parquet").write_bytes(data[:-50])
    assert outcomes(read()[0]) == [("s.parquet/#tail", ErrorKind.CORRUPT)]


@pytest.mark.parametrize("change", ["written over", "touched", "deleted"])
def test_a_shard_that_changes_while_being_read_is_left_for_the_next_run(
    storage: Storage, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "s.parquet"
    table = pa.table({"image": [os.urandom(40_000) for _ in range(60)]})
    pq.write_table(table, path, row_group_size=10, compression="none", write_page_checksum=True)
    spec = SourceSpec(uri=str(path))
    (shard,) = list_shards(spec, storage)
    reader = ShardReader(shard, spec, storage, frozenset())
    images = iter(reader)
    given = [next(images)]
    if change == "written over":
        pq.write_table(table.slice(3, 40), path, row_group_size=7)
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    with pytest.raises(
        MissingObjectError if change == "deleted" else ChangedObjectError, match=r"s\.parquet"
    ):
        given.extend(images)
    assert reader.num_images is None
    assert [image.data for image in given] == table["image"].to_pylist()[: len(given)]


def test_ids_of_any_letters_are_taken_as_they_are(read: Read) -> None:
    names = ["with space", "two\nlines", "猫 🐈", "../up", "/etc/passwd", "", "nul\0"]
    images, _ = read(pa.table({"image": [b"x"] * len(names), "name": names}), id_column="name")
    assert outcomes(images) == [(name, b"x") for name in names]


def test_a_column_of_nulls_is_a_row_each(read: Read) -> None:
    images, num_images = read(pa.table({"image": pa.array([None] * 3, pa.binary())}))
    assert [outcome for _, outcome in outcomes(images)] == [ErrorKind.EMPTY] * 3
    assert num_images == 3


def test_an_oversized_image_is_a_row(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.lake.parquet_source.MAX_IMAGE_BYTES", 10)
    images, _ = read(pa.table({"image": [b"x" * 10, b"x" * 11]}))
    assert [outcome for _, outcome in outcomes(images)] == [b"x" * 10, ErrorKind.TOO_LARGE]


def test_a_file_without_rows_has_no_images(read: Read) -> None:
    assert read(pa.table({"image": pa.array([], pa.binary())})) == ([], 0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, r"no column 'image': .* has the columns photo \(binary\), name \(string\), score \(double\)"),
        ({"image_column": "name"}, "column 'name' is string, wanted encoded images as binary or struct"),
        ({"image_column": "photo", "id_column": "key"}, "no column 'key': .* set source.id_column"),
        (
            {"image_column": "photo", "id_column": "score"},
            "column 'score' is double, wanted strings or whole",
        ),
    ],
)
def test_a_wrong_column_is_refused_by_name_before_any_image(
    read: Read, settings: dict[str, str], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        read(pa.table({"photo": [b"x"], "name": ["a"], "score": [0.5]}), **settings)


def test_memory_stays_at_a_batch_however_large_the_row_group(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    images = pa.table({"image": [os.urandom(1 << 20)] * 96})
    pq.write_table(images, path, use_dictionary=False, compression="none", write_batch_size=4)
    del images
    spec = SourceSpec(uri=str(path))
    (shard,) = list_shards(spec, storage)
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    peak = 0
    num_images = 0
    for image in ShardReader(shard, spec, storage, frozenset()):
        num_images += image.data is not None
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert num_images == 96
    assert peak < 48 << 20
