"""The shards of a source: what a listing holds, told apart by name, in order of the keys, streamed."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Literal, cast

import pyarrow as pa

from jobs.lake.list_source import URI_COLUMN, list_slices
from jobs.lake.object_table import ObjectTable
from jobs.lake.parquet_source import check_columns, open_parquet
from jobs.lake.shards import Shard, is_image_name
from jobs.lake.storage import AccessDeniedError, MissingObjectError, ObjectInfo, Storage
from schemas.errors import UsageError
from schemas.specs import SourceSpec

ShardFormat = Literal["tar", "parquet", "files"]
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PARQUET_SUFFIXES = (".parquet", ".pq")

# Objects of one slice: a read task of seconds, and a Shard that still travels as a small value.
SLICE_IMAGES = 512
# So much of a listing is looked at before the first shard is given: a mixed or empty source is refused at
# once.
_LOOK_AHEAD = 1000


def list_shards(spec: SourceSpec, storage: Storage, slice_images: int = SLICE_IMAGES) -> Iterator[Shard]:
    """Find the shards of a source, in order of their keys, streamed.

    `source.uri` is a folder or prefix, a glob ("s3://bucket/2024-*.tar"; "*" also crosses "/"), or one
    object. With format auto, names tell: .tar .tar.gz .tgz, .parquet .pq, or images by their suffix; other
    objects are passed over. One .parquet without `image_column` but with a column `uri`, or one .csv, is a
    list. With a format and an `include` both given, whatever the glob matches is taken for that format.

    Args:
        slice_images: objects of one slice at most.

    Raises:
        UsageError: nothing there, nothing we read, more than one format, or a Parquet source without the
            columns; when called, or while iterating where it shows only later.
    """
    try:
        return _list_shards(spec, storage, slice_images)
    except (MissingObjectError, AccessDeniedError) as error:
        raise UsageError(f"source {error}") from error


def _list_shards(spec: SourceSpec, storage: Storage, slice_images: int) -> Iterator[Shard]:
    single = _single_object(spec, storage)
    if single and _is_list(single, spec, storage):
        slices = list_slices(single, storage, slice_images)
        if (first := next(slices, None)) is None:
            raise UsageError(f"source {spec.uri} is a list without a row")
        return chain([first], slices)
    if single:
        folder = single.uri.rpartition("/")[0]
        found = _of_one_format(iter([single]), spec, spec.format != "auto")
    elif spec.format == "list":
        raise UsageError(f"source {spec.uri} is no object; a list is one Parquet or CSV file")
    else:
        folder, include = _split_glob(spec, storage)
        found = _of_one_format(storage.list(folder, include), spec, spec.format != "auto" and include != "*")
    head = list(islice(found, _LOOK_AHEAD))
    shard_format = head[0][0]
    objects = (info for _, info in chain(head, found))
    if shard_format == "files":
        return _slices(objects, folder, slice_images)
    if shard_format == "parquet":
        _check_columns(head[0][1], spec, storage)
    return (Shard(info.uri, _key(info.uri, folder), shard_format, info) for info in objects)


def _single_object(spec: SourceSpec, storage: Storage) -> ObjectInfo | None:
    try:
        return storage.stat(spec.uri)
    except (
        MissingObjectError,
        AccessDeniedError,
    ):  # who may list a prefix may yet be denied a look at its name
        return None


def _split_glob(spec: SourceSpec, storage: Storage) -> tuple[str, str]:
    """The folder to list, and the glob for the keys in it."""
    uri = storage.normalize(spec.uri)
    parts = uri.split("/")
    plain = next((i for i, part in enumerate(parts) if "*" in part or "?" in part), len(parts))
    if plain == len(parts):
        return uri, spec.include
    if spec.include != "*":
        raise UsageError(
            f"source {spec.uri} has a glob and source.include '{spec.include}' too; give one of them"
        )
    return "/".join(parts[:plain]), "/".join(parts[plain:])


def _is_list(single: ObjectInfo, spec: SourceSpec, storage: Storage) -> bool:
    is_parquet = single.uri.lower().endswith(_PARQUET_SUFFIXES)
    is_csv = single.uri.lower().endswith(".csv")
    if spec.format == "list" and not (is_parquet or is_csv):
        raise UsageError(f"source {spec.uri}: a list ends in .parquet, .pq or .csv")
    if spec.format != "auto" or not is_parquet:
        return spec.format == "list" or (spec.format == "auto" and is_csv)
    schema = _schema(single, storage)
    return schema is not None and spec.image_column not in schema.names and URI_COLUMN in schema.names


def _of_one_format(
    objects: Iterator[ObjectInfo], spec: SourceSpec, trusted: bool
) -> Iterator[tuple[ShardFormat, ObjectInfo]]:
    """Give the objects of the source's format with that format: at least one, all of one format, or a
    UsageError.

    Args:
        trusted: every object is of the spec's format, whatever its name.
    """
    wanted = cast(ShardFormat, spec.format) if spec.format != "auto" else None  # a list is no listing
    first: tuple[ShardFormat, ObjectInfo] | None = None
    passed_over: list[str] = []
    for info in objects:
        found = wanted if trusted else _format_of(info.uri)
        if found is None or wanted not in (None, found):
            if not passed_over:
                passed_over.append(info.uri)
            continue
        if first is None:
            first = (found, info)
        elif found != first[0]:
            raise UsageError(
                f"source {spec.uri} is mixed: {first[0]} ({first[1].uri}) and {found} ({info.uri}); "
                f"set source.format or source.include"
            )
        yield found, info
    if first is None:
        sort = f"{wanted} objects" if wanted else "tar or Parquet shards or image files"
        there = f"no {sort}, but other things, such as {passed_over[0]}" if passed_over else "nothing"
        raise UsageError(
            f"source {spec.uri} (include '{spec.include}') holds {there}; check source.uri, source.format "
            f"and source.include"
        )


def _format_of(uri: str) -> ShardFormat | None:
    name = uri.lower()
    if name.endswith(_TAR_SUFFIXES):
        return "tar"
    if name.endswith(_PARQUET_SUFFIXES):
        return "parquet"
    return "files" if is_image_name(name.rpartition("/")[2]) else None


def _slices(objects: Iterator[ObjectInfo], folder: str, slice_images: int) -> Iterator[Shard]:
    while batch := list(islice(objects, slice_images)):
        named = ObjectTable.of((_key(info.uri, folder), info) for info in batch)
        yield Shard(batch[0].uri, ".", "files", None, named)


def _key(uri: str, folder: str) -> str:
    """Below the folder. Bytes of a file name that are not UTF-8 become \\xNN: ids are text."""
    return uri[len(folder) + 1 :].encode(errors="surrogateescape").decode(errors="backslashreplace")


def _check_columns(info: ObjectInfo, spec: SourceSpec, storage: Storage) -> None:
    """Of the first shard, to refuse a wrong column before any work; each shard is checked when read."""
    if schema := _schema(info, storage):
        check_columns(schema, spec, info.uri)


def _schema(info: ObjectInfo, storage: Storage) -> pa.Schema | None:
    """From the footer alone; None where the file is damaged, which its reader will report as a failed row."""
    with storage.open_unverified(info) as stream:
        try:
            return open_parquet(stream).schema_arrow
        except (pa.ArrowException, OSError):
            return None
