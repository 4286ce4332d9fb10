"""The label table, one row per image: its Arrow schema, how it is written to Parquet, and a check.

Enters: the schema of rows somebody made or read. Leaves: nothing, or a SchemaMismatchError that names every
difference.
"""

import difflib
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pyarrow as pa

from schemas.errors import SchemaMismatchError

LABEL_SCHEMA_VERSION = 2
# Columns that tables of an earlier version lack, and the version that has them first.
ADDED_COLUMNS = {"object_version": 2}
_VERSION_KEY = b"masklake.label_schema_version"


class Status(StrEnum):
    """What became of an image. In = ok + failed out, always."""

    OK = "ok"
    FAILED = "failed"
    REMOVED = "removed"


class ErrorKind(StrEnum):
    """Why an image is `failed`; the values of column `error_kind`."""

    EMPTY = "empty"  # zero bytes
    TRUNCATED = "truncated"  # the data end early
    CORRUPT = "corrupt"  # the decoder refuses them, or a checksum differs
    UNSUPPORTED = "unsupported"  # not an image format we take, an HTML page for one
    TOO_LARGE = "too_large"  # over the pixel or byte ceiling
    MISSING = "missing"  # listed but not found
    IO = "io"  # storage failed, after retries
    DUPLICATE_KEY = "duplicate_key"  # the key stands twice in its shard
    CRASHED = "crashed"  # the process that worked on it died
    TIMEOUT = "timeout"  # decoding took longer than an image may
    INTERNAL = "internal"  # our own fault: the network raised on this image


def _field(
    name: str, kind: pa.DataType, description: str, unit: str | None = None, *, nullable: bool
) -> "pa.Field[Any]":
    metadata = {b"description": description.encode()}
    if unit is not None:
        metadata[b"unit"] = unit.encode()
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


BOX_TYPE = pa.struct(
    [
        _field("x0", pa.float32(), "left edge", "px", nullable=False),
        _field("y0", pa.float32(), "top edge", "px", nullable=False),
        _field("x1", pa.float32(), "right edge; x1 - x0 is the width", "px", nullable=False),
        _field("y1", pa.float32(), "bottom edge; y1 - y0 is the height", "px", nullable=False),
    ]
)

DETECTION_TYPE = pa.struct(
    [
        _field("category_id", pa.int32(), "the data set's category, not the class index", nullable=False),
        _field("score", pa.float32(), "probability of the class, 0 to 1", nullable=False),
        _field("box", BOX_TYPE, "on the upright original image, absolute", nullable=False),
        _field("area", pa.int32(), "area of the mask", "px", nullable=False),
        _field("rle", pa.binary(), "mask: COCO compressed counts, size (height, width)", nullable=False),
    ]
)

LABEL_SCHEMA: pa.Schema = pa.schema(
    [
        _field("image_id", pa.string(), "stable key of the image inside its source", nullable=False),
        _field("source", pa.string(), "URI of the source", nullable=False),
        _field("shard", pa.string(), "the shard that held the image", nullable=False),
        _field(
            "object_version",
            pa.string(),
            "what the store called this state of the object that held the image; null: not known",
            nullable=True,
        ),
        _field(
            "content_hash", pa.binary(16), "BLAKE2b-128 of the encoded bytes; null: not read", nullable=True
        ),
        _field("width", pa.int32(), "after EXIF orientation; null: not decoded", "px", nullable=True),
        _field("height", pa.int32(), "after EXIF orientation; null: not decoded", "px", nullable=True),
        _field("status", pa.string(), "ok, failed or removed", nullable=False),
        _field("error_kind", pa.string(), "why it failed, for counting; null unless failed", nullable=True),
        _field("error", pa.string(), "why it failed, for reading; null unless failed", nullable=True),
        _field("model_id", pa.string(), "<name>-<12 hex> of weights and settings; partition", nullable=False),
        _field("run_id", pa.string(), "the run that made this row", nullable=False),
        _field("labeled_at", pa.timestamp("us", tz="UTC"), "when this row was made", nullable=False),
        _field("num_detections", pa.int32(), "length of detections; null unless ok", nullable=True),
        _field("max_score", pa.float32(), "best score; null where there is no detection", nullable=True),
        _field(
            "detections",
            pa.list_(pa.field("element", DETECTION_TYPE, nullable=False)),
            "best score first; null unless ok, empty where nothing was found",
            nullable=True,
        ),
    ],
    metadata={_VERSION_KEY: str(LABEL_SCHEMA_VERSION).encode()},
)


