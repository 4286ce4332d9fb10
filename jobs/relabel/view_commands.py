"""The commands `masklake sql | promote | rollback | history`; jobs.cli hangs them in.

Enters: a lake, a query or a model. Leaves: rows, SQL text for other engines, or a version of the label table
in which another model's labels are current.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_options import Endpoint, Json
from schemas.errors import GateRefused, UsageError
from schemas.specs import StorageSpec

if TYPE_CHECKING:
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage

app = typer.Typer(pretty_exceptions_enable=False)

Lake = Annotated[str, typer.Option(help="where the tables are")]
Version = Annotated[int | None, typer.Option(min=0, help="as of this version of the label table")]
At = Annotated[
    str | None, typer.Option(metavar="TIME", help="as of this time, ISO 8601; in UTC unless it says")
]
By = Annotated[str | None, typer.Option(help="who wants it; else the login")]
Why = Annotated[str, typer.Option(help="a line for the history")]


@app.command()
def sql(
    lake: Lake,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="QUERY",
            help="SELECT … FROM labels, detections (both of the current models) or all_labels",
        ),
    ] = None,
    source: Annotated[str | None, typer.Option(help="only this source's labels")] = None,
    version: Version = None,
    at: At = None,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE", help="print a view for duckdb, spark or trino instead"),
    ] = None,
    view: Annotated[str, typer.Option(help="--for: name of the view")] = "current_labels",
    trino_table: Annotated[
        str | None, typer.Option(metavar="CATALOG.SCHEMA.TABLE", help="--for trino: the label table's name")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print all rows as CSV")] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Query the current labels with DuckDB's SQL, or print a view by which another engine finds them.

    `labels` has a row for each image, `detections` one for each detection of them, `all_labels` every row
    that was ever made. Bytes are printed in hexadecimal: decode(rle) gives a mask's counts as text.
    """
    from jobs.lake.sql_text import Engine, sql_text
    from jobs.lake.storage import Storage
    from jobs.lake.views import current_labels
    from jobs.relabel.query import Rows, print_rows

    if (query is None) == (engine is None):
        raise UsageError("give a query, or --for ENGINE, and not both.")
    if as_csv and as_json:
        raise UsageError("--csv and --json were both given; give one.")
    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    labels = current_labels(lake, storage, _normalize(source, storage), version, _parse_time(at))
    if query is not None:
        print_rows(Rows(labels.connect(), query), labels.table.version, as_csv, as_json)
        return
    if engine not in list(Engine):
        raise UsageError(f"--for {engine}: wanted one of {', '.join(Engine)}.")
    text = sql_text(labels.table, labels.models, Engine(str(engine)), view, trino_table)
    print(json.dumps({"version": labels.table.version, "sql": text}) if as_json else f"{text};")


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(metavar="MODEL", help="NAME@N, alias:NAME or a model_id")],
    lake: Lake,
    source: Annotated[
        str | None, typer.Option(help="for this source only; else all that it labelled")
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="even if images with current labels have none of this model")
    ] = False,
    why: Why = "",
    by: By = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Make a model's labels the current ones, in one step: readers see the old ones or the new, whole."""
    from jobs.lake import current
    from jobs.lake.aliases import PREFIX, login, open_version
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.model_ids import resolve
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    table = LabelsTable.open(lake, storage)
    if reference.startswith(PREFIX):  # looked up once: an alias may move meanwhile
        reference = str(open_version(reference, storage, lake))
    model_id = resolve(reference, table, storage, lake)
    labelled = current.labelled_sources(table)
    only = _normalize(source, storage)
    sources = (
        [only] if only is not None else [name for name in sorted(labelled) if model_id in labelled[name]]
    )
    _check_categories(table, storage, sources, model_id)
    if not incomplete:
        _check_complete(table, sources, model_id)
    before = table.version
    model = None if reference == model_id else reference
    version = current.promote(table, sources, model_id, model, by or login(), why)
    _print_current(table, sources, version, version > before, as_json)


