"""The command line: `masklake infer | train | evaluate | schema | model … | demo | …`.

A MasklakeError becomes one line on stderr and its exit status; anything else is our own fault and keeps its
traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from jobs.care.cli import app as lake_commands
from jobs.command_options import Endpoint, Json
from jobs.export.cli import app as model_commands
from jobs.relabel.diff_command import diff
from jobs.relabel.relabel_commands import plan, relabel
from jobs.relabel.schedule_command import schedule
from jobs.relabel.view_commands import app as view_commands
from jobs.submit.commands import app as job_commands
from jobs.submit.commands import submit
from schemas.errors import MasklakeError, UsageError
from schemas.labels import ErrorKind
from schemas.spec_loader import SPECS, json_schema, load_spec
from schemas.specs import InferSpec, SourceSpec, StorageSpec
from schemas.train_spec import TrainSpec

app = typer.Typer(
    name="masklake",
    help="Instance masks for whole image lakes: label, train, evaluate, look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(model_commands)
app.add_typer(lake_commands)
app.command()(relabel)
app.command()(plan)
app.command()(diff)
app.command()(schedule)
app.add_typer(view_commands)
app.command()(submit)
app.add_typer(job_commands)

Overrides = Annotated[
    list[str], typer.Option("--set", help="override one setting of the spec: --set pool.batch_size=16")
]


@app.command()
def infer(
    spec_file: Annotated[
        Path | None, typer.Argument(help="spec file (YAML); flags and --set override it")
    ] = None,
    source: Annotated[str | None, typer.Option(help="images: folder, bucket prefix or list")] = None,
    model: Annotated[str | None, typer.Option(help="checkpoint, demo, alias:NAME or registry:NAME@N")] = None,
    lake: Annotated[str | None, typer.Option(help="where the tables are")] = None,
    retry_failed: Annotated[
        list[str],
        typer.Option(
            help=f"label only what failed before for this reason, again: all, {', '.join(ErrorKind)}"
        ),
    ] = [],  # noqa: B006 - Typer reads the default, nobody changes it
    overrides: Overrides = [],  # noqa: B006 - likewise
    as_json: Json = False,
) -> None:
    """Label every image of a source that the lake does not have labels for yet."""
    if retry_failed:
        kinds = list(ErrorKind) if "all" in retry_failed else retry_failed
        overrides = [*overrides, f"failures.retry=[{', '.join(kinds)}]", "failures.retry_only=true"]
    spec = load_spec(
        InferSpec,
        None if spec_file is None else str(spec_file),
        overrides,
        **{"source.uri": source, "model.uri": model, "lake.uri": lake},
    )
    from jobs.infer.progress import default_watcher
    from jobs.infer.run import run_infer

    summary = run_infer(spec, default_watcher())
    if as_json:
        print(summary.to_json())
    elif summary.status == "done":
        print(
            f"{summary.images:,} images labelled in {summary.seconds:.1f} s: {summary.ok:,} ok, "
            f"{summary.failed:,} failed, {summary.detections:,} detections.\n"
            f"model    {summary.model_id}\n"
            f"table    {summary.lake}/labels at version {summary.committed_version}\n"
            f"summary  {summary.lake}/runs/{summary.run_id}/summary.json"
        )


@app.command("train")
def train_model(
    spec_file: Annotated[
        Path | None, typer.Argument(help="spec file (YAML); flags and --set override it")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="coco:URI of an instances JSON, or lake:URI@VERSION of a label table")
    ] = None,
    images: Annotated[str | None, typer.Option(help="where the images of --data are")] = None,
    min_score: Annotated[float | None, typer.Option(help="lake: detections below it are background")] = None,
    ignore_below: Annotated[
        float | None,
        typer.Option(help="lake: those from --min-score to it are ignored"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="preset, or checkpoint to go on from")] = None,
    out: Annotated[str | None, typer.Option(help="where the run keeps checkpoints, model and report")] = None,
    register: Annotated[str | None, typer.Option(help="name in the lake's model registry")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop where an annotation is wrong")] = False,
    overrides: Overrides = [],  # noqa: B006 - as above
    as_json: Json = False,
) -> None:
    """Train a model on COCO files, on the labels of a lake, or both; run again, it goes on."""
    spec = load_spec(
        TrainSpec,
        None if spec_file is None else str(spec_file),
        overrides,
        **{
            "data.train.uri": data,
            "data.train.images": images,
            "data.train.min_score": min_score,
            "data.train.ignore_below": ignore_below,
            "model.uri": model,
            "out.uri": out,
            "register_as.name": register,
            "strict": strict or None,
        },
    )
    from jobs.train.run import run_train
    from jobs.train.watcher import default_watcher

    summary = run_train(spec, default_watcher())
    if as_json:
        print(summary.to_json())
        return
    print(
        f"{summary.steps:,} steps in {summary.seconds:.0f} s.\n"
        f"model    {summary.model}\n"
        f"report   {summary.out}/report/report.md"
    )
    if summary.ap is not None:
        print(f"mask AP  {summary.ap:.3f}")
    if summary.registered is not None:
        print(f"registered as {summary.registered}")


@app.command()
def evaluate(
    lake: Annotated[str, typer.Option(help="where the tables are")],
    annotations: Annotated[str, typer.Option(help="COCO instances JSON with the ground truth")],
    model_id: Annotated[str | None, typer.Option(help="needed where several models have labelled")] = None,
    source: Annotated[str | None, typer.Option(help="only this source's labels")] = None,
    version: Annotated[int | None, typer.Option(min=0, help="as of this version of the label table")] = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Score the labels of a lake against ground truth: COCO AP of boxes and masks."""
    from jobs.evaluate.run import run_evaluate
    from jobs.lake.storage import Storage

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    result = run_evaluate(lake, annotations, model_id, storage, source, version)
    if as_json:
        print(result.to_json())
        return
    print(
        f"{result.images:,} images of {result.model_id}, {result.failed:,} failed, "
        f"{result.unlabelled:,} not labelled"
    )
    for name, figures in (("mask", result.segm), ("box", result.bbox)):
        print(f"{name:5s}" + "  ".join(f"{metric} {value:.3f}" for metric, value in figures.items()))


