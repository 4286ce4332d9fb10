"""Images of a Parquet shard: a binary column, or the struct<bytes, path> that Hugging Face datasets use.

image_id is the id column's value, or "<shard name>/<row:09d>". Row groups whose images are all to be skipped
are not read. Memory: a batch, and twice one page of the image column, as large as its writer made it (pyarrow
puts 1024 rows into one unless told otherwise).
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake.shards import MAX_IMAGE_BYTES, ClaimedId, ImageIds, Shard, SourceImage, duplicate, too_large
from jobs.lake.storage import CorruptObjectError, ObjectInfo, Storage
from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.specs import SourceSpec

# Decoded column data held at a time, unless one image alone is larger.
_BATCH_BYTES = 16 << 20
_MAX_BATCH_ROWS = 64  # also where a dictionary makes many images look like few bytes
# Pages are streamed from the file in reads of this size, instead of a row group's whole column at once.
_READ_BYTES = 1 << 20


def read_parquet(
    shard: Shard, info: ObjectInfo, spec: SourceSpec, storage: Storage, ids: ImageIds
) -> Iterator[SourceImage]:
    """Give the images in row order.

    A damaged row group gives a failed row for each of its images that could not be read, and the next one is
    read. A file that makes no sense as a whole gives one failed row, "<shard name>/#tail".

    Raises:
        UsageError: no such column, or not of a type that holds images or ids.
    """
    try:
        with storage.open_verified(info) as stream:
            file = open_parquet(stream)
            check_columns(file.schema_arrow, spec, info.uri)
            if file.metadata.num_rows > info.size:
                raise CorruptObjectError(
                    f"{info.uri}: {file.metadata.num_rows} rows in {info.size} bytes cannot be images"
                )
            first_row = 0
            for group in range(file.num_row_groups):
                yield from _row_group(file, group, first_row, shard, spec, ids)
                first_row += file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError, CorruptObjectError) as error:
        if _is_of_the_system(error):
            raise
        ids.is_whole = False
        claimed = ids.claim(f"{shard.name}/#tail")
        if claimed.wanted:
            problem = f"not read as Parquet: {error}"
            yield SourceImage.failed(claimed.image_id, shard.name, ErrorKind.CORRUPT, problem)


def open_parquet(stream: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(stream, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True)


def check_columns(schema: pa.Schema, spec: SourceSpec, uri: str) -> None:
    """Does the file have the columns that the spec names? Raises UsageError with the columns there are."""
    there_are = f"{uri} has the columns {', '.join(f'{field.name} ({field.type})' for field in schema)}"
    image_type = _type_of(schema, spec.image_column)
    if image_type is None:
        raise UsageError(f"no column '{spec.image_column}': {there_are}; set source.image_column")
    check_plain(schema, spec.image_column, uri)
    if not (_is_bytes(image_type) or _is_bytes(_struct_field(image_type, "bytes"))):
        raise UsageError(
            f"column '{spec.image_column}' is {image_type}, wanted encoded images as binary or "
            f"struct<bytes, path>: {there_are}; set source.image_column"
        )
    if spec.id_column is None:
        return
    id_type = _type_of(schema, spec.id_column)
    if id_type is None:
        raise UsageError(f"no column '{spec.id_column}': {there_are}; set source.id_column")
    if not (pa.types.is_string(id_type) or pa.types.is_large_string(id_type) or pa.types.is_integer(id_type)):
        raise UsageError(
            f"column '{spec.id_column}' is {id_type}, wanted strings or whole numbers: {there_are}; "
            f"set source.id_column"
        )


def check_plain(schema: pa.Schema, column: str, uri: str) -> None:
    """Refuse a column whose values Python code makes, such as Ray's pickled objects: a file only has to name
    such a type, and looking at a value runs what the file says.

    Raises:
        UsageError: it is one, or holds one.
    """
    kind = _type_of(schema, column)
    if kind is not None and _holds_extension(kind):
        raise UsageError(
            f"{uri}: column '{column}' is {kind}, an extension type, whose values can be programs; wanted "
            f"plain Parquet types"
        )


def _holds_extension(kind: pa.DataType) -> bool:
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else []
    inner += [kind.field(index).type for index in range(kind.num_fields)]
    return isinstance(kind, pa.BaseExtensionType) or any(map(_holds_extension, inner))


def _row_group(
    file: pq.ParquetFile, group: int, first_row: int, shard: Shard, spec: SourceSpec, ids: ImageIds
) -> Iterator[SourceImage]:
    claims = _claim_rows(file, group, first_row, shard, spec, ids)
    if not any(claimed.wanted for claimed, _ in claims):
        return
    num_read = 0
    problem = "the row group holds fewer rows than it claims"
    try:
        batch_rows = _batch_rows(file, group, spec.image_column)
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[spec.image_column]):
            for value in batch.column(0):
                claimed, refusal = claims[num_read]
                num_read += 1
                if claimed.wanted:
                    yield refusal or _image(claimed, shard.name, value.as_py())
    except (pa.ArrowException, OSError) as error:
        if _is_of_the_system(error):
            raise
        problem = str(error)
    ids.is_whole = ids.is_whole and num_read == len(claims)
    for claimed, refusal in claims[num_read:]:
        if claimed.wanted:
            yield refusal or _unread(claimed, shard.name, group, problem)


def _claim_rows(
    file: pq.ParquetFile, group: int, first_row: int, shard: Shard, spec: SourceSpec, ids: ImageIds
) -> list[tuple[ClaimedId, SourceImage | None]]:
    """The id of each row of a group, and the failed row that stands for its image if the id is no good."""
    row_keys = [
        f"{shard.name}/{row:09d}"
        for row in range(first_row, first_row + file.metadata.row_group(group).num_rows)
    ]
    if spec.id_column is None:
        return [(ids.claim(key), None) for key in row_keys]
    try:
        values = file.read_row_group(group, columns=[spec.id_column]).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        if _is_of_the_system(error):
            raise
        ids.is_whole = False
        claims = [ids.claim(key) for key in row_keys]
        return [(claimed, _unread(claimed, shard.name, group, str(error))) for claimed in claims]
    return [
        _claim_row(row_key, value, shard.name, spec.id_column, ids)
        for row_key, value in zip(row_keys, values, strict=True)
    ]


def _claim_row(
    row_key: str, value: object, shard: str, id_column: str, ids: ImageIds
) -> tuple[ClaimedId, SourceImage | None]:
    if value is None:
        claimed = ids.claim(row_key)
        problem = f"column '{id_column}' is null in this row, so the image has no id"
        return claimed, SourceImage.failed(claimed.image_id, shard, ErrorKind.MISSING, problem)
    claimed = ids.claim(str(value))
    return claimed, duplicate(claimed, shard) if claimed.repeated else None


def _image(claimed: ClaimedId, shard: str, value: bytes | dict[str, Any] | None) -> SourceImage:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        problem = f"the row has only a path ({path!r}), not the image's bytes: embed them"
        return SourceImage.failed(claimed.image_id, shard, ErrorKind.MISSING, problem)
    if data is None:
        return SourceImage.failed(claimed.image_id, shard, ErrorKind.EMPTY, "the image is null in this row")
    if len(data) > MAX_IMAGE_BYTES:
        return too_large(claimed.image_id, shard, len(data))
    return SourceImage(claimed.image_id, shard, data, None, None)


def _unread(claimed: ClaimedId, shard: str, group: int, problem: str) -> SourceImage:
    return SourceImage.failed(
        claimed.image_id, shard, ErrorKind.CORRUPT, f"row group {group} of {shard} is damaged: {problem}"
    )


def _batch_rows(file: pq.ParquetFile, group: int, column: str) -> int:
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    column_bytes = sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column
    )
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(column_bytes, 1)))


def _is_of_the_system(error: Exception) -> bool:
    """Arrow says OSError for damaged data too; only what comes from the operating system has a number."""
    return isinstance(error, OSError) and error.errno is not None


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    return schema.field(column).type if column in schema.names else None


def _struct_field(kind: pa.DataType, name: str) -> pa.DataType | None:
    if not isinstance(kind, pa.StructType) or kind.get_field_index(name) < 0:
        return None
    field_type: pa.DataType = kind.field(name).type
    return field_type


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
