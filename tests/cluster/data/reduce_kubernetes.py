"""Makes kubernetes.json: the schemas of what our manifests are made of, without their descriptions.

Enters: a folder of kubernetes-validate's schemas (README.md says which). Leaves: JSON with `$defs`, in which
no unknown field passes. Run as `python tests/cluster/data/reduce_kubernetes.py FOLDER`.
"""

import json
import sys
from pathlib import Path
from typing import Any

KINDS = (
    "api.batch.v1.CronJob",
    "api.core.v1.ConfigMap",
    "api.core.v1.PodTemplateSpec",
    "api.core.v1.Service",
    "api.core.v1.ServiceAccount",
    "api.rbac.v1.Role",
    "api.rbac.v1.RoleBinding",
)
_KEPT = frozenset(
    {"additionalProperties", "enum", "format", "items", "oneOf", "properties", "required", "type"}
)


def reduce_schemas(definitions: dict[str, Any]) -> dict[str, Any]:
    """The kinds and all that they refer to."""
    found: dict[str, Any] = {}
    wanted = list(KINDS)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = _reduced(definitions[name])
        wanted += _references(found[name])
    return {"$defs": dict(sorted(found.items()))}


def _reduced(schema: Any) -> Any:
    """A schema's structure; the keys of `properties` are names of fields, and all of them are kept."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": "#/$defs/" + schema["$ref"].rpartition("/")[2].removeprefix("io.k8s.")}
    kept: dict[str, Any] = {}
    for key in sorted(_KEPT & schema.keys()):
        value = schema[key]
        if key == "properties":
            kept[key] = {name: _reduced(field) for name, field in sorted(value.items())}
        elif key == "oneOf":
            kept[key] = [_reduced(one) for one in value]
        else:
            kept[key] = _reduced(value) if isinstance(value, dict) else value
    return kept


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for one in schema for name in _references(one)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].removeprefix("#/$defs/")] if isinstance(schema.get("$ref"), str) else []
    return own + [name for value in schema.values() for name in _references(value)]


def main() -> None:
    definitions = json.loads((Path(sys.argv[1]) / "_definitions.json").read_text())["$defs"]
    named = {name.removeprefix("io.k8s."): schema for name, schema in definitions.items()}
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(schema, separators=(',', ':'))}"
        for name, schema in reduce_schemas(named)["$defs"].items()
    )
    (Path(__file__).parent / "kubernetes.json").write_text('{"$defs": {\n' + lines + "\n}}\n")


if __name__ == "__main__":
    main()
