"""A query over the labels of a lake, and its rows for people and for programs.

Enters: a DuckDB connection with views, one SELECT. Leaves: rows as they are asked for; a table for a
terminal, CSV, or JSON.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any

import duckdb
import pyarrow as pa

from jobs.terminal_table import print_table
from schemas.errors import MasklakeError, StorageError, UsageError

_SHOWN_ROWS = 50
_SHOWN_CHARS = 200
_BATCH_ROWS = 10_000


class Rows:
    """What a query gives, read as it is asked for.

    Raises:
        UsageError: it is not one SELECT, not DuckDB's SQL, names what is not there, or wants to read other
            things than the lake's labels.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, query: str) -> None:
        # What the query may touch is what was registered: no file, no network, no variable of this program.
        for name, value in (
            ("python_enable_replacements", "false"),
            ("autoinstall_known_extensions", "false"),
            ("autoload_known_extensions", "false"),
            ("enable_external_access", "false"),
            ("lock_configuration", "true"),
        ):
            connection.execute(f"SET {name} = {value}")
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type.name != "SELECT":
                kinds = ", ".join(statement.type.name for statement in statements)
                raise UsageError(f"the query is not one SELECT, but {kinds or 'empty'}: it may only read.")
            relation = connection.sql(query)
            assert relation is not None  # a SELECT has rows
            self._reader = relation.to_arrow_reader(_BATCH_ROWS)
        except duckdb.Error as error:
            raise _in_words(error) from error
        self.columns: list[str] = self._reader.schema.names

    def __iter__(self) -> Iterator[list[Any]]:
        """The rows: numbers, strings, booleans and None, or lists and dictionaries of them."""
        while True:
            try:
                batch = self._reader.read_next_batch()
            except StopIteration:
                return
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                raise _in_words(error) from error
            columns = [[_plain(value) for value in column.to_pylist()] for column in batch.columns]
            yield from map(list, zip(*columns, strict=True))


def print_rows(rows: Rows, version: int, as_csv: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"version": version, "columns": rows.columns, "rows": list(rows)}))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(rows.columns)
        writer.writerows([_cell(value) for value in row] for row in rows)
    else:
        some = list(islice(rows, _SHOWN_ROWS + 1))
        shown = [[_short(_cell(value)) for value in row] for row in some[:_SHOWN_ROWS]]
        print_table([_short(name) for name in rows.columns], shown)
        if len(some) > _SHOWN_ROWS:
            print(f"the first {_SHOWN_ROWS} rows; --csv prints all")


def _in_words(error: Exception) -> MasklakeError:
    """DuckDB's message, without its drawing of the place; a file that cannot be read is not the user's."""
    text = str(error).split("\n\n", 1)[0]
    is_storage = isinstance(error, OSError) or "reading the stream registered as" in text
    return StorageError(f"reading labels failed: {text}") if is_storage else UsageError(f"the query: {text}")


def _plain(value: Any) -> Any:
    """A value of Arrow's as JSON has it; bytes in hexadecimal."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _short(cell: str) -> str:
    """Masks are long."""
    return cell if len(cell) <= _SHOWN_CHARS else f"{cell[:_SHOWN_CHARS]}…"
