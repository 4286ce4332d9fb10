"""Reads a spec's YAML and lays dotted overrides over it, before anything is validated.

Enters: a local file and `a.b=c` overrides. Leaves: nested dicts with string keys, or a UsageError.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from schemas.errors import UsageError
from schemas.spec_problems import show

MAX_SPEC_BYTES = 1 << 20


def read_spec_file(path: str) -> dict[str, Any]:
    """The file's mapping; an empty file is an empty mapping.

    Raises:
        UsageError: unreadable, over 1 MiB, not YAML (with line and column), or not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the spec file {path}: {error.strerror}") from None
    if len(raw) > MAX_SPEC_BYTES:
        raise UsageError(f"{path} is larger than 1 MiB, which no spec is: is it the right file?")
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


class _SpecLoader(yaml.SafeLoader):
    """Plain YAML: keys are names and stand once, there are no aliases (they can grow without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # types-PyYAML has no types here
            raise ComposerError(
                None, None, "aliases (*name) are not taken; quote a value that opens with *", mark
            )
        return super().compose_node(parent, index)

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
