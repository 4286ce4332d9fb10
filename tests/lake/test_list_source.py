"""Lists of URIs in Parquet and CSV become slices; what is no list is refused in one line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.list_source import list_slices
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec


def write_list(path: Path, uris: list[str]) -> None:
    table = pa.table({"split": ["train"] * len(uris), "uri": uris})
    if path.suffix == ".csv":
        lines = [f'train,"{uri}"' for uri in uris]
        path.write_text("\n".join(["split,uri", *lines]) + "\n")
    else:
        pq.write_table(table, path)


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "list.pq"])
def test_images_come_from_wherever_their_uri_leads_and_are_called_by_it(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "1.jpg").write_bytes(b"one")
    (tmp_path / "far, and wide").write_bytes(b"two")
    storage.write_bytes("memory://listed/3", b"three")
    uris = ["near/1.jpg", f"file://{tmp_path}/far, and wide", "memory://listed/3", "gone.jpg", "near/1.jpg"]
    write_list(tmp_path / name, uris)
    spec = SourceSpec(uri=str(tmp_path / name))
    (shard,) = list_shards(spec, storage)
    assert (shard.name, len(shard.objects)) == (name, 5)
    images = list(ShardReader(shard, spec, storage, frozenset()))
    assert [(image.image_id, image.data or image.error_kind) for image in images] == [
        ("near/1.jpg", b"one"),
        (uris[1], b"two"),
        ("memory://listed/3", b"three"),
        ("gone.jpg", ErrorKind.MISSING),
        ("near/1.jpg#2", ErrorKind.DUPLICATE_KEY),
    ]


def test_a_long_list_comes_in_slices_and_knows_repetitions_across_them(
    storage: Storage, tmp_path: Path
) -> None:
    write_list(tmp_path / "list.csv", [*(f"{n}.jpg" for n in range(7)), "0.jpg", "0.jpg"])
    slices = list(list_slices(storage.stat(str(tmp_path / "list.csv")), storage, 4))
    assert [len(shard.objects) for shard in slices] == [4, 4, 1]
    assert {shard.name for shard in slices} == {"list.csv"}
    assert [image_id for shard in slices for image_id, _ in shard.objects][-2:] == ["0.jpg#2", "0.jpg#3"]
    assert slices[1].objects[3] == ("0.jpg#2", None)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("list.csv", "split,url\ntrain,a.jpg\n", r"has the columns split, url; wanted one named 'uri'"),
        ("list.csv", "uri\n", "is a list without a row"),
        ("list.csv", "", "cannot be read: Empty CSV file"),
        ("list.csv", 'uri,n\n"a.jpg,1\nb.jpg\n', "cannot be read: "),
        ("list.csv", "uri,n\na.jpg,1\n,2\n", r"row 1 has no URI"),
        ("list.parquet", "not parquet", "cannot be read: "),
        ("list.txt", "a.jpg\n", r"a list ends in \.parquet, \.pq or \.csv"),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(
    storage: Storage, tmp_path: Path, name: str, content: str, problem: str
) -> None:
    (tmp_path / name).write_text(content)
    spec = SourceSpec(uri=str(tmp_path / name), format="list")
    with pytest.raises(UsageError, match=problem):
        list(list_shards(spec, storage))


def test_a_parquet_list_without_the_column_is_refused_with_those_it_has(
    storage: Storage, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"url": ["a"], "n": [1]}), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match="has the columns url, n; wanted one named 'uri'"):
        list_shards(SourceSpec(uri=str(tmp_path / "list.parquet"), format="list"), storage)


def test_uris_that_make_no_sense_fail_alone(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "good one.jpg").write_bytes(b"x")
    uris = ["nul\0.jpg", "two\nlines.jpg", "猫.jpg", "good one.jpg", "s3:///", "x" * 5000, "http://a/b.jpg"]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "list.parquet")
    spec = SourceSpec(uri=str(tmp_path / "list.parquet"))
    (shard,) = list_shards(spec, storage)
    images = list(ShardReader(shard, spec, storage, frozenset()))
    assert [image.image_id for image in images] == uris
    assert [image.image_id for image in images if image.error_kind is None] == ["good one.jpg"]


def test_a_list_that_is_not_utf_8_is_refused_in_one_line(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"uri\n\xff\xfe.jpg\n")
    with pytest.raises(UsageError, match="UTF8") as refusal:
        list(list_shards(SourceSpec(uri=str(tmp_path / "list.csv")), storage))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://ada:pa55word@photos.example/1.jpg",
        "s3://AKIA0:wJal/rXUt@bucket/1.jpg",
        "https://bucket.s3.amazonaws.com/1.jpg?X-Amz-Signature=pa55word",
        "https://blob.example/1.jpg?sv=2026&sig=pa55word",
    ],
)
def test_a_secret_in_a_list_is_refused_before_it_becomes_an_image_id(
    storage: Storage, tmp_path: Path, uri: str
) -> None:
    write_list(tmp_path / "list.csv", ["1.jpg", uri])
    with pytest.raises(UsageError, match="row 1 holds credentials or a signature") as refused:
        list(list_shards(SourceSpec(uri=str(tmp_path / "list.csv")), storage))
    assert "pa55word" not in str(refused.value)


def test_names_that_look_a_little_like_secrets_are_names(storage: Storage, tmp_path: Path) -> None:
    uris = ["a@b:c.jpg", "s3://bucket/2026@12:30.jpg", "folder/big?size=9.jpg"]
    write_list(tmp_path / "list.csv", uris)
    (shard,) = list_shards(SourceSpec(uri=str(tmp_path / "list.csv")), storage)
    assert [image_id for image_id, _ in shard.objects] == uris
