"""A list of images by URI: a Parquet or CSV file with a column `uri`.

A URI may be in any storage we read; one without a scheme counts from the list's folder. image_id is the URI
as it stands in the list.
"""

import re
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
from pyarrow import csv

from jobs.lake.object_table import ObjectTable
from jobs.lake.parquet_source import check_plain, open_parquet
from jobs.lake.shards import ImageIds, Shard
from jobs.lake.storage import ObjectInfo, Storage
from schemas.errors import UsageError
from schemas.spec_fields import SIGNATURE

URI_COLUMN = "uri"
_CREDENTIALS = re.compile(r"^[a-z0-9+.-]+://[^/]*[@:]", re.IGNORECASE)  # user:password@host, host:port


def list_slices(info: ObjectInfo, storage: Storage, slice_images: int) -> Iterator[Shard]:
    """Give the list's images in slices; what is wrong with one of them shows when it is read.

    Raises:
        UsageError: not a list: damaged, no such column, or a row without a URI.
    """
    folder, _, name = info.uri.rpartition("/")
    ids = ImageIds(skip=())
    objects = (_object(uri, folder, ids) for uri in _uris(info, storage))
    while batch := ObjectTable.of(islice(objects, slice_images)):
        yield Shard(info.uri, name, "files", None, batch)


def _object(uri: str, folder: str, ids: ImageIds) -> tuple[str, ObjectInfo | None]:
    claimed = ids.claim(uri)
    whole_uri = uri if "://" in uri or uri.startswith("/") else f"{folder}/{uri}"
    return claimed.image_id, None if claimed.repeated else ObjectInfo(whole_uri, -1, None, "")


def _uris(info: ObjectInfo, storage: Storage) -> Iterator[str]:
    try:
        yield from _csv_uris(info, storage) if info.uri.endswith(".csv") else _parquet_uris(info, storage)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"list {info.uri} cannot be read: {error}; mend the file") from error


def _parquet_uris(info: ObjectInfo, storage: Storage) -> Iterator[str]:
    with storage.open_verified(info) as stream:
        file = open_parquet(stream)
        _check_column(file.schema_arrow.names, info)
        check_plain(file.schema_arrow, URI_COLUMN, info.uri)
        yield from _texts(file.iter_batches(columns=[URI_COLUMN]), info)


def _csv_uris(info: ObjectInfo, storage: Storage) -> Iterator[str]:
    with storage.open_verified(info) as stream:
        _check_column(csv.open_csv(stream).schema.names, info)
        stream.seek(0)
        text_only = csv.ConvertOptions(include_columns=[URI_COLUMN], column_types={URI_COLUMN: pa.string()})
        yield from _texts(csv.open_csv(stream, convert_options=text_only), info)


def _check_column(names: list[str], info: ObjectInfo) -> None:
    if URI_COLUMN not in names:
        raise UsageError(
            f"list {info.uri} has the columns {', '.join(names)}; wanted one named '{URI_COLUMN}'"
        )


def _texts(batches: Iterator[pa.RecordBatch], info: ObjectInfo) -> Iterator[str]:
    row = 0
    for batch in batches:
        for uri in batch.column(0).to_pylist():
            if not isinstance(uri, str) or not uri.strip():
                raise UsageError(f"list {info.uri}: row {row} has no URI ({uri!r}); remove the row")
            if _CREDENTIALS.search(uri) or SIGNATURE.search(uri):
                raise UsageError(
                    f"list {info.uri}: row {row} holds credentials or a signature, which would stand in the "
                    "label table as the image's id; name bucket and key alone"
                )
            row += 1
            yield uri
