"""The commands `masklake lake doctor | vacuum | compact | retire`; jobs.cli hangs them in."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_options import Endpoint, Json
from jobs.terminal_table import printable
from schemas.durations import parse_duration
from schemas.specs import SourceSpec, StorageSpec

if TYPE_CHECKING:
    from jobs.care.doctor import Audit
    from jobs.care.retire import Retirement
    from jobs.care.source_check import SourceCheck
    from jobs.care.store_files import StoredFile

app = typer.Typer(
    name="lake",
    help="Care of the label table: is it sound, make room, merge small files, retire old models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Lake = Annotated[str, typer.Option(help="where the tables are")]


@app.command()
def doctor(
    lake: Lake,
    source: Annotated[
        str | None, typer.Option(help="compare the rows with these images too: folder, bucket prefix or list")
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="read every column, decode every mask, compare the checksums of weights"),
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Read the label table back and say what is wrong with it. Exit status 1 where something is."""
    from jobs.care.doctor import audit_into, key_database
    from jobs.care.source_check import check_source
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    with key_database() as keys:
        found = audit_into(keys, lake, storage, deep)
        sources = []
        if source is not None:
            table = LabelsTable.open(found.lake, storage, found.version)
            sources = check_source(keys, table, found.lake, SourceSpec(uri=source), storage)
    if as_json:
        print(json.dumps(found.to_dict() | {"sources": [asdict(check) for check in sources]}))
    else:
        _print_audit(found, sources, deep)
    if not found.is_sound:
        sys.exit(1)


@app.command()
def vacuum(
    lake: Lake,
    grace: Annotated[
        str, typer.Option(help="keep files that were needed within this time: 12h, 7d, …; at least 1h")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, delete nothing")] = False,
    force_grace: Annotated[
        bool, typer.Option("--force-grace", help="take a grace period of less than 1h")
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Delete files that runs left behind or that compact and retire took out, after a grace period."""
    from jobs.care.vacuum import vacuum as run_vacuum
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    result = run_vacuum(lake, storage, parse_duration(grace), dry_run=dry_run, force=force_grace)
    if as_json:
        print(json.dumps(asdict(result) | {"num_bytes": result.num_bytes}))
        return
    noun = "unfinished write"
    print(
        f"{'would delete' if dry_run else 'deleted'}  {_files(result.deleted)}"
        f"{f' and {_number(result.num_unfinished, noun)}' if result.num_unfinished else ''}\n"
        f"kept     {_files(result.kept)}: for {grace} a reader may need them, or a run commit them\n"
        f"whole    {_versions(result.oldest_whole_version)}"
    )


@app.command()
def compact(
    lake: Lake,
    model_id: Annotated[str | None, typer.Option(help="only this model's files")] = None,
    target_mb: Annotated[int, typer.Option(min=1, max=1024, help="size of a merged file, MiB")] = 256,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Merge small files into large ones. The rows stay, and readers at work are not disturbed."""
    from jobs.lake.compact import run_compaction
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    table = LabelsTable.open(lake, storage)
    if model_id is not None:
        table.choose_model(model_id)
    result = run_compaction(table, storage.normalize(lake), storage, model_id, target_mb << 20)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    print(
        f"{_number(result.num_old_files, 'file')} became {result.num_new_files:,}, "
        f"{_size(result.num_bytes)}, in {result.seconds:.1f} s; the table is at version {result.version}"
    )
    if result.num_given_up:
        print(f"{result.num_given_up:,} groups were left: somebody else replaced their files meanwhile")


@app.command()
def retire(
    lake: Lake,
    model_id: Annotated[
        list[str] | None, typer.Option(help="this model; may be repeated. Else all that may go")
    ] = None,
    older_than: Annotated[
        str, typer.Option(help="only models whose newest row is older than this: 12h, 90d, …")
    ] = "90d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, change nothing")] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Take the labels of models that nobody needs out of the table. Earlier versions have them until vacuum.

    Models stay that are current or previous, have an alias, are labelled with, or have young labels.
    """
    from jobs.care.retire import retire as run_retire
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    result = run_retire(lake, storage, model_id or (), parse_duration(older_than), dry_run=dry_run)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print_retirement(result)


def _print_retirement(result: Retirement) -> None:
    for model in result.retired:
        print(
            f"{'would go' if result.dry_run else 'retired '} {model.model_id}: "
            f"{_number(model.num_rows, 'row')} in {_number(model.num_files, 'file')}, "
            f"{_size(model.num_bytes)}, the newest of {model.newest_row_at[:10]}"
        )
    for model_id, reason in result.kept.items():
        print(f"kept     {model_id}: {reason}")
    if not result.retired:
        print("nothing to retire")
    elif not result.dry_run:
        print(
            f"table    at version {result.version}; earlier ones have these labels until "
            f"`masklake lake vacuum` deletes their files, 7d from now by default"
        )


def _print_audit(found: Audit, sources: list[SourceCheck], deep: bool) -> None:
    statuses = ", ".join(f"{count:,} {status}" for status, count in found.rows_by_status.items()) or "none"
    sample = "" if deep or found.num_files_whole == found.num_files else "; --deep checks all"
    print(
        f"table    {found.lake}/labels at version {found.version}: {_number(found.num_files, 'file')}, "
        f"{_size(found.num_bytes)}\n"
        f"rows     {found.num_rows:,} of {found.num_images:,} images: {statuses}\n"
        f"masks    {found.num_masks_checked:,} of {found.num_masks:,} decoded, from "
        f"{_number(found.num_files_whole, 'file')}{sample}\n"
        f"orphans  {_files(found.orphans)} that no version names\n"
        f"older    {_files(found.replaced)} that only earlier versions name"
    )
    for check in sources:
        unknown = f", {_number(check.unknown_shards, 'shard')} not read yet" if check.unknown_shards else ""
        print(
            f"source   {check.source}: {_number(check.listed, 'image')}, {check.missing:,} without a row of "
            f"{check.model_id}, {_number(check.extra, 'row')} without an image{unknown}"
        )
    for lease in found.leases:
        print(f"at work  {printable(lease.holder)} (lease {lease.key}, {lease.expires_in_s:.0f} s left)")
    for run_id in found.unfinished_runs:
        print(f"no end   run {printable(run_id)} wrote no summary: it is at work, or was killed")
    print("\n".join(f"WRONG    {printable(problem)}" for problem in found.problems) or "sound")


def _files(files: list[StoredFile]) -> str:
    num_bytes = sum(file.size_bytes for file in files)
    oldest_s = max((file.age_s for file in files), default=0.0)
    if not files:
        return "0 files"
    return f"{_number(len(files), 'file')} ({_size(num_bytes)}, oldest {_age(oldest_s)})"


def _versions(oldest: int) -> str:
    return f"version {oldest} and later; earlier ones may lack files" if oldest else "every version"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _age(seconds: float) -> str:
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
