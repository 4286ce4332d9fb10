"""Says what is wrong with a spec: dotted path, got, wanted, nearest right name.

Enters: a spec's model and pydantic's ValidationError. Leaves: one sentence per problem.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHOWN_CHARACTERS = 60


class Wanted(NamedTuple):
    """Marks a type with what it takes, in words; a secret one may hold a password: never show it."""

    text: str
    secret: bool = False


def problems(cls: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Every problem once, in the order of the spec's fields."""
    seen: set[str] = set()
    for detail in error.errors(include_url=False):
        path, wanted = _locate(cls, detail)
        if path not in seen:  # a union reports once for each of its members
            seen.add(path)
            yield _problem(cls, path, wanted, detail)


def nearest(path: str, candidates: Sequence[str] | Mapping[str, object]) -> str:
    """A hint at the right name: beside it in its own section, a section, or the same name in another section.

    Args:
        path: dotted, as the user wrote it.
        candidates: the dotted names there are.

    Returns:
        A continuation of a sentence, or "" where nothing comes near.
    """
    section, _, name = path.rpartition(".")
    beside = {_leaf(c): c for c in candidates if c.rpartition(".")[0] == section}
    sections = {c.partition(".")[0]: c.partition(".")[0] for c in candidates if not section}
    elsewhere = {_leaf(c): c for c in candidates}
    for names in (beside, sections, elsewhere):
        if match := difflib.get_close_matches(name, names, n=1):
            return f" (did you mean {names[match[0]]}?)"
    return f" ({section} has {', '.join(beside)})" if section and beside else ""


def show(value: object) -> str:
    """The value as a user wrote it, near enough, and never long."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"  # Python refuses to print one of more than 4300 digits
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def sections(cls: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a spec that are sections themselves, always there."""
    return {
        name: field.annotation
        for name, field in cls.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _inner(cls: type[BaseModel]) -> dict[str, tuple[type[BaseModel], bool]]:
    """The sections, those that may be null, and mappings from names to sections (True)."""
    found = {name: (section, False) for name, section in sections(cls).items()}
    for name, field in cls.model_fields.items():
        for member in getattr(field.annotation, "__args__", ()):
            if isinstance(member, type) and issubclass(member, BaseModel):
                found[name] = member, getattr(field.annotation, "__origin__", None) is dict
    return found


def _dotted_names(cls: type[BaseModel], near: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Every dotted name there is; a mapping's section goes by the name it has in `near`, a path."""
    inner = _inner(cls)
    for name in cls.model_fields:
        if name in inner:
            section, is_named = inner[name]
            middle = f"{near[1] if len(near) > 1 and near[0] == name else 'NAME'}." if is_named else ""
            yield from _dotted_names(section, near, f"{prefix}{name}.{middle}")
        else:
            yield prefix + name


def _section_at(cls: type[BaseModel], path: str) -> type[BaseModel]:
    parts = iter(path.split("."))
    for part in parts:
        cls, is_named = _inner(cls)[part]
        if is_named:
            next(parts, None)
    return cls


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _locate(cls: type[BaseModel], detail: ErrorDetails) -> tuple[str, Wanted | None]:
    """The dotted path of the key at fault, without the names that pydantic gives a union's members."""
    names: list[str] = []
    owner = cls
    parts = iter(enumerate(detail["loc"], start=1))
    for position, part in parts:
        if part == "[key]":  # pydantic's word for the name itself in a mapping
            break
        names.append(str(part))
        field = owner.model_fields.get(str(part))
        if field is None:
            break
        inner = _inner(owner)
        if str(part) not in inner:
            index = next((f"[{i}]" for i in detail["loc"][position:] if isinstance(i, int)), "")
            return ".".join(names) + index, _wanted(field.annotation, field.metadata)
        owner, is_named = inner[str(part)]
        if is_named:
            names += [str(name) for _, name in [next(parts, (0, None))] if name is not None]
            if len(names) == position:
                return ".".join(names), _wanted(field.annotation, field.metadata)
    return ".".join(names), None


def _wanted(annotation: Any, metadata: Sequence[Any] = ()) -> Wanted | None:
    # A type made of another one has both marks, its own last.
    for mark in reversed((*getattr(annotation, "__metadata__", ()), *metadata)):
        if isinstance(mark, Wanted):
            return mark
    # `Count | None` keeps the mark inside the union.
    members = getattr(annotation, "__args__", ())
    mark = next((mark for member in members if (mark := _wanted(member)) is not None), None)
    return mark._replace(text=f"{mark.text}, or null") if mark and type(None) in members else mark


def _problem(cls: type[BaseModel], path: str, wanted: Wanted | None, detail: ErrorDetails) -> str:
    kind, got = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        shown = path if len(path) <= _SHOWN_CHARACTERS else path[:_SHOWN_CHARACTERS] + "…"
        return f"{shown} is not a known key{nearest(path, list(_dotted_names(cls, path.split('.'))))}"
    if kind == "missing":
        flag = f" or give --{path.split('.')[0]}" if path.endswith(".uri") else ""
        return f"{path} is not set, wanted {wanted.text if wanted else 'a value'}: write it in the spec{flag}"
    if (
        kind == "value_error"
    ):  # a sentence of our own validators, which begins with its verb for a single field
        return f"{path}{'' if wanted else ':'} {detail['ctx']['error']}"
    if kind == "model_type":
        keys = ", ".join(_section_at(cls, path).model_fields)
        return f"{path} is of type {type(got).__name__}, wanted a section with the keys {keys}"
    shown = f"of type {type(got).__name__}" if wanted is not None and wanted.secret else show(got)
    return f"{path} is {shown}, wanted {wanted.text if wanted else detail['msg']}"
