"""SQL text by which other engines find the current labels of a lake by themselves.

Enters: the label table, source -> model_id, an engine. Leaves: a statement that makes a view. No engine reads
a table's properties from within a query, so the text names the models: after a promotion it is made anew.
Rows that are added later it shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from jobs.lake.labels_table import LabelsTable
from schemas.errors import UsageError
from schemas.labels import Status

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


class Engine(StrEnum):
    """Who runs the text."""

    DUCKDB = "duckdb"
    SPARK = "spark"
    TRINO = "trino"


def sql_text(
    table: LabelsTable,
    models: Mapping[str, str],
    engine: Engine,
    view: str = "current_labels",
    trino_table: str | None = None,
) -> str:
    """A statement that makes a view of the newest row of each image, `removed` left out.

    DuckDB reads the log through delta_scan (extension delta, which it loads by itself) and not through a list
    of files, which would be of one version. Spark needs delta-spark. Trino needs the table to be registered
    with its Delta Lake connector, by system.register_table.

    Args:
        models: source -> model_id, as views.current_models() has it.
        view: its name, a plain one; of Trino's, in the schema of the table.
        trino_table: catalog.schema.table, for Trino only.

    Raises:
        UsageError: a name is not plain, a source's URI or a model_id is not printable, or Trino's table is
            missing, or given to another engine.
    """
    if not _NAME.fullmatch(view):
        raise UsageError(f"view {view!r}: wanted letters, digits and '_', the first not a digit.")
    unprintable = next((text for text in [*models, *models.values()] if not text.isprintable()), None)
    if unprintable is not None:
        raise UsageError(f"{unprintable!r} is not printable, and can be in no SQL text.")
    columns = ", ".join(str(field.name) for field in table.delta.schema().fields)
    make, relation = _make_and_relation(table.uri, engine, view, trino_table)
    return (
        f"{make} AS\n"
        f"SELECT {columns}\n"
        f"FROM (\n"
        f"  SELECT *, ROW_NUMBER() OVER (\n"
        f"    PARTITION BY source, image_id ORDER BY labeled_at DESC\n"
        f"  ) AS nth_newest\n"
        f"  FROM {relation}\n"
        f"  WHERE {model_condition(models, engine)}\n"
        f") newest_first\n"
        f"WHERE nth_newest = 1 AND status <> {_literal(Status.REMOVED, engine)}"
    )


def model_condition(models: Mapping[str, str], engine: Engine) -> str:
    """SQL that holds for the rows of each source by its model; the partition column stands by itself."""
    by_model: dict[str, list[str]] = {}
    for source, model_id in models.items():
        by_model.setdefault(model_id, []).append(_literal(source, engine))
    terms = [
        f"(model_id = {_literal(model_id, engine)} AND source IN ({', '.join(sources)}))"
        for model_id, sources in by_model.items()
    ]
    return f"({' OR '.join(terms)})" if terms else "1 = 0"


def _make_and_relation(table_uri: str, engine: Engine, view: str, trino_table: str | None) -> tuple[str, str]:
    """How to make the view, and what to read."""
    if (engine is Engine.TRINO) != (trino_table is not None):
        raise UsageError(
            "Trino knows the table by a name: give catalog.schema.table, and give it for Trino only."
        )
    if engine is Engine.DUCKDB:
        return f"CREATE OR REPLACE VIEW {view}", f"delta_scan({_literal(table_uri, engine)})"
    if engine is Engine.SPARK:
        # The open-source client for S3 answers to s3a only; that of others to both.
        uri = re.sub(r"^s3://", "s3a://", table_uri).replace("`", "``")
        return f"CREATE OR REPLACE TEMPORARY VIEW {view}", f"delta.`{uri}`"
    assert trino_table is not None
    parts = trino_table.split(".")
    if len(parts) != 3 or not all(part and part.isprintable() for part in parts):
        raise UsageError(f"{trino_table!r}: wanted Trino's name of the table, catalog.schema.table.")
    catalog, schema, name = ('"' + part.replace('"', '""') + '"' for part in parts)
    return f"CREATE OR REPLACE VIEW {catalog}.{schema}.{view}", f"{catalog}.{schema}.{name}"


def _literal(text: str, engine: Engine) -> str:
    """A string in the engine's SQL."""
    if engine is not Engine.SPARK:
        return "'" + text.replace("'", "''") + "'"
    # Spark undoes backslashes, also as \\uXXXX, and puts its own variables in for ${NAME} before that.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("$", "\\u0024")
    return f"'{escaped}'"
