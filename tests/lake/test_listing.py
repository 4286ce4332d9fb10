"""A source listed once and gone through often, in memory, in files, and in the lake: jobs/lake/listing.py."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from jobs.lake import listing as listing_module
from jobs.lake.listing import Listing
from jobs.lake.shards import Shard
from jobs.lake.storage import Storage
from schemas.specs import SourceSpec

NAMES = [f"{number:03d}.jpg" for number in range(50)]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceSpec:
    """Fifty objects, where ten are many."""
    for name, value in {"SLICE_OBJECTS": 4, "_MAX_HELD": 10, "_PART_OBJECTS": 12}.items():
        monkeypatch.setattr(listing_module, name, value)
    (tmp_path / "photos").mkdir()
    for name in NAMES:
        (tmp_path / "photos" / name).write_bytes(name.encode())
    return SourceSpec(uri=str(tmp_path / "photos"), listing_max_age_s=60)


def ids(shards: Iterable[Shard]) -> list[str]:
    return [image_id for shard in shards for image_id, _ in shard.objects]


def listed(spec: SourceSpec, storage: Storage, lake: str, now: float = 0.0) -> list[str]:
    """The ids of a listing made or taken at a time."""
    with Listing.of(spec, storage, lake, lambda: now) as listing:
        return ids(listing)


def list_and_keep(spec: SourceSpec, storage: Storage, lake: str, now: float = 0.0) -> None:
    with Listing.of(with_age(spec, 0), storage, lake, lambda: now) as listing:
        listing.keep(spec, storage, lake)


def test_a_large_listing_is_the_same_each_time_and_as_a_small_one(
    photos: SourceSpec, storage: Storage, lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Listing.of(photos, storage, lake) as large:
        assert (len(large._parts), large.num_objects) == (5, 50)
        assert ids(large) == ids(large) == NAMES
        monkeypatch.setattr(listing_module, "_MAX_HELD", 1000)
        small = Listing.of(photos, storage, lake)
        assert not small._parts
        assert [shard.objects for shard in small] == [shard.objects for shard in large]


def test_shards_stay_as_they_are() -> None:
    shards = [Shard(f"s3://b/{n}.tar", f"{n}.tar", "tar", None) for n in range(30)]
    listing = Listing(iter(shards), 0.0)
    assert list(listing) == list(listing) == shards


def test_a_listing_that_the_lake_keeps_serves_until_it_is_too_old(
    photos: SourceSpec, storage: Storage, lake: str, tmp_path: Path
) -> None:
    list_and_keep(photos, storage, lake, now=1000.0)
    (tmp_path / "photos" / "new.jpg").touch()
    assert listed(photos, storage, lake, now=1060.0) == NAMES
    assert listed(photos, storage, lake, now=1061.0) == [*NAMES, "new.jpg"]
    assert listed(with_age(photos, 0), storage, lake, now=1000.0) == [*NAMES, "new.jpg"]


def test_a_newer_listing_takes_the_place_of_the_older_and_leaves_nothing_of_it(
    photos: SourceSpec, storage: Storage, lake: str
) -> None:
    list_and_keep(photos, storage, lake, now=1000.0)
    list_and_keep(photos, storage, lake, now=2000.0)
    assert len(list(storage.list(f"{lake}/listings"))) == 5 + 1
    assert listed(photos, storage, lake, now=2001.0) == NAMES


@pytest.mark.parametrize("damage", ["nonsense", "gone"])
def test_a_damaged_listing_is_made_anew(photos: SourceSpec, storage: Storage, lake: str, damage: str) -> None:
    list_and_keep(photos, storage, lake)
    part = next(info for info in storage.list(f"{lake}/listings") if info.uri.endswith("2.parquet"))
    if damage == "gone":
        storage.delete(part.uri)
    else:
        storage.write_bytes(part.uri, b"PAR1 nonsense PAR1")
    assert listed(photos, storage, lake, now=1.0) == NAMES


def test_a_small_listing_is_not_kept(photos: SourceSpec, storage: Storage, lake: str) -> None:
    few = photos.model_copy(update={"include": "00*"})
    list_and_keep(few, storage, lake)
    assert listed(few, storage, lake) == NAMES[:10]
    assert not Path(lake.removeprefix("file://")).exists()


def with_age(spec: SourceSpec, seconds: float) -> SourceSpec:
    return spec.model_copy(update={"listing_max_age_s": float(seconds)})
