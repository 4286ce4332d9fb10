"""The command line: `masklake infer | evaluate | schema | demo | …`.

A MasklakeError becomes one line on stderr and its exit status; anything else is our own fault and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import MasklakeError
from schemas.specs import SPECS, InferSpec, json_schema, load_spec

app = typer.Typer(
    name="masklake",
    help="Instance masks for whole image lakes: label, evaluate, look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Overrides = Annotated[list[str], typer.Option("--set", help="override one setting of the spec: --set pool.batch_size=16")]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object, the last line of stdout")]


@app.command()
def infer(
    spec_file: Annotated[Path | None, typer.Argument(help="spec file (YAML); flags and --set override it")] = None,
    source: Annotated[str | None, typer.Option(help="images: folder, bucket prefix or list")] = None,
    model: Annotated[str | None, typer.Option(help="checkpoint (.safetensors), or demo")] = None,
    lake: Annotated[str | None, typer.Option(help="where the tables are")] = None,
    overrides: Overrides = [],  # noqa: B006 - Typer reads the default, nobody changes it
    as_json: Json = False,
) -> None:
    """Label every image of a source that the lake does not have labels for yet."""
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
            f"{summary.images:,} images labelled in {summary.seconds:.1f} s: {summary.ok:,} ok, {summary.failed:,} failed, "
            f"{summary.detections:,} detections.\n"
            f"model    {summary.model_id}\n"
            f"table    {summary.lake}/labels at version {summary.committed_version}\n"
            f"summary  {summary.lake}/runs/{summary.run_id}/summary.json"
        )


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


if __name__ == "__main__":
    main()
