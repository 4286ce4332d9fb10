"""`masklake demo`: render a small lake, label it with the bundled checkpoint, score it, say where to look."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.demo.lake import write_scene_lake
from jobs.demo.scenes import SCENE_CATEGORIES
from jobs.evaluate.run import Evaluation, run_evaluate
from jobs.infer.progress import Watcher
from jobs.infer.run import run_infer
from jobs.infer.summary import Summary
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.report.overlay import contact_sheet
from schemas.spec_loader import load_spec
from schemas.specs import InferSpec

NUM_SHARDS = 4


def run_demo(folder: Path, watcher: Watcher, num_scenes: int) -> tuple[Summary, Evaluation]:
    """Everything a first-time user wants to see, below `folder`; a second run labels nothing again."""
    started = time.monotonic()
    console = Console(highlight=False)
    console.print(f"1. rendering {num_scenes} scenes into {NUM_SHARDS} tar shards: {folder}/images")
    write_scene_lake(folder, range(num_scenes), NUM_SHARDS)
    console.print("2. labelling them with the bundled checkpoint (masklake infer --model demo)")
    spec = load_spec(
        InferSpec,
        None,
        **{"source.uri": f"{folder}/images", "model.uri": "demo", "lake.uri": f"{folder}/lake"},
    )
    summary = run_infer(spec, watcher)
    console.print("3. comparing with the exact masks (masklake evaluate)")
    storage = Storage(spec.storage)
    evaluation = run_evaluate(spec.lake.uri, f"{folder}/annotations.json", summary.model_id, storage)
    table = LabelsTable.open(spec.lake.uri, storage)
    sheet = folder / "overlays.png"
    sheet.write_bytes(contact_sheet(table, summary.model_id, spec.source, dict(SCENE_CATEGORIES), storage))
    console.print(_figures(summary, evaluation, time.monotonic() - started))
    console.print(
        f"the picture   {sheet}\n"
        f"the table     {folder}/lake/labels (Delta Lake, version {table.version})\n"
        f"the truth     {folder}/annotations.json\n"
        f"read it       {_read_it(folder)}",
        soft_wrap=True,
        markup=False,
    )
    return summary, evaluation


def _read_it(folder: Path) -> str:
    """A shell command that prints some rows of the table."""
    query = "select image_id, num_detections, max_score from read_parquet({files}) limit 5"
    return (
        f"""{sys.executable} -c "import deltalake, duckdb; """
        f"""files = deltalake.DeltaTable('{folder}/lake/labels').file_uris(); """
        f"""print(duckdb.sql(f'{query}'))\""""
    )


def _figures(summary: Summary, evaluation: Evaluation, seconds: float) -> Table:
    table = Table(show_header=False, box=None)
    labelled = f"{summary.images} now ({summary.ok} ok, {summary.failed} failed), {evaluation.images} in all"
    rate = (
        f"{summary.images / summary.seconds:.1f} images/s with start-up"
        if summary.images
        else "nothing to do"
    )
    for name, value in (
        ("images labelled", labelled),
        ("rate", rate),
        (
            "mask AP",
            "{AP:.3f}   (AP50 {AP50:.3f}, AP75 {AP75:.3f})".format(**evaluation.segm),
        ),
        ("box AP", f"{evaluation.bbox['AP']:.3f}"),
        ("seconds", f"{seconds:.0f}"),
    ):
        table.add_row(name, value)
    return table
