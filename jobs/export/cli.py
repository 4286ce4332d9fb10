"""The commands `masklake model import | export | inspect`, and the registry's; jobs.cli hangs them in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from jobs.command_options import Endpoint, Json
from jobs.export.registry_commands import app as registry_commands
from schemas.specs import StorageSpec

app = typer.Typer(
    name="model",
    help="Models in and out: torchvision, Detectron2, ONNX; what a file holds; the lake's registry.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(registry_commands)

Lake = Annotated[str | None, typer.Option(help="whose registry has alias:NAME and registry:NAME@N")]
Force = Annotated[bool, typer.Option("--force", help="overwrite what is there")]


class Format(StrEnum):
    auto = "auto"
    torchvision = "torchvision"
    detectron2 = "detectron2"


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help=".pth, .pkl or .safetensors; path or URI")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="checkpoint to write (.safetensors)")],
    kind: Annotated[Format, typer.Option("--format", help="auto: by the tensors' names")] = Format.auto,
    recipe: Annotated[
        str | None, typer.Option(help="training config of Detectron2's weights; a wrong name lists them")
    ] = None,
    name: Annotated[str | None, typer.Option(help="first part of model_id; else SRC's stem")] = None,
    categories: Annotated[
        str | None, typer.Option(help="coco, or a COCO-style JSON list; where no file says the names")
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="a field of the config that no file says: --set norm_eps=0")
    ] = [],  # noqa: B006 - Typer reads the default, nobody changes it
    force: Force = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Make a checkpoint out of torchvision's or Detectron2's weights. Nothing in the file is run."""
    from jobs.export.import_weights import ImportRequest, run_import
    from jobs.lake.storage import Storage

    request = ImportRequest(source, out, kind.value, recipe, name, categories, settings, force)
    result = run_import(request, Storage(StorageSpec(endpoint_url=endpoint_url)))
    if as_json:
        print(result.to_json())
        return
    print(
        f"{result.out}\n"
        f"  from         {result.format}{f', recipe {result.recipe}' if result.recipe else ''}\n"
        f"  preset       {result.preset}, {result.categories} categories, {result.dtype}\n"
        f"  fingerprint  {result.fingerprint}"
    )


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="checkpoint (.safetensors), demo, alias:NAME or registry:NAME@N"),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="file to write: .pth for torchvision, or .onnx")],
    lake: Lake = None,
    force: Force = False,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for another project; beside a .pth, OUT.json holds names and config."""
    from jobs.export.export_weights import run_export
    from jobs.lake.storage import Storage

    result = run_export(source, out, Storage(StorageSpec(endpoint_url=endpoint_url)), force, lake)
    if as_json:
        print(result.to_json())
        return
    print("\n".join(result.files))
    target = result.torchvision
    if target is None:
        return
    if target.builder is None:
        print("  torchvision has no function that builds these layers; its modules have these names.")
        return
    arguments = "".join(f", {name}={value!r}" for name, value in target.arguments.items())
    print(
        f"  for torchvision.models.detection.{target.builder}(weights=None, weights_backbone=None{arguments})"
    )
    if target.differences:
        fields = ", ".join(f"{name}={value!r}" for name, value in target.differences.items())
        print(f"  which cannot be told {fields}, and so computes something else with these weights.")


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="any model file, demo, alias:NAME or registry:NAME@N")
    ],
    lake: Lake = None,
    endpoint_url: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Say what a model file holds: ours, torchvision's or Detectron2's."""
    from jobs.export.inspect_model import run_inspect
    from jobs.lake.storage import Storage
    from jobs.terminal_table import print_table

    report = run_inspect(source, Storage(StorageSpec(endpoint_url=endpoint_url)), lake)
    if as_json:
        print(json.dumps(report))
    else:
        print_table(None, _lines(report))


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line of a report; the name only in the first line of a value."""
    for name, value in report.items():
        for number, line in enumerate(_texts(name, value)):
            yield "" if number else name.replace("_", " "), line


def _texts(name: str, value: Any) -> list[str]:
    if name == "categories":
        return [f"{len(value)}: " + ", ".join(f"{category_id} {label}" for category_id, label in value)]
    if isinstance(value, dict):
        return [f"{key} = {item}" for key, item in value.items()] or ["none"]
    if isinstance(value, list):
        return [", ".join(map(str, value)) or "none"]
    return [f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)]
