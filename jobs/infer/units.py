"""What travels between the stages of the label job: one Arrow row a work unit.

    read  -> {unit_id, report, images}
    label -> {unit_id, report, rows}
    write -> {unit_id, report, fragment}

Ray Data may split or merge blocks but never a row, so a unit arrives whole or not at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa

from jobs.lake.sources import SourceImage
from schemas.labels import ErrorKind

_IMAGE_TYPE = pa.struct(
    [
        pa.field("image_id", pa.string()),
        pa.field("data", pa.large_binary()),  # encoded bytes; null where reading failed
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
        pa.field("version", pa.string()),
    ]
)


def _stage_schema(last: pa.Field[Any]) -> pa.Schema:
    return pa.schema([pa.field("unit_id", pa.string()), pa.field("report", pa.string()), last])


READ_SCHEMA = _stage_schema(pa.field("images", pa.list_(_IMAGE_TYPE)))
LABELLED_SCHEMA = _stage_schema(pa.field("rows", pa.large_binary()))
WRITTEN_SCHEMA = _stage_schema(pa.field("fragment", pa.string()))


@dataclass
class UnitReport:
    """What the stages say of a unit; each adds its own figures. Times are wall-clock seconds.

    A shard ends with a unit of no images, which says how many images the shard has in all, or why the rest of
    it could not be read.
    """

    shard: str
    node: str = ""  # where it was labelled
    num_images: int = 0
    unchanged: list[str] = field(default_factory=list)  # ids of images with the old content in another object
    encoded_bytes: int = 0
    num_detections: int = 0
    failed: dict[str, int] = field(default_factory=dict)  # by error kind
    read_s: float = 0.0
    decode_s: float = 0.0  # summed over the decoder processes
    label_s: float = 0.0
    write_s: float = 0.0
    shard_num_units: int | None = None
    shard_num_images: int | None = None  # with those that were skipped
    shard_version: str | None = None
    shard_gone: list[str] = field(default_factory=list)  # ids that have a row and are not in it any more
    shard_error: str | None = None
    write_error: str | None = None  # the unit's labels are lost; an exception would lose its type on the way

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UnitReport:
        return cls(**json.loads(text))

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    def count_failures(self, kinds: Sequence[str | None]) -> None:
        """Take the error_kind column of the unit's label rows."""
        self.failed = dict(Counter(str(kind) for kind in kinds if kind is not None))


def read_row(unit_id: str, report: UnitReport, images: Sequence[SourceImage]) -> pa.Table:
    """A table of one row from images just read."""
    fields = list(_IMAGE_TYPE)
    structs = pa.StructArray.from_arrays(
        [
            pa.array([image.image_id for image in images], pa.string()),
            _large_binaries([image.data for image in images]),
            pa.array([image.error_kind for image in images], pa.string()),
            pa.array([image.error for image in images], pa.string()),
            pa.array([image.version for image in images], pa.string()),
        ],
        fields=fields,
    )
    offsets = pa.array([0, len(images)], pa.int32())
    return pa.table(
        {
            "unit_id": pa.array([unit_id], pa.string()),
            "report": pa.array([report.to_json()], pa.string()),
            "images": pa.ListArray.from_arrays(offsets, structs, type=READ_SCHEMA.field("images").type),
        },
        schema=READ_SCHEMA,
    )


def _large_binaries(values: Sequence[bytes | None]) -> pa.LargeBinaryArray:
    """As pa.array makes it, with one copy of the bytes instead of the two or three that growing takes."""
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    is_valid = pa.array([value is not None for value in values], pa.bool_()).buffers()[1]
    data = pa.py_buffer(b"".join(value or b"" for value in values))
    array = pa.Array.from_buffers(
        pa.large_binary(), len(values), [is_valid, pa.py_buffer(ends.tobytes()), data]
    )
    return cast("pa.LargeBinaryArray", array)


def images_of(row: pa.Table) -> Iterator[SourceImage]:
    """The images of a table of one row, in order."""
    shard = UnitReport.from_json(row["report"][0].as_py()).shard
    for image in cast("pa.ListArray[Any]", row["images"].combine_chunks()).flatten():
        kind = image["error_kind"].as_py()
        yield SourceImage(
            image_id=image["image_id"].as_py(),
            shard=shard,
            data=image["data"].as_py(),
            error_kind=None if kind is None else ErrorKind(kind),
            error=image["error"].as_py(),
            version=image["version"].as_py(),
        )


def table_to_bytes(table: pa.Table) -> bytes:
    """Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def table_from_bytes(data: pa.Buffer | bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