def check_labels(schema: pa.Schema, where: str, version: int = LABEL_SCHEMA_VERSION) -> None:
    """Compare a schema with LABEL_SCHEMA. Columns may come in any order, fields of a struct may not.

    Args:
        schema: of the rows or of the table in question.
        where: what it belongs to, for the message: "fragment 00017", a table's URI.
        version: columns that are younger may be missing.

    Raises:
        SchemaMismatchError: names every mismatch at once: missing and extra columns, types, nullability, and
            another version of the label schema. A schema without a version is compared by its columns alone.
    """
    wanted = [
        field
        for field in LABEL_SCHEMA
        if ADDED_COLUMNS.get(field.name, 0) <= version or field.name in schema.names
    ]
    problems = [*_version_problems(schema, version), *_field_problems(list(schema), wanted, "column ", "")]
    if not problems:
        return
    count = "1 mismatch" if len(problems) == 1 else f"{len(problems)} mismatches"
    raise SchemaMismatchError(
        f"{where} does not have label schema v{LABEL_SCHEMA_VERSION} ({count}): {'; '.join(problems)}. "
        f"Build the rows with schema=schemas.labels.LABEL_SCHEMA, or cast them to it."
    )


def _version_problems(schema: pa.Schema, version: int) -> Iterator[str]:
    got = (schema.metadata or {}).get(_VERSION_KEY)
    if got is not None and got != str(version).encode():
        yield f"it says label schema version {got.decode(errors='replace')}, wanted {version}"


def _field_problems(
    got_fields: "list[pa.Field[Any]]", wanted_fields: "list[pa.Field[Any]]", noun: str, prefix: str
) -> Iterator[str]:
    got_by_name = {field.name: field for field in got_fields}
    wanted_by_name = {field.name: field for field in wanted_fields}
    for name in (name for name, count in Counter(f.name for f in got_fields).items() if count > 1):
        yield f"{noun}'{prefix}{name}' stands there more than once"
    missing = [name for name in wanted_by_name if name not in got_by_name]
    for name, wanted in wanted_by_name.items():
        if name in missing:
            yield f"{noun}'{prefix}{name}' is missing, wanted {_describe(wanted)}"
        else:
            yield from _type_problems(got_by_name[name], wanted, f"{noun}'{prefix}{name}'", prefix + name)
    for name in got_by_name:
        if name not in wanted_by_name:
            nearest = difflib.get_close_matches(name, missing, n=1)
            hint = f", did you mean '{prefix}{nearest[0]}'?" if nearest else ""
            yield f"{noun}'{prefix}{name}' is not in the schema{hint}"


def _type_problems(got: "pa.Field[Any]", wanted: "pa.Field[Any]", what: str, path: str) -> Iterator[str]:
    if pa.types.is_struct(wanted.type) and pa.types.is_struct(got.type):
        got_children, wanted_children = list(got.type), list(wanted.type)
        yield from _field_problems(got_children, wanted_children, "field ", path + ".")
        got_names, wanted_names = [f.name for f in got_children], [f.name for f in wanted_children]
        if got_names != wanted_names and sorted(got_names) == sorted(wanted_names):
            got_order, wanted_order = ", ".join(got_names), ", ".join(wanted_names)
            yield f"{what} has its fields in the order {got_order}, wanted {wanted_order}"
    elif pa.types.is_list(wanted.type) and pa.types.is_list(got.type):
        # Elements are called "item" or "element" by taste of the library; only what they hold matters.
        yield from _type_problems(
            got.type.value_field, wanted.type.value_field, f"elements of {what}", path + "[]"
        )
    elif got.type != wanted.type:
        yield f"{what} is {got.type}, wanted {wanted.type}"
    if got.nullable and not wanted.nullable:
        yield f"{what} may be null, wanted not null"
    elif wanted.nullable and not got.nullable:
        yield f"{what} may not be null, wanted nullable"


def _describe(field: "pa.Field[Any]") -> str:
    kind = str(field.type) if not pa.types.is_nested(field.type) else str(field.type).split("<", 1)[0]
    return kind if field.nullable else f"{kind}, not null"


_ELEMENT = "detections.list.element"
_LOW_CARDINALITY = ["source", "shard", "status", "error_kind", "run_id"]

# How a fragment is written: keyword arguments of pyarrow.parquet.ParquetWriter. The file holds every column
# but model_id, which stands in its path. Statistics only on what readers prune by: a mask has no minimum.
PARQUET_OPTIONS: dict[str, Any] = {
    "version": "2.6",
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": _LOW_CARDINALITY,
    "column_encoding": {
        f"{_ELEMENT}.rle": "DELTA_LENGTH_BYTE_ARRAY",
        f"{_ELEMENT}.score": "BYTE_STREAM_SPLIT",
        f"{_ELEMENT}.box.x0": "BYTE_STREAM_SPLIT",
        f"{_ELEMENT}.box.y0": "BYTE_STREAM_SPLIT",
        f"{_ELEMENT}.box.x1": "BYTE_STREAM_SPLIT",
        f"{_ELEMENT}.box.y1": "BYTE_STREAM_SPLIT",
        "max_score": "BYTE_STREAM_SPLIT",
    },
    "write_statistics": [
        "image_id",
        *_LOW_CARDINALITY,
        "width",
        "height",
        "labeled_at",
        "num_detections",
        "max_score",
    ],
    "write_page_index": True,
    "write_page_checksum": True,
}
