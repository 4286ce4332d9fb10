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
class Upkeep:
    """Of one source and model. run_id: stands in the rows."""

    lake_uri: str
    storage: Storage
    source: str
    model_id: str
    run_id: str

    def apply(self, removed: Sequence[RemovedImages], versions: Mapping[str, str]) -> int | None:
        """Commit a row for each image.

        Args:
            removed: gets a row with status `removed`.
            versions: image_id -> version of the object that holds the same content by now; the image's newest
                row comes again, and says so.

        Returns:
            the table's version; None where there was nothing to do.

        Raises:
            LeaseHeldError: a label job of this source and model is at work. StorageError: the store refused.
        """
        if not removed and not versions:
            return None
        key = app_id(self.source, self.model_id)
        holder = f"{self.run_id} on {socket.gethostname()}"
        with Lease.acquire(self.storage, self.lake_uri, key, holder, LEASE_TTL_S):
            table = LabelsTable.open_or_create(self.lake_uri, self.storage)
            committer = Committer(
                DeltaStore(table), key, {"run_id": self.run_id, "model_id": self.model_id}, 60, 1
            )
            for rows in (*self._removed_rows(removed), *self._rows_again(table, versions)):
                unit = f"upkeep:{uuid.uuid4().hex}"
                committer.add(write_fragment(rows, [unit], self.lake_uri, self.model_id, self.storage))
            return committer.commit()

    def _removed_rows(self, removed: Iterable[RemovedImages]) -> Iterator[pa.Table]:
        """A shard's images are different; two shards may hold the same, and so do not share a fragment."""
        now = datetime.now(UTC)
        for part in removed:
            for start in range(0, len(part.image_ids), _ROWS_PER_FRAGMENT):
                ids = part.image_ids[start : start + _ROWS_PER_FRAGMENT]
                values = {
                    "source": self.source,
                    "shard": part.shard,
                    "status": str(Status.REMOVED),
                    "model_id": self.model_id,
                    "run_id": self.run_id,
                    "labeled_at": now,
                }
                columns = [
                    pa.array(ids, pa.string())
                    if field.name == "image_id"
                    else pa.repeat(pa.scalar(values.get(field.name), field.type), len(ids))
                    for field in LABEL_SCHEMA
                ]
                yield pa.Table.from_arrays(columns, schema=LABEL_SCHEMA)

    def _rows_again(self, table: LabelsTable, versions: Mapping[str, str]) -> Iterator[pa.Table]:
        ids = sorted(versions)
        for start in range(0, len(ids), _IDS_PER_READ):
            some = ids[start : start + _IDS_PER_READ]
            wanted = (
                (pads.field("source") == pads.scalar(self.source))
                & (pads.field("image_id") >= pads.scalar(some[0]))
                & (pads.field("image_id") <= pads.scalar(some[-1]))
                & pads.field("image_id").isin(some)
            )
            rows = table.dataset(self.model_id).to_table(filter=wanted)
            rows = rows.sort_by([("labeled_at", "descending")])
            newest = pc.index_in(pc.unique(rows["image_id"]), value_set=rows["image_id"].combine_chunks())
            rows = rows.take(newest).select(LABEL_SCHEMA.names)
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
