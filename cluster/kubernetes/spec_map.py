"""How a spec travels: in a ConfigMap, as a file of the head, where the driver runs.

Enters: the content of a spec file. Leaves: the ConfigMap, the volume that shows it, the command that reads
it. A file, and not an environment variable as with `masklake submit`: `kubectl edit configmap` shows it as
it was written, and it may be longer than the 128 KiB that the kernel lets a variable be.
"""

from collections.abc import Mapping
from typing import Any

from cluster.kubernetes.pools import RayCluster
from cluster.kubernetes.yaml_text import Manifest, spec_text
from schemas.errors import UsageError
from schemas.spec_problems import show

FOLDER = "/etc/masklake"
MOUNT = {"name": "spec", "mountPath": FOLDER, "readOnly": True}
# A ConfigMap holds 1 MiB, keys and other entries included.
_MAX_BYTES = 1_000_000
_PRESETS = ("demo", "lite", "r50_fpn", "r50_fpn_v2", "r101_fpn")  # names of models, not places
_LOCATIONS = (
    ("source", "uri"),
    ("model", "uri"),
    ("model", "backbone"),
    ("lake", "uri"),
    ("gate", "annotations"),
    ("out", "uri"),
    ("register_as", "lake"),
)


def entrypoint(job: str) -> str:
    """The command that the driver runs: infer, relabel or train, as on a laptop."""
    return f"masklake {job} {FOLDER}/{job}.yaml"


def spec_file(job: str) -> str:
    """The spec's name in the ConfigMap and in FOLDER."""
    return f"{job}.yaml"


def volume(cluster: RayCluster, key: str) -> Manifest:
    """One entry of the ConfigMap, as a file."""
    return {"name": "spec", "configMap": {"name": cluster.name, "items": [{"key": key, "path": key}]}}


def spec_data(job: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The ConfigMap's data.

    Raises:
        UsageError: the spec names a path of this machine, which no pod sees, or is too long for a ConfigMap.
    """
    _check_reachable(spec)
    text = spec_text(spec)
    if len(text.encode()) > _MAX_BYTES:
        raise UsageError(
            f"the spec is {len(text.encode()):,} bytes long, and a ConfigMap holds {_MAX_BYTES:,}: name a "
            "list in object storage instead of writing it out"
        )
    return {spec_file(job): text}


def _check_reachable(spec: Mapping[str, Any]) -> None:
    found = [(f"{section}.{key}", (spec.get(section) or {}).get(key)) for section, key in _LOCATIONS]
    data_sets = {f"data.{name}": data for name, data in (spec.get("data") or {}).items()}
    data_sets["evaluate.data"] = (spec.get("evaluate") or {}).get("data")
    for where, data in data_sets.items():
        found += [(f"{where}.{key}", (data or {}).get(key)) for key in ("uri", "images")]
    for where, uri in found:
        if uri is None or (where == "model.uri" and _is_name(uri)):
            continue
        place = uri.removeprefix("coco:").removeprefix("lake:")
        if "://" not in place or place.startswith("file://"):
            raise UsageError(
                f"{where} {show(uri)} is a path of this machine, which no pod sees: wanted object storage "
                "such as s3://bucket/prefix"
            )


def _is_name(model: str) -> bool:
    return model in _PRESETS or model.startswith(("alias:", "registry:"))
