"""The read stage, jobs/infer/read.py: what is read again, and found to be what it was or to be gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jobs.infer.read import Tasks, UnitReader
from jobs.infer.units import UnitReport, images_of
from jobs.lake.plan import ShardTask
from jobs.lake.shards import content_hash
from jobs.lake.sources import list_shards
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec, StorageSpec
from tests.chaos.harness import make_source, write_source

IMAGES = {f"{name}.jpg": name.encode() * 100 for name in "abcd"}


def read(
    folder: Path, form: str, skip: frozenset[str], contents: Mapping[str, bytes]
) -> tuple[list[str], UnitReport]:
    """Ids of the images that come out, and the report that closes the shard."""
    spec, storage = SourceSpec(uri=str(folder)), Storage(StorageSpec())
    (shard,) = list_shards(spec, storage)
    units = list(UnitReader(spec, storage, 10**6, 2).read_units(ShardTask(shard, skip, contents)))
    ids = [image.image_id for unit in units for image in images_of(unit)]
    return ids, UnitReport.from_json(units[-1]["report"][0].as_py())


def test_images_of_a_shard_that_changed_are_told_apart_by_their_content(tmp_path: Path) -> None:
    write_source(tmp_path / "s", make_source("tar", IMAGES, num_shards=1))
    contents = {
        "shard-0.tar/a": content_hash(IMAGES["a.jpg"]),
        "shard-0.tar/b": content_hash(b"what it was"),
        "shard-0.tar/gone": content_hash(b""),
    }
    ids, closing = read(tmp_path / "s", "tar", frozenset({"shard-0.tar/c", "shard-0.tar/lost"}), contents)
    assert ids == ["shard-0.tar/b", "shard-0.tar/d"]
    assert closing.unchanged == ["shard-0.tar/a"]
    assert closing.shard_gone == ["shard-0.tar/gone", "shard-0.tar/lost"]
    assert (closing.shard_num_images, closing.shard_num_units) == (4, 1)


def test_of_a_damaged_shard_nothing_is_said_to_be_gone(tmp_path: Path) -> None:
    folder = Path(write_source(tmp_path / "s", make_source("tar", IMAGES, num_shards=1)))
    whole = (folder / "shard-0.tar").read_bytes()
    (folder / "shard-0.tar").write_bytes(whole[:1500])
    ids, closing = read(folder, "tar", frozenset({"shard-0.tar/d"}), {})
    assert ids == ["shard-0.tar/a", "shard-0.tar/#tail"]
    assert closing.shard_gone == []


def test_single_objects_say_which_version_they_were_read_from(tmp_path: Path) -> None:
    write_source(tmp_path / "s", make_source("files", IMAGES))
    spec, storage = SourceSpec(uri=str(tmp_path / "s")), Storage(StorageSpec())
    (shard,) = list_shards(spec, storage)
    unit, *_ = UnitReader(spec, storage, 10**6, 4).read_units(
        ShardTask(shard, contents={"b.jpg": content_hash(IMAGES["b.jpg"])})
    )
    listed = {image_id: info.version for image_id, info in shard.objects if info is not None}
    assert {i.image_id: i.version for i in images_of(unit)} == {
        image_id: version for image_id, version in listed.items() if image_id != "b.jpg"
    }


def test_units_are_reckoned_by_objects_bytes_and_shards(tmp_path: Path) -> None:
    write_source(tmp_path / "files", make_source("files", IMAGES))
    write_source(tmp_path / "tars", make_source("tar", IMAGES, num_shards=2))
    files, tars = (
        Tasks(ShardTask(s) for s in list_shards(SourceSpec(uri=str(tmp_path / name)), Storage(StorageSpec())))
        for name in ("files", "tars")
    )
    assert files.likely_units(10**6, 2) == 2  # four objects
    assert files.likely_units(100, 10) == 4  # of 100 bytes each
    assert tars.likely_units(10**9, 1) == 2  # how many images they hold, nobody knows yet
