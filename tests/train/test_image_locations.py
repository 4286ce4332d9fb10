"""Where images are: keys as the label table has them, and bytes as they were packed."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.shards import image_name
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import ChangedObjectError, CorruptObjectError, MissingObjectError, Storage
from jobs.train.image_locations import ImageLocation, ImageReader, locate_images
from jobs.train.records import Problems
from schemas.errors import UsageError
from schemas.specs import SourceSpec, StorageSpec
from tests.lake.tars import END, header, make_tar, padded
from tests.train.coco_files import write_files

STORAGE = Storage(StorageSpec())


def located(spec: SourceSpec, problems: Problems | None = None) -> dict[str, ImageLocation]:
    """key -> location."""
    return {
        row["key"]: ImageLocation.from_row(row)
        for batch in locate_images(spec, STORAGE, problems or Problems())
        for row in batch.to_pylist()
    }


def as_labelled(spec: SourceSpec) -> dict[str, bytes]:
    """image_id -> bytes, as `masklake infer` reads the source."""
    images = (
        image for shard in list_shards(spec, STORAGE) for image in ShardReader(shard, spec, STORAGE, ())
    )
    return {image.image_id: image.data for image in images if image.data is not None}


def parquet(rows: list[dict[str, Any]], rows_per_group: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=rows_per_group)
    return file.getvalue()


JPEGS = {f"{n:02d}": f"bytes of {n}".encode() * (n + 1) for n in range(7)}
TAR = make_tar(
    [
        *((f"deep/{name}.jpg", data) for name, data in JPEGS.items()),
        ("deep/00.txt", b"no image"),
        ("deep/00.jpg", b"a second one of this key"),
        ("./x.PNG", b"last"),
        (f"{'long/' * 30}y.jpg", b"behind a pax header"),
        ("empty.jpg", b""),
    ]
)
STRUCTS = parquet([{"image": {"bytes": d, "path": n}, "id": n} for n, d in JPEGS.items()], 3)
SOURCES: dict[str, tuple[Mapping[str, bytes], dict[str, Any]]] = {
    "files": ({f"a/{n}.jpg": d for n, d in JPEGS.items()} | {"b.png": b"b", "notes.txt": b""}, {}),
    "tars": ({"x/one.tar": TAR, "x/two.tar": make_tar({"z.jpg": b"zz"})}, {}),
    "parquet": ({"one.parquet": STRUCTS, "two.parquet": STRUCTS}, {}),
    "parquet with ids": ({"one.parquet": STRUCTS}, {"id_column": "id"}),
    "other columns": (
        {"p.parquet": parquet([{"jpg": d, "n": k % 6} for k, d in enumerate(JPEGS.values())], 2)},
        {"image_column": "jpg", "id_column": "n"},
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_keys_and_bytes_are_those_of_the_label_table(tmp_path: Path, case: str) -> None:
    files, settings = SOURCES[case]
    spec = SourceSpec(uri=str(write_files(tmp_path, files)), **settings)
    reader = ImageReader(STORAGE)
    found = {key: reader.read(location) for key, location in located(spec).items()}
    assert found == as_labelled(spec)
    assert len(found) >= 6


def test_images_of_a_list_are_read_as_they_are_now(tmp_path: Path) -> None:
    write_files(tmp_path, {"list.csv": b"uri\na.jpg\nb.jpg\na.jpg\n", "a.jpg": b"a", "b.jpg": b"b"})
    found = located(SourceSpec(uri=str(tmp_path / "list.csv")))
    (tmp_path / "b.jpg").write_bytes(b"newer")
    assert {key: ImageReader(STORAGE).read(place) for key, place in found.items()} == {
        "a.jpg": b"a",
        "b.jpg": b"newer",
    }


def test_an_image_in_a_tar_is_read_as_just_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"one.tar": make_tar({"big.jpg": bytes(9 << 20), "a.jpg": b"just this"})})
    place = located(SourceSpec(uri=str(tmp_path)))["one.tar/a"]
    reads: list[tuple[int, int]] = []
    read_range = Storage._read_range

    def spy(self: Storage, store: Any, path: str, info: Any, start: int, end: int) -> bytes:
        reads.append((start, end))
        return read_range(self, store, path, info, start, end)

    monkeypatch.setattr(Storage, "_read_range", spy)
    assert ImageReader(STORAGE).read(place) == b"just this"
    assert reads == [(place.start, place.start + 9)]
    whole = located(SourceSpec(uri=str(tmp_path)))["one.tar/big"]
    assert ImageReader(STORAGE).read(whole) == bytes(9 << 20)  # more than one read gives


@pytest.mark.parametrize("case", ["files", "tars", "parquet"])
def test_an_object_that_was_replaced_is_refused(tmp_path: Path, case: str) -> None:
    files, settings = SOURCES[case]
    places = located(SourceSpec(uri=str(write_files(tmp_path, files)), **settings))
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    reader = ImageReader(STORAGE)
    for place in (place for place in places.values() if place.num_bytes):  # of nothing, nothing is read
        with pytest.raises(ChangedObjectError):
            reader.read(place)


def test_an_object_that_is_gone_is_missing(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": b"a"})
    place = located(SourceSpec(uri=str(tmp_path)))["a.jpg"]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(MissingObjectError):
        ImageReader(STORAGE).read(place)


def test_a_row_without_an_image_is_missing_and_a_damaged_group_corrupt(tmp_path: Path) -> None:
    data = parquet([{"image": b"good" * 99}, {"image": None}], 2)
    write_files(tmp_path, {"p.parquet": data})
    places = located(SourceSpec(uri=str(tmp_path)))
    with pytest.raises(MissingObjectError, match="row 1 of row group 0 holds no image"):
        ImageReader(STORAGE).read(places["p.parquet/000000001"])
    (tmp_path / "p.parquet").write_bytes(data[:10] + b"\xff" * 40 + data[50:])
    places = located(SourceSpec(uri=str(tmp_path)))
    with pytest.raises(CorruptObjectError, match="row group 0 is damaged"):
        ImageReader(STORAGE).read(places["p.parquet/000000000"])


def test_row_groups_are_read_once_while_they_fit_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": bytes([n]) * 10_000} for n in range(6)]
    write_files(tmp_path, {"p.parquet": parquet(rows, 2)})
    places = list(located(SourceSpec(uri=str(tmp_path))).values())
    groups: list[int] = []
    read_group = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, *rest: Any, **more: Any) -> pa.Table:
        groups.append(group)
        return read_group(self, group, *rest, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    roomy, narrow = ImageReader(STORAGE, 1 << 20), ImageReader(STORAGE, 45_000)  # two groups of 20 kB
    for reader, wanted in ((roomy, [0, 1, 2]), (narrow, [0, 1, 2, 0, 1, 2])):
        groups.clear()
        for place in (*places, *places):
            assert reader.read(place) == rows[places.index(place)]["image"]
        assert groups == wanted


def test_a_damaged_shard_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    good = header(b"a.jpg", 3) + padded(b"abc")
    write_files(tmp_path, {"cut.tar": good + header(b"b.jpg", 5000) + b"short", "ok.tar": good + END})
    problems = Problems()
    assert set(located(SourceSpec(uri=str(tmp_path)), problems)) == {"cut.tar/a", "ok.tar/a"}
    assert problems.counts == {"damaged_shard": 1}
    assert "cut.tar" in problems.first["damaged_shard"]


def test_a_parquet_file_without_a_footer_is_a_damaged_shard(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.parquet": STRUCTS, "b.parquet": STRUCTS[:-9]})
    problems = Problems()
    assert len(located(SourceSpec(uri=str(tmp_path)), problems)) == len(JPEGS)
    assert problems.counts == {"damaged_shard": 1}


def test_a_gzipped_tar_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.tar.gz": gzip.compress(TAR)})
    with pytest.raises(UsageError, match=r"a\.tar\.gz is a gzipped tar.*gunzip"):
        located(SourceSpec(uri=str(tmp_path)))


def test_names_leave_folder_and_image_suffix_out() -> None:
    assert image_name("a/b/0001.jpg") == image_name("x.tar/0001") == "0001"
    assert image_name("v1.2") == "v1.2"