@app.command()
def rollback(
    lake: Lake,
    source: Annotated[str | None, typer.Option(help="of this source only")] = None,
    why: Why = "",
    by: By = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Make the labels of the model before current again; once more goes back one more."""
    from jobs.lake import current
    from jobs.lake.aliases import login
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    table = LabelsTable.open(lake, storage)
    only = _normalize(source, storage)
    said = current.read_current(table)
    if only is None and len({(one.name, one.before) for one in said.values()}) > 1:
        raise UsageError(
            f"the sources of {lake} have different current models: name one by --source. "
            + "; ".join(
                f"{name}: {one.name}, before it {one.previous or 'none'}" for name, one in said.items()
            )
        )
    sources = sorted(said) if only is None else [only]
    version = current.rollback(table, sources, by or login(), why)
    _print_current(table, sources, version, True, as_json)


@app.command()
def history(lake: Lake, endpoint_url: Endpoint = None, as_json: Json = False) -> None:
    """List the promotions and rollbacks, and the moves of aliases, the newest first."""
    from jobs.lake import current
    from jobs.lake.aliases import Aliases
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage
    from jobs.terminal_table import print_table

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    table = LabelsTable.open(lake, storage)
    aliases = Aliases(lake, storage)
    moves = [move for alias in aliases.names() for move in aliases.history(alias)]
    moves.sort(key=lambda move: move.at, reverse=True)
    switches = list(current.history(table))
    rows = [
        {
            "version": switch.version,
            "at": switch.at,
            "event": switch.event,
            "source": source,
            "model": new.model,
            "model_id": new.model_id,
            "before": None if old is None else old.model,
            "model_id_before": None if old is None else old.model_id,
            "by": switch.by,
            "why": switch.why,
        }
        for switch in switches
        for source, (new, old) in switch.sources.items()
    ]
    if as_json:
        said = {"version": table.version, "history": rows, "aliases": [asdict(move) for move in moves]}
        print(json.dumps(said))
        return
    if not rows:
        print("no model was ever promoted: of each source the only model's labels are current")
    else:
        shown = [
            (
                f"{switch.version}",
                switch.at,
                switch.event,
                source,
                str(new),
                "" if old is None else str(old),
                switch.by,
                switch.why,
            )
            for switch in switches
            for source, (new, old) in switch.sources.items()
        ]
        print_table(("version", "at", "event", "source", "model", "before", "by", "why"), shown)
    if moves:
        print_table(
            ("alias", "at", "model", "by", "why"),
            [(move.alias, move.at, move.model, move.by, move.why) for move in moves],
        )


def _check_categories(table: LabelsTable, storage: Storage, sources: Sequence[str], model_id: str) -> None:
    """Refuse a model whose category ids mean other things than those of the labels that count."""
    from jobs.lake.current import current_of
    from jobs.lake.model_ids import check_categories, read_model_id

    lake_uri = table.uri.removesuffix("/labels")
    new = read_model_id(storage, lake_uri, model_id)
    for now in {current_of(table, source) for source in sources} - {None, model_id}:
        old = read_model_id(storage, lake_uri, str(now))
        if old is None or new is None:
            unknown = model_id if new is None else now
            typer.echo(f"note     the categories of {unknown} were not written down: compare them", err=True)
        else:
            check_categories(old, new)


def _check_complete(table: LabelsTable, sources: Sequence[str], model_id: str) -> None:
    """Refuse a model that would take labels from images that have some."""
    from jobs.lake.current import current_of
    from jobs.lake.views import count_missing

    for source in sources:
        now = current_of(table, source)
        missing = 0 if now in (None, model_id) else count_missing(table, source, str(now), model_id)
        if missing:
            raise GateRefused(
                f"{missing:,} images of {source} have labels of {now}, which is current, and none of "
                f"{model_id}: label them first (`masklake relabel`), or promote it --incomplete. Nothing was "
                f"changed."
            )


def _print_current(
    table: LabelsTable, sources: Sequence[str], version: int, is_new: bool, as_json: bool
) -> None:
    from jobs.lake.current import read_current

    said = read_current(table)
    if as_json:
        models = {source: said[source].model_id for source in sources}
        print(json.dumps({"version": version, "changed": is_new, "current": models}))
        return
    for source in sources:
        print(f"current  {said[source].name} for {source}; before: {said[source].previous or 'nothing'}")
    print(f"table    version {version}{'' if is_new else ': it was so already'}")


def _normalize(source: str | None, storage: Storage) -> str | None:
    return None if source is None else storage.normalize(source)


def _parse_time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"--at {text}: wanted a time such as 2026-11-23T02:00:00+01:00 ({error})."
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
