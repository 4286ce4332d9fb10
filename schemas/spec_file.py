"""Reads a spec's YAML and lays dotted overrides over it, before anything is validated.

Enters: a local file, or `env:NAME`, an environment variable, and `a.b=c` overrides. Leaves: nested dicts with
string keys, or a UsageError. A spec may be a stranger's: it is bounded in bytes, depth, number and length of
values before anything is made of it.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from schemas.errors import UsageError
from schemas.spec_problems import show

MAX_SPEC_BYTES = 1 << 20
# Linux starts no process with a longer variable than 128 KiB, its name included.
MAX_SPEC_VARIABLE_BYTES = 128_000
MAX_SPEC_DEPTH = 20  # ours are 4 deep
MAX_SPEC_VALUES = 10_000  # keys counted too; a second to read. Our longest sections have some 20
MAX_SPEC_TEXT = 10_000  # characters of one value; a number so long takes minutes to work out

_VARIABLE_PREFIX = "env:"
# Messages quote pieces of a spec, which another variable's secret is not to become.
_VARIABLE = re.compile(r"MASKLAKE_[A-Z0-9_]+")


def read_spec_file(path: str) -> dict[str, Any]:
    """The mapping in a file, or in a variable; empty, it is an empty mapping.

    Args:
        path: a local file of at most 1 MiB, or `env:MASKLAKE_…`, a variable of at most 128 kB.

    Raises:
        UsageError: unreadable or not set, too large, too deep, too long, not YAML (with line and column), or
            not a mapping.
    """
    raw = _read_variable(path) if path.startswith(_VARIABLE_PREFIX) else _read_file(path)
    data = _load_yaml(raw, path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a mapping of sections such as `source: {{uri: photos/}}`")
    return data


def override(data: dict[str, Any], assignment: str) -> None:
    """Lay `a.b=value` over the data, in place.

    The value is read as one YAML scalar, so that `*.jpg` needs no quotes, or as YAML where it opens with a
    bracket, a brace or a quote.

    Raises:
        UsageError: not of that form.
    """
    key, separator, text = (part.strip() for part in assignment.partition("="))
    if not separator or not all(key.split(".")):
        raise UsageError(f"--set {show(assignment)} is not of the form a.b=value, such as pool.batch_size=16")
    put(data, key, _parse_value(key, text))


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set data["a"]["b"] for "a.b", in place; whatever is not a section on the way becomes one."""
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(data.get(parent), dict):
            data[parent] = {}
        data = data[parent]
    data[last] = value


def _read_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the spec file {path}: {error.strerror}") from None
    if len(raw) > MAX_SPEC_BYTES:
        raise UsageError(f"{path} is larger than 1 MiB, which no spec is: is it the right file?")
    return raw


def _read_variable(path: str) -> bytes:
    name = path.removeprefix(_VARIABLE_PREFIX)
    if not _VARIABLE.fullmatch(name):
        raise UsageError(
            f"{path} names no variable of a spec, wanted env:MASKLAKE_SPEC or another MASKLAKE_… in capitals "
            f"(a file of that name is ./{path})"
        )
    text = os.environ.get(name)
    if text is None:
        raise UsageError(f"{path}: the environment has no {name}; set it to the spec's YAML, or give a file")
    raw = os.fsencode(text)
    if len(raw) > MAX_SPEC_VARIABLE_BYTES:
        raise UsageError(
            f"{path} holds {len(raw)} bytes, at most {MAX_SPEC_VARIABLE_BYTES} are taken; use a file"
        )
    return raw


class _SpecLoader(yaml.SafeLoader):
    """Plain YAML: keys are names and stand once, there are no aliases (they can grow without bound)."""

    _depth = 0
    _num_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # types-PyYAML has no types here
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(
                None, None, "aliases (*name) are not taken; quote a value that opens with *", mark
            )
        if self._depth == MAX_SPEC_DEPTH:
            raise RecursionError  # what Python would say later, at a depth of its own
        self._num_values += 1
        if self._num_values > MAX_SPEC_VALUES:
            raise ComposerError(
                None, None, f"it has more than {MAX_SPEC_VALUES} values, as no spec has", mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SPEC_TEXT:
            raise ComposerError(
                None,
                None,
                f"a value has {len(node.value)} characters, at most {MAX_SPEC_TEXT} are taken",
                mark,
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ConstructorError(
                    None, None, f"{show(key.value)} is not a key of any spec", key.start_mark
                )
            if key.value in seen:
                raise ConstructorError(
                    None, None, f"key {show(key.value)} stands there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a string.
_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _load_yaml(raw: bytes | str, where: str) -> Any:
    try:
        return yaml.load(raw, _SpecLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{where}{at}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text; a date such as 2026-13-45
        raise UsageError(f"{where} is not YAML: {error}") from None
    except RecursionError:
        raise UsageError(f"{where} is not a spec: it is nested too deeply") from None


def _parse_value(key: str, text: str) -> Any:
    if text.startswith(("[", "{", "'", '"')):
        return _load_yaml(text, f"--set {key}")
    loader = _SpecLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # nor here
    if tag.rpartition(":")[2] not in ("null", "bool", "int", "float"):
        return text  # *, = and << have tags of their own, 2026-01-31 is a date: no setting is one
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:
        raise UsageError(f"--set {key}: {error}") from None
