"""A source's format is told by names; empty and mixed sources are refused by naming what was found."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.sources import Shard, list_shards
from jobs.lake.storage import Storage
from schemas.errors import UsageError
from schemas.specs import SourceSpec
from tests.lake.tars import make_tar


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".parquet", ".pq")):
            pq.write_table(pa.table({"image": [b"x"]}), path)
        else:
            path.write_bytes(make_tar({}) if ".tar" in name else b"x")


def names_of(storage: Storage, uri: Path | str, **settings: str) -> list[tuple[str, str]]:
    spec = SourceSpec.model_validate({"uri": str(uri), **settings})
    return [(shard.format, shard.name) for shard in list_shards(spec, storage)]


def keys_of(shards: list[Shard]) -> list[str]:
    return [image_id for shard in shards for image_id, _ in shard.objects]


def test_tars_are_found_at_any_depth_and_named_by_their_key(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "b/1.tar", "a.TGZ", "b/0.tar.gz", "readme.md", "b/stats.json", "_logs/2.tar", "b/.tmp.tar")
    expected = [("tar", "a.TGZ"), ("tar", "b/0.tar.gz"), ("tar", "b/1.tar")]
    assert names_of(storage, tmp_path) == expected
    assert names_of(storage, f"file://{tmp_path}/") == expected
    (first, *_) = list_shards(SourceSpec(uri=str(tmp_path)), storage)
    assert first.info == storage.stat(f"{tmp_path}/a.TGZ")
    assert (first.uri, len(first.objects)) == (f"file://{tmp_path}/a.TGZ", 0)


def test_parquet_shards_are_found(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "train/1.parquet", "val/1.pq")
    assert names_of(storage, tmp_path) == [("parquet", "train/1.parquet"), ("parquet", "val/1.pq")]


def test_image_files_come_in_slices_of_one_shard(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "b/2.JPEG", "b/1.jpg", "a.png", "notes.txt", "c.webp", "annotations.csv", "d.tif")
    shards = list(list_shards(SourceSpec(uri=str(tmp_path)), storage, slice_images=2))
    assert [(shard.format, shard.name, len(shard.objects)) for shard in shards] == [
        ("files", ".", 2),
        ("files", ".", 2),
        ("files", ".", 1),
    ]
    assert keys_of(shards) == ["a.png", "b/1.jpg", "b/2.JPEG", "c.webp", "d.tif"]
    assert shards[1].uri == f"file://{tmp_path}/b/2.JPEG"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("s.tar", ("tar", "s.tar")), ("s.parquet", ("parquet", "s.parquet")), ("s.jpg", ("files", "."))],
)
def test_one_object_is_a_source_too(
    storage: Storage, tmp_path: Path, name: str, expected: tuple[str, str]
) -> None:
    fill(tmp_path, name, "other.gif")
    assert names_of(storage, tmp_path / name) == [expected]


def test_a_glob_in_the_uri_or_in_include_chooses(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "2023/1.tar", "2024/1.tar", "2024/x/2.tar", "2024/1.jpg")
    assert names_of(storage, f"{tmp_path}/2024/*.tar") == [("tar", "1.tar"), ("tar", "x/2.tar")]
    assert names_of(storage, f"{tmp_path}/20?4/1.*ar") == [("tar", "2024/1.tar")]
    assert names_of(storage, tmp_path, include="*/1.tar") == [("tar", "2023/1.tar"), ("tar", "2024/1.tar")]
    with pytest.raises(UsageError, match=r"has a glob and source.include 'a\*' too"):
        names_of(storage, f"{tmp_path}/*", include="a*")


def test_an_explicit_format_takes_its_own_and_passes_others_over(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "1.tar", "preview.jpg")
    assert names_of(storage, tmp_path, format="tar") == [("tar", "1.tar")]
    assert names_of(storage, tmp_path, format="files") == [("files", ".")]


def test_format_and_glob_together_are_taken_at_their_word(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "0a1b", "0c2d", "1.jpg")
    spec = SourceSpec(uri=str(tmp_path), format="files", include="0*")
    assert keys_of(list(list_shards(spec, storage))) == ["0a1b", "0c2d"]
    assert names_of(storage, tmp_path / "0a1b", format="tar") == [("tar", "0a1b")]


def test_a_mixed_source_is_refused_by_naming_two_of_a_kind(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "1.tar", "2.tar", "preview.jpg")
    with pytest.raises(UsageError) as failure:
        names_of(storage, tmp_path)
    assert str(failure.value) == (
        f"source {tmp_path} is mixed: tar (file://{tmp_path}/1.tar) and "
        f"files (file://{tmp_path}/preview.jpg); set source.format or source.include"
    )


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        ([], {}, r"\(include '\*'\) holds nothing; check source.uri"),
        (
            ["a.txt", "b.txt"],
            {},
            r"no tar or Parquet shards or image files, but other things, such as .*a\.txt",
        ),
        (["a.jpg"], {"format": "tar"}, r"no tar objects, but other things, such as .*a\.jpg"),
        (["a.jpg"], {"include": "b*"}, r"\(include 'b\*'\) holds nothing"),
    ],
)
def test_a_source_without_images_is_refused_by_naming_what_there_is(
    storage: Storage, tmp_path: Path, names: list[str], settings: dict[str, str], problem: str
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(UsageError, match=problem):
        names_of(storage, tmp_path, **settings)


def test_an_absent_folder_is_refused_when_the_listing_is_asked_for(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"source file://{tmp_path}/nowhere does not exist"):
        list_shards(SourceSpec(uri=f"{tmp_path}/nowhere"), storage)
    with pytest.raises(UsageError, match=r"is no object; a list is one Parquet or CSV file"):
        list_shards(SourceSpec(uri=str(tmp_path), format="list"), storage)


def test_a_wrong_column_is_refused_before_anything_is_read(storage: Storage, tmp_path: Path) -> None:
    fill(tmp_path, "1.parquet")
    with pytest.raises(UsageError, match=r"no column 'photo': .*1\.parquet has the columns image \(binary\)"):
        list_shards(SourceSpec(uri=str(tmp_path), image_column="photo"), storage)


def test_a_damaged_first_shard_does_not_keep_the_others_from_being_listed(
    storage: Storage, tmp_path: Path
) -> None:
    fill(tmp_path, "2.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1 damaged")
    assert [name for _, name in names_of(storage, tmp_path)] == ["1.parquet", "2.parquet"]


def test_one_parquet_is_a_list_only_where_it_has_uris_and_no_images(storage: Storage, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "uri": ["a"]}), tmp_path / "1.parquet")
    assert names_of(storage, tmp_path / "1.parquet") == [("parquet", "1.parquet")]
    assert names_of(storage, tmp_path / "1.parquet", image_column="photo") == [("files", "1.parquet")]


def test_a_file_name_that_is_not_utf8_becomes_an_id_that_is(storage: Storage, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    assert keys_of(list(list_shards(SourceSpec(uri=str(tmp_path)), storage))) == ["caf\\xe9.jpg"]
