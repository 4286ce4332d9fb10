"""The commands `masklake model register | alias | list`: the lake's registry and its aliases.

Enters: a checkpoint, a name, a lake. Leaves: versions and moves of aliases, and what there is of both.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_options import Endpoint, Json
from schemas.errors import UsageError
from schemas.specs import StorageSpec

if TYPE_CHECKING:
    from jobs.lake.aliases import AliasMove
    from jobs.lake.registry import ModelVersion
    from jobs.lake.storage import Storage

app = typer.Typer(pretty_exceptions_enable=False)

Lake = Annotated[str, typer.Option(help="where the tables and the registry are")]


@app.command()
def register(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="path or URI (.safetensors), or demo")
    ],
    lake: Lake,
    name: Annotated[str, typer.Option(help="of the model; its versions are NAME@1, NAME@2, …")],
    note: Annotated[str | None, typer.Option(help="a line to be kept with the version")] = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Make a checkpoint the next version of a model. A version stays what it is."""
    from jobs.lake.models import read_checkpoint_bytes
    from jobs.lake.registry import ModelRegistry
    from jobs.lake.storage import Storage
    from maskrcnn_core.checkpoint import parse_checkpoint

    if note is not None and not note.isprintable():
        raise UsageError(f"--note {note!r}: wanted one line without control characters.")
    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    storage.check_reachable(lake, "lake")
    registry = ModelRegistry(lake, storage)
    before = registry.versions(name)
    content, where = read_checkpoint_bytes(checkpoint, storage, lake)
    try:
        parsed = parse_checkpoint(content, where)
        parsed.build()  # refuses weights that do not fit, or are not finite
    except ValueError as error:
        raise UsageError(str(error)) from error
    # The newest only: going back to older weights is a version of its own.
    is_new = not before or before[-1].fingerprint != parsed.fingerprint
    if is_new:
        facts = {"checkpoint": parsed.name, "from": where} | ({} if note is None else {"note": note})
        version = registry.register(name, content, parsed.fingerprint, facts)
    else:
        version = before[-1]
    if as_json:
        print(json.dumps({"model": str(version), "made": is_new} | asdict(version)))
        return
    print(
        f"{version}\n"
        f"  {'registered' if is_new else 'has these weights already; no version was made'}\n"
        f"  fingerprint  {version.fingerprint}"
    )


@app.command()
def alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="such as champion")],
    model: Annotated[str, typer.Argument(metavar="NAME@N", help="a registered version, or alias:OTHER")],
    lake: Lake,
    why: Annotated[str, typer.Option(help="a line for the history")] = "",
    by: Annotated[str | None, typer.Option(help="who moves it; else the login")] = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Let an alias mean a version from now on; the history of its moves is kept."""
    from jobs.lake.aliases import Aliases, login, open_version
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    storage.check_reachable(lake, "lake")
    aliases = Aliases(lake, storage)
    move = aliases.move(alias, open_version(model, storage, lake), login() if by is None else by, why)
    before = next((one.model for one in aliases.history(alias) if one.number < move.number), None)
    if as_json:
        print(json.dumps(asdict(move) | {"before": before}))
    else:
        print(f"{alias} is {move.model}; before: {before or 'nothing'}")


@app.command("list")
def list_models(lake: Lake, endpoint_url: Endpoint = None, as_json: Json = False) -> None:
    """Say which models a lake has, what their aliases are, and which of them labelled something."""
    from jobs.lake.aliases import Aliases
    from jobs.lake.registry import ModelRegistry
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    storage.check_reachable(lake, "lake")
    registry, aliases = ModelRegistry(lake, storage), Aliases(lake, storage)
    versions = [version for name in registry.names() for version in registry.versions(name)]
    moves = {alias: aliases.history(alias) for alias in aliases.names()}
    labelled = _labelled(lake, storage)
    if as_json:
        rows = [
            {"model": str(version)}
            | asdict(version)
            | {
                "aliases": _aliases_of(version, moves),
                "labelled_as": labelled.get(version.fingerprint, []),
            }
            for version in versions
        ]
        history = {alias: [asdict(move) for move in its_moves] for alias, its_moves in moves.items()}
        print(json.dumps({"models": rows, "aliases": history}))
    elif not versions and not moves:
        print(f"no models are registered in {storage.normalize(lake)}")
    else:
        _print_versions(versions, moves, labelled)
        _print_aliases(moves)


def _labelled(lake: str, storage: Storage) -> dict[str, list[str]]:
    """Of weights, by fingerprint, the model_ids that have labels in the lake's table."""
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.model_ids import read_model_id

    found: dict[str, list[str]] = defaultdict(list)
    if LabelsTable.exists(lake, storage):
        for model_id in LabelsTable.open(lake, storage).model_ids():
            record = read_model_id(storage, lake, model_id)
            if record is not None:
                found[record.fingerprint].append(model_id)
    return found


def _aliases_of(version: ModelVersion, moves: dict[str, list[AliasMove]]) -> list[str]:
    return [alias for alias, its_moves in moves.items() if its_moves[0].model == str(version)]


def _print_versions(
    versions: list[ModelVersion], moves: dict[str, list[AliasMove]], labelled: dict[str, list[str]]
) -> None:
    from jobs.terminal_table import print_table

    rows = [
        (
            str(version),
            ", ".join(_aliases_of(version, moves)),
            version.created_at,
            ", ".join(labelled.get(version.fingerprint, [])),
            str(version.facts.get("note", "")),
        )
        for version in versions
    ]
    print_table(("model", "aliases", "registered", "labelled as", "note"), rows)


def _print_aliases(moves: dict[str, list[AliasMove]]) -> None:
    from jobs.terminal_table import print_table

    newest = [its_moves[0] for its_moves in moves.values()]
    if newest:
        print()
        print_table(
            ("alias", "model", "since", "by", "why"),
            [(move.alias, move.model, move.at, move.by, move.why) for move in newest],
        )
