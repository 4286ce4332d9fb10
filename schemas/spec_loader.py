"""Loads a spec: a YAML file, overrides over it, the flags over both, then one check of everything.

Enters: a YAML file or `env:NAME`, `a.b=c` overrides, the flags' URIs. Leaves: a validated spec, or a
UsageError that names every problem at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from schemas.errors import UsageError
from schemas.relabel_spec import RelabelSpec
from schemas.spec_file import override, put, read_spec_file
from schemas.spec_problems import nearest, problems, sections, show
from schemas.specs import InferSpec
from schemas.train_spec import TrainSpec

SPECS: dict[str, type[BaseModel]] = {"infer": InferSpec, "relabel": RelabelSpec, "train": TrainSpec}

SpecT = TypeVar("SpecT", bound=BaseModel)


def load_spec(cls: type[SpecT], path: str | None, overrides: Sequence[str] = (), **flags: object) -> SpecT:
    """Read a spec file, lay the overrides over it, and the flags over both.

    Args:
        cls: the spec's model, such as InferSpec.
        path: a local YAML file of at most 1 MiB, or `env:MASKLAKE_SPEC`, the variable that holds the YAML;
            None: start from the defaults.
        overrides: `pool.batch_size=16`, values in YAML.
        **flags: their values by dotted path, `**{"source.uri": "photos/"}`; None: the flag was not given.

    Raises:
        UsageError: every problem, in one line.
    """
    data = {} if path is None else read_spec_file(path)
    for assignment in overrides:
        override(data, assignment)
    for dotted, value in flags.items():
        if value is not None:
            put(data, dotted, value)
    return parse_spec(cls, data, path if path is not None else "spec")


def parse_spec(cls: type[SpecT], data: Mapping[str, Any], where: str) -> SpecT:
    """Validate plain data, of a spec file or of a run's stored spec.

    Args:
        where: the data's origin, for the message.

    Raises:
        UsageError: every problem, joined by "; ".
    """
    # An absent section, or a bare `pool:`, is an empty one: messages then name source.uri and not source.
    empty: dict[str, Any] = {name: {} for name in sections(cls) if data.get(name) is None}
    try:
        return cls.model_validate({**data, **empty})
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(problems(cls, error))}") from None


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the spec file of a job, by the job's name.

    Raises:
        UsageError: there is no such job.
    """
    if name not in SPECS:
        raise UsageError(
            f"there is no spec {show(name)}{nearest(name, SPECS)}; the specs are: {', '.join(SPECS)}"
        )
    return SPECS[name].model_json_schema()
