"""The write stage: a unit's rows in, one uncommitted fragment out."""

from __future__ import annotations

import json
import time
from typing import Any

import pyarrow as pa

from jobs.infer.metrics import count_written
from jobs.infer.units import WRITTEN_SCHEMA, UnitReport, table_from_bytes
from jobs.lake.fragments import write_fragment
from jobs.lake.storage import Storage
from schemas.errors import StorageError


class FragmentWriter:
    """LABELLED_SCHEMA rows -> WRITTEN_SCHEMA rows.

    The fragment is null where a unit has no images, and where it could not be written: the report says why.
    """

    def __init__(self, lake_uri: str, model_id: str, storage: Storage) -> None:
        self._lake_uri = lake_uri
        self._model_id = model_id
        self._storage = storage

    def __call__(self, row: Any) -> pa.Table:
        """Write the fragment of a table of one row; Ray's types leave its format open."""
        unit_id = row["unit_id"][0].as_py()
        report = UnitReport.from_json(row["report"][0].as_py())
        started = time.perf_counter()
        fragment = None
        if report.num_images:
            rows = table_from_bytes(row["rows"][0].as_buffer())
            try:
                written = write_fragment(rows, [unit_id], self._lake_uri, self._model_id, self._storage)
                fragment = json.dumps(written.to_row())
                count_written(written.size_bytes)
            except StorageError as error:
                report.write_error = str(error)
        report.write_s = time.perf_counter() - started
        return pa.table(
            {"unit_id": [unit_id], "report": [report.to_json()], "fragment": [fragment]},
            schema=WRITTEN_SCHEMA,
        )
