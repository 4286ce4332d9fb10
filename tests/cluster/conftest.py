"""What APIs would say of a manifest: their published schemas (data/README.md), in which no unknown field
passes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

_DATA = Path(__file__).parent / "data"
_DEFINITIONS = {
    "ClusterQueue": "kueue.v1beta2.ClusterQueue",
    "ConfigMap": "api.core.v1.ConfigMap",
    "CronJob": "api.batch.v1.CronJob",
    "LocalQueue": "kueue.v1beta2.LocalQueue",
    "PodMonitor": "monitoring.v1.PodMonitor",
    "PrometheusRule": "monitoring.v1.PrometheusRule",
    "RayCronJob": "ray.v1.RayCronJob",
    "RayJob": "ray.v1.RayJob",
    "ResourceFlavor": "kueue.v1beta2.ResourceFlavor",
    "Role": "api.rbac.v1.Role",
    "RoleBinding": "api.rbac.v1.RoleBinding",
    "ServiceAccount": "api.core.v1.ServiceAccount",
}


@pytest.fixture(scope="session")
def problems() -> Callable[[dict[str, Any]], list[str]]:
    """Says what its API's schema finds in a manifest; nothing is an empty list."""
    jsonschema = importlib.import_module("jsonschema")
    schemas: dict[str, Any] = json.loads((_DATA / "kubernetes.json").read_text())["$defs"]
    for name in ("kuberay.yaml", "kueue.yaml", "prometheus_operator.yaml"):
        read = yaml.load((_DATA / name).read_text(), yaml.CSafeLoader)
        schemas |= {key: _closed(schema) for key, schema in read.items()}
    checks = {
        kind: jsonschema.Draft202012Validator({"$defs": schemas, "$ref": f"#/$defs/{name}"})
        for kind, name in _DEFINITIONS.items()
    }
    return lambda manifest: [error.message for error in checks[manifest["kind"]].iter_errors(manifest)]


def _closed(schema: Any) -> Any:
    """As a JSON Schema: references written out, and objects with properties take no others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    if "properties" in schema:
        fields = {name: _closed(field) for name, field in schema["properties"].items()}
        return schema | {"properties": fields, "additionalProperties": False}
    return {key: _closed(value) for key, value in schema.items()}
