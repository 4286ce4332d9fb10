"""Names inside of a source are labels' keys and nothing else: none becomes a path on this machine."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.labels_table import LabelsTable
from jobs.lake.registry import ModelRegistry
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from jobs.train.image_locations import ImageLocation, ImageReader, locate_images
from jobs.train.records import Problems
from schemas.errors import UsageError
from schemas.specs import SourceSpec, StorageSpec
from tests.chaos.harness import Drivers, Job, make_images

STORAGE = Storage(StorageSpec())
(PICTURE,) = make_images(1).values()


def hostile_names(sentinel: Path) -> list[str]:
    return [
        "../../climbs.jpg",
        "a/../../../climbs.jpg",
        f"{sentinel}/absolute.jpg",
        "//etc/absolute.jpg",
        "..\\..\\climbs.jpg",
        "%2e%2e/%2e%2e/climbs.jpg",
        "file:///etc/climbs.jpg",
        "../lake/labels/_delta_log/00000000000000000000.jpg",
    ]


def hostile_tar(sentinel: Path) -> bytes:
    """Names that climb, and links to the sentinel's folder and to a file in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in hostile_names(sentinel):
            member = tarfile.TarInfo(name)
            member.size = len(PICTURE)
            tar.addfile(member, io.BytesIO(PICTURE))
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, f"{sentinel}/secret.jpg"),
            ("folder", tarfile.SYMTYPE, str(sentinel)),
            ("hard.jpg", tarfile.LNKTYPE, f"{sentinel}/secret.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        through = tarfile.TarInfo("folder/through-the-link.jpg")
        through.size = len(PICTURE)
        tar.addfile(through, io.BytesIO(PICTURE))
    return buffer.getvalue()


@dataclass(frozen=True)
class Place:
    """images and lake are the job's; all else below root is not."""

    root: Path
    sentinel: Path
    before: frozenset[tuple[str, bytes]]

    @property
    def source(self) -> SourceSpec:
        return SourceSpec(uri=f"{self.root}/images")

    def outside(self) -> frozenset[tuple[str, bytes]]:
        return frozenset(_files(self.root))

    def check_untouched(self) -> None:
        assert self.outside() == self.before


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name != "lake"]
        yield folder, b""
        for name in files:
            path = Path(folder) / name
            yield str(path), path.read_bytes()


@pytest.fixture(params=["tar", "parquet", "files"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = tmp_path / "a" / "b" / "root"
    images, sentinel = root / "images", root / "sentinel"
    for folder in (images, sentinel):
        folder.mkdir(parents=True)
    (sentinel / "secret.jpg").write_bytes(b"a secret")
    if request.param == "tar":
        (images / "hostile.tar").write_bytes(hostile_tar(sentinel))
    elif request.param == "parquet":
        rows: list[dict[str, bytes | str | None]]
        rows = [{"bytes": PICTURE, "path": name} for name in hostile_names(sentinel)]
        rows.append(
            {"bytes": None, "path": f"{sentinel}/secret.jpg"}
        )  # as datasets have it that keep paths only
        pq.write_table(pa.table({"image": rows}), images / "hostile.parquet")
    else:
        for name in (
            "..%2fclimbs.jpg",
            "...jpg.jpg",
            "-rf.jpg",
            "$(touch x).jpg",
            "`touch x`.jpg",
            "a;b|c&d.jpg",
        ):
            (images / name).write_bytes(PICTURE)
    return Place(root, sentinel, frozenset(_files(root)))


def test_readers_touch_nothing_and_give_nothing_that_lies_outside(place: Place) -> None:
    images = [
        image
        for shard in list_shards(place.source, STORAGE)
        for image in ShardReader(shard, place.source, STORAGE, frozenset())
    ]
    assert len(images) >= 4
    assert {image.data for image in images} <= {PICTURE, None}
    for batch in locate_images(place.source, STORAGE, Problems()):
        for row in batch.to_pylist():
            assert place.source.uri in row["uri"].decode()
            if row["row"] < len(hostile_names(place.sentinel)):
                assert ImageReader(STORAGE).read(ImageLocation.from_row(row)) == PICTURE
    place.check_untouched()


@pytest.mark.slow
def test_a_job_over_such_names_writes_below_its_lake_only(
    place: Place, drivers: Drivers, tmp_path: Path
) -> None:
    lake = f"{place.root}/lake"
    settings = ("failures.budget=100",)
    ended = drivers.run(Job(f"{place.root}/images", lake, settings=settings), {"TMPDIR": str(tmp_path / "a")})
    assert ended.status == 0, ended.stderr
    place.check_untouched()
    table = LabelsTable.open(lake, STORAGE)
    ids = table.dataset().to_table()["image_id"].to_pylist()
    assert len(ids) == ended.summary["images"] >= 4
    for uri in table.file_uris():
        assert Path(uri).resolve().is_relative_to(place.root / "lake")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "a\\b", "/etc/passwd", "a\0b", ""])
def test_a_model_s_name_is_no_path(name: str, tmp_path: Path) -> None:
    registry = ModelRegistry(f"file://{tmp_path}/lake", STORAGE)
    with pytest.raises(UsageError):
        registry.register(name, b"", "0" * 64)
    with pytest.raises(UsageError):
        registry.open(f"{name}@1")
    assert list(tmp_path.iterdir()) == []
