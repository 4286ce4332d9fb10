"""What of a source one model has to label, why, and in which order.

Enters: a source's listing, and the label table with the model's rows and those of the current model. Leaves:
counts by reason, read tasks in the order in which they are wanted, and the images that are gone. Only keys
are read, never a mask and never an image; they lie in a DuckDB database on disk, so memory stays flat.

What of a tar or Parquet shard is done is known by image only once its version was read to its end (the
shard index); of one that was not, images are counted by what another model or its size says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from jobs.lake.labels_table import LabelsTable
from jobs.lake.object_table import OBJECT_SCHEMA, ObjectTable
from jobs.lake.plan import ShardTask
from jobs.lake.shard_index import ShardIndex
from jobs.lake.shard_listing import SLICE_IMAGES
from jobs.lake.shards import Shard
from schemas.labels import LABEL_SCHEMA, ErrorKind, Status
from schemas.relabel_spec import OrderSpec

_MEMORY = "2GB"  # DuckDB spills what is more
_ROW_COLUMNS = ("image_id", "shard", "object_version", "content_hash", "status", "error_kind", "max_score")
# Of an image, by its best score s: 1 at 0.5, 0 at 0 and 1, and where nothing was found.
_UNCERTAINTY = "coalesce(4 * current.max_score * (1 - current.max_score), 0)"
_ORDER = "wanted, reason_rank, uncertainty DESC, stale_since DESC NULLS LAST, {key}"
_BATCH_ROWS = 10_000


class Reason(StrEnum):
    """Why an image is to be labelled, or is not."""

    NEW = "new"  # nobody labelled it
    CHANGED = "changed"  # its object is another than the one that was labelled
    FAILED = "failed"  # it failed, and is to be tried again
    STALE = "stale"  # labelled by the current model, not yet by this one
    FRESH = "fresh"  # labelled by this one
    GIVEN_UP = "given_up"  # it failed, and is not to be tried again


TO_DO = (Reason.NEW, Reason.CHANGED, Reason.FAILED, Reason.STALE)  # in the order in which they are wanted


@dataclass
class Counts:
    """Images of a source by reason, for one model.

    labelled: images that have a row of the model; removed: those of them that the source does not hold any
    more. estimated: so many of those to do lie
    in shards that this model has not read yet in their present version, and are counted by what the current
    model found there, or by size.
    """

    by_reason: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    labelled: int = 0
    removed: int = 0
    estimated: int = 0

    @property
    def to_do(self) -> int:
        return sum(self.by_reason[reason] for reason in TO_DO)


@dataclass(frozen=True)
class RemovedImages:
    """Images of a shard whose newest row is not `removed`, and that are gone."""

    shard: str
    image_ids: Sequence[str]


class Worklist:
    """Of one model over one source; make it with open_worklist()."""

    def __init__(self, keys: duckdb.DuckDBPyConnection, shards: list[Shard], is_files: bool) -> None:
        self._keys = keys
        self._shards = shards
        self._is_files = is_files
        self.counts = Counts()

    def tasks(self, max_images: int | None = None) -> Iterator[ShardTask]:
        """What is to be done, the most wanted first.

        Args:
            max_images: no more single images than that; of shards nobody knows before they are read.
        """
        limit = "" if max_images is None else f"LIMIT {int(max_images)}"
        wanted = f"work ORDER BY {_ORDER.format(key='image_id')} {limit}"
        return self._slices(wanted) if self._is_files else self._whole_shards()

    @property
    def num_known(self) -> int:
        """Images to do that this model labelled from another version of their object: with the same content
        they are read, and no more. 0 of shards, of which that is not known by image.
        """
        return _count(self._keys, "work WHERE known IS NOT NULL") if self._is_files else 0

    def known_sample(self, num_images: int) -> Iterator[ShardTask]:
        """Some of num_known, at random."""
        return self._slices(f"(FROM work WHERE known IS NOT NULL) USING SAMPLE {int(num_images)}")

    @property
    def has_tasks(self) -> bool:
        return _count(self._keys, "work") > 0

    def is_cut(self, max_images: int | None) -> bool:
        """Whether tasks(max_images) leave something out."""
        return self._is_files and max_images is not None and self.counts.to_do > max_images

    def removed(self) -> Iterator[RemovedImages]:
        """What is gone from the source and still counts in the table."""
        gone = self._keys.sql("SELECT shard, list(image_id ORDER BY image_id) FROM gone GROUP BY shard")
        for shard, image_ids in gone.fetchall():
            yield RemovedImages(str(shard), image_ids)

    def versions_of(self, image_ids: Sequence[str]) -> dict[str, str]:
        """The versions of images that are objects of their own; of others nothing."""
        if not image_ids or not self._is_files:
            return {}
        found = self._keys.execute(
            "SELECT image_id, version FROM objects WHERE image_id IN (SELECT unnest($1::VARCHAR[]))",
            [list(image_ids)],
        )
        return {str(image_id): str(version) for image_id, version in found.fetchall()}

    def _slices(self, wanted: str) -> Iterator[ShardTask]:
        (like,) = self._shards
        columns = ", ".join(OBJECT_SCHEMA.names)
        found = self._keys.cursor().sql(f"SELECT {columns}, known FROM {wanted}")
        reader = found.to_arrow_reader(SLICE_IMAGES)
        while (batch := next(reader, None)) is not None:
            rows = pa.Table.from_batches([batch])
            objects = ObjectTable(rows.select(OBJECT_SCHEMA.names).cast(OBJECT_SCHEMA))
            hashes = zip(rows["image_id"].to_pylist(), rows["known"].to_pylist(), strict=True)
            contents = {str(image_id): bytes(known) for image_id, known in hashes if known is not None}
            yield ShardTask(Shard(like.uri, like.name, "files", None, objects), frozenset(), contents)

    def _whole_shards(self) -> Iterator[ShardTask]:
        for place, rows in groupby(self._rows_by_shard(), key=itemgetter(0)):
            shard = self._shards[place]
            assert shard.info is not None, "only slices have no object of their own"
            skip: set[str] = set()
            # b"" is nothing's hash: such an image is labelled, or found to be gone like the others.
            contents: dict[str, bytes] = {}
            for _, image_id, is_done, known in rows:
                if image_id is None:  # a shard without rows
                    continue
                if is_done:
                    skip.add(image_id)
                else:
                    contents[image_id] = known or b""
            yield ShardTask(shard, frozenset(skip), contents)

    def _rows_by_shard(self) -> Iterator[tuple[int, str | None, bool | None, bytes | None]]:
        """(place of the shard, image_id, is_done, content_hash) of what this model has of each shard that is
        to be read, the most wanted shard first; once with nothing for a shard of which it has nothing.
        """
        found = self._keys.cursor().sql(
            f"""
            SELECT place, image_id, is_same AND NOT is_retried AS is_done,
                CASE WHEN NOT is_retried THEN content_hash END AS known
            FROM (
                SELECT place, shard, row_number() OVER (ORDER BY {_ORDER.format(key="place")}) AS turn
                FROM work
            ) LEFT JOIN (SELECT * FROM mine WHERE is_live) USING (shard)
            ORDER BY turn
            """
        )
        reader = found.to_arrow_reader(_BATCH_ROWS)
        while (batch := next(reader, None)) is not None:
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


@contextmanager
def open_worklist(
    shards: Iterable[Shard],
    table: LabelsTable | None,
    source_uri: str,
    model_id: str,
    current_id: str | None,
    *,
    retry: Collection[ErrorKind] = (),
    order: OrderSpec | None = None,
    index: ShardIndex | None = None,
    current_index: ShardIndex | None = None,
) -> Iterator[Worklist]:
    """Compare a source with the table.

    Args:
        table: None where the lake has none yet.
        current_id: whose labels are stale where this model has none; None: nobody's.
        retry: kinds of failure that are to be tried again.
        index, current_index: how many images the shards have that the model, the current model, read whole.
    """
    order = order or OrderSpec()
    with (
        tempfile.TemporaryDirectory(prefix="masklake-") as folder,
        duckdb.connect(
            f"{folder}/keys.duckdb", config={"memory_limit": _MEMORY, "temp_directory": f"{folder}/spill"}
        ) as keys,
    ):
        listed, is_files = _take_listing(keys, shards)
        _take_rows(keys, "mine", table, source_uri, model_id, retry)
        _take_rows(keys, "current", table, source_uri, current_id, retry)
        work = Worklist(keys, listed, is_files)
        if is_files:
            _compare_objects(keys, work.counts, order)
        else:
            _take_indexes(keys, index or {}, current_index or {})
            _compare_shards(keys, work.counts, order)
        work.counts.labelled = _count(keys, "mine WHERE is_live")
        yield work


def _take_listing(keys: duckdb.DuckDBPyConnection, shards: Iterable[Shard]) -> tuple[list[Shard], bool]:
    """Fill `objects` or `shards`; gives one slice for all slices, or every shard."""
    keys.execute(
        "CREATE TABLE objects (image_id VARCHAR, uri BLOB, size BIGINT, etag VARCHAR, version VARCHAR)"
    )
    kept: list[Shard] = []
    is_files = False
    for shard in shards:
        is_files = shard.format == "files"
        if is_files:
            slice_objects = shard.objects.columns
            keys.from_arrow(slice_objects).insert_into("objects")
            kept = kept or [shard]
        else:
            kept.append(shard)
    listed = [] if is_files else kept
    rows = pa.table(
        {
            "place": pa.array(range(len(listed)), pa.int64()),
            "shard": pa.array([shard.name for shard in listed], pa.string()),
            "version": pa.array([shard.info.version if shard.info else "" for shard in listed], pa.string()),
            "num_bytes": pa.array([shard.num_bytes for shard in listed], pa.int64()),
        }
    )
    keys.register("listed", rows)
    keys.execute("CREATE TABLE shards AS SELECT * FROM listed")
    keys.unregister("listed")
    return kept, is_files


def _take_rows(
    keys: duckdb.DuckDBPyConnection,
    name: str,
    table: LabelsTable | None,
    source_uri: str,
    model_id: str | None,
    retry: Collection[ErrorKind],
) -> None:
    """Fill a table with the newest row of each image: what it was made from, and what came of it."""
    columns = [*_ROW_COLUMNS, "labeled_at"]
    made_from = ", ".join(f"{column}: {column}" for column in _ROW_COLUMNS[1:])
    if table is None or model_id is None:
        rows: Any = pa.schema([LABEL_SCHEMA.field(column) for column in columns]).empty_table()
    else:
        in_source = pads.field("source") == pads.scalar(source_uri)
        rows = table.dataset(model_id).scanner(columns=columns, filter=in_source).to_reader()
    keys.register("labels", rows)
    keys.execute(
        f"""
        CREATE TABLE {name} AS
        SELECT image_id, newest.*, labeled_at, newest.status <> '{Status.REMOVED}' AS is_live,
            newest.status = '{Status.FAILED}' AS is_failed,
            coalesce(newest.error_kind IN (SELECT unnest($1::VARCHAR[])), false) AS is_retried
        FROM (
            SELECT image_id, arg_max({{{made_from}}}, labeled_at) AS newest, max(labeled_at) AS labeled_at
            FROM labels GROUP BY image_id
        )
        """,
        [[kind.value for kind in retry]],
    )
    keys.unregister("labels")


def _take_indexes(keys: duckdb.DuckDBPyConnection, index: ShardIndex, current_index: ShardIndex) -> None:
    for name, known in (("counted", index), ("counted_by_current", current_index)):
        rows = [(shard, version, count) for (shard, version), count in known.items()]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        kinds = (pa.string(), pa.string(), pa.int64())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        keys.register("known", pa.table(arrays, names=["shard", "version", "num_images"]))
        keys.execute(f"CREATE TABLE {name} AS SELECT * FROM known")
        keys.unregister("known")


def _compare_objects(keys: duckdb.DuckDBPyConnection, counts: Counts, order: OrderSpec) -> None:
    """Fill `work` and `gone` for images that are objects of their own."""
    is_other = "coalesce(objects.version <> '' AND {rows}.object_version <> objects.version, false)"
    keys.execute(
        f"""
        CREATE TABLE judged AS
        SELECT objects.*, {_UNCERTAINTY if order.uncertain_first else 0} AS uncertainty,
            CASE WHEN mine.is_live AND mine.is_retried THEN '{Reason.FAILED}'
                WHEN mine.is_live AND {is_other.format(rows="mine")} THEN '{Reason.CHANGED}'
                WHEN mine.is_live AND mine.is_failed THEN '{Reason.GIVEN_UP}'
                WHEN mine.is_live THEN '{Reason.FRESH}'
                WHEN current.is_live AND {is_other.format(rows="current")} THEN '{Reason.CHANGED}'
                WHEN current.is_live THEN '{Reason.STALE}'
                ELSE '{Reason.NEW}' END AS reason,
            CASE WHEN mine.is_live AND NOT mine.is_retried AND {is_other.format(rows="mine")}
                THEN mine.content_hash END AS known,
            CASE WHEN reason = '{Reason.STALE}' THEN current.labeled_at END AS stale_since
        FROM objects LEFT JOIN mine USING (image_id) LEFT JOIN current USING (image_id)
        """
    )
    for reason, count in keys.sql("SELECT reason, count(*) FROM judged GROUP BY reason").fetchall():
        counts.by_reason[Reason(reason)] = int(count)
    _rank(keys, "judged", "image_id", order)
    keys.execute(
        "CREATE TABLE gone AS SELECT shard, image_id FROM mine WHERE is_live AND image_id NOT IN "
        "(SELECT image_id FROM objects)"
    )
    counts.removed = _count(keys, "gone")


def _compare_shards(keys: duckdb.DuckDBPyConnection, counts: Counts, order: OrderSpec) -> None:
    """Fill `work` and `gone` for tar and Parquet shards.

    A shard is complete when the model read this version of it to its end, and has a live row of each of its
    images and of no other.
    """
    keys.execute("ALTER TABLE mine ADD COLUMN is_same BOOLEAN")
    keys.execute(
        "UPDATE mine SET is_same = coalesce(mine.object_version = shards.version, true) FROM shards "
        "WHERE mine.shard = shards.shard"
    )
    keys.execute(
        f"""
        CREATE TABLE judged AS
        WITH mine_by_shard AS (
            SELECT shard, count(*) AS num, count(*) FILTER (is_retried) AS num_retried,
                count(*) FILTER (is_failed AND NOT is_retried) AS num_failed,
                count(*) FILTER (is_same) AS num_same
            FROM mine WHERE is_live GROUP BY shard
        ), current_by_shard AS (
            SELECT shard, count(*) AS num, avg({_UNCERTAINTY}) AS uncertainty, max(labeled_at) AS labeled_at
            FROM current WHERE is_live GROUP BY shard
        ), figures AS (
            SELECT shards.place, shards.shard, shards.num_bytes,
                {"coalesce(uncertainty, 0)" if order.uncertain_first else 0} AS uncertainty,
                coalesce(mine_by_shard.num, 0) AS num_mine, coalesce(num_retried, 0) AS num_retried,
                coalesce(num_failed, 0) AS num_failed, coalesce(num_same, 0) AS num_same,
                coalesce(current_by_shard.num, 0) AS num_current, current_by_shard.labeled_at,
                counted.num_images AS counted, counted_by_current.num_images AS counted_by_current
            FROM shards LEFT JOIN mine_by_shard USING (shard) LEFT JOIN current_by_shard USING (shard)
                LEFT JOIN counted ON counted.shard = shards.shard AND counted.version = shards.version
                LEFT JOIN counted_by_current ON counted_by_current.shard = shards.shard
                    AND counted_by_current.version = shards.version
        ), density AS (
            SELECT sum(coalesce(counted, counted_by_current)) / nullif(sum(num_bytes), 0) AS images_per_byte
            FROM figures WHERE coalesce(counted, counted_by_current) IS NOT NULL
        )
        SELECT figures.*,
            CASE WHEN counted = num_mine AND num_retried = 0 THEN '{Reason.FRESH}'
                WHEN counted IS NOT NULL AND num_retried > 0 THEN '{Reason.FAILED}'
                WHEN num_mine > num_same OR counted IS NOT NULL THEN '{Reason.CHANGED}'
                WHEN counted_by_current IS NOT NULL THEN '{Reason.STALE}'
                WHEN num_current > 0 AND num_mine = 0 THEN '{Reason.CHANGED}'
                ELSE '{Reason.NEW}' END AS reason,
            CASE WHEN reason = '{Reason.STALE}' THEN labeled_at END AS stale_since,
            greatest(0, coalesce(counted, counted_by_current,
                greatest(num_mine, num_current, round(num_bytes * images_per_byte)), 0))::BIGINT AS num_images
        FROM figures, density
        """
    )
    for reason, num_images, num_mine, num_same, num_retried, num_failed, is_counted in keys.sql(
        "SELECT reason, num_images, num_mine, num_same, num_retried, num_failed, counted IS NOT NULL "
        "FROM judged"
    ).fetchall():
        by_reason = counts.by_reason
        by_reason[Reason.GIVEN_UP] += num_failed
        if reason == Reason.FRESH:
            by_reason[Reason.FRESH] += num_mine - num_failed
        elif reason == Reason.FAILED:
            by_reason[Reason.FAILED] += num_retried
            by_reason[Reason.FRESH] += num_mine - num_retried - num_failed
        else:
            done = num_mine - num_failed if is_counted else max(0, num_same - num_failed)
            by_reason[Reason.FRESH] += done
            left = max(0, num_images - done - num_failed)
            by_reason[Reason(reason)] += left
            counts.estimated += left
    _rank(keys, "judged", "shard", order)
    keys.execute(
        "CREATE TABLE gone AS SELECT shard, image_id FROM mine WHERE is_live AND shard NOT IN "
        "(SELECT shard FROM shards)"
    )
    counts.removed = _count(keys, "gone")


def _rank(keys: duckdb.DuckDBPyConnection, judged: str, key: str, order: OrderSpec) -> None:
    """Fill `work`: what is to be done, with what it is sorted by."""
    wanted = " ".join(f"WHEN {key} GLOB {_quoted(glob)} THEN {rank}" for rank, glob in enumerate(order.first))
    ranks = " ".join(f"WHEN '{reason}' THEN {rank}" for rank, reason in enumerate(TO_DO))
    wanted = f"CASE {wanted} ELSE {len(order.first)} END" if wanted else "0"
    keys.execute(
        f"CREATE TABLE work AS SELECT * FROM (SELECT *, {wanted} AS wanted, "
        f"CASE reason {ranks} END AS reason_rank FROM {judged}) WHERE reason_rank IS NOT NULL"
    )


def _count(keys: duckdb.DuckDBPyConnection, name: str) -> int:
    ((count,),) = keys.sql(f"SELECT count(*) FROM {name}").fetchall()
    return int(count)


def _quoted(text: str) -> str:
    """As a string in SQL."""
    return "'" + text.replace("'", "''") + "'"
