"""What can be wrong with rows of the label table, seen row by row.

Enters: rows of some columns of LABEL_SCHEMA. Leaves: kinds of faults, each with the rows that have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.care.rle_sizes import MALFORMED, rle_sizes
from schemas.labels import ErrorKind, Status

# Columns that cost little to read, next to those of `detections`.
FLAT_COLUMNS = (
    "image_id",
    "source",
    "shard",
    "content_hash",
    "width",
    "height",
    "status",
    "error_kind",
    "error",
    "run_id",
    "labeled_at",
    "num_detections",
    "max_score",
)
_NEVER_NULL = ("image_id", "source", "shard", "status", "run_id", "labeled_at")
# Boxes are clipped at the network's input size and scaled back in float32, as torchvision does.
_ROUNDING = 1e-6
_OK_HAS = ("content_hash", "width", "height", "num_detections")
_FAILED_HAS = ("error_kind", "error")

# (what is wrong, the rows; one that has it several times may stand there as often)
Fault = tuple[str, NDArray[np.intp]]


def flat_faults(rows: pa.Table) -> Iterator[Fault]:
    """Faults that FLAT_COLUMNS show: statuses, what each status has and has not, counts."""
    ok, failed = (_mask(pc.equal(rows["status"], pa.scalar(str(s)))) for s in (Status.OK, Status.FAILED))
    null = {name: _mask(pc.is_null(rows[name])) for name in FLAT_COLUMNS}
    for name in _NEVER_NULL:
        yield f"{name} is null", _where(null[name])
    yield "status is none of ok, failed, removed", _where(~_is_one_of(rows["status"], Status))
    for name in _OK_HAS:
        yield f"ok without {name}", _where(ok & null[name])
    for name in _FAILED_HAS:
        yield f"failed without {name}", _where(failed & null[name])
        yield f"{name} though not failed", _where(~failed & ~null[name])
    for name in ("num_detections", "max_score"):
        yield f"{name} though not ok", _where(~ok & ~null[name])
    kinds = rows["error_kind"]
    yield "unknown error_kind", _where(~null["error_kind"] & ~_is_one_of(kinds, ErrorKind))
    for name in ("width", "height"):
        yield f"{name} below 1", _where(_mask(pc.less(rows[name], pa.scalar(1, pa.int32()))))
    has_some = _mask(pc.greater(rows["num_detections"], pa.scalar(0, pa.int32())))
    yield (
        "max_score is null where there are detections, or the reverse",
        _where(ok & (has_some == null["max_score"])),
    )


def detection_faults(rows: pa.Table) -> Iterator[Fault]:
    """Faults of the detections: their number, order, scores, boxes, areas and masks."""
    if rows.num_rows == 0:
        return
    lists = cast("pa.ListArray[Any]", rows["detections"].combine_chunks())
    ok = _mask(pc.equal(rows["status"], pa.scalar(str(Status.OK))))
    null = _mask(pc.is_null(lists))
    yield "ok without detections", _where(ok & null)
    yield "detections though not ok", _where(~ok & ~null)
    counts = pc.list_value_length(lists)
    yield (
        "num_detections is not their number",
        _where(~_mask(pc.equal(rows["num_detections"], counts)) & ~null),
    )

    found = cast("pa.StructArray", lists.flatten())
    image = np.asarray(pc.list_parent_indices(lists), np.intp)
    fields = dict(zip([field.name for field in found.type], found.flatten(), strict=True))
    box_type = found.type.field("box").type
    box = {
        field.name: side.to_numpy(zero_copy_only=False)
        for field, side in zip(box_type, cast("pa.StructArray", fields["box"]).flatten(), strict=True)
    }
    score = fields["score"].to_numpy(zero_copy_only=False)
    area = fields["area"].to_numpy(zero_copy_only=False)
    width, height = (_numbers(rows[name])[image] for name in ("width", "height"))

    # Written as what must hold: a NaN fails every comparison.
    yield "a score outside 0 to 1", image[~((score >= 0) & (score <= 1))]
    is_next = image[1:] == image[:-1]
    yield "detections not best score first", image[1:][is_next & ~(score[1:] <= score[:-1])]
    firsts = np.flatnonzero(np.concatenate(([True], ~is_next))) if len(image) else image
    best = _floats(rows["max_score"])[image[firsts]]
    yield "max_score is not the best score", image[firsts][best != score[firsts]]
    edges_x, edges_y = width * (1 + _ROUNDING), height * (1 + _ROUNDING)
    inside = (box["x0"] >= 0) & (box["y0"] >= 0) & (box["x1"] <= edges_x) & (box["y1"] <= edges_y)
    inside &= (box["x0"] <= box["x1"]) & (box["y0"] <= box["y1"])
    yield "a box that is not inside its image", image[~inside]
    pixels, areas = rle_sizes(fields["rle"])
    malformed = pixels == MALFORMED
    yield "a mask that does not decode", image[malformed]
    yield "a mask of another size than its image", image[~malformed & (pixels != width * height)]
    yield "an area that is not its mask's", image[~malformed & (areas != area)]


def _mask(values: Any) -> NDArray[np.bool_]:
    """Arrow booleans, null as False."""
    return np.asarray(pc.fill_null(values, pa.scalar(False)).to_numpy(zero_copy_only=False), np.bool_)


def _numbers(column: pa.ChunkedArray[Any]) -> NDArray[np.int64]:
    """Whole numbers, null as 0."""
    return np.asarray(pc.fill_null(column, pa.scalar(0, column.type)).to_numpy(), np.int64)


def _floats(column: pa.ChunkedArray[Any]) -> NDArray[np.float32]:
    """Null as NaN, which equals nothing."""
    return np.asarray(pc.fill_null(column, pa.scalar(float("nan"), column.type)).to_numpy(), np.float32)


def _is_one_of(column: pa.ChunkedArray[Any], names: Any) -> NDArray[np.bool_]:
    return _mask(pc.is_in(column, value_set=pa.array([str(name) for name in names])))


def _where(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    return np.flatnonzero(mask)
