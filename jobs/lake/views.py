"""The current labels of a lake, for reading: of each source, those of its current model.

Enters: a lake, and a version or a time of its label table. Leaves: the newest rows, `removed` left out, as a
DuckDB connection or relation, or as a stream of record batches.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import pyarrow as pa

from jobs.lake.current import labelled_sources, read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.newest_rows import create_newest_view, split_files
from jobs.lake.sql_text import Engine, model_condition
from jobs.lake.storage import Storage
from schemas.errors import UsageError
from schemas.labels import LABEL_SCHEMA

_BATCH_ROWS = 10_000
_DETECTIONS_VIEW = """
    CREATE TEMP VIEW detections AS
    SELECT image_id, source, shard, width, height, model_id, labeled_at,
           found.category_id, found.score, found.box.x0, found.box.y0, found.box.x1, found.box.y1,
           found.area, found.rle
    FROM (SELECT * EXCLUDE (detections), unnest(detections) AS found FROM labels)
"""


@dataclass(frozen=True)
class CurrentLabels:
    """The newest rows of some sources in one version of the table, each by one model.

    models: source -> model_id. Others than the current ones may be given, to read those.
    """

    table: LabelsTable
    models: Mapping[str, str]

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own, with the views `labels` (the newest rows), `detections` (of those, a row
        for each detection) and `all_labels` (every row that the table ever got).

        Times are shown in UTC. DuckDB gives them to Python through Arrow; fetchall() of one needs pytz.
        """
        # Where it spills to, made when needed; its own choice is one place in the working folder for all.
        spill = Path(tempfile.gettempdir()) / f"masklake-duckdb-{uuid.uuid4().hex}"
        connection = duckdb.connect(config={"temp_directory": str(spill)})
        connection.execute("SET TimeZone = 'UTC'")
        self.create_view(connection, "labels")
        connection.execute(_DETECTIONS_VIEW)
        connection.register("all_labels", self.table.dataset())
        return connection

    def create_view(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        """Make a temporary view of the rows, columns of LABEL_SCHEMA."""
        by_model = {model_id: self._sources_of(model_id) for model_id in set(self.models.values())}
        files = [
            file
            for model_id, sources in by_model.items()
            for file in self.table.files(model_id)
            if any(file.sources.may_hold(source, source) for source in sources)
        ]
        alone, others = split_files(files)
        create_newest_view(
            connection,
            name,
            self.table.dataset_of(alone),
            self.table.dataset_of(others),
            model_condition(self.models, Engine.DUCKDB),
        )

    def relation(self) -> duckdb.DuckDBPyRelation:
        """The rows, columns of LABEL_SCHEMA. Lazy: .select(), .filter(), .to_arrow_table(), .fetchall()."""
        return self.connect().view("labels")

    def reader(self) -> pa.RecordBatchReader:
        """The rows as LABEL_SCHEMA, in no order, once, as they are asked for.

        Not a pyarrow dataset: that has no way to say "the newest row of each image".
        """
        rows: pa.RecordBatchReader = self.relation().to_arrow_reader(_BATCH_ROWS).cast(LABEL_SCHEMA)
        return rows

    def _sources_of(self, model_id: str) -> list[str]:
        return [source for source, its_model in self.models.items() if its_model == model_id]


def current_labels(
    lake_uri: str,
    storage: Storage,
    source: str | None = None,
    version: int | None = None,
    at: datetime | None = None,
) -> CurrentLabels:
    """The labels that are current in a lake, or were.

    Args:
        source: one of the sources; None, all of them.
        version, at: of the table, one of them, see LabelsTable.open(); neither, the newest version.

    Raises:
        UsageError: there is no such table, version or labelled source; or several models labelled a source
            and none was promoted.
    """
    if version is not None and at is not None:
        raise UsageError(f"version {version} and the time {at.isoformat()} were both asked for; give one.")
    table = LabelsTable.open(lake_uri, storage, version if at is None else at)
    return CurrentLabels(table, current_models(table, source))


def current_models(table: LabelsTable, source: str | None = None) -> dict[str, str]:
    """The current model_id of each source of a table, or of one; {} for a table without rows.

    Raises: as current_labels().
    """
    labelled = labelled_sources(table)
    if source is not None and source not in labelled:
        raise UsageError(
            f"no image of {source} was labelled in version {table.version} of the table at {table.uri}; "
            f"labelled were: {', '.join(sorted(labelled)) or 'none'}"
        )
    promoted = read_current(table)
    models = {}
    for name in sorted(labelled) if source is None else [source]:
        if name not in promoted and len(labelled[name]) > 1:
            raise UsageError(
                f"several models labelled {name} in the table at {table.uri}, and none of them was promoted: "
                f"{', '.join(sorted(labelled[name]))}. Choose one with `masklake promote`."
            )
        models[name] = promoted[name].model_id if name in promoted else next(iter(labelled[name]))
    return models


def count_missing(table: LabelsTable, source: str, old: str, new: str) -> int:
    """Images of a source that have labels by one model, and by another none, or those of an earlier content.

    What a model failed at, it has a row of; what it says is gone, none.
    """
    connection = CurrentLabels(table, {source: old}).connect()
    CurrentLabels(table, {source: new}).create_view(connection, "others")
    query = """
        SELECT count(*) FROM labels LEFT JOIN others USING (image_id)
        WHERE others.image_id IS NULL
            OR (others.content_hash <> labels.content_hash AND others.labeled_at < labels.labeled_at)
    """
    return int(connection.execute(query).fetchall()[0][0])
