"""YAML that every reader takes alike.

Enters: plain dicts, lists and scalars. Leaves: text, the keys in their order, long strings with lines as
blocks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

Manifest = dict[str, Any]


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """One YAML document each."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=1000)


def spec_text(spec: Mapping[str, Any]) -> str:
    """The content of a spec file."""
    return yaml.dump(dict(spec), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for a string and other readers for a number or a truth value; no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
