"""Many objects with the image ids they go by, as Arrow columns: a hundred bytes each, and bytes when pickled.

Ten million of them pass through a plan; as Python objects they would take five gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.lake.store import ObjectInfo

# uri as bytes, for a file's name on a disk need not be text; null where a list names the same image again.
_COLUMNS: dict[str, pa.DataType] = {
    "image_id": pa.string(),
    "uri": pa.binary(),
    "size": pa.int64(),
    "etag": pa.string(),
    "version": pa.string(),
}
OBJECT_SCHEMA: pa.Schema = pa.schema(_COLUMNS)

NamedObject = tuple[str, ObjectInfo | None]


class ObjectTable(Sequence[NamedObject]):
    """(image_id, object) in the order of a listing; None for an object that a list named before.

    Args:
        columns: OBJECT_SCHEMA.
    """

    def __init__(self, columns: pa.Table) -> None:
        self.columns = columns

    @classmethod
    def of(cls, objects: Iterable[NamedObject]) -> ObjectTable:
        rows = [
            (image_id, None, 0, None, "")
            if info is None
            else (image_id, info.uri.encode(errors="surrogateescape"), info.size, info.etag, info.version)
            for image_id, info in objects
        ]
        values = zip(*rows, strict=True) if rows else [()] * len(_COLUMNS)
        arrays = [pa.array(column, kind) for column, kind in zip(values, _COLUMNS.values(), strict=True)]
        return cls(pa.Table.from_arrays(arrays, schema=OBJECT_SCHEMA))

    @property
    def image_ids(self) -> pa.ChunkedArray[Any]:
        return self.columns["image_id"]

    @property
    def num_bytes(self) -> int:
        """Of all objects; those whose size is not known count as nothing."""
        sizes = self.columns["size"]
        return int(pc.sum(pc.max_element_wise(sizes, 0)).as_py() or 0)

    def part(self, start: int, num_objects: int) -> ObjectTable:
        return ObjectTable(self.columns.slice(start, num_objects))

    def where(self, wanted: Sequence[bool] | NDArray[np.bool_]) -> ObjectTable:
        """Those for which it is true; as many as there are objects."""
        return ObjectTable(self.columns.filter(pa.array(wanted, pa.bool_())))

    def __len__(self) -> int:
        return self.columns.num_rows

    def __iter__(self) -> Iterator[NamedObject]:
        for row in self.columns.to_pylist():
            yield row["image_id"], None if row["uri"] is None else _info(row)

    @overload
    def __getitem__(self, index: int) -> NamedObject: ...
    @overload
    def __getitem__(self, index: slice) -> ObjectTable: ...
    def __getitem__(self, index: int | slice) -> NamedObject | ObjectTable:
        if isinstance(index, slice):
            return ObjectTable(self.columns[index])
        place = range(len(self))[index]
        (found,) = self.part(place, 1)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectTable) and bool(self.columns.equals(other.columns))

    def __hash__(self) -> int:
        return hash((len(self), self[0] if len(self) else None))

    def __reduce__(self) -> tuple[Any, ...]:
        """Only its own rows, compressed; Arrow would send all that a slice is a slice of."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(
            sink, OBJECT_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as out:
            out.write_table(self.columns.combine_chunks())
        return _from_ipc, (sink.getvalue().to_pybytes(),)


def concat(tables: Iterable[ObjectTable]) -> ObjectTable:
    return ObjectTable(pa.concat_tables([NO_OBJECTS.columns, *(table.columns for table in tables)]))


def _info(row: dict[str, Any]) -> ObjectInfo:
    uri = row["uri"].decode(errors="surrogateescape")
    return ObjectInfo(uri, row["size"], row["etag"], row["version"])


def _from_ipc(data: bytes) -> ObjectTable:
    with pa.ipc.open_stream(data) as stream:
        return ObjectTable(stream.read_all())


NO_OBJECTS = ObjectTable.of(())
