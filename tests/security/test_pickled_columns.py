"""A column of Ray's type for pickled objects is never looked at, whoever made the file.

Ray Data, once imported, makes Arrow run the pickle of a value of such a column as soon as it becomes a Python
object; a Parquet or Arrow file only has to name the type.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from jobs.lake.fragments import FILE_SCHEMA
from jobs.lake.listing import Listing
from jobs.lake.shard_index import load_shard_index, save_shard_index
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from jobs.train.image_locations import locate_images
from jobs.train.records import Problems
from jobs.train.set_file import FACTS_KEY, FACTS_VERSION
from jobs.train.training_set import TrainingSet
from schemas.errors import UsageError
from schemas.labels import LABEL_SCHEMA
from schemas.specs import SourceSpec, StorageSpec


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """What is there once a pickle was run."""
    return tmp_path / "it was run"


@pytest.fixture
def pickled(sentinel: Path) -> Any:
    """A column of one such value."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    values = pa.array([pickle.dumps(MakesFolder(sentinel))], pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), values)


def test_such_a_column_runs_what_it_holds_where_nobody_looks_first(
    pickled: Any, tmp_path: Path, sentinel: Path
) -> None:
    """What the other tests stand on: should Ray mend it, they show nothing."""
    pq.write_table(pa.table({"image": pickled}), tmp_path / "a.parquet")
    pq.ParquetFile(tmp_path / "a.parquet").read().to_pylist()
    assert sentinel.is_dir()


def read_all(uri: str, **spec: Any) -> None:
    source, storage = SourceSpec(uri=uri, **spec), Storage(StorageSpec())
    for shard in list_shards(source, storage):
        list(ShardReader(shard, source, storage, frozenset()))


@pytest.mark.parametrize("place", ["image", "beside its bytes", "id", "list"])
def test_a_source_with_such_a_column_is_refused(
    place: str, pickled: Any, tmp_path: Path, sentinel: Path
) -> None:
    data = pa.array([b"x"])
    struct = pa.StructArray.from_arrays([data, pickled], ["bytes", "path"])
    columns = {
        "image": {"image": pickled},
        "beside its bytes": {"image": struct},
        "id": {"image": data, "id": pickled},
        "list": {"uri": pickled},
    }[place]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    spec: dict[str, Any] = {"id_column": "id"} if place == "id" else {}
    with pytest.raises(UsageError, match="extension"):
        read_all(str(path), format="list" if place == "list" else "parquet", **spec)
    with pytest.raises(UsageError):
        list(locate_images(SourceSpec(uri=str(path), **spec), Storage(StorageSpec()), Problems()))
    assert not sentinel.exists()


def test_such_a_column_that_nobody_reads_does_no_harm(pickled: Any, tmp_path: Path, sentinel: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x"]), "other": pickled}), tmp_path / "a.parquet")
    read_all(f"{tmp_path}/a.parquet", format="parquet")
    assert not sentinel.exists()


def test_a_listing_that_a_lake_keeps_is_not_run(
    pickled: Any, tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the lake may not therefore run code in those who read it."""
    monkeypatch.setattr("jobs.lake.listing._MAX_HELD", 0)  # small ones are not kept
    storage = Storage(StorageSpec())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"x")
    source, lake = SourceSpec(uri=f"{tmp_path}/images", listing_max_age_s=1e9), f"file://{tmp_path}/lake"
    with Listing.of(source, storage, lake) as listing:
        listing.keep(source, storage, lake)
    (kept,) = (tmp_path / "lake" / "listings").rglob("*.parquet")
    table = pq.read_table(kept)
    columns = {name: pickled if name == "image_id" else table[name] for name in table.column_names}
    pq.write_table(pa.table(columns), kept)
    with Listing.of(source, storage, lake) as listing:
        assert [image_id for shard in listing for image_id, _ in shard.objects] == ["1.jpg"]
    assert not sentinel.exists()


def test_a_shard_index_of_a_lake_is_not_run(pickled: Any, tmp_path: Path, sentinel: Path) -> None:
    storage, lake = Storage(StorageSpec()), f"file://{tmp_path}/lake"
    save_shard_index(storage, lake, "source", "model", "run", {("shard", "v"): 1})
    (path,) = (tmp_path / "lake").rglob("*.parquet")
    pq.write_table(pa.table({"shard": pickled, "version": ["v"], "num_images": [1]}), path)
    load_shard_index(storage, lake, "source", "model")
    assert not sentinel.exists()


def test_a_label_table_is_not_run(pickled: Any, tmp_path: Path, sentinel: Path) -> None:
    """Its files are read as the label schema, whatever they say of themselves."""
    pq.write_table(pa.table({"image_id": pickled, "shard": ["s"]}), tmp_path / "a.parquet")
    filesystem, parquet = pafs.LocalFileSystem(), pads.ParquetFileFormat()
    fragment = parquet.make_fragment(f"{tmp_path}/a.parquet", filesystem)
    dataset = pads.FileSystemDataset([fragment], LABEL_SCHEMA, parquet, filesystem)
    with suppress(pa.ArrowInvalid):  # a pickle is no text
        dataset.to_table(columns=["image_id"]).to_pylist()
    with suppress(pa.ArrowInvalid):
        pq.read_table(tmp_path / "a.parquet", schema=FILE_SCHEMA).to_pylist()
    assert not sentinel.exists()


def test_a_training_set_with_such_a_column_is_refused(pickled: Any, tmp_path: Path, sentinel: Path) -> None:
    table = pa.table({"height": pickled, "width": pickled})
    facts = {"version": FACTS_VERSION, "fingerprint": "", "problems": {}, "description": {}}
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        (batch,) = table.to_batches()
        writer.write_batch(batch, custom_metadata={FACTS_KEY: json.dumps(facts).encode()})
    with pytest.raises(UsageError, match="is not a training set"):
        TrainingSet(tmp_path / "a.arrow")
    assert not sentinel.exists()
