"""A query and its rows, jobs/relabel/query.py."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import pytest

from jobs.relabel.query import Rows, print_rows
from schemas.errors import UsageError


def connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("CREATE TEMP VIEW labels AS SELECT 'a' AS image_id, 2 AS num_detections")
    return connection


def test_values_of_every_kind_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    query = """
        SELECT TIMESTAMPTZ '2023-11-14 22:13:20+00' AS at, 'xy'::BLOB AS hash, {'x0': 1.5, 'n': NULL} AS box,
        NULL AS nothing, 'nan'::DOUBLE AS nan, 1.25::DECIMAL(9, 2) AS money, sum(num_detections) AS sum,
        true AS yes, [1, 2] AS list, DATE '2026-11-23' AS day, INTERVAL 1 DAY IS NULL AS no, 'ü,"' AS text
        FROM labels
    """
    row = ["2023-11-14T22:13:20+00:00", "7879", {"x0": 1.5, "n": None}, None, None, 1.25, 2, True, [1, 2]]
    row += ["2026-11-23", False, 'ü,"']
    assert list(Rows(connect(), query)) == [row]
    print_rows(Rows(connect(), query), 7, as_csv=False, as_json=True)
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (answer["version"], answer["rows"], answer["columns"][:2]) == (7, [row], ["at", "hash"])
    print_rows(Rows(connect(), query), 7, as_csv=True, as_json=False)
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert json.loads(line["box"]) == row[2]
    assert (line["nothing"], line["yes"], line["money"], line["text"]) == ("", "true", "1.25", 'ü,"')


def test_no_rows_and_more_than_a_batch_of_them() -> None:
    assert list(Rows(connect(), "FROM labels LIMIT 0")) == []
    assert sum(n for (n,) in Rows(connect(), "SELECT unnest(range(25000))")) == 25_000 * 24_999 // 2


def test_a_terminal_is_shown_the_beginning_of_long_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(Rows(connect(), "SELECT repeat('z', 999) AS mask"), 7, as_csv=False, as_json=False)
    text = capsys.readouterr().out
    assert text.count("z") == 200
    assert "…" in text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM read_text('{file}')", "Permission Error"),
        ("SELECT * FROM '{file}'", "Permission Error"),
        ("SELECT * FROM glob('/*')", "Permission Error"),
        ("SELECT * FROM read_csv('http://127.0.0.1:9/x')", "Permission Error|httpfs"),
        ("COPY labels TO '{file}'", "not one SELECT, but COPY: it may only read"),
        ("SELECT 1; COPY labels TO '{file}'", "not one SELECT, but SELECT, COPY"),
        ("EXPLAIN ANALYZE COPY labels TO '{file}'", "not one SELECT, but EXPLAIN"),
        ("ATTACH '{file}'", "not one SELECT, but ATTACH"),
        ("SET enable_external_access = true", "not one SELECT, but SET"),
        ("INSTALL httpfs", "not one SELECT"),
        ("CREATE TABLE t AS SELECT 1", "not one SELECT, but CREATE"),
        ("SELECT * FROM secret", "does not exist"),  # a variable of the program's
        ("/* nothing */", "not one SELECT, but empty"),
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT nonsense FROM labels", "nonsense"),
        ("SELECT 'x'::INT", "Could not convert string 'x'"),
    ],
)
def test_a_query_reads_labels_and_nothing_else(query: str, message: str, tmp_path: Path) -> None:
    secret = connect().sql("SELECT 1")
    assert secret is not None
    file = tmp_path / "secret.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=message):
        list(Rows(connect(), query.format(file=file)))
    assert file.read_text() == "a,b\n1,2\n"
