"""The command `masklake diff`; jobs.cli hangs it in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_options import Endpoint, Json
from schemas.errors import UsageError
from schemas.specs import SourceSpec, StorageSpec

if TYPE_CHECKING:
    from jobs.lake.labels_table import LabelsTable
    from jobs.relabel.diff import LabelDiff

_SHOWN_CATEGORIES = 20
_SHOWN_IMAGES = 10


def diff(
    old: Annotated[str, typer.Argument(help="NAME@N, alias:NAME or a model_id")],
    new: Annotated[str, typer.Argument(help="likewise")],
    lake: Annotated[str, typer.Option(help="where the tables are")],
    source: Annotated[
        str | None, typer.Option(help="the images; needed where the models share several")
    ] = None,
    annotations: Annotated[str | None, typer.Option(help="coco:URI of ground truth: AP of both")] = None,
    out: Annotated[str | None, typer.Option(help="folder for a report with pictures")] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="detections below it are no objects")] = 0.5,
    match_iou: Annotated[
        float, typer.Option(min=0.01, max=1, help="IoU of the boxes of one and the same object")
    ] = 0.5,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="read no masks: IoUs of boxes")] = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Compare the labels of two models on the same images: lost, added, relabelled, moved."""
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.model_ids import resolve
    from jobs.lake.storage import Storage
    from jobs.relabel.diff import diff_models

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    lake_uri = storage.normalize(lake)
    table = LabelsTable.open(lake_uri, storage)
    old_id, new_id = (resolve(reference, table, storage, lake_uri) for reference in (old, new))
    if old_id == new_id:
        raise UsageError(f"{old} and {new} are both {old_id}: name two models.")
    chosen = _choose_source(table, None if source is None else storage.normalize(source), old_id, new_id)
    aps = None
    if annotations is not None:
        from jobs.relabel.gate import measure_ap

        aps = (
            measure_ap(annotations, table, storage, chosen, old_id),
            measure_ap(annotations, table, storage, chosen, new_id),
        )
    found = diff_models(
        table,
        storage,
        chosen,
        old_id,
        new_id,
        min_score=min_score,
        match_iou=match_iou,
        masks=not boxes_only,
    )
    report = None
    if out is not None:
        from jobs.relabel.diff_report import write_diff_report

        spec = SourceSpec(uri=source or chosen)
        report = write_diff_report(out, storage, found, table, spec, aps=aps)
    if as_json:
        print(json.dumps(found.to_dict() | {"ap": None if aps is None else list(aps), "report": report}))
        return
    _print(found)
    if aps is not None:
        print(f"mask AP  {aps[0]:.3f} old, {aps[1]:.3f} new")
    if report is not None:
        print(f"report   {report}")


def _choose_source(table: LabelsTable, asked: str | None, old_id: str, new_id: str) -> str:
    """The source that was asked for, or the only one that both models labelled."""
    both = sorted(_sources(table, old_id) & _sources(table, new_id))
    if asked in both:
        return asked
    if asked is None and len(both) == 1:
        return both[0]
    names = ", ".join(both) or "none"
    problem = (
        "name one with --source" if asked is None and both else f"{asked or 'a source'} is not among them"
    )
    raise UsageError(f"sources that both {old_id} and {new_id} labelled: {names}; {problem}.")


def _sources(table: LabelsTable, model_id: str) -> set[str]:
    """What a model labelled, by the log; from the rows where a file has several."""
    only = {file.sources.only for file in table.files(model_id)}
    if None in only:
        column = table.dataset(model_id).to_table(columns=["source"])["source"]
        return {str(source) for source in column.unique()}
    return {source for source in only if source is not None}


def _print(found: LabelDiff) -> None:
    from jobs.relabel.diff_words import OBJECT_HEAD, image_lines, object_rows, why
    from jobs.terminal_table import print_table, printable

    for title, model_id in (("old", found.old_model_id), ("new", found.new_model_id)):
        print(f"{title}      {printable(model_id)}")
    print(f"source   {printable(found.source)}")
    for words, number in image_lines(found):
        print(f"{number:>12,}  {words}")
    rows = list(object_rows(found))
    print_table(OBJECT_HEAD, rows[: _SHOWN_CATEGORIES + 1], numbers=True)
    if len(rows) > _SHOWN_CATEGORIES + 1:
        print(f"and {len(rows) - _SHOWN_CATEGORIES - 1:,} categories more: --json has them")
    for change in found.worst[:_SHOWN_IMAGES]:
        print(f"{printable(change.image_id)}: {why(change)}")
