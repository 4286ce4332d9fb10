"""Options that commands share, each with its one help text: types for the parameters of Typer commands."""

from __future__ import annotations

from typing import Annotated

import typer

Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint; else the environment's AWS_ENDPOINT_URL")]
Json = Annotated[
    bool, typer.Option("--json", help="print the result as one JSON object, the last line of stdout")
]
