"""SQL text for other engines, jobs/lake/sql_text.py, run by DuckDB as far as it speaks the same SQL."""

import re
from collections.abc import Callable

import duckdb
import pyarrow as pa
import pytest

from jobs.lake.fragments import Fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.sql_text import Engine, model_condition, sql_text
from jobs.lake.storage import Storage
from schemas.errors import UsageError

A, B = "lite-aaaaaaaaaaaa", "lite-bbbbbbbbbbbb"
ODD = "s3://it's/${HOME}/a\\'b\\\\u0041 `ü"

MakeRows = Callable[..., pa.Table]
AddLabels = Callable[..., list[Fragment]]


@pytest.fixture
def table(lake: str, storage: Storage, make_rows: MakeRows, add_labels: AddLabels) -> LabelsTable:
    table = LabelsTable.open_or_create(lake, storage)
    add_labels(table, storage, make_rows(["a", "b"], A, source=ODD, run_id="old"))
    add_labels(
        table, storage, make_rows(["b", "c"], A, source=ODD, run_id="new", at_us=10**16, removed=["c"])
    )
    add_labels(table, storage, make_rows(["a", "z"], B, source=ODD), make_rows(["a"], B, run_id="of B"))
    return table


@pytest.fixture
def empty(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


def spark_string(literal: str) -> str:
    """What Spark makes of a literal, by its reference: \\uXXXX, and any other character after a backslash.

    ${…} would have been replaced before, so there may be none.
    """
    assert "${" not in literal
    return re.sub(r"\\(?:u([0-9a-f]{4})|(.))", lambda m: chr(int(m[1], 16)) if m[1] else m[2], literal[1:-1])


def to_duckdb(text: str) -> str:
    """Spark's strings as DuckDB writes them."""
    return re.sub(
        r"'(?:\\.|[^'\\])*'", lambda match: "'" + spark_string(match[0]).replace("'", "''") + "'", text
    )


def run(table: LabelsTable, text: str, view: str) -> list[tuple[str, ...]]:
    connection = duckdb.connect()
    connection.register("every_row", table.dataset())
    # The extension that has it is not bundled; that it is asked for the right place is all that is left.
    connection.execute("CREATE MACRO delta_scan(uri) AS TABLE SELECT *, uri FROM every_row")
    connection.execute("CREATE SCHEMA lakes")
    connection.execute('CREATE VIEW lakes."my ""labels" AS FROM every_row')
    connection.execute(text)
    return connection.sql(f"SELECT source, image_id, run_id FROM {view} ORDER BY ALL").fetchall()


WANTED = [("s3://photos/2026", "a", "of B"), (ODD, "a", "old"), (ODD, "b", "new")]
MODELS = {ODD: A, "s3://photos/2026": B}


def test_duckdb_finds_the_newest_rows_by_the_text(table: LabelsTable) -> None:
    text = sql_text(table, MODELS, Engine.DUCKDB)
    assert f"FROM delta_scan('{table.uri}')" in text
    assert run(table, text, "current_labels") == sorted(WANTED)
    assert run(table, sql_text(table, {}, Engine.DUCKDB), "current_labels") == []


def test_sparks_text_means_the_same(table: LabelsTable) -> None:
    text = sql_text(table, MODELS, Engine.SPARK, "mine")
    assert text.startswith("CREATE OR REPLACE TEMPORARY VIEW mine AS\n")
    assert f"FROM delta.`{table.uri}`\n" in text
    assert run(table, to_duckdb(text.replace(f"delta.`{table.uri}`", "every_row")), "mine") == sorted(WANTED)


def test_trinos_text_means_the_same(table: LabelsTable) -> None:
    text = sql_text(table, MODELS, Engine.TRINO, trino_table='memory.lakes.my "labels')
    assert text.startswith('CREATE OR REPLACE VIEW "memory"."lakes".current_labels AS\n')
    assert run(table, text, "lakes.current_labels") == sorted(WANTED)


def test_spark_reads_s3_by_the_name_of_its_open_source_client(empty: LabelsTable) -> None:
    empty.uri = "s3://bucket/la`ke/labels"  # where it says it is; only its columns are asked for
    assert "delta.`s3a://bucket/la``ke/labels`" in sql_text(empty, MODELS, Engine.SPARK)


def test_a_source_is_named_once_for_its_model() -> None:
    condition = model_condition({"x": A, "y": B, "z": A}, Engine.TRINO)
    assert condition == (
        f"((model_id = '{A}' AND source IN ('x', 'z')) OR (model_id = '{B}' AND source IN ('y')))"
    )


@pytest.mark.parametrize(
    ("engine", "view", "name", "message"),
    [
        (Engine.TRINO, "v", None, "give catalog.schema.table"),
        (Engine.SPARK, "v", "a.b.c", "for Trino only"),
        (Engine.TRINO, "v", "a.b", "wanted Trino's name of the table"),
        (Engine.TRINO, "v", "a..c", "wanted Trino's name of the table"),
        (Engine.DUCKDB, "v; DROP TABLE x", None, "wanted letters, digits"),
    ],
)
def test_names_that_cannot_be_are_refused(
    engine: Engine, view: str, name: str | None, message: str, empty: LabelsTable
) -> None:
    with pytest.raises(UsageError, match=message):
        sql_text(empty, MODELS, engine, view, name)


def test_a_source_that_would_command_the_terminal_is_refused(empty: LabelsTable) -> None:
    with pytest.raises(UsageError, match="not printable"):
        sql_text(empty, {"s3://x\x1b[2J": A}, Engine.DUCKDB)
