import io
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SchemaMismatchError
from schemas.labels import (
    DETECTION_TYPE,
    LABEL_SCHEMA,
    PARQUET_OPTIONS,
    ErrorKind,
    Status,
    check_labels,
)


def label_row(**changes: Any) -> dict[str, Any]:
    detection = {
        "category_id": 18,
        "score": 0.75,
        "box": {"x0": 1.0, "y0": 2.0, "x1": 3.5, "y1": 4.5},
        "area": 5,
        "rle": b"PPYo1",
    }
    row = {
        "image_id": "shard-000.tar/000000123",
        "source": "s3://bucket/images",
        "shard": "shard-000.tar",
        "content_hash": bytes(16),
        "width": 640,
        "height": 480,
        "status": Status.OK,
        "model_id": "lite-0123456789ab",
        "run_id": "r1",
        "labeled_at": datetime(2026, 1, 2, tzinfo=UTC),
        "num_detections": 1,
        "max_score": 0.75,
        "detections": [detection],
    }
    return row | changes


def retyped(name: str, field: "pa.Field[Any] | None") -> pa.Schema:
    """The label schema with one column replaced, or left out."""
    index = LABEL_SCHEMA.get_field_index(name)
    return LABEL_SCHEMA.remove(index) if field is None else LABEL_SCHEMA.set(index, field)


def mismatch(schema: pa.Schema) -> str:
    with pytest.raises(SchemaMismatchError) as caught:
        check_labels(schema, "fragment 00017")
    return str(caught.value)


def test_columns_and_types_are_those_of_the_design() -> None:
    box = pa.struct([pa.field(side, pa.float32(), nullable=False) for side in ("x0", "y0", "x1", "y1")])
    assert {field.name: field.type for field in LABEL_SCHEMA} == {
        "image_id": pa.string(),
        "source": pa.string(),
        "shard": pa.string(),
        "object_version": pa.string(),
        "content_hash": pa.binary(16),
        "width": pa.int32(),
        "height": pa.int32(),
        "status": pa.string(),
        "error_kind": pa.string(),
        "error": pa.string(),
        "model_id": pa.string(),
        "run_id": pa.string(),
        "labeled_at": pa.timestamp("us", tz="UTC"),
        "num_detections": pa.int32(),
        "max_score": pa.float32(),
        "detections": pa.list_(pa.field("element", DETECTION_TYPE, nullable=False)),
    }
    assert [field.name for field in DETECTION_TYPE] == ["category_id", "score", "box", "area", "rle"]
    assert DETECTION_TYPE.field("box").type == box


def test_every_column_is_described_and_every_length_has_its_unit() -> None:
    assert all(field.metadata and field.metadata[b"description"] for field in LABEL_SCHEMA)
    lengths = [LABEL_SCHEMA.field("width"), LABEL_SCHEMA.field("height"), DETECTION_TYPE.field("area")]
    assert all(field.metadata is not None and field.metadata[b"unit"] == b"px" for field in lengths)


def test_the_label_schema_passes_in_any_column_order_and_without_metadata() -> None:
    check_labels(LABEL_SCHEMA, "itself")
    check_labels(pa.schema(list(reversed(list(LABEL_SCHEMA)))), "reversed")


def test_every_mismatch_is_named_at_once_with_where_and_remedy() -> None:
    schema = retyped("max_score", pa.field("max_score", pa.float64()))
    schema = schema.remove(schema.get_field_index("run_id"))
    schema = schema.append(pa.field("runid", pa.string()))
    schema = schema.set(schema.get_field_index("status"), pa.field("status", pa.string()))
    assert mismatch(schema) == (
        "fragment 00017 does not have label schema v2 (4 mismatches): "
        "column 'status' may be null, wanted not null; "
        "column 'run_id' is missing, wanted string, not null; "
        "column 'max_score' is double, wanted float; "
        "column 'runid' is not in the schema, did you mean 'run_id'?. "
        "Build the rows with schema=schemas.labels.LABEL_SCHEMA, or cast them to it."
    )