@app.command()
def report(
    lake: Annotated[str, typer.Option(help="where the tables are")],
    source: Annotated[str, typer.Option(help="the images that were labelled")],
    out: Annotated[Path, typer.Option(help="PNG to write")],
    model_id: Annotated[str | None, typer.Option(help="needed where several models have labelled")] = None,
    annotations: Annotated[str | None, typer.Option(help="COCO JSON to take category names from")] = None,
    num_images: Annotated[int, typer.Option(min=1, max=400)] = 12,
    min_score: Annotated[float, typer.Option(min=0, max=1)] = 0.5,
    endpoint_url: Endpoint = None,
) -> None:
    """Draw a contact sheet of labelled images with their masks."""
    from jobs.evaluate.run import read_coco
    from jobs.lake.labels_table import LabelsTable
    from jobs.lake.storage import Storage
    from jobs.report.overlay import contact_sheet

    storage = Storage(StorageSpec(endpoint_url=endpoint_url))
    table = LabelsTable.open(lake, storage)
    truth = read_coco(annotations, storage) if annotations else {"categories": []}
    names = {int(c["id"]): str(c["name"]) for c in truth["categories"]}
    chosen = table.choose_model(model_id)
    out.write_bytes(
        contact_sheet(
            table, chosen, SourceSpec(uri=source), names, storage, num_images=num_images, min_score=min_score
        )
    )
    print(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to make")] = Path("demo-lake"),
    scenes: Annotated[int, typer.Option(min=1, max=100_000, help="images to render")] = 160,
) -> None:
    """Render a small lake, label it with the bundled checkpoint, score it, and say where to look."""
    from jobs.demo.tour import run_demo
    from jobs.infer.progress import default_watcher

    run_demo(out, default_watcher(), scenes)


@app.command()
def schema(spec: Annotated[str, typer.Argument(help=f"one of: {', '.join(SPECS)}")] = "infer") -> None:
    """Print the JSON Schema of a spec file."""
    print(json.dumps(json_schema(spec), indent=2))


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except MasklakeError as error:
        print(f"masklake: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ValidationError as error:  # of a flag that is a spec's setting too; its own text quotes the value
        details = error.errors(include_url=False, include_input=False)
        said = "; ".join(f"{d['loc'][-1]} {d.get('ctx', {}).get('error', d['msg'])}" for d in details)
        print(f"masklake: {said}", file=sys.stderr)
        sys.exit(UsageError.exit_code)


if __name__ == "__main__":
    main()
