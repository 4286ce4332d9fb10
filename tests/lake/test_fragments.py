"""Fragments, jobs/lake/fragments.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lake.fragments import (
    FRAGMENT_SCHEMA,
    Fragment,
    check_model_id,
    delta_stats,
    is_fragment,
    write_fragment,
)
from jobs.lake.storage import Storage
from schemas.errors import SchemaMismatchError, UsageError
from schemas.labels import LABEL_SCHEMA

MODEL = "lite-0123456789ab"


def test_a_fragment_is_one_parquet_file_sorted_by_image_id(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str, tmp_path: Path
) -> None:
    rows = make_rows(["c", "a", "b"], MODEL)
    fragment = write_fragment(rows, ["unit-1"], lake, MODEL, storage)

    written = tmp_path / "lake" / "labels" / fragment.path
    assert written.stat().st_size == fragment.size_bytes
    back = pq.ParquetFile(written).read()
    assert back.column_names == [name for name in LABEL_SCHEMA.names if name != "model_id"]
    assert back["image_id"].to_pylist() == ["a", "b", "c"]
    assert back.equals(rows.sort_by("image_id").drop_columns("model_id"))
    assert back.schema.field("content_hash").type == pa.binary(16)


def test_a_fragment_counts_what_became_of_its_images(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str
) -> None:
    rows = make_rows(["a", "b", "c"], MODEL, failed={"b": "truncated"})
    fragment = write_fragment(rows, ["unit-1", "unit-2"], lake, MODEL, storage)
    assert (fragment.num_rows, fragment.num_ok, fragment.num_failed) == (3, 2, 1)
    assert fragment.unit_ids == ("unit-1", "unit-2")


def test_the_same_rows_written_twice_make_two_files(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str
) -> None:
    rows = make_rows(["a"], MODEL)
    first = write_fragment(rows, ["unit-1"], lake, MODEL, storage)
    second = write_fragment(rows, ["unit-1"], lake, MODEL, storage)
    assert first.path != second.path
    assert first.path.split("-")[:2] == second.path.split("-")[:2]
    assert is_fragment(first.path)
    assert not is_fragment(first.path.replace(first.path.rpartition("/")[2], "merged-0.parquet"))


def test_masks_and_scores_are_encoded_as_the_schema_says(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str, tmp_path: Path
) -> None:
    # Element fields are often called "item"; the encodings are given by path, so the name must be mended.
    rows = make_rows(["a", "b"], MODEL)
    element = LABEL_SCHEMA.field("detections").type.value_field.with_name("item")
    rows = rows.set_column(
        rows.column_names.index("detections"),
        pa.field("detections", pa.list_(element)),
        rows["detections"].cast(pa.list_(element)),
    )
    fragment = write_fragment(rows, ["u"], lake, MODEL, storage)
    metadata = pq.ParquetFile(tmp_path / "lake" / "labels" / fragment.path).metadata.row_group(0)
    columns = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
    assert "DELTA_LENGTH_BYTE_ARRAY" in columns["detections.list.element.rle"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["detections.list.element.score"].encodings
    assert columns["image_id"].compression == "ZSTD"
    assert columns["image_id"].is_stats_set
    assert columns["image_id"].has_column_index


def test_rows_of_another_schema_are_refused_and_nothing_is_written(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str, tmp_path: Path
) -> None:
    rows = make_rows(["a"], MODEL).drop_columns(["width", "error"])
    with pytest.raises(SchemaMismatchError, match=r"width.*error"):
        write_fragment(rows, ["unit-1"], lake, MODEL, storage)
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize("ids", [[], ["a", "b", "a"]])
def test_a_fragment_without_rows_or_with_an_image_twice_is_our_own_fault(
    ids: list[str], make_rows: Callable[..., pa.Table], storage: Storage, lake: str
) -> None:
    with pytest.raises(AssertionError, match="unit-1"):
        write_fragment(make_rows(ids, MODEL), ["unit-1"], lake, MODEL, storage)


def test_rows_of_another_model_are_our_own_fault(
    make_rows: Callable[..., pa.Table], storage: Storage, lake: str
) -> None:
    with pytest.raises(AssertionError, match="other model_id"):
        write_fragment(make_rows(["a"], "other-0123456789ab"), ["unit-1"], lake, MODEL, storage)


@pytest.mark.parametrize("model_id", ["", "a\nb", "x" * 300, "ü" * 60])
def test_a_model_id_that_cannot_be_a_folder_is_refused(model_id: str) -> None:
    with pytest.raises(UsageError, match="cannot name a partition"):
        check_model_id(model_id)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_fragment_survives_the_journey_as_a_row(
    as_numpy: bool, make_rows: Callable[..., pa.Table], storage: Storage, lake: str
) -> None:
    fragment = write_fragment(make_rows(["a"], MODEL), ["u1", "u2"], lake, MODEL, storage)
    table = pa.Table.from_pylist([fragment.to_row()], schema=FRAGMENT_SCHEMA)
    row: dict[str, Any] = table.to_pylist()[0]
    if as_numpy:
        row = {name: table[name].to_numpy()[0] for name in table.column_names}
    assert Fragment.from_row(row) == fragment


def test_stats_bound_every_value_and_count_nulls(make_rows: Callable[..., pa.Table]) -> None:
    stats = delta_stats(make_rows(["b", "ä", "a"], MODEL, failed={"b": "io"}, at_us=1_000_000_001_234_567))
    assert stats["numRecords"] == 3
    assert (stats["minValues"]["image_id"], stats["maxValues"]["image_id"]) == ("a", "ä")
    assert (stats["minValues"]["status"], stats["maxValues"]["status"]) == ("failed", "ok")
    assert stats["maxValues"]["error_kind"] == "io"
    assert stats["nullCount"]["error_kind"] == 2
    assert stats["nullCount"]["max_score"] == 1
    # Delta keeps milliseconds: rounded outwards, so that the bounds stay bounds.
    assert stats["minValues"]["labeled_at"] == "2001-09-09T01:46:41.234Z"
    assert stats["maxValues"]["labeled_at"] == "2001-09-09T01:46:41.235Z"
    assert "detections" not in stats["nullCount"]


def test_stats_of_a_column_without_values_are_absent(make_rows: Callable[..., pa.Table]) -> None:
    rows = make_rows(["a"], MODEL)
    assert "error_kind" not in delta_stats(rows)["minValues"]
    nan = rows.set_column(
        rows.column_names.index("max_score"),
        LABEL_SCHEMA.field("max_score"),
        pa.array([float("nan")], pa.float32()),
    )
    assert "max_score" not in json.loads(json.dumps(delta_stats(nan), allow_nan=False))["maxValues"]


def test_long_strings_are_cut_to_bounds_that_still_hold(make_rows: Callable[..., pa.Table]) -> None:
    longest = "k" * 400
    stats = delta_stats(make_rows([longest], MODEL))
    low, high = stats["minValues"]["image_id"], stats["maxValues"]["image_id"]
    assert low.encode() < longest.encode() < high.encode()
    assert len(high) == 256
    hopeless = "k" * 255 + "\U0010ffff" * 2
    stats = delta_stats(make_rows([hopeless], MODEL))
    assert stats["minValues"]["image_id"] == "k" * 255
    assert "image_id" not in stats["maxValues"]
