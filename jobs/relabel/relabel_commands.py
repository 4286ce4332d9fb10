"""The commands `masklake relabel` and `masklake plan`; jobs.cli hangs them in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_options import Json
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec

if TYPE_CHECKING:
    from jobs.relabel.forecast import Forecast
    from jobs.relabel.run import RelabelSummary

SpecFile = Annotated[Path | None, typer.Argument(help="spec file (YAML); flags and --set override it")]
Overrides = Annotated[list[str], typer.Option("--set", help="override one setting of the spec")]
Source = Annotated[str | None, typer.Option(help="images: folder, bucket prefix or list")]
Model = Annotated[str | None, typer.Option(help="checkpoint, alias:NAME or registry:NAME@N")]
Lake = Annotated[str | None, typer.Option(help="where the tables are")]
TimeBudget = Annotated[
    str | None, typer.Option(help="end after a commit when so much time is over, such as 4h")
]
MaxImages = Annotated[int | None, typer.Option(min=1, help="end after so many images")]


def relabel(
    spec_file: SpecFile = None,
    source: Source = None,
    model: Model = None,
    lake: Lake = None,
    time_budget: TimeBudget = None,
    max_images: MaxImages = None,
    overrides: Overrides = [],  # noqa: B006 - Typer reads the default, nobody changes it
    as_json: Json = False,
) -> None:
    """Label what is new, changed or stale in a source; promote the model once all is labelled and passes."""
    from jobs.infer.progress import default_watcher
    from jobs.relabel.run import run_relabel

    spec = _load(spec_file, source, model, lake, time_budget, max_images, overrides)
    summary = run_relabel(spec, default_watcher())
    if as_json:
        print(summary.to_json())
    else:
        _print_summary(summary)


def plan(
    spec_file: SpecFile = None,
    source: Source = None,
    model: Model = None,
    lake: Lake = None,
    time_budget: TimeBudget = None,
    max_images: MaxImages = None,
    sample: Annotated[
        int, typer.Option(min=0, max=10_000, help="images that are labelled to measure the rate; 0: none")
    ] = 32,
    overrides: Overrides = [],  # noqa: B006 - as above
    as_json: Json = False,
) -> None:
    """Say what `masklake relabel` would do, how long it would take and cost. Writes nothing."""
    from jobs.relabel.forecast import run_forecast

    spec = _load(spec_file, source, model, lake, time_budget, max_images, overrides)
    forecast = run_forecast(spec, sample)
    if as_json:
        print(forecast.to_json())
    else:
        _print_forecast(forecast)


def _load(
    spec_file: Path | None,
    source: str | None,
    model: str | None,
    lake: str | None,
    time_budget: str | None,
    max_images: int | None,
    overrides: list[str],
) -> RelabelSpec:
    return load_spec(
        RelabelSpec,
        None if spec_file is None else str(spec_file),
        overrides,
        **{
            "source.uri": source,
            "model.uri": model,
            "lake.uri": lake,
            "budget.time_s": time_budget,
            "budget.max_images": max_images,
        },
    )


def _print_summary(summary: RelabelSummary) -> None:
    model = summary.model or summary.model_id
    texts = {
        "up_to_date": "up to date",
        "promoted": f"{model} is promoted: its labels count now",
        "complete": f"all is labelled by {model}, which is not promoted (promote: never)",
        "limited": "the budget is used up; the next run goes on",
    }
    print(f"{summary.images:,} images labelled in {summary.seconds:.1f} s: {texts[summary.status]}.")
    print(f"current  {summary.current or 'none yet'}")
    if summary.report is not None:
        print(f"report   {summary.report}")
    if summary.version is not None:
        print(f"table    {summary.lake}/labels at version {summary.version}")


def _print_forecast(forecast: Forecast) -> None:
    from rich.console import Console
    from rich.table import Table

    from jobs.relabel.worklist import Reason

    table = Table()
    table.add_column("images")
    for part in forecast.passes:
        table.add_column(part.model_id, justify="right")
    for reason in Reason:
        label = reason.replace("_", " ")
        table.add_row(label, *(f"{part.counts[reason]:,}" for part in forecast.passes))
    table.add_row("removed", *(f"{part.removed:,}" for part in forecast.passes))
    table.add_row("only read", *(f"{part.read_only:,}" for part in forecast.passes))
    table.add_row("to label", *(f"{part.images:,}" for part in forecast.passes))
    table.add_row("by estimate", *(f"{part.estimated:,}" for part in forecast.passes))
    rates = ("–" if part.images_per_s is None else f"{part.images_per_s:.1f}" for part in forecast.passes)
    table.add_row("images/s", *rates)
    if forecast.passes:
        Console(width=max(80, 24 + 24 * len(forecast.passes))).print(table)
    for note in forecast.notes:
        print(f"note      {note}")
    print(f"current   {forecast.current or 'none yet'}")
    print(f"this run  {forecast.this_run:,} of {forecast.images:,} images, {forecast.actors} actors")
    if forecast.images and forecast.seconds is None:
        print("time      not known: nothing was sampled")
    elif forecast.images:
        print(f"          {_time(forecast.seconds or 0.0)}, until {forecast.finish_at}")
        runs = f"in {forecast.runs} runs, " if forecast.runs > 1 else ""
        print(f"all       {runs}{forecast.hours:,.2f} actor-hours, {forecast.price:,.2f} {forecast.currency}")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
