"""Rows that need no network: of images that are gone, and of images whose object is another with the same
content.

Enters: what a night found out. Leaves: fragments, committed as a label job's are, under the lease that keeps
label jobs of the same source and model away.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.storage import Storage
from jobs.relabel.worklist import RemovedImages
from schemas.labels import LABEL_SCHEMA, Status

_ROWS_PER_FRAGMENT = 50_000
_IDS_PER_READ = 5_000  # with their masks
LEASE_TTL_S = 120.0


@dataclass(frozen=True)
class Upkept:
    """version: of the table, None where there was nothing to do; num_removed: images that were marked."""

    version: int | None
    num_removed: int


@dataclass(frozen=True)
class Upkeep:
    """Of one source and model. run_id: stands in the rows."""

    lake_uri: str
    storage: Storage
    source: str
    model_id: str
    run_id: str

    def apply(self, removed: Sequence[RemovedImages], versions: Mapping[str, str]) -> Upkept:
        """Commit a row for each image.

        Args:
            removed: gets a row with status `removed`, but for images whose newest row is of another shard by
                now: they were found there since this was compared.
            versions: image_id -> version of the object that holds the same content by now; the image's newest
                row comes again, and says so.

        Raises:
            LeaseHeldError: a label job of this source and model is at work. StorageError: the store refused.
        """
        if not removed and not versions:
            return Upkept(None, 0)
        key = app_id(self.source, self.model_id)
        holder = f"{self.run_id} on {socket.gethostname()}"
        with Lease.acquire(self.storage, self.lake_uri, key, holder, LEASE_TTL_S):
            table = LabelsTable.open_or_create(self.lake_uri, self.storage)
            gone = [left for part in removed for left in self._still_there(table, part)]
            committer = Committer(
                DeltaStore(table), key, {"run_id": self.run_id, "model_id": self.model_id}, 60, 1
            )
            for rows in (*self._removed_rows(gone), *self._rows_again(table, versions)):
                unit = f"upkeep:{uuid.uuid4().hex}"
                committer.add(write_fragment(rows, [unit], self.lake_uri, self.model_id, self.storage))
            return Upkept(committer.commit(), sum(len(part.image_ids) for part in gone))

    def _still_there(self, table: LabelsTable, part: RemovedImages) -> Iterator[RemovedImages]:
        """Those whose newest row is of the shard that they are gone from; in parts of a fragment's size."""
        for start in range(0, len(part.image_ids), _ROWS_PER_FRAGMENT):
            ids = part.image_ids[start : start + _ROWS_PER_FRAGMENT]
            newest = self._newest_rows(table, ids, ["image_id", "shard", "labeled_at"])
            is_elsewhere = pc.not_equal(newest["shard"], pa.scalar(part.shard))
            elsewhere = set(newest["image_id"].filter(is_elsewhere).to_pylist())
            if left := [image_id for image_id in ids if image_id not in elsewhere]:
                yield RemovedImages(part.shard, left)

    def _removed_rows(self, removed: Iterable[RemovedImages]) -> Iterator[pa.Table]:
        """A shard's images are different; two shards may hold the same, and so do not share a fragment."""
        now = datetime.now(UTC)
        for part in removed:
            values = {
                "source": self.source,
                "shard": part.shard,
                "status": str(Status.REMOVED),
                "model_id": self.model_id,
                "run_id": self.run_id,
                "labeled_at": now,
            }
            columns = [
                pa.array(part.image_ids, pa.string())
                if field.name == "image_id"
                else pa.repeat(pa.scalar(values.get(field.name), field.type), len(part.image_ids))
                for field in LABEL_SCHEMA
            ]
            yield pa.Table.from_arrays(columns, schema=LABEL_SCHEMA)

    def _newest_rows(self, table: LabelsTable, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Of each image, as far as it has rows of the model. ids: N > 0."""
        wanted = (
            (pads.field("source") == pads.scalar(self.source))
            & (pads.field("image_id") >= pads.scalar(min(ids)))
            & (pads.field("image_id") <= pads.scalar(max(ids)))
            & pads.field("image_id").isin(list(ids))
        )
        rows = table.dataset(self.model_id).to_table(columns=list(columns), filter=wanted)
        rows = rows.sort_by([("labeled_at", "descending")])
        first = pc.index_in(pc.unique(rows["image_id"]), value_set=rows["image_id"].combine_chunks())
        return rows.take(first)

    def _rows_again(self, table: LabelsTable, versions: Mapping[str, str]) -> Iterator[pa.Table]:
        ids = sorted(versions)
        for start in range(0, len(ids), _IDS_PER_READ):
            some = ids[start : start + _IDS_PER_READ]
            rows = self._newest_rows(table, some, LABEL_SCHEMA.names)
            changes: dict[str, list[Any]] = {
                "object_version": [versions[str(image_id)] for image_id in rows["image_id"].to_pylist()],
                "run_id": [self.run_id] * len(rows),
                "labeled_at": [datetime.now(UTC)] * len(rows),
            }
            for name, values in changes.items():
                place, kind = LABEL_SCHEMA.get_field_index(name), LABEL_SCHEMA.field(name).type
                column: Any = pa.array(values, kind)
                rows = rows.set_column(place, LABEL_SCHEMA.field(name), column)
            yield rows