def test_a_mismatch_inside_a_detection_has_its_dotted_path() -> None:
    fields = [field for field in DETECTION_TYPE if field.name != "rle"]
    fields[1] = pa.field("score", pa.float64(), nullable=False)
    message = mismatch(retyped("detections", pa.field("detections", pa.list_(pa.struct(fields)))))
    assert "(3 mismatches)" in message
    assert "field 'detections[].score' is double, wanted float" in message
    assert "field 'detections[].rle' is missing, wanted binary, not null" in message
    assert "elements of column 'detections' may be null, wanted not null" in message


def test_detections_that_are_no_list_are_refused() -> None:
    assert "column 'detections' is string" in mismatch(
        retyped("detections", pa.field("detections", pa.string()))
    )


def test_fields_of_a_struct_in_another_order_are_refused() -> None:
    swapped = pa.struct([DETECTION_TYPE.field(i) for i in (1, 0, 2, 3, 4)])
    field = pa.field("detections", pa.list_(pa.field("item", swapped, nullable=False)))
    assert "in the order score, category_id, box, area, rle" in mismatch(retyped("detections", field))


def test_a_column_that_stands_twice_is_refused() -> None:
    assert "column 'width' stands there more than once" in mismatch(
        LABEL_SCHEMA.append(LABEL_SCHEMA.field("width"))
    )


def test_rows_of_a_later_schema_version_are_refused() -> None:
    later = LABEL_SCHEMA.with_metadata({b"masklake.label_schema_version": b"3"})
    assert "it says label schema version 3, wanted 2" in mismatch(later)


def test_a_column_that_came_later_may_be_missing_in_a_table_of_before() -> None:
    before = LABEL_SCHEMA.remove(LABEL_SCHEMA.get_field_index("object_version")).remove_metadata()
    check_labels(before, "a table", version=1)
    assert "(1 mismatch): column 'object_version' is missing, wanted string." in mismatch(before)
    with pytest.raises(SchemaMismatchError, match="column 'shard' is missing"):
        check_labels(before.remove(before.get_field_index("shard")), "a table", version=1)


def test_an_empty_schema_names_all_columns() -> None:
    message = mismatch(pa.schema([]))
    assert "(16 mismatches)" in message
    assert all(f"'{name}' is missing" in message for name in LABEL_SCHEMA.names)


def test_rows_survive_parquet_with_the_encodings_of_the_design() -> None:
    rows = [
        label_row(),
        label_row(image_id="b", num_detections=0, max_score=None, detections=[]),
        label_row(
            image_id="c",
            status=Status.FAILED,
            error_kind=ErrorKind.EMPTY,
            error="zero bytes",
            width=None,
            height=None,
            num_detections=None,
            max_score=None,
            detections=None,
        ),
    ]
    table = pa.Table.from_pylist(rows, schema=LABEL_SCHEMA).drop_columns(["model_id"])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **PARQUET_OPTIONS) as writer:
        writer.write_table(table)

    file = pq.ParquetFile(sink, page_checksum_verification=True)
    assert file.read().equals(table)
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "DELTA_LENGTH_BYTE_ARRAY" in columns["detections.list.element.rle"].encodings
    floats = ["max_score", *(f"detections.list.element.{leaf}" for leaf in ("score", "box.x0", "box.y1"))]
    assert all("BYTE_STREAM_SPLIT" in columns[path].encodings for path in floats)
    assert "RLE_DICTIONARY" in columns["shard"].encodings
    assert columns["image_id"].has_column_index
    statistics = columns["image_id"].statistics
    assert statistics is not None
    assert (statistics.min, statistics.max) == ("b", "shard-000.tar/000000123")


def test_an_empty_table_survives_parquet() -> None:
    table = LABEL_SCHEMA.empty_table().drop_columns(["model_id"])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **PARQUET_OPTIONS) as writer:
        writer.write_table(table)
    assert pq.ParquetFile(sink).read().equals(table)
